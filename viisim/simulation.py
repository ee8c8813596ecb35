"""SimPy around one `SchedulerCore` and its simulated replicas.

The counterpart of `runtime.driver`: both feed events to the same core and perform its actions;
nothing else differs. Simulated time is integer nanoseconds from 0; the core is told seconds.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from policies.core import SchedulerCore
from policies.interface import (
    Action,
    Arrived,
    Cancelled,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Launch,
    LaunchFailed,
    Limits,
    Policy,
    Preempt,
    ReplicaChanged,
    Retire,
    Shed,
    StepCosts,
    Tick,
)
from policies.predictor import LengthPredictor
from viisim.engine.engine import Engine
from viisim.engine.replica import (
    ARRIVAL,
    DELIVERY,
    SCRAPE,
    TIMER,
    Replica,
)
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import StepTime
from viisim.fault_player import BROKEN, FaultPlan, FaultPlayer
from viisim.flight import Flight
from viisim.kernel import Kernel
from viisim.records import (
    FINISHED,
    REFUSED,
    REQUEST_COLUMNS,
    SAMPLE_COLUMNS,
    SHED,
    UNFINISHED,
    Columns,
    ReplicaTotals,
    SeedResult,
)
from viisim.step_costs import ApiServer
from viisim.transit import Transit
from viisim.workload.request import Request

NS_PER_S = 10**9
"""Times become seconds by dividing by 1e9, a float: so do workloads, and so does a compiled
module, whatever is asked for; beyond 2**53 ns the quotient of two whole numbers would differ."""
#: A policy that holds requests for so many scrapes, or ticks of its own, while every replica is
#: idle and no timer is due, will hold them for ever.
_PATIENCE = 1000
_TOO_LONG = "prompt too long"
_FAILED = "failed: "
"""Begins the reason with which the core sheds what failed and cannot be tried again."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One simulated replica of a cluster."""

    id: str
    model: str
    devices: tuple[str, ...]
    settings: SchedulerSettings
    step_time: StepTime
    coalesce: bool = True
    step_costs: StepCosts = StepCosts()  # noqa: RUF009 - frozen
    """What the policy is told of `step_time`."""
    api: ApiServer | None = None
    """What takes time between its clients and its engine; None: nothing does."""


#: Answers a `Launch` with the replica that it makes and how many nanoseconds that takes, or with
#: the reason why it cannot be.
Launcher: TypeAlias = Callable[[Launch], tuple[ReplicaSpec, int] | str]


