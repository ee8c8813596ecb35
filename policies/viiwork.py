"""The rule of viiwork, a server for Radeon VII cards."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from policies.interface import (
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    Failed,
    Finished,
    Hold,
    Policy,
    ReplicaChanged,
    ReplicaView,
    RequestView,
    Shed,
    Verdict,
)

LATENCY_WINDOW_S = 30.0


class Viiwork(Policy):
    """Take the idle backend with the lowest latency, or the least busy; refuse when all are full.

    The rule of janit/viiwork 0.3: while fewer than `high_load_threshold` backends are busy and
    one is idle, the idle one with the lowest mean latency over the last 30 s; otherwise the one
    with the fewest requests in flight, where latency breaks ties. A backend without an answer
    in that time counts as fastest. When every backend has `max_in_flight_per_gpu` requests, the
    request is refused as with its 429: there is no queue. A backend is a replica, whatever the
    number of its GPUs.
    """

    def __init__(self, *, high_load_threshold: int = 7, max_in_flight_per_gpu: int = 4) -> None:
        for name, value in (
            ("high_load_threshold", high_load_threshold),
            ("max_in_flight_per_gpu", max_in_flight_per_gpu),
        ):
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} is {value!r}: give a whole number above 0")
        self.high_load_threshold = high_load_threshold
        self.max_in_flight_per_gpu = max_in_flight_per_gpu
        self._sent: dict[str, tuple[str, float]] = {}
        """Of each request in flight, its replica and when it was sent."""
        self._latencies: dict[str, _Latencies] = {}

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties that are left go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        if all(r.inflight_requests >= self.max_in_flight_per_gpu for r in ready):
            return Shed(request.id, "429: every backend is full, retry after 2 s")
        chosen = self._choose(ready, view.now_s)
        self._sent[request.id] = chosen.id, view.now_s
        return Dispatch(request.id, chosen.id)

    def _choose(self, ready: Sequence[ReplicaView], now_s: float) -> ReplicaView:
        idle = [replica for replica in ready if not replica.inflight_requests]
        if idle and len(ready) - len(idle) < self.high_load_threshold:
            return min(idle, key=lambda r: self._latency_s(r.id, now_s))
        return min(ready, key=lambda r: (r.inflight_requests, self._latency_s(r.id, now_s)))

    def _latency_s(self, replica_id: str, now_s: float) -> float:
        seen = self._latencies.get(replica_id)
        return seen.mean_s(now_s) if seen else 0.0

    def observe(self, event: Event, view: ClusterView) -> None:
        """Note how long each answer took from its dispatch."""
        if isinstance(event, Finished):
            sent = self._sent.pop(event.request_id, None)
            if sent:
                replica_id, sent_s = sent
                seen = self._latencies.setdefault(replica_id, _Latencies())
                seen.add(event.now_s, event.now_s - sent_s)
        elif isinstance(event, Failed) or (isinstance(event, Cancelled) and event.attempt):
            self._sent.pop(event.request_id, None)
        elif isinstance(event, ReplicaChanged) and event.state == "gone":
            self._latencies.pop(event.replica_id, None)


class _Latencies:
    """The answers of one replica within the window, and the sum of their times."""

    def __init__(self) -> None:
        self._answers: deque[tuple[float, float]] = deque()
        self._sum_s = 0.0

    def add(self, now_s: float, latency_s: float) -> None:
        self._answers.append((now_s, latency_s))
        self._sum_s += latency_s

    def mean_s(self, now_s: float) -> float:
        answers = self._answers
        while answers and now_s - answers[0][0] > LATENCY_WINDOW_S:
            self._sum_s -= answers.popleft()[1]
        if not answers:
            self._sum_s = 0.0  # what rounding left behind
            return 0.0
        return self._sum_s / len(answers)
