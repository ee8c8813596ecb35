"""`SchedulerCore`: events in, actions out. The only caller of a policy.

Theory of operation. The core is sans-I/O: a driver (the simulator, the proxy, a journal being
replayed) calls `handle` with one event at a time and performs the actions it returns. All
scheduling state lives here and changes only in `handle`: the central queue, what is in flight,
the last gauges of every replica, failures and timers. So the same events give the same actions
in every driver (invariant I7).

A request is QUEUED, then IN_FLIGHT as attempt n, perhaps WITHDRAWING (a `Preempt` was issued;
its slot is still taken), and leaves when its attempt's terminal event (`Finished`, `Failed`,
`Cancelled`) arrives. Events of any other attempt are stale and ignored.
"""

from __future__ import annotations

import difflib
import heapq
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from mypy_extensions import mypyc_attr
from numpy.random import SeedSequence, default_rng

from policies.interface import (
    Action,
    Arrived,
    Cancelled,
    ClusterView,
    ConfigChanged,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Hold,
    InvalidAction,
    Launch,
    LaunchFailed,
    Limits,
    Policy,
    PolicyError,
    Preempt,
    ReplicaChanged,
    RequestView,
    Retire,
    Shed,
    Tick,
    Verdict,
)
from policies.registry import make_policy
from policies.state import (
    ENDED,
    IN_FLIGHT,
    QUEUED,
    REPLICA_STATES,
    WITHDRAWING,
    Cluster,
    Entry,
    Lane,
    LazyQueue,
    Replica,
    Saved,
)


