"""An engine on the SimPy clock: the only engine file that knows the kernel.

Plain callbacks on SimPy events, no process per request. Ties at one nanosecond are broken by
event priority: arrivals, timers and scrapes come before step ends, and step ends of replicas
come in the order of their index. `Phase` remembers how far a nanosecond has got, so that a
train of many steps answers as the single steps would.
"""

from __future__ import annotations

from collections.abc import Callable

import simpy

from viisim.engine.engine import Engine
from viisim.engine.sequence import Sequence

#: Event priorities of the simulation kernel: whatever is due at a nanosecond, in this order.
ARRIVAL, TIMER, DELIVERY, SCRAPE, STEP_END = range(5)


class Phase:
    """How far the kernel has got within the current nanosecond."""

    __slots__ = ("now_ns", "priority")

    def __init__(self) -> None:
        self.now_ns = -1
        self.priority = 0

    def reach(self, now_ns: int, priority: int) -> None:
        """An event of this priority is being processed."""
        if now_ns > self.now_ns:
            self.now_ns = now_ns
            self.priority = priority
        elif priority > self.priority:
            self.priority = priority


def call_at(
    env: simpy.Environment, when_ns: int, priority: int, callback: Callable[[simpy.Event], None]
) -> simpy.Event:
    """Have the kernel call `callback(event)` at `when_ns`."""
    event = simpy.Event(env)
    event._ok = True
    event._value = None
    event.callbacks = [callback]
    env.schedule(event, priority, when_ns - env.now)  # type: ignore[arg-type]
    return event


class Replica:
    """One engine, driven by kernel events.

    `on_steps(replica, ended)` is called after every event of the engine with the sequences that
    ended; `engine.first_tokens` and `engine.aborted` hold what else happened.
    """

    def __init__(
        self,
        env: simpy.Environment,
        phase: Phase,
        index: int,
        replica_id: str,
        engine: Engine,
        on_steps: Callable[[Replica, list[Sequence]], None],
    ) -> None:
        self.index = index
        self.id = replica_id
        self.engine = engine
        self._env = env
        self._phase = phase
        self._priority = STEP_END + index
        self._on_steps = on_steps
        self._event: simpy.Event | None = None

    def take(self, sequence: Sequence) -> None:
        """A request is dispatched to this replica."""
        now_ns = self._env.now
        ended = self._phase.priority > self._priority
        self._wake_at(self.engine.arrive(sequence, now_ns, ended))  # type: ignore[arg-type]

    def abort(self, sequence: Sequence) -> None:
        """Withdraw a sequence; it is gone after the step in progress."""
        now_ns = self._env.now
        ended = self._phase.priority > self._priority
        self._wake_at(self.engine.abort(sequence, now_ns, ended))  # type: ignore[arg-type]

    def _wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None:
            self._event = call_at(self._env, when_ns, self._priority, self._step_end)

    def _step_end(self, event: simpy.Event) -> None:
        if event is not self._event:
            return  # an arrival has cut the train: its end came earlier
        self._event = None
        now_ns = self._env.now
        self._phase.reach(now_ns, self._priority)  # type: ignore[arg-type]
        engine = self.engine
        ended, next_ns = engine.finish(now_ns)  # type: ignore[arg-type]
        self._wake_at(next_ns)
        if ended or engine.first_tokens or engine.aborted:
            self._on_steps(self, ended)
