"""Figures of a comparison, for a paper as they are: PNG and PDF, with captions.

A variant has the same colour, marker and line style in every figure; colours are Okabe and Ito's.
A figure's bytes depend on the comparison alone: no user's matplotlibrc, no date, no host. Fonts
are embedded as TrueType, which publishers ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from viisim.comparison import METRIC, CellRun, ComparedCell, Comparison, Metric
from viisim.comparison_tables import Block, blocks, heading, row_name
from viisim.metrics import latencies, warmup_requests
from viisim.plots import BLUE, GREEN, GREY, ORANGE, SKY, STYLE, VERMILION
from viisim.report import class_name, number, predictor_words

PURPLE, YELLOW, BLACK = "#CC79A7", "#F0E442", "#000000"

PAPER: dict[Any, Any] = STYLE | {
    "pdf.fonttype": 42,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
}

CDF_POINTS = 300
"""Points of one curve: a pixel or two apart."""

LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}


class Look(NamedTuple):
    """How a variant is drawn."""

    color: str
    marker: str
    line: Any


_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), (0, (1, 3)))


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """One look a variant; from the ninth on, colours come again with other markers and lines."""
    n = len(_COLORS)
    return {
        name: Look(
            _COLORS[index % n],
            _MARKERS[(index + index // n) % n],
            _LINES[(index + index // n) % n],
        )
        for index, name in enumerate(variants)
    }


class Drawn(NamedTuple):
    """A figure, and what a reader must know of it."""

    name: str
    figure: Figure
    caption: str


def draw_comparison(comparison: Comparison, pairs: Sequence[CellRun], folder: Path) -> None:
    """Write every figure into `folder/plots`, as PNG and PDF, and `folder/captions.md`."""
    captions = []
    for drawn in figures(comparison, pairs):
        save(drawn.figure, folder / "plots" / drawn.name)
        captions.append(f"## {drawn.name}\n\n{drawn.caption}\n")
    text = "# Captions\n\n" + "\n".join(
        [*captions, f"## All figures\n\n{provenance(comparison)}\n"]
    )
    (folder / "captions.md").write_text(text, encoding="utf-8", newline="\n")


def figures(comparison: Comparison, pairs: Sequence[CellRun]) -> Iterator[Drawn]:
    """All figures that the comparison has data for."""
    for (setting, load), group in groupby(pairs, key=lambda p: (p[0].setting, p[0].load)):
        yield latency_cdfs(comparison, setting, load, list(group))
    for setting in dict.fromkeys(cell["setting"] for cell in comparison["cells"]):
        if len(comparison["loads"]) > 1:
            yield latency_against_load(comparison, setting)
    for block in blocks(comparison, classes=False):
        yield by_class(comparison, block)
        yield pareto(comparison, block)


def save(figure: Figure, path: Path) -> None:
    """Write `path.png` and `path.pdf`, which name neither software nor date."""
    with paper_style():
        FigureCanvasAgg(figure)
        # Not `with_suffix`: a name may have dots in it.
        figure.savefig(f"{path}.png", format="png", metadata={"Software": None})
        nothing = {"Creator": None, "Producer": None, "CreationDate": None}
        figure.savefig(f"{path}.pdf", format="pdf", metadata=nothing)


@contextmanager
def paper_style() -> Iterator[None]:
    """Our settings on matplotlib's defaults, whatever the user's; restored afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(PAPER)
        yield


# --------------------------------------------------------------------------------------
# Words


def provenance(comparison: Comparison) -> str:
    """Seeds, warm-up, statistics and versions: what holds for every figure."""
    code, versions = comparison["code"], comparison["versions"]
    changed = ", with uncommitted changes" if code and code["dirty"] else ""
    commit = f" at commit {code['commit'][:12]}{changed}" if code else ""
    capacities = ", ".join(
        f"{name} {number(rate)} requests/s"
        for name, rate in comparison["capacity_requests_per_s"].items()
    )
    measured = f"Measured capacity: {capacities}. " if capacities else ""
    predictors = sorted({predictor_words(cell["predictor"]) for cell in comparison["cells"]})
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Seeds {_listed(comparison['seeds'])}, the same for everything compared. Of each seed, "
        f"the first {100 * comparison['warmup_fraction']:.3g} % of requests by order of arrival "
        "are warm-up and not measured. Intervals are 95 % Student t intervals of the mean over "
        f"seeds. {measured}Length predictor: {', '.join(predictors)}. Made with {libraries}"
        f"{commit}."
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _sizes(cells: Sequence[ComparedCell]) -> str:
    """How much was measured, and what must not be believed."""
    most = max(cell["requests"] for cell in cells)
    saturated = dict.fromkeys(cell["variant"] for cell in cells if cell["saturated_seeds"])
    warning = f" Saturated in some seed: {', '.join(saturated)}." if saturated else ""
    return f"{most:,} requests in all seeds together.{warning}"


