"""`twin`: the step model, the mirror of a replica, and the decisions made with them."""

import pickle

import numpy as np
import pytest

from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    Dispatch,
    Finished,
    FirstToken,
    Hold,
    ReplicaChanged,
    StepCosts,
    Tick,
)
from policies.mirror import Flight, Mirror
from policies.rehearsal import Rehearsal
from policies.state import IN_FLIGHT, Entry
from policies.step_model import StepModel, pairs_of
from policies.testing import cluster, request
from policies.twin import Twin
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.experiment import simulate

FLAT = StepCosts((1,), (0.02,), (0.0,), 0.02, 0.001, 0.0, 0.0, 2048)
"""Every step takes 20 ms, and a millisecond more for each prefill token."""
SLOW = StepCosts((1,), (0.06,), (0.0,), 0.06, 0.003, 0.0, 0.0, 2048)


# -- the step model ----------------------------------------------------------------------------


def random_costs(rng):
    sizes = np.sort(rng.choice(np.arange(1, 65), size=rng.integers(1, 6), replace=False))
    return StepCosts(
        tuple(sizes.tolist()),
        tuple(rng.uniform(0.005, 0.05, sizes.size).tolist()),
        tuple(rng.uniform(1e-8, 1e-5, sizes.size).tolist()),
        *rng.uniform((0.001, 1e-5, 0.0, 0.0), (0.1, 2e-3, 1e-6, 0.01)).tolist(),
        2048,
    )


