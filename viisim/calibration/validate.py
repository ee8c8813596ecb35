"""Measured runs beside the same runs in the simulator: how far a profile can be trusted.

Errors are signed: predicted over measured, less one. Runs whose batches were larger than any the
profile was fitted to are summed up apart: there the profile extrapolates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from viisim.calibration.calibrate import power_factor
from viisim.calibration.measurements import Floats, Measurement, RequestLog, StepLog
from viisim.calibration.replay import Replay, replay
from viisim.calibration.reuse import Series, uniform_length, with_cached_prompts
from viisim.errors import InputError
from viisim.profile import Profile
from viisim.step_costs import step_time_of

Metrics = dict[str, dict[str, dict[str, float]]]
"""By metric and statistic: `measured`, `predicted`, `error_pct`."""

_STATISTICS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_PS_PER_S = 1e12
_FAR, _NEAR = 0.2, 0.1


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run."""

    name: str
    kind: str
    metrics: Metrics
    concurrency: int | None
    """Most sequences at once, in a closed loop."""
    in_range: bool
    """Whether the profile's measurements had batches as large."""
    extrapolated_share: float
    """Steps outside the calibrated range, of all of them."""
    cached_requests: int
    """Requests that found most of their prompt cached, as far as their times tell."""
    cached_tokens: int
    """Prompt tokens that the typical request found cached."""
    repeats_one_prompt: bool = False
    """Its times to first token say nothing of prefill."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "concurrency": self.concurrency,
            "in_calibrated_range": self.in_range,
            "extrapolated_steps_share": self.extrapolated_share,
            "cached_requests": self.cached_requests,
            "cached_tokens": self.cached_tokens,
            "repeats_one_prompt": self.repeats_one_prompt,
            "metrics": self.metrics,
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """All runs, and what they come to."""

    runs: tuple[RunReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every run, and the errors of means over the runs inside and outside the
        calibrated range."""
        inside = [run for run in self.runs if run.in_range]
        outside = [run for run in self.runs if not run.in_range]
        content = {"runs": [run.to_dict() for run in self.runs], "overall": overall(inside)}
        if outside:
            content["outside_calibrated_range"] = overall(outside)
        return content


def validate(runs: Sequence[Measurement], profile: Profile, skip: int = 0) -> Validation:
    """Replay each run under the profile. With `skip`, all of a run is replayed but what its first
    `skip` requests (or steps) showed is left out of the comparison.

    Raises InputError for a run shorter than that, or one that the profile's engine cannot serve.
    """
    told = [with_cached_prompts(run, profile.engine.block_tokens) for run in runs]
    for run in told:
        if len(run) <= skip:
            raise InputError(f"{run.name}: --skip {skip} leaves none of its {len(run)} entries")
    series = _series(told, profile)
    return Validation(
        tuple(
            _of_steps(run, profile, skip)
            if run.steps is not None
            else _of_requests(run if series is None else series.apply(run), profile, skip)
            for run in told
        )
    )


def overall(runs: Iterable[RunReport]) -> dict[str, dict[str, dict[str, float]]]:
    """For each metric the median and 90th percentile, over runs, of the absolute error of means.

    The time to first token of runs that repeat one prompt says nothing of prefill: it counts as
    `ttft_repeated_s` only.
    """
    errors: dict[str, list[float]] = {}
    for run in runs:
        for name, statistics in run.metrics.items():
            if "mean" in statistics and not (run.repeats_one_prompt and name == "ttft_s"):
                errors.setdefault(name, []).append(abs(statistics["mean"]["error_pct"]))
    return {
        name: {
            "mean_abs_error_pct": {
                "p50": float(np.quantile(values, 0.5)),
                "p90": float(np.quantile(values, 0.9)),
            }
        }
        for name, values in errors.items()
    }


# --------------------------------------------------------------------------------------
# Runs of requests


def _of_requests(run: Measurement, profile: Profile, skip: int) -> RunReport:
    log = run.requests
    assert log is not None
    again = replay(log, profile, power_factor(profile, run))
    most = log.concurrency
    return RunReport(
        name=run.name,
        kind=run.kind,
        metrics=dict(_compared(log, again, skip)),
        concurrency=most,
        in_range=most is None or most <= profile.range.decode_sequences[1],
        extrapolated_share=again.extrapolated_steps / max(again.steps, 1),
        cached_requests=int((~log.uncached).sum()),
        cached_tokens=int(np.median(log.cached)),
        repeats_one_prompt=log.repeats_one_prompt,
    )


