"""Figures of a run, one function each, drawn from the files of its run directory.

A figure's bytes depend on the run alone: no user's matplotlibrc, no window system, no date.
Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from viisim.metrics import latencies, warmup_requests
from viisim.records import ITL_EDGES_S

if TYPE_CHECKING:
    from viisim.results import LoadedRun

BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, GREY = "#D55E00", "#666666"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.dpi": 130,
    "savefig.dpi": 130,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}

MOST_POINTS = 600
"""Points of one line in a figure about a thousand pixels wide; longer series are averaged."""

MOST_REPLICAS = 16
"""Replicas that one figure can show legibly: the first ones."""

LATENCIES = {
    "ttft_s": "Time to first token (TTFT)",
    "tpot_s": "Time per output token (TPOT)",
    "itl_s": "Gaps between tokens (ITL)",
    "e2e_s": "End to end (E2E)",
}

_NEEDED = ("outcome", "streamed", "output_tokens")
_INSTANTS = ("arrived_ns", "dispatched_ns", "started_ns", "first_token_ns", "finished_ns")


def draw_all(run: LoadedRun, folder: Path) -> None:
    """Write every figure as a PNG into `folder`, which is made."""
    folder.mkdir()
    for name, draw in FIGURES.items():
        save(draw(run), folder / f"{name}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG that names neither software nor date."""
    with _own_style():
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png", metadata={"Software": None})


@contextmanager
def _own_style() -> Iterator[None]:
    """Our settings on matplotlib's defaults, whatever the user's; restored afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


# --------------------------------------------------------------------------------------
# Latencies


def latency_cdfs(run: LoadedRun) -> Figure:
    """Cumulative distributions of TTFT, TPOT, ITL and E2E, each seed and all seeds pooled."""
    with _own_style():
        figure = Figure(figsize=(8.5, 6.4), layout="constrained")
        figure.suptitle(f"{run.name}: latency of finished requests, {_seeds(run)}")
        panels = dict(zip(LATENCIES, figure.subplots(2, 2).flat, strict=True))
        for name, curves in _cdfs(run).items():
            counted = "gaps" if name == "itl_s" else "requests"
            panels[name].set_ylabel(f"share of {counted} (%)")
            _draw_cdf(panels[name], LATENCIES[name], curves, run.summary["slo"].get(name))
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        return figure


_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Values in seconds, and the shares in percent that are at most that."""


def _cdfs(run: LoadedRun) -> dict[str, list[_Curve]]:
    """Curves of every seed, then the pooled one. Kinds of latency without any value are left
    without a curve."""
    fraction = run.summary["warmup_fraction"]
    observed: dict[str, list[NDArray[np.float64]]] = {}
    for seed in run.seeds:
        table = run.requests(seed, [*_NEEDED, *_INSTANTS])
        cut = warmup_requests(table.num_rows, fraction)
        columns = {name: table[name].to_numpy()[cut:] for name in table.column_names}
        for name, values in latencies(columns).items():
            observed.setdefault(name, []).append(values)
    curves = {name: _sample_curves(observed[name]) for name in LATENCIES if name in observed}
    return curves | {"itl_s": _histogram_curves(run)}


def _sample_curves(seeds: list[NDArray[np.float64]]) -> list[_Curve]:
    """A thousand quantiles draw a million requests as well as all of them would."""
    shares = np.linspace(0, 1, 1001)
    pooled = np.concatenate(seeds)
    return [
        (np.quantile(values, shares, method="linear"), 100 * shares)
        for values in [*seeds, pooled]
        if values.size
    ]


def _histogram_curves(run: LoadedRun) -> list[_Curve]:
    seeds = []
    for seed in run.summary["seeds"]:
        counts = np.zeros(ITL_EDGES_S.size - 1, dtype=np.int64)
        start, used = seed["itl_histogram"]["first_bin"], seed["itl_histogram"]["counts"]
        counts[start : start + len(used)] = used
        seeds.append(counts)
    return [_histogram_curve(counts) for counts in [*seeds, np.sum(seeds, axis=0)] if counts.any()]


def _histogram_curve(counts: NDArray[np.int64]) -> _Curve:
    used = np.flatnonzero(counts)
    at_most = np.concatenate(([0], np.cumsum(counts)))[used[0] : used[-1] + 2]
    return ITL_EDGES_S[used[0] : used[-1] + 2], 100 * at_most / at_most[-1]


