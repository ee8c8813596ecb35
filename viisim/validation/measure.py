"""Which runs a validation measures, one after the other, on deployments of real workers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from numpy.random import default_rng

from runtime.live_validation import Say, Served, deployed, measured
from runtime.processes import Home
from viisim.capacity import work_rate_per_s
from viisim.config import Experiment, load_experiment
from viisim.validation.config import AccuracyConfig, RankingConfig
from viisim.validation.measured import CAPACITY, WARM_UP, Part, PlannedRun, work_columns
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
    """Find the capacity, then send one list a load, several times; the loads, and the capacity
    again, take turns, so that a machine that drifts does so under all. Raises InputError, as
    `deployed`."""
    file = config.located(config.experiment)
    experiment = load_experiment(file, overrides)
    policy, seed = experiment.policy.spec, experiment.seeds[0]
    async with deployed(file, overrides, part, home, say) as served:
        await _warm_up(served, part, experiment)
        rate_per_s = await _capacity_per_s(config, experiment, served, part, 0, say)
        for repetition in range(config.repetitions):
            if 0 < repetition < config.capacity_runs:
                await _capacity_per_s(config, experiment, served, part, repetition, say)
            runs = [
                PlannedRun(
                    name=f"load-{load:g}.{repetition}",
                    group=f"{load:g}",
                    policy=policy,
                    seed=seed + 2 + index,
                    rate_per_s=load * rate_per_s,
                    run_s=config.run_s,
                )
                for index, load in enumerate(config.loads)
            ]
            say(f"repetition {repetition + 1} of {config.repetitions}")
            await _measure_all(served, part, [(run, experiment) for run in runs], say)


async def _capacity_per_s(
    config: AccuracyConfig,
    experiment: Experiment,
    served: Served,
    part: Part,
    repetition: int,
    say: Say,
) -> float:
    """Requests a second of the closed loop, this time."""
    users, seed = users_of(experiment), experiment.seeds[0]
    count = requests_of_capacity(experiment, config.run_s)
    name, policy = f"{CAPACITY}.{repetition}", experiment.policy.spec
    run = PlannedRun(name, CAPACITY, policy, seed, 0.0, 0.0)
    await measured(served, part, run, closed_loop(experiment, users, count, seed))
    rate_per_s = work_rate_per_s(work_columns(part.requests(name)), name)
    say(f"capacity: {rate_per_s:.3g} requests/s, {users} users, {count} requests")
    return rate_per_s


async def measure_ranking(
    config: RankingConfig, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> None:
    """Send each workload under every policy; in each repetition they take turns in another order.
    Raises InputError, as `deployed`."""
    file = config.located(config.experiment)
    experiment = load_experiment(file, overrides)
    runs = []
    for ranked in config.workloads:
        changed = with_workload(experiment, ranked.workload)
        rate_per_s = ranked.load * capacity_under_backlog_per_s(changed)
        for repetition in range(config.repetitions):
            seed = experiment.seeds[0] + repetition
            for number in default_rng(repetition).permutation(len(config.policies)):
                own = with_policy(changed, config.policies[number])
                name = f"{ranked.name}.{own.policy.name}-{number}.{repetition}"
                run = PlannedRun(name, ranked.name, own.policy.spec, seed, rate_per_s, config.run_s)
                runs.append((repetition, run, own))
    runs.sort(key=itemgetter(0))  # workloads take turns, too
    async with deployed(file, overrides, part, home, say) as served:
        await _warm_up(served, part, experiment)
        await _measure_all(served, part, [(run, own) for _, run, own in runs], say)


async def _warm_up(served: Served, part: Part, experiment: Experiment) -> None:
    """Fill every place once. A server's very first requests take seconds, so a few go ahead."""
    everybody, seed = users_of(experiment), experiment.seeds[-1] + 1
    for number, users in enumerate((2 * len(experiment.numbered_replicas()), everybody)):
        name, policy = f"{WARM_UP}.{number}", experiment.policy.spec
        run = PlannedRun(name, WARM_UP, policy, seed + number, 0.0, 0.0)
        await measured(served, part, run, closed_loop(experiment, users, users, run.seed))


async def _measure_all(
    served: Served, part: Part, runs: Sequence[tuple[PlannedRun, Experiment]], say: Say
) -> None:
    """Send the requests of each run, which the experiment has at the run's rate."""
    for number, (planned, experiment) in enumerate(runs, start=1):
        requests = requests_at(experiment, planned.rate_per_s, planned.run_s, planned.seed)
        run = await measured(served, part, planned, requests)
        say(
            f"{number} of {len(runs)}: {run.name}: {len(requests)} requests, "
            f"{run.end_s - run.begin_s:.0f} s"
        )
