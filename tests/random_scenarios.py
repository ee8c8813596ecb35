"""Random scenarios for the engine and random worlds for the simulation, as strategies.

Small on purpose: pools of 8 to 60 blocks keep pressure, preemption and eviction frequent, and
prompts made of few segments and of each other share prefixes that branch anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypothesis import strategies as st

from policies.interface import (
    Action,
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    FirstToken,
    Hold,
    Policy,
    Preempt,
    RequestView,
    Verdict,
)
from policies.testing import request
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import CalibratedRange, DecodePoint, StepTime
from viisim.engine.stepwise import SteppedScheduler
from viisim.fault_player import FaultPlan
from viisim.faults import Fault
from viisim.golden import GoldenAbort, GoldenConfig, GoldenRequest, Scenario
from viisim.simulation import ReplicaSpec, Simulation
from viisim.workload.request import Request

Pieces = tuple[tuple[int, int], ...]


def cut(pieces: Pieces, tokens: int) -> Pieces:
    """The first `tokens` tokens."""
    kept = []
    for segment, length in pieces:
        if tokens > 0:
            kept.append((segment, min(length, tokens)))
        tokens -= length
    return tuple(kept)


def length_of(pieces: Pieces) -> int:
    return sum(length for _, length in pieces)


@st.composite
def configs(draw: st.DrawFn, is_async: bool) -> GoldenConfig:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 4, 8, 16]))
    usable_blocks = draw(st.one_of(st.integers(8, 20), st.integers(8, 60)))
    most_tokens = usable_blocks * block_size
    chunked = draw(st.booleans())
    budget = draw(st.one_of(st.integers(1, 24), st.integers(16, 128)))
    return GoldenConfig(
        name="random",
        num_blocks=usable_blocks + 1,
        block_size=block_size,
        max_num_active_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=budget if chunked else budget + most_tokens,
        max_model_len=draw(st.integers(min(8, most_tokens), most_tokens)),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        enable_chunked_prefill=chunked,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5, 16])),
        long_prefill_token_threshold_adaptive=draw(st.booleans()),
        scheduler_reserve_full_isl=draw(st.booleans()),
        watermark_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        async_scheduling=is_async,
    )


@st.composite
def prompts(draw: st.DrawFn, config: GoldenConfig, earlier: list[GoldenRequest]) -> Pieces:
    """Made of few segments and of earlier prompts, with or without their outputs."""
    size = config.block_size
    lengths = st.one_of(st.sampled_from([size, 2 * size, 4 * size]), st.integers(1, 3 * size + 2))
    pieces: Pieces = ()
    if earlier:
        other = draw(st.sampled_from(earlier))
        match draw(st.sampled_from(["new", "equal", "branch", "continued"])):
            case "equal":
                return other.prompt
            case "branch":
                pieces = cut(other.prompt, draw(st.integers(1, other.prompt_tokens)))
            case "continued":
                outputs = draw(st.integers(1, other.output_tokens))
                pieces = (*other.prompt, (other.out_seg, outputs))
    if not pieces or draw(st.booleans()):
        pieces += tuple(
            draw(st.lists(st.tuples(st.integers(1, 3), lengths), min_size=1, max_size=2))
        )
    return cut(pieces, config.max_model_len - 1)


@st.composite
def scenarios(draw: st.DrawFn, is_async: bool = False) -> Scenario:
    """Small pools under pressure, shared prefixes, ties, aborts."""
    config = draw(configs(is_async))
    requests: list[GoldenRequest] = []
    step = 0
    for number in range(draw(st.integers(2, 12))):
        prompt = draw(prompts(config, requests))
        step += draw(st.sampled_from([0, 0, 0, 1, 2, 7]))
        requests.append(
            GoldenRequest(
                id=f"r{number}",
                arrival_step=step,
                arrival_time=draw(st.integers(0, 3)),
                prompt_tokens=length_of(prompt),
                output_tokens=draw(st.integers(1, 6 * config.block_size)),
                priority=draw(st.integers(0, 2)),
                prompt=prompt,
                out_seg=draw(st.sampled_from([90, 91, 100 + number])),
            )
        )
    ids = st.sampled_from([request.id for request in requests])
    aborts = draw(
        st.lists(
            st.builds(GoldenAbort, ids, st.integers(0, 60), st.sampled_from(["before", "after"])),
            max_size=4,
        )
    )
    return Scenario("random", config, tuple(requests), tuple(aborts), ())


# --------------------------------------------------------------------------------------
# Policies that read, watch and withdraw


class GaugeReader(Policy):
    """Sends to the replica that looks emptiest by one stale gauge; holds when all are full."""

    def __init__(self, gauge: str = "kv_usage", most_inflight: int = 99) -> None:
        self.gauge = gauge
        self.most_inflight = most_inflight

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The emptiest by the gauge; by its own dispatches among equals."""
        replicas = [
            r for r in view.ready(request.model) if r.inflight_requests < self.most_inflight
        ]
        if not replicas:
            return Hold()
        best = min(replicas, key=lambda r: (getattr(r, self.gauge), r.inflight_requests, r.id))
        return Dispatch(request.id, best.id, request.priority)


