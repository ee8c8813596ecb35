"""Which requests shared each engine step, found out from what their clients saw.

A client sees when each token of each request came. In a closed loop it is also known when each
request was sent: the next in the list as soon as one ends. Tokens that come together are one
step's; between two such instants lies one step, and who got a token at its end was in it. What
prefilled in it follows from vLLM's rules: first come first served, within the token budget.

Entries that contradict these rules are left out rather than guessed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from viisim.calibration.measurements import Floats, RequestLog, StepLog

_TOGETHER_S = 0.004
_TOGETHER_SHARE = 0.3
"""Tokens of one step reach their clients within this time, and within this share of a step."""

SHORT_TOKENS = 64
"""Prompts below this take about as long cached as not."""

_MOST_SHIFT_S = 0.02
"""Most by which a request's start is moved to bring its tokens in step with the others'."""

_ALIGNED_TOKENS = 200


def steps_of(log: RequestLog, max_batched_tokens: int) -> StepLog:
    """The engine steps behind the log, as far as they can be told apart."""
    assert log.gaps_s is not None, "only logs with all token times show their steps"
    gaps_s = np.concatenate([*log.gaps_s, [np.inf]])
    together_s = min(_TOGETHER_S, _TOGETHER_SHARE * float(np.median(gaps_s)))
    reconstruction = _Reconstruction(log, token_times(log), max_batched_tokens, together_s)
    rows = np.array(list(reconstruction.rows()), dtype=float).reshape(-1, 6)
    decodes, context, steps, tokens, pairs = rows[:, 1:].T.astype(np.int64)
    return StepLog(rows[:, 0], decodes, context, steps, tokens, pairs, np.zeros(len(rows)))


def token_times(log: RequestLog) -> list[Floats]:
    """When each token of each request came, from the start of the run."""
    assert log.gaps_s is not None
    since_sent = [
        ttft_s + np.concatenate(([0.0], np.cumsum(gaps)))
        for ttft_s, gaps in zip(log.ttft_s, log.gaps_s, strict=True)
    ]
    if log.arrived_s is not None:
        return [sent + times for sent, times in zip(log.arrived_s, since_sent, strict=True)]
    return _in_closed_loop(since_sent, log.concurrency or len(log))


def _in_closed_loop(since_sent: Sequence[Floats], concurrency: int) -> list[Floats]:
    """Each request is sent when one ends; small delays of the client would add up over a run,
    so each is brought in step with those it ran beside."""
    ends: list[float] = []
    placed: list[Floats] = []
    live: list[Floats] = []
    for times in since_sent:
        start_s = heapq.heappop(ends) if len(ends) == concurrency else 0.0
        live = [other for other in live if other[-1] > start_s]
        own = start_s + times
        own = own + _shift(own, live)
        placed.append(own)
        live.append(own)
        heapq.heappush(ends, float(own[-1]))
    return placed


def _shift(own: Floats, others: Sequence[Floats]) -> float:
    """What brings the tokens in step with those of the request that runs beside it longest."""
    beside = max(others, key=lambda other: min(other[-1], own[-1]), default=None)
    if beside is None or len(beside) < 2:
        return 0.0
    margin = _MOST_SHIFT_S
    shared = own[(own >= beside[0] - margin) & (own <= beside[-1] + margin)][:_ALIGNED_TOKENS]
    if len(shared) < 5:
        return 0.0
    after = np.clip(np.searchsorted(beside, shared), 1, len(beside) - 1)
    earlier, later = beside[after - 1] - shared, beside[after] - shared
    shift = float(np.median(np.where(np.abs(earlier) < np.abs(later), earlier, later)))
    return shift if abs(shift) <= _MOST_SHIFT_S else 0.0


_Row = tuple[float, int, int, int, int, int]


@dataclass(slots=True)
class _Prefills:
    """What prefilled within an interval."""

    steps: int = 0
    tokens: int = 0
    pairs: int = 0

    def add(self, start: int, end: int) -> None:
        tokens = end - start
        self.tokens += tokens
        self.pairs += tokens * start + tokens * (tokens + 1) // 2


@dataclass(slots=True)
class _Reconstruction:
    """Walks over the instants at which tokens came."""

    log: RequestLog
    times: Sequence[Floats]
    budget: int
    together_s: float
    decoding: dict[int, int] = field(default_factory=dict)
    """Tokens that each decoding request attends to in its next step."""
    begun: dict[int, int] = field(default_factory=dict)
    """Computed prompt tokens of requests whose prompt is cut across steps."""

    def rows(self) -> Iterator[_Row]:
        """(duration, decodes, context, engine steps, prefill tokens, pairs) of each interval."""
        sent_s = np.array([t[0] for t in self.times]) - self.log.ttft_s
        arrivals = np.argsort(sent_s, kind="stable").tolist()
        waiting: list[int] = []
        taken = 0
        before_s = 0.0
        end_s = float(sent_s.max()) if self.log.goes_on else np.inf
        for now_s, tokens in self._instants():
            if now_s > end_s:
                break
            firsts = [request for request, number in tokens if number == 0]
            others = {request for request, number in tokens if number > 0}
            while taken < len(arrivals) and (
                sent_s[arrivals[taken]] < before_s - self.together_s or set(firsts) - set(waiting)
            ):
                waiting.append(arrivals[taken])
                taken += 1
            idle = not self.decoding
            start_s = before_s
            if idle and firsts:
                start_s = max(before_s, float(min(sent_s[request] for request in waiting)))
            known = others == set(self.decoding)
            row = self._row(now_s - start_s, firsts, waiting, sent_s, start_s)
            if known and row is not None:
                yield row
            self._advance(tokens)
            before_s = now_s

    def _instants(self) -> Iterator[tuple[float, list[tuple[int, int]]]]:
        """Instants at which tokens came, each with (request, number of its token)."""
        lengths = [len(times) for times in self.times]
        when = np.concatenate(self.times)
        who = np.repeat(np.arange(len(lengths)), lengths)
        nth = np.concatenate([np.arange(length) for length in lengths])
        order = np.argsort(when, kind="stable")
        when, who, nth = when[order], who[order], nth[order]
        cuts = np.flatnonzero(np.diff(when) > self.together_s) + 1
        begins, ends = np.append(0, cuts), np.append(cuts, len(when))
        mean_s = np.add.reduceat(when, begins) / (ends - begins)
        pairs = list(zip(who.tolist(), nth.tolist(), strict=True))
        for now_s, begin, end in zip(mean_s.tolist(), begins, ends, strict=True):
            yield now_s, pairs[begin:end]

    def _row(
        self,
        duration_s: float,
        firsts: list[int],
        waiting: list[int],
        sent_s: Floats,
        start_s: float,
    ) -> _Row | None:
        """The interval's entry; None where the rules do not explain it."""
        decodes, context = len(self.decoding), sum(self.decoding.values())
        if not firsts:
            return (duration_s, decodes, context, 1, 0, 0) if decodes else None
        prefills = self._prefills(firsts, waiting, sent_s, start_s)
        if prefills is None or duration_s <= 0 or any(map(self._was_cached, firsts)):
            return None
        return (duration_s, decodes, context, prefills.steps, prefills.tokens, prefills.pairs)

    def _prefills(
        self, firsts: list[int], waiting: list[int], sent_s: Floats, start_s: float
    ) -> _Prefills | None:
        """What was computed of the prompts whose first token came, and of those behind them."""
        cached, lengths = self.log.cached, self.log.prompt_tokens
        done = {
            request: max(self.begun.pop(request, 0), int(cached[request])) for request in firsts
        }
        total = sum(int(lengths[request]) - start for request, start in done.items())
        room = self.budget - len(self.decoding)
        # Beside decodes every step shows in their tokens; without any, steps may be unseen.
        prefills = _Prefills(1 if self.decoding else max(1, -(-total // max(room, 1))))
        left = prefills.steps * room - total
        for request, start in done.items():
            prefills.add(start, int(lengths[request]))
            waiting.remove(request)
        if left < 0:
            return None
        for request in waiting:
            start = max(self.begun.get(request, 0), int(cached[request]))
            late = bool(self.decoding) and sent_s[request] > start_s - self.together_s
            if left <= 0:
                break
            # One that fits would have come to its end here: it had not arrived yet.
            if late or int(lengths[request]) - start <= left:
                continue
            prefills.add(start, start + left)
            self.begun[request] = start + left
            left = 0
        return prefills

    def _was_cached(self, request: int) -> bool:
        """Whether next to nothing was left to compute: that takes times of its own."""
        cached = int(self.log.cached[request])
        return cached > 0 and int(self.log.prompt_tokens[request]) - cached < SHORT_TOKENS

    def _advance(self, tokens: list[tuple[int, int]]) -> None:
        for request, number in tokens:
            if number == len(self.times[request]) - 1:
                self.decoding.pop(request, None)
            else:
                self.decoding[request] = int(self.log.prompt_tokens[request]) + number + 1
