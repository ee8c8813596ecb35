"""The cells of a comparison: which experiments it is made of, and running them.

A *setting* is a cluster with a workload; in each, the same *variants* are compared: policies, or
experiment files as they stand. With loads, every setting is run at several fractions of its
capacity. A cell is one variant in one setting at one load. It is an ordinary run directory, so
that `viisim verify` and `viisim report` work on it, and a comparison can be taken up again: a
cell whose directory is there, with the very manifest that it would get now, is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from viisim.config import Experiment, load_experiment, resolved
from viisim.documents import parse_yaml
from viisim.errors import InputError
from viisim.experiment import Run, input_hashes, run_seed, summary_of
from viisim.records import SeedResult
from viisim.results import LoadedRun, load_run, make_manifest

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many simulations (a seed of a cell each) are done, of how many."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster and a workload, with one experiment for each variant compared in it."""

    name: str
    variants: Mapping[str, Experiment]

    @property
    def first(self) -> Experiment:
        """The experiment of the variant that the others are compared with."""
        return next(iter(self.variants.values()))


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant in one setting, at one load."""

    name: str
    """Of the run directory, and of the experiment in it."""
    setting: str
    load: float | None
    """Offered requests/s as a fraction of capacity; None: what the experiment says."""
    variant: str
    experiment: Experiment


# --------------------------------------------------------------------------------------
# What is compared


def settings_of(
    files: Sequence[Path], policies: Sequence[str], overrides: Sequence[str]
) -> list[Setting]:
    """The settings of a comparison: each file with every policy, or all files side by side.

    Raises InputError for a mistake in a file, a policy or an override, and where the
    experiments cannot be paired.
    """
    if not policies:
        experiments = [load_experiment(file, overrides) for file in files]
        _require_distinct(experiments)
        name = experiments[0].name if len(experiments) == 1 else "experiments"
        variants = {experiment.name: experiment for experiment in experiments}
        if len(experiments) == 1:
            variants = {policy_label(experiments[0].policy.spec): experiments[0]}
        return [_paired(Setting(name, variants))]
    labels = _numbered([policy_label(policy_spec(text)) for text in policies])
    settings = []
    for file in files:
        variants = {
            label: load_experiment(file, [*overrides, f"policy={json.dumps(policy_spec(text))}"])
            for label, text in zip(labels, policies, strict=True)
        }
        settings.append(Setting(next(iter(variants.values())).name, variants))
    _require_distinct([setting.first for setting in settings])
    return settings


def policy_spec(text: str) -> dict[str, Any]:
    """A policy as the command line names it: `name`, `module:Class` or `file.py:Class`, then
    `/parameter=value` as often as needed. A file is looked up from the current folder.

    Raises InputError for a value that is no YAML.
    """
    parts = text.strip().split("/")
    given: list[str] = []
    while len(parts) > 1 and "=" in parts[-1]:
        given.insert(0, parts.pop())
    what = "/".join(parts)
    spec: dict[str, Any] = {"class" if ":" in what else "name": what}
    file, colon, kind = what.rpartition(":")
    if colon and file.endswith(".py"):
        spec = {"class": f"{Path(file).resolve()}:{kind}"}
    for assignment in given:
        key, _, value = assignment.partition("=")
        spec[key] = parse_yaml(value, f"--policies {text}")
    return spec


def policy_label(spec: Mapping[str, Any]) -> str:
    """What tables call a policy: its name or its class, and the parameters given."""
    given = dict(spec)
    name = str(given.pop("class", None) or given.pop("name")).rpartition(":")[2]
    return " ".join([name, *(f"{key}={value}" for key, value in given.items())])


def cells_of(setting: Setting, loads: Mapping[float, Mapping[str, Experiment]]) -> list[Cell]:
    """The setting's cells: at each load its experiments, by variant, or as they are without."""
    if not loads:
        return [_cell(setting.name, None, *each) for each in setting.variants.items()]
    return [
        _cell(setting.name, load, *each)
        for load, variants in loads.items()
        for each in variants.items()
    ]