class Watcher(GaugeReader):
    """The same, and is told of every first token, which ends a train of steps."""

    def __init__(self, gauge: str = "kv_usage", most_inflight: int = 99) -> None:
        super().__init__(gauge, most_inflight)
        self.shown: set[str] = set()

    def observe(self, event: Event, view: ClusterView) -> None:
        """Remember who has got a first byte: it can no longer be withdrawn."""
        if isinstance(event, FirstToken):
            self.shown.add(event.request_id)


class Withdrawer(Watcher):
    """Takes requests back every `tick_s`, each at most twice, so that every run ends."""

    preempts = True

    def __init__(self, gauge: str = "kv_usage", most_inflight: int = 99) -> None:
        super().__init__(gauge, most_inflight)
        self.tick_s = 0.0007
        self.withdrawals: Counter[str] = Counter()
        self.leaving: set[str] = set()

    def observe(self, event: Event, view: ClusterView) -> None:
        """Remember also who is on the way back."""
        super().observe(event, view)
        if isinstance(event, Cancelled):
            self.leaving.discard(event.request_id)

    def plan(self, queue: Iterable[RequestView], view: ClusterView) -> Iterable[Action]:
        """Withdraw the newest request of each replica that may still be withdrawn."""
        for replica in view.replicas:
            candidates = [r.id for r in view.inflight(replica.id) if self._may_leave(r.id)]
            if candidates:
                self.withdrawals[candidates[-1]] += 1
                self.leaving.add(candidates[-1])
                yield Preempt(candidates[-1])

    def _may_leave(self, request_id: str) -> bool:
        untouchable = self.shown | self.leaving
        return request_id not in untouchable and self.withdrawals[request_id] < 2


# --------------------------------------------------------------------------------------
# Worlds: everything that one simulation needs


#: Longer than any of these worlds lasts, unless two sequences preempt each other for ever, as
#: they may in vLLM too.
LONG_S = 20.0


@dataclass(frozen=True)
class World:
    """The arguments of a `Simulation`, but for `coalesce`."""

    engine: SchedulerSettings
    step_time: StepTime
    replicas: int
    requests: tuple[Request, ...]
    make_policy: Callable[[], Policy]
    scrape_s: float
    scrape_delay_s: float
    until_s: float


