"""Recorded engine steps beside the profile's: how far off one is, how far all, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from viisim.validation.answers import Floats

_SPAN_S = 10.0
"""Of the machine's moods: many steps, and several spans a run."""
_FEWEST_STEPS = 20
"""Of a worker in a span, or its mean says little."""
_FEWEST_SPANS = 10
"""Fewer show no correlation."""
BESIDE = ("idle", "decoding", "prefilling")
"""What the others do, the last of these that one of them does."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """Recorded steps of one worker, and what the profile says of the same batches. No profile was
    fitted to any of them: it is of an earlier start of the worker. How many times as long as the
    profile says its steps take, is its slowdown."""

    worker: str
    """As the report names it."""
    start_s: Floats
    """On a clock that all workers of a machine share."""
    decodes: NDArray[np.int64]
    """Sequences that a step decodes."""
    measured_s: Floats
    calibrated_s: Floats
    """What the profile says."""
    refitted_s: Floats
    """What a profile of the same form says that is fitted to these very steps, at the same speed
    of the machine."""
    with_prefill: NDArray[np.bool_]
    slowdown: Floats
    """How many times as long as usual the machine took at each step, by its gauge: what
    predictions are made with."""
    run: NDArray[np.int64]
    """Steps of one run have the same number."""

    @property
    def predicted_s(self) -> Floats:
        """With the speed that the gauge says."""
        return self.slowdown * self.calibrated_s


@dataclass(frozen=True, slots=True)
class StepErrors:
    """How far the predicted step times are off."""

    worker: str
    steps: int
    mape: float
    """Mean size of the relative error of a step."""
    refitted_mape: float
    """The same of the fit to these very steps, scaled as is best for it: what a profile of this
    form may leave at best."""
    total: float
    """Relative error of the sum of all, signed."""
    total_as_calibrated: float
    """The same of the profile alone, without the gauge."""
    gauged_by_run: tuple[float, ...]
    """The slowdown in each run, as the gauge has it..."""
    by_run: tuple[float, ...]
    """...and what it turned out to be."""
    beside: Mapping[str, float] = field(default_factory=dict)
    """The slowdown by what other workers do meanwhile, as `slowdowns_beside` says."""

    @property
    def gauge_error(self) -> float:
        """Mean size of the relative error of a run's slowdown by the gauge."""
        return float(np.abs(np.divide(self.gauged_by_run, self.by_run) - 1).mean())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"gauge_error": self.gauge_error}


def step_errors(times: StepTimes, others: Sequence[StepTimes] = ()) -> StepErrors:
    """Of at least one step; `others` are workers of the same machine."""
    _, run = np.unique(times.run, return_inverse=True)
    calibrated_s, predicted_s, measured_s = (
        np.bincount(run, each_s)
        for each_s in (times.calibrated_s, times.predicted_s, times.measured_s)
    )
    return StepErrors(
        worker=times.worker,
        steps=times.measured_s.size,
        mape=_mape(times.predicted_s / times.measured_s),
        refitted_mape=_least_mape(times.refitted_s / times.measured_s),
        total=_total_error(times.predicted_s, times.measured_s),
        total_as_calibrated=_total_error(times.calibrated_s, times.measured_s),
        gauged_by_run=tuple((predicted_s / calibrated_s).tolist()),
        by_run=tuple((measured_s / calibrated_s).tolist()),
        beside=slowdowns_beside(times, others),
    )


def _total_error(predicted_s: Floats, measured_s: Floats) -> float:
    return float(predicted_s.sum() / measured_s.sum() - 1)


def _mape(ratios: Floats) -> float:
    return float(np.abs(ratios - 1).mean())


def _least_mape(ratios: Floats) -> float:
    """With all predictions scaled by one factor. The best is the median of the factors that put
    one step right, weighted by how much each ratio moves with it."""
    order = np.argsort(1 / ratios)
    weight = np.cumsum(ratios[order])
    middle = order[np.searchsorted(weight, weight[-1] / 2)]
    return _mape(ratios / ratios[middle])


def shared_drift(recordings: Sequence[StepTimes]) -> float | None:
    """Correlation, between workers, of how slow their steps are in spans of ten seconds: near 1
    where a machine makes the steps of all its workers slower and faster at once, near 0 where
    each worker scatters for itself. Steps are slow beside those of as many sequences, so that
    traffic that fills all workers at once makes no correlation. Mean over pairs of workers; None
    where none has enough spans in common.
    """
    by_worker = [_means_by_span(times) for times in recordings]
    found = []
    for one, other in combinations(by_worker, 2):
        shared = sorted(one.keys() & other.keys())
        if len(shared) >= _FEWEST_SPANS:
            own, others = ([means[span] for span in shared] for means in (one, other))
            found.append(float(np.corrcoef(own, others)[0][1]))
    return float(np.mean(found)) if found else None


def slowdowns_beside(times: StepTimes, others: Sequence[StepTimes]) -> dict[str, float]:
    """The slowdown of a worker's steps while, at their middle, all others are idle, while one
    decodes, and while one prefills, where there are enough steps of the sort. What differs between
    the three, workers take from each other: cores, caches, the bandwidth of memory.
    """
    middle_s = times.start_s + times.measured_s / 2
    doing = np.zeros(middle_s.size, dtype=np.int64)
    for other in others:
        step = np.maximum(np.searchsorted(other.start_s, middle_s) - 1, 0)
        begun_s = other.start_s[step]
        computes = (begun_s <= middle_s) & (middle_s < begun_s + other.measured_s[step])
        doing = np.maximum(doing, np.where(computes, 1 + other.with_prefill[step], 0))
    found = {}
    for number, name in enumerate(BESIDE):
        mine = doing == number
        if mine.sum() >= _FEWEST_STEPS:
            found[name] = float(times.measured_s[mine].sum() / times.calibrated_s[mine].sum())
    return found


def _means_by_span(times: StepTimes) -> dict[float, float]:
    excess = np.log(times.measured_s / times.refitted_s)
    _, kind = np.unique(2 * times.decodes + times.with_prefill, return_inverse=True)
    excess -= _means(kind, excess)[kind]
    spans, span = np.unique(times.start_s // _SPAN_S, return_inverse=True)
    enough = np.bincount(span) >= _FEWEST_STEPS
    means = _means(span, excess)
    return dict(zip(spans[enough].tolist(), means[enough].tolist(), strict=True))


def _means(group: NDArray[np.int64], values: Floats) -> Floats:
    """Of the values of each group; groups are counted from 0."""
    return np.bincount(group, values) / np.bincount(group)