def _where(setting: str, load: float | None) -> str:
    return setting if load is None else f"{setting}, {100 * load:g} % of capacity"


def _file(kind: str, setting: str, load: float | None) -> str:
    return f"{kind}.{setting}" + ("" if load is None else f".load-{load:g}")


def _cells(comparison: Comparison, setting: str, load: float | None) -> list[ComparedCell]:
    return [
        cell for cell in comparison["cells"] if (cell["setting"], cell["load"]) == (setting, load)
    ]


def _figure(columns: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    width = {1: 5.2, 2: 7.4}.get(columns, 9.6)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(handles)),
    )


# --------------------------------------------------------------------------------------
# Distributions


def latency_cdfs(
    comparison: Comparison, setting: str, load: float | None, pairs: Sequence[CellRun]
) -> Drawn:
    """Cumulative distributions of TTFT, TPOT and E2E: mean over seeds, band from the lowest seed
    to the highest."""
    with paper_style():
        figure, panels = _figure(3, 3.4, _where(setting, load))
        look, handles = looks(comparison["variants"]), {}
        observed = {cell.variant: _observed(run) for cell, run in pairs}
        for axes, (key, label) in zip(panels, LATENCIES.items(), strict=True):
            seeds = [values for each in observed.values() for values in each[key] if values.size]
            grid = _grid(seeds)
            for variant, each in observed.items():
                shares = _shares([values for values in each[key] if values.size], grid)
                if shares.size:
                    handles[variant] = _draw_cdf(axes, grid, shares, look[variant])
            _label_cdf(axes, label, grid)
        panels[0].set_ylabel("share of requests (%)")
        _legend(figure, handles)
        caption = (
            f"Cumulative distributions of latency, {_where(setting, load)}: time to first token "
            "(TTFT), time per output token (TPOT), end to end (E2E). Lines are means over "
            f"{len(comparison['seeds'])} seeds, bands reach from the lowest seed to the highest. "
            + _sizes(_cells(comparison, setting, load))
        )
        return Drawn(_file("latency_cdf", setting, load), figure, caption)


def _observed(run: Any) -> dict[str, list[NDArray[np.float64]]]:
    """The measured latencies of each kind, an array a seed."""
    needed = ["outcome", "streamed", "output_tokens"]
    needed += [f"{i}_ns" for i in ("arrived", "dispatched", "started", "first_token", "finished")]
    observed: dict[str, list[NDArray[np.float64]]] = {key: [] for key in LATENCIES}
    for seed in run.seeds:
        table = run.requests(seed, needed)
        cut = warmup_requests(table.num_rows, run.summary["warmup_fraction"])
        columns = {name: table[name].to_numpy()[cut:] for name in table.column_names}
        for key, values in latencies(columns).items():
            if key in observed:
                observed[key].append(values)
    return observed


