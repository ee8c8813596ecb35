"""Figures of a validation: distributions and load curves of both sides, and steps' residuals.

What was measured is grey, what was predicted blue, everywhere. A figure's bytes depend on what it
shows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from viisim.plots import BLUE, GREY, ORANGE, STYLE, save
from viisim.validation.accuracy import METRICS, Accuracy, Compared, LoadRun
from viisim.validation.answers import LATENCIES, Answers
from viisim.validation.steps import StepTimes

_SHARES = np.linspace(0, 1, 401)
"""Quantiles of a curve: a pixel or two apart."""
_MOST_POINTS = 4000
"""Steps of one kind drawn; more would only blacken the figure."""
_OUTLIER = 0.6
"""Residuals beyond this size are drawn at the edge: stalls, which no step model explains."""
_STATISTICS = {"mean": ("-", "o"), "p90": ("--", "s")}
"""Of a load curve, with line and marker."""

Pictures: TypeAlias = tuple[tuple[str, str], ...]
"""File names and captions."""


def draw(
    name: str,
    runs: Sequence[LoadRun],
    accuracies: Sequence[Accuracy],
    steps: Sequence[StepTimes],
    folder: Path,
) -> Pictures:
    """Write the figures that there are data for as PNGs into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for stem, figure, caption in _figures(name, runs, accuracies, steps):
        save(figure, folder / f"{stem}.png")
        pictures.append((f"{stem}.png", caption))
    return tuple(pictures)


def _figures(
    name: str,
    runs: Sequence[LoadRun],
    accuracies: Sequence[Accuracy],
    steps: Sequence[StepTimes],
) -> Iterator[tuple[str, Figure, str]]:
    if runs:
        caption = "Distributions of latency: each repetition, measured and predicted."
        yield "latency_cdfs", latency_cdfs(name, runs), caption
    if accuracies:
        caption = "Latency against load. Bars span the least and the most of the repetitions."
        yield "latency_against_load", latency_against_load(name, accuracies), caption
    if steps:
        caption = (
            "Each step's predicted time over its measured one, less one, with medians; "
            f"beyond {_OUTLIER:.0%} at the edge."
        )
        yield "step_residuals", step_residuals(name, steps), caption


# --------------------------------------------------------------------------------------
# Distributions


def latency_cdfs(name: str, runs: Sequence[LoadRun]) -> Figure:
    """Cumulative distributions of TTFT, TPOT and E2E, a row a load."""
    with _own_style():
        figure = Figure(figsize=(8.5, 1.2 + 2.1 * len(runs)), layout="constrained")
        figure.suptitle(f"{name}: latency, measured and predicted")
        grid = figure.subplots(len(runs), len(LATENCIES), sharey=True, squeeze=False)
        for line, run in zip(grid, runs, strict=True):
            for axes, metric in zip(line, LATENCIES, strict=True):
                _draw_cdfs(axes, metric, run)
                axes.set_title(f"{METRICS[metric].label} at load {run.load:g}")
            line[0].set_ylabel("share of requests")
        for axes in grid[-1]:
            axes.set_xlabel("seconds (log scale)")
        _legend(figure, grid.flat)
        return figure


def _draw_cdfs(axes: Axes, metric: str, run: LoadRun) -> None:
    for answers in run.measured:
        _draw_cdf(axes, metric, answers, GREY, 0.8, "measured, a repetition")
    for answers in run.simulated:
        _draw_cdf(axes, metric, answers, BLUE, 1.2, "predicted, a repetition")
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_cdf(
    axes: Axes, metric: str, answers: Answers, color: str, width: float, label: str
) -> None:
    values_s = answers.latencies(metric)
    if values_s.size:
        curve = np.quantile(values_s, _SHARES)
        axes.plot(curve, _SHARES, color=color, linewidth=width, label=label)


