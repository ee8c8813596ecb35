"""Measured runs beside the simulated one: how far off, how far workers differ from themselves.

Errors are signed: predicted over measured, less one; of counts and of shares, the difference. A
limit is judged by its own run alone: what the limits are, `Limits` says, and every `Check` why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from viisim.validation.answers import LATENCIES, STATISTICS, Answers

WHOLE = "all"
"""The statistic of a figure that a run has only one of."""
_EQUAL_LOAD_RANGE = (0.7, 1.3)
_EQUAL_LOAD_STEP = 1e-3
"""How finely the load at equal E2E is sought: a thirtieth of what its error may be."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is compared, and how the two sides are set against each other."""

    key: str
    label: str
    unit: Literal["s", "tokens/s", "share", "count"]

    @property
    def relative(self) -> bool:
        """Whether errors are shares of the measured value; else they are differences."""
        return self.unit in ("s", "tokens/s")

    @property
    def statistics(self) -> Sequence[str]:
        """Those that a run has of it."""
        return tuple(STATISTICS) if self.key in LATENCIES else (WHOLE,)

    def value(self, answers: Answers, statistic: str) -> float | None:
        """Of one run; None where no request has a value."""
        if self.key in LATENCIES:
            values = answers.latencies(self.key)
            return STATISTICS[statistic](values) if values.size else None
        if self.key == "answers":
            return float(len(answers) - answers.failed)
        if self.key == "output_tokens":
            return float(answers.output_tokens.sum())
        return float(getattr(answers, self.key))

    def difference(self, value: float, base: float) -> float | None:
        """How far a value is from another; None relative to nothing."""
        if not self.relative:
            return value - base
        return value / base - 1 if base else None


METRICS = {
    metric.key: metric
    for metric in (
        Metric("ttft_s", "TTFT", "s"),
        Metric("tpot_s", "TPOT", "s"),
        Metric("e2e_s", "E2E", "s"),
        Metric("throughput_per_s", "throughput", "tokens/s"),
        Metric("preemptions", "preemptions", "count"),
        Metric("prefix_hit_share", "prefix hits", "share"),
        Metric("answers", "whole answers", "count"),
        Metric("output_tokens", "output tokens", "count"),
    )
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """Shares of the machine's CPU time while a run lasted."""

    client: float
    proxy: float

    @property
    def both(self) -> float:
        """What the workers did not have."""
        return self.client + self.proxy


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One list of requests, sent to the workers several times and simulated as often."""

    load: float
    """Share of the measured capacity, as it was set."""
    rate_per_s: float
    """Requests a second."""
    measured: tuple[Answers, ...]
    """Repetitions."""
    simulated: tuple[Answers, ...]
    """Each repetition, with the machine as fast as it was then by its gauge."""
    as_calibrated: Answers | None = None
    """Simulated without what the gauge says of the machine's speed."""
    at_own_speed: tuple[Answers, ...] = ()
    """Simulated for each repetition with steps as long as they were, as `Accuracy` says."""
    cpu: Cpu | None = None
    """Of the repetitions together."""
    equal_load: float | None = None
    """What `load_at_equal_e2e` found; None if not sought, or not found."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One statistic of one metric."""

    metric: str
    statistic: str
    repetitions: tuple[float, ...]
    predicted: float
    """Mean over the simulated repetitions."""
    error: float | None
    """Of the prediction against the mean of the repetitions; None relative to nothing."""
    noise: float | None
    """Mean size of the difference between two repetitions; None without two."""

    @property
    def measured(self) -> float:
        """Mean over repetitions."""
        return float(np.mean(self.repetitions))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"measured": self.measured}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """All rows of one load."""

    load: float
    rate_per_s: float
    requests: int
    repetitions: int
    rows: tuple[Compared, ...]
    as_calibrated: Mapping[str, float]
    """Errors of the mean latencies, had the gauge not told of the machine's speed."""
    at_own_speed: Mapping[str, float]
    """Errors of the mean latencies that are left once each worker's steps take, in each
    repetition, as many times what its profile says as they all together took: with the machine's
    speed given, what of scheduling, queues and the way to the engine is wrong."""
    cpu: Cpu | None = None
    equal_load: float | None = None

    def row(self, metric: str, statistic: str = WHOLE) -> Compared | None:
        """None if one side has no value of it."""
        found = (row for row in self.rows if (row.metric, row.statistic) == (metric, statistic))
        return next(found, None)

    @property
    def load_error(self) -> float | None:
        """Of the load at which the simulator has the measured E2E, against the true one."""
        return None if self.equal_load is None else self.equal_load / self.load - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [row.to_dict() for row in self.rows]
        return asdict(self) | {"load_error": self.load_error, "rows": rows}


