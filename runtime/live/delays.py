"""How long requests and answers are on their way between a client and an engine.

A client notes when it sent a request and when the first token came; the engine notes its steps.
What lies between them is HTTP, tokens and pipes: the API server's time. On an idle engine it shows
in each request. A busy one makes the API server slower, where both compute on one core, and hides
the delay in the wait for the next step; it must be inferred.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from runtime.load import Record
from viisim.errors import InputError

_IDLE_S = 0.002
"""An engine whose next step begins later than this waited for a request."""
_FEWEST_REQUESTS = 10

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Overhead:
    """Time to first token as the client saw it, less what the engine's steps took, of requests
    that were alone. In seconds."""

    requests: int
    mean_s: float
    p50_s: float
    p90_s: float
    request_s: float
    request_per_prompt_token_s: float
    """From sending until the first step begins: a straight line, not below 0."""
    answer_s: float
    """The rest, from the end of the last step until the client has the token; the median."""

    @classmethod
    def of(
        cls, prompt_tokens: Sequence[int], request_s: Sequence[float], answer_s: Sequence[float]
    ) -> Overhead:
        """Of each request's prompt, and how long it and its answer were on their way."""
        extra_s = np.add(request_s, answer_s)
        fixed_s, slope_s = _line(prompt_tokens, request_s)
        return cls(
            requests=len(extra_s),
            mean_s=float(extra_s.mean()),
            p50_s=float(np.median(extra_s)),
            p90_s=float(np.quantile(extra_s, 0.9)),
            request_s=fixed_s,
            request_per_prompt_token_s=slope_s,
            answer_s=max(median(answer_s), 0.0),
        )


@dataclass(frozen=True, slots=True)
class BusyDelays:
    """On the way to a busy engine and back."""

    requests: int
    """Those that came while a step was computed, and found nobody waiting."""
    request_s: float
    """Without the prompt's share."""
    answer_s: float
    """Of first tokens; the median."""


def overhead_of(records: Sequence[Record], steps: Sequence[Row]) -> Overhead:
    """Of requests that were sent one after the other, and the worker's steps meanwhile; `sent_s`
    and `start_s` are on one clock.

    Raises InputError where the steps are not those of these requests.
    """
    request_s, answer_s = [], []
    for record, (first, last) in zip(records, _prefills(records, steps), strict=True):
        own = [step for step in steps[first : last + 1] if step["prefill_tokens"]]
        engine_s = sum(_duration_s(step, chunk > 0) for chunk, step in enumerate(own))
        assert record.ttft_from_sent_s is not None, "it was answered"
        request_s.append(own[0]["start_s"] - record.sent_s)
        answer_s.append(record.ttft_from_sent_s - request_s[-1] - engine_s)
    return Overhead.of([record.prompt_tokens for record in records], request_s, answer_s)


def busy_delays_of(
    records: Sequence[Record], steps: Sequence[Row], per_prompt_token_s: float
) -> BusyDelays | None:
    """Of requests that came at any moment of a step; `sent_s` and `start_s` are on one clock.

    A request that was not in a step, though nobody waited when it began, was on its way for longer
    than until then; and not for longer than until its own step began. The delay is the median of
    all these bounds: with it, as many requests would be in a step too early as in one too late.
    Each prompt's share is taken off first. None where too few requests say so.

    Raises InputError where the steps are not those of these requests.
    """
    ordered = sorted(records, key=lambda record: record.sent_s)
    ends_s = list(_ends_s(steps))
    bounds_s: list[float] = []
    answers_s: list[float] = []
    for record, (first, last) in zip(ordered, _prefills(ordered, steps), strict=True):
        assert record.ttft_from_sent_s is not None, "it was answered"
        answers_s.append(record.sent_s + record.ttft_from_sent_s - ends_s[last])
        if first and not steps[first - 1]["waiting"] and _follows(steps[first]):
            way_s = record.sent_s + per_prompt_token_s * record.prompt_tokens
            bounds_s += [step["start_s"] - way_s for step in steps[first - 1 : first + 1]]
    if len(bounds_s) < 2 * _FEWEST_REQUESTS:
        return None
    return BusyDelays(
        requests=len(bounds_s) // 2,
        request_s=max(median(bounds_s), 0.0),
        answer_s=max(median(answers_s), 0.0),
    )


def _prefills(records: Sequence[Record], steps: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Of each request, the first and the last step that computed its prompt: engines compute
    prompts one after the other. Raises InputError where these are not the requests' steps."""
    computed = list(accumulate(step["prefill_tokens"] for step in steps))
    asked = list(accumulate((record.prompt_tokens for record in records), initial=0))
    if not computed or computed[-1] != asked[-1]:
        raise InputError(
            f"the worker's steps are not those of the {len(records)} prompts sent: another "
            "client uses it, or it records elsewhere; calibrate a worker that is left alone"
        )
    for before, until in pairwise(asked):
        yield bisect_right(computed, before), bisect_left(computed, until)


def _ends_s(steps: Sequence[Row]) -> Iterator[float]:
    """When each step's tokens were there. A step that was scheduled during the one before it
    begins with that one's end."""
    end_s = 0.0
    for step in steps:
        begin_s = end_s if step["gap_s"] == 0.0 and end_s else step["start_s"]
        end_s = begin_s + step["exec_s"] + step["host_s"]
        yield end_s


def _follows(step: Row) -> bool:
    """Whether the engine was busy when it began."""
    return step["gap_s"] is not None and step["gap_s"] < _IDLE_S


def _duration_s(step: Row, is_later: bool) -> float:
    """A step's time, and for a prompt's later steps the gap before them."""
    return float(step["exec_s"] + step["host_s"] + ((step["gap_s"] or 0.0) if is_later else 0.0))


def _line(x: Sequence[int], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope, neither below 0, of the line that half of the points lie above. Its
    slope is the median of all pairs' (Theil and Sen): a hiccup or two do not turn it."""
    from scipy.stats import theilslopes

    slope = max(float(theilslopes(y, x).slope), 0.0) if len(set(x)) > 1 else 0.0
    return max(float(np.median(np.subtract(y, np.multiply(slope, x)))), 0.0), slope
