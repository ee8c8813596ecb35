"""One part of a validation: what its workers did, and what the simulator says of the same runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from viisim.calibration.fit import fit_steps
from viisim.calibration.gauge import SPAN_S, Gauge, Response, read_gauge
from viisim.calibration.measurements import StepLog
from viisim.calibration.own_records import step_log
from viisim.calibration.validate import predicted_s
from viisim.config import Experiment, ReplicaConfig, SimulatedReplica
from viisim.errors import InputError
from viisim.validation.answers import Answers, Floats, simulated_answers
from viisim.validation.measured import (
    CAPACITY,
    WARM_UP,
    MeasuredRun,
    Part,
    Row,
    calibration_summary,
    measured_answers,
)
from viisim.validation.predict import Speed, Speeds, requests_at, simulated, stretched
from viisim.validation.steps import StepTimes
from viisim.workload.request import Request

_SAME_TIME_S = 1e-6


class Deployment:
    """Measured runs of one deployment, and the same ones simulated.

    How fast the workers are is known in three ways. *As calibrated*: their profiles say it. *As
    gauged*: how many times as long as during the calibration the machine took, by a small work of
    its own beside the worker (`runtime.vllm_plugin.gauge`), every two seconds, and when it halted;
    it is this that predictions are judged with. *Their own speed*: what the steps of a run
    turned out to take, which is no prediction.
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
        return [run for run in self.runs if run.group not in (WARM_UP, CAPACITY)]

    # ----------------------------------------------------------------------------------
    # Answers

    def measured(self, run: MeasuredRun) -> Answers:
        """What the clients had of the workers."""
        return measured_answers(self.part, run, self.ids)

    def predicted(
        self,
        run: MeasuredRun,
        speeds: Speeds,
        experiment: Experiment | None = None,
    ) -> Answers:
        """The run simulated, at one of the speeds below; `experiment` if it is not the
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
        return simulated_answers(simulated(experiment, requests, run.seed, speeds))

    def predicted_at(self, run: MeasuredRun, rate_per_s: float, speeds: Speeds) -> Answers:
        """The run's requests, closer together or further apart, as are changes of the speed."""
        longer = run.rate_per_s / rate_per_s
        requests = requests_at(self.experiment, rate_per_s, longer * run.run_s, run.seed)
        then = stretched(speeds, longer)
        return simulated_answers(simulated(self.experiment, requests, run.seed, then))

    # ----------------------------------------------------------------------------------
    # Speed

    def gauged(self, run: MeasuredRun) -> Speeds:
        """As the machine was during the run; as calibrated where it was not gauged."""
        middles_s = np.arange(run.begin_s + SPAN_S / 2, run.end_s, SPAN_S)
        speeds = {}
        for replica_id, (gauge, response) in self._gauges.items():
            decode, prefill = response.to(gauge).slowdowns(gauge.cost_s(middles_s))
            halts_s = gauge.halts_s(run.begin_s, run.end_s)
            speeds[replica_id] = Speed(decode.tolist(), prefill.tolist(), halts_s)
        return speeds

    def own(self, run: MeasuredRun) -> Speeds:
        """What the workers' steps took in this run, all together."""
        speeds = {}
        for replica, _, log in self._worked([run]):
            factors = [float(log.duration_s.sum() / predicted_s(log, replica.profile).sum())]
            speeds[replica.id] = Speed(factors, factors)
        return speeds

    @cached_property
    def _gauges(self) -> dict[str, tuple[Gauge, Response]]:
        """Of the replicas that have one, and how these follow it, by their calibration."""
        found = {}
        for replica, entry in self.workers:
            gauge = read_gauge(self.part.gauge_file(replica.id))
            if gauge is not None:
                calibration = calibration_summary(Path(entry.profile_name).with_suffix(""))
                if (response := calibration["response"]) is not None:
                    found[replica.id] = gauge, Response(**response)
        return found

    def is_gauged(self, replica_id: str) -> bool:
        """Whether the machine was, in all runs."""
        if replica_id not in self._gauges:
            return False
        gauge, _ = self._gauges[replica_id]
        return gauge.end_s >= max(run.end_s for run in self.runs) - SPAN_S

    def halted(self, replica_id: str) -> float | None:
        """The share of the runs in which the machine halted; None where it was not gauged."""
        if not self.is_gauged(replica_id):
            return None
        gauge, _ = self._gauges[replica_id]
        begins_s, ends_s = np.array([(run.begin_s, run.end_s) for run in self.runs]).T
        moving = gauge.moving(begins_s, ends_s)
        return float(np.average(1 - moving, weights=ends_s - begins_s))

    def gauge_offset(self, replica_id: str) -> float | None:
        """See `Response.offset_of`; None where the machine was not gauged."""
        if not self.is_gauged(replica_id):
            return None
        gauge, response = self._gauges[replica_id]
        return response.offset_of(gauge)

    # ----------------------------------------------------------------------------------
    # Steps

    def step_times(self) -> Iterator[StepTimes]:
        """What each worker computed in the runs that are compared, and what its profile says."""
        runs = self.compared
        begins_s = [run.begin_s for run in runs]
        for replica, start_s, log in self._worked(runs):
            calibrated_s = predicted_s(log, replica.profile)
            slowdown = self._slowdown(replica, start_s, log, calibrated_s)
            usual = log.divided(slowdown)
            yield StepTimes(
                worker=f"{self.name} {replica.id}",
                start_s=start_s,
                decodes=log.decodes,
                measured_s=log.duration_s,
                calibrated_s=calibrated_s,
                refitted_s=slowdown * fit_steps([usual]).predict(usual),
                with_prefill=log.prefill_tokens > 0,
                slowdown=slowdown,
                run=np.searchsorted(begins_s, start_s, side="right") - 1,
            )

    def _slowdown(
        self, replica: SimulatedReplica, start_s: Floats, log: StepLog, calibrated_s: Floats
    ) -> Floats:
        """By the gauge, of each step."""
        if replica.id not in self._gauges:
            return np.ones(len(log))
        gauge, response = self._gauges[replica.id]
        nothing = np.zeros(len(log), dtype=np.int64)
        decodes = replace(log, prefill_tokens=nothing, prefill_pairs=nothing)
        decode_s = np.where(log.decodes > 0, predicted_s(decodes, replica.profile), 0.0)
        cost_s = gauge.cost_s(start_s + log.duration_s / 2)
        slowdown = response.to(gauge).slowdown(cost_s, decode_s, calibrated_s - decode_s)
        return slowdown / gauge.moving(start_s, start_s + log.duration_s)

    def _worked(
        self, runs: Sequence[MeasuredRun]
    ) -> Iterator[tuple[SimulatedReplica, Floats, StepLog]]:
        """The workers that computed anything in the runs: when their steps began, and the steps."""
        for replica, _ in self.workers:
            file = self.part.steps_file(replica.id)
            rows = self.part.steps(replica.id, runs)
            rows = [row for row in rows if row["decode_seqs"] or row["prefill_tokens"]]
            if rows:
                yield replica, np.array([row["start_s"] for row in rows]), step_log(rows, file)


def _is(request: Request, sent: Row | None) -> bool:
    """Whether it was due then, and had such a prompt and answer, if it had one."""
    if sent is None or abs(sent["due_s"] - request.arrived_ns / 1e9) > _SAME_TIME_S:
        return False
    lengths = request.view.prompt_tokens, request.output_tokens
    return bool(sent["error"]) or (sent["prompt_tokens"], sent["output_tokens"]) == lengths
