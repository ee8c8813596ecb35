"""Comparisons of queues that are simple enough to know, without a simulation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from tests.result_builders import Objectives, queue
from tests.small_experiment import SMALL
from viisim.cells import Cell
from viisim.comparison import CellRun
from viisim.config import experiment_from
from viisim.metrics import Slo, summarise
from viisim.records import SeedResult
from viisim.results import load_run, make_manifest, write_run

SEEDS = (1, 2, 3, 4, 5)


def cell(variant: str, load: float | None = None, setting: str = "mm1") -> Cell:
    """A cell by what it is called; its experiment is never run."""
    experiment = experiment_from(yaml.safe_load(SMALL), "small")
    return Cell(f"{setting}.{variant}.{load}", setting, load, variant, experiment)


def cell_run(
    folder: Path, of: Cell, results: Sequence[SeedResult], slo: Slo | None = None
) -> CellRun:
    """The cell with a run directory of these results."""
    config = {
        "name": of.name,
        "description": "queues",
        "cluster": {"replicas": [{"count": 1, "model": "m", "device": "d"}]},
        "workload": {"kind": "none"},
        "slo": {"ttft_s": 1.0},
        "predictor": {"kind": "none"},
    }
    manifest = make_manifest(config, [result.seed for result in results], {})
    summary = summarise(results, slo or Objectives(ttft_s=1.0), 0.1, {"kind": "none"})
    return of, load_run(write_run(folder / "cells" / of.name, manifest, results, summary, False))


def in_classes(result: SeedResult, tenants: bool = True) -> SeedResult:
    """The result with every third request of class `batch`, and half of the rest of `b`."""
    number = np.arange(result.requests["request"].size)
    result.requests["traffic_class"] = (number % 3 == 0).astype(np.int32)
    result.traffic_classes = ("interactive", "batch")
    if tenants:
        result.requests["tenant"] = (number % 2).astype(np.int32)
        result.tenants = ("a", "b")
    return result


def compared(folder: Path, load: float | None = None, tenants: bool = True) -> list[CellRun]:
    """Three variants: a baseline, the very same again, and one that serves four times as fast."""
    speeds = {"base": 1, "same": 1, "fast": 4}
    at = 0.8 if load is None else load
    return [
        cell_run(
            folder,
            cell(variant, load),
            [in_classes(queue(at / speed, 400, seed), tenants) for seed in SEEDS],
        )
        for variant, speed in speeds.items()
    ]
