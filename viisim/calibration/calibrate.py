"""A profile from measured runs of one model in one build, with its held-out error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from viisim.calibration.fit import StepFit, decode_s, fit_steps, rise
from viisim.calibration.measurements import Measurement, Setup, StepLog, one_setup
from viisim.calibration.profile_parts import (
    calibrated_range,
    commonest_cap,
    engine_settings,
    rounded,
    short,
    source,
    step_time,
    version,
)
from viisim.calibration.replay import replay
from viisim.calibration.reuse import (
    Series,
    find_series,
    repeats_prompt,
    step_logs,
    with_cached_prompts,
)
from viisim.calibration.spans import fit_spans
from viisim.errors import InputError
from viisim.profile import EngineSettings, Profile


@dataclass(frozen=True, slots=True)
class Options:
    """What the user states; None: taken from the files, or a stated default."""

    device: str | None = None
    model: str | None = None
    tensor_parallel: int | None = None
    power_cap_w: float | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    """Engine settings under our names."""
    notes: str = ""
    """Put behind what the profile's notes say anyway."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A profile, and what its maker should know."""

    profile: Profile
    warnings: tuple[str, ...]
    held_out: tuple[dict[str, Any], ...]
    """For each held-out run: its name and relative errors."""


def calibrate(runs: Sequence[Measurement], options: Options) -> Calibration:
    """Fit a profile and cross-validate it. Raises InputError for runs that do not belong together
    or show nothing to fit."""
    maker = _Maker.of(runs, options)
    fitted = maker.fit(maker.runs)
    errors = list(_cross_validated(maker))
    by = "runs" if len(maker.runs) > 1 else "halves"
    profile = maker.profile(fitted, _summary(errors), by)
    return Calibration(profile, (*maker.warnings, *_fit_warnings(fitted)), tuple(errors))


