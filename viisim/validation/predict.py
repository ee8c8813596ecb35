"""What the simulator says of the runs that a validation measures, and the requests of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import merge
from itertools import islice
from math import ceil
from operator import attrgetter
from typing import TypeAlias

from viisim.calibration.gauge import SPAN_S
from viisim.capacity import backlogged, offered_per_s, work_rate_per_s
from viisim.config import (
    Experiment,
    PolicyConfig,
    SimulatedReplica,
    WorkloadConfig,
    scaled,
)
from viisim.engine.step_time import StepTime as EngineStepTime
from viisim.errors import InputError
from viisim.experiment import replica_specs
from viisim.fault_player import FaultPlan
from viisim.faults import Fault
from viisim.profile import StepTime
from viisim.records import SeedResult
from viisim.simulation import Simulation
from viisim.step_costs import step_time_of
from viisim.workload.request import Request

_USERS_PER_PLACE = 2
"""Of the closed loop that finds the capacity: as many wait as are served."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a replica during a run; no policy is told of it."""

    decode: Sequence[float]
    prefill: Sequence[float]
    """How many times as long as usual decode and prefill take in each span (`SPAN_S` each, from the
    beginning of the run; the last goes on)."""
    halts_s: Sequence[tuple[float, float]] = ()
    """When the machine computes nothing: beginning, from that of the run, and length, in order."""


Speeds: TypeAlias = Mapping[str, Speed]
"""By replica; one that is not named is as calibrated."""

AS_CALIBRATED: Speeds = {}


def simulated(
    experiment: Experiment,
    requests: Iterable[Request],
    seed: int,
    speeds: Speeds = AS_CALIBRATED,
) -> SeedResult:
    """These requests in the experiment's cluster, under its policy."""
    cluster = experiment.cluster
    replicas = {replica.id: replica for replica in experiment.simulated_replicas()}
    return Simulation(
        replica_specs(experiment),
        experiment.policy.make(),
        requests,
        seed=seed,
        scrape_s=cluster.scrape_s,
        scrape_delay_s=cluster.scrape_delay_s,
        limits=experiment.limits.limits(),
        predictor=experiment.make_predictor(seed),
        faults=FaultPlan(_changes_of(speeds, replicas), {}),
    ).run()


def _changes_of(speeds: Speeds, replicas: Mapping[str, SimulatedReplica]) -> Iterator[Fault]:
    """In order of time."""
    own = [_changes(replicas[replica_id], speed) for replica_id, speed in speeds.items()]
    return merge(*(fault for each in own for fault in each), key=attrgetter("at_s"))


def _changes(replica: SimulatedReplica, speed: Speed) -> tuple[Iterator[Fault], Iterator[Fault]]:
    """Of its speed, each until the next; and its halts."""
    changes = (
        Fault(span * SPAN_S, "slow", replica.id, step_time=_step_time(replica, decode, prefill))
        for span, (decode, prefill) in enumerate(zip(speed.decode, speed.prefill, strict=True))
    )
    halts = (Fault(at_s, "halt", replica.id, length_s) for at_s, length_s in speed.halts_s)
    return changes, halts


def _step_time(replica: SimulatedReplica, decode: float, prefill: float) -> EngineStepTime:
    """While these take so many times as long."""
    slow = slowed(replica.profile.step_time, decode, prefill)
    profile = replica.profile.model_copy(update={"step_time": slow})
    return step_time_of(profile, replica.settings.max_num_seqs, replica.slowdown)


def slowed(times: StepTime, decode: float, prefill: float) -> StepTime:
    """A profile's step times, those of decode and prefill so many times as long."""
    points = [
        point.model_copy(
            update={
                "base_s": decode * point.base_s,
                "per_context_token_s": decode * point.per_context_token_s,
            }
        )
        for point in times.decode
    ]
    terms = {name: prefill * value for name, value in times.prefill.model_dump().items()}
    return times.model_copy(
        update={
            "decode": tuple(points),
            "prefill": times.prefill.model_copy(update=terms),
            "host_overhead_s": decode * times.host_overhead_s,
        }
    )


