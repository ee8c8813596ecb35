"""One self-contained HTML page for a run directory or a comparison.

Style and figures are inside the page, and nothing is fetched: it can be mailed, archived and put
beside a paper. All text goes through `html.escape`. Equal directories give equal pages.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from viisim.comparison import Comparison, load_comparison
from viisim.comparison_plots import provenance
from viisim.comparison_tables import (
    Block,
    blocks,
    entry,
    heading,
    legend,
    row_name,
    verdict_words,
)
from viisim.errors import InputError
from viisim.metrics import Summary
from viisim.plots import draw_all
from viisim.report import LATENCIES, VALUES, class_name, notes, number, predictor_words
from viisim.results import LoadedRun, load_run
from viisim.statistics import Estimate

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.about { color: #555; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #444; } tbody tr:nth-child(even) { background: #f6f6f6; }
.better { color: #00694c; font-weight: 600; } .worse { color: #a83c00; font-weight: 600; }
.warning { border-left: 4px solid #D55E00; padding: .2rem .8rem; background: #fdf1e8; }
figure { margin: 1.4rem 0; } figure img { max-width: 100%; }
figcaption { color: #444; font-size: 13px; }
pre { background: #f4f4f4; padding: .7rem 1rem; overflow-x: auto; font-size: 13px; }
"""

RUN_CAPTIONS = {
    "latency_cdf": "Cumulative distributions of latency, each seed and all seeds together.",
    "occupancy": "KV cache in use and sequences waiting in each replica over time, first seed.",
    "timeline": "Sequences running and waiting in each replica over time, first seed.",
}


def page_of(folder: Path) -> str:
    """The page of a run or comparison directory. Raises InputError if it is neither."""
    if (folder / "comparison.json").is_file():
        return comparison_page(folder)
    if (folder / "manifest.json").is_file():
        return run_page(load_run(folder))
    raise InputError(f"{folder}: give a folder that `viisim run` or `viisim compare` wrote")


# --------------------------------------------------------------------------------------
# Pages


def run_page(run: LoadedRun) -> str:
    """The page of one experiment."""
    manifest, summary = run.manifest, run.summary
    config = manifest["config"]
    parts = [
        _about(config.get("description", "")),
        _section("What was run", _run_facts(run), _details("The whole experiment", config)),
        _section(
            "Figures",
            *(_warning(str(line)) for line in notes(summary)),
            _summary_tables(summary),
        ),
        _section("Plots", *_run_plots(run)),
        _section(
            "How to repeat it",
            _paragraph("With this run directory, on any machine with the versions below:"),
            _code(f"viisim verify {run.path.name}"),
            _definitions(manifest["versions"] | _commit(manifest["code"]) | manifest["sha256"]),
        ),
        _glossary(summary["definitions"]),
    ]
    return _page(run.name, parts)


def comparison_page(folder: Path) -> str:
    """The page of a comparison."""
    comparison = load_comparison(folder)
    captions = _captions(folder)
    others = ", ".join(comparison["variants"][1:]) or "nothing"
    parts = [
        _paragraph(f"{others} against {comparison['baseline']}."),
        _section(
            "What was run", _paragraph(provenance(comparison)), *_settings(folder, comparison)
        ),
        _section("Figures", *(_block(block) for block in blocks(comparison))),
        _section(
            "Plots",
            *(_figure(folder / "plots" / f"{name}.png", text) for name, text in captions.items()),
        ),
        _section("How to repeat it", *_repeat(folder, comparison)),
        _glossary(comparison["definitions"]),
    ]
    return _page(f"Comparison: {comparison['name']}", parts)


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


# --------------------------------------------------------------------------------------
# Parts of a run's page


def _run_facts(run: LoadedRun) -> str:
    config, summary = run.manifest["config"], run.summary
    return _definitions(
        {
            "policy": _inline(config.get("policy", {})),
            "replicas": _replicas(config),
            "workload": _inline(config.get("workload", {})),
            "SLO": _inline({key: value for key, value in config.get("slo", {}).items() if value}),
            "length predictor": predictor_words(config.get("predictor")),
            "seeds": ", ".join(str(seed) for seed in run.seeds),
            "requests": ", ".join(f"{n:,} {name}" for name, n in summary["outcomes"].items()),
        }
    )


