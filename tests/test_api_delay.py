"""The API server's delay: what it adds to a lone request, to the microsecond, and what becomes of
requests and answers that are on their way when something happens."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.interface import (
    Arrived,
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
    Retire,
    Verdict,
)
from policies.testing import request
from tests.small_experiment import SMALL
from tests.stub_server import Recorder
from viisim.calibration.profile_file import profile_text
from viisim.config import experiment_from
from viisim.documents import check, parse_yaml
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.errors import InputError
from viisim.experiment import replica_specs
from viisim.fault_player import BROKEN, FaultPlan
from viisim.faults import Fault
from viisim.invariants import check_invariants
from viisim.profile import ApiDelay, Profile, load_profile, profile_hash
from viisim.records import FINISHED, REFUSED, UNFINISHED, SeedResult
from viisim.simulation import ReplicaSpec, Simulation
from viisim.step_costs import ApiServer, api_server_of
from viisim.workload.request import Request

MS = 10**6
STEP = 100 * MS
SETTINGS = SchedulerSettings(num_kv_blocks=2000, max_num_seqs=4)
API = ApiServer(request_ns=6 * MS, request_per_prompt_token_ps=20 * MS, answer_ns=3 * MS)
"""A prompt of 100 tokens takes 6 ms and 2 ms more, a token 3 ms."""
WAY, BACK = 8 * MS, 3 * MS


def step_time(factor: float = 1.0) -> StepTime:
    """A tenth of a second, whoever is in the batch."""
    return StepTime([DecodePoint(1, 0.1 * factor, 0.0)], 16, 0.1 * factor, 0.0)


def asked(at_ms: int, name: str = "q", tokens: int = 5, **options: Any) -> Request:
    """A request with a prompt of 100 tokens; five tokens take half a second."""
    at_ns, prompt = at_ms * MS, options.pop("prompt_tokens", 100)
    view = request(
        id=name,
        arrived_s=at_ns / 1e9,
        prompt_tokens=prompt,
        max_output_tokens=tokens,
        **{"streamed": True, **options},
    )
    return Request(view, at_ns, ((name, prompt),), tokens)


class First(Policy):
    """The first replica that is ready; what `plan` answers at its `tick_s` is its tests'."""

    preempts = True

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """It, or none."""
        ready = view.ready(request.model)
        return Dispatch(request.id, ready[0].id) if ready else Hold()


class Second(First):
    """One action, at a moment of the test's choice: the first tick."""

    def __init__(self, at_s: float, action: Preempt | Retire) -> None:
        self.tick_s = at_s
        self._actions: list[Any] = [action]

    def plan(self, queue: Iterable[RequestView], view: ClusterView) -> list[Any]:
        """It, once."""
        actions, self._actions = self._actions, []
        return actions


def played(
    requests: Iterable[Request],
    api: ApiServer | None = API,
    *,
    faults: Iterable[Fault] | None = None,
    policy: Policy | None = None,
    replicas: int = 1,
    settings: SchedulerSettings = SETTINGS,
    coalesce: bool = True,
    **options: Any,
) -> tuple[SeedResult, list[Event]]:
    """What is recorded, and what the core was told after the beginning."""
    recorder = Recorder()
    specs = [
        ReplicaSpec(f"r{n}", "m", (f"gpu{n}",), settings, step_time(), coalesce, api=api)
        for n in range(replicas)
    ]
    plan = None if faults is None else FaultPlan(iter(faults), {s.id: step_time for s in specs})
    result = Simulation(
        specs, policy or First(), requests, faults=plan, journal=recorder, **options
    ).run()
    check_invariants(result)
    return result, recorder.events


def at_ms(events: Iterable[Event], *kinds: type) -> list[tuple[str, float]]:
    """When events of these kinds came, those at the beginning left out."""
    return [
        (type(event).__name__, round(event.now_s * 1e3, 6))
        for event in events
        if type(event) in kinds and event.now_s > 0
    ]


def instants_ms(result: SeedResult, row: int = 0) -> dict[str, float]:
    """Started, first token and finished, from its arrival on."""
    columns = result.requests
    return {
        name: int(columns[f"{name}_ns"][row] - columns["arrived_ns"][row]) / MS
        for name in ("started", "first_token", "finished")
    }


