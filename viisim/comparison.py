"""Policies compared: every figure with its interval, and every difference with what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from viisim.cells import Cell
from viisim.definitions import DEFINITIONS
from viisim.errors import InputError
from viisim.metrics import GroupMetrics, SeedMetrics
from viisim.results import LoadedRun
from viisim.statistics import (
    SIGNIFICANCE,
    Difference,
    Direction,
    Estimate,
    estimate,
    holm,
    paired_difference,
    verdict,
)

FORMAT = 1
"""Version of comparison.json; it changes when a reader would have to."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that policies are compared by."""

    key: str
    """As in a summary: a value's name, or a latency's with the statistic, `ttft_s.p99`."""
    label: str
    unit: str
    better: Direction
    scale: float = 1
    """What a figure is multiplied by to be in `unit`."""
    by_class: bool = False
    """Whether it is also compared within each traffic class."""

    def of(self, group: GroupMetrics) -> float | None:
        """The figure of one seed, or of a traffic class in it."""
        kind, _, statistic = self.key.partition(".")
        if not statistic:
            return group["values"].get(kind)
        value: float | None = group["latencies"][kind][statistic]  # type: ignore[literal-required]
        return value


def _latency(key: str, label: str, unit: str = "s", scale: float = 1) -> Iterator[Metric]:
    for statistic in ("mean", "p50", "p99"):
        yield Metric(f"{key}.{statistic}", f"{label} {statistic}", unit, "lower", scale, True)


METRICS = (
    *_latency("ttft_s", "TTFT"),
    *_latency("tpot_s", "TPOT", "ms", 1000),
    *_latency("e2e_s", "E2E"),
    Metric("throughput_requests_per_s", "throughput", "requests/s", "higher", by_class=True),
    Metric("throughput_output_tokens_per_s", "output", "tokens/s", "higher"),
    Metric("goodput_requests_per_s", "goodput", "requests/s", "higher", by_class=True),
    Metric("slo_attainment", "met every SLO", "%", "higher", 100, by_class=True),
    Metric("jain_tenants", "fairness (Jain)", "", "higher"),
    Metric("service_min_over_max", "least/most served", "", "higher"),
    Metric("service_gap_tokens", "service gap", "tokens", "lower"),
    Metric("preemptions", "preemptions", "per run", "lower"),
    Metric("prefix_hit_rate", "prefix hits", "% of tokens", "higher", 100),
    Metric("kv_use_mean", "KV blocks in use", "%", "neither", 100),
)
"""In the order of the tables."""

METRIC = {metric.key: metric for metric in METRICS}


class ComparedCell(TypedDict):
    """One variant in one setting, at one load: means over seeds."""

    cell: str
    setting: str
    load: float | None
    variant: str
    predictor: dict[str, Any] | None
    offered_requests_per_s: float | None
    requests: int
    """Over all seeds."""
    outcomes: dict[str, int]
    saturated_seeds: list[int]
    values: dict[str, Estimate]
    classes: dict[str, dict[str, Estimate]]


class ComparedDifference(Difference):
    """One figure of one variant less the first variant's, seed by seed."""

    setting: str
    load: float | None
    variant: str
    traffic_class: str | None
    """None: all requests."""
    metric: str
    holm_p_value: float | None
    """Adjusted for the number of variants compared in this figure."""
    verdict: str
    saturated: bool
    """Whether either of the two was saturated in some seed: no steady state is compared."""


class Comparison(TypedDict):
    """The content of `comparison.json`."""

    format: int
    name: str
    baseline: str
    variants: list[str]
    seeds: list[int]
    loads: list[float]
    warmup_fraction: float
    capacity_requests_per_s: dict[str, float]
    """Of each setting, where loads were asked for."""
    significance: float
    definitions: dict[str, str]
    code: dict[str, Any] | None
    versions: dict[str, str]
    cells: list[ComparedCell]
    differences: list[ComparedDifference]


CellRun: TypeAlias = tuple[Cell, LoadedRun]


def load_comparison(folder: Path) -> Comparison:
    """The content of a comparison directory. Raises InputError if it is none."""
    path = folder / "comparison.json"
    try:
        content: Comparison = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give a folder that `viisim compare` wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); compare again") from error
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {content.get('format')!r}, this viisim reads {FORMAT}; compare again"
        )
    return content