def _replicas(config: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{entry.get('count', 1)} × {entry['model']} on {entry.get('device', 'its own device')}"
        for entry in config.get("cluster", {}).get("replicas", ())
    )


def _summary_tables(summary: Summary) -> str:
    """Latencies, other values, traffic classes and tenants."""
    tables = [
        _table(
            ["latency (s)", "mean", "p50", "p90", "p99"],
            [
                [label, *(_estimate(summary["latencies"][key][s]) for s in _STATISTICS)]
                for key, label in LATENCIES.items()
                if summary["latencies"][key]["mean"]["mean"]
            ],
        ),
        _table(
            ["figure", "mean", "unit"],
            [
                [label, _estimate(value, scale), unit]
                for key, (label, unit, scale) in VALUES.items()
                if (value := summary["values"].get(key, _UNKNOWN))["mean"] is not None
            ],
        ),
    ]
    if summary.get("classes"):
        tables.append(_class_table(summary))
    if summary.get("tenants"):
        tables.append(_tenant_table(summary))
    return "".join(tables)


_STATISTICS = ("mean", "p50", "p90", "p99")
_UNKNOWN: Estimate = {"mean": None, "half_width": None, "seeds": 0}


def _class_table(summary: Summary) -> str:
    rows = [
        [
            class_name(name),
            *(_estimate(group["latencies"]["ttft_s"][s]) for s in ("p50", "p99")),
            _estimate(group["latencies"]["e2e_s"]["p99"]),
            _estimate(group["values"]["slo_attainment"], 100),
            _estimate(group["values"]["goodput_requests_per_s"]),
            _inline({key: limit for key, limit in group["slo"].items() if limit is not None}),
        ]
        for name, group in summary["classes"].items()
    ]
    heads = ("TTFT p50 (s)", "TTFT p99 (s)", "E2E p99 (s)", "met SLO (%)", "goodput (/s)", "SLO")
    return _table(["traffic class", *heads], rows)


def _tenant_table(summary: Summary) -> str:
    rows = [
        [
            class_name(name),
            _estimate(tenant["demand_tokens"]),
            _estimate(tenant["service_tokens"]),
            _estimate(tenant["fair_tokens"]),
            _estimate(tenant["ttft_s"]["p50"]),
            _estimate(tenant["ttft_s"]["p99"]),
        ]
        for name, tenant in summary["tenants"].items()
    ]
    heads = ["tenant", "wanted (tokens)", "served (tokens)", "fair share (tokens)"]
    return _table([*heads, "TTFT p50 (s)", "TTFT p99 (s)"], rows)


def _run_plots(run: LoadedRun) -> list[str]:
    """The run's figures; drawn now where it was run without."""
    if (run.path / "plots").is_dir():
        return _plots_in(run.path / "plots")
    with TemporaryDirectory(prefix="viisim-report-") as scratch:
        draw_all(run, Path(scratch) / "plots")
        return _plots_in(Path(scratch) / "plots")


def _plots_in(folder: Path) -> list[str]:
    return [_figure(path, RUN_CAPTIONS.get(path.stem, "")) for path in sorted(folder.glob("*.png"))]


# --------------------------------------------------------------------------------------
# Parts of a comparison's page


def _settings(folder: Path, comparison: Comparison) -> list[str]:
    """For each setting, what its first cell says of cluster, workload and objectives."""
    facts = []
    for setting in dict.fromkeys(cell["setting"] for cell in comparison["cells"]):
        cell = next(c for c in comparison["cells"] if c["setting"] == setting)
        manifest = folder / "cells" / cell["cell"] / "manifest.json"
        if not manifest.is_file():
            continue
        config = json.loads(manifest.read_text(encoding="utf-8"))["config"]
        at = "" if cell["load"] is None else f" at {100 * cell['load']:g} % of capacity"
        about = {
            "replicas": _replicas(config),
            f"workload{at}": _inline(config["workload"]),
            "SLO": _inline({key: value for key, value in config["slo"].items() if value}),
        }
        facts += [f"<h3>{escape(setting)}</h3>", _about(config["description"]), _definitions(about)]
    return facts


