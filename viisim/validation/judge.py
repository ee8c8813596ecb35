"""From a folder of measurements to the report: the same runs in the simulator, and the comparison.

Nothing is measured here. Whoever changes the simulator, or a profile in the folder, can have the
same measurements judged again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from viisim.capacity import work_rate_per_s
from viisim.config import Experiment
from viisim.errors import InputError
from viisim.validation.accuracy import (
    Capacity,
    Cpu,
    LoadRun,
    compare,
    load_at_equal_e2e,
)
from viisim.validation.answers import Answers, Figure
from viisim.validation.config import (
    ACCURACY,
    RANKING,
    RankedWorkload,
    RankingConfig,
    ValidationConfig,
    label_of,
)
from viisim.validation.deployment import Deployment
from viisim.validation.figures import draw
from viisim.validation.limits import FULL, QUICK
from viisim.validation.measured import (
    CAPACITY,
    MeasuredRun,
    calibration_summary,
    work_columns,
)
from viisim.validation.parity import parity_of
from viisim.validation.predict import (
    AS_CALIBRATED,
    closed_loop_per_s,
    with_policy,
    with_workload,
)
from viisim.validation.ranking import Ranking, rank
from viisim.validation.report import Report, Setup, Stated, Worker
from viisim.validation.steps import shared_drift, step_errors


@dataclass(frozen=True, slots=True)
class Measurements:
    """A folder of measurements."""

    folder: Path
    config: ValidationConfig
    experiments: Mapping[str, Experiment]
    """As they were deployed, by the part of the validation; those that were measured."""
    about: Mapping[str, Any]
    """The content of measured.json."""

    def deployments(self) -> dict[str, Deployment]:
        """By part."""
        return {
            part: Deployment(
                part, experiment, self.folder / part, cut_off=part not in self.about["wall_s"]
            )
            for part, experiment in self.experiments.items()
        }


def judge(measured: Measurements, command: str) -> Report:
    """Simulate what was measured, compare, and write report and figures into the folder."""
    deployments = measured.deployments()
    deployment, cores = deployments[ACCURACY], measured.about["cores"]
    runs = sorted(deployment.compared, key=lambda run: float(run.group))
    loads = [
        _load_run(deployment, float(group), list(own), cores)
        for group, own in groupby(runs, _group)
    ]
    accuracies = [compare(run) for run in loads]
    steps = [times for own in deployments.values() for times in own.step_times()]
    rankings, ranking_cpu = _rankings(measured.config.ranking, deployments.get(RANKING), cores)
    pictures = draw(measured.config.name, loads, accuracies, steps, measured.folder / "plots")
    report = Report(
        name=measured.config.name,
        command=command,
        setup=_setup(measured, deployments),
        limits=QUICK if measured.about["quick"] else FULL,
        calibration=tuple(_calibration(measured)),
        capacities=(_capacity(deployment),),
        loads=tuple(accuracies),
        steps=tuple(
            step_errors(times, [other for other in steps if other is not times]) for times in steps
        ),
        step_drift=shared_drift(steps),
        rankings=rankings,
        parity=parity_of(list(deployments.values())),
        cut_off=tuple(name for name, own in deployments.items() if own.cut_off),
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


def _cpu(runs: Sequence[MeasuredRun], cores: int) -> Cpu:
    """Shares of all cores' time while these runs lasted."""
    core_s = cores * sum(run.end_s - run.begin_s for run in runs)
    return Cpu(
        client=sum(run.client_cpu_s for run in runs) / core_s,
        proxy=sum(run.proxy_cpu_s for run in runs) / core_s,
    )


# --------------------------------------------------------------------------------------
# Accuracy


def _capacity(deployment: Deployment) -> Capacity:
    runs = deployment.of(CAPACITY)
    rows = [deployment.part.requests(run.name) for run in runs]
    predicted = partial(closed_loop_per_s, deployment.experiment, len(rows[0]), runs[0].seed)
    return Capacity(
        of="two workers" if len(deployment.ids) == 2 else "all workers",
        unit="requests/s",
        repetitions=tuple(work_rate_per_s(work_columns(each), CAPACITY) for each in rows),
        predictions=tuple(predicted(deployment.gauged(run)) for run in runs),
        predicted_as_calibrated=predicted(AS_CALIBRATED),
        predicted_at_own_speed=tuple(predicted(deployment.own(run)) for run in runs),
    )


