"""`SchedulerCore`: what each event does, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest

from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    Cancelled,
    ConfigChanged,
    Dispatch,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Hold,
    InvalidAction,
    Launch,
    LaunchFailed,
    Limits,
    Policy,
    PolicyError,
    Preempt,
    ReplicaChanged,
    Retire,
    Shed,
    Tick,
)
from policies.least_loaded import LeastLoaded
from policies.testing import request


class Answers(Policy):
    """Places and plans as the test says."""

    def __init__(
        self,
        place: Callable[..., Any] = lambda request, view: Hold(),
        plan: Callable[..., Any] = lambda queue, view: (),
        *,
        tick_s: float | None = None,
        preempts: bool = False,
    ) -> None:
        self._place, self._plan = place, plan
        self.tick_s, self.preempts = tick_s, preempts

    def place(self, request, view):
        return self._place(request, view)

    def plan(self, queue, view):
        return self._plan(queue, view)


class EachTwoSeconds(Answers):
    """Holds, and plans nothing, every two seconds."""

    def __init__(self) -> None:
        super().__init__(tick_s=2.0)


class Slots(Policy):
    """One request a replica; urgent ones (priority 0) displace others."""

    preempts = True

    def place(self, request, view):
        free = [r for r in view.ready(request.model) if not r.inflight_requests]
        if free:
            return Dispatch(request.id, free[0].id)
        if request.priority == 0:
            for replica in view.ready(request.model):
                for other in view.inflight(replica.id):
                    if other.priority > 0 and not replica.withdrawing_requests:
                        return Preempt(other.id)
        return Hold()

    def rank(self, request):
        return request.priority, request.arrived_s


def core_with(policy: Policy | None = None, *replicas: str, **limits: Any) -> SchedulerCore:
    core = SchedulerCore(policy or LeastLoaded(), limits=Limits(**limits))
    for replica_id in replicas:
        ready(core, replica_id)
    return core


def ready(core, replica_id, now_s=0.0, model="m", **fields):
    devices = (f"host/{replica_id}",)
    return core.handle(ReplicaChanged(now_s, replica_id, "ready", model, devices, **fields))


def arrive(core, request_id="q", now_s=0.0, **fields):
    return core.handle(Arrived(now_s, request(id=request_id, arrived_s=now_s, **fields)))


def fail(core, request_id="q", attempt=1, now_s=1.0, *, retryable=True, worker_fault=True):
    return core.handle(Failed(now_s, request_id, attempt, "broken", retryable, worker_fault))


def replica_of(core, replica_id):
    return core._view.replica(replica_id)


def perform_all(core, perform, event):
    """Handle an event and all that performing its actions raises at once, as drivers do: never
    from within."""
    pending = [event]
    for current in pending:
        for action in core.handle(current):
            pending.extend(perform(action))


# -- placing -----------------------------------------------------------------------------------


def test_an_arrival_is_dispatched_at_once():
    assert arrive(core_with(None, "r0")) == [Dispatch("q", "r0")]


def test_a_request_waits_for_the_first_replica():
    core = core_with()
    assert arrive(core) == []
    assert ready(core, "r0", 1.0) == [Dispatch("q", "r0")]


def test_a_starting_replica_takes_nothing_yet():
    core = core_with()
    core.handle(ReplicaChanged(0.0, "r0", "starting", "m"))
    assert arrive(core) == []


def test_a_draining_replica_takes_no_more():
    core = core_with(None, "r0")
    core.handle(ReplicaChanged(0.0, "r0", "draining"))
    assert arrive(core) == []


def test_outstanding_tokens_are_charged_at_dispatch_and_released_at_the_end():
    core = core_with(None, "r0")
    arrive(core, prompt_tokens=100, max_output_tokens=50)
    assert replica_of(core, "r0").outstanding_tokens == 150
    core.handle(Finished(1.0, "q", 1, 7))
    assert replica_of(core, "r0").outstanding_tokens == 0


def test_a_prediction_replaces_the_output_limit():
    core = core_with(None, "r0")
    arrive(core, prompt_tokens=100, max_output_tokens=50, predicted_output_tokens=5)
    assert replica_of(core, "r0").outstanding_tokens == 105


def test_a_held_head_blocks_its_own_lane_only():
    core = core_with(None, "r0")
    arrive(core, "other", model="other")
    assert arrive(core, "mine", 1.0) == [Dispatch("mine", "r0")]


def test_requests_leave_a_lane_in_rank_order_whenever_they_came():
    core = core_with(Slots())
    for number, priority in enumerate((2, 1, 2, 0)):
        arrive(core, f"q{number}", float(number), priority=priority)
    order = [core.handle(ReplicaChanged(9.0, f"r{n}", "ready", "m"))[0] for n in range(4)]
    assert [action.request_id for action in order] == ["q3", "q1", "q0", "q2"]


def test_next_lane_chooses_among_the_lanes_that_are_not_held():
    offered = []

    class Lanes(Answers):
        def next_lane(self, lanes, view):
            offered.append(sorted(lanes))
            return max(lanes)

    core = core_with(Lanes())
    arrive(core, "a", model="a")
    offered.clear()
    arrive(core, "b", 1.0, model="b")
    assert offered == [["a", "b"], ["a"]]


def test_the_default_next_lane_has_the_smallest_rank():
    asked = []
    core = core_with(Answers(lambda request, view: asked.append(request.id) or Hold()))
    arrive(core, "later", 1.0, model="a")
    arrive(core, "latest", 2.0, model="b")
    assert asked[-2:] == ["later", "latest"]


# -- attempts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stale",
    [
        FirstToken(1.0, "q", 2),
        Finished(1.0, "q", 2, 5),
        Failed(1.0, "q", 2, "broken", True),
        Cancelled(1.0, "q", 2),
        Finished(1.0, "unknown", 1, 5),
    ],
)
def test_an_event_of_another_attempt_is_ignored(stale):
    core = core_with(None, "r0")
    arrive(core)
    assert core.handle(stale) == []
    assert core.inflight_requests == 1


def test_a_stale_event_is_not_observed():
    seen = []

    class Observer(LeastLoaded):
        def observe(self, event, view):
            seen.append(event)

    core = core_with(Observer(), "r0")
    core.handle(Finished(1.0, "unknown", 1, 5))
    assert [type(event) for event in seen] == [ReplicaChanged]


def test_the_second_attempt_is_numbered_two():
    core = core_with(None, "r0", "r1")
    arrive(core)
    assert fail(core) == [Dispatch("q", "r1", attempt=2)]


# -- failures ----------------------------------------------------------------------------------


def test_a_failed_request_is_retried_elsewhere_only():
    core = core_with(None, "r0", "r1")
    arrive(core, "big", prompt_tokens=9000)  # on r0, so that the next goes to r1
    arrive(core, "q", 0.5)
    assert fail(core) == [Dispatch("q", "r0", attempt=2)]


def test_a_second_failure_is_final():
    core = core_with(None, "r0", "r1", "r2")
    arrive(core)
    fail(core)
    assert fail(core, attempt=2) == [Shed("q", "failed: broken")]


def test_a_failure_with_nowhere_else_to_go_is_final():
    core = core_with(None, "r0")
    arrive(core)
    assert fail(core) == [Shed("q", "failed: broken")]


def test_a_failure_after_the_first_byte_is_final():
    core = core_with(None, "r0", "r1")
    arrive(core)
    core.handle(FirstToken(0.5, "q", 1))
    assert fail(core) == [Shed("q", "failed: broken")]


def test_a_retry_waits_for_the_other_replica_to_start():
    core = core_with(None, "r0")
    core.handle(ReplicaChanged(0.0, "r1", "starting", "m"))
    arrive(core)
    assert fail(core) == []
    assert ready(core, "r1", 2.0) == [Dispatch("q", "r1", attempt=2)]


def test_a_retry_may_return_to_where_it_failed_when_nothing_else_is_left():
    core = core_with(None, "r0")
    core.handle(ReplicaChanged(0.0, "r1", "starting", "m"))
    arrive(core)
    fail(core)
    gone = ReplicaChanged(2.0, "r1", "gone")
    assert core.handle(gone) == [Dispatch("q", "r0", attempt=2)]


def _fail_times(core, times, now_s=1.0):
    for number in range(times):
        arrive(core, f"f{now_s}-{number}", now_s)
        fail(core, f"f{now_s}-{number}", now_s=now_s, retryable=False)


def test_a_replica_is_ejected_after_failures_in_a_row():
    core = core_with(None, "r0", eject_after=3)
    _fail_times(core, 3)
    assert arrive(core, now_s=2.0) == []


def test_a_success_between_failures_forgives_them():
    core = core_with(None, "r0", eject_after=3)
    _fail_times(core, 2)
    arrive(core, "good", 1.0)
    core.handle(Finished(1.0, "good", 1, 5))
    _fail_times(core, 2, 2.0)
    assert arrive(core, now_s=3.0) == [Dispatch("q", "r0")]


def test_a_refused_bad_request_does_not_count_against_the_replica():
    core = core_with(None, "r0", eject_after=1)
    arrive(core)
    fail(core, retryable=False, worker_fault=False)
    assert arrive(core, "next", 2.0) == [Dispatch("next", "r0")]


def test_an_ejected_replica_is_tried_again_with_a_single_request():
    core = core_with(None, "r0", eject_after=1, eject_s=10.0)
    _fail_times(core, 1)
    arrive(core, "probe", 2.0)
    arrive(core, "waits", 3.0)
    assert core.next_timer_s() == 11.0
    assert core.handle(Tick(11.0)) == [Dispatch("probe", "r0")]
    assert core.handle(Finished(12.0, "probe", 1, 5)) == [Dispatch("waits", "r0")]


def test_a_failed_probe_ejects_for_twice_as_long():
    core = core_with(None, "r0", eject_after=1, eject_s=10.0)
    _fail_times(core, 1)
    core.handle(Tick(11.0))
    _fail_times(core, 1, 11.0)
    assert core.next_timer_s() == 31.0


def test_what_was_in_flight_at_the_ejection_does_not_prolong_it():
    core = core_with(None, "r0", eject_after=3, eject_s=10.0)
    for number in range(20):
        arrive(core, f"q{number}")
    for number in range(20):
        fail(core, f"q{number}", retryable=False)
    assert core.next_timer_s() == 11.0


def test_a_cancelled_probe_lets_another_request_try():
    core = core_with(None, "r0", eject_after=1)
    _fail_times(core, 1)
    core.handle(Tick(11.0))
    arrive(core, "probe", 11.0)
    arrive(core, "next", 11.0)
    assert core.handle(Cancelled(12.0, "probe", 1)) == [Dispatch("next", "r0")]


# -- timers and limits -------------------------------------------------------------------------


def test_no_timer_is_wanted_without_limits():
    core = core_with()
    arrive(core)
    assert core.next_timer_s() is None


def test_a_request_held_too_long_is_shed():
    core = core_with(queue_timeout_s=5.0)
    arrive(core, now_s=1.0)
    assert core.next_timer_s() == 6.0
    assert core.handle(Tick(6.0)) == [Shed("q", "timeout")]


def test_a_request_that_returns_to_the_queue_may_wait_anew():
    core = core_with(None, "r0", queue_timeout_s=5.0)
    core.handle(ReplicaChanged(0.0, "r1", "starting", "m"))
    arrive(core)
    fail(core, now_s=4.0)
    assert core.next_timer_s() == 9.0


def test_a_request_past_its_deadline_is_shed():
    core = core_with()
    arrive(core, deadline_s=3.0)
    assert core.handle(Tick(3.0)) == [Shed("q", "deadline")]


def test_the_timer_of_a_dispatched_request_is_forgotten():
    core = core_with(None, "r0")
    arrive(core, deadline_s=3.0)
    assert core.next_timer_s() is None


def test_an_early_tick_does_nothing():
    core = core_with()
    arrive(core, deadline_s=3.0)
    assert core.handle(Tick(2.0)) == []


def test_a_full_queue_sheds_the_newcomer():
    core = core_with(max_queued=1)
    arrive(core, "first")
    assert arrive(core, "second", 1.0) == [Shed("second", "queue_full")]


def test_a_full_queue_does_not_concern_a_request_that_is_dispatched_at_once():
    core = core_with(None, "r0", max_queued=0)
    assert arrive(core) == [Dispatch("q", "r0")]


def test_limits_change_while_running():
    core = core_with()
    core.handle(ConfigChanged(0.0, Limits(max_queued=0)))
    assert arrive(core) == [Shed("q", "queue_full")]


def test_another_policy_orders_what_is_queued():
    core = core_with(LeastLoaded())
    for name, priority in (("a", 5), ("b", 1)):
        arrive(core, name, priority=priority)
    core.handle(ConfigChanged(1.0, core.limits, {"name": "hybrid"}))
    sent = ready(core, "r0", 2.0, max_num_seqs=8, kv_blocks=1000)
    assert [dispatch.request_id for dispatch in sent] == ["b", "a"]


def test_another_policy_ranks_what_comes_back_to_the_queue():
    core = core_with(LeastLoaded(), "r0", "r1")
    arrive(core, "a", priority=5)
    core.handle(ReplicaChanged(0.0, "r1", "starting"))
    core.handle(ConfigChanged(1.0, core.limits, {"name": "hybrid"}))
    assert fail(core, "a", now_s=2.0) == []
    core.handle(ReplicaChanged(3.0, "r0", "draining"))
    arrive(core, "b", now_s=3.0, priority=1)
    sent = ready(core, "r1", 4.0, max_num_seqs=8, kv_blocks=1000)
    assert [dispatch.request_id for dispatch in sent] == ["b", "a"]


def test_the_new_policy_plans_at_its_own_times():
    core = core_with(Answers(tick_s=5.0))
    arrive(core)
    core.handle(ConfigChanged(1.0, core.limits, {"class": f"{__name__}:EachTwoSeconds"}))
    assert core.next_timer_s() == 3.0


# -- plan --------------------------------------------------------------------------------------


def test_plan_is_asked_every_tick_from_the_first_arrival_on():
    asked = []
    core = core_with(Answers(plan=lambda queue, view: asked.append(view.now_s) or (), tick_s=2.0))
    assert core.next_timer_s() is None
    arrive(core, now_s=1.0)
    for now_s in (3.0, 5.0):
        assert core.next_timer_s() == now_s
        core.handle(Tick(now_s))
    assert asked == [3.0, 5.0]


def test_plan_sees_the_queue_in_rank_order_and_dispatches_a_batch():
    core = core_with(
        Answers(plan=lambda queue, view: [Dispatch(q.id, "r0") for q in queue], tick_s=1.0), "r0"
    )
    arrive(core, "b", 0.5)
    arrive(core, "a", 0.75)
    assert core.handle(Tick(1.5)) == [Dispatch("b", "r0"), Dispatch("a", "r0")]


def test_a_plan_written_as_a_generator_sees_its_own_effects():
    loads = []

    def plan(queue, view):
        for waiting in queue:
            loads.append(view.replica("r0").inflight_requests)
            yield Dispatch(waiting.id, "r0")

    core = core_with(Answers(plan=plan, tick_s=1.0), "r0")
    arrive(core, "a")
    arrive(core, "b")
    core.handle(Tick(1.0))
    assert loads == [0, 1]


def test_a_tick_of_nothing_is_refused():
    with pytest.raises(PolicyError, match="tick_s is 0: give a positive number"):
        core_with(Answers(tick_s=0))


def _planning(*actions):
    core = core_with(Answers(plan=lambda queue, view: actions, tick_s=1.0), "r0")
    arrive(core)
    return core


def test_a_launch_is_given_an_id_and_occupies_its_devices():
    core = _planning(Launch("m", ("host/a", "host/b")))
    assert core.handle(Tick(1.0)) == [Launch("m", ("host/a", "host/b"), "m-0")]
    assert replica_of(core, "m-0").state == "starting"
    with pytest.raises(InvalidAction, match="host/a belongs to replica 'm-0'"):
        core.handle(Tick(2.0))


def test_a_launch_that_failed_frees_its_devices():
    core = _planning(Launch("m", ("host/a",)))
    core.handle(Tick(1.0))
    core.handle(LaunchFailed(1.5, "m-0", "no memory"))
    assert core.handle(Tick(2.0)) == [Launch("m", ("host/a",), "m-1")]


def test_a_retired_replica_takes_no_more():
    core = _planning(Retire("r0"))
    assert core.handle(Tick(1.0)) == [Retire("r0")]
    assert replica_of(core, "r0").state == "draining"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Launch("m", ()), "name at least one device"),
        (Launch("m", ("a", "a")), "name each device once"),
        (Retire("r00"), "unknown replica 'r00'. Did you mean 'r0'?"),
        (Retire("zz"), "unknown replica 'zz'. Known: r0"),
        (Dispatch("p", "r0"), "no such request is queued"),
        (Shed("p", "why not"), "no such request is queued"),
        (Preempt("q"), "set `preempts = True` on Answers"),
        (Hold(), "answer Dispatch, Shed, Preempt, Launch or Retire"),
    ],
)
def test_an_action_of_plan_that_cannot_be_is_refused(action, message):
    with pytest.raises(InvalidAction) as caught:
        _planning(action).handle(Tick(1.0))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ("r0", "place answered 'r0': answer Dispatch, Hold, Shed or Preempt"),
        (None, "place answered None"),
        (Retire("r0"), "answer Dispatch, Hold, Shed or Preempt"),
        (Dispatch("other", "r0"), "place was asked about 'q' but answered"),
        (Dispatch("q", "r9"), "unknown replica 'r9'"),
        (Dispatch("q", "x0"), "the request wants model 'm', the replica serves 'x'"),
        (Dispatch("q", "r1"), "takes no requests now (state 'draining')"),
        (Preempt("p"), "the request is not in flight"),
    ],
)
def test_a_verdict_that_cannot_be_is_refused(verdict, message):
    core = core_with(Answers(lambda request, view: verdict, preempts=True), "r0", "r1")
    core.handle(ReplicaChanged(0.0, "r1", "draining"))
    ready(core, "x0", model="x")
    with pytest.raises(InvalidAction) as caught:
        arrive(core)
    assert message in str(caught.value)


def test_a_lane_that_was_not_offered_is_refused():
    class Lost(Answers):
        def next_lane(self, lanes, view):
            return "nowhere"

    core = core_with(Lost())
    arrive(core, "a", model="a")
    with pytest.raises(InvalidAction, match="next_lane answered 'nowhere', which is not among"):
        arrive(core, "b", model="b")


# -- preemption --------------------------------------------------------------------------------


def _displaced():
    core = core_with(Slots(), "r0")
    arrive(core, "low", priority=1)
    return core, arrive(core, "high", 1.0, priority=0)


def test_a_preempted_request_is_withdrawn_first_and_replaced_when_its_slot_is_free():
    core, actions = _displaced()
    assert actions == [Preempt("low", 1)]
    assert core.handle(Cancelled(1.5, "low", 1)) == [Dispatch("high", "r0")]


def test_a_preempted_request_is_dispatched_again_as_its_next_attempt():
    core, _ = _displaced()
    core.handle(Cancelled(1.5, "low", 1))
    assert core.handle(Finished(2.0, "high", 1, 5)) == [Dispatch("low", "r0", attempt=2)]


def test_a_preemption_does_not_count_as_a_failure():
    core, _ = _displaced()
    ready(core, "r1", 1.5)
    core.handle(Finished(1.75, "high", 1, 5))
    core.handle(Cancelled(2.0, "low", 1))
    assert fail(core, "low", 2, 3.0) == [Dispatch("low", "r1", attempt=3)]


def test_an_answer_that_overtakes_its_preemption_counts():
    core, _ = _displaced()
    assert core.handle(Finished(1.5, "low", 1, 5)) == [Dispatch("high", "r0")]
    assert core.handle(Cancelled(1.6, "low", 1)) == []
    assert core.counts["finished"] == 1


def test_a_verdict_of_preempt_holds_its_lane_until_the_next_event():
    def place(waiting, view):
        victims = [other for other in view.inflight("r0") if other.priority]
        return Preempt(victims[-1].id) if len(victims) > 1 else Dispatch(waiting.id, "r0")

    core = core_with(Answers(place, preempts=True), "r0")
    for name in "abc":
        core.policy._place = lambda waiting, view: Dispatch(waiting.id, "r0")
        arrive(core, name, priority=1)
    core.policy._place = place
    assert arrive(core, "urgent", 1.0) == [Preempt("c", 1)]


def test_the_first_byte_forbids_preemption():
    core = core_with(Slots(), "r0")
    arrive(core, "low", priority=1)
    core.handle(FirstToken(0.5, "low", 1))
    with pytest.raises(InvalidAction, match="its first byte has reached the client"):
        arrive(core, "high", 1.0, priority=0)


class Quarrel(Policy):
    """Whoever waits displaces whoever runs."""

    preempts = True

    def place(self, request, view):
        running = next(view.inflight("r0"), None)
        if running is None:
            return Dispatch(request.id, "r0")
        return Hold() if view.replica("r0").withdrawing_requests else Preempt(running.id)


def test_two_requests_that_displace_each_other_for_ever_are_a_livelock():
    """Invariant I10."""
    core = core_with(Quarrel(), "r0")
    arrive(core, "a")

    def perform(action):
        withdrawn = isinstance(action, Preempt)
        return [Cancelled(1.0, action.request_id, action.attempt)] if withdrawn else []

    with pytest.raises(InvalidAction, match=r"preempted twice .*\(livelock\)"):
        perform_all(core, perform, Arrived(1.0, request(id="b", arrived_s=1.0)))


def test_first_tokens_are_wanted_by_observers_and_preempters_only():
    class Observer(LeastLoaded):
        def observe(self, event, view):
            pass

    wants = [core_with(policy).wants_first_token for policy in (LeastLoaded(), Observer(), Slots())]
    assert wants == [False, True, True]


# -- clients that leave --------------------------------------------------------------------------


def test_a_client_that_leaves_the_queue_is_gone_at_once():
    core = core_with()
    arrive(core)
    core.handle(Cancelled(1.0, "q", 0))
    assert (core.queued_requests, core.counts["cancelled"]) == (0, 1)


def test_the_slot_of_a_client_that_left_is_freed_by_the_attempt_s_end():
    core = core_with(None, "r0")
    arrive(core)
    core.handle(Cancelled(1.0, "q", 0))
    assert core.inflight_requests == 1
    core.handle(Cancelled(1.5, "q", 1))
    assert (core.inflight_requests, core.counts["cancelled"]) == (0, 1)


def test_a_client_that_left_is_not_retried():
    core = core_with(None, "r0", "r1")
    arrive(core)
    core.handle(Cancelled(0.5, "q", 0))
    assert fail(core) == []
    assert core.counts["cancelled"] == 1


def test_a_withdrawn_request_whose_client_left_is_not_queued_again():
    core, _ = _displaced()
    core.handle(Cancelled(1.25, "low", 0))
    core.handle(Cancelled(1.5, "low", 1))
    assert core.queued_requests == 0


# -- replicas and gauges -----------------------------------------------------------------------


def test_gauges_replace_older_ones_only():
    core = core_with(None, "r0")
    core.handle(Gauges(2.0, "r0", 1.9, 5, 1, 0.5))
    core.handle(Gauges(2.1, "r0", 1.8, 9, 9, 0.9))
    assert (replica_of(core, "r0").running, replica_of(core, "r0").kv_usage) == (5, 0.5)


def test_a_gauge_ages_from_when_it_was_sampled():
    core = core_with(None, "r0")
    core.handle(Gauges(2.0, "r0", 1.5, 5, 1, 0.5))
    core.handle(Tick(4.0))
    assert replica_of(core, "r0").age_s == 2.5


def test_unscraped_tokens_are_the_prompts_dispatched_since_the_sample():
    core = core_with(None, "r0")
    arrive(core, "before", 1.0, prompt_tokens=100)
    arrive(core, "after", 2.0, prompt_tokens=30)
    core.handle(Gauges(3.0, "r0", 1.5, 1, 0, 0.1))
    assert replica_of(core, "r0").unscraped_tokens == 30


def test_what_was_in_flight_on_a_lost_replica_still_ends():
    core = core_with(None, "r0", "r1")
    arrive(core)
    core.handle(ReplicaChanged(1.0, "r0", "gone"))
    assert fail(core) == [Dispatch("q", "r1", attempt=2)]


# -- the driver's own mistakes -----------------------------------------------------------------


def test_time_does_not_go_back():
    core = core_with()
    arrive(core, now_s=5.0)
    with pytest.raises(ValueError, match="time went back"):
        core.handle(Tick(4.0))


def test_an_id_in_use_is_refused():
    core = core_with()
    arrive(core)
    with pytest.raises(ValueError, match="request id 'q' is already in use"):
        arrive(core)


def test_an_unknown_replica_state_is_refused():
    with pytest.raises(ValueError, match="one of starting, ready, draining, gone"):
        core_with().handle(ReplicaChanged(0.0, "r0", "asleep", "m"))


def test_handle_is_not_re_entrant():
    def place(waiting, view):
        core.handle(Tick(0.0))

    core = core_with(Answers(place))
    with pytest.raises(RuntimeError, match="not re-entrant"):
        arrive(core)


def test_events_raised_while_performing_come_after_the_actions_already_decided():
    core = core_with()
    arrive(core, "a")
    arrive(core, "b")
    performed = []

    def perform(action):
        performed.append((type(action).__name__, action.request_id))
        return [Finished(1.0, action.request_id, 1, 5)]

    perform_all(core, perform, ReplicaChanged(1.0, "r0", "ready", "m"))
    assert performed == [("Dispatch", "a"), ("Dispatch", "b")]
    assert core.counts["finished"] == 2


def test_the_guard_makes_every_call_with_a_view():
    asked = []

    def guard(question, *arguments):
        asked.append(question.__name__)
        return question(*arguments)

    core = SchedulerCore(LeastLoaded(), guard=guard)
    ready(core, "r0")
    assert arrive(core) == [Dispatch("q", "r0")]
    assert asked == ["place"]


def test_equal_seeds_give_the_policy_equal_streams():
    draws = [SchedulerCore(LeastLoaded(), seed=s).policy.rng.random() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
