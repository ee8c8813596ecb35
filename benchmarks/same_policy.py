"""An A/A test of `viisim compare`: how often it finds a difference where there is none.

    python benchmarks/same_policy.py

The policy `random` under two names: the same requests, other dice. Compared as `viisim compare`
does, over many sets of five seeds; prints JSON: for each figure, in how many sets the verdict was
"no difference shown". At a level of 5 % that should be about 95 of 100, or more.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from policies.interface import ClusterView, RequestView, Verdict
from policies.random import Random
from viisim.comparison import METRICS
from viisim.config import Experiment, load_experiment
from viisim.experiment import run_seed
from viisim.metrics import SeedMetrics, seed_metrics
from viisim.statistics import holm, paired_difference, verdict

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 5


class OtherDice(Random):
    """The same rule; every decision throws the dice once more."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        self.rng.random()
        return super().place(request, view)


def experiment(policy: str) -> Experiment:
    return load_experiment(
        ROOT / "experiments" / "least_loaded.yaml",
        [f"policy={policy}", "workload.requests=300"],
    )


def measured(seed: int) -> tuple[SeedMetrics, SeedMetrics]:
    """Both names, on the requests of one seed."""
    other = f"{{class: '{Path(__file__).resolve()}:OtherDice'}}"
    pair = []
    for policy in ("{name: random}", other):
        one = experiment(policy)
        pair.append(seed_metrics(run_seed(one, seed), one.slo, one.warmup_fraction))
    return pair[0], pair[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    seeds = range(1, SEEDS * options.sets + 1)
    with ProcessPoolExecutor(options.jobs) as pool:
        pairs = list(pool.map(measured, seeds, chunksize=10))
    same: Counter[str] = Counter()
    for start in range(0, len(pairs), SEEDS):
        some = pairs[start : start + SEEDS]
        for metric in METRICS:
            first, second = ([metric.of(pair[side]) for pair in some] for side in (0, 1))
            if None in first or None in second:
                continue  # not defined here: no tenants
            difference = paired_difference(second, first)
            adjusted = holm([difference["p_value"]])[0]
            same[metric.key] += verdict(difference, adjusted, metric.better) == (
                "no difference shown"
            )
    print(json.dumps({"sets": options.sets, "seeds_in_a_set": SEEDS, **same}, indent=2))


if __name__ == "__main__":
    main()
