"""What each shipped policy costs, as JSON.

    python benchmarks/policy_costs.py
    python benchmarks/policy_costs.py --policies least_loaded,twin --replicas 4,256

(Not `policies.py`: in a script's own folder that name would hide the package.)

`us_per_decision`: microseconds for the two events of a request, `Arrived` and `Finished`, in
`SchedulerCore.handle`, by number of replicas; `us_own` is the part above a policy that does
nothing but take turns from a list made beforehand. Eight requests are in flight on each replica,
prompts begin with one of twenty prefixes, gauges come every second, and step costs are known. Of
a policy that holds, what is held is part of the cost. The best of several rounds counts: whatever
else a machine does can only slow one down.

`requests_per_s` is that of `benchmarks/simulator.py` in its default setting, summary included,
and `ratio` its quotient by that of `least_loaded`. Repetitions of all policies take turns, so
that a slow minute of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import simulator

from policies import compiled
from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    ClusterView,
    Dispatch,
    Finished,
    Gauges,
    Policy,
    ReplicaChanged,
    RequestView,
    StepCosts,
    Verdict,
)
from policies.registry import make_policy, policy_names

REFERENCE = "least_loaded"
INFLIGHT_PER_REPLICA = 8
SECONDS_IN_SERVICE = 2.0
PREFIXES = 20
COSTS = StepCosts((1, 64), (0.02, 0.04), (5e-8, 5e-8), 0.02, 1e-4, 0.0, 0.002, 2048)


class TakesTurns(Policy):
    """Takes turns from a list: what the core itself costs."""

    def __init__(self, replicas: int) -> None:
        self._turns = cycle(_names(replicas))

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The next in the list."""
        return Dispatch(request.id, next(self._turns))


class Load:
    """A steady stream of requests through one core; `pairs` times the events that it handles."""

    def __init__(self, policy: Policy, replicas: int) -> None:
        self._core = SchedulerCore(policy, seed=1)
        self._names = _names(replicas)
        self._inflight: deque[Dispatch] = deque()
        self._now_s = self._scraped_s = 0.0
        self._gap_s = SECONDS_IN_SERVICE / (INFLIGHT_PER_REPLICA * replicas)
        self._sent = 0
        for name in self._names:
            ready = ReplicaChanged(0.0, name, "ready", "m", (name,), 64, 7500, step_costs=COSTS)
            self._core.handle(ready)
        for _ in range(INFLIGHT_PER_REPLICA * replicas):
            self._arrive()
            self._now_s += self._gap_s

    def pairs(self, count: int) -> float:
        """Seconds that so many pairs of an arrival and an end take the core."""
        seconds = 0.0
        for _ in range(count):
            self._scrape()
            seconds += self._arrive() + self._finish()
            self._now_s += self._gap_s
        return seconds

    def _arrive(self) -> float:
        event = Arrived(self._now_s, self._request())
        self._sent += 1
        return self._handle(event)

    def _finish(self) -> float:
        oldest = self._inflight.popleft()
        return self._handle(Finished(self._now_s, oldest.request_id, oldest.attempt, 200))

    def _handle(self, event: Arrived | Finished) -> float:
        started_s = time.perf_counter()
        actions = self._core.handle(event)
        elapsed_s = time.perf_counter() - started_s
        self._inflight += [action for action in actions if isinstance(action, Dispatch)]
        return elapsed_s

    def _scrape(self) -> None:
        if self._now_s < self._scraped_s + 1:
            return
        self._scraped_s = self._now_s
        for name in self._names:
            gauges = Gauges(self._now_s, name, self._now_s, INFLIGHT_PER_REPLICA, 0, 0.3)
            for action in self._core.handle(gauges):
                if isinstance(action, Dispatch):
                    self._inflight.append(action)

    def _request(self) -> RequestView:
        number = self._sent
        prefix = 1000 * (number % PREFIXES)
        return RequestView(
            id=f"q{number}",
            model="m",
            arrived_s=self._now_s,
            prompt_tokens=500 + 7 * number % 1000,
            max_output_tokens=400,
            tenant=f"t{number % 3}",
            prefix_blocks=(prefix, prefix + 1, -1 - number),
            prefix_block_tokens=128,
        )


def main() -> None:
    """Measure what the arguments describe and print it."""
    arguments = parse()
    report = {
        "us_per_decision": decisions(arguments.policies, arguments.replicas, arguments.pairs),
        "simulator": speeds(arguments.policies, arguments.requests, arguments.repeat),
        "compiled": compiled.status(),
    }
    print(json.dumps(report, indent=2))


def parse() -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--policies", type=_words, default=policy_names(), help="names, with commas between")
    add("--replicas", type=_counts, default=[4, 16, 64], help="numbers, with commas between")
    add("--pairs", type=int, default=500, help="pairs of events in one round of eight")
    add("--requests", type=int, default=5000, help="of the simulated workload")
    add("--repeat", type=int, default=3, help="repetitions of each simulation")
    return parser.parse_args()


def decisions(policies: Sequence[str], replicas: Sequence[int], pairs: int) -> dict[str, Any]:
    """Microseconds a pair, by policy and number of replicas."""
    found: dict[str, Any] = {name: {} for name in policies}
    for count in replicas:
        loads = {name: Load(make_policy(name), count) for name in policies}
        loads[""] = Load(TakesTurns(count), count)
        best_us = dict.fromkeys(loads, float("inf"))
        for _ in range(8):
            for name, load in loads.items():
                best_us[name] = min(best_us[name], load.pairs(pairs) / pairs * 1e6)
        for name in policies:
            own_us = max(best_us[name] - best_us[""], 0.0)
            found[name][str(count)] = {"us": round(best_us[name], 2), "us_own": round(own_us, 2)}
    return found


def speeds(policies: Sequence[str], requests: int, repeat: int) -> dict[str, Any]:
    """Requests a second in the simulator benchmark, and relative to `REFERENCE`."""
    setting = {"requests": requests, "trace": None, "rate": None}
    setting |= {"replicas": 4, "blocks": 7500, "shared": False}
    experiments = {
        name: simulator.experiment_of(Namespace(policy=name, **setting))
        for name in dict.fromkeys([REFERENCE, *policies])
    }
    best_s = dict.fromkeys(experiments, float("inf"))
    for experiment in experiments.values():
        simulator.run(simulator.shortened(experiment, 200))  # imports and caches
    for _ in range(repeat):
        for name, experiment in experiments.items():
            best_s[name] = min(best_s[name], simulator.run(experiment)[0])
    return {
        name: {
            "requests_per_s": round(requests / best_s[name], 1),
            "ratio": round(best_s[REFERENCE] / best_s[name], 3),
        }
        for name in experiments
    }


def _names(replicas: int) -> list[str]:
    return [f"r{number:03}" for number in range(replicas)]


def _words(text: str) -> list[str]:
    return text.split(",")


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
