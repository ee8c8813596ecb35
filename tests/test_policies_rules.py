"""The rules of other routers: what viiwork, weighted and kv_cost decide."""

import pickle
from collections import Counter
from math import exp, sqrt

import numpy as np
import pytest

from policies.interface import (
    Cancelled,
    Dispatch,
    Failed,
    Finished,
    FirstToken,
    Hold,
    ReplicaChanged,
    Shed,
)
from policies.kv_cost import KvCost
from policies.testing import cluster, request
from policies.viiwork import Viiwork
from policies.weighted import Weighted


def prompt(*blocks, **fields):
    """A request whose prompt is just these blocks of 16 tokens."""
    return request(
        prefix_blocks=blocks,
        prefix_block_tokens=16,
        **{"prompt_tokens": 16 * len(blocks), **fields},
    )


def busy(now_s=0.0, **inflight):
    replicas = {name: {"inflight_requests": count} for name, count in inflight.items()}
    return cluster(now_s, **replicas)


def send(policy, replica_id, asked, now_s=0.0):
    """Let the policy place the request on its only replica."""
    assert policy.place(asked, cluster(now_s, **{replica_id: 0})).replica_id == replica_id


# -- viiwork -----------------------------------------------------------------------------------


def answered(*answers):
    """A policy that saw these answers: replica, instant of the dispatch, latency."""
    policy = Viiwork()
    for number, (replica_id, sent_s, latency_s) in enumerate(answers):
        send(policy, replica_id, request(id=f"a{number}"), sent_s)
        policy.observe(Finished(sent_s + latency_s, f"a{number}", 1, 10), cluster())
    return policy


def test_viiwork_takes_the_idle_backend_with_the_lowest_latency():
    policy = answered(("r0", 0, 4.0), ("r1", 0, 2.0))
    assert policy.place(request(), busy(5, r0=0, r1=0, r2=1)) == Dispatch("q", "r1")


def test_viiwork_tries_an_idle_backend_without_answers_first():
    policy = answered(("r0", 0, 1.0))
    assert policy.place(request(), busy(5, r0=0, r1=0)) == Dispatch("q", "r1")


def test_latency_is_the_mean_over_the_last_30_s():
    """r0's slow answer, 31 s old, no longer counts; r1's mean is 3 s."""
    policy = answered(("r0", 0, 9.0), ("r0", 36, 2.0), ("r1", 35, 2.0), ("r1", 35, 4.0))
    assert policy.place(request(), busy(40, r0=0, r1=0)) == Dispatch("q", "r0")


def test_an_answer_within_the_window_still_counts():
    policy = answered(("r0", 0, 9.0), ("r0", 30, 2.0), ("r1", 30, 2.0), ("r1", 30, 4.0))
    assert policy.place(request(), busy(39, r0=0, r1=0)) == Dispatch("q", "r1")


def test_without_an_idle_backend_viiwork_takes_the_least_in_flight():
    assert Viiwork().place(request(), busy(r0=3, r1=1, r2=2)) == Dispatch("q", "r1")


def test_latency_breaks_ties_of_the_least_in_flight():
    policy = answered(("r0", 0, 4.0), ("r1", 0, 2.0))
    assert policy.place(request(), busy(5, r0=2, r1=2)) == Dispatch("q", "r1")


def test_at_high_load_an_idle_backend_is_taken_as_the_least_busy():
    crowd = {f"r{number}": 1 for number in range(7)}
    assert Viiwork().place(request(), busy(**crowd, r7=0)) == Dispatch("q", "r7")


def test_viiwork_refuses_when_every_backend_is_full():
    verdict = Viiwork().place(request(), busy(r0=4, r1=4))
    assert isinstance(verdict, Shed)
    assert verdict.reason.startswith("429")


def test_viiwork_fills_the_last_slot():
    assert Viiwork().place(request(), busy(r0=4, r1=3)) == Dispatch("q", "r1")


def test_viiwork_holds_while_none_is_ready():
    assert Viiwork().place(request(), cluster()) == Hold()


@pytest.mark.parametrize(
    "end", [Failed(9.0, "a", 1, "broken", True), Cancelled(9.0, "a", 1)], ids=["failed", "aborted"]
)
def test_an_attempt_without_an_answer_says_nothing_of_latency(end):
    policy = answered(("r1", 0, 1.0))
    send(policy, "r0", request(id="a"))
    policy.observe(end, cluster())
    assert policy.place(request(), busy(9, r0=0, r1=0)) == Dispatch("q", "r0")
    assert "a" not in policy._sent


