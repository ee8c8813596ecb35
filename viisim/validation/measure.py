"""Which runs a validation measures, one after the other, on deployments of real workers."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import default_rng

from runtime.live_validation import Ask, Say, Served, deployed, measured
from runtime.processes import Home
from viisim.capacity import work_rate_per_s
from viisim.config import Experiment, load_experiment
from viisim.validation.config import AccuracyConfig, RankingConfig
from viisim.validation.measured import CAPACITY, WARM_UP, Part, work_columns
from viisim.validation.predict import (
    capacity_under_backlog_per_s,
    closed_loop,
    requests_at,
    requests_of_capacity,
    users_of,
    with_policy,
    with_workload,
)


async def measure_accuracy(
    config: AccuracyConfig, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> None:
    """Find the capacity, then send one list a load, several times; the loads take turns, so that
    a machine that drifts does so under all of them. Raises InputError, as `deployed`."""
    file = config.located(config.experiment)
    experiment = load_experiment(file, overrides)
    policy, seed = experiment.policy.spec, experiment.seeds[0]
    async with deployed(file, overrides, part, home, say) as served:
        await _warm_up(served, part, experiment)
        users = users_of(experiment)
        count = requests_of_capacity(experiment, config.run_s)
        loop = closed_loop(experiment, users, count, seed)
        await measured(served, part, Ask(CAPACITY, CAPACITY, policy, seed, 0.0, 0.0, loop))
        rows = part.requests(CAPACITY)
        capacity_per_s = work_rate_per_s(work_columns(rows), CAPACITY)
        say(f"capacity: {capacity_per_s:.3g} requests/s, {users} users, {count} requests")
        asks = [
            Ask(
                name=f"load-{load:g}.{repetition}",
                group=f"{load:g}",
                policy=policy,
                seed=seed + 2 + index,
                rate_per_s=load * capacity_per_s,
                run_s=config.run_s,
                requests=requests_at(
                    experiment, load * capacity_per_s, config.run_s, seed + 2 + index
                ),
            )
            for repetition in range(config.repetitions)
            for index, load in enumerate(config.loads)
        ]
        await _measure_all(served, part, asks, say)


async def measure_ranking(
    config: RankingConfig, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> None:
    """Send each workload under every policy; in each repetition they take turns in another order.
    Raises InputError, as `deployed`."""
    file = config.located(config.experiment)
    experiment = load_experiment(file, overrides)
    asks = []
    for repetition in range(config.repetitions):
        order = default_rng(repetition).permutation(len(config.policies))
        for ranked in config.workloads:
            changed = with_workload(experiment, ranked.workload)
            rate_per_s = ranked.load * capacity_under_backlog_per_s(changed)
            seed = experiment.seeds[0] + repetition
            requests = requests_at(changed, rate_per_s, config.run_s, seed)
            for policy in (config.policies[index] for index in order):
                name = f"{ranked.name}.{policy.name}-{config.policies.index(policy)}.{repetition}"
                own = with_policy(changed, policy).policy.spec
                asks.append(Ask(name, ranked.name, own, seed, rate_per_s, config.run_s, requests))
    async with deployed(file, overrides, part, home, say) as served:
        await _warm_up(served, part, experiment)
        await _measure_all(served, part, asks, say)


async def _warm_up(served: Served, part: Part, experiment: Experiment) -> None:
    """Fill every place once. A server's very first requests take seconds, so a few go ahead."""
    everybody, seed = users_of(experiment), experiment.seeds[-1] + 1
    for number, users in enumerate((2 * len(experiment.numbered_replicas()), everybody)):
        name = f"{WARM_UP}.{number}"
        requests = closed_loop(experiment, users, users, seed + number)
        policy = experiment.policy.spec
        await measured(served, part, Ask(name, WARM_UP, policy, seed, 0.0, 0.0, requests))


async def _measure_all(served: Served, part: Part, asks: Sequence[Ask], say: Say) -> None:
    for number, ask in enumerate(asks, start=1):
        run = await measured(served, part, ask)
        say(
            f"{number} of {len(asks)}: {ask.name}: {len(ask.requests)} requests, "
            f"{run.end_s - run.begin_s:.0f} s"
        )
