"""SimPy's environment in integer nanoseconds, with bare callbacks beside its events.

Ties at one nanosecond are broken by priority, then by the order of scheduling. A bare callback
costs a third of an event, and the simulator uses nothing else; processes and events of SimPy
work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

import simpy


class Call:
    """A scheduled callback: `callback(now_ns, call)`. Its identity tells it from stale ones."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[int, Call], None]) -> None:
        self.callback = callback


class Kernel(simpy.Environment):
    """The simulation's clock and calendar."""

    _now: int
    phase = 0
    """The highest priority that the current nanosecond has reached. An event inserted late, with
    a smaller priority, can so tell what of this nanosecond is already over."""

    def __init__(self) -> None:
        super().__init__(initial_time=0)

    @property
    def now(self) -> int:
        """Simulated time, ns."""
        return self._now

    def call_at(self, when_ns: int, priority: int, callback: Callable[[int, Call], None]) -> Call:
        """Have `callback(now_ns, call)` called at `when_ns`; returns that call."""
        call = Call(callback)
        heappush(self._queue, (when_ns, priority, next(self._eid), call))  # type: ignore[misc]
        return call

    def run_calls(self, until_ns: int | None = None) -> int:
        """Run until nothing is left, or up to and including `until_ns`; returns how many
        callbacks and events that took."""
        queue, done = self._queue, 0
        while queue and (until_ns is None or queue[0][0] <= until_ns):
            now_ns, priority, _, call = queue[0]
            if now_ns > self._now or priority > self.phase:
                self.phase = priority
            done += 1
            if type(call) is Call:
                heappop(queue)
                self._now = now_ns
                call.callback(now_ns, call)
            else:
                self.step()
        return done
