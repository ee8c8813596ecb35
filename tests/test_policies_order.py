"""Policies that sort what they hold: shortest first, earliest deadline, fairness by counters."""

import pytest

from policies.core import SchedulerCore
from policies.earliest_deadline import EarliestDeadline
from policies.interface import (
    Arrived,
    Cancelled,
    Dispatch,
    Failed,
    Finished,
    Hold,
    ReplicaChanged,
    Shed,
    StepCosts,
)
from policies.shortest_first import ShortestFirst
from policies.slots import with_slot
from policies.testing import cluster, request
from policies.vtc import Vtc

FULL = {"inflight_requests": 2, "max_num_seqs": 2}


class Served:
    """One replica with one slot behind a core: what is dispatched, in which order."""

    def __init__(self, policy, max_inflight=8):
        self.core = SchedulerCore(policy)
        self.now_s = 0.0
        self.order = []
        self._tell(ReplicaChanged(0.0, "r0", "ready", "m", max_num_seqs=max_inflight))

    def _tell(self, event):
        sent = [a for a in self.core.handle(event) if isinstance(a, Dispatch)]
        self.order += [action.request_id for action in sent]

    def arrives(self, name, **fields):
        self._tell(Arrived(self.now_s, request(id=name, arrived_s=self.now_s, **fields)))

    def finishes(self, name, output_tokens=10):
        self._tell(Finished(self.now_s, name, 1, output_tokens))

    def serve_all(self, output_tokens=10):
        """Finish one after the other until nothing is left; whom was served, in order."""
        for name in self.order:  # grows meanwhile
            self.finishes(name, output_tokens)
        return self.order


# -- slots -------------------------------------------------------------------------------------


def ids(replicas):
    return [replica.id for replica in replicas]


def test_a_replica_with_all_seats_taken_has_no_slot():
    view = cluster(r0=FULL, r1={"inflight_requests": 1, "max_num_seqs": 2})
    assert ids(with_slot(request(), view.ready("m"), None)) == ["r1"]


def test_a_replica_whose_kv_would_not_hold_the_end_has_no_slot():
    full = {"inflight_requests": 1, "kv_blocks": 20, "outstanding_tokens": 200}
    view = cluster(r0=full, r1=full | {"outstanding_tokens": 170})
    assert ids(with_slot(request(), view.ready("m"), None)) == ["r1"]


def test_an_idle_replica_has_a_slot_for_any_request():
    view = cluster(r0={"kv_blocks": 2})
    assert ids(with_slot(request(prompt_tokens=9999), view.ready("m"), 1)) == ["r0"]


def test_a_given_limit_goes_before_seats():
    view = cluster(r0={"inflight_requests": 2, "max_num_seqs": 99}, r1=FULL)
    assert ids(with_slot(request(), view.ready("m"), 3)) == ["r0", "r1"]


@pytest.mark.parametrize("policy", [ShortestFirst, EarliestDeadline, Vtc])
@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "8"])
def test_a_limit_that_is_no_count_is_refused(policy, limit):
    with pytest.raises(ValueError, match="give a whole number of requests a replica from 1 up"):
        policy(max_inflight=limit)


@pytest.mark.parametrize("policy", [ShortestFirst, EarliestDeadline, Vtc])
def test_holds_when_every_replica_is_full(policy):
    assert policy().place(request(), cluster(r0=FULL, r1=FULL)) == Hold()


@pytest.mark.parametrize("policy", [ShortestFirst, EarliestDeadline, Vtc])
def test_goes_to_the_lightest_replica_with_a_slot(policy):
    busy = {"inflight_requests": 1, "max_num_seqs": 2}
    view = cluster(
        r0=FULL | {"outstanding_tokens": 1},
        r1=busy | {"outstanding_tokens": 9},
        r2=busy | {"outstanding_tokens": 5},
    )
    assert policy().place(request(), view) == Dispatch("q", "r2")


# -- shortest_first ----------------------------------------------------------------------------


def test_the_shortest_predicted_answer_goes_first():
    served = Served(ShortestFirst(max_inflight=1))
    for name, tokens in (("first", 50), ("long", 500), ("short", 5), ("middle", 50)):
        served.arrives(name, predicted_output_tokens=tokens)
    assert served.serve_all() == ["first", "short", "middle", "long"]


def test_without_a_prediction_the_prompt_and_the_limit_decide():
    served = Served(ShortestFirst(max_inflight=1))
    served.arrives("first")
    served.arrives("long", prompt_tokens=900)
    served.arrives("short", prompt_tokens=90)
    assert served.serve_all() == ["first", "short", "long"]


def test_a_long_request_is_not_overtaken_by_one_that_comes_an_aging_bound_later():
    policy = ShortestFirst(aging_s=60)
    long = request(arrived_s=0.0, predicted_output_tokens=10**9)
    assert policy.rank(long) < policy.rank(request(arrived_s=60.0, predicted_output_tokens=0))


def test_a_long_request_is_overtaken_by_a_short_one_until_then():
    policy = ShortestFirst(aging_s=60)
    long = request(arrived_s=0.0, predicted_output_tokens=10**6)
    assert policy.rank(long) > policy.rank(request(arrived_s=50.0, predicted_output_tokens=0))


@pytest.mark.parametrize("aging_s", [0, -1, "60"])
def test_an_aging_bound_that_is_no_time_is_refused(aging_s):
    with pytest.raises(ValueError, match="give a number of seconds above 0"):
        ShortestFirst(aging_s=aging_s)


