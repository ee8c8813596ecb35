"""Faults in the simulation: what the core would be told of them by `runtime.driver`.

One player a run. It decides what becomes of a fault, and of a request dispatched to a replica that
has one; what it needs of the simulation says `FaultyCluster`.

What a deployment would know, and when: that a process has died, its supervisor sees at once; that
one hangs or refuses to work, by looking at its health. Either way the core is told that the replica
is not ready until the fault is over. What is in flight in a worker that hangs stays there until its
supervisor ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from viisim.engine.replica import DELIVERY, Replica
from viisim.engine.step_time import StepTime
from viisim.faults import HEAT_EVERY_S, PROBE_S, Fault, Throttle
from viisim.kernel import Kernel
from viisim.records import FaultCounts

if TYPE_CHECKING:
    from viisim.flight import Flight
    from viisim.transit import Transit

HEALTH_EVERY_S = 5.0
DOUBT_EVERY_S = 0.25
HEALTH_FAILURES = 3
KILL_S = 30.0
"""How often a supervisor looks at the health of a worker that was well, of one that was not, how
many failures in a row it believes, and how long after that it ends the worker's process
(`runtime.supervisor.Patience`)."""
_LOOKS_S = HEALTH_EVERY_S / 2 + (HEALTH_FAILURES - 1) * DOUBT_EVERY_S
NOTICED_S = {"refuse": _LOOKS_S, "hang": _LOOKS_S + HEALTH_FAILURES * PROBE_S}
"""Until it has looked so often: from half a period before the first time, which is the mean, each
look being answered at once or in vain waited for."""

UNREACHABLE = "the worker cannot be reached"
BROKEN = "the worker closed the connection"
REFUSED = "the worker answered 503: the server refuses requests"
"""Reasons in the proxy's words (`runtime.upstream`, `runtime.reply`)."""