def _block(block: Block) -> str:
    """One table of figures, and what it shows of each variant in words."""
    rows = [
        [row_name(metric), *(_coloured(block, cell, metric) for cell in block.cells)]
        for metric in block.metrics
    ]
    words = [_verdicts(block, cell["variant"]) for cell in block.cells[1:]]
    return (
        f"<h3>{escape(block.title)}</h3>"
        + _table(["", *(heading(cell) for cell in block.cells)], rows)
        + f'<p class="about">{escape(legend(block))}</p>'
        + (f"<ul>{''.join(words)}</ul>" if words else "")
    )


class _Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def _coloured(block: Block, cell: Any, metric: Any) -> str:
    said = block.verdict(cell, metric)
    text = escape(entry(block, cell, metric))
    return _Html(f'<span class="{said}">{text}</span>' if said in ("better", "worse") else text)


def _verdicts(block: Block, variant: str) -> str:
    """A list entry: the differences that are shown, and how many are not."""
    parts = [
        f'<span class="{escape(said)}">{escape(said)}</span>: {escape(about)}'
        for said, about in verdict_words(block, variant)
    ]
    star = " (saturated)" if block.is_saturated(variant) else ""
    return f"<li><b>{escape(variant)}</b>{star} {'; '.join(parts)}.</li>" if parts else ""


def _captions(folder: Path) -> dict[str, str]:
    """The captions of the figures that are there, from captions.md."""
    path = folder / "captions.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"^## (.+?)\n\n(.+?)\n(?=\n##|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: caption for name, caption in found if (folder / f"plots/{name}.png").is_file()}


def _repeat(folder: Path, comparison: Comparison) -> list[str]:
    cells = [cell["cell"] for cell in comparison["cells"]]
    return [
        _paragraph(
            "Every cell is a run directory, which holds the whole experiment and can be run again "
            "by itself, to the byte:"
        ),
        _code("\n".join(f"viisim verify {folder.name}/cells/{name}" for name in cells)),
        _definitions(comparison["versions"] | _commit(comparison["code"])),
    ]


# --------------------------------------------------------------------------------------
# HTML


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{''.join(parts)}\n"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>\n' if text else ""


def _warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>\n'


def _code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = (cell if isinstance(cell, _Html) else escape(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table>\n<thead>{row(heads, "th")}</thead>\n'
        f"<tbody>{body}</tbody>\n</table></div>\n"
    )


def _definitions(facts: Mapping[str, Any]) -> str:
    """Facts as a table of two columns, without those that are empty."""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td style="text-align: left; white-space: normal">'
        f"{escape(str(value))}</td></tr>\n"
        for key, value in facts.items()
        if value not in ("", None)
    )
    return f'<div class="scroll"><table>{rows}</table></div>\n'


def _details(title: str, content: Any) -> str:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return f"<details><summary>{escape(title)}</summary>{_code(text)}</details>\n"


def _glossary(definitions: Mapping[str, str]) -> str:
    return (
        f"<details><summary>What each figure means</summary>{_definitions(definitions)}</details>\n"
    )


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _estimate(value: Estimate, scale: float = 1) -> str:
    mean, half = value["mean"], value["half_width"]
    return number(mean, scale) + (f" ± {number(half, scale, 2)}" if half else "")


def _inline(content: Mapping[str, Any]) -> str:
    """A mapping in one line, as YAML would have it."""
    text: str = yaml.safe_dump(
        dict(content), default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return text.strip().removeprefix("{").removesuffix("}")


def _commit(code: Mapping[str, Any] | None) -> dict[str, str]:
    if code is None:
        return {}
    return {"commit": code["commit"] + (" with uncommitted changes" if code["dirty"] else "")}
