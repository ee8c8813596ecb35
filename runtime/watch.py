"""What the proxy has seen: every event, every decision, every first byte.

A `Watch` stands where the driver's journal does and passes on to the journal proper. It keeps
plain numbers, because it is called for every event; Prometheus' own objects are made when
somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any, TypeAlias

from policies.core import SchedulerCore
from policies.interface import (
    Action,
    Arrived,
    Cancelled,
    Dispatch,
    Event,
    Failed,
    Finished,
    Preempt,
    ReplicaChanged,
    RequestView,
    Shed,
)
from policies.state import Lane, Replica
from runtime.driver import Answer, Driver, Job
from runtime.worker import Journal, Launcher, Worker

DECISIONS_KEPT = 20
ENDS_KEPT = 20_000
"""Requests whose latencies are remembered, whatever the window."""

_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
    *(320.0, 640.0),
)
_HANDLE_SECONDS = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1)

asked_model: ContextVar[list[str] | None] = ContextVar("asked_model", default=None)
"""Where the model of the request in hand is put for whoever counts its answer."""


class Distribution:
    """Counts by bucket, as Prometheus wants them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def median_bound(self) -> float | None:
        """The bound that half of the values do not exceed; None without any, or beyond all."""
        half = sum(self.counts) / 2
        below = 0
        for bound, number in zip(self.bounds, self.counts, strict=False):
            below += number
            if below >= half > 0:
                return bound
        return None

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds with the number of values up to each."""
        names = [*map(str, self.bounds), "+Inf"]
        below = 0
        found: list[tuple[str, float]] = []
        for name, number in zip(names, self.counts, strict=True):
            below += number
            found.append((name, below))
        return found


Candidate: TypeAlias = tuple[str, int, int]
"""A worker that could have been chosen, its outstanding tokens and its requests in flight."""


# Not frozen: one of each is made for every request, and freezing would cost more than all else.
@dataclass(slots=True)
class Decision:
    """One action of the core, and what it was decided on."""

    now_s: float
    kind: str
    request_id: str
    worker: str = ""
    reason: str = ""
    after: Sequence[Candidate] = ()
    """The candidates once the event had been handled."""
    sent: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens and requests that this decision, and those after it, sent to each worker."""

    @property
    def candidates(self) -> list[Candidate]:
        """As they stood before the decision; worked out only for whoever looks."""
        before = []
        for name, tokens, requests in self.after:
            sent_tokens, sent_requests = self.sent.get(name, (0, 0))
            before.append((name, tokens - sent_tokens, requests - sent_requests))
        return before


@dataclass(slots=True)
class Ended:
    """A whole answer; latencies are None where they are not defined."""

    now_s: float
    worker: str
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float


@dataclass(slots=True)
class _Inside:
    """A request that has not ended."""

    request: RequestView
    worker: str = ""
    """Where it is in flight; empty while it is queued."""
    first_byte_s: float | None = None
    failed_on: str = ""
    """Where its last attempt failed."""
    client_left: bool = False


