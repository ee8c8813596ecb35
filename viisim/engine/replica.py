"""An engine on the simulation's clock: the only engine file that knows the kernel.

Plain callbacks, no process per request. At one nanosecond arrivals, timers and scrapes come
before step ends, and step ends of replicas come in the order of their index; so a train of many
steps and the single steps it stands for are indistinguishable to everybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from viisim.engine.engine import Engine
from viisim.engine.sequence import Sequence
from viisim.engine.step_time import StepTime
from viisim.kernel import Kernel

#: Priorities of the simulation: what is due at one nanosecond happens in this order.
ARRIVAL, TIMER, DELIVERY, SCRAPE, STEP_END = range(5)


class Replica:
    """One engine, driven by the kernel.

    `on_steps(replica, ended, now_ns)` is called after every event of the engine that ended
    sequences, the very objects given to `take`, or yielded something else: see
    `engine.first_tokens` and `engine.aborted`.
    """

    def __init__(
        self,
        kernel: Kernel,
        index: int,
        replica_id: str,
        engine: Engine,
        on_steps: Callable[[Replica, Collection[Any], int], None],
    ) -> None:
        self.index = index
        self.id = replica_id
        self.engine = engine
        self._kernel = kernel
        self._priority = STEP_END + index
        self._on_steps = on_steps
        self._call = -1
        self._has_died = False
        self._withheld: list[Sequence] | None = None
        """What has ended while nobody could hear of it; None while everybody can."""

    def take(self, sequence: Sequence, now_ns: int) -> None:
        """A request is dispatched to this replica."""
        self._wake_at(self.engine.arrive(sequence, now_ns, self._step_has_ended(now_ns)))

    def abort(self, sequence: Sequence, now_ns: int) -> None:
        """Withdraw a sequence; it is gone after the step in progress."""
        if self._has_died:
            return  # it is gone already
        self._wake_at(self.engine.abort(sequence, now_ns, self._step_has_ended(now_ns)))

    def change_step_time(self, step_time: StepTime, now_ns: int) -> None:
        """From the next step on, steps take this long."""
        self._wake_at(self.engine.change_step_time(step_time, now_ns, self._step_has_ended(now_ns)))

    def halt(self, until_ns: int, now_ns: int) -> None:
        """Nothing is computed from now until then."""
        self._wake_at(self.engine.halt(until_ns, now_ns, self._step_has_ended(now_ns)))

    def _step_has_ended(self, now_ns: int) -> bool:
        """Whether a step of the engine that ends at this very nanosecond is over."""
        kernel = self._kernel
        return kernel.ended_ns == now_ns and kernel.ended_priority > self._priority

    def _wake_at(self, end_ns: int | None) -> None:
        """The engine's next event is then; None: when it was."""
        if end_ns is not None:
            self._call = self._kernel.call_at(end_ns, self._priority, self._step_end)

    def withhold(self) -> None:
        """From now on the engine computes unheard, until `release`."""
        self._withheld = []

    def release(self, now_ns: int) -> None:
        """What was withheld comes now, all of it at once."""
        ended, self._withheld = self._withheld, None
        for sequence in self.engine.first_tokens:
            sequence.first_token_ns = now_ns
        if ended or self.engine.first_tokens or self.engine.aborted:
            self._tell(ended or (), now_ns)

    def die(self, now_ns: int) -> None:
        """The engine computes no more, and what it has not told nobody will hear."""
        self.engine.catch_up(now_ns)
        for sequence in self.engine.first_tokens:
            sequence.first_token_ns = -1
        self._has_died = True
        self._call = -1

    def _step_end(self, now_ns: int, number: int) -> None:
        if number != self._call:
            return  # an arrival has cut the train: its end came earlier
        engine, kernel = self.engine, self._kernel
        kernel.ended_ns, kernel.ended_priority = now_ns, self._priority
        ended, end_ns = engine.finish(now_ns)
        if end_ns is not None:
            self._call = kernel.call_at(end_ns, self._priority, self._step_end)
        if ended or engine.first_tokens or engine.aborted:
            if self._withheld is None:
                self._tell(ended, now_ns)
            else:
                self._withheld.extend(ended)

    def _tell(self, ended: Collection[Sequence], now_ns: int) -> None:
        self._on_steps(self, ended, now_ns)
        self.engine.first_tokens.clear()
        self.engine.aborted.clear()
