"""From a folder of measurements to the report: the same runs in the simulator, and the comparison.

Nothing is measured here. Whoever changes the simulator, or a profile in the folder, can have the
same measurements judged again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from policies.interface import ConfigChanged
from policies.journal import Segment
from policies.registry import PolicySpec
from viisim.calibration.fit import fit_steps
from viisim.calibration.measurements import StepLog
from viisim.calibration.own_records import read_steps
from viisim.calibration.validate import predicted_s
from viisim.capacity import work_rate_per_s
from viisim.config import Experiment, SimulatedReplica
from viisim.errors import InputError
from viisim.journal import JournalReader, ReplayReport, replay_journal
from viisim.validation.accuracy import (
    Capacity,
    Cpu,
    LoadRun,
    compare,
    load_at_equal_e2e,
)
from viisim.validation.answers import Answers, Floats, simulated_answers
from viisim.validation.config import RankedWorkload, ValidationConfig, label_of
from viisim.validation.figures import draw
from viisim.validation.limits import FULL, QUICK
from viisim.validation.measured import (
    CAPACITY,
    WARM_UP,
    MeasuredRun,
    Part,
    PlannedRun,
    measured_answers,
    work_columns,
)
from viisim.validation.predict import (
    closed_loop_per_s,
    requests_at,
    simulated,
    with_policy,
    with_workload,
)
from viisim.validation.ranking import Figure, Ranking, rank
from viisim.validation.report import Parity, Report, Setup, Stated, Worker
from viisim.validation.steps import StepTimes, shared_drift, step_errors


@dataclass(frozen=True, slots=True)
class Measured:
    """A folder of measurements, and the experiments as they were deployed."""

    folder: Path
    config: ValidationConfig
    accuracy: Experiment
    ranking: Experiment | None
    about: Mapping[str, Any]
    """The content of measured.json."""

    def part(self, name: str) -> Part:
        """One of its deployments."""
        return Part(self.folder / name)


def judge(measured: Measured, command: str) -> Report:
    """Simulate what was measured, compare, and write report and figures into the folder."""
    part = measured.part("accuracy")
    runs = [run for run in part.runs() if run.group not in (CAPACITY, WARM_UP)]
    capacity = _capacity(measured, part)
    loads = [
        _load_run(measured, part, float(group), list(own))
        for group, own in groupby(sorted(runs, key=lambda run: float(run.group)), _group)
    ]
    accuracies = [compare(run) for run in loads]
    steps = [*_step_times("accuracy", measured.accuracy, part, runs), *_ranked_steps(measured)]
    rankings, ranking_cpu = _rankings(measured)
    pictures = draw(measured.config.name, loads, accuracies, steps, measured.folder / "plots")
    report = Report(
        name=measured.config.name,
        command=command,
        setup=_setup(measured),
        limits=QUICK if measured.about["quick"] else FULL,
        calibration=tuple(_calibration(measured)),
        capacities=(capacity,),
        loads=tuple(accuracies),
        steps=tuple(step_errors(times) for times in steps),
        step_drift=shared_drift(steps),
        rankings=rankings,
        parity=_parity(measured),
        cpu=ranking_cpu,
        wall_s=measured.about["wall_s"],
        files=_FILES,
        pictures=pictures,
    )
    report.write(measured.folder)
    return report


_FILES = {
    "runs, and the requests of each": "accuracy/runs.jsonl, accuracy/load-*.requests.jsonl",
    "capacity": "accuracy/capacity.*.requests.jsonl",
    "steps of the workers": "accuracy/steps/*.steps.jsonl",
    "ranking": "ranking/runs.jsonl, ranking/*.requests.jsonl",
    "decisions": "accuracy/journal/, ranking/journal/",
    "calibration": "profiles/*.yaml, profiles/*/summary.json",
    "this report": "report.json",
}


def _group(run: MeasuredRun) -> str:
    return run.group


# --------------------------------------------------------------------------------------
# Accuracy


def _capacity(measured: Measured, part: Part) -> Capacity:
    runs = [run for run in part.runs() if run.group == CAPACITY]
    rows = [part.requests(run.name) for run in runs]
    predicted = partial(closed_loop_per_s, measured.accuracy, len(rows[0]), runs[0].seed)
    speeds = [_slowdowns(measured.accuracy, part, run) for run in runs]
    return Capacity(
        of="two workers" if len(_ids(measured.accuracy)) == 2 else "all workers",
        unit="requests/s",
        repetitions=tuple(work_rate_per_s(work_columns(each), CAPACITY) for each in rows),
        predicted=predicted(),
        predicted_at_speed=tuple(predicted(own) for own in speeds),
    )


def _load_run(measured: Measured, part: Part, load: float, runs: Sequence[MeasuredRun]) -> LoadRun:
    """The repetitions of one load."""
    experiment, first = measured.accuracy, runs[0]
    capacity_per_s = first.rate_per_s / load  # as it was when the rates were chosen
    answers = tuple(measured_answers(part, run, _ids(experiment)) for run in runs)

    def predicted(rate_per_s: float) -> Answers:
        # The same requests, closer together or further apart.
        run_s = first.run_s * first.rate_per_s / rate_per_s
        return _predicted(experiment, replace(first, rate_per_s=rate_per_s, run_s=run_s))

    def mean_e2e_s(at: float) -> float:
        return float(predicted(at * capacity_per_s).latencies("e2e_s").mean())

    found = float(np.mean(np.concatenate([one.latencies("e2e_s") for one in answers])))
    return LoadRun(
        load=load,
        rate_per_s=first.rate_per_s,
        measured=answers,
        simulated=predicted(first.rate_per_s),
        at_speed=tuple(_at_speed(experiment, part, run) for run in runs),
        cpu=_cpu(measured, runs),
        equal_load=load_at_equal_e2e(found, mean_e2e_s, load) if load > FULL.low_load else None,
    )


def _predicted(
    experiment: Experiment, run: PlannedRun, slowdowns: Mapping[str, float] | None = None
) -> Answers:
    requests = requests_at(experiment, run.rate_per_s, run.run_s, run.seed)
    return simulated_answers(simulated(experiment, requests, run.seed, slowdowns))


def _at_speed(experiment: Experiment, part: Part, run: MeasuredRun) -> Answers:
    """The run simulated with the speed that each worker turned out to have in it."""
    return _predicted(experiment, run, _slowdowns(experiment, part, run))


def _slowdowns(experiment: Experiment, part: Part, run: MeasuredRun) -> dict[str, float]:
    """How many times as long as its profile says each worker's steps took, all together."""
    return {
        replica.id: float(log.duration_s.sum() / predicted_s(log, replica.profile).sum())
        for replica, _, log in _worked(experiment, part, [run])
    }