_HEAT_EVERY_NS = round(HEAT_EVERY_S * 1e9)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of one run, in order of time."""

    faults: Iterator[Fault]
    step_times: Mapping[str, Callable[[float], StepTime]]
    """Of every replica that a fault may befall, by id: its step times at a factor."""


class FaultyCluster(Protocol):
    """A simulation, as far as faults change it."""

    @property
    def kernel(self) -> Kernel: ...
    @property
    def transit(self) -> Transit: ...
    def find_replica(self, replica_id: str, draining: bool = True) -> Replica | None:
        """The replica if it is there; with `draining` False, None for one that drains."""

    def flights_in(self, replica: Replica) -> list[Flight]:
        """The attempts that its engine has, in order of arrival."""

    def hand_over(self, flight: Flight, replica_id: str) -> None:
        """The request has reached its replica, if not yet the engine."""

    def fail_underway(self, replica_id: str) -> None:
        """What is on the way to the replica fails."""

    def fail(self, flight: Flight, reason: str, worker_fault: bool = True) -> None:
        """The attempt is over, unless it was already."""

    def lose(self, replica: Replica, until_ns: int) -> None:
        """The replica dies with all that is in it or on the way to it, and is back then, empty.
        The core knows."""

    def set_up(self, replica_id: str, is_up: bool) -> None:
        """The core learns that the replica takes requests, or takes none."""


class FaultPlayer:
    """Plays the faults of one run."""

    def __init__(self, plan: FaultPlan, cluster: FaultyCluster) -> None:
        self.counts = FaultCounts()
        self._plan = plan
        self._cluster = cluster
        self._coming: Fault | None = None
        self._lasting: dict[str, Fault] = {}
        """By replica."""
        self._unready: set[str] = set()
        """Replicas that get no requests because they look ill."""
        self._ends: dict[int, Fault] = {}
        """By the kernel's number, as the others below."""
        self._notices: dict[int, Fault] = {}
        self._heated: dict[int, tuple[Fault, Throttle]] = {}

    def start(self) -> None:
        """Have the first fault come."""
        fault = self._coming = next(self._plan.faults, None)
        if fault is not None:
            self._call_at(_ns(fault.at_s), self._begin)

    # -- for the simulation --

    def lets_through(self, flight: Flight, replica_id: str) -> bool:
        """Whether a dispatched request reaches its replica now; else it is dealt with."""
        fault = self._lasting.get(replica_id)
        if fault is None:
            return True
        match fault.kind:
            case "crash":
                self._cluster.fail(flight, UNREACHABLE)
            case "refuse":
                self._cluster.fail(flight, REFUSED, worker_fault=False)
            case "hang":
                self._cluster.transit.hold(flight, replica_id)
            case "network_delay":
                arrive = self._cluster.hand_over
                self._cluster.transit.delay(flight, replica_id, _ns(fault.delay_s), arrive)
            case _:
                return True
        return False

    def is_silent(self, replica_id: str) -> bool:
        """Whether its metrics cannot be read."""
        fault = self._lasting.get(replica_id)
        return fault is not None and fault.kind in ("crash", "hang", "refuse")

    def detains(self, replica_id: str) -> bool:
        """Whether it may have answers that nobody can hear."""
        fault = self._lasting.get(replica_id)
        return fault is not None and fault.kind == "hang"

    def note_retry(self, flight: Flight) -> None:
        """The request is tried again; `flight` is the attempt that failed."""
        self.counts.retried += 1
        self.counts.duplicated += flight.shown

    # -- beginnings and ends --

    def _begin(self, now_ns: int, _: int) -> None:
        fault = self._coming
        assert fault is not None, "the call was for this fault"
        replica = self._cluster.find_replica(fault.replica, draining=False)
        if replica is not None:
            self.counts.injected += 1
            self._befall(fault, replica, now_ns)
        self.start()

    def _befall(self, fault: Fault, replica: Replica, now_ns: int) -> None:
        if fault.kind == "halt":  # over the other faults, not instead of them
            replica.halt(_ns(fault.until_s), now_ns)
            return
        if fault.duration_s:
            self._lasting[fault.replica] = fault
            self._ends[self._call_at(_ns(fault.until_s), self._end)] = fault
        match fault.kind:
            case "crash":
                # Until the end of the fault there is nobody.
                self._cluster.lose(replica, _ns(fault.until_s))
            case "network_cut":
                self._cut(fault, replica, now_ns)
            case "hang" | "refuse":
                if fault.kind == "hang":
                    replica.withhold()
                noticed_s = fault.at_s + NOTICED_S[fault.kind]
                if fault.until_s > noticed_s:
                    self._notices[self._call_at(_ns(noticed_s), self._notice)] = fault
                if fault.until_s > noticed_s + KILL_S:
                    number = self._call_at(_ns(noticed_s + KILL_S), self._give_up)
                    self._notices[number] = fault
            case "slow" if fault.step_time is not None:
                replica.change_step_time(fault.step_time, now_ns)
            case "slow":
                self._slow_down(fault, replica, fault.factor)
            case "thermal":
                assert fault.heat is not None, "thermal faults have it"
                throttle = Throttle(fault.heat, now_ns, *replica.engine.spent_ns(now_ns))
                self._heat_later(fault, throttle)

    def _end(self, now_ns: int, number: int) -> None:
        fault = self._ends.pop(number)
        del self._lasting[fault.replica]
        replica = self._cluster.find_replica(fault.replica)
        if replica is None:
            return  # gone, or it comes back at this moment
        if fault.kind == "hang":
            replica.release(now_ns)
            self._cluster.transit.release(fault.replica, self._cluster.hand_over)
        elif fault.kind in ("slow", "thermal"):
            self._slow_down(fault, replica, 1.0)
        if fault.replica in self._unready:
            self._unready.discard(fault.replica)
            self._cluster.set_up(fault.replica, True)

    # -- each kind --

    def _cut(self, fault: Fault, replica: Replica, now_ns: int) -> None:
        """The worker sees its clients leave."""
        flights = self._cluster.flights_in(replica)
        for flight in flights:
            replica.abort(flight, now_ns)
        for flight in flights:
            self._cluster.fail(flight, BROKEN)
        self._cluster.fail_underway(fault.replica)

    def _notice(self, now_ns: int, number: int) -> None:
        """The third look at the worker's health has failed: it gets no more requests."""
        fault = self._notices.pop(number)
        if self._cluster.find_replica(fault.replica, draining=False) is not None:
            self._unready.add(fault.replica)
            self._cluster.set_up(fault.replica, False)

    def _give_up(self, now_ns: int, number: int) -> None:
        """Its supervisor ends it; what starts in its place is not well either."""
        fault = self._notices.pop(number)
        replica = self._cluster.find_replica(fault.replica, draining=False)
        if replica is not None:
            self._unready.discard(fault.replica)
            self._lasting[fault.replica] = replace(fault, kind="crash")
            self._cluster.lose(replica, _ns(fault.until_s))

    def _slow_down(self, fault: Fault, replica: Replica, factor: float) -> None:
        step_time = self._plan.step_times[fault.replica](factor)
        replica.change_step_time(step_time, self._cluster.kernel.now)

    def _heat_later(self, fault: Fault, throttle: Throttle) -> None:
        now_ns = self._cluster.kernel.now
        number = self._call_at(now_ns + _HEAT_EVERY_NS, self._heat)
        self._heated[number] = (fault, throttle)

    def _heat(self, now_ns: int, number: int) -> None:
        fault, throttle = self._heated.pop(number)
        replica = self._cluster.find_replica(fault.replica)
        if replica is None or self._lasting.get(fault.replica) is not fault:
            return
        before = throttle.factor
        throttle.advance(now_ns, *replica.engine.spent_ns(now_ns))
        if throttle.factor != before:
            self._slow_down(fault, replica, throttle.factor)
        self._heat_later(fault, throttle)

    def _call_at(self, when_ns: int, callback: Callable[[int, int], None]) -> int:
        kernel = self._cluster.kernel
        return kernel.call_at(max(when_ns, kernel.now), DELIVERY, callback)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
