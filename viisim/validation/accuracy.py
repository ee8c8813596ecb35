"""Measured runs beside the simulated one: how far off, how far workers differ from themselves.

Errors are signed: predicted over measured, less one; of counts and of shares, the difference. A
limit is judged by its own run alone: what the limits are, `Limits` says, and every `Check` why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.validation.answers import LATENCIES, STATISTICS, Answers, Floats

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
    """One list of requests, sent to the workers several times and simulated once."""

    load: float
    """Share of the measured capacity, as it was set."""
    rate_per_s: float
    """Requests a second."""
    measured: tuple[Answers, ...]
    """Repetitions."""
    simulated: Answers
    cpu: Cpu | None = None
    """Of the repetitions together."""
    equal_load: float | None = None
    """What `load_at_equal_e2e` found; None if not sought, or not found."""


@dataclass(frozen=True, slots=True)
class Row:
    """One statistic of one metric."""

    metric: str
    statistic: str
    repetitions: tuple[float, ...]
    predicted: float
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
    rows: tuple[Row, ...]
    cpu: Cpu | None = None
    equal_load: float | None = None

    def row(self, metric: str, statistic: str = WHOLE) -> Row | None:
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
    return Accuracy(
        load=run.load,
        rate_per_s=run.rate_per_s,
        requests=len(run.simulated),
        repetitions=len(run.measured),
        rows=tuple(_rows(run)),
        cpu=run.cpu,
        equal_load=run.equal_load,
    )


def _rows(run: LoadRun) -> Iterator[Row]:
    for metric in METRICS.values():
        for statistic in metric.statistics:
            predicted = metric.value(run.simulated, statistic)
            values = [metric.value(answers, statistic) for answers in run.measured]
            known = tuple(value for value in values if value is not None)
            if predicted is not None and len(known) == len(values):
                error = metric.difference(predicted, float(np.mean(known)))
                noise = _noise(metric, known)
                yield Row(metric.key, statistic, known, predicted, error, noise)


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
    is the measured one. Close to saturation a load off by 1 % moves E2E by 20 %, so this says
    better than latency how far off a simulator is. None when not within 0.7 to 1.3 of `around`.
    """
    from scipy.optimize import brentq

    def excess_s(load: float) -> float:
        return simulate(load) - measured_mean_e2e_s

    low, high = (factor * around for factor in _EQUAL_LOAD_RANGE)
    if excess_s(low) > 0 or excess_s(high) < 0:
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
    predicted: float

    @property
    def measured(self) -> float:
        """Mean over repetitions."""
        return float(np.mean(self.repetitions))

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"measured": self.measured, "error": self.error}


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """Recorded steps of one worker, and what the profile says of the same batches."""

    worker: str
    """As the report names it; with what is special of the recording, such as a fresh start."""
    unseen: bool
    """Whether the profile was fitted without any step of this recording."""
    measured_s: Floats
    predicted_s: Floats
    with_prefill: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class StepErrors:
    """How far the step times are off."""

    worker: str
    unseen: bool
    steps: int
    mape: float
    """Mean size of the relative error of a step."""
    total: float
    """Relative error of the sum of all, signed."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def step_errors(times: StepTimes) -> StepErrors:
    """Of at least one step."""
    relative = times.predicted_s / times.measured_s - 1
    return StepErrors(
        worker=times.worker,
        unseen=times.unseen,
        steps=times.measured_s.size,
        mape=float(np.abs(relative).mean()),
        total=float(times.predicted_s.sum() / times.measured_s.sum() - 1),
    )


# --------------------------------------------------------------------------------------
# Limits

Judged: TypeAlias = Literal["error", "size", "count"]


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its limit."""

    part: str
    """Of the validation: `capacity`, `load 0.7`, `step times`, ..."""
    what: str
    value: float | None
    """None where there is nothing to judge, which does not pass."""
    limit: float
    """The size that the value may have."""
    why: str
    """Why the limit is what it is, and what else was looked at."""
    passed: bool
    kind: Judged = "error"
    """Whether value and limit are shares, signed or not, or whole numbers."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Part and metric."""
        return f"{self.part}: {self.what}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How large errors may be, as shares; None: reported, not judged.

    Latency above `near_load` is never judged: queues then grow for as long as the run lasts.
    """

    e2e: float | None
    tpot: float | None
    ttft: float | None
    """The three are of means, at loads up to `low_load`."""
    near_e2e: float | None
    """Mean E2E from there up to `near_load`, where small errors of capacity are large ones of
    latency..."""
    near_load_error: float
    """...so a small error of the load at equal E2E does as well."""
    throughput: float | None
    capacity: float | None
    step_mape: float | None
    """Of unseen steps, as the next one. CPU steps scatter by 7 to 10 % (FACTS section 6)."""
    step_total: float | None
    source: str
    """Whose limits these are, in words."""
    noise_factor: float = 2.0
    """Limits of latency are as many times the workers' own difference, where that is more..."""
    noise_ceiling: float = 0.15
    """...but not more than this: noise is no excuse for any error."""
    low_load: float = 0.7
    near_load: float = 0.9
    judge_ranking: bool = True

    def of_noise(self, limit: float, noise: float | None) -> tuple[float, str]:
        """A limit of latency beside the noise, and why it is that."""
        if noise is None or self.noise_factor * noise <= limit or limit >= self.noise_ceiling:
            return limit, self.source
        told = f"{self.noise_factor:g} times the workers' own difference of {noise:.1%}"
        if self.noise_factor * noise <= self.noise_ceiling:
            return self.noise_factor * noise, f"{told}, not {limit:.0%}"
        return self.noise_ceiling, f"the most that counts of {told}, not {limit:.0%}"


