"""What is between clients and engines in the simulation: requests on their way, and answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

from viisim.engine.replica import DELIVERY, Replica
from viisim.flight import Flight
from viisim.kernel import Kernel

#: What is next for a request that has got there: the attempt, and its replica's id.
Arrive: TypeAlias = Callable[[Flight, str], None]
#: First tokens and whole answers that clients have now, in nanoseconds.
Show: TypeAlias = Callable[[list[Flight], list[Flight], int], None]


class Transit:
    """Of one run. `show` is told of answers that reach their clients, and `settled` of a replica
    to or from which something is no longer on its way."""

    def __init__(self, kernel: Kernel, show: Show, settled: Callable[[str], None]) -> None:
        self._kernel = kernel
        self._show = show
        self._settled = settled
        self._requests: dict[str, dict[Flight, bool]] = defaultdict(dict)
        """By replica: attempts on the way to its engine, and whether they are held there until
        `release`."""
        self._due: dict[int, tuple[Flight, str, Arrive]] = {}
        """Of those, the ones whose time of arrival is known; by the kernel's number."""
        self._answers: dict[int, tuple[Replica, list[Flight], list[Flight]]] = {}
        """What steps have yielded and clients do not have yet; by the kernel's number."""

    def delay(self, flight: Flight, replica_id: str, delay_ns: int, arrive: Arrive) -> None:
        """Have `arrive(flight, replica_id)` called so much later, unless the attempt is over by
        then."""
        self._requests[replica_id][flight] = False
        number = self._kernel.call_at(self._kernel.now + delay_ns, DELIVERY, self._reach)
        self._due[number] = (flight, replica_id, arrive)

    def hold(self, flight: Flight, replica_id: str) -> None:
        """The request does not reach its replica before `release`."""
        self._requests[replica_id][flight] = True

    def release(self, replica_id: str, arrive: Arrive) -> None:
        """What was held arrives now."""
        for flight, is_held in list(self._requests[replica_id].items()):
            if is_held:
                self._arrive_at(replica_id, flight, arrive)
        self._settled(replica_id)

    def lose(self, replica_id: str) -> list[Flight]:
        """What is on the way to the replica, and will not arrive."""
        return list(self._requests.pop(replica_id, {}))

    def answer(
        self, replica: Replica, when_ns: int, first_tokens: list[Flight], ended: list[Flight]
    ) -> None:
        """Clients have then what a step of the replica has yielded."""
        number = self._kernel.call_at(when_ns, DELIVERY, self._reach_clients)
        self._answers[number] = (replica, first_tokens, ended)

    def has(self, replica: Replica) -> bool:
        """Whether anything is on its way to the replica or from it."""
        answering = [answering for answering, _, _ in self._answers.values()]
        return bool(self._requests.get(replica.id)) or replica in answering

    def _reach(self, now_ns: int, number: int) -> None:
        flight, replica_id, arrive = self._due.pop(number)
        self._arrive_at(replica_id, flight, arrive)
        self._settled(replica_id)

    def _arrive_at(self, replica_id: str, flight: Flight, arrive: Arrive) -> None:
        """It has got there, unless it was called off, or failed on the way."""
        self._requests[replica_id].pop(flight, None)
        if not flight.over:
            arrive(flight, replica_id)

    def _reach_clients(self, now_ns: int, number: int) -> None:
        replica, first_tokens, ended = self._answers.pop(number)
        self._show(first_tokens, ended, now_ns)
        self._settled(replica.id)