def _draw_cdf(axes: Axes, title: str, curves: list[_Curve], slo_s: float | None) -> None:
    axes.set_title(title)
    axes.set_xlabel("latency (µs, ms or s as written; log scale)")
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if slo_s is not None:
        axes.axvline(slo_s, color=VERMILION, linewidth=1.3, linestyle="--", label="SLO")
    if not curves:
        _say_empty(axes)
        return
    *seeds, pooled = curves
    for values_s, shares in seeds:
        axes.plot(values_s, shares, color=SKY, linewidth=0.8, label="one seed")
    axes.plot(*pooled, color=BLUE, linewidth=2.0, label="all seeds")
    p50, p99, least, most = (float(np.interp(s, *pooled[::-1])) for s in (50, 99, 0.2, 100))
    axes.plot([p50, p99], [50, 99], "o", color=BLUE, markersize=4)
    axes.set_title(f"p50 {_seconds(p50)}, p99 {_seconds(p99)}", loc="right", fontsize=8)
    # From the fastest 0.2 % on: fewer would stretch the axis over empty decades.
    shown = [least, most] if slo_s is None else [least, most, slo_s]
    low, high = min(shown) / 1.2, max(shown) * 1.2
    axes.set_xlim(low, high)
    if high < 200 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


# --------------------------------------------------------------------------------------
# Replicas over time


def occupancy(run: LoadedRun) -> Figure:
    """KV blocks in use and sequences waiting inside each replica over time, first seed."""
    with _own_style():
        replicas = _replicas(run)
        height = 1.3 + (0.75 if len(replicas) <= 8 else 0.55) * len(replicas)
        figure = Figure(figsize=(8.5, height), layout="constrained")
        figure.suptitle(f"{run.name}: KV cache and queue of each replica, {_first_seed(run)}")
        grid = figure.subplots(len(replicas), 2, sharex=True, sharey="col", squeeze=False)
        for (kv, queue), (name, series) in zip(grid, replicas.items(), strict=True):
            _draw_band(kv, series.times, series.kv_percent, BLUE)
            _draw_band(queue, series.times, series.waiting, ORANGE)
            kv.set_ylabel(name, rotation=0, horizontalalignment="right", fontweight="bold")
        _share_height(grid[:, 0], [series.kv_percent for series in replicas.values()], 10)
        _share_height(grid[:, 1], [series.waiting for series in replicas.values()], 4)
        grid[0, 0].set_title("KV blocks in use (%)")
        grid[0, 1].set_title("sequences waiting in the engine (count)")
        for axes in grid[-1]:
            axes.set_xlabel(f"simulated time ({_unit(replicas)})")
        return figure


def timeline(run: LoadedRun) -> Figure:
    """Sequences running and waiting in each replica over time, below those held centrally."""
    with _own_style():
        replicas = _replicas(run)
        held = _held(run, replicas)
        lanes = len(replicas) + (held is not None)
        figure = Figure(
            figsize=(8.5, 1.5 + (0.75 if lanes <= 8 else 0.55) * lanes), layout="constrained"
        )
        figure.suptitle(
            f"{run.name}: sequences running and waiting in each replica, {_first_seed(run)}"
        )
        rows = list(figure.subplots(lanes, 1, sharex=True, squeeze=False)[:, 0])
        if held is not None:
            _draw_held(rows.pop(0), *held)
        for axes, (name, series) in zip(rows, replicas.items(), strict=True):
            axes.sharey(rows[0])
            _draw_lane(axes, name, series)
        most = max((float(s.stacked.max(initial=0)) for s in replicas.values()), default=0)
        rows[0].set_ylim(0, max(1.05 * most, 1))
        rows[-1].set_xlabel(f"simulated time ({_unit(replicas)})")
        figure.supylabel("sequences (count)", fontsize=9)
        figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        return figure


class _Series:
    """Samples of one replica, averaged down to `MOST_POINTS`, in the figure's unit of time."""

    def __init__(self, samples: Mapping[str, NDArray[Any]], totals: dict[str, Any]) -> None:
        self.unit, length_s = _time_unit(samples["time_ns"])
        self.ns_per_unit = 1e9 * length_s
        self.times = samples["time_ns"] / self.ns_per_unit
        self.kv_percent = 100 * samples["kv_blocks_used"] / totals["usable_kv_blocks"]
        self.running = samples["running"]
        self.waiting = samples["waiting"]
        self.preemptions = int(totals["preemptions"])

    @property
    def stacked(self) -> NDArray[Any]:
        return np.asarray(self.running + self.waiting)


def _replicas(run: LoadedRun) -> dict[str, _Series]:
    """The first seed's replicas by id, `MOST_REPLICAS` at most."""
    table = run.samples(run.seeds[0])
    samples = {name: table[name].to_numpy() for name in table.column_names}
    series = {}
    for index, totals in enumerate(run.summary["seeds"][0]["replicas"][:MOST_REPLICAS]):
        own = samples["replica"] == index
        series[totals["id"]] = _Series({n: column[own] for n, column in samples.items()}, totals)
    return series