def stretched(speeds: Speeds, factor: float) -> Speeds:
    """As they are for a run whose requests arrive over a time so many times as long."""

    def longer(factors: Sequence[float]) -> list[float]:
        return [factors[int(span / factor)] for span in range(ceil(len(factors) * factor))]

    return {
        replica_id: Speed(
            longer(speed.decode),
            longer(speed.prefill),
            [(factor * at_s, factor * length_s) for at_s, length_s in speed.halts_s],
        )
        for replica_id, speed in speeds.items()
    }


def with_workload(experiment: Experiment, workload: WorkloadConfig) -> Experiment:
    """The experiment with other traffic."""
    return experiment.model_copy(update={"workload": workload})


def with_policy(experiment: Experiment, policy: PolicyConfig) -> Experiment:
    """The experiment under another policy, which is told the same objectives."""
    own = policy.model_copy(deep=True)
    own.set_objectives(experiment.slo)
    return experiment.model_copy(update={"policy": own})


def requests_at(
    experiment: Experiment, rate_per_s: float, run_s: float, seed: int
) -> list[Request]:
    """The experiment's requests at another rate: those that arrive within `run_s`, which later
    turns of their sessions may exceed. Raises InputError when there are none, or too few."""
    factor = rate_per_s / offered_per_s(experiment)
    changed = experiment.model_copy(update={"workload": scaled(experiment.workload, factor)})
    workload = changed.build_workload()
    until_ns = round(run_s * 1e9)
    drawn = workload.requests(seed)
    found = []
    while (request := next(drawn, None)) is not None and request.arrived_ns < until_ns:
        found.append(request)
    if found and request is not None:  # one came after them
        return found
    raise InputError(
        f"{experiment.name}: workload.requests: {workload.total_requests} do not fill "
        f"{run_s:g} s at {rate_per_s:.3g} a second; raise them"
    )


def capacity_under_backlog_per_s(experiment: Experiment) -> float:
    """Requests a second that the simulated cluster finishes when all are there at once."""
    changed = backlogged(experiment)
    seed = changed.seeds[0]
    result = simulated(changed, changed.build_workload().requests(seed), seed)
    return work_rate_per_s(result.requests, experiment.name)


# --------------------------------------------------------------------------------------
# A closed loop


def closed_loop_per_s(
    experiment: Experiment,
    requests: int,
    seed: int,
    speeds: Speeds = AS_CALIBRATED,
) -> float:
    """Requests a second that the simulated cluster answers to the closed loop."""
    loop = closed_loop(experiment, users_of(experiment), requests, seed)
    result = simulated(experiment, loop, seed, speeds)
    return work_rate_per_s(result.requests, experiment.name)


def users_of(experiment: Experiment) -> int:
    """Of the closed loop that finds the capacity: twice as many as the engines have places."""
    places = sum(replica.settings.max_num_seqs for replica in experiment.simulated_replicas())
    return _USERS_PER_PLACE * places


def closed_loop(experiment: Experiment, users: int, requests: int, seed: int) -> list[Request]:
    """The first request of every user; each asks the next of its own once it is answered.

    Raises InputError for a workload with too few, or with sessions of its own.
    """
    drawn = list(islice(experiment.build_workload().requests(seed), requests))
    if len(drawn) < max(requests, users) or any(request.next_turn for request in drawn):
        raise InputError(
            f"{experiment.name}: workload: the capacity takes {max(requests, users)} requests "
            "without sessions; raise workload.requests"
        )
    return [_turn(drawn[user::users], 0, 0) for user in range(users)]


def _turn(own: Sequence[Request], number: int, now_ns: int) -> Request:
    """A user's request, and behind it the next."""
    request = own[number]
    goes_on = number + 1 < len(own)
    return replace(
        request,
        view=replace(request.view, arrived_s=now_ns / 1e9),
        arrived_ns=now_ns,
        next_turn=partial(_turn, own, number + 1) if goes_on else None,
    )
