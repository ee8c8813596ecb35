"""Replay of recorded traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from math import ceil
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.interface import CHUNK_REQUESTS, DEFAULT_MAX_OUTPUT_TOKENS, own_segment
from viisim.workload.request import Request
from viisim.workload.trace_file import Column, TraceColumns, Words, read_trace

Pieces: TypeAlias = tuple[tuple[int, int], ...]
Flags: TypeAlias = NDArray[np.bool_]

_WORDS = ("tenant", "traffic_class", "session")

_LONGEST_SPAN_NS = 2**62


class TraceReplay:
    """The requests of a trace file, at its own times or stretched.

    Where a trace knows what prompts share (hash ids, component ids), a prompt is one piece per
    id, and the scheduler sees the ids as `prefix_blocks`; what is behind the last id is the
    request's own, and so is a whole prompt without ids. Session, tenant, traffic class and
    priority reach the scheduler where the trace has them. The models of a trace do not: the
    experiment says which model is served. Only the share of streamed requests depends on the
    seed (stream `streamed`).

    A turn that the trace records as an answer to an answer (`TraceColumns.think_ns`) arrives
    when the previous turn of its session has been answered and the recorded pause is over, so
    a slow cluster slows its sessions down. Ids follow the order of the trace, so those of such
    turns are missing among the arrivals and come later, as `Request.next_turn`.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        model: str,
        time_scale: float = 1.0,
        limit: int | None = None,
        streamed: float = 1.0,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
        skip_bad: bool = False,
        closed_loop: bool = True,
    ) -> None:
        """Reads the file. Raises InputError, naming the parameter or the file and line.

        The first arrival becomes 0 and every gap is multiplied by `time_scale`: 2.0 is twice as
        slow, half the rate. Pauses before next turns are the users' own and keep their length,
        whatever the rate at which sessions begin. `limit` keeps the earliest requests only.
        `max_output_tokens` is the limit that every request states, whatever its recorded answer
        (a limit made from the answer would tell the scheduler its length): longer answers are
        cut to it. A recorded answer of 0 tokens becomes 1, the least an engine generates.
        `skip_bad` leaves broken rows out and counts them. Without `closed_loop` every turn
        arrives at its recorded time, answered or not the turn before.
        """
        self.path = Path(path)
        self.model = model
        self.time_scale = parameters.positive("time_scale", time_scale)
        self.limit = None if limit is None else parameters.whole("limit", limit)
        self.streamed = parameters.share("streamed", streamed)
        self.max_output_tokens = parameters.whole("max_output_tokens", max_output_tokens)
        self.closed_loop = closed_loop
        trace = self._trace = earliest(read_trace(path, skip_bad=skip_bad), self.limit)
        self._has_blocks = bool(trace.block_count.any())
        self._arrived_ns = self._stretched(trace.arrived_ns)
        self._outputs = np.clip(trace.output_tokens, 1, self.max_output_tokens)
        self._next_turns = next_turns(trace) if closed_loop else None
        self.total_requests = len(trace)
        """All turns of all sessions."""
        self.cut_outputs = int(np.count_nonzero(trace.output_tokens > self.max_output_tokens))
        """Answers cut to the limit."""
        self.zero_outputs = int(np.count_nonzero(trace.output_tokens == 0))
        """Answers recorded with 0 tokens and replayed with 1."""
        self.skipped_rows = trace.skipped_rows
        """Broken rows of the file that were left out."""

    def _stretched(self, arrived_ns: Column) -> Column:
        if self.time_scale == 1:
            return arrived_ns
        if int(arrived_ns[-1]) * self.time_scale > _LONGEST_SPAN_NS:
            raise InputError(f"time_scale: {self.time_scale!r} makes the trace outlast a century")
        stretched: Column = np.rint(arrived_ns * self.time_scale).astype(np.int64)
        return stretched

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`. Next turns of closed-loop sessions hang on their first."""
        streamed = Streams(seed)["streamed"].random(self.total_requests) < self.streamed
        following = self._next_turns
        if following is None or not (following >= 0).any():
            return self._open_loop(streamed)
        return self._closed_loop(streamed, following)

    def _open_loop(self, streamed: Flags) -> Iterator[Request]:
        for first in range(0, self.total_requests, CHUNK_REQUESTS):
            chunk = slice(first, min(first + CHUNK_REQUESTS, self.total_requests))
            columns = (
                self._arrived_ns[chunk],
                self._trace.prompt_tokens[chunk],
                self._outputs[chunk],
                streamed[chunk],
                self._trace.priority[chunk],
            )
            # Plain Python values from here on: reading numpy scalars one by one is far slower.
            rows = zip(
                range(chunk.start, chunk.stop),
                *(column.tolist() for column in columns),
                *(words_of(self._trace, name, chunk) for name in _WORDS),
                strict=False,
            )
            for row in rows:
                yield self._request(*row)

    def _closed_loop(self, streamed: Flags, following: Column) -> Iterator[Request]:
        is_next = np.zeros(self.total_requests, dtype=np.bool_)
        is_next[following[following >= 0]] = True
        for index in np.flatnonzero(~is_next).tolist():
            yield self._turn(index, streamed, following, int(self._arrived_ns[index]))

    def _turn(self, index: int, streamed: Flags, following: Column, arrived_ns: int) -> Request:
        """One request of a session, and behind it those that wait for its answer."""
        row = slice(index, index + 1)
        words = (next(words_of(self._trace, name, row)) for name in _WORDS)
        request = self._request(
            index,
            arrived_ns,
            int(self._trace.prompt_tokens[index]),
            int(self._outputs[index]),
            bool(streamed[index]),
            int(self._trace.priority[index]),
            *words,
        )
        later = int(following[index])
        if later >= 0:
            turn = partial(self._turn, later, streamed, following)
            request.next_turn = _after(int(self._trace.think_ns[later]), turn)
        return request

    def _request(
        self,
        index: int,
        arrived_ns: int,
        prompt_tokens: int,
        output_tokens: int,
        streamed: bool,
        priority: int,
        tenant: str,
        traffic_class: str,
        session: str,
    ) -> Request:
        blocks = self._trace.blocks(index) if self._has_blocks else []
        pieces = self._pieces(index, prompt_tokens, blocks)
        block_tokens = self._trace.block_tokens
        if blocks and not block_tokens:
            # Ids with lengths of their own. A scheduler may take the ids that it knows for so
            # many blocks of one size: their mean, rounded up, is what errs least.
            block_tokens = ceil(sum(tokens for _, tokens in pieces[: len(blocks)]) / len(blocks))
        view = RequestView(
            f"r{index}",
            self.model,
            arrived_ns / 1e9,
            prompt_tokens,
            self.max_output_tokens,
            streamed,
            priority,
            tenant,
            traffic_class,
            None,
            tuple(blocks),
            block_tokens,
            None,
            session,
        )
        return Request(view, arrived_ns, pieces, output_tokens)

    def _pieces(self, index: int, prompt_tokens: int, blocks: list[int]) -> Pieces:
        """The prompt: a piece per id, then what is the request's own.

        `TraceColumns.pieces` says the same, more slowly where all blocks have one size.
        """
        if not blocks:
            return ((own_segment(index), prompt_tokens),)
        block_tokens = self._trace.block_tokens
        own_tokens = prompt_tokens - len(blocks) * block_tokens
        if own_tokens < 0:  # the last block is a started one
            tail = (blocks[-1], block_tokens + own_tokens)
            return (*zip(blocks, repeat(block_tokens, len(blocks) - 1), strict=False), tail)
        if block_tokens:
            shared: Iterable[tuple[int, int]] = zip(blocks, repeat(block_tokens), strict=False)
        else:
            shared = self._trace.pieces(index)
            own_tokens -= sum(tokens for _, tokens in shared)
        return (*shared, (own_segment(index), own_tokens)) if own_tokens else tuple(shared)


def _after(think_ns: int, turn: Callable[[int], Request]) -> Callable[[int], Request]:
    """`turn` at the end of the pause that begins with the answer before it."""
    return lambda answered_ns: turn(answered_ns + think_ns)


def earliest(trace: TraceColumns, limit: int | None) -> TraceColumns:
    """The first `limit` requests of a trace, all with None."""
    if limit is None or limit >= len(trace):
        return trace
    names = ("arrived_ns", "prompt_tokens", "output_tokens", "first_block", "block_count")
    columns = {name: getattr(trace, name)[:limit] for name in (*names, "think_ns", "priority")}
    words = {key: Words(of.codes[:limit], of.names) for key, of in trace.words.items()}
    return replace(trace, **columns, words=words)


def words_of(trace: TraceColumns, name: str, rows: slice) -> Iterator[str]:
    """The rows' words of one kind, empty where there is none; without end if all are empty."""
    words = trace.words.get(name)
    if words is None:
        return repeat("")
    return map(("", *words.names).__getitem__, (words.codes[rows] + 1).tolist())


def next_turns(trace: TraceColumns) -> Column:
    """For every request, the one that waits for its answer; -1 where none does.

    It is the next of the same session, if the trace knows the pause before it.
    """
    following = np.full(len(trace), -1)
    sessions = trace.words.get("session")
    if sessions is not None:
        order = np.argsort(sessions.codes, kind="stable")
        earlier, later = order[:-1], order[1:]
        codes = sessions.codes
        waits = (
            (codes[earlier] == codes[later]) & (codes[later] >= 0) & (trace.think_ns[later] >= 0)
        )
        following[earlier[waits]] = later[waits]
    return following