def _cell(setting: str, load: float | None, variant: str, experiment: Experiment) -> Cell:
    at = "" if load is None else f".load-{load:g}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{setting}.{variant}{at}")
    return Cell(name, setting, load, variant, experiment.model_copy(update={"name": name}))


def _numbered(labels: Sequence[str]) -> list[str]:
    """The labels, with a number behind one that has come before."""
    met: Counter[str] = Counter()
    numbered = []
    for label in labels:
        met[label] += 1
        numbered.append(label if met[label] == 1 else f"{label} #{met[label]}")
    return numbered


def _require_distinct(experiments: Sequence[Experiment]) -> None:
    names = Counter(experiment.name for experiment in experiments)
    twice = next((name for name, times in names.items() if times > 1), None)
    if twice is not None:
        raise InputError(f"two of the files are named {twice!r}; give them different names")


def _paired(setting: Setting) -> Setting:
    for name, experiment in setting.variants.items():
        if experiment.seeds != setting.first.seeds:
            raise InputError(
                f"{name} has other seeds than {setting.first.name}; give --seeds, so that they "
                "can be compared seed by seed"
            )
    return setting


# --------------------------------------------------------------------------------------
# Running


def run_cells(
    folder: Path,
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    fresh: bool = False,
    on_progress: Progress | None = None,
) -> tuple[list[LoadedRun], int]:
    """The run directory of each cell, in `folder`, and how many of them were there already.

    Simulates in up to `jobs` processes, a seed of a cell in each; neither their number nor the
    order in which they end changes a byte. Raises what `viisim.experiment.run_seed` raises; the
    cells that are complete by then stay.
    """
    missing = [cell for cell in cells if fresh or not _is_complete(folder / cell.name, cell)]
    tasks = [(cell, seed) for cell in missing for seed in cell.experiment.seeds]
    results: dict[str, dict[int, SeedResult]] = {cell.name: {} for cell in missing}
    with _simulated(tasks, min(jobs, len(tasks))) as done:
        for number, (cell, result) in enumerate(done, 1):
            seeds = results[cell.name]
            seeds[result.seed] = result
            if len(seeds) == len(cell.experiment.seeds):
                _save(folder / cell.name, cell.experiment, results.pop(cell.name))
            if on_progress is not None:
                on_progress(number, len(tasks))
    runs = [load_run(folder / cell.name) for cell in cells]
    return runs, len(cells) - len(missing)


def _is_complete(path: Path, cell: Cell) -> bool:
    """Whether the cell was run before, with the same configuration, inputs, code and versions."""
    if not (path / "manifest.json").is_file():
        return False
    experiment = cell.experiment
    manifest = make_manifest(resolved(experiment), experiment.seeds, input_hashes(experiment))
    try:
        return bool(load_run(path).manifest == json.loads(json.dumps(manifest)))
    except InputError:
        return False


def _save(path: Path, experiment: Experiment, seeds: Mapping[int, SeedResult]) -> None:
    results = [seeds[seed] for seed in experiment.seeds]
    summary = summary_of(experiment, results)
    if path.exists():
        shutil.rmtree(path)  # a cell of another configuration, or one to be run afresh
    Run(experiment, tuple(results), summary).save(path, plots=False)


_Task: TypeAlias = tuple[Cell, int]


@contextmanager
def _simulated(tasks: Sequence[_Task], jobs: int) -> Iterator[Iterator[tuple[Cell, SeedResult]]]:
    """The results of all tasks as they come. Leaving the block early ends the processes."""
    if jobs <= 1:
        yield ((cell, run_seed(cell.experiment, seed)) for cell, seed in tasks)
        return
    # Ctrl-C reaches the whole process group; the parent takes it and ends the workers.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    deaf = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(jobs, context, signal.signal, deaf)
    try:
        futures = {pool.submit(run_seed, c.experiment, seed): c for c, seed in tasks}
        yield ((futures[future], future.result()) for future in as_completed(futures))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()
