"""The numbered invariants of a simulation, in random worlds (`tests/random_scenarios.py`).

I1 conservation, I2 causality, I3 clock, I4 KV blocks, I5 work conserving, I6 determinism, I8 no
oracle, I9 freshness, I10 no livelock. I7 (parity) is the journal's (`test_journal.py`); those of
the core alone, event by event, are in `test_core_properties.py`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from math import ceil, inf
from random import Random

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies.interface import (
    Action,
    Arrived,
    Cancelled,
    ClusterView,
    Event,
    Finished,
    FirstToken,
    Gauges,
    Preempt,
    RequestView,
    Shed,
    Verdict,
)
from policies.testing import request
from tests.random_scenarios import (
    LONG_S,
    STEP_TIMES,
    GaugeReader,
    Heard,
    Pieces,
    Watcher,
    World,
    length_of,
    scenarios,
    simulation,
    timed_scenarios,
    worlds,
)
from viisim.conform import replay
from viisim.engine.engine import Engine
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.sequence import Sequence as EngineSequence
from viisim.engine.stepwise import SteppedScheduler
from viisim.golden import Scenario
from viisim.records import FINISHED, REFUSED, SHED, UNFINISHED, SeedResult
from viisim.simulation import Simulation
from viisim.workload.request import Request

FUZZ = settings(max_examples=40, derandomize=True, deadline=None)
INSTANTS = ("arrived_ns", "dispatched_ns", "started_ns", "first_token_ns", "finished_ns")


def ran(world: World) -> tuple[SeedResult, Heard]:
    """The run's result and its journal."""
    heard = Heard()
    return simulation(world, journal=heard).run(), heard