def _compared(
    log: RequestLog, again: Replay, skip: int
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    kept = np.arange(len(log)) >= skip
    masks = {"ttft_s": kept}
    if log.repeats_one_prompt:
        masks["ttft_repeated_s"] = kept
    else:
        masks |= {"ttft_uncached_s": kept & log.uncached, "ttft_cached_s": kept & ~log.uncached}
    for name, mask in masks.items():
        if mask.any():
            yield name, _statistics(log.ttft_s[mask], again.ttft_s[mask])
    itl = _itl(log, again, kept)
    if itl:
        yield "itl_s", itl
    gaps = log.output_tokens - 1
    several = kept & (gaps > 0)
    if several.any():
        tpot = [
            (e2e_s - ttft_s)[several] / gaps[several]
            for e2e_s, ttft_s in ((log.e2e_s, log.ttft_s), (again.e2e_s, again.ttft_s))
        ]
        yield "tpot_s", _statistics(*tpot)
    yield "e2e_s", _statistics(log.e2e_s[kept], again.e2e_s[kept])
    yield "output_tokens_per_s", {"mean": _pair(*_throughputs(log, again, kept))}


def _statistics(measured: Floats, predicted: Floats) -> dict[str, dict[str, float]]:
    found = {"mean": _pair(float(measured.mean()), float(predicted.mean()))}
    for name, share in _STATISTICS.items():
        found[name] = _pair(
            float(np.quantile(measured, share)), float(np.quantile(predicted, share))
        )
    return found


def _pair(measured: float, predicted: float) -> dict[str, float]:
    error_pct = 100 * (predicted / measured - 1) if measured else 0.0
    return {"measured": measured, "predicted": predicted, "error_pct": error_pct}


def _itl(log: RequestLog, again: Replay, kept: Any) -> dict[str, dict[str, float]]:
    """Gaps between tokens: their mean exactly; percentiles of whole runs, where all were kept."""
    gaps = int((log.output_tokens - 1)[kept].sum())
    if not gaps:
        return {}
    predicted = float((again.e2e_s - again.ttft_s)[kept].sum()) / gaps
    if log.gaps_s is None:
        measured = float((log.e2e_s - log.ttft_s)[kept].sum()) / gaps
        return {"mean": _pair(measured, predicted)}
    seen = np.concatenate([gap for gap, keep in zip(log.gaps_s, kept, strict=True) if keep])
    found = {"mean": _pair(float(seen.mean()), predicted)}
    if kept.all():
        for name, share in _STATISTICS.items():
            found[name] = _pair(float(np.quantile(seen, share)), again.itl_quantile_s(share))
    return found


def _throughputs(log: RequestLog, again: Replay, kept: Any) -> tuple[float, float]:
    """Output tokens a second, from the first request sent to the last one ended."""
    tokens = float(log.output_tokens[kept].sum())
    sent_s = _sent_s(log)
    lengths = []
    for begun_s, e2e_s in ((sent_s, log.e2e_s), (again.begun_s, again.e2e_s)):
        lengths.append(float((begun_s + e2e_s)[kept].max() - begun_s[kept].min()))
    return tokens / lengths[0], tokens / lengths[1]


def _sent_s(log: RequestLog) -> Floats:
    """When the measured requests were sent."""
    if log.arrived_s is not None:
        return log.arrived_s
    concurrency = log.concurrency or len(log)
    slots = np.zeros(concurrency)
    sent = np.zeros(len(log))
    for number, e2e_s in enumerate(log.e2e_s):
        slot = int(slots.argmin())
        sent[number] = slots[slot]
        slots[slot] += e2e_s
    return sent


# --------------------------------------------------------------------------------------
# Runs of steps


def _of_steps(run: Measurement, profile: Profile, skip: int) -> RunReport:
    assert run.steps is not None
    steps = run.steps.part(np.s_[skip:])
    predicted = predicted_s(steps, profile)
    relative = np.abs(predicted / steps.duration_s - 1)
    metrics: Metrics = {
        "step_s": _statistics(steps.duration_s, predicted)
        | {"total": _pair(float(steps.duration_s.sum()), float(predicted.sum()))}
    }
    metrics["step_s"]["each"] = {"mean_abs_error_pct": 100 * float(relative.mean())}
    outside = steps.decodes > profile.range.decode_sequences[1]
    return RunReport(
        name=run.name,
        kind=run.kind,
        metrics=metrics,
        concurrency=None,
        in_range=True,
        extrapolated_share=float(outside.mean()),
        cached_requests=0,
        cached_tokens=0,
    )


def predicted_s(steps: StepLog, profile: Profile) -> Floats:
    """What the profile says each entry takes, by the very table that the engine looks up."""
    table = step_time_of(profile, max(int(steps.decodes.max(initial=1)), 1))
    rows = zip(
        *(
            column.tolist()
            for column in (
                steps.decodes,
                steps.context_tokens,
                steps.prefill_tokens,
                steps.prefill_pairs,
                steps.steps,
            )
        ),
        strict=True,
    )
    return np.array(
        [(table.step_ps(*row) + (count - 1) * table.base_ps[0]) / _PS_PER_S for *row, count in rows]
    )


# --------------------------------------------------------------------------------------
# Series of prompt lengths


def _series(runs: Sequence[Measurement], profile: Profile) -> Series | None:
    """Whether runs of growing prompt length reuse each other's prompts: as the profile's sources
    did, else if their times can be explained in no other way."""
    lengths: set[int] = set()
    for source in profile.sources:
        if source.prompt_tokens is not None and source.prompt_tokens[0] == source.prompt_tokens[1]:
            length = source.prompt_tokens[0]
            new = length - source.cached_tokens
            if Series.could_be(new):
                lengths.add(length)
                if source.cached_tokens:
                    return Series(new)
    suspects = [run for run in runs if _is_overestimated(run, profile)]
    measured = [uniform_length(run.requests) for run in runs if run.requests is not None]
    lengths.update(length for length in measured if length is not None)
    step = gcd(*lengths)
    if not suspects or not Series.could_be(step):
        return None
    series = Series(step)
    misses = [_miss(series.apply(run), profile) for run in suspects]
    return series if float(np.median(misses)) < _NEAR else None


def _is_overestimated(run: Measurement, profile: Profile) -> bool:
    """Whether computing the whole prompts would take far longer than the run did."""
    if run.requests is None or uniform_length(run.requests) is None:
        return False
    return _miss(run, profile, signed=True) > _FAR


def _miss(run: Measurement, profile: Profile, signed: bool = False) -> float:
    """Relative error of the typical time to first token."""
    log = run.requests
    assert log is not None
    few = replace(run, requests=log.first(2 * (log.concurrency or 4) + 2)).requests
    assert few is not None
    again = replay(few, profile, power_factor(profile, run))
    error = float(np.median(again.ttft_s) / np.median(few.ttft_s)) - 1
    return error if signed else abs(error)