def engine_time(costs, max_num_seqs):
    columns = (costs.decode_sequences, costs.decode_base_s, costs.decode_per_context_token_s)
    return StepTime(
        [DecodePoint(*point) for point in zip(*columns, strict=True)],
        max_num_seqs,
        costs.prefill_base_s,
        costs.prefill_per_token_s,
        costs.prefill_per_pair_s,
        costs.host_overhead_s,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_step_takes_as_long_as_in_the_engine(seed):
    """But for its rounding: each coefficient to a picosecond."""
    rng = np.random.default_rng(seed)
    costs = random_costs(rng)
    model, engine = StepModel(costs), engine_time(costs, 128)
    for decodes in range(129):
        context, prefill = int(rng.integers(0, 20_000)), 777 * int(rng.integers(0, 2))
        pairs = int(pairs_of(prefill, 100))
        expected_s = engine.step_ps(decodes, context, prefill, pairs) / 1e12
        rounded_s = 0.5e-12 * (2 + context + prefill + pairs)
        found_s = model.step_s(decodes, context, prefill, pairs)
        assert abs(found_s - expected_s) <= rounded_s + 1e-14


@pytest.mark.parametrize("decodes", [0, 1, 2, 3, 4, 9, 64])
def test_to_a_nanosecond_where_coefficients_are_whole_picoseconds(decodes):
    costs = StepCosts(
        (1, 2, 4), (0.013, 0.016, 0.018), (1.2e-6, 1e-6, 8e-7), 0.04, 1e-3, 1e-7, 1e-3, 2048
    )
    expected_s = engine_time(costs, 64).step_ps(decodes, 30_000, 900, 500_000) / 1e12
    assert abs(StepModel(costs).step_s(decodes, 30_000, 900, 500_000) - expected_s) < 1e-9


def test_a_prompt_of_one_step_takes_that_step():
    model = StepModel(random_costs(np.random.default_rng(2)))
    assert model.prefill_s(1000, 0) == pytest.approx(model.step_s(0, 0, 1000, pairs_of(1000, 0)))


def test_a_prompt_of_two_steps_pays_the_base_twice():
    assert StepModel(FLAT).prefill_s(4096, 0) == pytest.approx(2 * 0.02 + 4.096)


def test_a_lone_simulated_request_has_its_first_token_when_the_model_says():
    run = simulate(
        {
            "name": "alone",
            "policy": {"name": "twin"},
            "cluster": {"replicas": [{"device": "radeon_vii", "model": "qwen3-vl-8b-awq"}]},
            "workload": {
                "kind": "synthetic",
                "requests": 1,
                "rate_per_s": 1.0,
                "prompt_tokens": 1000,
                "output_tokens": 5,
            },
            "warmup_fraction": 0.0,
            "seeds": [1],
        }
    )
    times = run.requests.to_pydict()
    ttft_s = (times["first_token_ns"][0] - times["arrived_ns"][0]) / 1e9
    costs = StepCosts((1,), (0.01285,), (1.205e-6,), 0.0435, 1.02e-3, 1.64e-7, 0.0, 2048)
    assert ttft_s == pytest.approx(StepModel(costs).prefill_s(1000, 0), abs=1e-8)


# -- the mirror --------------------------------------------------------------------------------


def flight(name="q", prompt_tokens=980, cached_tokens=0, expected_tokens=100.0, tpot_slo_s=0.1):
    wanted = request(id=name, prompt_tokens=prompt_tokens)
    return Flight(wanted, cached_tokens, expected_tokens, tpot_slo_s)


def mirror_of(*flights):
    mirror = Mirror(FLAT, now_s=0.0)
    for each in flights:
        mirror.add(each)
    return mirror


def test_prompts_are_computed_one_after_the_other():
    """980 tokens take a second each."""
    mirror = mirror_of(flight("a"), flight("b"))
    mirror.advance(1.5)
    assert (list(mirror.decodes), mirror.backlog_s()) == (["a"], pytest.approx(0.5))


def test_many_small_advances_come_to_the_same_as_one():
    mirror = mirror_of(flight("a"), flight("b"))
    for millisecond in range(1, 1501):
        mirror.advance(millisecond / 1000)
    assert (list(mirror.decodes), mirror.backlog_s()) == (["a"], pytest.approx(0.5))


def test_a_cached_prefix_is_not_computed_again():
    assert mirror_of(flight(cached_tokens=500)).backlog_s() == pytest.approx(0.5)


def test_who_decodes_gets_a_token_a_step():
    mirror = mirror_of(flight("a"))
    mirror.advance(1.0 + 10 * 0.02)
    assert mirror.generated_tokens(mirror.decodes["a"]) == pytest.approx(11)


def test_who_decodes_is_stalled_by_prompts():
    mirror = mirror_of(flight("a"), flight("b"))
    mirror.advance(2.0)
    assert mirror.generated_tokens(mirror.decodes["a"]) == pytest.approx(2)


def test_the_context_grows_with_every_token():
    mirror = mirror_of(flight("a", prompt_tokens=480), flight("b", prompt_tokens=480))
    mirror.advance(1.0 + 10 * 0.02)
    assert mirror.context_tokens == pytest.approx(480 + 12 + 480 + 11)


def test_a_first_token_sets_the_mirror_right():
    mirror = mirror_of(flight("a"))
    mirror.first_token("a", now_s=0.2)
    assert (mirror.backlog_s(), mirror.decodes["a"].first_s) == (0.0, 0.2)


def test_a_first_token_that_comes_late_starts_the_answer_anew():
    mirror = mirror_of(flight("a"))
    mirror.advance(3.0)
    mirror.first_token("a", now_s=3.0)
    assert (mirror.generated_tokens(mirror.decodes["a"]), mirror.context_tokens) == (1, 981)


@pytest.mark.parametrize("now_s", [0.5, 2.0], ids=["in prefill", "decoding"])
def test_nothing_is_left_of_what_was_removed(now_s):
    mirror = mirror_of(flight("a"))
    mirror.advance(now_s)
    mirror.remove("a")
    assert (len(mirror), mirror.context_tokens, mirror.backlog_s()) == (0, 0.0, 0.0)


def test_an_earlier_time_changes_nothing():
    mirror = mirror_of(flight("a"))
    mirror.advance(0.5)
    mirror.advance(0.1)
    mirror.advance(0.5)
    assert mirror.backlog_s() == pytest.approx(0.5)


def test_prompts_may_take_what_decoding_leaves_of_its_mean_objective():
    """Of two streams with steps of 20 ms, one may have 100 ms a token, the other 300."""
    mirror = mirror_of(flight("a", tpot_slo_s=0.1), flight("b", tpot_slo_s=0.3))
    mirror.advance(2.0)
    assert mirror.prefill_share() == pytest.approx(0.9)


def foresee(mirror, newcomer, now_s=0.0, due_s=99.0):
    mirror.advance(now_s)
    return mirror.foresee("r0", newcomer, now_s, due_s, 1.0)


def test_a_first_token_after_all_prompts_there_is_foreseen():
    mirror = mirror_of(flight("a"))
    assert foresee(mirror, flight(), due_s=1.9).misses
    assert not foresee(mirror, flight(), due_s=2.1).misses


def test_a_stream_that_would_end_too_slowly_is_harmed():
    """Of ten expected tokens with 0.1 s each, a stall of two seconds leaves too little."""
    mirror = mirror_of(flight("a", expected_tokens=10.0))
    assert foresee(mirror, flight(prompt_tokens=1960), now_s=1.0).harmed == 1


def test_a_stream_with_time_to_catch_up_is_not_harmed():
    mirror = mirror_of(flight("a", expected_tokens=500.0))
    assert foresee(mirror, flight(prompt_tokens=1960), now_s=1.0).harmed == 0


def test_a_stream_that_is_lost_already_cannot_be_harmed():
    slow = flight("a", expected_tokens=10.0)
    slow.lost = True
    assert foresee(mirror_of(slow), flight(prompt_tokens=1960), now_s=1.0).harmed == 0


# -- decisions ---------------------------------------------------------------------------------


def card(costs=FLAT, *prompts, **fields):
    """A replica with prompts of these lengths in flight."""
    return {"step_costs": costs, "prompts": prompts, **fields}


def view_of(now_s=0.0, **cards):
    prompts = {name: fields.pop("prompts") for name, fields in cards.items()}
    view = cluster(now_s, **cards)
    for name, lengths in prompts.items():
        replica = view.replica(name)
        for number, tokens in enumerate(lengths):
            sent = request(id=f"{name}-{number}", prompt_tokens=tokens)
            entry = view._entries[sent.id] = Entry(sent, "m", 0.0, order=number)
            entry.state, entry.replica = IN_FLIGHT, replica
            replica.inflight[sent.id] = entry
            replica.inflight_requests += 1
            replica.outstanding_tokens += sent.expected_tokens
    return view


def test_without_step_costs_the_fewest_outstanding_tokens_decide():
    assert Twin().place(request(), cluster(r0=300, r1=100)) == Dispatch("q", "r1")


def test_of_two_idle_replicas_the_faster_one_is_taken():
    assert Twin().place(request(), view_of(r0=card(SLOW), r1=card())) == Dispatch("q", "r1")


def test_the_slower_one_is_taken_before_waiting_behind_a_prompt_costs_more():
    view = view_of(r0=card(FLAT, 4000), r1=card(SLOW))
    assert Twin().place(request(prompt_tokens=500), view) == Dispatch("q", "r1")


def test_a_request_is_held_while_all_have_prompts_to_compute():
    assert Twin().place(request(), view_of(r0=card(FLAT, 2000), r1=card(FLAT, 2000))) == Hold()


def test_it_is_sent_once_waiting_would_cost_its_own_objective():
    view = view_of(now_s=4.5, r0=card(FLAT, 2000), r1=card(FLAT, 1000))
    assert Twin().place(request(), view) == Dispatch("q", "r1")


def test_it_is_held_while_its_end_has_no_room_in_kv():
    view = view_of(r0=card(FLAT, 100, kv_blocks=20))
    assert Twin().place(request(prompt_tokens=200), view) == Hold()


def test_it_goes_where_its_prefix_is():
    policy, view = Twin(), view_of(r0=card(), r1=card())
    blocks = {"prefix_blocks": (1, 2, 3), "prefix_block_tokens": 512, "prompt_tokens": 1536}
    policy._prefixes.dispatched(request(**blocks), view.replica("r1"))
    assert policy.place(request(**blocks), view) == Dispatch("q", "r1")


def test_a_stream_is_spared_by_holding_until_it_can_bear_the_stall():
    policy, view = Twin(), view_of(r0=card())
    policy.place(request(id="a", prompt_tokens=980, predicted_output_tokens=10), view)
    view.now_s = 1.0
    view.replica("r0").inflight_requests = 1
    assert policy.place(request(arrived_s=1.0, prompt_tokens=1960), view) == Hold()


def test_classes_have_objectives_of_their_own():
    policy = Twin(classes={"batch": {"ttft_slo_s": 60.0}})
    view = view_of(now_s=4.5, r0=card(FLAT, 7000))
    assert policy.place(request(traffic_class="batch"), view) == Hold()


# -- the queue ---------------------------------------------------------------------------------


class Overloaded:
    """One replica and more requests than it can serve in time, behind a core."""

    def __init__(self, policy, count, **fields):
        self.core = SchedulerCore(policy)
        self.order = []
        ready = ReplicaChanged(0.0, "r0", "ready", "m", (), 64, 10_000, step_costs=FLAT)
        self.tell(ready)
        for number in range(count):
            wanted = request(
                id=f"q{number}", prompt_tokens=980, predicted_output_tokens=2, **fields
            )
            self.tell(Arrived(0.0, wanted))

    def tell(self, event):
        actions = self.core.handle(event)
        self.order += [action.request_id for action in actions if isinstance(action, Dispatch)]

    def serve(self, seconds):
        """A prompt a second; each request ends with its first token."""
        for second in range(1, seconds + 1):
            name = self.order[second - 1]
            self.tell(FirstToken(float(second), name, 1))
            self.tell(Finished(float(second), name, 1, 1))


def test_who_can_be_served_in_time_goes_before_who_cannot():
    """Five fit into five seconds; a newcomer that can be in time overtakes all the others."""
    served = Overloaded(Twin(), 10)
    served.serve(3)
    served.tell(Arrived(3.0, request(id="new", arrived_s=3.0, prompt_tokens=980)))
    for second in range(4, 7):
        name = served.order[-1]
        served.tell(Finished(float(second), name, 1, 1))
    assert served.order == ["q0", "q1", "q2", "q3", "q4", "new", "q5"]


def test_nobody_is_late_for_those_who_have_more_time():
    """Twenty seconds of prompts wait that are due in a minute; the newcomer is due in five."""
    served = Overloaded(Twin(classes={"batch": {"ttft_slo_s": 60.0}}), 20, traffic_class="batch")
    served.tell(Arrived(0.0, request(id="new", prompt_tokens=980)))
    served.serve(1)
    assert served.order == ["q0", "new"]


def test_everybody_is_served_in_the_end():
    served = Overloaded(Twin(), 30)
    served.serve(30)
    assert sorted(served.order) == sorted(f"q{n}" for n in range(30))


def test_late_requests_keep_their_share_of_the_dispatches():
    """New requests come as fast as they can be served; one dispatch in five is of a late one."""
    served = Overloaded(Twin(late_share=0.25), 20)
    late = {f"q{number}" for number in range(5, 20)}
    for second in range(1, 90):
        name = served.order[second - 1]
        served.tell(
            Arrived(
                float(second), request(id=f"n{second}", arrived_s=float(second), prompt_tokens=980)
            )
        )
        served.tell(Finished(float(second), name, 1, 1))
    assert late <= set(served.order)


def test_late_requests_are_refused_only_when_asked():
    """Five prompts of a second each fit into five seconds."""
    served = Overloaded(Twin(shed_late=True), 10)
    assert (served.core.counts["shed"], served.core.queued_requests) == (5, 4)


def test_notes_of_requests_that_the_core_sheds_are_dropped():
    policy = Twin()
    served = Overloaded(policy, 3)
    for number in range(9):
        served.tell(Arrived(0.0, request(id=f"d{number}", prompt_tokens=980, deadline_s=0.5)))
    served.tell(Tick(0.5))
    assert len(policy._on_time) + len(policy._late) == served.core.queued_requests


# -- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "repair"),
    [
        ({"ttft_slo_s": 0}, "ttft_slo_s is 0: give a number of seconds above 0"),
        ({"tpot_slo_s": "fast"}, "tpot_slo_s is 'fast': give a number of seconds above 0"),
        ({"classes": {"b": {"ttft_slo_s": -1}}}, r"classes\.b\.ttft_slo_s is -1"),
        ({"classes": {"b": {"ttft": 1}}}, r"classes\.b\.ttft is unknown: give ttft_slo_s and"),
        ({"classes": {"b": 3}}, r"classes\.b is 3: give \{ttft_slo_s"),
        ({"late_share": 0}, "late_share is 0: give a share above 0, up to 1"),
        ({"shed_late": "yes"}, "shed_late is 'yes': give true or false"),
        ({"aging_s": -1}, "aging_s is -1: give seconds"),
    ],
    ids=["ttft", "tpot", "class", "unknown", "no mapping", "share", "shed", "aging"],
)
def test_wrong_parameters_are_refused(given, repair):
    with pytest.raises(ValueError, match=repair):
        Twin(**given)


