"""How large the errors of a validation may be, and which of them are too large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from viisim.validation.accuracy import METRICS, Accuracy, Capacity
from viisim.validation.steps import StepErrors

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
    lenient: bool = False
    """It holds only because noise has widened the limit."""

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
    """Of single steps, as the next one of all. Those of CPUs scatter by 7 to 10 % (FACTS section
    6)."""
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
                error, noise = (row.error, row.noise) if row else (None, None)
                allowed, why = limits.of_noise(limit, noise)
                check = _check(part, f"mean {METRICS[metric].label}", error, allowed, why)
                yield replace(check, lenient=check.passed and not within(error, limit))
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
    """Of every worker."""
    for one in errors:
        if limits.step_mape is not None:
            what = f"mean size of a step's error on {one.worker}"
            why = f"{limits.source}; a fit to these very steps leaves {one.refitted_mape:.1%}"
            yield _check("step times", what, one.mape, limits.step_mape, why, "size")
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
