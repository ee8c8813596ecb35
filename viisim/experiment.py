"""Experiments carried out: every seed simulated, all of them summed up.

What an experiment is, `viisim.config` says; how one is simulated, `viisim.simulation`. Here the
two meet. A seed's result depends on the experiment and the seed alone: neither on the other
seeds nor on the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from policies.interface import Policy, PolicyError
from policies.journal import Segment
from viisim.config import (
    Experiment,
    SimulatedReplica,
    experiment_from,
    load_experiment,
    resolved,
    workload_files,
)
from viisim.engine.step_time import StepTime
from viisim.fault_player import FaultPlan
from viisim.hardware import device_names, load_device
from viisim.journal import JournalWriter
from viisim.launch import Launcher
from viisim.metrics import Summary, summarise
from viisim.power import PowerDraw, group_draw, power_draw, replica_power_w, work_j
from viisim.profile import profile_hash
from viisim.records import SeedResult
from viisim.results import RunFolder, file_hash, make_manifest, write_run
from viisim.roofline import is_uncalibrated
from viisim.simulation import ReplicaSpec, Simulation
from viisim.step_costs import api_server_of, step_costs_of, step_time_of

SeedProgress: TypeAlias = Callable[[int, int], None]
"""Told how many requests of a seed have arrived, of how many."""
Progress: TypeAlias = Callable[[int, int, int], None]
"""The same with the seed in front."""

JOURNALS = "journals"
"""The folder of a run directory with a journal a seed, where they were asked for."""

_GLANCE_S = 0.1
"""How often the progress of other processes is looked at."""

# --------------------------------------------------------------------------------------
# One seed


def run_seed(
    experiment: Experiment,
    seed: int,
    journal: Path | None = None,
    on_progress: SeedProgress | None = None,
) -> SeedResult:
    """Simulate one seed; with `journal`, write what the scheduler was told and decided there.

    Raises InputError for a trace that cannot be read or a journal that cannot be written,
    PolicyError (one line with the policy, the place and the answer) for the policy's own fault.
    """
    workload = experiment.build_workload()
    total = workload.total_requests
    report = None if on_progress is None else lambda arrived: on_progress(arrived, total)
    policy = experiment.policy.make()
    limits = experiment.limits.limits()
    head = Segment(resolved(experiment)["policy"], seed, limits)
    launcher = Launcher(experiment.cluster, simulated_devices(experiment), _spec)
    journaling = nullcontext() if journal is None else JournalWriter(journal, head)
    with _blaming(policy), journaling as writer:
        result = Simulation(
            replica_specs(experiment),
            policy,
            workload.requests(seed),
            seed=seed,
            scrape_s=experiment.cluster.scrape_s,
            scrape_delay_s=experiment.cluster.scrape_delay_s,
            limits=limits,
            until_s=experiment.max_sim_s,
            journal=writer,
            predictor=experiment.make_predictor(seed),
            on_progress=report,
            launcher=launcher,
            faults=_fault_plan(experiment, seed),
        ).run()
    _add_power(result, launcher, experiment.simulated_replicas())
    result.unsent_requests = total - len(result.requests["request"])
    if report is not None:
        report(total)
    return result


def _fault_plan(experiment: Experiment, seed: int) -> FaultPlan | None:
    if not experiment.faults:
        return None
    step_times = {
        replica.id: partial(_step_time, replica) for replica in experiment.simulated_replicas()
    }
    return FaultPlan(experiment.fault_schedule(seed), step_times)


def replica_specs(experiment: Experiment) -> list[ReplicaSpec]:
    """The experiment's replicas, each on devices of its own."""
    names = iter(simulated_devices(experiment))
    return [
        _spec(replica, tuple(islice(names, replica.devices)))
        for replica in experiment.simulated_replicas()
    ]


def simulated_devices(experiment: Experiment) -> dict[str, str]:
    """What each device of the cluster is, by its name: the replicas' first, then spare ones."""
    kinds = [
        replica.device
        for replica in experiment.simulated_replicas()
        for _ in range(replica.devices)
    ]
    spare = experiment.cluster.spare
    if spare is not None:
        kinds += [spare.device] * spare.count
    return {f"gpu{number}": kind for number, kind in enumerate(kinds)}


