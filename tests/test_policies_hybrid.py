"""`hybrid`: room, order, headroom, and the bound on how long batch waits."""

import heapq
from itertools import count, permutations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.core import SchedulerCore
from policies.hybrid import Hybrid
from policies.interface import Arrived, Dispatch, Finished, Gauges, Hold, ReplicaChanged
from policies.testing import cluster, request

SERVICE_S = 1.0


def kv(usage=0.0, blocks=100, **fields):
    """A replica with a busy KV cache of 100 blocks of 16 tokens, gauged half a second ago."""
    busy = {"inflight_requests": 1, "outstanding_tokens": 16 * blocks}
    return {"kv_blocks": blocks, "kv_usage": usage, "age_s": 0.5, **busy, **fields}


def interactive(**fields):
    return request(**{"prompt_tokens": 160, **fields})


def batch(**fields):
    return interactive(priority=1, **fields)


# -- room --------------------------------------------------------------------------------------


def test_of_the_replicas_with_room_the_lightest_is_taken():
    view = cluster(
        r0=kv(0.95, outstanding_tokens=1550),
        r1=kv(0.5, outstanding_tokens=1600),
        r2=kv(0.6, outstanding_tokens=1590),
    )
    assert Hybrid().place(interactive(), view) == Dispatch("q", "r2", 0)


def test_a_request_without_room_is_held():
    assert Hybrid().place(interactive(), cluster(r0=kv(0.9))) == Hold()


def test_a_request_that_just_fits_is_sent():
    policy = Hybrid(full_share=0.875)
    assert policy.place(interactive(prompt_tokens=192), cluster(r0=kv(0.75))).replica_id == "r0"


def test_the_predicted_output_needs_room_too():
    view = cluster(r0=kv(0.75))
    assert Hybrid().place(interactive(predicted_output_tokens=200), view) == Hold()


def test_the_output_limit_needs_none():
    view = cluster(r0=kv(0.75))
    assert Hybrid().place(interactive(max_output_tokens=2000), view) == Dispatch("q", "r0", 0)


def test_what_was_sent_since_the_gauges_needs_room_too():
    view = cluster(r0=kv(0.6, unscraped_tokens=480))
    assert Hybrid().place(interactive(), view) == Hold()


def test_what_waits_in_the_engine_needs_room_too():
    view = cluster(r0=kv(0.2, inflight_requests=4, waiting=3))
    assert Hybrid().place(interactive(), view) == Hold()


def test_gauges_do_not_count_what_has_ended_since():
    view = cluster(r0=kv(1.0, outstanding_tokens=300))
    assert Hybrid().place(interactive(), view) == Dispatch("q", "r0", 0)


def test_before_the_first_gauges_what_is_in_flight_counts():
    view = cluster(r0=kv(age_s=inf, outstanding_tokens=1500))
    assert Hybrid().place(interactive(), view) == Hold()


def test_an_idle_replica_takes_a_prompt_of_any_length():
    view = cluster(r0=kv(0.9, inflight_requests=0, outstanding_tokens=0))
    assert Hybrid().place(batch(prompt_tokens=99_999), view) == Dispatch("q", "r0", 1)


def test_a_replica_without_a_free_sequence_takes_nothing():
    view = cluster(r0=kv(0.1, max_num_seqs=1))
    assert Hybrid().place(interactive(), view) == Hold()


def test_where_the_cache_size_is_unknown_sequences_alone_count():
    view = cluster(r0=kv(1.0, blocks=0, outstanding_tokens=9999, max_num_seqs=2))
    assert Hybrid().place(interactive(), view) == Dispatch("q", "r0", 0)


# -- classes -----------------------------------------------------------------------------------


def test_batch_leaves_headroom_for_interactive_requests():
    view = cluster(r0=kv(0.6))
    assert Hybrid(batch_share=0.6).place(batch(), view) == Hold()


