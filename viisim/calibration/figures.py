"""Figures of a validation: predicted against measured, and where the step model is off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from viisim.calibration.measurements import Floats, Measurement, StepLog
from viisim.calibration.reuse import step_logs, with_cached_prompts
from viisim.calibration.validate import Validation, predicted_s
from viisim.plots import BLUE, GREY, LATENCIES, ORANGE, STYLE, VERMILION, save
from viisim.profile import Profile

_MOST_POINTS = 4000
"""Steps drawn; more would only blacken the figure."""
_OUTLIER_PCT = 60.0
"""Residuals beyond this are drawn at the edge: stalls, which no step model explains."""


def draw_validation(
    validation: Validation, runs: Sequence[Measurement], profile: Profile, folder: Path
) -> list[Path]:
    """Write both figures as PNGs into `folder`, which is made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "predicted_against_measured": predicted_against_measured(validation),
        "step_residuals": step_residuals(runs, profile),
    }
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save(figure, path)
    return paths


def predicted_against_measured(validation: Validation) -> Figure:
    """Mean and 90th percentile of each latency, a point a run, on equal logarithmic axes."""
    with _own_style():
        figure = Figure(figsize=(8.5, 8.0), layout="constrained")
        figure.suptitle(f"predicted against measured, {len(validation.runs)} runs")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, LATENCIES.items(), strict=True):
            _draw_metric(axes, name, title, validation)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return figure


def _draw_metric(axes: Axes, name: str, title: str, validation: Validation) -> None:
    axes.set_title(title)
    axes.set_xlabel("measured (s, log scale)")
    axes.set_ylabel("predicted (s, log scale)")
    values: list[float] = []
    for statistic, color, marker in (("mean", BLUE, "o"), ("p90", ORANGE, "s")):
        for in_range in (True, False):
            pairs = [
                (found["measured"], found["predicted"])
                for run in validation.runs
                if run.in_range == in_range
                and (found := run.metrics.get(name, {}).get(statistic)) is not None
            ]
            if not pairs:
                continue
            values += [value for pair in pairs for value in pair]
            label = statistic if in_range else f"{statistic}, larger batches than calibrated"
            face = color if in_range else "none"
            axes.plot(*np.transpose(pairs), marker, color=color, markerfacecolor=face, label=label)
    positive = [value for value in values if value > 0]
    if not positive:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center")
        return
    ends = np.array([min(positive) / 1.2, max(positive) * 1.2])
    axes.plot(ends, ends, color=GREY, linewidth=1.0, label="equal")
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color=GREY, alpha=0.15, label="within 10 %")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(_few_labels))


def _few_labels(value: float, _: object) -> str:
    """Minor ticks at 2 and 5 of each decade."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def step_residuals(runs: Sequence[Measurement], profile: Profile) -> Figure:
    """Signed relative residuals of single decode steps by batch size and by context."""
    with _own_style():
        figure = Figure(figsize=(8.5, 3.8), layout="constrained")
        figure.suptitle("predicted decode steps less measured ones")
        by_size, by_context = figure.subplots(1, 2, sharey=True)
        steps = _decode_steps(runs, profile)
        by_size.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_size.set_xlabel("sequences in the batch")
        by_context.set_xlabel("tokens of context per sequence")
        by_size.set_ylabel("residual (%)")
        for axes in (by_size, by_context):
            axes.axhline(0, color=GREY, linewidth=1.0)
            axes.set_ylim(-_OUTLIER_PCT, _OUTLIER_PCT)
        if steps is not None and len(steps):
            residual = 100 * (predicted_s(steps, profile) / steps.duration_s - 1)
            residual = np.clip(residual, -_OUTLIER_PCT, _OUTLIER_PCT)
            _draw_residuals(by_size, steps.decodes.astype(float), residual)
            _draw_residuals(by_context, steps.context_tokens / steps.decodes, residual)
        return figure


def _draw_residuals(axes: Axes, at: Floats, residual: Floats) -> None:
    """Every step as a dot, and the median of each place as a line."""
    axes.plot(at, residual, ".", color=BLUE, alpha=0.15, markersize=3)
    places = np.unique(np.quantile(at, np.linspace(0, 1, 21)))
    nearest = np.abs(at[:, None] - places[None, :]).argmin(axis=1)
    used = np.unique(nearest)
    medians = [float(np.median(residual[nearest == place])) for place in used]
    axes.plot(places[used], medians, color=VERMILION, marker="o", markersize=3)


def _decode_steps(runs: Sequence[Measurement], profile: Profile) -> StepLog | None:
    engine = profile.engine
    whole = [
        with_cached_prompts(run, engine.block_tokens)
        for run in runs
        if run.steps is not None or (run.requests is not None and run.requests.gaps_s is not None)
    ]
    logs = [_thinned(log) for log in step_logs(whole, engine.max_num_batched_tokens)]
    return StepLog.joined(logs) if logs else None


def _thinned(log: StepLog) -> StepLog:
    decodes = log.part((log.prefill_tokens == 0) & (log.decodes > 0))
    return decodes.part(np.s_[:: max(1, len(decodes) // _MOST_POINTS)])


@contextmanager
def _own_style() -> Iterator[None]:
    """Our settings on matplotlib's defaults, whatever the user's; restored afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield
