"""One part of a validation: what its workers did, and what the simulator says of the same runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from viisim.calibration.fit import fit_steps
from viisim.calibration.measurements import StepLog
from viisim.calibration.own_records import read_steps
from viisim.calibration.validate import predicted_s
from viisim.config import Experiment, ReplicaConfig, SimulatedReplica
from viisim.errors import InputError
from viisim.validation.answers import Answers, Floats, simulated_answers
from viisim.validation.measured import (
    CAPACITY,
    PROBE,
    WARM_UP,
    MeasuredRun,
    Part,
    Row,
    measured_answers,
    rows_of,
)
from viisim.validation.predict import requests_at, simulated
from viisim.validation.steps import StepTimes
from viisim.workload.request import Request

_CALIBRATED_ON = ("sweep-*.steps.jsonl", "traffic-*.steps.jsonl")
"""Files of `calibrate --live` that the profile was fitted to."""

_SAME_TIME_S = 1e-6


class Deployment:
    """Measured runs of one deployment, and the same ones simulated.

    How fast the workers are is known in three ways. *As calibrated*: their profiles say it. *As
    probed*: how many times as long, beside their profile, a worker's steps took in the probes
    between the runs as they had when it was calibrated; it is this that predictions are judged
    with. *Their own speed*: what the steps of a run turned out to take, which is no prediction.
    """

    def __init__(
        self, name: str, experiment: Experiment, folder: Path, *, cut_off: bool = False
    ) -> None:
        self.name = name
        self.experiment = experiment
        self.cut_off = cut_off
        """Measuring ended before its last run did; what was measured until then is judged."""
        self.part = Part(folder)
        self.runs = self.part.runs()
        self._own: dict[str, dict[str, float]] = {}
        """By run, once it was asked for."""

    @cached_property
    def ids(self) -> list[str]:
        """Of the replicas."""
        return [replica.id for replica, _ in self.workers]

    @cached_property
    def workers(self) -> list[tuple[SimulatedReplica, ReplicaConfig]]:
        """The replicas, and what the experiment says of each."""
        entries = [entry for _, entry in self.experiment.numbered_replicas()]
        return list(zip(self.experiment.simulated_replicas(), entries, strict=True))

    def of(self, group: str) -> list[MeasuredRun]:
        """The runs of a group."""
        return [run for run in self.runs if run.group == group]

    @property
    def compared(self) -> list[MeasuredRun]:
        """The runs that are compared request by request."""
        return [run for run in self.runs if run.group not in (WARM_UP, PROBE, CAPACITY)]

    # ----------------------------------------------------------------------------------
    # Answers

    def measured(self, run: MeasuredRun) -> Answers:
        """What the clients had of the workers."""
        return measured_answers(self.part, run, self.ids)

    def predicted(
        self,
        run: MeasuredRun,
        slowdowns: Mapping[str, float],
        experiment: Experiment | None = None,
    ) -> Answers:
        """The run simulated, at the speed of one of the three below; `experiment` if it is not the
        deployment's own. Raises InputError where that has other requests than were sent."""
        experiment = experiment or self.experiment
        requests = requests_at(experiment, run.rate_per_s, run.run_s, run.seed)
        sent = {row["id"]: row for row in self.part.requests(run.name)}
        if not all(_is(request, sent.get(request.view.id)) for request in requests):
            raise InputError(
                f"{self.part.requests_file(run.name)}: these are not the requests of "
                f"{experiment.name}; its workload was changed since: change it back, or measure "
                "again"
            )
        return simulated_answers(simulated(experiment, requests, run.seed, slowdowns))

    def predicted_at(
        self, run: MeasuredRun, rate_per_s: float, slowdowns: Mapping[str, float]
    ) -> Answers:
        """The run's requests, closer together or further apart."""
        run_s = run.run_s * run.rate_per_s / rate_per_s
        requests = requests_at(self.experiment, rate_per_s, run_s, run.seed)
        return simulated_answers(simulated(self.experiment, requests, run.seed, slowdowns))

    # ----------------------------------------------------------------------------------
    # Speed: by replica, how many times as long as its profile says its steps take

    as_calibrated: Mapping[str, float] = {}

    @cached_property
    def as_probed(self) -> dict[str, float]:
        """By all probes together; as calibrated where a deployment was not probed."""
        return self._slowdowns(self.of(PROBE), self._when_calibrated)

    @cached_property
    def probes(self) -> dict[str, list[float]]:
        """The same of each probe by itself."""
        found: dict[str, list[float]] = {}
        for run in self.of(PROBE):
            for replica, slowdown in self._slowdowns([run], self._when_calibrated).items():
                found.setdefault(replica, []).append(slowdown)
        return found

    def own(self, run: MeasuredRun) -> dict[str, float]:
        """In this run."""
        if run.name not in self._own:
            self._own[run.name] = self._slowdowns([run], {})
        return self._own[run.name]

    def _slowdowns(
        self, runs: Sequence[MeasuredRun], base: Mapping[str, float]
    ) -> dict[str, float]:
        return {
            replica.id: _slowdown(log, replica) / base.get(replica.id, 1.0)
            for replica, _, log in self._worked(runs)
        }

    @cached_property
    def _when_calibrated(self) -> dict[str, float]:
        """A profile fits its own measurements: 1, but for what a fit leaves. One that was changed
        since does not, and no probe is to make up for that."""
        found = {}
        for replica, entry in self.workers:
            folder = Path(entry.profile_name).with_suffix("")
            files = [file for pattern in _CALIBRATED_ON for file in sorted(folder.glob(pattern))]
            found[replica.id] = _slowdown(_log([row for f in files for row in rows_of(f)]), replica)
        return found

    # ----------------------------------------------------------------------------------
    # Steps

    def step_times(self) -> Iterator[StepTimes]:
        """What each worker computed in the runs that are compared, and what its profile says."""
        for replica, start_s, log in self._worked(self.compared):
            yield StepTimes(
                worker=f"{self.name} {replica.id}",
                start_s=start_s,
                decodes=log.decodes,
                measured_s=log.duration_s,
                calibrated_s=predicted_s(log, replica.profile),
                refitted_s=fit_steps([log]).predict(log),
                with_prefill=log.prefill_tokens > 0,
                probes=tuple(self.probes.get(replica.id, ())),
                as_probed=self.as_probed.get(replica.id, 1.0),
                by_run=tuple(
                    self.own(run)[replica.id]
                    for run in self.compared
                    if replica.id in self.own(run)
                ),
            )

    def _worked(
        self, runs: Sequence[MeasuredRun]
    ) -> Iterator[tuple[SimulatedReplica, Floats, StepLog]]:
        """The workers that computed anything in the runs: when their steps began, and the steps."""
        for replica, _ in self.workers:
            rows = self.part.steps(replica.id, runs)
            rows = [row for row in rows if row["decode_seqs"] or row["prefill_tokens"]]
            if rows:
                yield replica, np.array([row["start_s"] for row in rows]), _log(rows)


def _is(request: Request, sent: Row | None) -> bool:
    """Whether it was due then, and had such a prompt and answer, if it had one."""
    if sent is None or abs(sent["due_s"] - request.arrived_ns / 1e9) > _SAME_TIME_S:
        return False
    lengths = request.view.prompt_tokens, request.output_tokens
    return bool(sent["error"]) or (sent["prompt_tokens"], sent["output_tokens"]) == lengths


def _slowdown(log: StepLog, replica: SimulatedReplica) -> float:
    return float(log.duration_s.sum() / predicted_s(log, replica.profile).sum())


def _log(rows: Sequence[Row]) -> StepLog:
    log = read_steps(rows, Path(), "").steps
    assert log is not None, "it was read from steps"
    return log
