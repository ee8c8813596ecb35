"""Comparisons carried out: what is missing is run, then everything is written.

A comparison directory:

    comparison.json     all figures and differences, with their definitions
    tables/             the same as CSV, Markdown and LaTeX
    plots/              figures as PNG and PDF
    captions.md         what each figure shows: seeds, sizes, warm-up, versions
    cells/              one run directory for each variant, setting and load

No file holds a path of the machine or a time of day: equal inputs, equal bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from viisim.capacity import at_loads, capacity_cell, capacity_per_s
from viisim.cells import Cell, Progress, Setting, cells_of, run_cells
from viisim.comparison import CellRun, Comparison, compare_runs
from viisim.comparison_plots import draw_comparison
from viisim.comparison_tables import write_tables
from viisim.errors import InputError


@dataclass(frozen=True, slots=True)
class Compared:
    """A finished comparison, and the run directories it was made from."""

    comparison: Comparison
    runs: list[CellRun]
    reused: int
    """Cells that were there already."""


def compare(
    folder: Path,
    settings: Sequence[Setting],
    loads: Sequence[float] = (),
    *,
    jobs: int = 1,
    fresh: bool = False,
    on_progress: Progress | None = None,
) -> Compared:
    """Run every cell that is not there yet, and write the comparison directory.

    Raises InputError for a folder that holds something else, PolicyError for a policy's fault.
    """
    make_folder(folder)
    options: dict[str, Any] = {"jobs": jobs, "fresh": fresh, "on_progress": on_progress}
    capacities: dict[str, float] = {}
    if loads:
        measuring = [capacity_cell(setting) for setting in settings]
        runs, _ = run_cells(folder / "cells", measuring, **options)
        capacities = {
            cell.setting: capacity_per_s(run) for cell, run in zip(measuring, runs, strict=True)
        }
    cells = [
        cell
        for setting in settings
        for cell in cells_of(
            setting, at_loads(setting, loads, capacities[setting.name]) if loads else {}
        )
    ]
    _require_own_folders(cells)
    runs, reused = run_cells(folder / "cells", cells, **options)
    pairs = list(zip(cells, runs, strict=True))
    comparison = compare_runs(pairs, capacities)
    # Only now, so that what was there before stays until it can be replaced.
    for part in ("tables", "plots"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir()
    write_json(folder / "comparison.json", comparison)
    write_tables(comparison, folder / "tables")
    draw_comparison(comparison, pairs, folder)
    return Compared(comparison, pairs, reused)


def make_folder(folder: Path) -> None:
    """A comparison directory to write or take up. Raises InputError if it is something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is there already, not a folder; give another with --out")
    own = (folder / "cells").is_dir() or (folder / "comparison.json").is_file()
    if folder.is_dir() and any(folder.iterdir()) and not own:
        raise InputError(
            f"{folder}: not empty, and no comparison; remove it or give another with --out"
        )
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); give another folder with --out"
        ) from error


def _require_own_folders(cells: Sequence[Cell]) -> None:
    names = sorted(cell.name for cell in cells)
    twice = next((name for name, same in groupby(names) if len(list(same)) > 1), None)
    if twice is not None:
        raise InputError(f"--policies: two of them would be stored as {twice!r}; rename one")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Keys sorted, floats by repr; a NaN is a mistake and raises."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
