"""Memory-aware placement, least-loaded dispatch and priority classes with aging."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from policies.interface import (
    ClusterView,
    Dispatch,
    Event,
    Hold,
    LaneView,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)
from policies.least_kv import kv_share


class Hybrid(Policy):
    """Send to the least loaded replica with KV room, urgent first; hold what has no room yet.

    Order. A request of priority p (vLLM's: 0 interactive, above it batch) counts as if it had
    arrived p * `aging_s` later; the earliest goes first. So interactive requests overtake batch,
    but none that arrives more than p * `aging_s` after a batch request does. That is the bound:
    after p * `aging_s`, a batch request waits for those ahead of it only, as under FCFS.

    Room. A request goes only where its prompt and predicted output would leave the estimated
    share of the KV cache within a limit, and a sequence free. Batch keeps to `batch_share`, so
    that interactive requests find headroom; a batch request that has waited p * `aging_s`, and
    every interactive one, may fill the cache up to `full_share`. A replica with nothing in
    flight takes anything: it will never have more room.

    Holding. Without room a request waits centrally, where it can still go to whichever replica
    has room first, and so does everything behind it that may fill the cache no further than it.
    So nothing small starves something large, and held batch does not stop interactive requests.

    `engine_priority` follows the class (0 once aged), for engines that schedule by priority.
    Without a length predictor no output is reserved: `full_share` leaves room to grow.
    """

    def __init__(
        self, *, aging_s: float = 300.0, batch_share: float = 0.6, full_share: float = 0.95
    ) -> None:
        if not (isinstance(aging_s, (int, float)) and aging_s > 0):
            raise ValueError(f"aging_s is {aging_s!r}: give a positive number of seconds")
        for name, share in (("batch_share", batch_share), ("full_share", full_share)):
            if not (isinstance(share, (int, float)) and 0 < share <= 1):
                raise ValueError(f"{name} is {share!r}: give a share above 0, up to 1")
        if batch_share > full_share:
            raise ValueError(
                f"batch_share {batch_share!r} exceeds full_share {full_share!r}: batch would get "
                "more room than interactive requests; give it less"
            )
        self.aging_s = aging_s
        self.batch_share = batch_share
        self.full_share = full_share
        self._held: dict[str, float] = {}
        """Of each model, the largest limit under which a request was held since the last event."""

    def lane(self, request: RequestView) -> Hashable:
        """A lane per model and priority: held batch does not stop interactive requests."""
        return request.model, request.priority

    def next_lane(self, lanes: Mapping[Hashable, LaneView], view: ClusterView) -> Hashable:
        """The lane whose head comes first when priority has aged."""
        return min(lanes.values(), key=lambda lane: self._turn(lane.head)).key

    def _turn(self, request: RequestView) -> tuple[float, int]:
        """When a request is due; at one instant, the smaller priority first."""
        return request.arrived_s + request.priority * self.aging_s, request.priority

    def observe(self, event: Event, view: ClusterView) -> None:
        """After each event every lane is asked again, in order: nobody is held yet."""
        self._held.clear()

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Fewest outstanding tokens where there is room; ties go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        yields = request.priority > 0 and view.now_s < self._turn(request)[0]
        limit = self.batch_share if yields else self.full_share
        if limit <= self._held.get(request.model, 0.0):
            return Hold()
        roomy = _with_room(request, ready, limit)
        if not roomy:
            self._held[request.model] = limit
            return Hold()
        best = min(roomy, key=lambda replica: replica.outstanding_tokens)
        priority = request.priority if yields else min(request.priority, 0)
        return Dispatch(request.id, best.id, priority)


def _with_room(
    request: RequestView, ready: Sequence[ReplicaView], limit: float
) -> list[ReplicaView]:
    needed_tokens = request.prompt_tokens + (request.predicted_output_tokens or 0)
    return [
        replica
        for replica in ready
        if not replica.inflight_requests
        or (_has_free_sequence(replica) and _share(replica, needed_tokens) <= limit)
    ]


def _has_free_sequence(replica: ReplicaView) -> bool:
    return not replica.max_num_seqs or replica.inflight_requests < replica.max_num_seqs


def _share(replica: ReplicaView, needed_tokens: int) -> float:
    """Estimated share of a busy replica's KV in use with so many tokens more; 0 without a size.

    What waits in the engine holds no blocks yet, so the gauges miss it; each counts as the mean
    of what is in flight. Left out, a slow card is sent far more prompts than it can hold. And
    gauges are stale, they still count what has ended since: what is in flight, whole, bounds the
    use from above at every moment, so the smaller figure counts.
    """
    if not replica.kv_blocks:
        return 0.0
    kv_tokens = replica.kv_blocks * replica.block_tokens
    waiting_tokens = replica.waiting * replica.outstanding_tokens / replica.inflight_requests
    gauged = kv_share(replica, needed_tokens) + waiting_tokens / kv_tokens
    booked = (replica.outstanding_tokens + needed_tokens) / kv_tokens
    return min(gauged, booked)