class CountingJournal:
    """Adds the requests up after every event."""

    simulation: Simulation
    arrived = 0
    ended = 0

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Called when the event is handled and before the actions are performed."""
        self.arrived += isinstance(event, Arrived)
        self.ended += isinstance(event, Finished)
        self.ended += sum(isinstance(action, Shed) for action in actions)
        core = self.simulation.core
        assert self.arrived == self.ended + core.queued_requests + core.inflight_requests, "I1"


@given(worlds())
@FUZZ
def test_no_request_is_lost_at_any_event_i1(world: World) -> None:
    journal = CountingJournal()
    journal.simulation = simulation(world, journal=journal)
    rows = journal.simulation.run().requests
    assert journal.arrived == len(world.requests)
    assert rows["request"].tolist() == list(range(len(world.requests)))
    ended = sum(outcome in (FINISHED, SHED, REFUSED) for outcome in rows["outcome"].tolist())
    assert ended == journal.ended


@given(st.booleans().flatmap(worlds))
@FUZZ
def test_the_instants_of_a_request_are_in_order_i2(world: World) -> None:
    rows = {name: column.tolist() for name, column in ran(world)[0].requests.items()}
    for number, outcome in enumerate(rows["outcome"]):
        instants = [rows[name][number] for name in INSTANTS]
        reached = [at_ns for at_ns in instants if at_ns >= 0]
        assert instants[: len(reached)] == reached, "an instant is missing in between"
        assert reached == sorted(reached)
        assert (outcome == FINISHED) == (len(reached) == len(INSTANTS))


@given(worlds())
@FUZZ
def test_the_clock_never_goes_back_and_arrivals_come_before_step_ends_i3(world: World) -> None:
    events = [event for event, _ in ran(world)[1].entries]
    assert [event.now_s for event in events] == sorted(event.now_s for event in events)
    ended_s = -1.0
    for event in events:
        if isinstance(event, FirstToken | Finished | Cancelled):
            ended_s = event.now_s
        if isinstance(event, Arrived | Gauges):
            assert event.now_s > ended_s


@given(st.booleans().flatmap(scenarios))
@FUZZ
def test_free_and_used_blocks_add_up_after_every_step_i4(scenario: Scenario) -> None:
    """A running sequence holds the blocks of what is computed; only the prefix cache lets two
    hold the same. Cached blocks that nobody uses are part of the free ones."""
    config = scenario.config
    engine = SteppedScheduler(config)
    pool = engine.scheduler.pool
    for line in replay(scenario, engine):
        unused = pool.blank_blocks + sum(run.blocks for run in pool.free_queue())
        assert unused == engine.free_blocks
        if line["kind"] == "step":
            held = [ceil(tokens / config.block_size) for tokens in line["computed"]]
            used = config.usable_blocks - line["free_blocks"]
            assert max(held, default=0) <= used <= sum(held)
            if not config.enable_prefix_caching:
                assert used == sum(held)
        assume(line["step"] < 4_000)
    assert engine.free_blocks == config.usable_blocks


@given(st.booleans().flatmap(timed_scenarios))
@FUZZ
def test_no_engine_idles_while_it_has_requests_i5(pair: tuple[World, Scenario]) -> None:
    assume(drive(Engine(pair[0].engine, pair[0].step_time), pair[0].requests))


def test_an_asynchronous_engine_goes_on_after_empty_steps_in_a_row_i5() -> None:
    """Sequences that preempt themselves leave steps with nothing to compute (R3), several in a
    row and with no output on the way that could wake the engine up."""
    engine = SchedulerSettings(
        num_kv_blocks=20,
        max_num_seqs=8,
        max_num_batched_tokens=455,
        max_model_len=273,
        chunked_prefill=False,
        scheduling_policy="priority",
        long_prefill_token_threshold=1,
        adaptive_long_prefill=True,
        reserve_full_prompt=False,
        async_scheduling=True,
    )
    long = ((2, 1), (1, 32), (1, 64))
    longer = (*long, (90, 1), (1, 16), (1, 64))
    prompts: list[tuple[Pieces, int, int]] = [
        (((2, 16),), 17, 1),
        (long, 1, 1),
        (longer, 1, 2),
        (((1, 16),), 1, 2),
        ((*longer, (90, 1)), 1, 1),
        (((1, 16), (1, 64)), 1, 1),
        (((2, 16), (90, 17)), 2, 1),
    ]
    requests = [
        Request(
            request(id=f"r{number}", prompt_tokens=length_of(prompt), priority=priority),
            0,
            prompt,
            output_tokens,
            90,
        )
        for number, (prompt, output_tokens, priority) in enumerate(prompts)
    ]
    assert drive(Engine(engine, STEP_TIMES[0]), requests)


def drive(engine: Engine, requests: Iterable[Request]) -> bool:
    """Run an engine to its end, with no kernel. While it has requests it has a next event, and
    its steps fill the time from the first start to the last end without a pause. False: two
    sequences preempt each other for ever, as they may in vLLM too."""
    arrivals = deque(requests)
    spells = len(arrivals)
    end_ns: int | None = None
    started_ns, busy_ns = 0, 0
    while arrivals or end_ns is not None:
        if arrivals and (end_ns is None or arrivals[0].arrived_ns <= end_ns):
            arriving = arrivals.popleft()
            if end_ns is None:
                started_ns = arriving.arrived_ns
            new_end_ns = engine.arrive(_sequence(arriving), arriving.arrived_ns)
            end_ns = end_ns if new_end_ns is None else new_end_ns
        elif end_ns is not None:
            now_ns = end_ns
            _, end_ns = engine.finish(now_ns)
            if end_ns is None:
                busy_ns += now_ns - started_ns
        assert (end_ns is not None) == engine.scheduler.has_requests
        if end_ns is not None and end_ns > LONG_S * 10**9:
            return False
    engine.log.fold()
    # Each spell of work ends at the next whole nanosecond.
    assert 0 <= busy_ns - engine.log.busy_ps // 1000 <= spells
    return True


def _sequence(arriving: Request) -> EngineSequence:
    view = arriving.view
    return EngineSequence(
        view.id,
        arriving.prompt,
        view.prompt_tokens,
        arriving.output_tokens,
        arriving.output_segment,
        view.priority,
        arriving.arrived_ns,
    )


@given(worlds())
@FUZZ
def test_equal_worlds_have_equal_histories_i6(world: World) -> None:
    (first, heard), (second, heard_again) = ran(world), ran(world)
    assert heard.entries == heard_again.entries
    assert first.events == second.events
    for name, column in first.requests.items():
        assert column.tolist() == second.requests[name].tolist(), name


@given(worlds(), st.randoms(use_true_random=False))
@FUZZ
def test_nobody_outside_an_engine_knows_a_length_before_it_shows_i8(
    world: World, random: Random
) -> None:
    """Two worlds that differ in nothing but true output lengths, of which the views say nothing,
    have the same history until an answer ends in one of them. Synchronous scheduling only: an
    asynchronous engine knows `max_tokens` and leaves out the step behind the last token, which
    shows in its gauges a step before the end does."""
    world = replace(world, engine=replace(world.engine, async_scheduling=False))
    other = replace(
        world,
        requests=tuple(
            replace(each, output_tokens=1 + random.randrange(2 * each.output_tokens))
            for each in world.requests
        ),
    )
    entries, other_entries = ran(world)[1].entries, ran(other)[1].entries
    ends_s = [
        event.now_s
        for event, _ in entries + other_entries
        if isinstance(event, Finished | Cancelled)
    ]
    first_s = min(ends_s, default=inf)

    def before(entry: tuple[Event, tuple[Action, ...]]) -> bool:
        return entry[0].now_s < first_s

    assert list(takewhile(before, entries)) == list(takewhile(before, other_entries))


class Suspicious(Watcher):
    """Checks the age of every gauge it could read."""

    def __init__(self, gauge: str = "kv_usage", most_inflight: int = 99) -> None:
        super().__init__(gauge, most_inflight)
        self.latest: dict[str, Gauges] = {}

    def observe(self, event: Event, view: ClusterView) -> None:
        super().observe(event, view)
        if isinstance(event, Gauges):
            self.latest[event.replica_id] = event

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        for replica in view.replicas:
            gauges = self.latest.get(replica.id)
            if gauges is None:
                assert replica.age_s == inf
                assert (replica.running, replica.waiting, replica.kv_usage) == (0, 0, 0)
            else:
                assert replica.age_s == view.now_s - gauges.sampled_s
                assert replica.running == gauges.running
                assert replica.waiting == gauges.waiting
                assert 0 <= replica.kv_usage == gauges.kv_usage <= 1
        return super().place(request, view)


@given(worlds())
@FUZZ
def test_every_gauge_is_as_old_as_its_age_says_i9(world: World) -> None:
    _, heard = ran(replace(world, make_policy=Suspicious))
    for event, _ in heard.entries:
        if isinstance(event, Gauges):
            late_s = event.now_s - event.sampled_s - world.scrape_delay_s
            assert abs(late_s) < 1e-9


@given(worlds())
@FUZZ
def test_whoever_is_withdrawn_or_preempted_still_finishes_i10(world: World) -> None:
    """First come first served: the oldest sequence of an engine is never a victim, so something
    always gets on."""
    world = replace(world, engine=replace(world.engine, scheduling_policy="fcfs"))
    result, heard = ran(world)
    for _, actions in heard.entries:
        preempted = Counter(action.request_id for action in actions if isinstance(action, Preempt))
        assert all(times == 1 for times in preempted.values())
    assert UNFINISHED not in result.requests["outcome"].tolist()


class Ticking(GaugeReader):
    """Asks to be asked, and never does anything."""

    tick_s = 0.5


def test_a_run_ends_with_its_last_request_though_the_policy_goes_on_ticking() -> None:
    only = Request(request(id="q", prompt_tokens=10), 0, ((1, 10),), 20)
    world = World(
        engine=SchedulerSettings(num_kv_blocks=10),
        step_time=STEP_TIMES[0],
        replicas=1,
        requests=(only,),
        make_policy=Ticking,
        scrape_s=1.0,
        scrape_delay_s=0.0,
        until_s=100.0,
    )
    result, _ = ran(world)
    assert result.requests["outcome"].tolist() == [FINISHED]
    assert result.ended_ns < 5 * 10**9