# --------------------------------------------------------------------------------------
# Fitting


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Coefficients for the target's power cap, and what other caps do to prefill."""

    runs: tuple[Measurement, ...]
    fit: StepFit
    logs: tuple[StepLog, ...]
    prefill_factors: Mapping[int, float]
    measured_prefill: bool


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes profiles of subsets of the runs, all with the same engine and names."""

    runs: tuple[Measurement, ...]
    setup: Setup
    options: Options
    settings: EngineSettings
    series: Series | None
    power_cap_w: float | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Measurement], options: Options) -> _Maker:
        setup = one_setup(runs)
        settings, warnings = engine_settings(runs, setup, options.settings)
        told = [with_cached_prompts(run, settings.block_tokens) for run in runs]
        series = find_series(told, settings.max_num_batched_tokens)
        if series is not None:
            told = [series.apply(run) for run in told]
            warnings.append(
                f"the times of runs of growing prompt length are explained only if each prompt "
                f"found all but {series.step_tokens:,} tokens in the prefix cache: taken so"
            )
        images = sorted({run.setup.image for run in runs if run.setup.image})
        if len(images) > 1:
            warnings.append(f"one version in several images, taken for equal: {', '.join(images)}")
        cap = options.power_cap_w or commonest_cap(runs)
        return cls(tuple(told), setup, options, settings, series, cap, tuple(warnings))

    def fit(self, runs: Sequence[Measurement], half: int | None = None) -> _Fitted:
        """With `half`, only from the first (0) or second (1) half of what each run shows.

        Raises InputError where the runs show no steps.
        """
        spans = [run for run in runs if run.requests is not None and run.requests.gaps_s is None]
        if spans:
            return self._fit_spans(runs, spans, half)
        logs = step_logs(runs, self.settings.max_num_batched_tokens)
        if half is not None:
            logs = [log.part(_half(len(log), half)) for log in logs]
        if not any(len(log) for log in logs):
            names = ", ".join(run.name for run in runs)
            raise InputError(f"{names}: no engine step can be told apart; give longer runs")
        at_cap = [run.setup.power_cap_w == self.power_cap_w for run in runs]
        own = [log if ours else _decode_only(log) for log, ours in zip(logs, at_cap, strict=True)]
        if not any(log.prefill_tokens.any() for log in own):
            own, at_cap = logs, [True] * len(runs)
        fit = fit_steps(own)
        factors = dict(_prefill_factors(fit, runs, logs, at_cap))
        measured = any(
            log.prefill_tokens.any() and not repeats_prompt(run)
            for run, log in zip(runs, logs, strict=True)
        )
        return _Fitted(tuple(runs), fit, tuple(logs), factors, measured)

    def _fit_spans(
        self, runs: Sequence[Measurement], spans: Sequence[Measurement], half: int | None
    ) -> _Fitted:
        if len(runs) > 1:
            raise InputError(
                f"{spans[0].name}: without the times of all tokens a run is fitted by itself; "
                f"give that file alone"
            )
        log = spans[0].requests
        assert log is not None
        if log.arrived_s is None:
            raise InputError(f"{spans[0].name}: neither arrivals nor token times; record either")
        if half == 1:
            raise InputError(f"{spans[0].name}: what ran beside the first requests is not known")
        if half == 0:
            log = log.first(len(log) // 2)
        return _Fitted(tuple(runs), fit_spans(log, spans[0].name), (), {}, True)

    def profile(
        self, fitted: _Fitted, errors: Mapping[str, float] | None = None, by: str | None = None
    ) -> Profile:
        """The profile of a fit."""
        fit, setup, options = fitted.fit, self.setup, self.options
        return Profile.model_validate(
            {
                "device": options.device or setup.device or "unknown",
                "model": options.model or short(setup.model),
                "tensor_parallel": options.tensor_parallel or setup.tensor_parallel or 1,
                "power_cap_w": self.power_cap_w,
                "prefill_factor_by_power_cap_w": dict(fitted.prefill_factors),
                "engine": {
                    "name": setup.engine_name,
                    "version": version(setup),
                    **self.settings.model_dump(),
                },
                "step_time": step_time(fit, self.settings.max_num_seqs),
                "range": calibrated_range(fitted.fit, fitted.runs, fitted.logs),
                "source": f"measured: {', '.join(sorted({run.kind for run in fitted.runs}))}",
                "notes": _notes(self, fitted),
                "noise": {
                    "decode_relative_sd": rounded(fit.decode_noise),
                    "prefill_relative_sd": rounded(fit.prefill_noise),
                },
                "covariance": {
                    "decode": rounded(fit.decode_covariance),
                    "prefill": rounded(fit.prefill_covariance),
                },
                "sources": [source(run) for run in fitted.runs],
                "cross_validation": by if errors else None,
                "held_out_error": dict(errors) if errors else None,
            }
        )


def _decode_only(log: StepLog) -> StepLog:
    return log.part(log.prefill_tokens == 0)


def _prefill_factors(
    fit: StepFit, runs: Sequence[Measurement], logs: Sequence[StepLog], at_cap: Sequence[bool]
) -> Iterator[tuple[int, float]]:
    """How many times as long prefill takes at each other cap, by the median over its steps."""
    others = {
        run.setup.power_cap_w
        for run, ours in zip(runs, at_cap, strict=True)
        if not ours and run.setup.power_cap_w is not None
    }
    for cap in sorted(others):
        log = StepLog.joined(
            [log for run, log in zip(runs, logs, strict=True) if run.setup.power_cap_w == cap]
        )
        log = log.part(log.prefill_tokens > 0)
        if len(log):
            decode = decode_s(fit, log)
            ratio = (log.duration_s - decode) / (fit.predict(log) - decode)
            yield round(cap), round(float(np.median(ratio)), 4)


# --------------------------------------------------------------------------------------
# Held-out error


def _cross_validated(maker: _Maker) -> Iterator[dict[str, Any]]:
    """The errors on each run of a fit to the others, or on each half of the only run."""
    runs = maker.runs
    for test in runs:
        for half in (None,) if len(runs) > 1 else (0, 1):
            train = [run for run in runs if run is not test] if half is None else [test]
            try:
                fitted = maker.fit(train, half)
            except InputError:
                continue  # what is left shows no steps
            profile = maker.profile(fitted)
            kept = np.s_[:] if half is None else _half(len(test), 1 - half)
            errors = held_out_errors(test, profile, fitted.fit, kept)
            if not fitted.measured_prefill:
                errors.pop("mean_ttft", None)  # it was a guess: its error says nothing of the fit
            yield {"run": test.name if half is None else f"{test.name}, half {2 - half}", **errors}


def _half(entries: int, number: int) -> slice:
    return np.s_[entries // 2 :] if number else np.s_[: entries // 2]


def held_out_errors(
    test: Measurement, profile: Profile, fit: StepFit, kept: slice
) -> dict[str, float]:
    """Relative errors of what the profile predicts for the kept requests or steps of a run that
    it was not fitted to."""
    if test.steps is not None:
        steps = test.steps.part(kept)
        predicted = fit.predict(steps)
        mape = float(np.abs(predicted / steps.duration_s - 1).mean())
        total = float(predicted.sum() / steps.duration_s.sum() - 1)
        return {"step_time_mape": mape, "total_step_time": total}
    log = test.requests
    assert log is not None
    if log.concurrency is not None and log.concurrency > profile.range.decode_sequences[1]:
        return {}  # nobody measured such batches
    again = replay(log, profile, power_factor(profile, test))
    errors = {}
    measured_s = float((log.e2e_s - log.ttft_s)[kept].sum())
    if measured_s:
        errors["mean_itl"] = float((again.e2e_s - again.ttft_s)[kept].sum()) / measured_s - 1
    if not log.repeats_one_prompt:
        errors["mean_ttft"] = float(again.ttft_s[kept].mean() / log.ttft_s[kept].mean() - 1)
    return errors


def power_factor(profile: Profile, run: Measurement) -> float:
    """How many times as long the run's power cap makes prefill take."""
    cap = run.setup.power_cap_w
    return 1.0 if cap is None else profile.prefill_factor_by_power_cap_w.get(round(cap), 1.0)


