"""What goes wrong in an experiment, where and when: the same in a simulation and when deployed.

An experiment's `faults` say it in general, with times or rates; `schedule` turns that into single
faults, each at one time on one replica, by draws from the random stream `faults` alone. The
simulator plays them by `viisim.fault_player`, a deployment by `runtime.simulated.faults`.

A replica has one fault at a time: what would come over it while another lasts is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import Annotated, Literal, Self, TypeAlias

from numpy.random import Generator
from pydantic import Field, model_validator

from viisim.documents import Strict, inside
from viisim.engine.step_time import StepTime
from viisim.power import Cooling, PowerDraw, ThermalState, mean_power_w
from viisim.profile import Count, Positive
from viisim.streams import Streams

ANY = "any"
"""In place of a replica: one drawn at random for every fault."""

PROBE_S = 3.0
"""How long a look at a worker's health may take (`runtime.http_worker.PROBE_S`)."""

SILENCE_S = 600.0
"""How long the proxy waits for the next byte of a worker (`runtime.http_worker.HttpWorker`)."""

HEAT_EVERY_S = 1.0
"""How often a card's temperature is computed: short beside its time constant."""

_COOLING = Cooling()

# --------------------------------------------------------------------------------------
# One fault


@dataclass(frozen=True, slots=True)
class Heat:
    """What a card's temperature depends on, besides its load."""

    cooling: Cooling
    draw: PowerDraw
    """Of one card."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault on one replica."""

    at_s: float
    """From the start of the run."""
    kind: str
    """The `kind` of its class below; or `halt`, in simulations only: the machine computes nothing,
    whatever else is wrong with it."""
    replica: str
    duration_s: float = 0.0
    """Until all is well again; of a crash, until the worker serves again."""
    factor: float = 1.0
    """slow: a step takes so many times as long..."""
    step_time: StepTime | None = None
    """...or this; in simulations only."""
    delay_s: float = 0.0
    """network_delay: a request reaches the worker so much later."""
    failed_starts: int = 0
    """crash: so many starts of the worker come to nothing, one after each equal part of the
    duration but the last."""
    heat: Heat | None = None
    """thermal only."""

    @property
    def until_s(self) -> float:
        """When it is over."""
        return self.at_s + self.duration_s


class Throttle:
    """A card that slows itself down when it gets too hot, told how busy it was."""

    def __init__(self, heat: Heat, now_ns: int, busy_ns: int, prefill_ns: int) -> None:
        """At first it is as warm as an idle card gets with this cooling."""
        self._draw = heat.draw
        idle_c = heat.cooling.air_c + heat.cooling.c_per_w * heat.draw.idle_w
        self._state = ThermalState(heat.cooling, idle_c)
        self._last = (now_ns, busy_ns, prefill_ns)

    @property
    def factor(self) -> float:
        """A step takes so many times as long."""
        return 1 / self._state.clock

    def advance(self, now_ns: int, busy_ns: int, prefill_ns: int) -> None:
        """Time has passed; the counters are those of `Engine.spent_ns`."""
        last_ns, last_busy_ns, last_prefill_ns = self._last
        span_ns = now_ns - last_ns
        if span_ns > 0:
            busy, prefill = (busy_ns - last_busy_ns) / span_ns, prefill_ns - last_prefill_ns
            power_w = float(mean_power_w(self._draw, busy, prefill / span_ns))
            self._state = self._state.after(power_w, span_ns / 1e9)
            self._last = (now_ns, busy_ns, prefill_ns)


# --------------------------------------------------------------------------------------
# The schema


class _Timed(Strict):
    """When and where."""

    replica: str = ANY
    """The id of a replica (`r0` is the first of the file), or `any`."""
    at_s: Positive | Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] | None = (
        None
    )
    """Once, or several times."""
    rate_per_hour: Positive | None = None
    """Instead: at random, independently of each other (Poisson)."""

    @model_validator(mode="after")
    def _has_one_sort_of_times(self) -> Self:
        if (self.at_s is None) == (self.rate_per_hour is None):
            raise inside("at_s: give either at_s or rate_per_hour")
        return self

    def instants(self, generator: Generator) -> Iterator[float]:
        """The times in order; with a rate, for ever."""
        if self.rate_per_hour is None:
            yield from sorted(self.at_s if isinstance(self.at_s, tuple) else (self.at_s or 0.0,))
            return
        at_s = 0.0
        while True:
            at_s += generator.exponential(3600 / self.rate_per_hour)
            yield at_s


class _Lasting(_Timed):
    duration_s: Positive


class Crash(_Timed):
    """The worker dies: connections break, and all that its engine held is lost."""

    kind: Literal["crash"]
    restart_s: Positive = 60.0
    """Until it serves again, with an empty cache."""


