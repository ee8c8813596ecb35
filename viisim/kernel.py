"""SimPy's environment in integer nanoseconds, with bare callbacks beside its events.

Ties at one nanosecond are broken by priority, then by the order of scheduling. A bare callback
costs a third of an event, and the simulator uses nothing else; processes and events of SimPy
work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeAlias

import simpy

#: Called with the time and the number that `Kernel.call_at` gave the call.
Callback: TypeAlias = Callable[[int, int], None]


class Kernel(simpy.Environment):
    """The simulation's clock and calendar."""

    _now: int
    _queue: list[Any]

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.ended_ns = -1
        self.ended_priority = 0
        """When the last step end was, and its priority: of that nanosecond, step ends up to
        this priority are over."""

    @property
    def now(self) -> int:
        """Simulated time, ns."""
        return self._now

    def call_at(self, when_ns: int, priority: int, callback: Callback) -> int:
        """Have `callback(when_ns, number)` called; returns the number, unique to this call."""
        number = next(self._eid)
        heappush(self._queue, (when_ns, priority, number, callback))
        return number

    def run_calls(self, until_ns: int | None = None) -> int:
        """Run until nothing is left, or up to and including `until_ns`; returns how many
        callbacks and events have been scheduled by then."""
        queue, simpy_event = self._queue, simpy.Event
        limit_ns = _NEVER_NS if until_ns is None else until_ns
        try:
            while queue and queue[0][0] <= limit_ns:
                item = heappop(queue)
                now_ns, _, number, callback = item
                if isinstance(callback, simpy_event):
                    heappush(queue, item)
                    self.step()
                else:
                    self._now = now_ns
                    callback(now_ns, number)
        except _Stopped:
            pass
        else:
            if queue and until_ns is not None:
                self._now = until_ns
        return next(self._eid)

    def stop(self, now_ns: int, number: int) -> None:
        """End `run_calls`; itself a callback."""
        raise _Stopped


#: Thirty years.
_NEVER_NS = 10**18


class _Stopped(Exception):  # noqa: N818 - not an error
    """`Kernel.stop` was called."""