def test_interactive_requests_use_the_headroom():
    view = cluster(r0=kv(0.6))
    assert Hybrid(batch_share=0.6).place(interactive(), view) == Dispatch("q", "r0", 0)


def test_aged_batch_uses_the_headroom_as_an_interactive_request():
    view = cluster(130.0, r0=kv(0.6))
    asked = batch(arrived_s=30.0)
    assert Hybrid(aging_s=100.0, batch_share=0.6).place(asked, view) == Dispatch("q", "r0", 0)


def test_the_engine_is_told_the_class():
    assert Hybrid().place(batch(), cluster(r0=kv(0.1))) == Dispatch("q", "r0", 1)


def test_a_request_above_interactive_stays_above_in_the_engine():
    asked = interactive(priority=-2)
    assert Hybrid().place(asked, cluster(r0=kv(0.1))) == Dispatch("q", "r0", -2)


def test_held_batch_does_not_hold_interactive_requests():
    policy, view = Hybrid(batch_share=0.6), cluster(r0=kv(0.6))
    policy.place(batch(id="b"), view)
    assert policy.place(interactive(), view) == Dispatch("q", "r0", 0)


def test_nothing_small_overtakes_a_held_interactive_request():
    policy, view = Hybrid(), cluster(r0=kv(0.6))
    assert policy.place(interactive(id="large", prompt_tokens=1000), view) == Hold()
    assert policy.place(interactive(prompt_tokens=16), view) == Hold()


def test_a_held_request_holds_its_own_model_only():
    policy = Hybrid()
    view = cluster(r0=kv(0.95), r1=kv(0.1, model="n"))
    policy.place(interactive(id="held"), view)
    assert policy.place(interactive(model="n"), view) == Dispatch("q", "r1", 0)


def test_the_next_event_asks_anew():
    policy = Hybrid()
    policy.place(interactive(), cluster(r0=kv(0.95)))
    view = cluster(1.0, r0=kv(0.5))
    policy.observe(Gauges(1.0, "r0", 1.0, 1, 0, 0.5), view)
    assert policy.place(interactive(), view) == Dispatch("q", "r0", 0)


def test_without_a_ready_replica_nobody_is_held_for_room():
    """A retry that has to go elsewhere must not stop those that need not."""
    policy = Hybrid()
    assert policy.place(interactive(id="retry"), cluster()) == Hold()
    assert policy.place(interactive(), cluster(r0=kv(0.1))) == Dispatch("q", "r0", 0)


@pytest.mark.parametrize(
    ("parameters", "repair"),
    [
        ({"aging_s": 0}, "give a positive number of seconds"),
        ({"batch_share": 0}, "give a share above 0, up to 1"),
        ({"full_share": 1.5}, "give a share above 0, up to 1"),
        ({"batch_share": 0.9, "full_share": 0.8}, "give it less"),
    ],
)
def test_impossible_parameters_are_refused(parameters, repair):
    with pytest.raises(ValueError, match=repair):
        Hybrid(**parameters)


# -- order, over time --------------------------------------------------------------------------


class Served:
    """Requests served by equal replicas in a fixed time each: when each was dispatched."""

    def __init__(self, policy, requests, replicas=1, gauges=(), **fields):
        self.core = SchedulerCore(policy)
        self.dispatched_s = {}
        self._agenda, self._order = [], count()
        for number in range(replicas):
            self._at(
                0.0, ReplicaChanged(0.0, f"r{number}", "ready", "m", (f"d{number}",), **fields)
            )
        for now_s, replica_id, waiting, kv_usage in gauges:
            self._at(now_s, Gauges(now_s, replica_id, now_s, 0, waiting, kv_usage))
        for asked in requests:
            self._at(asked.arrived_s, Arrived(asked.arrived_s, asked))
        self._run()

    def _at(self, when_s, event):
        heapq.heappush(self._agenda, (when_s, next(self._order), event))

    def _run(self):
        while self._agenda:
            now_s, _, event = heapq.heappop(self._agenda)
            for action in self.core.handle(event):
                assert isinstance(action, Dispatch)
                self.dispatched_s[action.request_id] = now_s
                end_s = now_s + SERVICE_S
                self._at(end_s, Finished(end_s, action.request_id, action.attempt, 1))