class Journal(Protocol):
    """Where (event, actions) pairs go, in order."""

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one handled event."""


class _Life:
    """One replica, and from when to when it was there."""

    __slots__ = ("ready_ns", "replica", "retired_ns")

    def __init__(self, replica: Replica, ready_ns: int) -> None:
        self.replica = replica
        self.ready_ns = ready_ns
        self.retired_ns = 0


class Simulation:
    """One run: a policy, replicas, and requests in order of arrival.

    Requests whose prompt a replica cannot take (prompt >= max_model_len) are refused, as vLLM's
    front end does, and counted. The run ends with the last request, at `until_s`, or when the
    policy holds requests for ever; what is then still in the system counts as unfinished.
    What a `Launch` comes to, `launcher` says; without one, every launch fails. `faults` befall
    replicas of the cluster, not launched ones.
    """

    def __init__(
        self,
        replicas: Sequence[ReplicaSpec],
        policy: Policy,
        requests: Iterable[Request],
        *,
        seed: int = 0,
        scrape_s: float = 1.0,
        scrape_delay_s: float = 0.05,
        limits: Limits | None = None,
        until_s: float | None = None,
        journal: Journal | None = None,
        predictor: LengthPredictor | None = None,
        on_progress: Callable[[int], None] | None = None,
        launcher: Launcher | None = None,
        faults: FaultPlan | None = None,
    ) -> None:
        self.core = SchedulerCore(policy, seed, limits)
        self.kernel = Kernel()
        self._seed = seed
        self._specs = replicas
        self._launcher = launcher
        self._faults = None if faults is None else FaultPlayer(faults, self)
        self._replicas: dict[str, Replica] = {}
        """Those that are there, by id."""
        self._lives: list[_Life] = []
        """One for every replica that ever was, by index."""
        self._apis: dict[str, ApiServer] = {}
        self._read_ns: dict[str, int] = {}
        """By replica: when its API server has read all that was dispatched to it."""
        """Of the replicas that have one, by id."""
        for spec in replicas:
            self._add_replica(spec)
        self._loading: dict[int, ReplicaSpec] = {}
        """Launched, not ready yet; by the kernel's number."""
        self._requests = iter(requests)
        self._next: Request | None = None
        self._scrape_ns = round(scrape_s * NS_PER_S)
        self._delay_ns = round(scrape_delay_s * NS_PER_S)
        self._until_ns = None if until_s is None else round(until_s * NS_PER_S)
        self._journal = journal
        self._predictor = predictor
        self._on_progress = on_progress
        self._turns: dict[int, Request] = {}
        """Requests of closed-loop sessions that are still to arrive, by the kernel's number."""
        self._traffic_classes: dict[str, int] = {}
        self._tenants: dict[str, int] = {}
        self._flights: dict[str, Flight] = {}
        self._retiring: set[str] = set()
        self.transit = Transit(self.kernel, self._show, self._let_go)
        self._pending: list[Event] = []
        self._delivering = False
        self._timer_ns: int | None = None
        self._arrivals = 0
        self._idle_since_ns = 0
        self._scraped: deque[list[tuple[str, float, int, int, float]]] = deque()
        """Scrapes on their way to the core."""
        self._rows = Columns(REQUEST_COLUMNS)
        self._samples = Columns(SAMPLE_COLUMNS)

    # -- running --

    def run(self) -> SeedResult:
        """Simulate to the end and return what was recorded."""
        for spec in self._specs:
            self._deliver(_ready(spec, 0.0))
        self._next = next(self._requests, None)
        if self._next is not None:
            self.kernel.call_at(self._next.arrived_ns, ARRIVAL, self._arrive)
            self.kernel.call_at(0, SCRAPE, self._scrape)
            if self._faults is not None:
                self._faults.start()
        with _without_garbage_collection():
            events = self.kernel.run_calls(self._until_ns)
        return self._result(events)

    @property
    def _now_s(self) -> float:
        return self.kernel.now / 1e9

    # -- from the kernel to the core --

    def _arrive(self, now_ns: int, _: int) -> None:
        request = self._next
        assert request is not None, "an arrival is scheduled for a request"
        following = self._next = next(self._requests, None)
        if following is not None:
            self.kernel.call_at(following.arrived_ns, ARRIVAL, self._arrive)
        else:
            self._idle_since_ns = now_ns
        self._admit(request)

    def _arrive_again(self, now_ns: int, number: int) -> None:
        self._idle_since_ns = now_ns
        self._admit(self._turns.pop(number))

    def _admit(self, request: Request) -> None:
        if self._predictor is not None:
            request.view = self._predictor.predict(request.view, request.output_tokens)
        view = request.view
        arrivals = self._arrivals
        self._arrivals = arrivals + 1
        self._flights[view.id] = Flight(arrivals, request)
        self._deliver(Arrived(view.arrived_s, view))
        if self._on_progress is not None and not arrivals % 1024:
            self._on_progress(arrivals)

    def _tick(self, now_ns: int, _: int) -> None:
        if now_ns != self._timer_ns:
            return  # the core no longer wants it
        if self._is_over():
            return  # the run is over, however long the policy would go on ticking
        self._timer_ns = None
        self._deliver(Tick(now_ns / 1e9))

    def _is_over(self) -> bool:
        return self._next is None and not self._flights and not self._turns

    def _scrape(self, now_ns: int, number: int) -> None:
        """Sample every replica, for the records and as gauges for the core."""
        if self._next is None and not self._turns:
            if not self._flights:
                if self._faults is not None:  # more of them would come, for nobody
                    self.kernel.stop(now_ns, number)
                return
            if self._is_stuck(now_ns):
                self.kernel.stop(now_ns, number)
        sampled_s = now_ns / 1e9
        scraped: list[tuple[str, float, int, int, float]] = []
        for replica in self._replicas.values():
            engine = replica.engine
            running, waiting, used = engine.gauges(now_ns)
            busy_ns, prefill_ns = engine.spent_ns(now_ns)
            row = (now_ns, replica.index, running, waiting, used, busy_ns, prefill_ns, 0)
            self._samples.add(self._samples.pack(*row))
            usage = used / engine.scheduler.settings.usable_blocks
            if self._faults is None or not self._faults.is_silent(replica.id):
                scraped.append((replica.id, sampled_s, running, waiting, usage))
        self._scraped.append(scraped)
        self.kernel.call_at(now_ns + self._delay_ns, DELIVERY, self._deliver_gauges)
        self.kernel.call_at(now_ns + self._scrape_ns, SCRAPE, self._scrape)

    def _is_stuck(self, now_ns: int) -> bool:
        """Whether requests are held that nothing will ever release."""
        tick_s = self.core.policy.tick_s
        waits_for_timer = tick_s is None and self.core.next_timer_s() is not None
        busy = any(not replica.engine.is_idle for replica in self._replicas.values())
        if busy or waits_for_timer or self._loading:
            self._idle_since_ns = now_ns
        beat_ns = max(self._scrape_ns, round((tick_s or 0) * NS_PER_S))
        return now_ns > self._idle_since_ns + _PATIENCE * beat_ns

    def _deliver_gauges(self, now_ns: int, _: int) -> None:
        """The oldest scrape on the way arrives."""
        now_s = now_ns / 1e9
        for replica_id, sampled_s, running, waiting, usage in self._scraped.popleft():
            if replica_id in self._replicas:
                self._deliver(Gauges(now_s, replica_id, sampled_s, running, waiting, usage))

    def _on_steps(self, replica: Replica, ended: Collection[Flight], now_ns: int) -> None:
        """A replica's step has ended: tell the core what a driver would see."""
        self._show(cast("list[Flight]", replica.engine.first_tokens), ended, now_ns)
        self._tidy(replica)

    def _on_steps_behind_api(
        self, replica: Replica, ended: Collection[Flight], now_ns: int
    ) -> None:
        """The same where answers take time: the engine is rid of them, nobody has them yet."""
        when_ns = now_ns + self._apis[replica.id].answer_ns
        first_tokens = cast("list[Flight]", list(replica.engine.first_tokens))
        for flight in first_tokens:
            if not flight.withdrawn:
                flight.first_token_ns = when_ns
        if first_tokens or ended:
            self.transit.answer(replica, when_ns, first_tokens, list(ended))
        self._tidy(replica)

    def _show(
        self, first_tokens: Collection[Flight], ended: Collection[Flight], now_ns: int
    ) -> None:
        """Clients get first tokens and whole answers, unless they were withdrawn."""
        now_s = now_ns / 1e9
        if first_tokens and self.core.wants_first_token:
            for flight in first_tokens:
                if flight.request.view.streamed and not flight.withdrawn:
                    self._deliver(FirstToken(now_s, flight.name, flight.attempt))
        for flight in ended:
            if flight.withdrawn:
                self._cancelled(flight)
                continue
            output_tokens = flight.tokens - flight.prompt_tokens
            self._record(flight, FINISHED, output_tokens, now_ns)
            request = flight.request
            if request.next_turn is not None:
                following = request.next_turn(now_ns)
                number = self.kernel.call_at(following.arrived_ns, ARRIVAL, self._arrive_again)
                self._turns[number] = following
            if self._predictor is not None:
                self._predictor.observe(request.view, output_tokens)
            self._deliver(Finished(now_s, flight.name, flight.attempt, output_tokens))

    def _tidy(self, replica: Replica) -> None:
        """After a step: what was aborted is over, and a replica that drains may be empty."""
        for flight in cast("list[Flight]", replica.engine.aborted):
            self._cancelled(flight)
        if self._retiring and replica.id in self._retiring:
            self._retire_if_empty(replica.id)

    def _cancelled(self, flight: Flight) -> None:
        """Nothing is left of an attempt that was withdrawn."""
        if not flight.over:
            flight.over = True
            self._deliver(Cancelled(self._now_s, flight.name, flight.attempt))

    def _deliver(self, event: Event) -> None:
        """Hand an event to the core and perform its actions; events that these raise at once
        are handled after them."""
        if self._delivering:
            self._pending.append(event)
            return
        actions = self.core.handle(event)
        if self._journal is not None:
            self._journal.record(event, actions)
        if actions:
            self._perform(actions)
        when_s = self.core.next_timer_s()
        if when_s is not None:
            self._set_timer(when_s)

    def _perform(self, actions: Sequence[Action]) -> None:
        self._delivering = True
        for action in actions:
            _PERFORM[type(action)](self, action)
        self._delivering = False
        while self._pending:
            self._deliver(self._pending.pop(0))

    def _set_timer(self, when_s: float) -> None:
        when_ns = max(ceil(when_s * NS_PER_S), self.kernel.now)
        while when_ns / 1e9 < when_s:
            when_ns += 1
        if when_ns != self._timer_ns:
            self._timer_ns = when_ns
            self.kernel.call_at(when_ns, TIMER, self._tick)

    # -- performing actions --

    def _dispatch(self, action: Dispatch) -> None:
        flight = self._flights[action.request_id]
        if flight.attempt:
            if flight.failed and self._faults is not None:
                self._faults.note_retry(flight)
            flight = self._flights[action.request_id] = Flight(flight.index, flight.request)
        flight.dispatched_ns = self.kernel.now
        flight.attempt = action.attempt
        flight.priority = action.priority_of(flight.request.view)
        if self._faults is None or self._faults.lets_through(flight, action.replica_id):
            self.hand_over(flight, action.replica_id)

    def _shed(self, action: Shed) -> None:
        refused = action.reason.endswith(_TOO_LONG)
        if self._faults is not None and not refused and action.reason.startswith(_FAILED):
            self._faults.counts.lost += 1
        self._record(self._flights[action.request_id], REFUSED if refused else SHED, 0)

    def _preempt(self, action: Preempt) -> None:
        flight = self._flights[action.request_id]
        flight.withdrawn = True
        flight.lose_answer(self.kernel.now)
        if flight.replica is None:  # it is on its way
            self._cancelled(flight)
        elif not flight.over:
            flight.replica.abort(flight, self.kernel.now)

    def _launch(self, action: Launch) -> None:
        launched: tuple[ReplicaSpec, int] | str = "this cluster has no device to spare"
        if self._launcher is not None:
            launched = self._launcher(action)
        if isinstance(launched, str):
            self._deliver(LaunchFailed(self._now_s, action.replica_id, launched))
            return
        spec, load_ns = launched
        number = self.kernel.call_at(self.kernel.now + load_ns, DELIVERY, self._loaded)
        self._loading[number] = spec

    def _loaded(self, now_ns: int, number: int) -> None:
        """A launched replica is ready, unless it was retired meanwhile."""
        spec = self._loading.pop(number, None)
        if spec is None or self._is_over():
            return
        self._add_replica(spec)
        self._deliver(_ready(spec, now_ns / 1e9))

    def _add_replica(self, spec: ReplicaSpec) -> None:
        takes_time = spec.api is not None and spec.api.answer_ns > 0
        if spec.api is not None:
            self._apis[spec.id] = spec.api
        engine = Engine(
            spec.settings,
            spec.step_time,
            spec.coalesce,
            # What its client has seen decides whether an attempt that fails may be repeated.
            reports_first_tokens=(
                self.core.wants_first_token or self._faults is not None or takes_time
            ),
        )
        index = len(self._lives)
        on_steps = self._on_steps_behind_api if takes_time else self._on_steps
        replica = Replica(self.kernel, index, spec.id, engine, on_steps)
        self._replicas[spec.id] = replica
        self._lives.append(_Life(replica, self.kernel.now))

    def _retire(self, action: Retire) -> None:
        for number, spec in self._loading.items():
            if spec.id == action.replica_id:
                del self._loading[number]
                self._deliver(ReplicaChanged(self._now_s, spec.id, "gone"))
                return
        if action.replica_id in self._replicas:  # not gone by an earlier action of the same plan
            self._retiring.add(action.replica_id)
            self._retire_if_empty(action.replica_id)

    def _retire_if_empty(self, replica_id: str) -> None:
        replica = self._replicas[replica_id]
        if not replica.engine.scheduler.has_requests and not self._is_awaited(replica):
            self._retiring.remove(replica_id)
            del self._replicas[replica_id]
            self._lives[replica.index].retired_ns = self.kernel.now
            self._deliver(ReplicaChanged(self._now_s, replica_id, "gone"))

    def _is_awaited(self, replica: Replica) -> bool:
        """Whether requests, or answers, are between clients and its engine."""
        is_detained = self._faults is not None and self._faults.detains(replica.id)
        return is_detained or self.transit.has(replica)

    # -- on the way to an engine --

    def hand_over(self, flight: Flight, replica_id: str) -> None:
        """The request has reached its replica, if not yet the engine."""
        api = self._apis.get(replica_id)
        delay_ns = 0 if api is None else api.reads_ns(flight.prompt_tokens)
        if delay_ns:
            # One after another: a shorter prompt is read sooner, but overtakes none before it.
            delay_ns = max(delay_ns, self._read_ns.get(replica_id, 0) - self.kernel.now)
            self._read_ns[replica_id] = self.kernel.now + delay_ns
            self.transit.delay(flight, replica_id, delay_ns, self._enter)
        else:
            self._enter(flight, replica_id)

    def _enter(self, flight: Flight, replica_id: str) -> None:
        """The API server passes the request on to the engine, or refuses it."""
        replica = flight.replica = self._replicas[replica_id]
        now_ns = self.kernel.now
        flight.arrival = float(now_ns)
        if flight.prompt_tokens < replica.engine.scheduler.settings.max_model_len:
            replica.take(flight, now_ns)
        else:
            self._deliver(Failed(self._now_s, flight.name, flight.attempt, _TOO_LONG, False, False))

    # -- for faults: see `FaultyCluster` --

    def find_replica(self, replica_id: str, draining: bool = True) -> Replica | None:
        """The replica if it is there; with `draining` False, None for one that drains."""
        if replica_id in self._retiring and not draining:
            return None
        return self._replicas.get(replica_id)

    def flights_in(self, replica: Replica) -> list[Flight]:
        """The attempts that its engine has, in order of arrival."""
        return [f for f in self._flights.values() if f.replica is replica and not f.over]

    def fail(self, flight: Flight, reason: str, worker_fault: bool = True) -> None:
        """The attempt is over, unless it was already."""
        if flight.withdrawn:
            self._cancelled(flight)
        if flight.over:
            return
        flight.withdrawn = flight.over = flight.failed = True
        flight.lose_answer(self.kernel.now)
        subject = (self._now_s, flight.name, flight.attempt)
        self._deliver(Failed(*subject, reason, not flight.shown, worker_fault))

    def lose(self, replica: Replica, until_ns: int) -> None:
        """The replica dies with all that is in it or on the way to it, and is back then, empty.
        The core knows."""
        now_ns = self.kernel.now
        replica.die(now_ns)
        del self._replicas[replica.id]
        self._lives[replica.index].retired_ns = now_ns
        for flight in self.flights_in(replica):
            self.fail(flight, BROKEN)
        self._deliver(ReplicaChanged(self._now_s, replica.id, "starting"))
        number = self.kernel.call_at(until_ns, DELIVERY, self._loaded)
        self._loading[number] = next(spec for spec in self._specs if spec.id == replica.id)
        self.fail_underway(replica.id)

    def fail_underway(self, replica_id: str) -> None:
        """What is on the way to the replica fails."""
        for flight in self.transit.lose(replica_id):
            self.fail(flight, BROKEN)

    def set_up(self, replica_id: str, is_up: bool) -> None:
        """The core learns that the replica takes requests, or takes none."""
        state = "ready" if is_up else "starting"
        if replica_id not in self._retiring:
            self._deliver(ReplicaChanged(self._now_s, replica_id, state))

    def _let_go(self, replica_id: str) -> None:
        """Something is no longer on its way to the replica or from it; one that drains may go."""
        if replica_id in self._retiring:
            self._retire_if_empty(replica_id)

    # -- recording --

    def _record(
        self, flight: Flight, outcome: int, output_tokens: int, finished_ns: int = -1
    ) -> None:
        """Write the request's row and forget the request."""
        del self._flights[flight.name]
        request = flight.request
        cached_tokens = flight.cached_tokens
        self._rows.add(
            self._rows.pack(
                flight.index,
                outcome,
                -1 if flight.replica is None else flight.replica.index,
                flight.attempt,
                flight.prompt_tokens,
                output_tokens,
                cached_tokens if cached_tokens > 0 else 0,
                flight.preemptions,
                request.view.priority,
                self._traffic_classes.setdefault(
                    request.view.traffic_class, len(self._traffic_classes)
                ),
                self._tenants.setdefault(request.view.tenant, len(self._tenants)),
                request.view.streamed,
                request.arrived_ns,
                flight.dispatched_ns,
                flight.started_ns,
                flight.first_token_ns,
                finished_ns,
            )
        )

    def _result(self, events: int) -> SeedResult:
        for life in self._lives:
            if not life.retired_ns:
                life.replica.engine.catch_up(self.kernel.now)
        for flight in list(self._flights.values()):
            flight.lose_answer(self.kernel.now)
            self._record(flight, UNFINISHED, flight.outputs_so_far)
        requests = self._rows.arrays()
        order = np.argsort(requests["request"], kind="stable")
        return SeedResult(
            seed=self._seed,
            replica_ids=tuple([life.replica.id for life in self._lives]),
            requests={name: column[order] for name, column in requests.items()},
            samples=self._samples.arrays(),
            replicas=tuple([_totals(life) for life in self._lives]),
            ended_ns=self.kernel.now,
            traffic_classes=tuple(self._traffic_classes) or ("",),
            tenants=tuple(self._tenants) or ("",),
            events=events,
            faults=None if self._faults is None else self._faults.counts,
        )