def _spec(replica: SimulatedReplica, devices: tuple[str, ...]) -> ReplicaSpec:
    settings = replica.settings
    return ReplicaSpec(
        replica.id,
        replica.model,
        devices,
        settings.scheduler_settings(),
        _step_time(replica),
        settings.coalesce,
        step_costs_of(replica.profile, settings.max_num_batched_tokens),
        api_server_of(replica.profile),
    )


def _step_time(replica: SimulatedReplica, factor: float = 1.0) -> StepTime:
    """Its step times, each so many times as long as usual."""
    return step_time_of(replica.profile, replica.settings.max_num_seqs, replica.slowdown * factor)


def _add_power(
    result: SeedResult, launcher: Launcher, replicas: Sequence[SimulatedReplica]
) -> None:
    """Fill in the watts of every sample, and the joules of the run."""
    known = {replica.id: replica for replica in replicas} | launcher.made
    draws = [_draw(known[name]) for name in result.replica_ids]
    result.samples["power_w"] = replica_power_w(result.samples, draws)
    kinds = launcher.devices.values()
    if set(kinds) <= set(device_names()) and None not in draws:
        idle_w = sum(power_draw(load_device(kind)).idle_w for kind in kinds)
        result.energy_j = idle_w * result.ended_ns / 1e9 + sum(
            work_j(draw, totals.busy_ns / 1e9, totals.prefill_ns / 1e9)
            for draw, totals in zip(draws, result.replicas, strict=True)
            if draw is not None
        )


def _draw(replica: SimulatedReplica) -> PowerDraw | None:
    """The draw of its devices, under the cap of its profile; None for an unknown device."""
    if replica.device not in device_names():
        return None
    device, cap_w = load_device(replica.device), replica.profile.power_cap_w
    return group_draw(device, replica.tensor_parallel, replica.stages, cap_w)


# --------------------------------------------------------------------------------------
# Whose fault

_CORE = ("policies", "core.py")
"""Where a policy is asked, and its answers are used. By name, since compiled functions have no
code object; their frames in a traceback still name file and function."""


