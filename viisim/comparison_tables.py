"""A comparison as tables: CSV for programs, Markdown and LaTeX for papers, and the terminal's.

Rows are figures and columns are what is compared, so that a table of six policies fits the width
of a page. A figure that is shown to be better than the first column's has a `+`, one that is shown
to be worse a `-`; where neither direction is better, an arrow says which way it differs. No sign
means that no difference is shown.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from viisim.comparison import (
    METRIC,
    METRICS,
    ComparedCell,
    ComparedDifference,
    Comparison,
    Metric,
)
from viisim.report import class_name, number
from viisim.statistics import NO_DIFFERENCE, UNKNOWN, Estimate

SIGNS = {"better": "+", "worse": "-", "higher": "↑", "lower": "↓"}
VERDICTS = ("better", "worse", "higher", "lower", NO_DIFFERENCE, UNKNOWN)

SHOWN = ("ttft_s.p99", "tpot_s.mean", "goodput_requests_per_s", "jain_tenants", "e2e_s.p99")
"""The figures of the terminal's table, whose rows are the variants: the first four that are
defined, which is what 80 columns hold."""


class Block(NamedTuple):
    """One table: what was compared in one setting at one load, in all requests or one class."""

    setting: str
    load: float | None
    traffic_class: str | None
    cells: list[ComparedCell]
    differences: dict[tuple[str, str], ComparedDifference]
    """By metric and variant."""

    @property
    def title(self) -> str:
        """The setting, and what part of it this is."""
        load = "" if self.load is None else f", {100 * self.load:g} % of capacity"
        part = "" if self.traffic_class is None else f", class {class_name(self.traffic_class)}"
        return f"{self.setting}{load}{part}"

    @property
    def metrics(self) -> list[Metric]:
        """Those that are defined for any variant."""
        return [
            metric
            for metric in METRICS
            if any(self.value(cell, metric)["mean"] is not None for cell in self.cells)
        ]

    def value(self, cell: ComparedCell, metric: Metric) -> Estimate:
        """A figure of one variant, undefined where the class or the figure is."""
        values = cell["values"]
        if self.traffic_class is not None:
            values = cell["classes"].get(self.traffic_class, {})
        return values.get(metric.key, {"mean": None, "half_width": None, "seeds": 0})

    def verdict(self, cell: ComparedCell, metric: Metric) -> str:
        """What is shown of the variant against the first; empty for the first."""
        difference = self.differences.get((metric.key, cell["variant"]))
        return "" if difference is None else difference["verdict"]

    def is_saturated(self, variant: str) -> bool:
        """Whether the variant, or what it is compared with, was saturated in some seed."""
        own = (d for (_, name), d in self.differences.items() if name == variant)
        return any(difference["saturated"] for difference in own)


def blocks(comparison: Comparison, classes: bool = True) -> Iterator[Block]:
    """All tables: of every setting and load, of all requests and, with `classes`, each class."""
    for (setting, load), group in groupby(
        comparison["cells"], key=lambda cell: (cell["setting"], cell["load"])
    ):
        cells = list(group)
        parts: dict[str | None, None] = dict.fromkeys([None])
        if classes:
            parts |= dict.fromkeys(name for cell in cells for name in cell["classes"])
        for part in parts:
            own = {
                (d["metric"], d["variant"]): d
                for d in comparison["differences"]
                if (d["setting"], d["load"], d["traffic_class"]) == (setting, load, part)
            }
            yield Block(setting, load, part, cells, own)


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write every table into `folder`, which is there."""
    _write_csv(folder / "figures.csv", _figure_rows(comparison))
    _write_csv(folder / "differences.csv", _difference_rows(comparison))
    for name, of_block in (("tables.md", markdown), ("tables.tex", latex)):
        text = "\n".join(of_block(block) for block in blocks(comparison))
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


# --------------------------------------------------------------------------------------
# For programs


def _figure_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for block in blocks(comparison):
        for cell in block.cells:
            for metric in block.metrics:
                value = block.value(cell, metric)
                yield {
                    **_where(block, cell["variant"]),
                    "metric": metric.key,
                    "unit": metric.unit,
                    "mean": _plain(value["mean"], metric),
                    "half_width_95": _plain(value["half_width"], metric),
                    "seeds": value["seeds"],
                    "saturated_seeds": len(cell["saturated_seeds"]),
                }