@mypyc_attr(serializable=True, allow_interpreted_subclasses=True)
class SchedulerCore(Saved):
    """One scheduler: a policy, the central queue, and what is in flight.

    `seed` gives the policy its random stream. `guard` makes each call that hands the policy a
    view, as `guard(question, *arguments)` (see `policies.guard`); None, the default, calls
    directly with the live view. `folder` is where a policy's file is looked up when the policy
    is changed.
    """

    def __init__(
        self,
        policy: Policy,
        seed: int = 0,
        limits: Limits | None = None,
        guard: Callable[..., Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._seed = seed
        self.folder = folder
        self.limits = limits or Limits()
        self._take(policy)
        self._view = Cluster()
        self._guard = guard
        self._entries = self._view._entries
        self._lanes: dict[Hashable, Lane] = {}
        self._timers: list[tuple[float, int, str, Any]] = []
        self._order = 0
        self._launches = 0
        self._actions: list[Action] = []
        self._fresh: Entry | None = None
        """An arrival that found the queue empty and has not been asked about yet."""
        self._handling = False
        self._plan_armed = False
        self._plan_due = False
        self.counts = dict.fromkeys(("arrived", "finished", "shed", "cancelled", "preempted"), 0)

    # -- for drivers --

    @property
    def wants_first_token(self) -> bool:
        """Whether drivers report `FirstToken`: somebody observes it, or may preempt."""
        return self._observes or self.policy.preempts

    @property
    def view(self) -> Cluster:
        """The live state; for drivers to read."""
        return self._view

    @property
    def lanes(self) -> Mapping[Hashable, Lane]:
        """The lanes of the central queue that hold requests; for drivers to read."""
        return self._lanes

    @property
    def queued_requests(self) -> int:
        """Requests held centrally."""
        return self._view.queued_requests

    @property
    def inflight_requests(self) -> int:
        """Requests dispatched whose attempt has not ended."""
        return len(self._entries) - self._view.queued_requests

    def next_timer_s(self) -> float | None:
        """When the core wants the next `Tick`; None: never, as things stand."""
        timers = self._timers
        while timers and self._is_dead(timers[0]):
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def handle(self, event: Event) -> list[Action]:
        """Take one event, return the actions it causes, in order.

        Raises InvalidAction when the policy answers nonsense, ValueError when time runs
        backwards, RuntimeError when called from within itself.
        """
        if self._handling:
            raise RuntimeError("handle is not re-entrant: queue the event until it returns")
        view = self._view
        if event.now_s < view.now_s:
            raise ValueError(f"time went back from {view.now_s} to {event.now_s} s: {event}")
        view.now_s = event.now_s
        self._handling = True
        actions = self._actions = []
        try:
            if _HANDLERS[type(event)](self, event):
                if self._observes:
                    self._ask(self.policy.observe, event)
                if self._plan_due:
                    self._plan()
                if self._fresh is not None:
                    self._place_fresh(self._fresh)
                elif view.queued_requests:
                    self._place_queued()
                if type(event) is Arrived and self.limits.max_queued is not None:
                    self._enforce_queue_limit(event.request.id)
        finally:
            self._handling = False
        return actions

    # -- the policy --

    def _take(self, policy: Policy) -> None:
        """Ask this policy from now on. Raises PolicyError."""
        unchecked: Any = policy  # a user's class says what it likes
        tick_s = unchecked.tick_s
        if tick_s is not None and not (isinstance(tick_s, (int, float)) and tick_s > 0):
            raise PolicyError(
                f"{type(policy).__name__}.tick_s is {tick_s!r}: give a positive number of "
                "seconds, or None for no `plan`"
            )
        policy.rng = default_rng(SeedSequence([self._seed, zlib.crc32(b"policy")]))
        kind = type(policy)
        self.policy = policy
        self._observes = kind.observe is not Policy.observe
        self._default_lane = kind.lane is Policy.lane
        self._default_rank = kind.rank is Policy.rank

    def _change_policy(self, policy: Policy) -> None:
        """Take another policy. Requests in flight get its lane and rank too: they may come back.
        It observes which of them have shown something, and no more of the past."""
        self._take(policy)
        self._lanes.clear()
        for entry in self._entries.values():
            entry.lane, entry.rank = self._lane_and_rank(entry.view)
            if entry.state == QUEUED:
                self._enter_lane(entry)
            elif entry.first_byte and self._observes:
                shown = FirstToken(self._view.now_s, entry.view.id, entry.attempt)
                self._ask(policy.observe, shown)
        self._timers = [timer for timer in self._timers if timer[2] != "plan"]
        heapq.heapify(self._timers)
        self._plan_armed = False
        if policy.tick_s is not None and self._entries:
            self._arm_plan()

    def _lane_and_rank(self, request: RequestView) -> tuple[Hashable, Any]:
        lane = request.model if self._default_lane else self._lane(request)
        rank = request.arrived_s if self._default_rank else self.policy.rank(request)
        return lane, rank

    # -- questions to the policy --

    def _ask(self, question: Callable[..., Any], *subject: Any) -> Any:
        """Ask one question with a view that is valid for this call only."""
        if self._guard is None:
            return question(*subject, self._view)
        return self._guard(question, *subject, self._view)

    def _place_queued(self) -> None:
        """Ask about the heads of the lanes until each is empty or held.

        A Preempt holds its lane too: the victim's slot is not free before a later event.
        """
        lanes = self._lanes
        held: set[Hashable] = set()
        while lanes:
            if len(lanes) == 1 and not held:
                (lane,) = lanes.values()
            else:
                waiting = {k: lane for k, lane in lanes.items() if k not in held}
                if not waiting:
                    return
                lane = self._next_lane(waiting)
            entry = lane.first()
            if entry.failed_on:
                verdict = self._ask_elsewhere(entry)
            else:
                verdict = self._ask(self.policy.place, entry.view)
            if type(verdict) is Hold:
                held.add(lane.key)
                continue
            self._apply_verdict(entry, verdict)
            if type(verdict) is Preempt:
                held.add(lane.key)

    def _place_fresh(self, entry: Entry) -> None:
        """Ask about an arrival that found the queue empty: the usual case, kept short. It
        enters the queue only if it must wait there."""
        self._fresh = None
        view = self._view
        view.queued_requests = 1
        verdict: Any = None
        try:
            verdict = self._ask(self.policy.place, entry.view)
            if type(verdict) is Dispatch and verdict.request_id == entry.view.id:
                self._send(entry, verdict)
        finally:
            view.queued_requests = 0
            if entry.state == QUEUED:
                self._enter_queue(entry)
        if entry.state == QUEUED and type(verdict) is not Hold:
            self._apply_verdict(entry, verdict)

    def _ask_elsewhere(self, entry: Entry) -> Any:
        """Ask about a retry: not where it failed, unless nowhere else is left."""
        replica_id = entry.failed_on
        self._view.excluded = replica_id if self._elsewhere(entry.view.model, replica_id) else ""
        try:
            return self._ask(self.policy.place, entry.view)
        finally:
            self._view.excluded = ""

    def _next_lane(self, waiting: Mapping[Hashable, Lane]) -> Lane:
        key = self._ask(self.policy.next_lane, waiting)
        if key not in waiting:
            raise InvalidAction(
                f"next_lane answered {key!r}, which is not among the lanes it was given: "
                f"{', '.join(map(repr, waiting))}"
            )
        return waiting[key]

    def _apply_verdict(self, entry: Entry, verdict: Verdict) -> None:
        if isinstance(verdict, Preempt):
            self._preempt(verdict)
        elif not isinstance(verdict, (Dispatch, Shed)):
            raise InvalidAction(
                f"place answered {verdict!r}: answer Dispatch, Hold, Shed or Preempt"
            )
        elif verdict.request_id != entry.view.id:
            raise InvalidAction(
                f"place was asked about {entry.view.id!r} but answered {verdict}: "
                "answer about that request, or use plan"
            )
        else:
            self._apply(verdict)

    def _plan(self) -> None:
        self._plan_due = False
        self._arm_plan()
        self._ask(self._carry_out_plan, LazyQueue(self._lanes))

    def _carry_out_plan(self, queue: Iterable[RequestView], view: ClusterView) -> None:
        """Perform each action before the next is asked for: a generator sees its own effects."""
        plan = self.policy.plan(queue, view)
        if not isinstance(plan, Iterable):
            raise InvalidAction(f"plan answered {plan!r}: answer an iterable of actions")
        for action in plan:
            self._apply(action)

    # -- actions --

    def _apply(self, action: Any) -> None:
        """Validate one answer, bring the state up to date, and pass it on."""
        apply = _APPLIERS.get(type(action))
        if apply is None:
            raise InvalidAction(
                f"plan answered {action!r}: answer Dispatch, Shed, Preempt, Launch or Retire"
            )
        apply(self, action)

    def _dispatch(self, action: Dispatch) -> None:
        entry = self._queued_entry(action)
        self._send(entry, action)
        self._forget_queued(entry)

    def _send(self, entry: Entry, action: Dispatch) -> None:
        """Put the request in flight, if the action is sound; the queue is the caller's matter."""
        view, request = self._view, entry.view
        replica = view._by_id.get(action.replica_id)
        if replica is None:
            replica = self._known_replica(action, action.replica_id)
        if replica.model != request.model:
            raise InvalidAction(
                f"{action}: the request wants model {request.model!r}, "
                f"the replica serves {replica.model!r}"
            )
        if replica.state != "ready" or replica.probing:
            self._check_takes_requests(replica, action)
            view.forget_ready()
        if action.engine_priority is not None and type(action.engine_priority) is not int:
            raise InvalidAction(f"{action}: engine_priority is an integer, smaller first")
        entry.attempt += 1
        entry.state = IN_FLIGHT
        entry.replica = replica
        entry.dispatched_s = view.now_s
        tokens = entry.charged_tokens = request.expected_tokens
        replica.inflight[request.id] = entry
        replica.inflight_requests += 1
        replica.outstanding_tokens += tokens
        if action.attempt != entry.attempt:
            action = replace(action, attempt=entry.attempt)
        self._actions.append(action)

    @staticmethod
    def _check_takes_requests(replica: Replica, action: Dispatch) -> None:
        if not replica.takes_requests:
            raise InvalidAction(
                f"{action}: the replica takes no requests now (state {replica.state!r}"
                f"{', ejected or probing' if replica.state == 'ready' else ''}); "
                "choose among view.ready(model)"
            )

    def _shed(self, action: Shed) -> None:
        entry = self._queued_entry(action)
        self._leave_queue(entry)
        self._end(entry, "shed")
        self._actions.append(action)

    def _preempt(self, action: Preempt) -> None:
        entry = self._entries.get(action.request_id)
        if not self.policy.preempts:
            raise InvalidAction(
                f"{action}: set `preempts = True` on {type(self.policy).__name__}, so that "
                "drivers report first tokens"
            )
        if entry is None or entry.state != IN_FLIGHT or entry.replica is None:
            raise InvalidAction(f"{action}: the request is not in flight")
        if entry.first_byte:
            raise InvalidAction(f"{action}: its first byte has reached the client")
        moment = (self._view.now_s, self.counts["arrived"])
        if entry.preempted_at == moment:
            raise InvalidAction(
                f"{action}: preempted twice while neither time passed nor a request arrived "
                "(livelock); rank the victim behind the request it makes room for"
            )
        entry.preempted_at = moment
        entry.state = WITHDRAWING
        entry.replica.withdrawing_requests += 1
        self.counts["preempted"] += 1
        self._actions.append(Preempt(action.request_id, entry.attempt))

    def _launch(self, action: Launch) -> None:
        if not action.devices:
            raise InvalidAction(f"{action}: name at least one device")
        if len(set(action.devices)) < len(action.devices):
            raise InvalidAction(f"{action}: name each device once")
        used = {device: r.id for r in self._view.replicas for device in r.devices}
        for device in action.devices:
            if device in used:
                raise InvalidAction(f"{action}: {device} belongs to replica {used[device]!r}")
        while f"{action.model}-{self._launches}" in self._view._by_id:
            self._launches += 1
        replica_id = f"{action.model}-{self._launches}"
        self._launches += 1
        changed = ReplicaChanged(
            self._view.now_s, replica_id, "starting", action.model, tuple(action.devices)
        )
        self._view.put(Replica(changed, self._view))
        self._actions.append(replace(action, replica_id=replica_id))

    def _retire(self, action: Retire) -> None:
        replica = self._known_replica(action, action.replica_id)
        replica.state = "draining"
        self._view.forget_ready()
        self._actions.append(action)

    def _queued_entry(self, action: Dispatch | Shed) -> Entry:
        entry = self._entries.get(action.request_id)
        if entry is None or entry.state != QUEUED:
            raise InvalidAction(f"{action}: no such request is queued")
        return entry

    def _known_replica(self, action: Any, replica_id: str) -> Replica:
        replica = self._view._by_id.get(replica_id)
        if replica is None:
            known = list(self._view._by_id)
            close = difflib.get_close_matches(str(replica_id), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}"
            raise InvalidAction(f"{action}: unknown replica {replica_id!r}.{hint}")
        return replica

    # -- events: each handler says whether the event counts (False: stale, ignore it) ----------

    def _on_arrived(self, event: Arrived) -> bool:
        view = event.request
        if view.id in self._entries:
            raise ValueError(f"request id {view.id!r} is already in use")
        lane, rank = self._lane_and_rank(view)
        self._order += 1
        entry = Entry(view, lane, rank, self._order)
        self._entries[view.id] = entry
        self.counts["arrived"] += 1
        if self._view.queued_requests:
            self._enter_queue(entry)
        else:
            self._fresh = entry
        if self.policy.tick_s is not None and not self._plan_armed:
            self._arm_plan()
        return True

    def _lane(self, request: RequestView) -> Hashable:
        lane = self.policy.lane(request)
        try:
            hash(lane)
        except TypeError:
            raise InvalidAction(
                f"lane answered {lane!r}: answer something hashable, such as a string or a tuple"
            ) from None
        return lane

    def _on_first_token(self, event: FirstToken) -> bool:
        entry = self._current(event)
        if entry is None:
            return False
        entry.first_byte = True
        return True

    def _on_finished(self, event: Finished) -> bool:
        entry = self._current(event)
        if entry is None:
            return False
        replica = self._free_slot(entry)
        if replica.failures:
            self._heal(replica)
        self._end(entry, "finished")
        return True

    def _on_failed(self, event: Failed) -> bool:
        entry = self._current(event)
        if entry is None:
            return False
        replica = self._free_slot(entry)
        if event.worker_fault:
            self._blame(replica)
        elif replica.probing:
            self._heal(replica)
        entry.failures += 1
        if entry.client_left:
            self._end(entry, "cancelled")
        elif self._may_retry(entry, event, replica):
            entry.failed_on = replica.id
            self._enter_queue(entry)
        else:
            self._end(entry, "shed")
            self._actions.append(Shed(event.request_id, f"failed: {event.reason}"))
        return True

    def _may_retry(self, entry: Entry, event: Failed, replica: Replica) -> bool:
        """Once, elsewhere, and only before the first byte (FACTS section 7)."""
        fresh = event.retryable and not entry.first_byte
        elsewhere = self._elsewhere(replica.model, replica.id)
        return fresh and elsewhere and entry.failures < self.limits.max_attempts

    def _elsewhere(self, model: str, replica_id: str) -> bool:
        """Whether another replica of the model exists that takes requests now or later."""
        return any(
            other.model == model and other.id != replica_id and other.state != "draining"
            for other in self._view.replicas
        )

    def _on_cancelled(self, event: Cancelled) -> bool:
        if event.attempt == 0:
            return self._on_client_left(event)
        entry = self._current(event)
        if entry is None:
            return False
        withdrawn = entry.state == WITHDRAWING and not entry.client_left
        replica = self._free_slot(entry)
        if replica.probing:
            self._view.forget_ready()
        if withdrawn:
            self._enter_queue(entry)
        else:
            self._end(entry, "cancelled")
        return True

    def _on_client_left(self, event: Cancelled) -> bool:
        entry = self._entries.get(event.request_id)
        if entry is None:
            return False
        if entry.state == QUEUED:
            self._leave_queue(entry)
            self._end(entry, "cancelled")
        else:
            entry.client_left = True
        return True

    def _on_replica_changed(self, event: ReplicaChanged) -> bool:
        if event.state not in REPLICA_STATES:
            raise ValueError(f"unknown state in {event}: one of {', '.join(REPLICA_STATES)}")
        view = self._view
        replica = view._by_id.get(event.replica_id)
        if event.state == "gone":
            view.remove(event.replica_id)
        elif replica is None:
            view.put(Replica(event, view))
        else:
            replica.state = event.state
            replica.model = event.model or replica.model
            replica.devices = event.devices or replica.devices
            replica.max_num_seqs = event.max_num_seqs or replica.max_num_seqs
            replica.kv_blocks = event.kv_blocks or replica.kv_blocks
            replica.block_tokens = event.block_tokens or replica.block_tokens
            if event.step_costs.decode_sequences:
                replica.step_costs = event.step_costs
            view.forget_ready()
        return True

    def _on_gauges(self, event: Gauges) -> bool:
        replica = self._view._by_id.get(event.replica_id)
        if replica is None or event.sampled_s < replica.sampled_s:
            return False
        replica.running = event.running
        replica.waiting = event.waiting
        replica.kv_usage = event.kv_usage
        replica.power_w = event.power_w
        replica.temperature_c = event.temperature_c
        replica.sampled_s = event.sampled_s
        return True

    def _on_launch_failed(self, event: LaunchFailed) -> bool:
        self._view.remove(event.replica_id)
        return True

    def _on_config_changed(self, event: ConfigChanged) -> bool:
        self.limits = event.limits
        if event.policy is not None:
            self._change_policy(make_policy(event.policy, self.folder))
        return True

    def _on_tick(self, event: Tick) -> bool:
        """Take every timer that is due; the policy's `plan` is asked afterwards."""
        timers = self._timers
        while timers and timers[0][0] <= event.now_s:
            timer = heapq.heappop(timers)
            if self._is_dead(timer):
                continue
            _, _, kind, subject = timer
            if kind == "readmit":
                self._view.forget_ready()
            elif kind == "plan":
                self._plan_due = self.policy.tick_s is not None
            else:
                self._shed(Shed(subject.view.id, kind))
        return True

    # -- bookkeeping --

    def _current(self, event: FirstToken | Finished | Failed | Cancelled) -> Entry | None:
        """The entry whose running attempt the event is about; None when it is stale."""
        entry = self._entries.get(event.request_id)
        if entry is None or entry.attempt != event.attempt or entry.state == QUEUED:
            return None
        return entry

    def _enter_queue(self, entry: Entry) -> None:
        entry.state = QUEUED
        entry.replica = None
        self._enter_lane(entry)
        self._view.queued_requests += 1
        if entry.view.deadline_s is not None:
            self._arm(entry.view.deadline_s, "deadline", entry)
        if self.limits.queue_timeout_s is not None:
            entry.timeout_s = self._view.now_s + self.limits.queue_timeout_s
            self._arm(entry.timeout_s, "timeout", entry)

    def _enter_lane(self, entry: Entry) -> None:
        lane = self._lanes.get(entry.lane)
        if lane is None:
            lane = self._lanes[entry.lane] = Lane(entry.lane)
        lane.push(entry)

    def _leave_queue(self, entry: Entry) -> None:
        entry.state = ENDED
        self._forget_queued(entry)

    def _forget_queued(self, entry: Entry) -> None:
        """The entry's state says that it is no longer queued: drop it from its lane."""
        self._view.queued_requests -= 1
        lane = self._lanes[entry.lane]
        lane.forget_one()
        if not lane:
            del self._lanes[entry.lane]

    def _free_slot(self, entry: Entry) -> Replica:
        """The attempt has ended: release what it was charged."""
        replica = entry.replica
        assert replica is not None, "an attempt in flight has a replica"
        del replica.inflight[entry.view.id]
        replica.inflight_requests -= 1
        replica.outstanding_tokens -= entry.charged_tokens
        if entry.state == WITHDRAWING:
            replica.withdrawing_requests -= 1
        return replica

    def _end(self, entry: Entry, outcome: str) -> None:
        entry.state = ENDED
        del self._entries[entry.view.id]
        self.counts[outcome] += 1

    def _blame(self, replica: Replica) -> None:
        """Count a failure; eject after too many in a row, for ever longer while probes fail.

        What was in flight when the replica was ejected tells nothing new by failing as well.
        """
        if self._view.now_s < replica.ejected_until_s:
            return
        replica.failures += 1
        if replica.probing or replica.failures >= self.limits.eject_after:
            excess = max(0, replica.failures - self.limits.eject_after)
            replica.ejected_until_s = self._view.now_s + self.limits.eject_s * 2 ** min(excess, 5)
            replica.probing = True
            self._arm(replica.ejected_until_s, "readmit", replica)
            self._view.forget_ready()

    def _heal(self, replica: Replica) -> None:
        replica.failures = 0
        if replica.probing:
            replica.probing = False
            replica.ejected_until_s = -inf
            self._view.forget_ready()

    def _enforce_queue_limit(self, request_id: str) -> None:
        entry = self._entries.get(request_id)
        limit = self.limits.max_queued
        if entry is None or entry.state != QUEUED or limit is None:
            return
        if self._view.queued_requests > limit:
            self._shed(Shed(request_id, "queue_full"))

    # -- timers --

    def _arm(self, when_s: float, kind: str, subject: Any) -> None:
        self._order += 1
        heapq.heappush(self._timers, (when_s, self._order, kind, subject))

    def _arm_plan(self) -> None:
        assert self.policy.tick_s is not None, "armed only for a policy that plans"
        self._plan_armed = True
        self._arm(self._view.now_s + self.policy.tick_s, "plan", None)

    def _is_dead(self, timer: tuple[float, int, str, Any]) -> bool:
        when_s, _, kind, subject = timer
        if kind == "readmit":
            return bool(subject.ejected_until_s != when_s)
        if kind == "timeout" and subject.timeout_s != when_s:
            return True  # armed for an earlier stay in the queue
        return subject is not None and subject.state != QUEUED


_HANDLERS: dict[type, Callable[[SchedulerCore, Any], bool]] = {
    Arrived: SchedulerCore._on_arrived,
    FirstToken: SchedulerCore._on_first_token,
    Finished: SchedulerCore._on_finished,
    Failed: SchedulerCore._on_failed,
    Cancelled: SchedulerCore._on_cancelled,
    ReplicaChanged: SchedulerCore._on_replica_changed,
    Gauges: SchedulerCore._on_gauges,
    LaunchFailed: SchedulerCore._on_launch_failed,
    ConfigChanged: SchedulerCore._on_config_changed,
    Tick: SchedulerCore._on_tick,
}

_APPLIERS: dict[type, Callable[[SchedulerCore, Any], None]] = {
    Dispatch: SchedulerCore._dispatch,
    Shed: SchedulerCore._shed,
    Preempt: SchedulerCore._preempt,
    Launch: SchedulerCore._launch,
    Retire: SchedulerCore._retire,
}
