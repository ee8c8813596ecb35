"""What a full decode step of a real worker takes besides its work, as JSON.

    experiments/vllm_cpu/install.sh
    python benchmarks/step_conditions.py --rounds 8

Starts the two vLLM workers of `experiments/validation/vllm_cpu_equal.yaml`, a core each, and fills
all places of both with sequences that decode, under these conditions in turns:

- `direct`: sequences of one length, sent straight to the workers,
- `proxied`: the same ones, each worker behind a `viisim deploy`,
- `ragged`: straight to them, lengths that differ and have the same mean.

`step_ms` is the mean step with all places taken, over rounds and workers; `over_direct` its
quotient by the same worker's of the same round, less one, with half the 95 % interval of the mean
over rounds (its `seeds`). Rounds go through the conditions forwards and backwards, so that a
machine that drifts does so under all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

import numpy as np

from runtime.cluster import Planned, planned
from runtime.live.calibration import send
from runtime.live.front import fronted
from runtime.live.sweep import Ask, Phase
from runtime.live.worker import running
from runtime.processes import Home
from viisim.calibration.own_records import step_log
from viisim.config import load_experiment
from viisim.errors import InputError
from viisim.statistics import estimate

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments/validation/vllm_cpu_equal.yaml"
DIRECT, PROXIED, RAGGED = CONDITIONS = ("direct", "proxied", "ragged")
SHORTEST_TOKENS, LONGEST_TOKENS = 16, 260
OUTPUT_TOKENS = 140
RECORDED_S = 1.0
"""A recorder's last lines are in the file within half a second."""

Steps: TypeAlias = list[list[float]]
"""By round, each worker's mean step in seconds."""


def phase(condition: str, places: int) -> Phase:
    """As many sequences as the engine takes."""
    lengths = np.linspace(SHORTEST_TOKENS, LONGEST_TOKENS, places)
    if condition != RAGGED:
        lengths = np.full(places, lengths.mean())
    return Phase(condition, tuple((Ask(round(length), OUTPUT_TOKENS),) for length in lengths))


async def full_steps_s(replicas: list[Planned], condition: str, home: Home) -> list[float]:
    """Each worker's mean step that decodes in all places, while all workers do."""
    async with AsyncExitStack() as stack:
        urls = [replica.url for replica in replicas]
        if condition == PROXIED:  # all of them serve before any request is sent
            urls = [await stack.enter_async_context(fronted(one, home)) for one in replicas]
        begin_s = time.monotonic()
        own = (
            send(url, one.entry.model, condition, phase(condition, one.entry.engine.max_num_seqs))
            for url, one in zip(urls, replicas, strict=True)
        )
        await asyncio.gather(*own)
        await asyncio.sleep(RECORDED_S)
    return [mean_step_s(one, home, begin_s) for one in replicas]


def mean_step_s(replica: Planned, home: Home, since_s: float) -> float:
    """Of the recorded steps from then on that decode in all places."""
    file, places = steps_file(replica, home), replica.entry.engine.max_num_seqs
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    log = step_log([row for row in rows if row["start_s"] >= since_s], file)
    return float(log.duration_s[(log.decodes == places) & (log.prefill_tokens == 0)].mean())


def steps_file(replica: Planned, home: Home) -> Path:
    return home.folder / f"{replica.id}.steps.jsonl"


async def measure(rounds: int, home: Home) -> dict[str, Steps]:
    """By condition. Raises InputError when the workers do not start."""
    replicas = planned(load_experiment(EXPERIMENT))
    found: dict[str, Steps] = {condition: [] for condition in CONDITIONS}
    async with AsyncExitStack() as stack:
        for replica in replicas:
            file = steps_file(replica, home)
            await stack.enter_async_context(running(replica, (), home, file, replica.id))
        await full_steps_s(replicas, DIRECT, home)  # a server's first requests take longer
        for number in range(rounds):
            for condition in CONDITIONS[:: -1 if number % 2 else 1]:
                found[condition].append(await full_steps_s(replicas, condition, home))
            told = ", ".join(f"{name} {1e3 * np.mean(own[-1]):.1f}" for name, own in found.items())
            print(f"round {number + 1} of {rounds}: {told} ms", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="at least two")
    rounds = max(2, parser.parse_args().rounds)
    with tempfile.TemporaryDirectory() as folder, Home(Path(folder)) as home:
        try:
            found = asyncio.run(measure(rounds, home))
        except InputError as error:
            sys.exit(str(error))
    conditions = {
        name: {
            "step_ms": round(1e3 * float(np.mean(steps_s)), 2),
            "over_direct": estimate(
                (np.array(steps_s) / np.array(found[DIRECT]) - 1).mean(axis=1).tolist()
            ),
        }
        for name, steps_s in found.items()
    }
    print(json.dumps({"rounds": rounds, "conditions": conditions}, indent=2))


if __name__ == "__main__":
    main()