def _step_times(
    name: str, experiment: Experiment, part: Part, runs: Sequence[MeasuredRun]
) -> Iterator[StepTimes]:
    """What each worker computed meanwhile, and what its profile says of it."""
    by_run = [_slowdowns(experiment, part, run) for run in runs]
    for replica, start_s, log in _worked(experiment, part, runs):
        yield StepTimes(
            worker=f"{name} {replica.id}",
            start_s=start_s,
            decodes=log.decodes,
            measured_s=log.duration_s,
            predicted_s=predicted_s(log, replica.profile),
            refitted_s=fit_steps([log]).predict(log),
            with_prefill=log.prefill_tokens > 0,
            slowdowns=tuple(one[replica.id] for one in by_run if replica.id in one),
        )


def _worked(
    experiment: Experiment, part: Part, runs: Sequence[MeasuredRun]
) -> Iterator[tuple[SimulatedReplica, Floats, StepLog]]:
    """The workers that computed anything during the runs: when their steps began, and the steps."""
    for replica in experiment.simulated_replicas():
        rows = part.steps(replica.id, runs)
        rows = [row for row in rows if row["decode_seqs"] or row["prefill_tokens"]]
        if rows:
            log = read_steps(rows, part.steps_file(replica.id), "").steps
            assert log is not None, "it was read from steps"
            yield replica, np.array([row["start_s"] for row in rows]), log


def _ranked_steps(measured: Measured) -> Iterator[StepTimes]:
    """Those of the ranking's workers, which other ones may be."""
    if measured.ranking is not None:
        part = measured.part("ranking")
        runs = [run for run in part.runs() if run.group != WARM_UP]
        yield from _step_times("ranking", measured.ranking, part, runs)


def _ids(experiment: Experiment) -> list[str]:
    return [name for name, _ in experiment.numbered_replicas()]


def _cpu(measured: Measured, runs: Sequence[MeasuredRun]) -> Cpu:
    """Shares of all cores' time while these runs lasted."""
    core_s = measured.about["cores"] * sum(run.end_s - run.begin_s for run in runs)
    return Cpu(
        client=sum(run.client_cpu_s for run in runs) / core_s,
        proxy=sum(run.proxy_cpu_s for run in runs) / core_s,
    )


# --------------------------------------------------------------------------------------
# Ranking


def _rankings(measured: Measured) -> tuple[dict[str, Ranking], dict[str, Cpu]]:
    """By workload."""
    config = measured.config.ranking
    if config is None or measured.ranking is None:
        return {}, {}
    part = measured.part("ranking")
    runs = part.runs()
    rankings, cpu = {}, {}
    for ranked in config.workloads:
        own = [run for run in runs if run.group == ranked.name]
        rankings[ranked.name] = _ranking(measured, measured.ranking, part, ranked, own)
        cpu[ranked.name] = _cpu(measured, own)
    return rankings, cpu