FULL = Limits(
    e2e=0.05,
    tpot=0.05,
    ttft=0.10,
    near_e2e=0.20,
    near_load_error=0.03,
    throughput=0.03,
    capacity=0.05,
    step_mape=0.12,
    step_total=0.05,
    source="claimed",
)
"""What the project claims."""

QUICK = Limits(
    e2e=0.20,
    tpot=0.20,
    ttft=None,
    near_e2e=0.20,
    near_load_error=0.10,
    throughput=0.10,
    capacity=None,
    step_mape=None,
    step_total=0.20,
    source="loose",
    judge_ranking=False,
)
"""For a run of minutes on a busy machine: whether anything is broken, no more."""


def load_checks(accuracy: Accuracy, limits: Limits) -> Iterator[Check]:
    """Of one load. Answers and tokens are counted at all of them, and must be equal."""
    part = f"load {accuracy.load:g}"
    for metric in ("answers", "output_tokens"):
        yield _count_check(part, metric, accuracy)
    if accuracy.load <= limits.low_load:
        for metric, limit in (
            ("e2e_s", limits.e2e),
            ("tpot_s", limits.tpot),
            ("ttft_s", limits.ttft),
        ):
            if limit is not None:
                row = accuracy.row(metric, "mean")
                allowed, why = limits.of_noise(limit, row.noise if row else None)
                what = f"mean {METRICS[metric].label}"
                yield _check(part, what, row.error if row else None, allowed, why)
    elif accuracy.load <= limits.near_load and limits.near_e2e is not None:
        yield _near_check(part, accuracy, limits)
    if limits.throughput is not None:
        row = accuracy.row("throughput_per_s")
        error = row.error if row else None
        yield _check(part, "throughput", error, limits.throughput, limits.source)


def _count_check(part: str, metric: str, accuracy: Accuracy) -> Check:
    """Of the repetition that differs most."""
    row = accuracy.row(metric)
    assert row is not None, "whatever ran can be counted"
    value = max((row.predicted - measured for measured in row.repetitions), key=abs)
    why = "the same requests on both sides, in every repetition"
    return Check(part, METRICS[metric].label, value, 0.0, why, value == 0, "count")


def _near_check(part: str, accuracy: Accuracy, limits: Limits) -> Check:
    assert limits.near_e2e is not None, "it is judged"
    row = accuracy.row("e2e_s", "mean")
    error, load_error = row.error if row else None, accuracy.load_error
    why = f"{limits.source}, or the load at equal E2E within {limits.near_load_error:.0%}"
    why += " (not found)" if load_error is None else f" (it is {load_error:+.1%} off)"
    passed = within(error, limits.near_e2e) or within(load_error, limits.near_load_error)
    return Check(part, "mean E2E", error, limits.near_e2e, why, passed)


def capacity_checks(capacities: Sequence[Capacity], limits: Limits) -> Iterator[Check]:
    """Of every capacity."""
    if limits.capacity is not None:
        for one in capacities:
            yield _check("capacity", one.of, one.error, limits.capacity, limits.source)


def step_checks(errors: Sequence[StepErrors], limits: Limits) -> Iterator[Check]:
    """Of steps that no profile was fitted to."""
    for one in errors:
        if not one.unseen:
            continue
        if limits.step_mape is not None:
            what = f"mean size of a step's error on {one.worker}"
            yield _check("step times", what, one.mape, limits.step_mape, limits.source, "size")
        if limits.step_total is not None:
            what = f"total step time on {one.worker}"
            yield _check("step times", what, one.total, limits.step_total, limits.source)


def _check(
    part: str, what: str, value: float | None, limit: float, why: str, kind: Judged = "error"
) -> Check:
    return Check(part, what, value, limit, why, within(value, limit), kind)


def within(value: float | None, limit: float) -> bool:
    """Whether there is a value of at most this size."""
    return value is not None and abs(value) <= limit