def _grid(seeds: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Latencies from the fastest to the slowest of all, evenly on a log scale."""
    if not seeds:
        return np.array([])
    low = min(float(np.quantile(values, 0.002)) for values in seeds)
    high = max(float(values.max()) for values in seeds)
    return np.geomspace(max(low, 1e-6), max(high, 2e-6), CDF_POINTS)


def _shares(seeds: list[NDArray[np.float64]], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Percent of each seed's values that are at most a point of the grid, a row a seed."""
    ranks = [100 * np.searchsorted(np.sort(v), grid, "right") / v.size for v in seeds]
    return np.array(ranks)


def _draw_cdf(
    axes: Axes, grid: NDArray[np.float64], shares: NDArray[np.float64], look: Look
) -> Any:
    low, high = shares.min(axis=0), shares.max(axis=0)
    axes.fill_between(grid, low, high, color=look.color, alpha=0.18, linewidth=0)
    (line,) = axes.plot(
        grid,
        shares.mean(axis=0),
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        markevery=CDF_POINTS // 6,
        markersize=4,
    )
    return line


def _label_cdf(axes: Axes, label: str, grid: NDArray[np.float64]) -> None:
    axes.set_xlabel(f"{label} (s, log scale)")
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if grid.size and grid[-1] < 50 * grid[0]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


# --------------------------------------------------------------------------------------
# Against load


def latency_against_load(comparison: Comparison, setting: str) -> Drawn:
    """TTFT p99, TPOT mean and E2E mean against offered load; saturated points are hollow."""
    with paper_style():
        figure, panels = _figure(3, 3.4, setting)
        look, handles = looks(comparison["variants"]), {}
        apart = 0.8 * (max(comparison["loads"]) - min(comparison["loads"]))
        for axes, key in zip(panels, ("ttft_s.p99", "tpot_s.mean", "e2e_s.mean"), strict=True):
            for index, variant in enumerate(comparison["variants"]):
                own = [
                    cell
                    for cell in comparison["cells"]
                    if (cell["setting"], cell["variant"]) == (setting, variant)
                    and cell["values"][key]["mean"] is not None
                ]
                if own:
                    own.sort(key=lambda cell: cell["load"] or 0.0)
                    aside = apart * (index - (len(look) - 1) / 2)
                    handles[variant] = _draw_loads(axes, own, METRIC[key], look[variant], aside)
            axes.set_ylabel(f"{row_name(METRIC[key])}, log scale")
            axes.set_xlabel("offered load (% of capacity)")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            low, high = axes.get_ylim()
            if high < 50 * low:
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _legend(figure, handles)
        capacity = comparison["capacity_requests_per_s"].get(setting)
        caption = (
            f"Latency against offered load, {setting}, in percent of the measured capacity of "
            f"{number(capacity)} requests/s. Points are means over {len(comparison['seeds'])} "
            "seeds with 95 % intervals, set apart sideways; hollow points were saturated in some "
            "seed, where latency says how long the run was. "
            + _sizes([cell for cell in comparison["cells"] if cell["setting"] == setting])
        )
        return Drawn(_file("latency_load", setting, None), figure, caption)


def _draw_loads(
    axes: Axes, cells: Sequence[ComparedCell], metric: Metric, look: Look, aside: float
) -> Any:
    loads = [100 * (cell["load"] or 0.0) + aside for cell in cells]
    means, halves = _scaled(cells, metric)
    # On a log scale an interval that reaches 0 is cut off just above it.
    lower = np.minimum(halves, 0.95 * means)
    axes.errorbar(
        loads, means, (lower, halves), color=look.color, linestyle=look.line, elinewidth=0.9
    )
    for load, mean, cell in zip(loads, means, cells, strict=True):
        inside = "white" if cell["saturated_seeds"] else look.color
        axes.plot(load, mean, look.marker, color=look.color, markerfacecolor=inside, zorder=3)
    # The legend shows the line with a filled marker.
    return axes.plot([], [], color=look.color, linestyle=look.line, marker=look.marker)[0]


def _scaled(
    cells: Sequence[ComparedCell], metric: Metric
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and half widths in the metric's unit; an unknown half width is 0."""
    values = [cell["values"][metric.key] for cell in cells]
    means = [metric.scale * (value["mean"] or 0.0) for value in values]
    return np.array(means), np.array([metric.scale * (v["half_width"] or 0.0) for v in values])


# --------------------------------------------------------------------------------------
# By class


def by_class(comparison: Comparison, block: Block) -> Drawn:
    """Bars of TTFT p99, E2E p99 and goodput (throughput without an SLO) of each traffic class."""
    with paper_style():
        figure, panels = _figure(3, 3.2, block.title)
        look, handles = looks(comparison["variants"]), {}
        names = list(dict.fromkeys(name for cell in block.cells for name in cell["classes"]))
        parts: list[str | None] = [*names] if len(names) > 1 else [None]
        judged = any(c["values"]["goodput_requests_per_s"]["mean"] is not None for c in block.cells)
        rate = "goodput_requests_per_s" if judged else "throughput_requests_per_s"
        for axes, key in zip(panels, ("ttft_s.p99", "e2e_s.p99", rate), strict=True):
            width = 0.8 / len(block.cells)
            for index, cell in enumerate(block.cells):
                at = np.arange(float(len(parts))) + width * (index - (len(block.cells) - 1) / 2)
                handles[heading(cell)] = _draw_bars(
                    axes, at, width, cell, parts, METRIC[key], look[cell["variant"]]
                )
            shown = ["all requests" if part is None else class_name(part) for part in parts]
            axes.set_xticks(range(len(parts)), shown)
            axes.set_xlim(-0.6, len(parts) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel(row_name(METRIC[key]))
            axes.set_ylim(bottom=0)
        _legend(figure, handles)
        what = "by traffic class" if len(names) > 1 else "of all requests"
        caption = (
            f"Slowest hundredth's latency and {METRIC[rate].label} {what}, {block.title}. Bars are "
            f"means over {len(comparison['seeds'])} seeds with 95 % intervals; a class with "
            f"objectives of its own is judged by those. {_sizes(block.cells)}"
        )
        return Drawn(_file("classes", block.setting, block.load), figure, caption)


_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oo")


def _draw_bars(
    axes: Axes,
    at: NDArray[Any],
    width: float,
    cell: ComparedCell,
    parts: Sequence[str | None],
    metric: Metric,
    look: Look,
) -> Any:
    nothing = {"mean": None, "half_width": None}
    values = [
        cell["values"][metric.key]
        if part is None
        else cell["classes"].get(part, {}).get(metric.key, nothing)
        for part in parts
    ]
    means = np.array([metric.scale * (value["mean"] or 0.0) for value in values])
    halves = np.array([metric.scale * (value["half_width"] or 0.0) for value in values])
    hatch = _HATCHES[_MARKERS.index(look.marker)]
    bars = axes.bar(
        at, means, 0.92 * width, facecolor=look.color, hatch=hatch, edgecolor="white", linewidth=0
    )
    lower = np.minimum(halves, means)
    axes.errorbar(at, means, (lower, halves), fmt="none", ecolor="#222222", elinewidth=1)
    return bars


# --------------------------------------------------------------------------------------
# What a policy trades


def pareto(comparison: Comparison, block: Block) -> Drawn:
    """Goodput against fairness or, without tenants, against the most urgent class's p99 TTFT."""
    with paper_style():
        figure, (axes,) = _figure(1, 3.9, block.title)
        look, handles = looks(comparison["variants"]), {}
        across, part = _trade(block)
        up = METRIC["goodput_requests_per_s"]
        if block.cells[0]["values"][up.key]["mean"] is None:
            up = METRIC["throughput_requests_per_s"]
        points = {}
        for cell in block.cells:
            source = cell["values"] if part is None else cell["classes"][part]
            x, y = source[across.key], cell["values"][up.key]
            if x["mean"] is None or y["mean"] is None:
                continue
            own = look[cell["variant"]]
            half = (x["half_width"] or 0.0) * across.scale
            # No index of fairness is above 1.
            above = min(half, 1 - x["mean"]) if across.better == "higher" else half
            points[heading(cell)] = (x["mean"] * across.scale, y["mean"] * up.scale)
            handles[heading(cell)] = axes.errorbar(
                x["mean"] * across.scale,
                y["mean"] * up.scale,
                (y["half_width"] or 0.0) * up.scale,
                ([half], [above]),
                color=own.color,
                marker=own.marker,
                markersize=7,
                markerfacecolor="white" if cell["saturated_seeds"] else own.color,
                linestyle="none",
                elinewidth=0.9,
            )
        front = _front(list(points.values()), across.better == "higher")
        axes.plot(*front, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        whose = "" if part is None else f"{class_name(part)}: "
        axes.set_xlabel(whose + row_name(across))
        axes.set_ylabel(row_name(up))
        axes.margins(0.12)
        _legend(figure, handles)
        aim = "upper right" if across.better == "higher" else "upper left"
        caption = (
            f"{up.label.capitalize()} against {whose}{across.label}, {block.title}; better is "
            f"{aim}. Points are means over {len(comparison['seeds'])} seeds with 95 % intervals; "
            f"the dotted line joins those that no other beats in both. {_sizes(block.cells)}"
        )
        return Drawn(_file("pareto", block.setting, block.load), figure, caption)


def _trade(block: Block) -> tuple[Metric, str | None]:
    """The figure that goodput is traded against, and the class it is taken of."""
    fairness = METRIC["jain_tenants"]
    if any(cell["values"][fairness.key]["mean"] is not None for cell in block.cells):
        return fairness, None
    ttft = METRIC["ttft_s.p99"]
    fastest = [
        (value["mean"], name)
        for name, values in block.cells[0]["classes"].items()
        if (value := values["ttft_s.p50"])["mean"] is not None
        and all(name in cell["classes"] for cell in block.cells)
    ]
    if len(fastest) < 2:
        return ttft, None
    named = [name for _, name in fastest if name == "interactive"]
    return ttft, named[0] if named else min(fastest)[1]


def _front(
    points: list[tuple[float, float]], more_is_better: bool
) -> tuple[list[float], list[float]]:
    """The points that no other beats in both coordinates, from left to right."""
    better: Callable[[float, float], bool] = (
        (lambda a, b: a >= b) if more_is_better else (lambda a, b: a <= b)
    )
    front = sorted(
        (x, y)
        for x, y in points
        if not any(better(a, x) and b >= y and (a, b) != (x, y) for a, b in points)
    )
    return [x for x, _ in front], [y for _, y in front]