def _ranking(
    measured: Measured,
    experiment: Experiment,
    part: Part,
    ranked: RankedWorkload,
    runs: Sequence[MeasuredRun],
) -> Ranking:
    assert measured.config.ranking is not None
    policies = measured.config.ranking.policies
    changed = [with_policy(with_workload(experiment, ranked.workload), one) for one in policies]
    own = [[run for run in runs if run.policy == one.policy.spec] for one in changed]
    whole = min(map(len, own))  # repetitions that every policy has
    if not whole:
        raise InputError(
            f"{part.folder}: {ranked.name}: not every policy of the file was measured; measure "
            "again, or leave in the file those that were"
        )
    real, predicted, at_speed = {}, {}, {}
    for policy, under, its_runs in zip(policies, changed, own, strict=True):
        label, kept = label_of(policy), its_runs[:whole]
        real[label] = [measured_answers(part, run, _ids(experiment)) for run in kept]
        predicted[label] = [_predicted(under, run) for run in kept]
        at_speed[label] = [_at_speed(under, part, run) for run in kept]
    judged = ranked.judged_by
    figure = Figure(judged.metric, judged.statistic, judged.traffic_class)
    return rank(figure, real, predicted, at_speed)


# --------------------------------------------------------------------------------------
# Parity


def _parity(measured: Measured) -> Parity:
    """Every journal through fresh cores, and the policies in it beside those simulated."""
    reports: list[tuple[str, ReplayReport]] = []
    unlike: list[str] = []
    names = ["accuracy", *(["ranking"] if measured.ranking is not None else [])]
    for name in names:
        part = measured.part(name)
        files = sorted(part.journal.glob("*.jsonl"))
        reports += [(name, replay_journal(file, trust=True)) for file in files]
        simulated = [_simulated_policy(measured, name, run) for run in part.runs()]
        unlike += policy_differences(_policies_in(files), simulated)
    return Parity(
        journals=len(reports),
        events=sum(report.events for _, report in reports),
        actions=sum(report.actions for _, report in reports),
        differences=tuple(f"{name}/{report}" for name, report in reports if not report.equal),
        policy_differences=tuple(unlike),
    )


def _simulated_policy(measured: Measured, part: str, run: MeasuredRun) -> PolicySpec:
    """Of a run of the ranking it is the run's own, by which the run is found."""
    return run.policy if part == "ranking" else measured.accuracy.policy.spec


def _policies_in(files: Sequence[Path]) -> list[PolicySpec]:
    """The policies that a deployment was scheduled by, in their order."""
    found: list[PolicySpec] = []
    for file in files:
        for _, line in JournalReader(file):
            if isinstance(line, Segment):
                found.append(line.policy)
            elif isinstance(line.event, ConfigChanged) and line.event.policy is not None:
                found.append(line.event.policy)
    return _changes(found)


def _changes(policies: Sequence[PolicySpec]) -> list[PolicySpec]:
    return [policy for policy, _ in groupby(policies)]


def policy_differences(
    deployed: Sequence[PolicySpec], planned: Sequence[PolicySpec]
) -> Iterator[str]:
    """Where the policies of a deployment's journal, in their order, are not those that its runs
    are simulated under."""
    wanted = _changes(planned)
    if len(deployed) != len(wanted):
        yield f"{len(deployed)} policies were deployed in turn, {len(wanted)} were to be"
    for number, (one, other) in enumerate(zip(deployed, wanted, strict=False), start=1):
        if one != other:
            yield f"policy {number}: deployed {one}, simulated {other}"


# --------------------------------------------------------------------------------------
# What ran


def _setup(measured: Measured) -> Setup:
    experiments = {"accuracy": measured.accuracy, "ranking": measured.ranking}
    workers = tuple(
        Worker(
            id=f"{name} {replica.id}",
            profile=Path(entry.profile_name).name,
            cores=entry.device or replica.profile.device,
            held_out_error=replica.profile.held_out_error or {},
        )
        for name, experiment in experiments.items()
        if experiment is not None
        for replica, (_, entry) in zip(
            experiment.simulated_replicas(), experiment.numbered_replicas(), strict=True
        )
    )
    profile = measured.accuracy.simulated_replicas()[0].profile
    return Setup(
        engine=f"{profile.engine.name} {profile.engine.version}",
        model=" and ".join(measured.about["weights"]),
        machine=measured.about["machine"],
        workers=workers,
    )


def _calibration(measured: Measured) -> Iterator[Stated]:
    """Of each kind of worker."""
    for label in measured.about["weights"]:
        summary = json.loads((measured.folder / "profiles" / label / "summary.json").read_text())
        floor, unseen = summary["noise_floor"], summary["unseen_traffic"]
        shares = {f"one list twice, mean {name.upper()}": value for name, value in floor.items()}
        shares |= {
            "fit of the sweeps on traffic, mean size of a step's error": unseen["step_time_mape"],
            "the same, total step time": unseen["total_step_time"],
        }
        for what, share in shares.items():
            yield Stated(f"{label}: {what}", 100 * share, "%")
        delay_s = summary["host_overhead"]["p50_s"]
        yield Stated(f"{label}: way to an idle engine and back, median", 1e3 * delay_s, "ms")
        if (busy := summary["busy_delays"]) is not None:
            yield Stated(f"{label}: way to a busy engine", 1e3 * busy["request_s"], "ms")
            yield Stated(f"{label}: way back from it", 1e3 * busy["answer_s"], "ms")