# -- earliest_deadline -------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first_and_none_last():
    served = Served(EarliestDeadline(max_inflight=1))
    for name, deadline_s in (("first", None), ("never", None), ("late", 90.0), ("soon", 30.0)):
        served.arrives(name, deadline_s=deadline_s)
    assert served.serve_all() == ["first", "soon", "late", "never"]


def test_with_patience_a_request_without_a_deadline_is_due_in_the_end():
    policy = EarliestDeadline(patience_s=20)
    waits = request(arrived_s=0.0)
    assert policy.rank(waits) < policy.rank(request(arrived_s=5.0, deadline_s=21.0))


COSTS = StepCosts((1,), (0.02,), (0.0,), 0.05, 0.001, 0.0, 0.0, 2048)


def test_what_cannot_be_in_time_is_kept_unless_asked_otherwise():
    view = cluster(r0={"step_costs": COSTS})
    hopeless = request(prompt_tokens=2000, deadline_s=1.0)
    assert EarliestDeadline().place(hopeless, view) == Dispatch("q", "r0")


def test_what_cannot_be_in_time_on_any_replica_is_shed_when_asked():
    view = cluster(r0={"step_costs": COSTS})
    hopeless = request(prompt_tokens=2000, deadline_s=1.0)
    assert EarliestDeadline(shed_late=True).place(hopeless, view) == Shed("q", "late")


def test_a_replica_of_unknown_speed_might_be_in_time():
    view = cluster(r0={"step_costs": COSTS}, r1=0)
    hopeless = request(prompt_tokens=2000, deadline_s=1.0)
    assert EarliestDeadline(shed_late=True).place(hopeless, view) == Dispatch("q", "r0")


@pytest.mark.parametrize(
    ("given", "repair"),
    [
        ({"patience_s": 0}, "give a number of seconds above 0"),
        ({"shed_late": "yes"}, "give true or false"),
    ],
    ids=["patience", "shed"],
)
def test_wrong_parameters_of_earliest_deadline_are_refused(given, repair):
    with pytest.raises(ValueError, match=repair):
        EarliestDeadline(**given)


# -- vtc ---------------------------------------------------------------------------------------


def backlog(served, **requests):
    """`a=3`: tenant a sends three requests now, called a0, a1, a2."""
    for tenant, count in requests.items():
        for number in range(count):
            served.arrives(f"{tenant}{number}", tenant=tenant)


def test_tenants_take_turns_however_much_one_has_queued():
    served = Served(Vtc(max_inflight=1))
    backlog(served, a=4, b=2)
    assert served.serve_all() == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_decoded_token_counts_twice_a_prompt_token():
    """a0 costs 100 + 2 * 150 = 400, as four requests of b, of 100 prompt tokens, begin to."""
    served = Served(Vtc(max_inflight=1))
    backlog(served, a=2, b=6)
    served.finishes("a0", output_tokens=150)
    for name in ("b0", "b1", "b2", "b3"):
        served.finishes(name, output_tokens=0)
    assert served.order == ["a0", "b0", "b1", "b2", "b3", "a1"]


def test_a_tenant_that_returns_has_saved_up_nothing():
    served = Served(Vtc(max_inflight=1))
    backlog(served, a=30)
    for number in range(20):
        served.finishes(f"a{number}")
    backlog(served, b=5)
    assert served.serve_all()[21:27] == ["b0", "a21", "b1", "a22", "b2", "a23"]


def test_the_difference_between_backlogged_tenants_is_bounded():
    """All requests cost the same here: nobody is more than one dispatch ahead, and one more
    while its last answer is still to be charged."""
    served = Served(Vtc(max_inflight=1))
    backlog(served, a=40, b=40, c=40)
    worst = 0
    for name in served.order:
        served.finishes(name)
        if len(served.order) >= 100:
            break
        counts = [sum(n.startswith(tenant) for n in served.order) for tenant in "abc"]
        worst = max(worst, max(counts) - min(counts))
    assert worst <= 2


def test_a_guess_is_charged_at_dispatch():
    served = Served(Vtc(max_inflight=2))
    served.arrives("a0", tenant="a", predicted_output_tokens=1000)
    served.arrives("b0", tenant="b", predicted_output_tokens=1)
    served.arrives("a1", tenant="a")
    served.arrives("b1", tenant="b")
    served.finishes("b0", output_tokens=1)
    assert served.order == ["a0", "b0", "b1"]


def test_a_failed_attempt_is_given_back():
    policy = Vtc()
    policy.place(request(tenant="a"), cluster(r0=0))
    policy.observe(Failed(1.0, "q", 1, "worker died", retryable=True), cluster())
    assert policy._counters == {("m", "a"): 0.0}


def test_of_an_answer_that_its_client_left_the_prompt_stays_charged():
    policy = Vtc()
    policy.place(request(tenant="a", predicted_output_tokens=50), cluster(r0=0))
    policy.observe(Cancelled(1.0, "q", 1), cluster())
    assert policy._counters == {("m", "a"): 100.0}


def test_no_tenant_passes_the_least_served_one_while_that_finds_no_slot():
    policy = Vtc()
    busy = {"inflight_requests": 1, "kv_blocks": 20, "outstanding_tokens": 100}
    view = cluster(r0=busy)
    assert policy.place(request(tenant="a", prompt_tokens=300), view) == Hold()
    assert policy.place(request(tenant="b", prompt_tokens=10), view) == Hold()