# --------------------------------------------------------------------------------------
# Figures and differences


def compare_runs(
    pairs: Sequence[CellRun], capacities: Mapping[str, float] | None = None
) -> Comparison:
    """All figures and differences. The first variant is what the others are compared with."""
    variants = list(dict.fromkeys(cell.variant for cell, _ in pairs))
    manifest = pairs[0][1].manifest
    return {
        "format": FORMAT,
        "name": " and ".join(dict.fromkeys(cell.setting for cell, _ in pairs)),
        "baseline": variants[0],
        "variants": variants,
        "seeds": pairs[0][1].seeds,
        "loads": list(dict.fromkeys(c.load for c, _ in pairs if c.load is not None)),
        "warmup_fraction": pairs[0][1].summary["warmup_fraction"],
        "capacity_requests_per_s": dict(capacities or {}),
        "significance": SIGNIFICANCE,
        "definitions": DEFINITIONS,
        "code": manifest["code"],
        "versions": manifest["versions"],
        "cells": [_compared_cell(*pair) for pair in pairs],
        "differences": [
            difference
            for _, group in groupby(pairs, key=lambda pair: (pair[0].setting, pair[0].load))
            for difference in _differences(list(group))
        ],
    }


def _compared_cell(cell: Cell, run: LoadedRun) -> ComparedCell:
    summary = run.summary
    seeds = summary["seeds"]
    return {
        "cell": cell.name,
        "setting": cell.setting,
        "load": cell.load,
        "variant": cell.variant,
        "predictor": summary["predictor"],
        "offered_requests_per_s": _offered(run),
        "requests": sum(seed["requests"] for seed in seeds),
        "outcomes": summary["outcomes"],
        "saturated_seeds": summary["saturated_seeds"],
        "values": {metric.key: estimate([metric.of(seed) for seed in seeds]) for metric in METRICS},
        "classes": {
            name: {
                metric.key: estimate([_figure(metric, seed, name) for seed in seeds])
                for metric in METRICS
                if metric.by_class
            }
            for name in summary["classes"]
        },
    }


def _offered(run: LoadedRun) -> float | None:
    """Requests per second that arrived, mean over seeds."""
    rates: list[float] = []
    for seed in run.seeds:
        arrived_ns = run.requests(seed, ["arrived_ns"])["arrived_ns"].to_numpy()
        if arrived_ns.size and arrived_ns[-1] > 0:
            rates.append(arrived_ns.size / float(arrived_ns[-1]) * 1e9)
    return sum(rates) / len(rates) if rates else None


def _figure(metric: Metric, seed: SeedMetrics, traffic_class: str | None) -> float | None:
    if traffic_class is None:
        return metric.of(seed)
    group = seed["classes"].get(traffic_class)
    return None if group is None else metric.of(group)


def _differences(pairs: Sequence[CellRun]) -> Iterator[ComparedDifference]:
    """Of the variants of one setting at one load, metric by metric."""
    classes: dict[str | None, None] = dict.fromkeys([None])
    classes |= dict.fromkeys(name for _, run in pairs for name in run.summary["classes"])
    for traffic_class in classes:
        for metric in METRICS:
            if traffic_class is None or metric.by_class:
                yield from _family(pairs, metric, traffic_class)


def _family(
    pairs: Sequence[CellRun], metric: Metric, traffic_class: str | None
) -> Iterator[ComparedDifference]:
    """One figure of all variants but the first; none where it is not defined."""
    figures = [
        [_figure(metric, seed, traffic_class) for seed in run.summary["seeds"]] for _, run in pairs
    ]
    differences = [paired_difference(each, figures[0]) for each in figures[1:]]
    adjusted = holm([difference["p_value"] for difference in differences])
    baseline = pairs[0][1].summary
    for (cell, run), difference, p in zip(pairs[1:], differences, adjusted, strict=True):
        if difference["mean"] is None:
            continue
        yield {
            **difference,
            "setting": cell.setting,
            "load": cell.load,
            "variant": cell.variant,
            "traffic_class": traffic_class,
            "metric": metric.key,
            "holm_p_value": p,
            "verdict": verdict(difference, p, metric.better),
            "saturated": bool(run.summary["saturated_seeds"] or baseline["saturated_seeds"]),
        }
