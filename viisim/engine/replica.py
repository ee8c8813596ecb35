"""An engine on the SimPy clock: the only engine file that knows the kernel.

Plain callbacks on SimPy events, no process per request. Ties at one nanosecond are broken by
event priority: arrivals, timers and scrapes come before step ends, and step ends of replicas
come in the order of their index. `Phase` remembers how far a nanosecond has got, so that a
train of many steps answers as the single steps would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

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


class Call(simpy.Event):
    """A kernel event that calls `callback(event)` at `when_ns`."""

    _ok = True
    _value = None

    def __init__(
        self,
        env: simpy.Environment,
        when_ns: int,
        priority: int,
        callback: Callable[[simpy.Event], None],
    ) -> None:
        # Not super().__init__: the event is triggered from the start, as simpy.Timeout is.
        self.env = env
        self.callbacks = [callback]
        env.schedule(self, priority, when_ns - env.now)  # type: ignore[arg-type]


class Replica:
    """One engine, driven by kernel events.

    `on_steps(replica, ended, now_ns)` is called after every event of the engine with the
    sequences that ended; `engine.first_tokens` and `engine.aborted` hold what else happened.
    """

    def __init__(
        self,
        env: simpy.Environment,
        phase: Phase,
        index: int,
        replica_id: str,
        engine: Engine,
        on_steps: Callable[[Replica, Collection[Sequence], int], None],
    ) -> None:
        self.index = index
        self.id = replica_id
        self.engine = engine
        self._env = env
        self._phase = phase
        self._priority = STEP_END + index
        self._on_steps = on_steps
        self._event: Call | None = None
        self._event_ns = 0

    def take(self, sequence: Sequence, now_ns: int) -> None:
        """A request is dispatched to this replica."""
        self._wake_at(self.engine.arrive(sequence, now_ns, self._phase.priority > self._priority))

    def abort(self, sequence: Sequence, now_ns: int) -> None:
        """Withdraw a sequence; it is gone after the step in progress."""
        self._wake_at(self.engine.abort(sequence, now_ns, self._phase.priority > self._priority))

    def _wake_at(self, when_ns: int | None) -> None:
        if when_ns is not None:
            self._event_ns = when_ns
            self._event = Call(self._env, when_ns, self._priority, self._step_end)

    def _step_end(self, event: simpy.Event) -> None:
        if event is not self._event:
            return  # an arrival has cut the train: its end came earlier
        now_ns = self._event_ns
        self._phase.reach(now_ns, self._priority)
        engine = self.engine
        ended, next_ns = engine.finish(now_ns)
        self._wake_at(next_ns)
        if ended or engine.first_tokens or engine.aborted:
            self._on_steps(self, ended, now_ns)