def saturating(seconds):
    """An interactive request every service time."""
    return [interactive(id=f"i{n}", arrived_s=float(n)) for n in range(seconds)]


def test_an_interactive_request_overtakes_held_batch():
    waiting = [interactive(id="first"), batch(id="b", arrived_s=0.25), interactive(arrived_s=0.5)]
    served = Served(Hybrid(), waiting, max_num_seqs=1).dispatched_s
    assert (served["q"], served["b"]) == (1.0, 2.0)


def test_batch_of_the_smaller_priority_goes_first():
    waiting = [
        interactive(id="first"),
        interactive(id="p2", arrived_s=0.25, priority=2),
        interactive(id="p1", arrived_s=0.5, priority=1),
    ]
    served = Served(Hybrid(), waiting, max_num_seqs=1).dispatched_s
    assert (served["p1"], served["p2"]) == (1.0, 2.0)


def test_batch_waits_no_longer_than_its_bound_while_interactive_keeps_coming():
    """With the one replica always taken: `aging_s`, the request in service, and the one ahead."""
    policy = Hybrid(aging_s=20.0)
    served = Served(policy, [*saturating(60), batch(id="b", arrived_s=0.5)], max_num_seqs=1)
    assert 20.0 <= served.dispatched_s["b"] - 0.5 <= 20.0 + 2 * SERVICE_S


def test_batch_of_a_larger_priority_waits_that_many_times_longer():
    asked = interactive(id="b", arrived_s=0.5, priority=2)
    served = Served(Hybrid(aging_s=20.0), [*saturating(60), asked], max_num_seqs=1)
    assert 40.0 <= served.dispatched_s["b"] - 0.5 <= 40.0 + 2 * SERVICE_S


def test_a_large_batch_request_is_not_starved_by_small_interactive_ones():
    """It fits an empty cache only; once it has aged, the others wait until it has one."""
    many = [interactive(id=f"i{n}", arrived_s=n / 4, prompt_tokens=320) for n in range(200)]
    large = batch(id="b", arrived_s=0.125, prompt_tokens=1600)
    served = Served(Hybrid(aging_s=20.0), [*many, large], kv_blocks=100)
    assert 20.0 <= served.dispatched_s["b"] <= 20.125 + 2 * SERVICE_S


# A few seconds that overload two replicas with room for 1,600 tokens each.
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 64), st.integers(0, 2), st.sampled_from([16, 320, 640, 1500])),
    min_size=10,
    max_size=40,
)
GAUGES = st.lists(
    st.tuples(
        st.integers(0, 120).map(lambda step: step / 8),
        st.sampled_from(["r0", "r1"]),
        st.integers(0, 3),
        st.floats(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, GAUGES)
def test_whoever_is_due_first_is_never_overtaken_and_everyone_is_served(arrivals, gauges):
    """Whatever the gauges say: priority p counts as an arrival p * aging_s later."""

    def due_s(asked):
        return asked.arrived_s + 2.0 * asked.priority

    requests = [
        interactive(id=f"q{n}", arrived_s=step / 8, priority=priority, prompt_tokens=tokens)
        for n, (step, priority, tokens) in enumerate(arrivals)
    ]
    served = Served(
        Hybrid(aging_s=2.0), requests, replicas=2, gauges=gauges, kv_blocks=100, max_num_seqs=4
    )
    assert served.core.queued_requests == served.core.inflight_requests == 0
    assert served.dispatched_s.keys() == {asked.id for asked in requests}
    for first, second in permutations(requests, 2):
        if due_s(first) < due_s(second) and first.arrived_s < served.dispatched_s[second.id]:
            assert served.dispatched_s[first.id] <= served.dispatched_s[second.id]
