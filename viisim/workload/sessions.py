"""Conversations: closed-loop sessions whose prompts grow turn by turn.

A session begins by an arrival process. Its next turn arrives a think time after the answer to
the one before, so a slow cluster slows its users down; a session whose turn is shed or refused
ends. The prompt of turn k holds all of turn k-1's prompt, the answer to it, and new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.random import Generator
from scipy.special import log_ndtr, ndtr

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.arrivals import Arrivals, Gaps, RateCurve
from viisim.workload.interface import (
    BLOCK_TOKENS,
    CHUNK_REQUESTS,
    DEFAULT_MAX_OUTPUT_TOKENS,
    Labels,
    chunk_sizes,
    own_block,
    own_segment,
)
from viisim.workload.lengths import LengthSpec, Normals
from viisim.workload.prefixes import Pieces, Prefixes
from viisim.workload.presets import resolve_lengths
from viisim.workload.request import Request

_MOST_TURNS = 10_000
_LONGEST_THINK_S = 1e7
_SESSION = crc32(b"session")


class ThinkTime(Protocol):
    """How long a user takes from an answer to the next prompt."""

    def seconds(self, normals: Normals) -> Normals:
        """One time for each standard normal variate."""


class LognormalTime:
    """By median and coefficient of variation."""

    def __init__(self, median_s: float, cv: float, name: str = "think_s") -> None:
        """Raises InputError, naming the parameter, for an impossible value."""
        self._median_s = parameters.positive(f"{name}.median", median_s)
        self._sigma = math.sqrt(math.log1p(parameters.positive(f"{name}.cv", cv) ** 2))

    def seconds(self, normals: Normals) -> Normals:
        """See `ThinkTime.seconds`."""
        return self._median_s * np.exp(self._sigma * normals)


class ExponentialTime:
    """By mean."""

    def __init__(self, mean_s: float, name: str = "think_s") -> None:
        """Raises InputError, naming the parameter, for an impossible mean."""
        self._mean_s = parameters.positive(f"{name}.exponential", mean_s)

    def seconds(self, normals: Normals) -> Normals:
        """See `ThinkTime.seconds`."""
        times: Normals = -self._mean_s * log_ndtr(-normals)
        return times


def think_time(spec: Mapping[str, float]) -> LognormalTime | ExponentialTime:
    """`{median: s, cv: c}` or `{exponential: mean_s}`. Raises InputError."""
    if set(spec) == {"median", "cv"}:
        return LognormalTime(spec["median"], spec["cv"])
    if set(spec) == {"exponential"}:
        return ExponentialTime(spec["exponential"])
    raise InputError(
        f"think_s: {dict(spec)!r} is neither {{median: s, cv: c}} nor {{exponential: mean_s}}; "
        "write one of them"
    )


class Sessions:
    """Conversations drawn from distributions; `requests` counts the turns of all together.

    Everything in session s is drawn from a generator of its own: it is the same whatever the
    others do, however many follow, and whatever the policy and the cluster. Only the last
    session is cut short, to make the number of requests.
    """

    def __init__(
        self,
        *,
        requests: int,
        rate_per_s: float,
        turns: LengthSpec,
        first_tokens: LengthSpec,
        turn_tokens: LengthSpec,
        output_tokens: LengthSpec,
        think_s: Mapping[str, float],
        model: str,
        gaps: Gaps | None = None,
        rate_curve: RateCurve | None = None,
        prefixes: Prefixes | None = None,
        streamed: float = 1.0,
        labels: Labels | None = None,
        max_prompt_tokens: int | None = None,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """Raises InputError, naming the parameter, for an impossible value.

        `rate_per_s` counts sessions. The first prompt has a prefix, where there is one, and
        `first_tokens`; each later one adds `turn_tokens`. Before a prompt would exceed
        `max_prompt_tokens` the session ends; a first prompt is cut to it. The scheduler sees the
        prompt's full blocks of `block_tokens` tokens.
        """
        self.total_requests = parameters.whole("requests", requests)
        self.arrivals = Arrivals(rate_per_s, gaps, rate_curve)
        self.arrivals.check_span(requests, "sessions")
        self.turns = resolve_lengths("turns", turns)
        self.first_tokens = resolve_lengths("first_tokens", first_tokens)
        self.turn_tokens = resolve_lengths("turn_tokens", turn_tokens)
        self.output_tokens = resolve_lengths("output_tokens", output_tokens)
        self.think = think_time(think_s)
        self.model = model
        self.prefixes = prefixes
        self.streamed = parameters.share("streamed", streamed)
        self.labels = labels or Labels()
        most = parameters.MAX_TOKENS if max_prompt_tokens is None else max_prompt_tokens
        self.max_prompt_tokens = parameters.whole("max_prompt_tokens", most)
        if prefixes is not None and prefixes.tokens >= most:
            raise InputError(
                f"max_prompt_tokens: {most} leaves nothing behind a prefix of {prefixes.tokens} "
                "tokens; raise it"
            )
        self.max_output_tokens = parameters.whole("max_output_tokens", max_output_tokens)
        self.block_tokens = parameters.whole("block_tokens", block_tokens)
        if block_tokens < 8:
            raise InputError(f"block_tokens: {block_tokens} is not possible; use at least 8")
        self.cut_outputs = 0
        """Answers cut to the limit in the sessions that the last call of `requests` has begun."""

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`: the first turn of each session."""
        self.cut_outputs = 0
        return self._generate(Streams(seed))

    def _generate(self, streams: Streams) -> Iterator[Request]:
        left, session = self.total_requests, 0
        sizes = chunk_sizes(self.total_requests, CHUNK_REQUESTS)
        for arrived_ns in self.arrivals.chunks_ns(streams["arrivals"], sizes):
            for now_ns in arrived_ns.tolist():
                plan = self._plan(streams.seed, session, left)
                yield plan.begin(now_ns)
                left -= len(plan.outputs)
                session += 1
                if not left:
                    return

    def _plan(self, seed: int, session: int, most_turns: int) -> _Session:
        """Draw a session of at most so many turns."""
        stream = Generator(np.random.PCG64(np.random.SeedSequence([seed, _SESSION, session])))
        wanted = int(self.turns.tokens(stream.standard_normal(1))[0])
        group = self._group(stream)
        # A row a turn: the first rows are the same however many follow.
        draws = stream.standard_normal((min(wanted, most_turns, _MOST_TURNS), 4))
        added = self.turn_tokens.tokens(draws[:, 0])
        added[0] = self.first_tokens.tokens(draws[:1, 0])[0]
        drawn = self.output_tokens.tokens(draws[:, 1])
        outputs = np.minimum(drawn, self.max_output_tokens)
        prefix_tokens = 0 if self.prefixes is None or group < 0 else self.prefixes.tokens
        added[0] = min(int(added[0]), self.max_prompt_tokens - prefix_tokens)
        answered = np.concatenate(([prefix_tokens], outputs[:-1]))
        turns = int(np.count_nonzero(np.cumsum(added + answered) <= self.max_prompt_tokens))
        self.cut_outputs += int(np.count_nonzero(drawn[:turns] > self.max_output_tokens))
        pause_s = np.minimum(self.think.seconds(draws[:turns, 2]), _LONGEST_THINK_S)
        return _Session(
            workload=self,
            number=session,
            group=group,
            added=added[:turns].tolist(),
            outputs=outputs[:turns].tolist(),
            pause_ns=np.rint(pause_s * 1e9).astype(np.int64).tolist(),
            streamed=(ndtr(draws[:turns, 3]) < self.streamed).tolist(),
        )

    def _group(self, stream: Generator) -> int:
        """The prefix group of a session, -1 for none."""
        uniforms = stream.random((1, 2))
        return -1 if self.prefixes is None else int(self.prefixes.draw(uniforms)[0])