# -- promises, with step costs -----------------------------------------------------------------


class Costed(Rehearsal):
    """The rehearsal of `check_policy` with replicas whose step costs are known."""

    def _becomes_ready(self, launched, now_s):
        for event in super()._becomes_ready(launched, now_s):
            fields = {name: getattr(event, name) for name in ReplicaChanged.__dataclass_fields__}
            yield ReplicaChanged(**fields | {"step_costs": FLAT})


def test_decides_the_same_twice():
    assert Costed(Twin()).run() == Costed(Twin()).run()


def test_decides_the_same_at_another_time():
    assert Costed(Twin()).run() == Costed(Twin(), shift_s=1e6).run()


def test_a_saved_policy_goes_on_as_the_one_that_was_saved():
    served = Overloaded(Twin(), 12)
    served.serve(4)
    policy = pickle.loads(pickle.dumps(served.core.policy))
    newcomer = request(id="new", arrived_s=4.0, prompt_tokens=980)
    assert policy.lane(newcomer) == served.core.policy.lane(newcomer)
    assert policy.rank(newcomer) == served.core.policy.rank(newcomer)


@pytest.mark.parametrize("outage", [False, True], ids=["calm", "outage"])
def test_holds_nothing_for_ever(outage):
    assert Costed(Twin(), outage=outage).run().held == 0


# -- what it is for ----------------------------------------------------------------------------


def goodput(policy):
    run = simulate(
        {
            "name": "overload",
            "policy": {"name": policy},
            "cluster": {
                "replicas": [{"count": 4, "device": "radeon_vii", "model": "qwen3-vl-8b-awq"}]
            },
            "workload": {
                "kind": "synthetic",
                "preset": "azure_conv",
                "rate_per_s": 2.0,
                "requests": 400,
            },
            "slo": {"ttft_s": 5.0, "tpot_s": 0.1},
            "seeds": [1],
        }
    )
    return run.summary["values"]["goodput_requests_per_s"]["mean"]


def test_under_overload_more_requests_meet_their_objectives_than_under_least_loaded():
    assert goodput("twin") > 1.2 * goodput("least_loaded")
