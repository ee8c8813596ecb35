"""What the simulator says of the runs that a validation measures, and the requests of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from viisim.capacity import backlogged, offered_per_s, work_rate_per_s
from viisim.config import Experiment, PolicyConfig, WorkloadConfig, scaled
from viisim.errors import InputError
from viisim.experiment import replica_specs
from viisim.records import SeedResult
from viisim.simulation import Simulation
from viisim.workload.config import SyntheticWorkload
from viisim.workload.request import Request

_USERS_PER_PLACE = 2
"""Of the closed loop that finds the capacity: as many wait as are served."""
_PROBE = SyntheticWorkload.model_validate(
    {
        "kind": "synthetic",
        "rate_per_s": 1.0,
        "requests": 10_000,
        "prompt_tokens": {0: 16, 100: 160},
        "output_tokens": 32,
    }
)
"""Short, so that it costs seconds, and of several lengths, as batches have."""


def simulated(
    experiment: Experiment,
    requests: Iterable[Request],
    seed: int,
    slowdowns: Mapping[str, float] | None = None,
) -> SeedResult:
    """These requests in the experiment's cluster, under its policy; `slowdowns` as for
    `replica_specs`."""
    cluster = experiment.cluster
    return Simulation(
        replica_specs(experiment, slowdowns),
        experiment.policy.make(),
        requests,
        seed=seed,
        scrape_s=cluster.scrape_s,
        scrape_delay_s=cluster.scrape_delay_s,
        limits=experiment.limits.limits(),
        predictor=experiment.make_predictor(seed),
    ).run()


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
    slowdowns: Mapping[str, float] | None = None,
) -> float:
    """Requests a second that the simulated cluster answers to the closed loop; `slowdowns` as for
    `replica_specs`."""
    loop = closed_loop(experiment, users_of(experiment), requests, seed)
    result = simulated(experiment, loop, seed, slowdowns)
    return work_rate_per_s(result.requests, experiment.name)


def users_of(experiment: Experiment) -> int:
    """Of the closed loop that finds the capacity: twice as many as the engines have places."""
    places = sum(replica.settings.max_num_seqs for replica in experiment.simulated_replicas())
    return _USERS_PER_PLACE * places


def probe_of(experiment: Experiment) -> list[Request]:
    """A few seconds of work, always the same: half of the engines' places are taken. How long
    its steps take tells how fast the workers are just then."""
    users = users_of(experiment) // (2 * _USERS_PER_PLACE)
    return closed_loop(with_workload(experiment, _PROBE), users, users, seed=0)


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