@contextmanager
def _blaming(policy: Policy) -> Iterator[None]:
    """Turns the policy's faults in the block into PolicyError, one line each; ours pass."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not _is_fault_of(policy, error):
            raise
        raise PolicyError(_fault(policy, error)) from error


def _is_fault_of(policy: Policy, error: BaseException) -> bool:
    """Whether the policy's author must repair it: an answer that the core refuses or cannot
    compare (a lane that is no key, ranks of several types), or an exception in the policy's
    own code."""
    if isinstance(error, PolicyError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    asked = any(Path(frame.filename).parts[-2:] == _CORE for frame in frames)
    unusable = isinstance(error, TypeError) and asked
    return asked and (unusable or _own_frame(policy, error) is not None)


def _own_frame(policy: Policy, error: BaseException) -> traceback.FrameSummary | None:
    """The innermost call inside a file that defines the policy, or a class it derives from."""
    classes = type(policy).__mro__
    own = {_file_of(kind) for kind in classes[: classes.index(Policy)]}
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if frame.filename in own), None)


def _fault(policy: Policy, error: BaseException) -> str:
    """One line: which policy, where, what it did, and how to find more of the kind."""
    kind = type(policy)
    text = " ".join(str(error).split())
    if not isinstance(error, PolicyError):
        text = f"{type(error).__name__}: {text}"
    frame = _own_frame(policy, error)
    where = f", line {frame.lineno}, in {frame.name}" if frame else ""
    path, here = Path(_file_of(kind) or "?"), Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return (
        f"policy {kind.__qualname__} ({shown}{where}): {text}; repair it with the help of "
        f"`viisim check {shown}:{kind.__qualname__}`"
    )


def _file_of(kind: type) -> str | None:
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


# --------------------------------------------------------------------------------------
# All seeds


@dataclass(frozen=True, slots=True)
class Run:
    """An experiment with the results of all its seeds."""

    experiment: Experiment
    results: tuple[SeedResult, ...]
    """One a seed, in the order of the experiment's `seeds`."""
    summary: Summary
    """The metrics, per seed and over seeds: the content of `summary.json`."""

    @property
    def requests(self) -> pa.Table:
        """One row a request: `seed`, then `viisim.records.REQUEST_COLUMNS`. For pandas:
        `run.requests.to_pandas()`."""
        return _table([(result.seed, result.requests) for result in self.results])

    @property
    def samples(self) -> pa.Table:
        """One row a sample of a replica: `seed`, then `viisim.records.SAMPLE_COLUMNS`."""
        return _table([(result.seed, result.samples) for result in self.results])

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made of: the content of `manifest.json`."""
        seeds, hashes = self.experiment.seeds, input_hashes(self.experiment)
        return make_manifest(resolved(self.experiment), seeds, hashes)

    def save(self, folder: str | Path, plots: bool = True) -> Path:
        """Write a run directory, as `viisim run` does. Raises InputError if it cannot be."""
        return write_run(Path(folder), self.manifest, self.results, self.summary, plots)

    def __rich__(self) -> Any:
        """The table that `viisim run` shows: `rich.print(run)`."""
        from viisim.report import summary_report

        return summary_report(self.summary, self.experiment.name)


def _table(seeds: Sequence[tuple[int, Mapping[str, Any]]]) -> pa.Table:
    tables = []
    for seed, columns in seeds:
        rows = next(iter(columns.values())).size
        tables.append(pa.table({"seed": np.full(rows, seed), **columns}))
    return pa.concat_tables(tables)


def simulate(source: str | Path | Mapping[str, Any], *, jobs: int = 1, **overrides: Any) -> Run:
    """Simulate an experiment: a YAML file, or the same content as a mapping.

    Overrides name keys with two underscores for every dot: `seeds=[1, 2]`,
    `workload__rate_per_s=0.5`, `policy={"name": "random"}`. With `jobs` above 1, seeds run in
    that many processes; a script then needs the guard `if __name__ == "__main__"`.

    Raises InputError for a mistake in the experiment, PolicyError for one of the policy.
    """
    changes = [
        f"{key.replace('__', '.')}={json.dumps(value, default=str)}"
        for key, value in overrides.items()
    ]
    if isinstance(source, Mapping):
        experiment = experiment_from(dict(source), "experiment", overrides=changes)
    else:
        experiment = load_experiment(source, changes)
    return run_experiment(experiment, jobs=jobs)


def run_experiment(
    experiment: Experiment,
    *,
    jobs: int = 1,
    on_progress: Progress | None = None,
    journals: Path | None = None,
) -> Run:
    """Simulate every seed, in up to `jobs` processes; with `journals`, write a journal of each
    into that folder. Raises what `run_seed` raises."""
    seeds = experiment.seeds
    files = [None if journals is None else journals / f"seed-{seed}.jsonl" for seed in seeds]
    if min(jobs, len(seeds)) > 1:
        results = _in_processes(experiment, files, min(jobs, len(seeds)), on_progress)
    else:
        results = [
            run_seed(experiment, seed, file, _named(seed, on_progress))
            for seed, file in zip(seeds, files, strict=True)
        ]
    return Run(experiment, tuple(results), summary_of(experiment, results))


def summary_of(experiment: Experiment, results: Sequence[SeedResult]) -> Summary:
    """The metrics of an experiment's seeds, labelled with what a reader must know of it."""
    predictor = experiment.predictor.model_dump(exclude_none=True)
    summary = summarise(results, experiment.slo, experiment.warmup_fraction, predictor)
    replicas = experiment.simulated_replicas()
    summary["uncalibrated"] = sorted(
        {f"{r.device}/{r.model}" for r in replicas if is_uncalibrated(r.profile)}
    )
    if all(result.energy_j is not None for result in results):
        draws = {kind: power_draw(load_device(kind)) for kind in _kinds(experiment)}
        summary["power_assumptions"] = [
            f"{kind}: {assumption}"
            for kind, draw in sorted(draws.items())
            for assumption in draw.assumptions
        ]
    return summary