class TestALoneRequest:
    def test_its_engine_has_it_after_the_way_there(self) -> None:
        result, _ = played([asked(10)])
        assert instants_ms(result)["started"] == 8.0

    def test_its_first_token_takes_the_way_there_a_step_and_the_way_back(self) -> None:
        result, _ = played([asked(10)])
        assert instants_ms(result)["first_token"] == 8 + 100 + 3

    def test_its_end_takes_both_ways_once(self) -> None:
        result, _ = played([asked(10)])
        assert instants_ms(result)["finished"] == 8 + 5 * 100 + 3

    def test_the_core_is_told_when_the_client_knows(self) -> None:
        _, events = played([asked(10)])
        assert at_ms(events, FirstToken, Finished) == [("FirstToken", 121.0), ("Finished", 521.0)]

    def test_a_policy_that_wants_no_first_tokens_changes_no_time(self) -> None:
        class Plain(First):
            preempts = False

        told, _ = played([asked(10)])
        untold, events = played([asked(10)], policy=Plain())
        assert instants_ms(told) == instants_ms(untold)
        assert not at_ms(events, FirstToken)

    def test_a_longer_prompt_is_longer_on_its_way(self) -> None:
        result, _ = played([asked(10, prompt_tokens=600)])
        assert instants_ms(result)["started"] == 6 + 600 * 0.02

    def test_a_shorter_prompt_overtakes_none_that_was_sent_before_it(self) -> None:
        long, short = asked(10, "long", prompt_tokens=600), asked(11, "short")
        result, _ = played([long, short], settings=replace(SETTINGS, max_num_seqs=1))
        assert instants_ms(result, row=0)["started"] == 6 + 600 * 0.02
        assert instants_ms(result, row=1)["started"] > instants_ms(result, row=0)["finished"] - 5

    def test_a_prompt_that_is_too_long_is_refused_when_it_has_been_read(self) -> None:
        settings = replace(SETTINGS, max_model_len=100)
        result, events = played([asked(10)], settings=settings)
        assert at_ms(events, Failed) == [("Failed", 18.0)]
        assert result.requests["outcome"].tolist() == [REFUSED]

    def test_the_next_turn_of_a_session_follows_the_answer_that_was_received(self) -> None:
        first = asked(10)
        first.next_turn = lambda now_ns: asked(now_ns // MS, "then")
        _, events = played([first])
        assert at_ms(events, Arrived) == [("Arrived", 10.0), ("Arrived", 521.0)]


class TestOthersBeside:
    def test_the_engine_is_free_while_the_answer_travels(self) -> None:
        settings = replace(SETTINGS, max_num_seqs=1)
        result, _ = played([asked(10, "a"), asked(20, "b")], settings=settings)
        # The second begins with the step after the first one's last, not 3 ms later.
        assert instants_ms(result, 1)["started"] == 518 - 20

    def test_a_request_on_its_way_is_nothing_that_a_scrape_can_see(self) -> None:
        class Watching(First):
            def __init__(self) -> None:
                self.seen: list[tuple[int, int, int]] = []

            def observe(self, event: Event, view: ClusterView) -> None:
                if isinstance(event, Gauges):
                    replica = view.replica("r0")
                    self.seen.append((event.running, event.waiting, replica.inflight_requests))

        policy = Watching()
        played([asked(95)], policy=policy, scrape_s=0.1, scrape_delay_s=0.001, until_s=0.102)
        assert policy.seen == [(0, 0, 0), (0, 0, 1)]

    @pytest.mark.parametrize("answer_ms", [0, 3], ids=["there", "both ways"])
    def test_trains_of_steps_change_nothing(self, answer_ms: int) -> None:
        rng = np.random.default_rng(1)
        lengths = rng.integers(1, 40, 60).tolist()
        times = np.sort(rng.integers(0, 20_000, 60)).tolist()
        requests = [
            asked(t, f"q{n}", k) for n, (t, k) in enumerate(zip(times, lengths, strict=True))
        ]
        api = replace(API, answer_ns=answer_ms * MS)
        runs = [played(requests, api, coalesce=coalesce, replicas=2) for coalesce in (True, False)]
        (one, told), (other, told_too) = runs
        assert told == told_too
        for name, column in one.requests.items():
            assert column.tolist() == other.requests[name].tolist()

    def test_a_delay_of_nothing_changes_no_byte(self) -> None:
        requests = [asked(40 * n, f"q{n}", 1 + n % 7) for n in range(50)]
        (without, told), (zero, told_too) = (
            played(requests, api, replicas=2) for api in (None, ApiServer())
        )
        assert (told, without.events) == (told_too, zero.events)
        for name, column in without.requests.items():
            assert column.tobytes() == zero.requests[name].tobytes()


class TestPreempt:
    def test_on_the_way_it_is_called_off_at_once(self) -> None:
        policy = Second(0.004, Preempt("q"))
        result, events = played([asked(0)], policy=policy)
        assert at_ms(events, Cancelled) == [("Cancelled", 4.0)]
        assert result.requests["attempts"].tolist() == [2]
        assert instants_ms(result)["first_token"] == 4 + 8 + 100 + 3

    def test_a_first_token_on_the_way_back_is_not_seen(self) -> None:
        policy = Second(0.110, Preempt("q"))
        result, events = played([asked(0)], policy=policy)
        # The step in progress is wasted; then the request comes again.
        assert at_ms(events, Cancelled, FirstToken) == [("Cancelled", 208.0), ("FirstToken", 319.0)]
        assert instants_ms(result)["first_token"] == 319

    def test_a_whole_answer_on_the_way_back_is_thrown_away(self) -> None:
        policy = Second(0.110, Preempt("q"))
        result, events = played([asked(0, tokens=1)], policy=policy)
        assert at_ms(events, Cancelled, Finished) == [("Cancelled", 111.0), ("Finished", 222.0)]
        assert result.requests["attempts"].tolist() == [2]


class TestReplicaThatGoes:
    def test_a_request_on_the_way_to_one_that_dies_is_tried_elsewhere(self) -> None:
        crash = Fault(0.015, "crash", "r0", duration_s=10.0)
        result, events = played([asked(10)], faults=[crash], replicas=2)
        (failed,) = [event for event in events if isinstance(event, Failed)]
        assert (failed.now_s, failed.reason, failed.retryable) == (0.015, BROKEN, True)
        assert instants_ms(result)["finished"] == 5 + 8 + 500 + 3

    def test_so_is_one_whose_first_token_was_on_the_way_back(self) -> None:
        crash = Fault(0.120, "crash", "r0", duration_s=10.0)
        result, events = played([asked(10)], faults=[crash], replicas=2)
        assert [event.retryable for event in events if isinstance(event, Failed)] == [True]
        assert instants_ms(result)["first_token"] == 110 + 8 + 100 + 3

    def test_one_whose_first_token_was_seen_is_lost(self) -> None:
        crash = Fault(0.122, "crash", "r0", duration_s=10.0)
        result, events = played([asked(10)], faults=[crash], replicas=2)
        assert [event.retryable for event in events if isinstance(event, Failed)] == [False]
        assert instants_ms(result)["first_token"] == 111

    def test_a_first_token_that_was_lost_is_not_recorded(self) -> None:
        crash = Fault(0.120, "crash", "r0", duration_s=10.0)
        result, _ = played([asked(10)], faults=[crash], limits=Limits(max_attempts=1))
        assert result.requests["first_token_ns"].tolist() == [-1]

    def test_a_cut_network_loses_requests_on_the_way(self) -> None:
        cut = Fault(0.015, "network_cut", "r0")
        result, _ = played([asked(10)], faults=[cut], replicas=2)
        assert result.requests["outcome"].tolist() == [FINISHED]
        assert instants_ms(result)["started"] == 5 + 8

    def test_a_network_delay_comes_on_top(self) -> None:
        delay = Fault(0.0, "network_delay", "r0", duration_s=1.0, delay_s=0.05)
        result, _ = played([asked(10)], faults=[delay])
        assert instants_ms(result)["started"] == 50 + 8

    def test_the_end_of_a_hang_does_not_hasten_who_is_delayed(self) -> None:
        faults = [
            Fault(0.0, "network_delay", "r0", duration_s=0.020, delay_s=0.5),
            Fault(0.030, "hang", "r0", duration_s=0.1),
        ]
        result, _ = played([asked(10)], None, faults=faults)
        assert instants_ms(result)["started"] == 500

    def test_one_that_drains_waits_for_requests_on_the_way_to_it(self) -> None:
        result, events = played([asked(0)], policy=Second(0.004, Retire("r0")))
        assert result.requests["outcome"].tolist() == [FINISHED]
        gone = [event for event in events if isinstance(event, ReplicaChanged) and event.now_s]
        assert [(event.state, event.now_s) for event in gone] == [("gone", 0.511)]

    def test_one_that_drains_waits_for_answers_on_the_way_back(self) -> None:
        _, events = played([asked(0)], policy=Second(0.510, Retire("r0")))
        assert at_ms(events, Finished, ReplicaChanged) == [
            ("Finished", 511.0),
            ("ReplicaChanged", 511.0),
        ]


class TestTheEndOfARun:
    def test_what_is_on_the_way_there_is_unfinished(self) -> None:
        result, _ = played([asked(10)], until_s=0.015)
        assert result.requests["outcome"].tolist() == [UNFINISHED]

    def test_what_is_on_the_way_back_was_never_seen(self) -> None:
        result, _ = played([asked(10, tokens=1)], until_s=0.120)
        assert result.requests["outcome"].tolist() == [UNFINISHED]
        assert result.requests["first_token_ns"].tolist() == [-1]


# -- profiles --


def profile(**api: float) -> Profile:
    known = load_profile("bench/a100_like")
    return known.model_copy(update={"api": ApiDelay(**api)})


class TestProfile:
    def test_a_profile_without_it_has_none(self) -> None:
        assert api_server_of(load_profile("bench/a100_like")) is None

    def test_seconds_become_whole_nanoseconds_and_picoseconds(self) -> None:
        times = {"request_s": 0.0061, "request_per_prompt_token_s": 1.5e-6, "answer_s": 0.002}
        assert api_server_of(profile(**times)) == ApiServer(6_100_000, 1_500_000, 2_000_000)

    def test_it_is_written_and_read_again(self) -> None:
        written = profile(request_s=0.0061, answer_s=0.002)
        read = check(Profile, parse_yaml(profile_text(written), "p"), "p", Path())
        assert read.api == written.api

    def test_a_profile_without_it_is_written_without_it(self) -> None:
        assert "api" not in parse_yaml(profile_text(load_profile("bench/a100_like")), "p")

    def test_the_hash_of_a_profile_without_it_is_what_it_was(self) -> None:
        known = "7992dc02ede43c908d69da3208a3045e1ddf8ccba07dfc773102ed18eb812bff"
        assert profile_hash(load_profile("bench/a100_like")) == known

    def test_another_delay_is_another_hash(self) -> None:
        assert profile_hash(profile(answer_s=0.002)) != profile_hash(profile(answer_s=0.003))

    def test_a_negative_delay_is_refused(self) -> None:
        data = load_profile("bench/a100_like").model_dump(exclude_none=True)
        with pytest.raises(InputError, match=r"api\.answer_s"):
            check(Profile, data | {"api": {"answer_s": -1.0}}, "p", Path())


def test_replicas_have_the_delay_of_their_profile(tmp_path: Path) -> None:
    known = load_profile("radeon_vii/qwen3-vl-8b-awq")
    api = ApiDelay(request_s=0.006, answer_s=0.002)
    text = profile_text(known.model_copy(update={"api": api}))
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    data = parse_yaml(SMALL, "small")
    data["cluster"]["replicas"][0]["profile"] = "p.yaml"
    specs = replica_specs(experiment_from(data, "small.yaml", tmp_path))
    assert [spec.api for spec in specs] == [ApiServer(6 * MS, 0, 2 * MS)] * 2
