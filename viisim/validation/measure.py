"""Which runs a validation measures, one after the other, on deployments of real workers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from numpy.random import default_rng

from runtime.live.validation import Say, Served, deployed, measure_run
from runtime.processes import Home
from viisim.capacity import work_rate_per_s
from viisim.config import Experiment, load_experiment
from viisim.errors import InputError
from viisim.validation.config import AccuracyConfig, RankingConfig
from viisim.validation.measured import (
    CAPACITY,
    WARM_UP,
    MeasuredRun,
    Part,
    PlannedRun,
    work_columns,
)
from viisim.validation.predict import (
    capacity_under_backlog_per_s,
    closed_loop,
    requests_at,
    users_of,
    with_policy,
    with_workload,
)
from viisim.workload.request import Request


async def measure_accuracy(
    config: AccuracyConfig, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> None:
    """Find the capacity, then send one list a load, several times; the loads, and the capacity
    again, take turns, so that a machine that drifts does so under all. Raises InputError, as
    `deployed`."""
    experiment = load_experiment(config.file, overrides)
    policy, seed = experiment.policy.spec, experiment.seeds[0]
    async with deployed(config.file, overrides, part, home, say) as served:
        workers = _Workers(served, part, experiment, say)
        await workers.warm_up()
        rate_per_s = await _capacity_per_s(config, workers, 0)
        for repetition in range(config.repetitions):
            if 0 < repetition < config.capacity_runs:
                await _capacity_per_s(config, workers, repetition)
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
            await workers.measure_all([(run, experiment) for run in runs])


async def _capacity_per_s(config: AccuracyConfig, workers: _Workers, repetition: int) -> float:
    """Requests a second of the closed loop, this time."""
    experiment = workers.experiment
    users, seed = users_of(experiment), experiment.seeds[0]
    count = config.capacity_turns * users
    name = f"{CAPACITY}.{repetition}"
    run = PlannedRun(name, CAPACITY, experiment.policy.spec, seed, 0.0, 0.0)
    await workers.measure(run, closed_loop(experiment, users, count, seed))
    rate_per_s = work_rate_per_s(work_columns(workers.part.requests(name)), name)
    workers.say(f"capacity: {rate_per_s:.3g} requests/s, {users} users, {count} requests")
    return rate_per_s


async def measure_ranking(
    config: RankingConfig, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> None:
    """Send each workload under every policy; in each repetition they take turns in another order.
    Raises InputError, as `deployed`."""
    experiment = load_experiment(config.file, overrides)
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
    async with deployed(config.file, overrides, part, home, say) as served:
        workers = _Workers(served, part, experiment, say)
        await workers.warm_up()
        await workers.measure_all([(run, own) for _, run, own in runs])


class _Workers:
    """Those of a deployment, who are sent one run after the other."""

    def __init__(self, served: Served, part: Part, experiment: Experiment, say: Say) -> None:
        self._served = served
        self.part = part
        self.experiment = experiment
        self.say = say

    async def warm_up(self) -> None:
        """Fill every place once. A server's very first requests take seconds, so a few go ahead.
        Raises InputError when one fails."""
        everybody, seed = users_of(self.experiment), self.experiment.seeds[-1] + 1
        few = 2 * len(self.experiment.numbered_replicas())
        for number, users in enumerate((few, everybody)):
            name, policy = f"{WARM_UP}.{number}", self.experiment.policy.spec
            run = PlannedRun(name, WARM_UP, policy, seed + number, 0.0, 0.0)
            requests = closed_loop(self.experiment, users, users, run.seed)
            await measure_run(self._served, self.part, run, requests)
            self._check(name)

    def _check(self, name: str) -> None:
        """Raises InputError for a request of the run that failed: all would."""
        errors = [row["error"] for row in self.part.requests(name) if row["error"]]
        if errors:
            raise InputError(
                f"{self.part.requests_file(name)}: {len(errors)} requests failed ({errors[0]}); "
                f"look into {self.part.folder / 'deploy.log'}"
            )

    async def measure(self, planned: PlannedRun, requests: Sequence[Request]) -> MeasuredRun:
        """Send the requests, and wait for all answers."""
        return await measure_run(self._served, self.part, planned, requests)

    async def measure_all(self, runs: Sequence[tuple[PlannedRun, Experiment]]) -> None:
        """Send the requests of each run, which the experiment has at the run's rate."""
        for number, (planned, experiment) in enumerate(runs, start=1):
            requests = requests_at(experiment, planned.rate_per_s, planned.run_s, planned.seed)
            run = await self.measure(planned, requests)
            self.say(
                f"{number} of {len(runs)}: {run.name}: {len(requests)} requests, "
                f"{run.end_s - run.begin_s:.0f} s"
            )