class Heard:
    """A journal in memory."""

    def __init__(self) -> None:
        self.entries: list[tuple[Event, tuple[Action, ...]]] = []

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one handled event."""
        self.entries.append((event, tuple(actions)))


def simulation(
    world: World,
    coalesce: bool = True,
    journal: Heard | None = None,
    faults: Sequence[Fault] = (),
) -> Simulation:
    """A fresh simulation of the world."""
    specs = [
        ReplicaSpec(f"r{n}", "m", (f"gpu{n}",), world.engine, world.step_time, coalesce)
        for n in range(world.replicas)
    ]
    return Simulation(
        specs,
        world.make_policy(),
        world.requests,
        scrape_s=world.scrape_s,
        scrape_delay_s=world.scrape_delay_s,
        until_s=world.until_s,
        journal=journal,
        faults=FaultPlan(iter(faults), {}) if faults else None,
    )


#: Step times that are whole multiples of 50 us, or of 1 us, so that step ends, arrivals, scrapes
#: and ticks keep falling on the same nanosecond; and some that are not even whole nanoseconds.
STEP_TIMES = (
    StepTime([DecodePoint(1, 1e-4, 0.0)], 64, 1e-4, 0.0),
    StepTime([DecodePoint(1, 1e-4, 0.0), DecodePoint(2, 1.5e-4, 0.0)], 64, 2e-4, 5e-5),
    StepTime([DecodePoint(1, 5e-5, 1e-6)], 64, 1e-4, 5e-5, 0.0, 5e-5),
    StepTime(
        [DecodePoint(1, 1.0007e-4, 1.7e-10), DecodePoint(5, 1.1e-4, 0.9e-10)],
        64,
        0.7e-4,
        3.1234e-6,
        1.1e-10,
        1.0003e-6,
        CalibratedRange(4, 100, 16),
    ),
)


@st.composite
def worlds(draw: st.DrawFn, stops_early: bool = False) -> World:
    """One to three replicas under pressure, with ties at almost every instant."""
    scenario = draw(scenarios(draw(st.booleans())))
    grid_us = draw(st.sampled_from([50, 100, 150]))
    policy = draw(st.sampled_from([GaugeReader, Watcher, Withdrawer]))
    gauge = draw(st.sampled_from(["kv_usage", "running", "waiting", "outstanding_tokens"]))
    most_inflight = draw(st.sampled_from([1, 3, 99, 99]))
    return World(
        engine=SteppedScheduler(scenario.config).scheduler.settings,
        step_time=draw(st.sampled_from(STEP_TIMES)),
        replicas=draw(st.sampled_from([1, 1, 2, 3])),
        requests=tuple(
            _simulated(request, grid_us, draw(st.booleans()), draw(st.booleans()))
            for request in scenario.requests
        ),
        make_policy=partial(policy, gauge, most_inflight),
        scrape_s=draw(st.sampled_from([5e-5, 1e-4, 3e-4, 7.3e-4, 1e-2])),
        scrape_delay_s=draw(st.sampled_from([0.0, 5e-5, 1e-4, 2.2e-4])),
        until_s=draw(st.integers(1, 60)) * 1e-4 if stops_early else LONG_S,
    )


@st.composite
def timed_scenarios(draw: st.DrawFn, is_async: bool) -> tuple[World, Scenario]:
    """A world of one replica that takes each request when it arrives; and its scenario. No
    aborts: nobody but the engine decides anything."""
    scenario = draw(scenarios(is_async))
    in_step_order = (replace(r, arrival_time=r.arrival_step) for r in scenario.requests)
    scenario = replace(scenario, requests=tuple(in_step_order))
    grid_us = draw(st.sampled_from([50, 100, 150]))
    world = World(
        engine=SteppedScheduler(scenario.config).scheduler.settings,
        step_time=draw(st.sampled_from(STEP_TIMES)),
        replicas=1,
        requests=tuple(
            _simulated(request, grid_us, False, shareable=True) for request in scenario.requests
        ),
        make_policy=draw(st.sampled_from([GaugeReader, Watcher])),
        scrape_s=draw(st.sampled_from([5e-5, 1e-4, 3e-4, 7.3e-4])),
        scrape_delay_s=0.0,
        until_s=LONG_S,
    )
    return world, scenario


def _simulated(golden: GoldenRequest, grid_us: int, streamed: bool, shareable: bool) -> Request:
    """The scenario's request as one of a workload."""
    arrived_ns = golden.arrival_step * grid_us * 1000
    view = request(
        id=golden.id,
        arrived_s=arrived_ns / 1e9,
        prompt_tokens=golden.prompt_tokens,
        max_output_tokens=golden.output_tokens,
        streamed=streamed,
        priority=golden.priority,
    )
    segment = golden.out_seg if shareable else None
    return Request(view, arrived_ns, golden.prompt, golden.output_tokens, segment)