def _held(run: LoadedRun, replicas: dict[str, _Series]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Dispatched requests that waited in the central queue at each sample; None if none did."""
    series = next(iter(replicas.values()))
    table = run.requests(run.seeds[0], ["arrived_ns", "dispatched_ns"])
    arrived, dispatched = (table[name].to_numpy() for name in table.column_names)
    sent = dispatched >= 0
    instants_ns = series.times * series.ns_per_unit
    held = np.searchsorted(arrived[sent], instants_ns, "right")
    held -= np.searchsorted(np.sort(dispatched[sent]), instants_ns, "right")
    return (series.times, held) if held.any() else None


def _draw_band(axes: Axes, times: NDArray[Any], values: NDArray[Any], color: str) -> None:
    """The mean as a line; where samples were averaged, their range behind it."""
    at, mean, low, high = _coarse(times, values)
    axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0, step="post")
    axes.plot(at, mean, color=color, linewidth=1.0, drawstyle="steps-post")
    axes.fill_between(at, 0, mean, color=color, alpha=0.12, linewidth=0, step="post")
    axes.margins(x=0)


def _share_height(column: NDArray[Any], values: list[NDArray[Any]], least: float) -> None:
    """Axes from 0 to the largest of all values, or to `least` where all are small."""
    most = max(float(one.max(initial=0)) for one in values)
    for axes in column:
        axes.set_ylim(0, max(1.05 * most, least))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _draw_lane(axes: Axes, name: str, series: _Series) -> None:
    at, running, *_ = _coarse(series.times, series.running)
    _, stacked, *_ = _coarse(series.times, series.stacked)
    axes.fill_between(
        at, 0, running, step="post", color=BLUE, alpha=0.75, linewidth=0, label="running"
    )
    axes.fill_between(
        at,
        running,
        stacked,
        where=stacked > running,
        step="post",
        facecolor="#F9E2B0",
        edgecolor=ORANGE,
        hatch="//////",
        linewidth=0,
        label="waiting in the engine",
    )
    axes.margins(x=0)
    axes.set_ylabel(name, rotation=0, horizontalalignment="right", fontweight="bold")
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.text(
        0.995,
        0.95,
        _preemptions(series.preemptions),
        transform=axes.transAxes,
        horizontalalignment="right",
        verticalalignment="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _draw_held(axes: Axes, times: NDArray[Any], held: NDArray[Any]) -> None:
    _draw_band(axes, times, held, GREEN)
    axes.set_ylim(0, max(1.05 * float(held.max()), 1))
    axes.set_ylabel("central\nqueue", rotation=0, horizontalalignment="right")
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))


def _coarse(times: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """(times, mean, least, most) of runs of equally many samples, `MOST_POINTS` at most."""
    size = -(-times.size // MOST_POINTS)
    if size <= 1:
        return times, values, values, values
    starts = np.arange(0, times.size, size)
    counts = np.diff(np.append(starts, times.size))
    return (
        times[starts],
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


# --------------------------------------------------------------------------------------
# Words


def _seeds(run: LoadedRun) -> str:
    seeds = ", ".join(str(seed) for seed in run.seeds[:8])
    more = f" and {len(run.seeds) - 8} more" if len(run.seeds) > 8 else ""
    return f"seed{'s' if len(run.seeds) > 1 else ''} {seeds}{more}"


def _first_seed(run: LoadedRun) -> str:
    replicas = len(run.summary["seeds"][0]["replicas"])
    left_out = f", first {MOST_REPLICAS} of {replicas}" if replicas > MOST_REPLICAS else ""
    return f"seed {run.seeds[0]}{left_out}"


def _unit(replicas: dict[str, _Series]) -> str:
    return next((series.unit for series in replicas.values()), "s")


def _time_unit(times_ns: NDArray[Any]) -> tuple[str, int]:
    last_s = float(times_ns[-1]) / 1e9 if times_ns.size else 0.0
    units = (("h", 3600, 4 * 3600), ("min", 60, 10 * 60))
    return next(((unit, length) for unit, length, at in units if last_s >= at), ("s", 1))


def _seconds(value_s: float) -> str:
    unit, length_s = next(
        ((u, length) for u, length in (("s", 1), ("ms", 1e-3)) if value_s >= length), ("µs", 1e-6)
    )
    return f"{float(f'{value_s / length_s:.3g}'):,g} {unit}"


def _preemptions(number: int) -> str:
    return f"{number:,} preemption{'' if number == 1 else 's'}" if number else ""


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)


FIGURES: dict[str, Callable[[LoadedRun], Figure]] = {
    "latency_cdf": latency_cdfs,
    "occupancy": occupancy,
    "timeline": timeline,
}
"""File name (without `.png`) and function of every figure of a run directory."""
