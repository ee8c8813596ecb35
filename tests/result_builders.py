"""Results as a simulation would leave them, from queues that are simple enough to know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from viisim.records import (
    FINISHED,
    ITL_EDGES_S,
    REQUEST_COLUMNS,
    SAMPLE_COLUMNS,
    ReplicaTotals,
    SeedResult,
)

NS = 10**9


@dataclass(frozen=True)
class Objectives:
    """An SLO, as `viisim.config` has it."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


def row(arrived_s: float, *after_s: float, **other: Any) -> dict[str, Any]:
    """A request by the seconds at which it was dispatched, started, had its first token and
    finished: by default, all of one second after the one before."""
    instants = [arrived_s, *after_s]
    instants += [instants[-1] + i for i in range(1, 6 - len(instants))]
    names = ("arrived_ns", "dispatched_ns", "started_ns", "first_token_ns", "finished_ns")
    times = {name: round(s * NS) for name, s in zip(names, instants, strict=True)}
    defaults = {"outcome": FINISHED, "attempts": 1, "streamed": True, "output_tokens": 11}
    return {"prompt_tokens": 100} | defaults | times | other


def requests(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The columns of the rows; what a row leaves out is 0."""
    numbered = [{"request": number} | dict(one) for number, one in enumerate(rows)]
    return {
        name: np.array([one.get(name, 0) for one in numbered], dtype=dtype)
        for name, dtype in REQUEST_COLUMNS.items()
    }


def totals(**other: Any) -> ReplicaTotals:
    """A replica's counters, 0 but for what is given."""
    names = set(ReplicaTotals.__slots__) - {"itl_counts", "usable_kv_blocks"}
    counts = np.zeros(ITL_EDGES_S.size - 1, dtype=np.int64)
    defaults = dict.fromkeys(names, 0) | {"itl_counts": counts, "usable_kv_blocks": 100}
    return ReplicaTotals(**(defaults | other))


def samples(rows: Sequence[tuple[int, ...]] = ()) -> dict[str, NDArray[Any]]:
    """Columns of samples, given as rows in the order of `SAMPLE_COLUMNS`; what a row leaves out is
    0."""
    whole = [(*row, *[0] * (len(SAMPLE_COLUMNS) - len(row))) for row in rows]
    columns = zip(*whole, strict=True) if rows else [[]] * len(SAMPLE_COLUMNS)
    return {
        name: np.array(column, dtype=dtype)
        for (name, dtype), column in zip(SAMPLE_COLUMNS.items(), columns, strict=True)
    }


def result(*rows: Mapping[str, Any], seed: int = 1, **other: Any) -> SeedResult:
    """One seed of the given requests on one replica."""
    columns = requests(rows)
    defaults: dict[str, Any] = {
        "replica_ids": ("r0",),
        "samples": samples(),
        "replicas": (totals(),),
        "ended_ns": int(columns["finished_ns"].max(initial=0)),
    }
    return SeedResult(seed=seed, requests=columns, **(defaults | other))


def queue(load: float, number: int, seed: int = 1, servers: int = 1) -> SeedResult:
    """M/M/1 queues of load `load` side by side, a request each in turn, ten arrivals a second.

    Starts follow Lindley's recursion in closed form: a request starts when it has arrived and
    all before it are served. The first token comes after a tenth of the service time.
    """
    rng = np.random.default_rng(seed)
    arrived = np.cumsum(rng.exponential(0.1 * NS, number)).astype(np.int64)
    service = rng.exponential(0.1 * NS * load * servers, number).astype(np.int64) + 100
    started = np.empty_like(arrived)
    for server in range(servers):
        own = slice(server, None, servers)
        done = np.cumsum(service[own])
        idle = np.maximum.accumulate(arrived[own] - done + service[own])
        started[own] = done + idle - service[own]
    columns = {name: np.zeros(number, dtype=dtype) for name, dtype in REQUEST_COLUMNS.items()}
    columns |= {
        "request": np.arange(number),
        "replica": (np.arange(number) % servers).astype(np.int16),
        "attempts": np.ones(number, dtype=np.int16),
        "prompt_tokens": rng.integers(1, 2000, number).astype(np.int32),
        "output_tokens": rng.integers(1, 200, number).astype(np.int32),
        "streamed": rng.random(number) < 0.8,
        "arrived_ns": arrived,
        "dispatched_ns": arrived.copy(),
        "started_ns": started,
        "first_token_ns": started + service // 10,
        "finished_ns": started + service,
    }
    return SeedResult(
        seed=seed,
        replica_ids=tuple(f"r{server}" for server in range(servers)),
        requests=columns,
        samples=_samples(columns, servers),
        replicas=tuple(_totals(columns, server) for server in range(servers)),
        ended_ns=int(columns["finished_ns"].max()),
    )


def _samples(columns: Mapping[str, NDArray[Any]], servers: int) -> dict[str, NDArray[Any]]:
    """Two samples a second; a sequence runs or waits, and holds 7 blocks of 100."""
    times = np.arange(0, columns["finished_ns"].max(), NS // 2)
    present = np.empty((times.size, servers), dtype=np.int64)
    for server in range(servers):
        own = columns["replica"] == server
        arrived, left = columns["arrived_ns"][own], np.sort(columns["finished_ns"][own])
        present[:, server] = np.searchsorted(arrived, times) - np.searchsorted(left, times)
    running = np.minimum(present, 8)
    nothing = np.zeros(times.size * servers)
    values = dict.fromkeys(SAMPLE_COLUMNS, nothing) | {
        "time_ns": np.repeat(times, servers),
        "replica": np.tile(np.arange(servers), times.size),
        "running": running.ravel(),
        "waiting": (present - running).ravel(),
        "kv_blocks_used": (7 * running).ravel(),
    }
    return {name: values[name].astype(dtype) for name, dtype in SAMPLE_COLUMNS.items()}


def _totals(columns: Mapping[str, NDArray[Any]], server: int) -> ReplicaTotals:
    own = columns["replica"] == server
    gaps = np.maximum(columns["output_tokens"][own] - 1, 1)
    gap_s = (columns["finished_ns"] - columns["first_token_ns"])[own] / gaps / 1e9
    counts, _ = np.histogram(gap_s, bins=ITL_EDGES_S, weights=gaps)
    return totals(
        steps=int(gaps.sum()),
        busy_ns=int((columns["finished_ns"] - columns["started_ns"])[own].sum()),
        prefix_queried_tokens=int(columns["prompt_tokens"][own].sum()),
        itl_counts=counts.astype(np.int64),
    )