def _load_run(
    deployment: Deployment, load: float, runs: Sequence[MeasuredRun], cores: int
) -> LoadRun:
    """The repetitions of one load."""
    first = runs[0]
    gauged = [deployment.gauged(run) for run in runs]
    capacity_per_s = first.rate_per_s / load  # as it was when the rates were chosen
    answers = tuple(deployment.measured(run) for run in runs)

    def mean_e2e_s(at: float) -> float:
        rate_per_s = at * capacity_per_s
        each = [deployment.predicted_at(first, rate_per_s, speed) for speed in gauged]
        return float(np.mean(np.concatenate([one.latencies("e2e_s") for one in each])))

    found = float(np.mean(np.concatenate([one.latencies("e2e_s") for one in answers])))
    return LoadRun(
        load=load,
        rate_per_s=first.rate_per_s,
        measured=answers,
        simulated=tuple(deployment.predicted(first, speed) for speed in gauged),
        as_calibrated=deployment.predicted(first, AS_CALIBRATED),
        at_own_speed=tuple(deployment.predicted(run, deployment.own(run)) for run in runs),
        cpu=_cpu(runs, cores),
        equal_load=load_at_equal_e2e(found, mean_e2e_s, load) if load > FULL.low_load else None,
    )


# --------------------------------------------------------------------------------------
# Ranking


def _rankings(
    config: RankingConfig | None, deployment: Deployment | None, cores: int
) -> tuple[dict[str, Ranking], dict[str, Cpu]]:
    """By workload."""
    if config is None or deployment is None:
        return {}, {}
    rankings, cpu = {}, {}
    for ranked in config.workloads:
        own = deployment.of(ranked.name)
        rankings[ranked.name] = _ranking(config, deployment, ranked, own)
        cpu[ranked.name] = _cpu(own, cores)
    return rankings, cpu


def _ranking(
    config: RankingConfig,
    deployment: Deployment,
    ranked: RankedWorkload,
    runs: Sequence[MeasuredRun],
) -> Ranking:
    traffic = with_workload(deployment.experiment, ranked.workload)
    changed = [with_policy(traffic, policy) for policy in config.policies]
    own = [[run for run in runs if run.policy == one.policy.spec] for one in changed]
    whole = min(map(len, own))  # repetitions that every policy has
    if not whole:
        raise InputError(
            f"{deployment.part.folder}: {ranked.name}: not every policy of the file was measured; "
            "measure again, or leave in the file those that were (`ranking: null` for none)"
        )
    real: dict[str, list[Answers]] = {}
    predicted: dict[str, list[Answers]] = {}
    as_calibrated: dict[str, list[Answers]] = {}
    at_own_speed: dict[str, list[Answers]] = {}
    for policy, under, its_runs in zip(config.policies, changed, own, strict=True):
        label, kept = label_of(policy), its_runs[:whole]
        real[label] = [deployment.measured(run) for run in kept]
        for found, speed in (
            (predicted, deployment.gauged),
            (as_calibrated, lambda _: AS_CALIBRATED),
            (at_own_speed, deployment.own),
        ):
            found[label] = [deployment.predicted(run, speed(run), under) for run in kept]
    judged = ranked.judged_by
    figure = Figure(judged.metric, judged.statistic, judged.traffic_class)
    return rank(figure, real, predicted, as_calibrated, at_own_speed)


# --------------------------------------------------------------------------------------
# What ran


def _setup(measured: Measurements, deployments: Mapping[str, Deployment]) -> Setup:
    workers = tuple(
        Worker(
            id=f"{name} {replica.id}",
            profile=Path(entry.profile_name).name,
            cores=entry.device or replica.profile.device,
            held_out_error=replica.profile.held_out_error or {},
            on_cpu=entry.worker.without_cards,
            halted=deployment.halted(replica.id),
            gauge_offset=deployment.gauge_offset(replica.id),
        )
        for name, deployment in deployments.items()
        for replica, entry in deployment.workers
    )
    (replica, _), *_ = deployments[ACCURACY].workers
    engine = replica.profile.engine
    return Setup(
        engine=f"{engine.name} {engine.version}",
        model=" and ".join(measured.about["weights"]),
        machine=measured.about["machine"],
        workers=workers,
    )


def _calibration(measured: Measurements) -> Iterator[Stated]:
    """Of each kind of worker."""
    for label in measured.about["weights"]:
        summary = calibration_summary(measured.folder / "profiles" / label)
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
        if (response := summary["response"]) is not None:
            for what in ("decode", "prefill"):
                power = f"{label}: power of the machine's slowness by which {what} is slow"
                yield Stated(power, response[what], "")
        if (busy := summary["busy_delays"]) is not None:
            yield Stated(f"{label}: way to a busy engine", 1e3 * busy["request_s"], "ms")
            yield Stated(f"{label}: way back from it", 1e3 * busy["answer_s"], "ms")