def _difference_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for block in blocks(comparison):
        for difference in block.differences.values():
            metric = METRIC[difference["metric"]]
            yield {
                **_where(block, difference["variant"]),
                "baseline": comparison["baseline"],
                "metric": metric.key,
                "unit": metric.unit,
                "difference": _plain(difference["mean"], metric),
                "half_width_95": _plain(difference["half_width"], metric),
                "seeds": difference["seeds"],
                "p_value": difference["p_value"],
                "holm_p_value": difference["holm_p_value"],
                "verdict": difference["verdict"],
                "saturated": difference["saturated"],
            }


def _where(block: Block, variant: str) -> dict[str, Any]:
    return {
        "setting": block.setting,
        "load": block.load,
        "variant": variant,
        "traffic_class": "(all)" if block.traffic_class is None else block.traffic_class,
    }


def _plain(value: float | None, metric: Metric) -> float | None:
    """In the metric's unit, without the noise of the multiplication."""
    return None if value is None else float(f"{value * metric.scale:.10g}")


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    every = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        if every:
            writer = csv.DictWriter(file, every[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(every)


# --------------------------------------------------------------------------------------
# For papers


def with_interval(value: Estimate, metric: Metric) -> str:
    """`mean ± half width` in the metric's unit; a dash where undefined."""
    mean = number(value["mean"], metric.scale)
    if not value["half_width"]:
        return mean
    return f"{mean} ± {number(value['half_width'], metric.scale, 2)}"


def heading(cell: ComparedCell) -> str:
    """The variant, with a star where it was saturated."""
    return cell["variant"] + ("*" if cell["saturated_seeds"] else "")


def row_name(metric: Metric) -> str:
    """The metric with its unit."""
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def entry(block: Block, cell: ComparedCell, metric: Metric) -> str:
    """A figure with its interval, and the sign of what is shown of it."""
    sign = SIGNS.get(block.verdict(cell, metric), "")
    return with_interval(block.value(cell, metric), metric) + (f" {sign}" if sign else "")


def change(difference: ComparedDifference) -> str:
    """A difference with its sign, its interval and its unit."""
    metric = METRIC[difference["metric"]]
    text = with_interval(difference, metric).replace("-", "−", 1)
    plus = "+" if (difference["mean"] or 0) > 0 else ""
    return f"{plus}{text} {metric.unit}".strip()


def legend(block: Block) -> str:
    """What the table's signs mean, with what was measured."""
    seeds = max(value["seeds"] for cell in block.cells for value in cell["values"].values())
    requests = block.cells[0]["requests"]
    saturated = any(cell["saturated_seeds"] for cell in block.cells)
    arrows = any(metric.better == "neither" for metric in block.metrics)
    more = "↑/↓: higher/lower where neither is better; " if arrows else ""
    star = " *: saturated, no steady state was reached." if saturated else ""
    return (
        f"Means over {seeds} seed{'s' if seeds != 1 else ''}, {requests:,} requests in all, with "
        f"95 % intervals; +/-: better/worse than {block.cells[0]['variant']} by a paired t test "
        f"with Holm's correction at 5 %; {more}no sign: no difference shown.{star}"
    )


def markdown(block: Block) -> str:
    """The block's figures, and below them the differences with their verdicts."""
    lines = [f"### {block.title}", "", legend(block), ""]
    lines += _markdown_table(
        [heading(cell) for cell in block.cells],
        block.metrics,
        lambda column, metric: entry(block, block.cells[column], metric),
    )
    if block.differences:
        lines += ["", f"Less {block.cells[0]['variant']}, seed by seed:", ""]
        lines += _markdown_table(
            [heading(cell) for cell in block.cells[1:]],
            block.metrics,
            lambda column, metric: _said(block, block.cells[1 + column], metric),
        )
    return "\n".join(lines) + "\n"


def _said(block: Block, cell: ComparedCell, metric: Metric) -> str:
    difference = block.differences.get((metric.key, cell["variant"]))
    if difference is None:
        return "–"
    return f"{with_interval(difference, metric)}: {difference['verdict']}"


def _markdown_table(
    columns: Sequence[str], metrics: Sequence[Metric], text: Callable[[int, Metric], str]
) -> list[str]:
    rows = [["", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[row_name(m), *(text(i, m) for i in range(len(columns)))] for m in metrics]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def latex(block: Block) -> str:
    """The block's figures as a table in the style of booktabs."""
    columns = "l" + "r" * len(block.cells)
    head = " & ".join(["", *(_tex(heading(cell)) for cell in block.cells)])
    rows = [
        " & ".join([_tex(row_name(m)), *(_tex_entry(block, cell, m) for cell in block.cells)])
        for m in block.metrics
    ]
    return "\n".join(
        [
            r"\begin{table*}",
            r"  \centering",
            rf"  \caption{{{_tex(block.title)}. {_tex(legend(block))}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            rf"    {head} \\",
            r"    \midrule",
            *(rf"    {row} \\" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


_TEX_SIGNS = SIGNS | {"higher": r"\uparrow", "lower": r"\downarrow"}


def _tex_entry(block: Block, cell: ComparedCell, metric: Metric) -> str:
    text = with_interval(block.value(cell, metric), metric)
    sign = _TEX_SIGNS.get(block.verdict(cell, metric), "")
    if text == "–":
        return "--"
    text = text.replace(",", "{,}").replace("±", r"\pm")
    return f"${text}^{{{sign}}}$" if sign else f"${text}$"


_TEX = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    " %": r"\,\%",
}


def _tex(text: str) -> str:
    text = text.replace(" %", "\0")
    return "".join(_TEX.get(sign, sign) for sign in text).replace("\0", _TEX[" %"])


# --------------------------------------------------------------------------------------
# For the terminal


def terminal_report(comparison: Comparison) -> Iterator[Any]:
    """For each setting and load: a table with a row a variant, then what is shown, in words."""
    for block in blocks(comparison, classes=False):
        yield _terminal_table(block)
    for block in blocks(comparison):
        for variant in comparison["variants"][1:]:
            lines = [f"{said}: {about}" for said, about in verdict_words(block, variant)]
            if lines:
                star = "*" if block.is_saturated(variant) else ""
                title = f"{block.title}: {variant} against {comparison['baseline']}{star}"
                yield Text(title, style="bold")
                yield Padding(Text("\n".join(lines)), (0, 0, 0, 2))
    if any(cell["saturated_seeds"] for cell in comparison["cells"]):
        yield Text(
            "* SATURATED in some seed: the queue was still growing, so latencies say how long the "
            "run was, not how good the policy is. Lower the load.",
            style="bold red",
        )


def verdict_words(block: Block, variant: str) -> Iterator[tuple[str, str]]:
    """Each verdict on the variant with the figures that it is about; how many they are where
    nothing is shown."""
    by_verdict: dict[str, list[ComparedDifference]] = {said: [] for said in VERDICTS}
    for (_, name), difference in block.differences.items():
        if name == variant:
            by_verdict[difference["verdict"]].append(difference)
    for said, about in by_verdict.items():
        if not about:
            continue
        if said in (NO_DIFFERENCE, UNKNOWN):
            yield said, f"{len(about)} figure{'s' if len(about) > 1 else ''}"
        else:
            yield said, ", ".join(f"{METRIC[d['metric']].label} ({change(d)})" for d in about)


def _terminal_table(block: Block) -> Table:
    table = Table(title=block.title, title_justify="left", title_style="bold")
    table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
    table.add_column("", no_wrap=True)
    defined = {metric.key for metric in block.metrics}
    shown = [METRIC[key] for key in SHOWN if key in defined][:4]
    for metric in shown:
        table.add_column(row_name(metric), justify="right")
    colours = {"better": "green", "worse": "red"}
    for cell in block.cells:
        entries = (
            Text(entry(block, cell, metric), colours.get(block.verdict(cell, metric), ""))
            for metric in shown
        )
        table.add_row(heading(cell), *entries)
    return table
