"""What one simulated run leaves behind, in columns.

A million requests must fit in memory, so nothing here is an object per request: the simulator
fills numpy columns, metrics and plots read them, and parquet stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Columns of one request, in file order. Instants are integer nanoseconds of simulated time, -1
#: where the instant never came (invariant I2: arrived <= dispatched <= started <= first token
#: <= finished). `replica` is an index into `SeedResult.replica_ids`, -1 if never dispatched;
#: `traffic_class` and `tenant` are indices into `SeedResult.traffic_classes` and `.tenants`.
REQUEST_COLUMNS: dict[str, type[np.generic]] = {
    "request": np.int64,
    "outcome": np.int8,
    "replica": np.int16,
    "attempts": np.int16,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "cached_tokens": np.int32,
    "preemptions": np.int32,
    "priority": np.int32,
    "traffic_class": np.int32,
    "tenant": np.int32,
    "streamed": np.bool_,
    "arrived_ns": np.int64,
    "dispatched_ns": np.int64,
    "started_ns": np.int64,
    "first_token_ns": np.int64,
    "finished_ns": np.int64,
}

#: What became of a request; the value is its index.
OUTCOMES = ("finished", "shed", "refused", "unfinished")
FINISHED, SHED, REFUSED, UNFINISHED = range(4)

#: Columns of one sample of one replica, taken every `scrape_s` of simulated time. `busy_ns` has
#: been spent computing since the replica was ready, `prefill_ns` of it in steps with prefills.
#: `power_w` is the mean draw of its devices since the sample before, 0 where it is not known.
SAMPLE_COLUMNS: dict[str, type[np.generic]] = {
    "time_ns": np.int64,
    "replica": np.int16,
    "running": np.int32,
    "waiting": np.int32,
    "kv_blocks_used": np.int32,
    "busy_ns": np.int64,
    "prefill_ns": np.int64,
    "power_w": np.float32,
}

#: Inter-token latencies are counted in bins of equal ratio, never stored one by one: bin i
#: holds the gaps in [ITL_EDGES_S[i], ITL_EDGES_S[i + 1]). 100 bins a decade from 10 us to
#: 1,000 s, so a percentile read from the bins is within 2.4 % of the exact one.
ITL_EDGES_S: NDArray[np.float64] = np.logspace(-5, 3, 801)


@dataclass(slots=True)
class ReplicaTotals:
    """Counters of one replica over a whole run."""

    steps: int
    """Engine steps that computed something."""
    busy_ns: int
    prefill_tokens: int
    """Prompt tokens computed, recomputation after preemptions included."""
    decode_tokens: int
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    extrapolated_steps: int
    """Steps whose batch lay outside the profile's calibrated range."""
    usable_kv_blocks: int
    itl_counts: NDArray[np.int64]
    """Gaps between consecutive tokens of a sequence, per bin of `ITL_EDGES_S`."""
    prefill_ns: int = 0
    """Of `busy_ns`, in steps with prefills."""
    ready_ns: int = 0
    """When it was ready; after 0 for one that was launched."""
    retired_ns: int = 0
    """When it was gone; 0 if it stayed to the end."""


@dataclass(slots=True)
class FaultCounts:
    """What the faults of one run came to."""

    injected: int = 0
    """Faults that befell a replica."""
    lost: int = 0
    """Requests that got no whole answer, without having been refused."""
    retried: int = 0
    """Attempts after one that had failed."""
    duplicated: int = 0
    """Requests tried again after their client had seen a byte: none, or something is wrong."""


@dataclass(slots=True)
class SeedResult:
    """One seed of one experiment."""

    seed: int
    replica_ids: tuple[str, ...]
    requests: dict[str, NDArray[np.generic]]
    """Columns of REQUEST_COLUMNS, in order of arrival."""
    samples: dict[str, NDArray[np.generic]]
    """Columns of SAMPLE_COLUMNS, in order of time, then replica."""
    replicas: tuple[ReplicaTotals, ...]
    ended_ns: int
    """Simulated time of the last event."""
    traffic_classes: tuple[str, ...] = ("",)
    """In the order of their first request; requests of no class have the class ""."""
    tenants: tuple[str, ...] = ("",)
    unsent_requests: int = 0
    """Turns of closed-loop sessions that were never sent, because an earlier one failed or the
    run ended."""
    events: int = 0
    """Events that the simulation kernel processed."""
    energy_j: float | None = None
    """Of all devices of the cluster over the whole run, None where a draw is not known."""
    faults: FaultCounts | None = None
    """None for an experiment without faults."""


class Columns:
    """Rows of integers, `add(pack(...))`-ed one at a time, read as numpy columns."""

    def __init__(self, columns: Mapping[str, type[np.generic]]) -> None:
        self._types = columns
        self._rows = bytearray()
        self.add = self._rows.extend
        self.pack = Struct(f"={len(columns)}q").pack

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All rows, by column."""
        table = np.frombuffer(self._rows, dtype=np.int64).reshape(-1, len(self._types))
        columns = zip(self._types.items(), table.T, strict=True)
        return {name: column.astype(kind) for (name, kind), column in columns}
