"""Results for people: what a summary says, in 80 columns; numbers, and tables of pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from viisim.metrics import Summary
from viisim.statistics import Estimate

LATENCIES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "itl_s": "gap between tokens",
    "e2e_s": "end to end",
    "hold_s": "held centrally",
    "queue_s": "queued in the engine",
}
"""Latencies of a summary in the order of the table, and what the table calls them."""

VALUES: dict[str, tuple[str, str, float]] = {
    "throughput_requests_per_s": ("throughput", "requests/s", 1),
    "throughput_output_tokens_per_s": ("output", "tokens/s", 1),
    "throughput_total_tokens_per_s": ("prompt and output", "tokens/s", 1),
    "goodput_requests_per_s": ("goodput under the SLO", "requests/s", 1),
    "slo_attainment": ("met every SLO", "% of requests", 100),
    "prefix_hit_rate": ("prefix hits", "% of tokens", 100),
    "kv_use_mean": ("KV blocks in use, mean", "%", 100),
    "kv_use_max": ("KV blocks in use, most", "%", 100),
    "busy_share": ("replicas computing", "% of time", 100),
    "energy_j_per_million_tokens": ("energy of the cards", "kWh/M tokens", 1 / 3.6e6),
    "preemptions": ("preemptions", "per run", 1),
    "faults": ("faults", "per run", 1),
    "lost_requests": ("requests lost to faults", "per run", 1),
    "retried_attempts": ("attempts repeated", "per run", 1),
    "duplicated_requests": ("requests answered twice", "per run", 1),
    "jain_tenants": ("fairness between tenants", "Jain's index", 1),
    "service_min_over_max": ("least / most served tenant", "of fair share", 1),
}
"""Other figures of a summary: label, unit, and what one is multiplied by to be in that unit."""


def summary_report(summary: Summary, name: str = "") -> Group:
    """The tables and, under them, what a reader must know before believing them."""
    by_class = [class_table(summary)] if len(summary["classes"]) > 1 else []
    return Group(summary_table(summary, name), *by_class, *notes(summary))


def summary_table(summary: Summary, name: str = "") -> Table:
    """Mean over seeds and half width of its 95 % interval, and percentiles of latencies.

    A latency that nobody had, or that was always 0, has no row.
    """
    seeds = len(summary["seeds"])
    title = f"{name}: {seeds} seed{'s' if seeds > 1 else ''}" if name else None
    table = _table(title)
    for heading in ("mean ± 95 %" if seeds > 1 else "mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for key, label in LATENCIES.items():
        of_kind = summary["latencies"][key]
        if of_kind["mean"]["mean"]:
            scale, unit = _readable(of_kind)
            percentiles = (number(of_kind[p]["mean"], scale) for p in ("p50", "p90", "p99"))
            table.add_row(label, _with_interval(of_kind["mean"], scale), *percentiles, unit)
    table.add_section()
    for key, (label, unit, scale) in VALUES.items():
        value = summary["values"].get(key)
        if value is not None and value["mean"] is not None:
            table.add_row(label, _with_interval(value, scale), "", "", "", unit)
    return table


def class_table(summary: Summary) -> Table:
    """A row a traffic class: mean latencies over seeds, and what met the SLO."""
    table = _table(None)
    for heading in ("TTFT p50 (s)", "TTFT p99 (s)", "E2E p99 (s)", "met SLO (%)", "goodput (/s)"):
        table.add_column(heading, justify="right")
    for name, group in summary["classes"].items():
        latencies, values = group["latencies"], group["values"]
        table.add_row(
            class_name(name),
            number(latencies["ttft_s"]["p50"]["mean"]),
            number(latencies["ttft_s"]["p99"]["mean"]),
            number(latencies["e2e_s"]["p99"]["mean"]),
            number(values["slo_attainment"]["mean"], 100),
            number(values["goodput_requests_per_s"]["mean"]),
        )
    return table


def class_name(name: str) -> str:
    """A traffic class or tenant, as tables and figures call it."""
    return name or "(none)"


def predictor_words(predictor: Mapping[str, Any] | None) -> str:
    """How answer lengths were predicted, in words."""
    if predictor is None:
        return "not stated"
    kind, correlation = str(predictor["kind"]), predictor.get("rank_correlation")
    return kind if correlation is None else f"{kind} (rank correlation {correlation:g})"


def _table(title: str | None) -> Table:
    """A table in the style of all, with a column for what its rows are."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    return table