def test_the_latencies_of_a_backend_that_is_gone_are_forgotten():
    policy = answered(("r0", 0, 4.0), ("r1", 0, 2.0))
    policy.observe(ReplicaChanged(5.0, "r0", "gone"), cluster())
    assert policy.place(request(), busy(5, r0=0, r1=0)) == Dispatch("q", "r0")


def test_latencies_survive_a_checkpoint():
    policy = pickle.loads(pickle.dumps(answered(("r0", 0, 4.0), ("r1", 0, 2.0))))
    assert policy.place(request(), busy(5, r0=0, r1=0)) == Dispatch("q", "r1")


@pytest.mark.parametrize("name", ["high_load_threshold", "max_in_flight_per_gpu"])
def test_viiwork_refuses_impossible_limits(name):
    with pytest.raises(ValueError, match=f"{name} is 0: give a whole number above 0"):
        Viiwork(**{name: 0})


# -- weighted ----------------------------------------------------------------------------------


def test_weighted_prefers_the_known_prefix():
    policy = Weighted(prefix=1, queue=0, kv=0)
    send(policy, "r1", prompt(1, 2))
    assert policy.place(prompt(1, 2, 3), cluster(r0=0, r1=90)) == Dispatch("q", "r1")


def test_weighted_prefers_the_shortest_engine_queue():
    view = cluster(r0={"waiting": 3}, r1={"waiting": 1}, r2={"waiting": 2})
    assert Weighted(prefix=0, queue=1, kv=0).place(request(), view) == Dispatch("q", "r1")


def test_weighted_prefers_room_in_the_cache():
    view = cluster(r0={"kv_usage": 0.5}, r1={"kv_usage": 0.4})
    assert Weighted(prefix=0, queue=0, kv=1).place(request(), view) == Dispatch("q", "r1")


def test_weights_trade_one_score_for_another():
    """r0: 3 * 0 + 2 * 1 + 2 * 0.9 = 3.8; r1: 3 * 1 + 2 * 0 + 2 * 0.5 = 4.0."""
    policy = Weighted()
    send(policy, "r1", prompt(1, 2))
    view = cluster(r0={"waiting": 1, "kv_usage": 0.1}, r1={"waiting": 4, "kv_usage": 0.5})
    assert policy.place(prompt(1, 2), view) == Dispatch("q", "r1")


def test_a_smaller_weight_of_the_prefix_turns_it_over():
    policy = Weighted(prefix=2.5)
    send(policy, "r1", prompt(1, 2))
    view = cluster(r0={"waiting": 1, "kv_usage": 0.1}, r1={"waiting": 4, "kv_usage": 0.5})
    assert policy.place(prompt(1, 2), view) == Dispatch("q", "r0")


def test_weighted_breaks_ties_by_outstanding_tokens():
    assert Weighted().place(request(), cluster(r0=9, r1=5, r2=5)) == Dispatch("q", "r1")


def test_weighted_forgets_a_replica_that_is_gone():
    policy = Weighted()
    send(policy, "r1", prompt(1, 2))
    policy.observe(ReplicaChanged(1.0, "r1", "gone"), cluster())
    assert policy.place(prompt(1, 2), cluster(r0=0, r1=90)) == Dispatch("q", "r0")


@pytest.mark.parametrize(
    ("weights", "repair"),
    [({"kv": -1}, "give a weight of 0 or more"), ({"prefix": 0, "queue": 0, "kv": 0}, "above 0")],
)
def test_weighted_refuses_impossible_weights(weights, repair):
    with pytest.raises(ValueError, match=repair):
        Weighted(**weights)


# -- kv_cost -----------------------------------------------------------------------------------


def test_kv_cost_counts_the_blocks_in_flight():
    assert KvCost().place(request(), cluster(r0=320, r1=160)) == Dispatch("q", "r1")


def test_a_cached_prefix_saves_its_prefill():
    """r1 decodes 2 blocks more and has 3 blocks less to prefill."""
    policy = KvCost()
    send(policy, "r1", prompt(1, 2, 3))
    policy.observe(FirstToken(1.0, "q", 1), cluster())
    assert policy.place(prompt(1, 2, 3), cluster(r0=0, r1=32)) == Dispatch("q", "r1")


