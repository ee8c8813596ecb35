"""How fast a machine was while its workers were measured, as `runtime.vllm_plugin.gauge` saw it,
and what that does to their steps.

A machine that is slow does not slow all work down alike: what waits for memory suffers less than
what computes. So decode and prefill each take some power of what the gauge's work takes, and which
one, the steps of a calibration show. While a machine halts, though, nothing goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from viisim.calibration.fit import decode_s, fit_steps
from viisim.calibration.measurements import Floats, StepLog
from viisim.errors import InputError

SPAN_S = 2.0
"""Twenty ticks of the gauge, whose mean says how fast the machine is."""
_LEAST_MOVING = 0.05
"""Of any time: what halts for longer is as good as halted."""
_QUICKEST_PERCENT = 1
_AS_QUICK = 0.03
"""Relative. Of 50 gauges on one machine 47 were at 1.60 to 1.68 ms, none of them more than 1.8 %
off that of its calibration, and three at 1.83 to 1.92 (docs/validation_runs.md, the tenth); of
eight a night later, five were at 1.75 to 1.92 (the eleventh)."""


class Gauge:
    """What a small work, always the same, took of the CPU at some moments; and when the machine
    halted."""

    def __init__(
        self, at_s: ArrayLike, cpu_s: ArrayLike, halts_s: Sequence[tuple[float, float]] = ()
    ) -> None:
        """At least one tick, in order of time, and each halt with its beginning and its length;
        moments on the machine's monotonic clock."""
        self._at_s = np.asarray(at_s, dtype=np.float64)
        costs_s = np.asarray(cpu_s, dtype=np.float64)
        self._sums_s = np.concatenate([[0.0], np.cumsum(costs_s)])
        self.quickest_s = float(np.percentile(costs_s, _QUICKEST_PERCENT))
        """What the quickest hundredth of the ticks took at most."""
        self._halts_s = halts_s
        begin_s, length_s = np.array(halts_s, dtype=np.float64).reshape(-1, 2).T
        self._edges_s = np.column_stack([begin_s, begin_s + length_s]).ravel()
        self._halted_s = np.cumsum(np.column_stack([np.zeros_like(length_s), length_s]))
        """At each of these edges, all that the machine has halted until then."""

    @property
    def end_s(self) -> float:
        """When the last tick was."""
        return float(self._at_s[-1])

    def cost_s(self, at_s: ArrayLike) -> Floats:
        """The work's mean CPU time in the span around each of these moments; where it holds no
        tick, that of the last one before, or of the first of all."""
        middle_s = np.asarray(at_s, dtype=np.float64)
        first = np.searchsorted(self._at_s, middle_s - SPAN_S / 2)
        end = np.searchsorted(self._at_s, middle_s + SPAN_S / 2)
        nothing = first == end
        first = np.where(nothing, np.maximum(first - 1, 0), first)
        end = np.where(nothing, first + 1, end)
        mean_s: Floats = (self._sums_s[end] - self._sums_s[first]) / (end - first)
        return mean_s

    def halts_s(self, begin_s: float, end_s: float) -> list[tuple[float, float]]:
        """Beginning, after the first of two moments, and length of each halt between them."""
        return [
            (at_s - begin_s, length_s)
            for at_s, length_s in self._halts_s
            if begin_s <= at_s < end_s
        ]

    def moving(self, begin_s: Floats, end_s: Floats) -> Floats:
        """The share of the time from one moment to a later one in which the machine did not halt;
        never quite 0."""
        if not self._edges_s.size:
            return np.ones_like(begin_s)
        until_begin_s, until_end_s = (
            np.interp(moment_s, self._edges_s, self._halted_s) for moment_s in (begin_s, end_s)
        )
        halted = (until_end_s - until_begin_s) / (end_s - begin_s)
        return np.asarray(np.maximum(1 - halted, _LEAST_MOVING))

    def mean_s(self, begin_s: float, end_s: float) -> float:
        """The mean cost from one moment to another."""
        middles_s = np.arange(begin_s + SPAN_S / 2, max(end_s, begin_s + SPAN_S), SPAN_S)
        return float(self.cost_s(middles_s).mean())


def read_gauge(file: Path) -> Gauge | None:
    """What the file says; None where it has no tick. Raises InputError for another file."""
    try:
        lines = list(_lines(file.read_text(encoding="utf-8")))
        halts_s = [(line["at_s"], line["halted_s"]) for line in lines if "halted_s" in line]
        ticks = [line for line in lines if "halted_s" not in line]
        at_s, cpu_s = ([tick[name] for tick in ticks] for name in ("at_s", "cpu_s"))
        return Gauge(at_s, cpu_s, halts_s) if ticks else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: is not what the gauge of a machine wrote ({error}); measure again"
        ) from None


def _lines(text: str) -> Iterator[dict[str, Any]]:
    """All whole lines: one that is being written has no end yet."""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


# --------------------------------------------------------------------------------------
# What it does to steps