@dataclass(frozen=True, slots=True)
class _Session:
    """All of one conversation but its times of arrival; lists have an entry a turn."""

    workload: Sessions
    number: int
    group: int
    added: list[int]
    """New tokens in each turn's prompt, the system prefix not counted."""
    outputs: list[int]
    pause_ns: list[int]
    """Think time before each turn; the first means nothing."""
    streamed: list[bool]

    def begin(self, now_ns: int) -> Request:
        """The first turn."""
        prefixes = self.workload.prefixes
        if prefixes is None or self.group < 0:
            return self._turn(0, (), (), now_ns)
        start = ((prefixes.segment(self.group), prefixes.tokens),)
        blocks = prefixes.blocks(self.group, self.workload.block_tokens)
        return self._turn(0, start, blocks, now_ns)

    def _turn(self, turn: int, before: Pieces, known: tuple[int, ...], now_ns: int) -> Request:
        """Turn number `turn`, behind the content `before` with its full blocks `known`."""
        workload, labels = self.workload, self.workload.labels
        own, answer = self._segment(turn, 0), self._segment(turn, 1)
        prompt = (*before, (own, self.added[turn]))
        tokens = sum(length for _, length in prompt)
        blocks = known + self._own_blocks(len(known), tokens)
        view = RequestView(
            id=f"s{self.number}-{turn}",
            model=workload.model,
            arrived_s=now_ns / 1e9,
            prompt_tokens=tokens,
            max_output_tokens=workload.max_output_tokens,
            streamed=self.streamed[turn],
            priority=labels.priority,
            tenant=labels.tenant,
            traffic_class=labels.traffic_class,
            deadline_s=labels.due_s(now_ns / 1e9),
            prefix_blocks=blocks,
            prefix_block_tokens=workload.block_tokens,
            session=f"s{self.number}",
        )
        outputs = self.outputs[turn]
        if turn + 1 == len(self.outputs):
            return Request(view, now_ns, prompt, outputs)
        after = (*prompt, (answer, outputs))
        following = partial(self._next_turn, turn + 1, after, blocks)
        return Request(view, now_ns, prompt, outputs, answer, following)

    def _next_turn(
        self, turn: int, before: Pieces, known: tuple[int, ...], answered_ns: int
    ) -> Request:
        return self._turn(turn, before, known, answered_ns + self.pause_ns[turn])

    def _segment(self, turn: int, part: int) -> Hashable:
        """What the user (part 0) or the model (1) says in a turn."""
        return own_segment(2 * (self.number * _MOST_TURNS + turn) + part)

    def _own_blocks(self, first: int, tokens: int) -> tuple[int, ...]:
        """The full blocks from number `first` on: nobody else has them."""
        full = tokens // self.workload.block_tokens
        return tuple(range(own_block(self.number, first), own_block(self.number, full)))