def test_a_cached_prefix_is_not_worth_more_than_its_prefill():
    policy = KvCost()
    send(policy, "r1", prompt(1, 2, 3))
    policy.observe(FirstToken(1.0, "q", 1), cluster())
    assert policy.place(prompt(1, 2, 3), cluster(r0=0, r1=64)) == Dispatch("q", "r0")


ENDS = [
    FirstToken(1.0, "a", 1),
    Finished(1.0, "a", 1, 5),
    Failed(1.0, "a", 1, "broken", True),
    Cancelled(1.0, "a", 1),
]


def test_a_prompt_being_prefilled_counts():
    policy = KvCost()
    send(policy, "r0", request(id="a", prompt_tokens=800))
    assert policy.place(request(), cluster(r0=0, r1=160)) == Dispatch("q", "r1")


@pytest.mark.parametrize("end", ENDS, ids=lambda event: type(event).__name__)
def test_a_prompt_counts_until_its_first_token_or_end(end):
    policy = KvCost()
    send(policy, "r0", request(id="a", prompt_tokens=800))
    policy.observe(end, cluster())
    assert policy.place(request(), cluster(r0=0, r1=160)) == Dispatch("q", "r0")


def test_a_client_that_leaves_does_not_end_the_prefill():
    policy = KvCost()
    send(policy, "r0", request(id="a", prompt_tokens=800))
    policy.observe(Cancelled(1.0, "a", 0), cluster())
    assert policy.place(request(), cluster(r0=0, r1=160)) == Dispatch("q", "r1")


def test_lmetric_multiplies_where_dynamo_adds():
    """4 blocks of prompt, 3 cached on r1: 4 + 2 and 1 + 6 blocks; 4 * 3 and 1 * 7."""
    chosen = {}
    for rule in ("dynamo", "lmetric"):
        policy = KvCost(rule=rule)
        send(policy, "r1", prompt(1, 2, 3))
        policy.observe(FirstToken(1.0, "q", 1), cluster())
        verdict = policy.place(prompt(1, 2, 3, 4), cluster(r0=32, r1=96))
        chosen[rule] = verdict.replica_id
    assert chosen == {"dynamo": "r0", "lmetric": "r1"}


def test_kv_cost_breaks_ties_by_id():
    assert KvCost().place(request(), cluster(r1=5, r0=5)) == Dispatch("q", "r0")


def test_temperature_draws_by_the_softmax_of_the_costs():
    """Costs differ by 2 blocks: at temperature 2 the heavier has exp(-1) of the other's odds."""
    policy = KvCost(temperature=2.0)
    policy.rng = np.random.default_rng(1)
    view, trials = cluster(r0=32, r1=0), 4000
    picked = Counter()
    for _ in range(trials):
        picked[policy.place(request(), view).replica_id] += 1
        policy.observe(Finished(0.0, "q", 1, 1), view)
    share = exp(-1) / (1 + exp(-1))
    assert abs(picked["r0"] - trials * share) < 5 * sqrt(trials * share * (1 - share))


def test_a_cold_temperature_survives_enormous_costs():
    policy = KvCost(temperature=1e-3)
    policy.rng = np.random.default_rng(1)
    view = cluster(r0=10**9, r1=10**8)
    assert policy.place(request(), view) == Dispatch("q", "r1")


def test_kv_cost_forgets_the_cache_of_a_replica_that_is_gone():
    policy = KvCost()
    send(policy, "r1", prompt(1, 2, 3))
    policy.observe(Finished(1.0, "q", 1, 5), cluster())
    policy.observe(ReplicaChanged(1.0, "r1", "gone"), cluster())
    assert policy.place(prompt(1, 2, 3), cluster(r0=0, r1=16)) == Dispatch("q", "r0")


@pytest.mark.parametrize(
    ("parameters", "repair"),
    [
        ({"rule": "dynamite"}, "give one of dynamo, lmetric"),
        ({"temperature": -1}, "give 0 or more"),
        ({"temperature": float("nan")}, "give 0 or more"),
    ],
)
def test_kv_cost_refuses_impossible_parameters(parameters, repair):
    with pytest.raises(ValueError, match=repair):
        KvCost(**parameters)