def _summary(errors: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and 90th percentile over runs of the absolute errors."""
    summary: dict[str, float] = {}
    for name in ("mean_itl", "mean_ttft", "step_time_mape", "total_step_time"):
        values = np.abs([error[name] for error in errors if name in error])
        if len(values):
            summary[f"{name}_p50"] = round(float(np.quantile(values, 0.5)), 4)
            summary[f"{name}_p90"] = round(float(np.quantile(values, 0.9)), 4)
    return summary


# --------------------------------------------------------------------------------------
# Words


def _notes(maker: _Maker, fitted: _Fitted) -> str:
    sizes = ", ".join(str(size) for size in fitted.fit.sequences)
    parts = [f"Batch sizes seen: {sizes}; the entry beyond them carries their trend on."]
    if not fitted.measured_prefill:
        parts.append("No prefill was measured: its terms are guesses from the decode base.")
    if maker.series is not None:
        step = maker.series.step_tokens
        parts.append(f"Runs of growing prompt length computed {step:,} tokens a prompt each.")
    if fitted.prefill_factors:
        parts.append("Decode is pooled over power caps, prefill is of the stated cap.")
    return " ".join([*parts, *([maker.options.notes] if maker.options.notes else [])])


def _fit_warnings(fitted: _Fitted) -> tuple[str, ...]:
    warnings = []
    if not fitted.measured_prefill:
        warnings.append("no prefill was measured: its terms are guesses from the decode base")
    if not fitted.fit.decode_covariance.any():
        warnings.append("no decode step was measured: its base is a guess from prefill")
    if len(fitted.fit.sequences) > 1 and not rise(fitted.fit.sequences, fitted.fit.base_s):
        warnings.append("the base does not grow with the batch; larger batches will look too fast")
    return tuple(warnings)