def _kinds(experiment: Experiment) -> set[str]:
    return set(simulated_devices(experiment).values())


def run_into(
    directory: RunFolder,
    experiment: Experiment,
    *,
    jobs: int = 1,
    on_progress: Progress | None = None,
    plots: bool = True,
    journals: bool = False,
) -> Run:
    """Simulate and write everything into a run directory. Raises what `run_seed` raises."""
    folder = None
    if journals:
        folder = directory._aside / JOURNALS
        folder.mkdir()
    run = run_experiment(experiment, jobs=jobs, on_progress=on_progress, journals=folder)
    directory.write(run.manifest, run.results, run.summary, plots)
    return run


def _named(seed: int, on_progress: Progress | None) -> SeedProgress | None:
    if on_progress is None:
        return None
    return lambda arrived, total: on_progress(seed, arrived, total)


# --------------------------------------------------------------------------------------
# Processes


def _in_processes(
    experiment: Experiment,
    journals: Sequence[Path | None],
    jobs: int,
    on_progress: Progress | None,
) -> list[SeedResult]:
    """Every seed in a process of a pool. Spawned, not forked: the same on every system, and
    safe in a program that has threads."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with _undisturbed():  # a finalizer half made prints a traceback when it is dropped
        counters = context.RawArray("q", 2 * len(journals))
        pool = ProcessPoolExecutor(jobs, context, _start_worker, (counters,))
    try:
        with _undisturbed():
            futures = [pool.submit(_work, experiment, *each) for each in enumerate(journals)]
        _watch(futures, experiment.seeds, counters, on_progress)
        results = [future.result() for future in futures]
    except BaseException:
        # Nobody wants the other seeds any more: neither wait for them nor leave them running.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()
    return results


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which reaches the whole process group: the
    parent takes it and ends them, so that no worker prints a traceback of its own. Nor does one
    that is told to end while it reads what to do: a SIGTERM waits for the block's end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change what signals do
        return
    told: list[int] = []
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: told.append(number)),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        signal.raise_signal(signal.SIGTERM)


def _watch(
    futures: Sequence[Future[SeedResult]],
    seeds: Sequence[int],
    counters: Any,
    on_progress: Progress | None,
) -> None:
    """Wait for all, passing on how far each seed has come. Raises the first failure."""
    glance_s = None if on_progress is None else _GLANCE_S
    pending: set[Future[SeedResult]] = set(futures)
    while pending:
        done, pending = wait(pending, glance_s, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if on_progress is not None:
            for index, seed in enumerate(seeds):
                on_progress(seed, counters[2 * index], counters[2 * index + 1])


_counters: Any = None
"""In a worker process: for each seed how many requests have arrived, and of how many."""


def _start_worker(counters: Any) -> None:
    """Runs once in each worker process."""
    global _counters
    _counters = counters


def _work(experiment: Experiment, index: int, journal: Path | None) -> SeedResult:
    def note(arrived: int, total: int) -> None:
        _counters[2 * index : 2 * index + 2] = [arrived, total]

    return run_seed(experiment, experiment.seeds[index], journal, note)


# --------------------------------------------------------------------------------------
# What a run is made of


def input_hashes(experiment: Experiment) -> dict[str, str]:
    """SHA-256 of everything the experiment reads besides itself, by the key that names it."""
    hashes = {
        f"cluster.replicas.{index}.profile": profile_hash(entry.load_profile())
        for index, entry in enumerate(experiment.cluster.replicas)
        if entry.worker.kind != "url"
    }
    for key, file in workload_files(experiment.workload).items():
        hashes[f"workload.{key}"] = file_hash(file)
    source = _file_of(type(experiment.policy.make()))
    if source is not None:
        hashes["policy"] = file_hash(Path(source))
    return hashes
