"""Faults: what is drawn from a file, what the core is told in a simulation, what it comes to, and
that simulated workers fare the same."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.interface import (
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Hold,
    Limits,
    Policy,
    Preempt,
    ReplicaChanged,
    RequestView,
    Verdict,
)
from policies.least_loaded import LeastLoaded
from policies.testing import request
from runtime.cluster import free_ports
from runtime.http_worker import HttpWorker
from runtime.load import LoadClient, Record
from runtime.serve import listening
from runtime.simulated.api import make_app
from runtime.simulated.faults import inject
from runtime.simulated.worker import SimulatedWorker
from runtime.supervisor import Patience, Supervisor
from tests.idle_clock import IdleClockLoop
from tests.small_experiment import SMALL
from tests.stub_server import Recorder, proxy, run
from viisim.config import experiment_from, load_experiment, resolved
from viisim.documents import parse_yaml
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.errors import InputError
from viisim.experiment import simulate
from viisim.fault_player import BROKEN, KILL_S, NOTICED_S, REFUSED, UNREACHABLE, FaultPlan
from viisim.faults import Fault, Heat, Throttle
from viisim.power import Cooling, PowerDraw
from viisim.records import FINISHED, SHED, SeedResult
from viisim.simulation import ReplicaSpec, Simulation
from viisim.workload.request import Request

STEP_S = 0.1
NS_PER_S = 10**9
SETTINGS = SchedulerSettings(num_kv_blocks=2000, max_num_seqs=16)


def step_time(factor: float = 1.0) -> StepTime:
    """A tenth of a second, whoever is in the batch."""
    return StepTime([DecodePoint(1, STEP_S * factor, 0.0)], 16, STEP_S * factor, 1e-6)


def asked(
    at_s: float, name: str = "q", tokens: int = 20, streamed: bool = True, prompt: int = 100
) -> Request:
    """A request; twenty tokens take two seconds."""
    at_ns = round(at_s * NS_PER_S)
    view = request(
        id=name,
        arrived_s=at_ns / 1e9,
        prompt_tokens=prompt,
        max_output_tokens=tokens,
        streamed=streamed,
    )
    return Request(view, at_ns, ((name, prompt),), tokens)


class First(Policy):
    """The first replica that is ready."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """It, or none."""
        ready = view.ready(request.model)
        return Dispatch(request.id, ready[0].id) if ready else Hold()


def played(
    faults: Iterable[Fault],
    requests: Iterable[Request],
    replicas: int = 2,
    policy: Policy | None = None,
    **options: Any,
) -> tuple[SeedResult, list[Event]]:
    """What a simulation with these faults records, and what its core was told."""
    recorder = Recorder()
    specs = [
        ReplicaSpec(f"r{n}", "m", (f"gpu{n}",), SETTINGS, step_time()) for n in range(replicas)
    ]
    plan = FaultPlan(iter(faults), {spec.id: step_time for spec in specs})
    simulation = Simulation(
        specs, policy or First(), requests, faults=plan, journal=recorder, **options
    )
    return simulation.run(), recorder.events


def told(events: Sequence[Event], *kinds: type) -> list[Any]:
    """The events of these kinds, those at the beginning left out."""
    return [event for event in events if type(event) in kinds and event.now_s > 0]


def took_s(result: SeedResult, row: int = 0) -> float:
    """From arrival to the end."""
    columns = result.requests
    return float(columns["finished_ns"][row] - columns["arrived_ns"][row]) / 1e9


def drawn(faults: list[dict[str, Any]], seed: int = 1, most: int = 20) -> list[Fault]:
    """The first faults of an experiment with two replicas."""
    data = parse_yaml(SMALL, "small") | {"faults": faults}
    return list(islice(experiment_from(data, "small").fault_schedule(seed), most))


class TestSchedule:
    def test_given_times_are_kept_in_order(self):
        faults = drawn([{"kind": "network_cut", "at_s": [30.0, 10.0], "replica": "r1"}])
        assert faults == [Fault(10.0, "network_cut", "r1"), Fault(30.0, "network_cut", "r1")]

    def test_a_rate_is_a_poisson_process(self):
        faults = drawn([{"kind": "network_cut", "rate_per_hour": 360.0}], most=2000)
        gaps_s = np.diff([fault.at_s for fault in faults])
        # The mean of 2,000 exponential gaps of 10 s has a standard error of 0.22 s.
        assert gaps_s.mean() == pytest.approx(10.0, abs=4 * 0.22)
        assert {fault.replica for fault in faults} == {"r0", "r1"}

    def test_the_same_seed_draws_the_same_faults_and_another_others(self):
        entries: list[dict[str, Any]] = [{"kind": "crash", "rate_per_hour": 20.0}]
        assert drawn(entries, 1) == drawn(entries, 1)
        assert drawn(entries, 1) != drawn(entries, 2)

    def test_another_entry_does_not_move_the_times_of_the_first(self):
        entry = {"kind": "network_cut", "rate_per_hour": 20.0}
        other = {"kind": "slow", "at_s": 5.0, "duration_s": 1.0, "factor": 2.0}
        alone, both = drawn([entry]), drawn([entry, other], most=21)
        assert [f.at_s for f in both if f.kind == "network_cut"] == [f.at_s for f in alone]

    def test_a_replica_has_one_fault_at_a_time(self):
        crash = {"kind": "crash", "at_s": 10.0, "restart_s": 20.0, "replica": "r0"}
        hang = {"kind": "hang", "at_s": [15.0, 35.0], "duration_s": 1.0, "replica": "r0"}
        assert [(f.at_s, f.kind) for f in drawn([crash, hang])] == [(10.0, "crash"), (35.0, "hang")]

    def test_a_fault_on_any_replica_finds_one_that_is_well(self):
        crash = {"kind": "crash", "at_s": 10.0, "restart_s": 20.0, "replica": "r0"}
        cut = {"kind": "network_cut", "at_s": [15.0, 16.0, 17.0]}
        assert [fault.replica for fault in drawn([crash, cut])] == ["r0", "r1", "r1", "r1"]

    def test_failed_starts_lengthen_the_next_crash_and_no_other(self):
        start = {"kind": "start_failure", "at_s": 5.0, "times": 2, "replica": "r0"}
        crash = {"kind": "crash", "at_s": [10.0, 100.0], "restart_s": 20.0, "replica": "r0"}
        assert [(f.failed_starts, f.duration_s) for f in drawn([start, crash])] == [
            (2, 60.0),
            (0, 20.0),
        ]

    @pytest.mark.parametrize(
        ("fault", "complaint"),
        [
            ({"kind": "fire", "at_s": 1.0}, "faults.0"),
            ({"kind": "crash"}, "faults.0.at_s: give either at_s or rate_per_hour"),
            ({"kind": "crash", "at_s": 1.0, "rate_per_hour": 1.0}, "give either"),
            ({"kind": "crash", "at_s": 1.0, "replica": "r9"}, "faults.0.replica: "),
            ({"kind": "slow", "at_s": 1.0, "duration_s": 5.0, "factor": 0.5}, "factor"),
            ({"kind": "hang", "at_s": 1.0, "duration_s": 700.0}, "duration_s"),
            ({"kind": "network_delay", "at_s": 1.0, "duration_s": 7.0, "delay_s": 4.0}, "delay_s"),
            ({"kind": "thermal", "at_s": 1.0, "duration_s": 7.0, "resume_c": 120.0}, "resume_c"),
        ],
        ids=["kind", "never", "twice", "replica", "factor", "hang", "delay", "heat"],
    )
    def test_a_mistake_is_named(self, fault: dict[str, Any], complaint: str):
        with pytest.raises(InputError) as caught:
            drawn([fault])
        assert complaint in str(caught.value)

    def test_an_experiment_without_faults_has_the_manifest_it_always_had(self):
        assert "faults" not in resolved(experiment_from(parse_yaml(SMALL, "small"), "small"))

    def test_a_manifest_brings_the_faults_back(self):
        fault = {"kind": "slow", "at_s": [1.0, 2.0], "duration_s": 5.0, "factor": 3.0}
        data = parse_yaml(SMALL, "small") | {"faults": [fault]}
        first = experiment_from(data, "small")
        content = json.loads(json.dumps(resolved(first)))
        assert experiment_from(content, "manifest").faults == first.faults


CRASH = Fault(1.05, "crash", "r0", duration_s=10.0)


class TestCrash:
    def test_what_has_shown_nothing_is_tried_elsewhere(self):
        result, events = played([CRASH], [asked(1.0, streamed=False)])
        (failed,) = told(events, Failed)
        assert (failed.reason, failed.retryable, failed.worker_fault) == (BROKEN, True, True)
        assert result.requests["outcome"].tolist() == [FINISHED]
        assert took_s(result) == pytest.approx(0.05 + 20 * STEP_S, abs=1e-3)

    def test_a_stream_that_has_begun_is_lost(self):
        result, events = played([CRASH], [asked(0.5)])
        assert [failed.retryable for failed in told(events, Failed)] == [False]
        assert result.requests["outcome"].tolist() == [SHED]

    def test_the_core_is_told_that_the_replica_is_down_and_when_it_is_back(self):
        _, events = played([CRASH], [asked(0.5), asked(20.0, "later")])
        changes = [(event.now_s, event.state) for event in told(events, ReplicaChanged)]
        assert changes == [(1.05, "starting"), (11.05, "ready")]

    def test_the_cache_is_empty_afterwards(self):
        prompt = (("same", 96),)
        requests = [asked(at_s, name, prompt=96) for at_s, name in ((0.1, "a"), (20.0, "b"))]
        for each in requests:
            each.prompt = prompt
        crash = Fault(10.0, "crash", "r0", duration_s=5.0)
        with_crash, _ = played([crash], requests, replicas=1)
        without, _ = played([], requests, replicas=1)
        assert with_crash.requests["cached_tokens"].tolist() == [0, 0]
        assert without.requests["cached_tokens"].tolist() == [0, 80]

    def test_while_it_is_down_its_gauges_are_not_read(self):
        class Watching(First):
            def __init__(self) -> None:
                self.heard_s: list[float] = []

            def observe(self, event: Event, view: ClusterView) -> None:
                if isinstance(event, Gauges) and event.replica_id == "r0":
                    self.heard_s.append(event.now_s)

        policy = Watching()
        played([CRASH], [asked(0.5), asked(15.0, "later")], policy=policy)
        assert not [at_s for at_s in policy.heard_s if 1.1 < at_s < 11.05]

    def test_each_life_of_a_replica_is_counted_by_itself(self):
        result, _ = played([CRASH], [asked(0.5), asked(20.0, "later")])
        assert result.replica_ids == ("r0", "r1", "r0")
        first, _, second = result.replicas
        assert (first.retired_ns, second.ready_ns) == (1_050_000_000, 11_050_000_000)


class TestHalt:
    def test_what_runs_ends_so_much_later(self):
        result, _ = played([Fault(1.05, "halt", "r0", 0.7)], [asked(0.0001)])
        assert took_s(result) == pytest.approx(2.7, abs=1e-3)

    def test_what_was_told_before_is_not_late(self):
        result, _ = played([Fault(1.05, "halt", "r0", 0.7)], [asked(0.0001)])
        first_s = result.requests["first_token_ns"][0] / 1e9
        assert first_s == pytest.approx(0.1, abs=1e-3)

    def test_a_prefill_waits_as_well(self):
        result, _ = played([Fault(0.05, "halt", "r0", 0.7)], [asked(0.0001)])
        assert result.requests["first_token_ns"][0] / 1e9 == pytest.approx(0.8, abs=1e-3)

    def test_what_comes_meanwhile_begins_when_it_is_over(self):
        result, _ = played([Fault(1.0, "halt", "r0", 2.0)], [asked(1.5)])
        assert took_s(result) == pytest.approx(1.5 + 2.0, abs=1e-3)

    def test_an_engine_without_work_does_not_notice(self):
        result, _ = played([Fault(1.0, "halt", "r0", 2.0)], [asked(3.5)])
        assert took_s(result) == pytest.approx(2.0, abs=1e-3)

    def test_steps_that_a_fault_has_slowed_halt_too(self):
        slow = Fault(0.5, "slow", "r0", duration_s=10.0, factor=2.0)
        result, _ = played([slow, Fault(1.05, "halt", "r0", 0.7)], [asked(0.6)])
        assert took_s(result) == pytest.approx(20 * 0.2 + 0.7, abs=1e-3)

    @given(st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5)), max_size=8))
    def test_all_halts_of_a_busy_engine_add_up(self, times: list[tuple[float, float]]):
        at_s, halts = 0.01, []
        for pause_s, length_s in times:
            halts.append(Fault(at_s + pause_s, "halt", "r0", length_s))
            at_s += pause_s + length_s
        result, _ = played(halts, [asked(0.0, tokens=100)])
        total_s = sum(length_s for _, length_s in times)
        assert took_s(result) == pytest.approx(10 + total_s, abs=1e-3)


class TestHang:
    HANG = Fault(1.0, "hang", "r0", duration_s=8.0)

    def test_answers_come_when_it_is_over_all_at_once(self):
        result, events = played([self.HANG], [asked(0.95, streamed=False)])
        assert [event.now_s for event in told(events, Finished)] == [9.0]
        assert took_s(result) == pytest.approx(8.05)

    def test_the_first_token_is_seen_when_it_is_over(self):
        result, _ = played([self.HANG], [asked(0.95)])
        assert result.requests["first_token_ns"].tolist() == [9 * NS_PER_S]

    def test_a_request_that_comes_meanwhile_waits_at_the_door(self):
        result, _ = played([self.HANG], [asked(3.0)], replicas=1)
        assert took_s(result) == pytest.approx(6.0 + 20 * STEP_S, abs=1e-3)

    def test_a_long_one_is_noticed_by_looking_at_its_health_and_later_ended(self):
        _, events = played([Fault(1.0, "hang", "r0", 60.0)], [asked(0.95), asked(90.0, "later")])
        noticed_s = 1.0 + NOTICED_S["hang"]
        changes = [(event.now_s, event.state) for event in told(events, ReplicaChanged)]
        ended_s = noticed_s + KILL_S
        assert changes == [(noticed_s, "starting"), (ended_s, "starting"), (61.0, "ready")]
        failures = [(failed.now_s, failed.retryable) for failed in told(events, Failed)]
        assert failures == [(ended_s, True)]

    def test_one_that_ends_in_time_costs_no_process(self):
        _, events = played([Fault(1.0, "hang", "r0", 20.0)], [asked(0.95)])
        noticed_s = 1.0 + NOTICED_S["hang"]
        changes = [(event.now_s, event.state) for event in told(events, ReplicaChanged)]
        assert changes == [(noticed_s, "starting"), (21.0, "ready")]
        assert [event.now_s for event in told(events, Finished)] == [21.0]

    def test_a_preempted_request_that_waits_at_the_door_is_free_at_once(self):
        class Impatient(First):
            preempts = True
            tick_s = 2.0

            def plan(self, queue: Any, view: ClusterView) -> list[Preempt]:
                return [Preempt(one.id) for one in view.inflight("r0")] if view.now_s < 6 else []

        _, events = played([self.HANG], [asked(3.0)], policy=Impatient())
        assert [event.now_s for event in told(events, Cancelled)] == [5.0]


class TestOtherKinds:
    def test_a_refusal_is_nobodys_fault_and_tried_elsewhere(self):
        result, events = played([Fault(1.0, "refuse", "r0", 2.0)], [asked(1.5)])
        (failed,) = told(events, Failed)
        assert (failed.reason, failed.retryable, failed.worker_fault) == (REFUSED, True, False)
        assert result.requests["attempts"].tolist() == [2]

    def test_what_runs_at_one_that_refuses_is_answered(self):
        result, _ = played([Fault(1.0, "refuse", "r0", 2.0)], [asked(0.5)])
        assert took_s(result) == pytest.approx(20 * STEP_S, abs=1e-3)

    def test_slow_holds_from_the_next_step_on_until_it_is_over(self):
        slow = Fault(1.05, "slow", "r0", duration_s=0.6, factor=3.0)
        result, _ = played([slow], [asked(0.0001, tokens=20)])
        # Steps end at 0.1, ..., 1.1, then at 1.4, 1.7; the last one begun slow takes 0.3 s.
        assert took_s(result) == pytest.approx(11 * 0.1 + 2 * 0.3 + 7 * 0.1, abs=1e-3)

    def test_slow_may_bring_step_times_of_its_own(self):
        slow = Fault(1.05, "slow", "r0", step_time=step_time(3.0))
        result, _ = played([slow], [asked(0.0001, tokens=20)])
        assert took_s(result) == pytest.approx(11 * 0.1 + 9 * 0.3, abs=1e-3)

    def test_a_delay_is_felt_before_the_first_token(self):
        delay = Fault(1.0, "network_delay", "r0", duration_s=10.0, delay_s=0.5)
        result, _ = played([delay], [asked(2.0)])
        assert took_s(result) == pytest.approx(0.5 + 20 * STEP_S, abs=1e-3)

    def test_a_cut_ends_what_is_in_flight_and_the_replica_goes_on(self):
        cut = Fault(1.05, "network_cut", "r0")
        result, events = played([cut], [asked(0.5), asked(1.0, "young"), asked(5.0, "next")])
        assert [(failed.request_id, failed.retryable) for failed in told(events, Failed)] == [
            ("q", False),
            ("young", True),
        ]
        assert not told(events, ReplicaChanged, Cancelled)
        assert result.requests["outcome"].tolist() == [SHED, FINISHED, FINISHED]
        assert result.replica_ids == ("r0", "r1")

    def test_a_hot_card_throttles_under_load_only(self):
        heat = Heat(Cooling(air_c=60.0), PowerDraw(20.0, 150.0, 250.0))
        thermal = Fault(1.0, "thermal", "r0", duration_s=900.0, heat=heat)
        idle_before = [asked(400.0, tokens=100), asked(600.0, "late", tokens=10)]
        busy_before = [asked(2.0, tokens=3000), asked(310.0, "late", tokens=10)]
        cool, _ = played([thermal], idle_before)
        hot, _ = played([thermal], busy_before)
        assert took_s(cool, 1) == pytest.approx(1.0, abs=1e-2)
        assert took_s(hot, 1) > 1.5

    def test_a_card_recovers_when_it_has_cooled(self):
        heat = Heat(Cooling(), PowerDraw(20.0, 200.0, 250.0))
        throttle = Throttle(heat, 0, 0, 0)
        factors = []
        for second in range(1, 601):
            busy_ns = min(second, 300) * NS_PER_S
            throttle.advance(second * NS_PER_S, busy_ns, 0)
            factors.append(throttle.factor)
        assert (factors[0], max(factors), factors[-1]) == (1.0, 1725 / 930, 1.0)


class TestCounts:
    def test_lost_and_retried_are_counted_and_nothing_is_answered_twice(self):
        requests = [asked(0.5), asked(1.0, "young"), asked(1.01, "plain", streamed=False)]
        result, _ = played([CRASH], requests)
        counts = result.faults
        assert counts is not None
        assert (counts.injected, counts.lost, counts.retried, counts.duplicated) == (1, 1, 2, 0)

    def test_who_finds_nobody_waits_for_the_restart(self):
        result, events = played([CRASH], [asked(2.0)], replicas=1)
        assert not told(events, Failed)
        assert took_s(result) == pytest.approx(9.05 + 20 * STEP_S, abs=1e-3)

    def test_first_tokens_are_not_reported_to_a_policy_that_does_not_ask(self):
        _, events = played([CRASH], [asked(0.5), asked(20.0, "later")])
        assert not told(events, FirstToken)

    def test_dispatches_to_a_replica_not_known_to_be_down_are_refused(self):
        class TwoAtATime(First):
            def place(self, request: RequestView, view: ClusterView) -> Verdict:
                ready = view.ready(request.model)
                if not ready or ready[0].inflight_requests >= 2:
                    return Hold()
                return Dispatch(request.id, ready[0].id)

        requests = [asked(0.9, name) for name in "abcde"]
        _, events = played([Fault(0.95, "crash", "r0", 10.0)], requests, 1, TwoAtATime())
        assert {failed.reason for failed in told(events, Failed)} == {BROKEN, UNREACHABLE}

    def test_faults_after_the_last_request_do_not_prolong_the_run(self):
        result, _ = played([Fault(1e6, "crash", "r0", 10.0)], [asked(0.5)])
        assert result.ended_ns < 5 * NS_PER_S

    def test_equal_experiments_give_equal_results(self):
        faults = [
            {"kind": "crash", "rate_per_hour": 60.0, "restart_s": 20.0},
            {"kind": "hang", "rate_per_hour": 60.0, "duration_s": 15.0},
            {"kind": "slow", "rate_per_hour": 60.0, "duration_s": 15.0, "factor": 2.0},
            {"kind": "network_cut", "rate_per_hour": 60.0},
        ]
        data = parse_yaml(SMALL, "small") | {"faults": faults}
        first, second = (simulate(data) for _ in range(2))
        assert first.requests.equals(second.requests)
        assert first.summary == second.summary
        assert first.summary["values"]["faults"]["mean"]

    def test_without_faults_nothing_is_said_of_them(self):
        values = simulate(parse_yaml(SMALL, "small")).summary["values"]
        assert not {"faults", "lost_requests", "retried_attempts", "duplicated_requests"} & {
            *values
        }

    def test_the_shipped_experiment_has_every_network_and_process_fault(self):
        experiment = load_experiment(Path(__file__).parents[1] / "experiments/faults.yaml")
        kinds = {fault.kind for fault in experiment.faults}
        assert kinds >= {"crash", "hang", "slow", "network_cut", "network_delay", "refuse"}


# -- simulated workers --

SPEED = 20.0
PATIENCE = Patience(health_s=5 / SPEED, doubt_s=0.25 / SPEED, restart_s=0.05, max_restart_s=0.05)


class Life:
    """A simulated worker of this process in place of one; see `runtime.supervisor.Process`."""

    pid = 0

    def __init__(self, port: int) -> None:
        self._worker = SimulatedWorker("m", SETTINGS, step_time, SPEED, start_s=0.2)
        self._killed = asyncio.Event()
        self._task = asyncio.create_task(self._serve(port))

    async def _serve(self, port: int) -> None:
        async with listening(make_app(self._worker), "127.0.0.1", port, drain_s=0):
            await self._killed.wait()

    def kill(self) -> None:
        """As SIGKILL: what is connected is cut."""
        for client in list(self._worker.clients):
            client.abort()
        self._killed.set()

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._task.done()

    async def ended(self) -> None:
        """Wait for its end."""
        await asyncio.wait([self._task])

    async def stop(self) -> None:
        """End it."""
        self.kill()
        await self.ended()


def answered(faults: Sequence[Fault], requests: Sequence[Request]) -> list[Record]:
    """What clients get from workers behind a proxy."""
    found: list[Record] = []

    async def scenario() -> None:
        urls = {f"r{n}": f"http://127.0.0.1:{port}" for n, port in enumerate(free_ports(3))}
        lives: dict[str, Life] = {}

        async def start(name: str) -> Life:
            lives[name] = Life(int(urls[name].rpartition(":")[2]))
            return lives[name]

        limits = Limits(eject_s=10 / SPEED)
        async with proxy(*urls.values(), policy=LeastLoaded(), core_limits=limits) as served:
            supervisor = Supervisor(served.driver.set_up, PATIENCE)
            for name, worker in served.driver.workers.items():
                assert isinstance(worker, HttpWorker)
                supervisor.keep(worker, partial(start, name))
            await asyncio.gather(*map(supervisor.until_up, urls))

            def kill(name: str) -> None:
                lives[name].kill()

            injection = asyncio.create_task(inject(faults, urls, SPEED, kill))
            client = LoadClient(
                f"http://127.0.0.1:{served.port}",
                speed=SPEED,
                clock=asyncio.get_running_loop().time,
            )
            found.extend(await client.send(iter(requests)))
            await injection
            await supervisor.close()

    run(scenario, loop_factory=IdleClockLoop)
    return found


def met(ttft_s: float, e2e_s: float) -> bool:
    """Whether an answer of twenty tokens, two seconds, counts."""
    return ttft_s < 1.5 and e2e_s < 3.5


class TestAgreement:
    FAULTS = (
        Fault(5.0, "crash", "r0", duration_s=12.0),
        Fault(12.0, "slow", "r1", duration_s=10.0, factor=3.0),
        Fault(20.0, "hang", "r2", duration_s=3.0),
        Fault(28.0, "network_cut", "r0"),
        Fault(32.0, "refuse", "r1", duration_s=4.0),
        Fault(38.0, "network_delay", "r2", duration_s=8.0, delay_s=1.0),
        Fault(42.0, "crash", "r0", duration_s=12.0, failed_starts=1),
    )

    def deployed(self, requests: Sequence[Request]) -> int:
        """How many answers count."""
        records = answered(self.FAULTS, requests)
        whole = [record for record in records if not record.error]
        return sum(met(SPEED * (r.ttft_s or 0.0), SPEED * (r.e2e_s or 0.0)) for r in whole)

    @pytest.mark.slow
    def test_simulated_workers_have_the_goodput_of_the_simulation(self):
        generator = np.random.default_rng(6)
        times_s = np.cumsum(generator.exponential(1 / 3.5, 200))
        requests = [asked(at_s, f"q{n}", streamed=n % 5 > 0) for n, at_s in enumerate(times_s)]
        result, _ = played(self.FAULTS, requests, 3, LeastLoaded())
        columns = result.requests
        whole = columns["outcome"] == FINISHED
        first, last, arrived = (
            columns[name][whole] / 1e9 for name in ("first_token_ns", "finished_ns", "arrived_ns")
        )
        first = np.where(columns["streamed"][whole], first, arrived)
        simulated = sum(map(met, first - arrived, last - arrived))
        assert 100 < simulated < 195
        assert self.deployed(requests) == pytest.approx(simulated, rel=0.02)
