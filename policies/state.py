"""The scheduler's state: what the core keeps of requests, replicas, lanes and the cluster.

Only `SchedulerCore` changes these objects. Policies see them live through the read-only
protocols of `policies.interface` (`ReplicaView`, `LaneView`, `ClusterView`): nothing is copied
for a decision, so a view is valid during its call only.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from math import inf
from typing import Any

from mypy_extensions import mypyc_attr

from policies.interface import ReplicaChanged, RequestView

QUEUED, IN_FLIGHT, WITHDRAWING, ENDED = range(4)
REPLICA_STATES = ("starting", "ready", "draining", "gone")


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class Saved:
    """Goes into a checkpoint by the names of its attributes, so that what a compiled core
    (setup.py) saved loads in one that is not, and the other way round.

    Both attributes of the decorators are needed for that: with `serializable` alone, mypyc 2.4
    skips `__init__` when Python makes an object.
    """

    __slots__ = ()

    def __getstate__(self) -> dict[str, Any]:
        kind: Any = type(self)
        # A compiled class keeps the names of its attributes under a name of mypyc's.
        names = getattr(kind, "__mypyc_attrs__", None) or getattr(kind, "__slots__", ())
        return {name: getattr(self, name) for name in names or vars(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class Entry(Saved):
    """One request inside the core."""

    __slots__ = (
        "attempt",
        "charged_tokens",
        "client_left",
        "dispatched_s",
        "failed_on",
        "failures",
        "first_byte",
        "lane",
        "order",
        "preempted_at",
        "rank",
        "replica",
        "state",
        "timeout_s",
        "view",
    )

    def __init__(self, view: RequestView, lane: Hashable, rank: Any, order: int) -> None:
        self.view = view
        self.lane = lane
        self.rank = rank
        self.order = order
        self.state = QUEUED
        self.attempt = 0
        self.failures = 0
        self.failed_on = ""
        self.replica: Replica | None = None
        self.dispatched_s = 0.0
        self.charged_tokens = 0
        self.first_byte = False
        self.client_left = False
        self.timeout_s: float | None = None
        self.preempted_at: tuple[float, int] | None = None
        """Instant and arrivals until then of the last Preempt: it tells a livelock."""

    def __lt__(self, other: Entry) -> bool:
        """Queue order within a lane: rank, ties by arrival."""
        return bool((self.rank, self.order) < (other.rank, other.order))


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class Replica(Saved):
    """One replica as the core knows it; policies see it through `ReplicaView`."""

    __slots__ = (
        "_clock",
        "block_tokens",
        "devices",
        "ejected_until_s",
        "failures",
        "id",
        "inflight",
        "inflight_requests",
        "kv_blocks",
        "kv_usage",
        "max_num_seqs",
        "model",
        "outstanding_tokens",
        "power_w",
        "probing",
        "running",
        "sampled_s",
        "state",
        "step_costs",
        "temperature_c",
        "waiting",
        "withdrawing_requests",
    )

    def __init__(self, event: ReplicaChanged, clock: Cluster) -> None:
        self._clock = clock
        self.id = event.replica_id
        self.model = event.model
        self.devices = event.devices
        self.state = event.state
        self.max_num_seqs = event.max_num_seqs
        self.kv_blocks = event.kv_blocks
        self.block_tokens = event.block_tokens
        self.step_costs = event.step_costs
        self.inflight: dict[str, Entry] = {}
        self.inflight_requests = 0
        self.outstanding_tokens = 0
        self.withdrawing_requests = 0
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self.power_w: float | None = None
        self.temperature_c: float | None = None
        self.sampled_s = -inf
        self.failures = 0
        self.ejected_until_s = -inf
        self.probing = False

    @property
    def age_s(self) -> float:
        return self._clock.now_s - self.sampled_s

    @property
    def unscraped_tokens(self) -> int:
        tokens = 0
        for entry in reversed(self.inflight.values()):
            if entry.dispatched_s <= self.sampled_s:
                break
            tokens += entry.view.prompt_tokens
        return tokens

    @property
    def takes_requests(self) -> bool:
        """Ready, and neither ejected nor waiting for the answer to a half-open probe."""
        if self.state != "ready" or self._clock.now_s < self.ejected_until_s:
            return False
        return not (self.probing and self.inflight_requests)


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class Lane(Saved):
    """A heap of queued entries. Entries that left are dropped when they reach the head."""

    __slots__ = ("_heap", "_queued", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self._heap: list[Entry] = []
        self._queued = 0

    def __len__(self) -> int:
        return self._queued

    def push(self, entry: Entry) -> None:
        heapq.heappush(self._heap, entry)
        self._queued += 1

    def forget_one(self) -> None:
        """An entry of this lane is no longer queued."""
        self._queued -= 1

    def first(self) -> Entry:
        heap = self._heap
        while heap[0].state != QUEUED:
            heapq.heappop(heap)
        return heap[0]

    @property
    def head(self) -> RequestView:
        return self.first().view

    @property
    def rank(self) -> Any:
        return self.first().rank

    def in_order(self) -> Iterator[RequestView]:
        return (entry.view for entry in sorted(self._heap) if entry.state == QUEUED)


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class Cluster(Saved):
    """The live state behind `ClusterView`."""

    def __init__(self) -> None:
        self.now_s = -inf
        self.replicas: tuple[Replica, ...] = ()
        self.excluded = ""
        self._by_id: dict[str, Replica] = {}
        self._entries: dict[str, Entry] = {}
        self._ready: dict[str, tuple[Replica, ...]] = {}
        self.queued_requests = 0

    def ready(self, model: str) -> tuple[Replica, ...]:
        found = self._ready.get(model)
        if found is None:
            found = tuple(r for r in self.replicas if r.model == model and r.takes_requests)
            self._ready[model] = found
        if self.excluded:
            return tuple(r for r in found if r.id != self.excluded)
        return found

    def replica(self, replica_id: str) -> Replica:
        return self._by_id[replica_id]

    def request(self, request_id: str) -> RequestView:
        return self._entries[request_id].view

    def inflight(self, replica_id: str) -> Iterator[RequestView]:
        return (entry.view for entry in self._by_id[replica_id].inflight.values())

    def forget_ready(self) -> None:
        self._ready.clear()

    def put(self, replica: Replica) -> None:
        self._by_id[replica.id] = replica
        self._reorder()

    def remove(self, replica_id: str) -> None:
        self._by_id.pop(replica_id, None)
        self._reorder()

    def _reorder(self) -> None:
        self.replicas = tuple(self._by_id[key] for key in sorted(self._by_id))
        self._ready.clear()


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class LazyQueue(Saved):
    """The central queue for `plan`: iterated on demand, never copied."""

    def __init__(self, lanes: Mapping[Hashable, Lane]) -> None:
        self._lanes = lanes

    def __iter__(self) -> Iterator[RequestView]:
        for lane in list(self._lanes.values()):
            yield from lane.in_order()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))