def _plain_numbers(axes: Axes) -> None:
    """0.2 0.5 1 2 rather than powers of ten, as far as there is room."""
    low, high = axes.get_xlim()
    subs: tuple[float, ...] = (1, 2, 5) if high < 60 * low else (1,)
    if high < 6 * low:
        subs = (1, 1.5, 2, 3, 4, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# --------------------------------------------------------------------------------------
# Loads


def latency_against_load(name: str, accuracies: Sequence[Accuracy]) -> Figure:
    """Mean and 90th percentile of TTFT, TPOT and E2E against load, both sides."""
    with _own_style():
        figure = Figure(figsize=(8.5, 3.7), layout="constrained")
        figure.suptitle(f"{name}: latency against load")
        panels = figure.subplots(1, len(LATENCIES))
        for axes, metric in zip(panels, LATENCIES, strict=True):
            axes.set_title(METRICS[metric].label)
            axes.set_xlabel("load (share of capacity)")
            axes.set_xticks(sorted({one.load for one in accuracies}))
            for statistic in _STATISTICS:
                _draw_loads(axes, metric, statistic, accuracies)
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("seconds")
        _legend(figure, panels)
        return figure


def _draw_loads(axes: Axes, metric: str, statistic: str, accuracies: Sequence[Accuracy]) -> None:
    known = [(one.load, row) for one in accuracies if (row := one.row(metric, statistic))]
    if not known:
        return
    line, marker = _STATISTICS[statistic]
    loads, rows = zip(*sorted(known, key=lambda pair: pair[0]), strict=True)
    axes.errorbar(
        loads,
        [row.measured for row in rows],
        _ranges(rows),
        color=GREY,
        linestyle=line,
        linewidth=1.0,
        marker=marker,
        markersize=4,
        capsize=4,
        label=f"measured {statistic}",
    )
    axes.plot(
        loads,
        [row.predicted for row in rows],
        color=BLUE,
        linestyle=line,
        marker=marker,
        markersize=8,
        markerfacecolor="none",
        label=f"predicted {statistic}",
    )


def _ranges(rows: Iterable[Compared]) -> NDArray[np.float64]:
    """From the mean down to the least repetition, and up to the most."""
    down_up = [(r.measured - min(r.repetitions), max(r.repetitions) - r.measured) for r in rows]
    return np.transpose(np.maximum(down_up, 0.0))


# --------------------------------------------------------------------------------------
# Steps


def step_residuals(name: str, steps: Sequence[StepTimes]) -> Figure:
    """Predicted over measured step time against the predicted one, a panel a recording. Against
    the measured one, scatter alone would look like a slope."""
    with _own_style():
        columns = min(len(steps), 2)
        rows = -(-len(steps) // columns)
        figure = Figure(figsize=(8.5, 1.0 + 2.6 * rows), layout="constrained")
        figure.suptitle(f"{name}: predicted over measured step times")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for axes, times in zip(panels, steps, strict=False):
            axes.set_title(times.worker)
            axes.axhline(0, color=GREY, linewidth=1.0)
            _draw_steps(axes, times, ~times.with_prefill, BLUE, "decode only")
            _draw_steps(axes, times, times.with_prefill, ORANGE, "with prefill")
        for axes in panels[len(steps) :]:
            axes.set_axis_off()
        _finish_residuals(figure)
        _legend(figure, figure.axes)
        return figure


def _finish_residuals(figure: Figure) -> None:
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_ylim(-_OUTLIER, _OUTLIER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_minor_locator(NullLocator())
        _plain_numbers(axes)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("predicted step time (s, log scale)")
    figure.supylabel("residual", fontsize="medium")


def _draw_steps(
    axes: Axes, times: StepTimes, kind: NDArray[np.bool_], color: str, label: str
) -> None:
    """Every step as a dot, and the median of each tenth as a line."""
    at_s = times.predicted_s[kind]
    if not at_s.size:
        return
    residual = np.clip(at_s / times.measured_s[kind] - 1, -_OUTLIER, _OUTLIER)
    some = np.s_[:: max(1, at_s.size // _MOST_POINTS)]
    axes.plot(at_s[some], residual[some], ".", color=color, alpha=0.2, markersize=3)
    tenths = [part for part in np.array_split(np.argsort(at_s, kind="stable"), 10) if part.size]
    axes.plot(
        [float(np.median(at_s[part])) for part in tenths],
        [float(np.median(residual[part])) for part in tenths],
        color=color,
        marker="o",
        markersize=4,
        markeredgecolor="white",
        label=label,
    )


# --------------------------------------------------------------------------------------
# Style


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, of what any of them shows."""
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


@contextmanager
def _own_style() -> Iterator[None]:
    """Our settings on matplotlib's defaults, whatever the user's; restored afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield
