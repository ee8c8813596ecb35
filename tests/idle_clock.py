"""An event loop whose clock stands still while there is work to do, and jumps when there is none.

What runs on it takes as long by its clock on a busy machine as on an idle one: a test may say how
late an answer comes. Both ends of every connection must be served by the loop itself, and whatever
reads a clock must read the loop's.
"""

from __future__ import annotations

import asyncio
import selectors

DELIVERY_S = 0.001
"""By the wall clock: the kernel may take so long to hand over what has been sent on loopback."""


class _Jumping(selectors.DefaultSelector):
    """Waits for nothing but the delivery of what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See selectors.BaseSelector; `timeout` is None when the loop has no timer."""
        if not timeout:
            return super().select(timeout)
        ready = super().select(min(timeout, DELIVERY_S))
        if not ready:
            self.now_s += timeout
        return ready


class IdleClockLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made, idle ones only."""
        return self._jumping.now_s