def notes(summary: Summary) -> Iterator[Text]:
    """Lines about saturation, requests without an answer, extrapolation, and the warm-up."""
    if summary.get("uncalibrated"):
        yield Text(
            f"UNCALIBRATED: nobody measured {', '.join(summary['uncalibrated'])}; step times are "
            "a roofline's and may be wrong by a factor",
            style="bold yellow",
        )
    saturated, seeds = summary["saturated_seeds"], len(summary["seeds"])
    if saturated:
        yield Text(
            f"SATURATED in {len(saturated)} of {seeds} seeds: the queue was still growing, so "
            "latencies say how long the run was, not how good the policy is. Lower the rate.",
            style="bold red",
        )
    total = sum(summary["outcomes"].values())
    for outcome in ("shed", "refused", "unfinished"):
        count = summary["outcomes"][outcome]
        if count:
            why = " (prompt too long for the model)" if outcome == "refused" else ""
            yield Text(f"{count:,} of {total:,} requests {outcome}{why}", style="yellow")
    unsent = sum(seed["values"]["unsent_requests"] or 0 for seed in summary["seeds"])
    if unsent:
        yield Text(
            f"{unsent:,.0f} turns of sessions never sent: an earlier one failed, or the run ended",
            style="yellow",
        )
    steps = sum(seed["values"]["engine_steps"] or 0 for seed in summary["seeds"])
    outside = sum(seed["values"]["extrapolated_steps"] or 0 for seed in summary["seeds"])
    if outside:
        yield Text(
            f"{outside:,.0f} of {steps:,.0f} engine steps ({_percent(outside / steps)}) lay "
            "outside the profile's calibrated range",
            style="yellow",
        )
    yield Text(_measured(summary), style="dim")


def number(value: float | None, scale: float = 1, digits: int = 3) -> str:
    """So many significant digits, or all digits of 100 and more; a dash for None."""
    if value is None:
        return "–"
    value *= scale
    return (
        f"{value:,.0f}" if abs(value) >= 99.95 or value == 0 else f"{value:#.{digits}g}".rstrip(".")
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _with_interval(value: Estimate, scale: float) -> str:
    mean = number(value["mean"], scale)
    return (
        mean if value["half_width"] is None else f"{mean} ± {number(value['half_width'], scale, 2)}"
    )


def _readable(of_kind: dict[str, Estimate]) -> tuple[float, str]:
    """Milliseconds for what mostly takes less than a second."""
    p90_s = of_kind["p90"]["mean"] or 0.0
    return (1, "s") if p90_s >= 1 else (1000, "ms")


def _measured(summary: Summary) -> str:
    measured = sum(seed["measured_requests"] for seed in summary["seeds"])
    slo = [(key, summary["slo"][key]) for key in ("ttft_s", "tpot_s", "e2e_s")]
    limits = [f"{key[:-2].upper()} {limit_s:g} s" for key, limit_s in slo if limit_s is not None]
    own = any(group["slo"] != summary["slo"] for group in summary["classes"].values())
    more = "; some classes have their own" if own else ""
    return (
        f"{measured:,} requests measured, after a warm-up of "
        f"{_percent(summary['warmup_fraction'])} of each seed. "
        f"SLO: {', '.join(limits) or 'none'}{more}."
        f"{_predicted(summary['predictor'])}"
    )


def _predicted(predictor: Mapping[str, Any] | None) -> str:
    if predictor is None or predictor["kind"] == "none":
        return ""
    return f" Lengths predicted: {predictor_words(predictor)}."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