def compare(run: LoadRun) -> Accuracy:
    """Every metric and statistic that both sides have values of."""
    assert run.measured, "a load is measured at least once"
    assert run.simulated, "and simulated"
    return Accuracy(
        load=run.load,
        rate_per_s=run.rate_per_s,
        requests=len(run.simulated[0]),
        repetitions=len(run.measured),
        rows=tuple(_rows(run)),
        as_calibrated=dict(_mean_errors(run, [run.as_calibrated] if run.as_calibrated else [])),
        at_own_speed=dict(_mean_errors(run, run.at_own_speed)),
        cpu=run.cpu,
        equal_load=run.equal_load,
    )


def _rows(run: LoadRun) -> Iterator[Compared]:
    for metric in METRICS.values():
        for statistic in metric.statistics:
            ours, theirs = (
                [v for one in side if (v := metric.value(one, statistic)) is not None]
                for side in (run.simulated, run.measured)
            )
            if (len(ours), len(theirs)) == (len(run.simulated), len(run.measured)):
                predicted = float(np.mean(ours))
                error = metric.difference(predicted, float(np.mean(theirs)))
                noise = _noise(metric, theirs)
                yield Compared(metric.key, statistic, tuple(theirs), predicted, error, noise)


def _mean_errors(run: LoadRun, simulated: Sequence[Answers]) -> Iterator[tuple[str, float]]:
    """Of the mean latencies over these simulated runs, where all runs have them."""
    for key in LATENCIES:
        ours, theirs = (
            [v for one in side if (v := METRICS[key].value(one, "mean")) is not None]
            for side in (simulated, run.measured)
        )
        if ours and (len(ours), len(theirs)) == (len(simulated), len(run.measured)):
            yield key, float(np.mean(ours) / np.mean(theirs) - 1)


def _noise(metric: Metric, values: Sequence[float]) -> float | None:
    """A pair's difference is taken of the pair's mean: neither of the two is the true one."""
    sizes = []
    for one, other in combinations(values, 2):
        base = (one + other) / 2 if metric.relative else 1.0
        sizes.append(abs(one - other) / base if base else 0.0)
    return float(np.mean(sizes)) if sizes else None


def load_at_equal_e2e(
    measured_mean_e2e_s: float, simulate: Callable[[float], float], around: float
) -> float | None:
    """The load at which the simulator's mean E2E (`simulate` answers it, in seconds, for a load)
    is the measured one. Close to saturation a small error of the load is a large one of E2E, so
    this says better than latency how far off a simulator is. None when not within 0.7 to 1.3 of
    `around`, or where nothing was answered (NaN).
    """
    from scipy.optimize import brentq

    def excess_s(load: float) -> float:
        return simulate(load) - measured_mean_e2e_s

    low, high = (factor * around for factor in _EQUAL_LOAD_RANGE)
    if not excess_s(low) <= 0 <= excess_s(high):
        return None
    return float(brentq(excess_s, low, high, xtol=_EQUAL_LOAD_STEP * around))


@dataclass(frozen=True, slots=True)
class Capacity:
    """Throughput of a closed loop with twice as many clients as the engines take sequences."""

    of: str
    """A worker, or the cluster."""
    unit: str
    """Such as requests/s."""
    repetitions: tuple[float, ...]
    predictions: tuple[float, ...]
    """Each time, with the machine as fast as it was then by its gauge."""
    predicted_as_calibrated: float | None = None
    """Without what the gauge says of the machine's speed."""
    predicted_at_own_speed: tuple[float, ...] = ()
    """Each time, with the workers' own speed, as `Accuracy.at_own_speed` says."""

    @property
    def measured(self) -> float:
        """Mean over repetitions."""
        return float(np.mean(self.repetitions))

    @property
    def predicted(self) -> float:
        """Mean over the simulated repetitions."""
        return float(np.mean(self.predictions))

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1

    @property
    def as_calibrated(self) -> float | None:
        """The error without the gauge; None where that is not known."""
        own = self.predicted_as_calibrated
        return own / self.measured - 1 if own is not None else None

    @property
    def at_own_speed(self) -> float | None:
        """The error with the workers' own speed; None where that is not known."""
        own = self.predicted_at_own_speed
        return float(np.mean(own)) / self.measured - 1 if own else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("measured", "predicted", "error", "as_calibrated", "at_own_speed")
        return asdict(self) | {name: getattr(self, name) for name in names}
