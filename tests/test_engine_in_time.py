"""The simulated engine against the plain model with a clock: every instant, sample and total.

`test_engine_against_plain.py` drives the scheduler step by step. Here the real `Engine` runs in
a `Simulation`, with trains, lazy keys and evictions put off, and has to agree with a loop that
forms one plain batch after the other and adds up their durations.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import assume, given, settings

from tests.plain_engine import PlainEngine, Sequence
from tests.random_scenarios import LONG_S, World, simulation, timed_scenarios
from viisim.engine.step_time import StepTime
from viisim.golden import GoldenConfig, Scenario
from viisim.records import ITL_EDGES_S

FUZZ = settings(max_examples=60, derandomize=True, deadline=None)


@dataclass
class Times:
    """What the clock saw of one request; instants in ns."""

    started: int = -1
    first_token: int = -1
    finished: int = -1
    cached_tokens: int = 0
    last_token_ps: int = -1


@dataclass
class TimedPlainEngine:
    """A plain engine whose batches take the time that the step-time model says."""

    config: GoldenConfig
    step_time: StepTime
    clock_ps: int = 0
    """When the last batch ended."""
    totals: Counter[str] = field(default_factory=Counter)
    gaps_ps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = PlainEngine(self.config)
        self.times: dict[str, Times] = {}
        self.prefill_tokens: dict[str, int] = {}
        self.durations_ps: deque[int] = deque()
        self.told = (0, 0, 0)
        self.came = 0
        """Requests, since the batch that is computed began to be."""

    @property
    def end_ns(self) -> int | None:
        """When the batch being computed ends; None when idle."""
        return -(-(self.clock_ps + self.durations_ps[0]) // 1000) if self.durations_ps else None

    def arrive(self, request: Any, now_ns: int) -> None:
        """An idle engine starts at once, with this request alone."""
        self.times[request.id] = Times()
        self.engine.add(request)
        if self.durations_ps:
            self.came += 1
        else:
            self.clock_ps = max(self.clock_ps, now_ns * 1000)
            self._form_batches(now_ns)

    def finish(self, now_ns: int) -> None:
        """The oldest batch has been computed."""
        duration_ps = self.durations_ps.popleft()
        self.clock_ps += duration_ps
        self.totals.update(steps=1, busy_ps=duration_ps)
        sampling = [(sequence, sequence.outputs) for sequence in self.engine.batches[0]]
        for request_id in self.engine.update():
            self.times[request_id].finished = now_ns
        for sequence, outputs in sampling:
            if sequence.outputs > outputs:
                self._note_token(sequence)
        running, waiting, used = self._state()
        self.told = running, waiting - self.came, used
        self.came = 0
        self._form_batches(now_ns)

    def gauges(self) -> tuple[int, int, int]:
        """As a scrape reads them: what was said when the last step ended."""
        return self.told if self.durations_ps else self._state()

    def _state(self) -> tuple[int, int, int]:
        """Running, waiting, blocks in use."""
        engine = self.engine
        used = self.config.usable_blocks - engine.free_blocks
        return len(engine.running), len(engine.waiting), used

    def _note_token(self, sequence: Sequence) -> None:
        times = self.times[sequence.id]
        if times.last_token_ps < 0:
            times.first_token = -(-self.clock_ps // 1000)
        else:
            self.gaps_ps.append(self.clock_ps - times.last_token_ps)
        times.last_token_ps = self.clock_ps

    def _form_batches(self, now_ns: int) -> None:
        """As many as may be in flight; one that is empty is followed by another try, unless an
        output that is on the way has to come first."""
        while self.engine.has_requests and len(self.durations_ps) < (
            self.config.max_batches_in_flight
        ):
            before = self.engine.batches_in_flight
            self._form_batch(now_ns)
            if self.engine.batches_in_flight == before and before:
                return

    def _form_batch(self, now_ns: int) -> None:
        engine = self.engine
        seen = engine.schedule()
        self.totals["preemptions"] += len(seen.preempted)
        running = {sequence.id: sequence for sequence in engine.running}
        for request_id, hit_tokens in seen.cached:
            self.prefill_tokens[request_id] = len(running[request_id].tokens)
            if self.times[request_id].started < 0:
                self.times[request_id].started = now_ns
                self.times[request_id].cached_tokens = hit_tokens
        if not seen.scheduled:
            return
        decodes = context = prefills = pairs = 0
        for request_id, tokens in seen.scheduled:
            computed = running[request_id].computed
            if computed - tokens >= self.prefill_tokens[request_id]:
                decodes, context = decodes + 1, context + computed
            else:
                prefills += tokens
                pairs += (computed - tokens) * tokens + tokens * (tokens + 1) // 2
        self.totals.update(decode_tokens=decodes, prefill_tokens=prefills)
        self.durations_ps.append(self.step_time.step_ps(decodes, context, prefills, pairs))


def played(world: World, scenario: Scenario) -> tuple[TimedPlainEngine, list[tuple[int, ...]]]:
    """All arrivals and steps in order, arrivals first; samples are (ns, running, ...)."""
    timed = TimedPlainEngine(scenario.config, world.step_time)
    arrivals = deque(
        (request.arrived_ns, golden)
        for request, golden in zip(world.requests, scenario.requests, strict=True)
    )
    samples = []
    scrape_ns, every_ns = 0, round(world.scrape_s * 1e9)
    while arrivals or timed.end_ns is not None:
        assume(timed.clock_ps < LONG_S * 10**12)
        arrival_ns = arrivals[0][0] if arrivals else None
        due = [ns for ns in (arrival_ns, timed.end_ns) if ns is not None]
        if arrival_ns is not None and arrival_ns == min(due) and arrival_ns <= scrape_ns:
            timed.arrive(arrivals.popleft()[1], arrival_ns)
        elif scrape_ns <= min(due):
            samples.append((scrape_ns, *timed.gauges()))
            scrape_ns += every_ns
        elif arrival_ns is not None and arrival_ns == min(due):
            timed.arrive(arrivals.popleft()[1], arrival_ns)
        else:
            timed.finish(min(due))
    return timed, samples


def counts_of(gaps_ps: list[int]) -> list[int]:
    """The gaps per bin of ITL_EDGES_S."""
    bins = np.searchsorted(ITL_EDGES_S, np.array(gaps_ps) / 1e12, side="right") - 1
    return np.bincount(bins.clip(0), minlength=len(ITL_EDGES_S) - 1).tolist()


def check(world: World, scenario: Scenario) -> None:
    timed, samples = played(world, scenario)
    result = simulation(world).run()
    rows = {name: column.tolist() for name, column in result.requests.items()}
    times = [timed.times[request.id] for request in scenario.requests]
    assert rows["started_ns"] == [t.started for t in times]
    assert rows["first_token_ns"] == [t.first_token for t in times]
    assert rows["finished_ns"] == [t.finished for t in times]
    assert rows["cached_tokens"] == [t.cached_tokens for t in times]
    columns = ("time_ns", "running", "waiting", "kv_blocks_used")
    taken = zip(*(result.samples[name].tolist() for name in columns), strict=True)
    assert list(taken)[: len(samples)] == samples
    totals = result.replicas[0]
    assert totals.steps == timed.totals["steps"]
    assert totals.busy_ns == timed.totals["busy_ps"] // 1000
    assert totals.prefill_tokens == timed.totals["prefill_tokens"]
    assert totals.decode_tokens == timed.totals["decode_tokens"]
    assert totals.preemptions == timed.totals["preemptions"]
    assert totals.itl_counts.tolist() == counts_of(timed.gaps_ps)


@given(timed_scenarios(is_async=False))
@FUZZ
def test_a_synchronous_engine_keeps_the_plain_ones_times(pair: tuple[World, Scenario]) -> None:
    check(*pair)


@given(timed_scenarios(is_async=True))
@FUZZ
def test_an_asynchronous_engine_keeps_the_plain_ones_times(pair: tuple[World, Scenario]) -> None:
    check(*pair)