@dataclass(slots=True)
class _Totals:
    """What is only ever counted up."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By model (empty when the request was refused before it was known) and HTTP status."""
    decisions: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Failed attempts, by worker."""
    ejections: Counter[str] = field(default_factory=Counter)
    output_tokens: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    broken_streams: int = 0


class Watch:
    """Sees what the driver of `core` does; give it to the driver as its journal."""

    def __init__(self, core: SchedulerCore, journal: Journal | None = None) -> None:
        self.core = core
        self.totals = _Totals()
        self.handle_s = Distribution(_HANDLE_SECONDS)
        self.ttft_s: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(_SECONDS))
        self.e2e_s: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(_SECONDS))
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self.ended: deque[Ended] = deque(maxlen=ENDS_KEPT)
        self.opened_s: float | None = None
        """When the first worker came: rates count from then."""
        self._journal = journal
        self._inside: dict[str, _Inside] = {}
        self._ejected_until_s: dict[str, float] = {}
        self._handling_since = 0.0

    # -- the state of the core, for whoever shows it --

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas, ordered by id."""
        return self.core.view.replicas

    @property
    def lanes(self) -> Iterable[Lane]:
        """The lanes of the central queue that hold requests."""
        return self.core.lanes.values()

    def is_ready(self) -> bool:
        """Whether some worker takes requests."""
        return any(replica.takes_requests for replica in self.replicas)

    # -- told by the driver --

    def handling(self) -> None:
        """The core is given an event now; `record` follows when it has answered."""
        self._handling_since = perf_counter()

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """See `runtime.worker.Journal`."""
        self.handle_s.observe(perf_counter() - self._handling_since)
        if self._journal is not None:
            self._journal.record(event, actions)
        note = _NOTES.get(type(event))
        if note is not None:
            note(self, event)
        if actions:
            self._acted(event.now_s, actions)

    def began(self, request_id: str, now_s: float) -> None:
        """The first byte of a streamed answer goes to the client."""
        inside = self._inside.get(request_id)
        if inside is not None:
            inside.first_byte_s = now_s
            self.ttft_s[inside.request.model].observe(now_s - inside.request.arrived_s)

    def answered(self, model: str, status: int) -> None:
        """An HTTP answer has ended."""
        self.totals.answers[model, status] += 1

    # -- events --

    def _replica_changed(self, event: ReplicaChanged) -> None:
        if self.opened_s is None:
            self.opened_s = event.now_s

    def _arrived(self, event: Arrived) -> None:
        self._inside[event.request.id] = _Inside(event.request)

    def _finished(self, event: Finished) -> None:
        inside = self._inside.pop(event.request_id, None)
        if inside is None:
            return
        now_s, arrived_s, first_s = event.now_s, inside.request.arrived_s, inside.first_byte_s
        tokens = event.output_tokens
        self.totals.output_tokens[inside.worker] += tokens
        self.e2e_s[inside.request.model].observe(now_s - arrived_s)
        ttft_s = tpot_s = None
        if first_s is not None:
            ttft_s = first_s - arrived_s
            tpot_s = (now_s - first_s) / (tokens - 1) if tokens > 1 else None
        self.ended.append(Ended(now_s, inside.worker, tokens, ttft_s, tpot_s, now_s - arrived_s))

    def _failed(self, event: Failed) -> None:
        inside = self._inside.get(event.request_id)
        if inside is None:
            return
        if event.worker_fault:
            self.totals.failures[inside.worker] += 1
            self._look_for_ejection(inside.worker, event.now_s)
        self.totals.broken_streams += inside.first_byte_s is not None
        inside.worker, inside.failed_on = "", inside.worker
        if inside.client_left:
            del self._inside[event.request_id]

    def _look_for_ejection(self, worker: str, now_s: float) -> None:
        until_s = next((r.ejected_until_s for r in self.replicas if r.id == worker), -inf)
        if until_s > max(now_s, self._ejected_until_s.get(worker, -inf)):
            self._ejected_until_s[worker] = until_s
            self.totals.ejections[worker] += 1

    def _cancelled(self, event: Cancelled) -> None:
        inside = self._inside.get(event.request_id)
        if inside is None:
            return
        if event.attempt:
            inside.worker = ""  # withdrawn, and queued again
        else:
            inside.client_left = True
        if inside.client_left and not inside.worker:
            del self._inside[event.request_id]

    # -- actions --

    def _acted(self, now_s: float, actions: Sequence[Action]) -> None:
        if len(actions) == 1 and type(actions[0]) is Dispatch:  # the usual case, kept short
            self.totals.decisions["Dispatch"] += 1
            self.decisions.append(self._dispatched(now_s, actions[0], {}))
            return
        # From the last to the first: the core shows what is true after all of them, and each
        # was decided on what was true before it.
        sent: dict[str, tuple[int, int]] = {}
        noted: list[Decision] = []
        for action in reversed(actions):
            kind = type(action).__name__
            self.totals.decisions[kind] += 1
            match action:
                case Dispatch():
                    decision = self._dispatched(now_s, action, sent)
                    sent = dict(decision.sent)
                    noted.append(decision)
                case Shed(request_id, reason):
                    self._inside.pop(request_id, None)
                    noted.append(Decision(now_s, kind, request_id, reason=reason))
                case Preempt(request_id):
                    worker = self._inside[request_id].worker
                    noted.append(Decision(now_s, kind, request_id, worker))
        self.decisions.extend(reversed(noted))

    def _dispatched(
        self, now_s: float, action: Dispatch, sent: dict[str, tuple[int, int]]
    ) -> Decision:
        """Note one dispatch; `sent` becomes its `Decision.sent`, and has those after it."""
        request_id, worker = action.request_id, action.replica_id
        inside = self._inside[request_id]
        request = inside.request
        inside.worker = worker
        ready: Iterable[Replica] = self.core.view.ready(request.model)
        chosen = self.core.view.replica(worker)
        if chosen.probing:  # tried again after failures, with one request: it takes no more
            ready = (*ready, chosen)
        if inside.failed_on:
            ready = [one for one in ready if one is chosen or one.id != inside.failed_on]
            self.totals.retries += 1
            inside.failed_on = ""
        after = [(one.id, one.outstanding_tokens, one.inflight_requests) for one in ready]
        tokens, requests = sent.get(worker, (0, 0))
        sent[worker] = (tokens + request.expected_tokens, requests + 1)
        return Decision(now_s, "Dispatch", request_id, worker, "", after, sent)


_NOTES: dict[type, Callable[[Watch, Any], None]] = {
    Arrived: Watch._arrived,
    Finished: Watch._finished,
    Failed: Watch._failed,
    Cancelled: Watch._cancelled,
    ReplicaChanged: Watch._replica_changed,
}


class WatchedDriver(Driver):
    """A driver that tells a `Watch` what it does."""

    def __init__(
        self,
        core: SchedulerCore,
        workers: Iterable[Worker],
        watch: Watch,
        *,
        scrape_s: float | None = None,
        launcher: Launcher | None = None,
        on_fault: Callable[[str], None] = lambda worker_id: None,
    ) -> None:
        super().__init__(
            core,
            workers,
            journal=watch,
            scrape_s=scrape_s,
            launcher=launcher,
            on_fault=on_fault,
        )
        self._watch = watch

    async def submit(self, request: RequestView, client: Any = None) -> Answer:
        """See `Driver.submit`."""
        asked = asked_model.get()
        if asked is not None:
            asked.append(request.model)
        return await super().submit(request, client)

    def _handle(self, event: Event) -> None:
        self._watch.handling()
        super()._handle(event)

    def _began(self, job: Job) -> None:
        self._watch.began(job.request.id, self.now_s())
        super()._began(job)
