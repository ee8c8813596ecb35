"""A rehearsal: one policy against a small scripted cluster, the same every time.

Three replicas serve two models. Requests come alone and in bursts; answers end well, fail or
lose their client; gauges are scraped; a replica drains and returns. With `outage`, every replica
is lost half way through and they come back one by one. What happens to an attempt depends on its
request and number only, never on what else was decided, so that two policies that decide alike
see the same.

Every instant is a multiple of 1/1024 s, which a float holds exactly even when the whole script
is shifted by a million seconds. At one instant, the script comes before the core's own timer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, TypeAlias
from zlib import crc32

from numpy.random import default_rng

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
    RequestView,
    Retire,
    StepCosts,
    Tick,
)

SECOND = 1024
"""Steps of the grid in a second."""
LAST_ARRIVAL = 30 * SECOND
END = 90 * SECOND
"""Long after the last arrival: who is held by then is held for ever."""
REQUESTS = 160
MAX_EVENTS = 20_000
"""A policy that asks for `plan` every microsecond is stopped rather than waited for."""
SLOTS = 4
KV_BLOCKS = 400
STEP_COSTS = {
    "alpha": StepCosts((1, 4), (0.0125, 0.015), (2**-20, 2**-20), 0.03, 2**-10, 2**-23, 0.0, 512)
}
"""Of one model they are known, of the other not."""
MODELS = {"r0": "alpha", "r1": "alpha", "r2": "beta"}

Happening: TypeAlias = Callable[[float], Iterable[Event]]
"""What takes place at an instant: given the time, the events to report one by one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rehearsal showed."""

    decisions: tuple[tuple[str, tuple[Action, ...]], ...]
    """Each event, without its times, and the actions it caused."""
    held: int
    """Requests still in the central queue at the end."""


class Rehearsal:
    """One run of the script. `shift_s` is added to every instant."""

    def __init__(
        self,
        policy: Policy,
        *,
        outage: bool = False,
        shift_s: float = 0.0,
        guard: Callable[..., Any] | None = None,
    ) -> None:
        self.core = SchedulerCore(policy, seed=1, limits=Limits(eject_s=4.0), guard=guard)
        self.event = ""
        """The event being handled, for messages."""
        self._shift_s = shift_s
        self._now = 0
        self._order = 0
        self._agenda: list[tuple[int, int, Happening]] = []
        self._requests: dict[str, RequestView] = {}
        self._attempts: dict[str, Dispatch] = {}
        self._streaming: set[str] = set()
        self._ready: set[str] = set()
        self._retiring: set[str] = set()
        self._launches = 0
        self._decisions: list[tuple[str, tuple[Action, ...]]] = []
        self._write_script(outage)

    def run(self) -> Outcome:
        """Play the script to its end. Raises what the core or the policy raises."""
        while len(self._decisions) < MAX_EVENTS and self._now < END and not self._is_over():
            for event in self._next_events():
                self._report(event)
        return Outcome(tuple(self._decisions), self.core.queued_requests)

    # -- time ------------------------------------------------------------------------------

    def _at(self, step: int, happening: Happening) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (step, self._order, happening))

    def _after(self, steps: int, happening: Happening) -> None:
        self._at(self._now + steps, happening)

    def _is_over(self) -> bool:
        core = self.core
        return self._now > LAST_ARRIVAL and not (core.queued_requests or core.inflight_requests)

    def _next_events(self) -> Iterable[Event]:
        """Move to the next instant: of the script, or of the core's timer on the grid after it."""
        timer_s = self.core.next_timer_s()
        timer = END
        if timer_s is not None:
            timer = max(self._now, ceil((timer_s - self._shift_s) * SECOND - 1e-3))
        if self._agenda and self._agenda[0][0] <= timer:
            self._now, _, happening = heapq.heappop(self._agenda)
            return happening(self._now_s)
        self._now = timer
        return (Tick(self._now_s),)

    @property
    def _now_s(self) -> float:
        return self._shift_s + self._now / SECOND

    # -- the script ------------------------------------------------------------------------

    def _write_script(self, outage: bool) -> None:
        for replica_id in MODELS:
            self._at(0, partial(self._returns, replica_id))
        for step, request in _requests(self._shift_s):
            self._at(step, partial(self._arrives, request))
        for step in range(SECOND, END, SECOND):
            self._at(step, self._scrape)
        if outage:
            self._at(12 * SECOND, self._lose_all)
            self._at(16 * SECOND, partial(self._returns, "r1"))
            self._at(22 * SECOND, partial(self._returns, "r2"))
            self._at(24 * SECOND, partial(self._returns, "r0"))
        else:
            self._at(5 * SECOND, partial(self._drains, "r0"))
            self._at(8 * SECOND, partial(self._returns, "r0"))

    def _arrives(self, request: RequestView, now_s: float) -> Iterator[Event]:
        self._requests[request.id] = request
        yield Arrived(now_s, request)

    def _returns(self, replica_id: str, now_s: float) -> Iterator[Event]:
        yield from self._becomes_ready(Launch(MODELS[replica_id], (replica_id,), replica_id), now_s)

    def _becomes_ready(self, launched: Launch, now_s: float) -> Iterator[Event]:
        replica_id = launched.replica_id
        if replica_id not in self._retiring:
            self._ready.add(replica_id)
            yield ReplicaChanged(
                now_s,
                replica_id,
                "ready",
                launched.model,
                launched.devices,
                SLOTS,
                KV_BLOCKS,
                step_costs=STEP_COSTS.get(launched.model, StepCosts()),
            )

    def _drains(self, replica_id: str, now_s: float) -> Iterator[Event]:
        if replica_id in self._ready:
            self._ready.remove(replica_id)
            yield ReplicaChanged(now_s, replica_id, "draining")

    def _lose_all(self, now_s: float) -> Iterator[Event]:
        for replica_id in sorted(self._ready | self._retiring):
            self._ready.discard(replica_id)
            self._retiring.discard(replica_id)
            yield ReplicaChanged(now_s, replica_id, "gone")
        for attempt in list(self._attempts.values()):
            yield from self._fails(attempt, "replica lost", True, now_s)

    def _scrape(self, now_s: float) -> Iterator[Event]:
        """Sample every replica now; the gauges arrive a sixteenth of a second later."""
        for replica_id in sorted(self._ready):
            here = [a.request_id for a in self._attempts.values() if a.replica_id == replica_id]
            running = min(len(here), SLOTS)
            blocks = sum(ceil(self._requests[name].prompt_tokens / 16) for name in here)
            sample = (replica_id, now_s, running, len(here) - running, min(1, blocks / KV_BLOCKS))
            self._after(SECOND // 16, partial(self._gauges, sample))
        return iter(())

    def _gauges(self, sample: tuple[str, float, int, int, float], now_s: float) -> Iterator[Event]:
        yield Gauges(now_s, *sample)

    # -- what becomes of actions -----------------------------------------------------------

    def _report(self, event: Event) -> None:
        self.event = _describe(event)
        actions = self.core.handle(event)
        self._decisions.append((self.event, tuple(actions)))
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._start(action)
            case Preempt():
                attempt = self._attempts[action.request_id]
                self._after(8, partial(self._ends, attempt, Cancelled, ()))
            case Launch():
                self._launches += 1  # every third comes to nothing
                come = self._launch_fails if self._launches % 3 == 0 else self._becomes_ready
                self._after(2 * SECOND, partial(come, action))
            case Retire():
                self._ready.discard(action.replica_id)
                self._retiring.add(action.replica_id)
                self._after(SECOND, partial(self._leaves, action.replica_id))

    def _start(self, attempt: Dispatch) -> None:
        """Draw the attempt's fate from its name."""
        self._attempts[attempt.request_id] = attempt
        fate = crc32(f"{attempt.request_id}/{attempt.attempt}".encode())
        steps = 64 + fate % (2 * SECOND)
        if self._requests[attempt.request_id].streamed and self.core.wants_first_token:
            self._after(steps // 2, partial(self._streams, attempt))
        match fate // 4096 % 16:
            case 0:
                self._after(steps // 4, partial(self._fails, attempt, "worker died", True))
            case 1:
                self._after(steps // 4, partial(self._fails, attempt, "bad request", False))
            case 2:
                self._after(steps // 3, partial(self._client_leaves, attempt))
            case _:
                self._after(steps, partial(self._ends, attempt, Finished, (1 + fate % 200,)))

    def _is_running(self, attempt: Dispatch) -> bool:
        return self._attempts.get(attempt.request_id) == attempt

    def _streams(self, attempt: Dispatch, now_s: float) -> Iterator[Event]:
        if self._is_running(attempt):
            self._streaming.add(attempt.request_id)
            yield FirstToken(now_s, attempt.request_id, attempt.attempt)

    def _ends(
        self, attempt: Dispatch, kind: Callable[..., Event], details: tuple[Any, ...], now_s: float
    ) -> Iterator[Event]:
        """The attempt's terminal event, unless it has ended already."""
        if self._is_running(attempt):
            del self._attempts[attempt.request_id]
            yield kind(now_s, attempt.request_id, attempt.attempt, *details)

    def _fails(
        self, attempt: Dispatch, reason: str, worker_fault: bool, now_s: float
    ) -> Iterator[Event]:
        retryable = worker_fault and attempt.request_id not in self._streaming
        yield from self._ends(attempt, Failed, (reason, retryable, worker_fault), now_s)

    def _client_leaves(self, attempt: Dispatch, now_s: float) -> Iterator[Event]:
        if self._is_running(attempt):
            self._after(16, partial(self._ends, attempt, Cancelled, ()))
            yield Cancelled(now_s, attempt.request_id, 0)

    def _launch_fails(self, launched: Launch, now_s: float) -> Iterator[Event]:
        yield LaunchFailed(now_s, launched.replica_id, "out of memory")

    def _leaves(self, replica_id: str, now_s: float) -> Iterator[Event]:
        """A retired replica goes once nothing is in flight on it."""
        if any(attempt.replica_id == replica_id for attempt in self._attempts.values()):
            self._after(SECOND, partial(self._leaves, replica_id))
        elif replica_id in self._retiring:
            self._retiring.remove(replica_id)
            yield ReplicaChanged(now_s, replica_id, "gone")


def _describe(event: Event) -> str:
    """An event without its times, so that shifted runs compare equal."""
    if isinstance(event, Arrived):
        return f"Arrived {event.request.id}"
    subject = getattr(event, "request_id", getattr(event, "replica_id", ""))
    return f"{type(event).__name__} {subject}".rstrip()


def _requests(shift_s: float) -> Iterator[tuple[int, RequestView]]:
    """The script's requests with their arrival steps: half of them come in bursts of four."""
    rng = default_rng(2026)
    steps = sorted(rng.integers(1, LAST_ARRIVAL, REQUESTS).tolist())
    for number in range(REQUESTS):
        step = steps[number // 4 * 4 if number % 8 < 4 else number]
        family = int(rng.integers(6))
        predicts, hurries = rng.random(2) < (0.5, 0.2)
        arrived_s = shift_s + step / SECOND
        yield (
            step,
            RequestView(
                id=f"q{number}",
                model="beta" if rng.random() < 0.3 else "alpha",
                arrived_s=arrived_s,
                prompt_tokens=int(rng.integers(16, 3000)),
                max_output_tokens=int(rng.integers(1, 400)),
                streamed=bool(rng.random() < 0.8),
                priority=int(rng.integers(3)),
                tenant=f"tenant{family % 3}",
                traffic_class="batch" if family == 0 else "chat",
                deadline_s=arrived_s + 20 if hurries else None,
                prefix_blocks=tuple(range(family * 100, family * 100 + family)),
                prefix_block_tokens=16,
                predicted_output_tokens=int(rng.integers(1, 300)) if predicts else None,
            ),
        )