@dataclass(frozen=True, slots=True)
class Response:
    """How the steps of a kind of worker follow the machine."""

    work_s: float
    """What the gauge's work took in the mean while the worker was calibrated."""
    quickest_s: float
    """What it took then at its quickest (`Gauge.quickest_s`)."""
    decode: float
    prefill: float
    """Where that work takes g times as long, these take g to this power times as long."""

    def offset_of(self, gauge: Gauge) -> float:
        """By how much another process's work is slower than the calibration's when both are at
        their quickest; relative."""
        return gauge.quickest_s / self.quickest_s - 1

    def to(self, gauge: Gauge) -> Response:
        """The same as another process gauges the machine.

        One and the same work may take longer in one process than in another for as long as these
        live, on one core and in one hour, most likely for where in the memory they lie; the workers
        take no longer beside it. A machine that changes its speed has quick moments all the same.
        So whoever is much slower at its quickest is taken to be that much slower always."""
        offset = self.offset_of(gauge)
        if abs(offset) <= _AS_QUICK:
            return self
        return replace(self, work_s=self.work_s * (1 + offset), quickest_s=gauge.quickest_s)

    def slowdowns(self, cost_s: Floats) -> tuple[Floats, Floats]:
        """How many times as long as usual decode and prefill take where the work takes `cost_s`."""
        machine = cost_s / self.work_s
        return machine**self.decode, machine**self.prefill

    def slowdown(self, cost_s: Floats, decode_s: Floats, prefill_s: Floats) -> Floats:
        """The same of whole steps, given what the decode and the prefill of each usually take."""
        decode, prefill = self.slowdowns(cost_s)
        return (decode * decode_s + prefill * prefill_s) / (decode_s + prefill_s)


_ROUNDS = 2
"""A fit knows the steps once it knows the response, and the other way round; it settles at once."""
_RESPONSE_SPAN_S = 10.0
_FEWEST_STEPS = 5
"""In a span, or its mean says little."""
_SCATTER = 0.05
"""Of a span's mean, relative: by that much the powers of one model scatter between calibrations."""


@dataclass(frozen=True, slots=True)
class _Belief:
    """What a power is before the steps are seen, and how surely: a machine that hardly changes its
    speed during a calibration does not show it."""

    power: float
    sd: float


_DECODE, _PREFILL = _Belief(0.8, 0.1), _Belief(1.75, 0.15)
"""Seven calibrations, of three models, on the CPU of a machine that did change its speed found 0.77
to 0.80, and once 0.56; and 1.65 to 1.95 (docs/validation_runs.md)."""


def fit_response(
    log: StepLog, start_s: Floats, gauge: Gauge, work_s: float
) -> tuple[Response, Floats]:
    """The response of steps that began then, and how many times as long as usual each took by it,
    halts included. Usually the gauge's work takes `work_s`."""
    halts = 1 / gauge.moving(start_s, start_s + log.duration_s)
    cost_s = gauge.cost_s(start_s + log.duration_s / 2)
    log = log.divided(halts)
    machine, prefills = cost_s / work_s, log.prefill_tokens > 0
    quickest_s = gauge.quickest_s
    response, slowdown = Response(work_s, quickest_s, _DECODE.power, _PREFILL.power), machine
    for _ in range(_ROUNDS):
        fit = fit_steps([log.divided(slowdown)])
        usual_decode_s = decode_s(fit, log)
        usual_prefill_s = fit.predict(log) - usual_decode_s
        decode = _power(_DECODE, start_s, log.duration_s, usual_decode_s, machine, ~prefills)
        left_s = log.duration_s - machine**decode * usual_decode_s
        prefill = _power(_PREFILL, start_s, left_s, usual_prefill_s, machine, prefills)
        response = Response(work_s, quickest_s, decode, prefill)
        slowdown = response.slowdown(cost_s, usual_decode_s, usual_prefill_s)
    return response, slowdown * halts


def _power(
    belief: _Belief,
    start_s: Floats,
    measured_s: Floats,
    usual_s: Floats,
    machine: Floats,
    some: NDArray[np.bool_],
) -> float:
    """By which these steps follow the machine: the slope of their slowdown over its, in logarithms
    of sums over spans, and as believed where these do not show it."""
    _, span = np.unique(start_s[some] // _RESPONSE_SPAN_S, return_inverse=True)
    enough = np.bincount(span) >= _FEWEST_STEPS
    sum_s, usual_sum_s, machine_sum_s = (
        np.bincount(span, each[some])[enough] for each in (measured_s, usual_s, usual_s * machine)
    )
    known = (sum_s > 0) & (usual_sum_s > 0)
    if not known.any():
        return belief.power
    own = np.log(sum_s[known] / usual_sum_s[known])
    its = np.log(machine_sum_s[known] / usual_sum_s[known])
    own, its = own - own.mean(), its - its.mean()
    prior = (_SCATTER / belief.sd) ** 2
    return float((own @ its + prior * belief.power) / (its @ its + prior))
