"""How fast the simulator is, as JSON.

    python benchmarks/simulator.py
    python benchmarks/simulator.py --blocks 1500 --shared
    python benchmarks/simulator.py --requests 1000000
    python benchmarks/simulator.py --trace conversation_trace.jsonl.gz --blocks 30000 --rate 1.5

By default 5,000 requests with the lengths of the Azure conversation trace, Poisson 12/s, on 4
replicas of `bench/a100_like`: 7,500 blocks of 16 tokens, 128 sequences, 2,048 batched tokens,
chunked prefill and prefix cache on.

Timed is everything from the first request generated to the summary of all metrics, on one core;
a trace is read before. `requests_per_s` and `tokens_per_s` (prompts and answers) are of the best
repetition: whatever else a machine does can only slow one down. `speedup_over_stepping` compares
with `engine.coalesce: false` on the first 2,000 requests at most, in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from policies import compiled
from policies.registry import policy_names
from viisim.config import Experiment, experiment_from
from viisim.experiment import replica_specs
from viisim.metrics import summarise
from viisim.records import FINISHED, SeedResult
from viisim.simulation import Simulation
from viisim.workload.info import trace_info

SEED = 1
MOST_STEPPED_REQUESTS = 2000
BLOCK_TOKENS = 16


def main() -> None:
    """Measure what the arguments describe and print it."""
    arguments = parse()
    experiment = experiment_of(arguments)
    run(shortened(experiment, 200))  # imports and caches
    seconds, result = [], None
    for _ in range(arguments.repeat or (5 if experiment_size(experiment) <= 20_000 else 1)):
        result = None  # a million rows twice would show in the peak
        elapsed_s, result = run(experiment)
        seconds.append(elapsed_s)
    assert result is not None, "there is at least one repetition"
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report = {
        **figures(result, seconds),
        "peak_rss_mib": round(peak_mib, 1),
        "compiled": compiled.status(),
        "speedup_over_stepping": round(speedup_over_stepping(experiment), 2),
        "repetitions": len(seconds),
        "setting": {key: str(value) for key, value in vars(arguments).items() if value},
    }
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=int, help="how many (5,000; of a trace: all)")
    add("--trace", type=Path, help="replay this trace instead of drawing requests")
    add("--rate", type=float, help="requests per second (12; of a trace: its own)")
    add("--policy", default="least_loaded", choices=policy_names())
    add("--replicas", type=int, default=4)
    add("--blocks", type=int, default=7500, help=f"KV blocks of {BLOCK_TOKENS} a replica")
    add("--shared", action="store_true", help="half the prompts begin with one of 20 prefixes")
    add("--repeat", type=int, help="repetitions (5; 1 for a long run)")
    return parser.parse_args()


def experiment_of(arguments: argparse.Namespace) -> Experiment:
    """The experiment that the arguments describe."""
    engine = {"num_kv_blocks": arguments.blocks}
    if arguments.trace is not None:  # what the cache can hold is served
        engine["max_model_len"] = (arguments.blocks - 1) * BLOCK_TOKENS
    replica = {
        "count": arguments.replicas,
        "device": "bench",
        "model": "a100_like",
        "engine": engine,
    }
    content = {
        "name": "benchmark",
        "policy": {"name": arguments.policy},
        "cluster": {"replicas": [replica]},
        "workload": workload_of(arguments),
        "slo": {"ttft_s": 5.0, "tpot_s": 0.1},
        "seeds": [SEED],
    }
    return experiment_from(content, "benchmark")


def workload_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The workload block of the experiment."""
    if arguments.trace is None:
        drawn: dict[str, Any] = {"kind": "synthetic", "preset": "azure_conv"}
        drawn["requests"] = arguments.requests or 5000
        drawn["rate_per_s"] = arguments.rate or 12.0
        if arguments.shared:
            drawn["prefixes"] = {"share": 0.5, "groups": 20, "tokens": 512}
        return drawn
    replayed: dict[str, Any] = {"kind": "trace", "path": str(arguments.trace.resolve())}
    if arguments.requests:
        replayed["limit"] = arguments.requests
    if arguments.rate:
        replayed["time_scale"] = (trace_info(arguments.trace).rate_per_s or 1.0) / arguments.rate
    return replayed


def run(experiment: Experiment) -> tuple[float, SeedResult]:
    """Seconds that one seed takes, and its result."""
    workload = experiment.build_workload()
    policy = experiment.policy.make()
    started_s = time.perf_counter()
    replicas = replica_specs(experiment)
    result = Simulation(replicas, policy, workload.requests(SEED), seed=SEED).run()
    summarise([result], experiment.slo, experiment.warmup_fraction)
    return time.perf_counter() - started_s, result


def figures(result: SeedResult, seconds: list[float]) -> dict[str, float | int]:
    """Speeds of the best repetition, and what was simulated."""
    requests = result.requests
    finished = requests["outcome"] == FINISHED
    total = int(finished.size)
    tokens = sum(int(requests[f"{kind}_tokens"][finished].sum()) for kind in ("prompt", "output"))
    return {
        "requests_per_s": round(total / min(seconds), 1),
        "requests_per_s_median": round(total / statistics.median(seconds), 1),
        "tokens_per_s": round(tokens / min(seconds)),
        "events_per_request": round(result.events / total, 3),
        "requests": total,
        "finished": int(finished.sum()),
        "preemptions": sum(replica.preemptions for replica in result.replicas),
        "engine_steps": sum(replica.steps for replica in result.replicas),
    }


def speedup_over_stepping(experiment: Experiment) -> float:
    """How many times longer the same requests take when every engine step is computed."""
    whole = shortened(experiment, MOST_STEPPED_REQUESTS)
    stepped = changed(whole, "cluster.replicas.0.engine.coalesce=false")
    coalesced_s = min(run(whole)[0] for _ in range(3))
    return run(stepped)[0] / coalesced_s


def experiment_size(experiment: Experiment) -> int:
    """How many requests it has."""
    return experiment.build_workload().total_requests


def shortened(experiment: Experiment, most: int) -> Experiment:
    """The same with at most so many requests."""
    key = "requests" if experiment.workload.kind == "synthetic" else "limit"
    return changed(experiment, f"workload.{key}={min(most, experiment_size(experiment))}")


def changed(experiment: Experiment, *overrides: str) -> Experiment:
    """The same with some keys set."""
    content = experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    return experiment_from(content, "benchmark", overrides=overrides)


if __name__ == "__main__":
    main()