class StartFailure(_Timed):
    """After the next crash, the first starts of the worker come to nothing; each of them takes the
    crash's `restart_s` in addition."""

    kind: Literal["start_failure"]
    times: Count = 1


class Hang(_Timed):
    """The worker answers nothing, its health included. It computes on, unseen."""

    kind: Literal["hang"]
    duration_s: Annotated[float, Field(gt=0, lt=SILENCE_S)]
    """A worker that is silent for longer has failed its requests: write a crash."""


class Refuse(_Lasting):
    """The worker answers 503 to whatever is new, its health included."""

    kind: Literal["refuse"]


class Slow(_Lasting):
    """Every step takes several times as long."""

    kind: Literal["slow"]
    factor: Annotated[float, Field(gt=1)]


class Thermal(_Lasting):
    """The card is cooled badly. When its load has heated it up to the limit, its clock falls, and
    every step takes longer until it has cooled down; see `viisim.power.Cooling`."""

    kind: Literal["thermal"]
    air_c: float = 45.0
    """As in a box whose fan has failed."""
    c_per_w: Positive = _COOLING.c_per_w
    time_constant_s: Positive = _COOLING.time_constant_s
    limit_c: float = _COOLING.limit_c
    resume_c: float = _COOLING.resume_c
    throttled_clock: Annotated[float, Field(gt=0, lt=1)] = _COOLING.throttled_clock

    @model_validator(mode="after")
    def _can_recover(self) -> Self:
        if not self.air_c < self.resume_c < self.limit_c:
            raise inside("resume_c: must be above air_c and below limit_c")
        return self

    @property
    def cooling(self) -> Cooling:
        """The same for `Throttle`."""
        return Cooling(**self.model_dump(include=set(Cooling.__dataclass_fields__)))


class NetworkDelay(_Lasting):
    """Requests reach the worker later."""

    kind: Literal["network_delay"]
    delay_s: Annotated[float, Field(gt=0, lt=PROBE_S)]
    """A worker whose health takes longer to look at is as good as hung: write that."""


class NetworkCut(_Timed):
    """All connections to the worker break; it survives, and can be reached again at once."""

    kind: Literal["network_cut"]


AnyFault: TypeAlias = (
    Crash | StartFailure | Hang | Refuse | Slow | Thermal | NetworkDelay | NetworkCut
)
FaultConfig: TypeAlias = Annotated[AnyFault, Field(discriminator="kind")]


# --------------------------------------------------------------------------------------
# The schedule


def schedule(
    faults: Sequence[AnyFault], replicas: Mapping[str, PowerDraw | None], seed: int
) -> Iterator[Fault]:
    """Every single fault in the order of time; without end where one has a rate.

    `replicas` are those that the faults may befall, with the draw of one of their cards; heat
    needs it.
    """
    generators = Streams(seed)["faults"].spawn(len(faults))
    drawn = [_drawn(*each) for each in zip(range(len(faults)), faults, generators, strict=True)]
    well_s = dict.fromkeys(replicas, 0.0)
    failing: Counter[str] = Counter()
    for at_s, index, place in merge(*drawn):
        entry = faults[index]
        free = [name for name in replicas if well_s[name] <= at_s and entry.replica in (name, ANY)]
        if not free:
            continue
        replica = free[int(place * len(free))]
        if isinstance(entry, StartFailure):
            failing[replica] += entry.times
            continue
        failed_starts = failing.pop(replica, 0) if isinstance(entry, Crash) else 0
        fault = _fault(entry, at_s, replica, failed_starts, replicas[replica])
        well_s[replica] = fault.until_s
        yield fault


def _drawn(index: int, entry: AnyFault, generator: Generator) -> Iterator[tuple[float, int, float]]:
    """Times of an entry, each with the entry's number and a draw from [0, 1) for the place."""
    for at_s in entry.instants(generator):
        yield at_s, index, generator.random()


def _fault(
    entry: AnyFault, at_s: float, replica: str, failed_starts: int, draw: PowerDraw | None
) -> Fault:
    match entry:
        case Crash():
            duration_s = entry.restart_s * (1 + failed_starts)
            return Fault(at_s, entry.kind, replica, duration_s, failed_starts=failed_starts)
        case Slow():
            return Fault(at_s, entry.kind, replica, entry.duration_s, factor=entry.factor)
        case NetworkDelay():
            return Fault(at_s, entry.kind, replica, entry.duration_s, delay_s=entry.delay_s)
        case Thermal():
            assert draw is not None, "the experiment has checked it"
            heat = Heat(entry.cooling, draw)
            return Fault(at_s, entry.kind, replica, entry.duration_s, heat=heat)
        case Hang() | Refuse():
            return Fault(at_s, entry.kind, replica, entry.duration_s)
    return Fault(at_s, entry.kind, replica)