_PERFORM: Mapping[type, Callable[[Simulation, Any], None]] = {
    Dispatch: Simulation._dispatch,
    Shed: Simulation._shed,
    Preempt: Simulation._preempt,
    Launch: Simulation._launch,
    Retire: Simulation._retire,
}


def _ready(spec: ReplicaSpec, now_s: float) -> ReplicaChanged:
    settings = spec.settings
    return ReplicaChanged(
        now_s,
        spec.id,
        "ready",
        spec.model,
        spec.devices,
        settings.max_num_seqs,
        settings.usable_blocks,
        settings.block_tokens,
        spec.step_costs,
    )


def _totals(life: _Life) -> ReplicaTotals:
    engine = life.replica.engine
    scheduler, log = engine.scheduler, engine.log
    log.fold()
    return ReplicaTotals(
        steps=log.steps,
        busy_ns=log.busy_ps // 1000,
        prefill_tokens=log.prefill_tokens,
        decode_tokens=log.decode_tokens,
        preemptions=scheduler.preemptions,
        prefix_queried_tokens=scheduler.queried_tokens,
        prefix_hit_tokens=scheduler.hit_tokens,
        extrapolated_steps=log.extrapolated_steps,
        usable_kv_blocks=scheduler.settings.usable_blocks,
        itl_counts=log.itl_counts,
        prefill_ns=engine.prefill_ns,
        ready_ns=life.ready_ns,
        retired_ns=life.retired_ns,
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing here makes reference cycles in number, and the collector's walks over a growing
    heap halve the speed of a long run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # What is alive now is no candidate: without this, the first collection after the
            # run would walk all of it.
            gc.freeze()
            gc.enable()
            gc.unfreeze()
