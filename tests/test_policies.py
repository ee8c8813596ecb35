"""What each shipped policy decides."""

from collections import Counter
from math import inf, sqrt

import numpy as np
import pytest

from policies.interface import Dispatch, Hold
from policies.least_kv import LeastKv, kv_share
from policies.least_loaded import LeastLoaded
from policies.least_requests import LeastRequests
from policies.power_of_two import PowerOfTwo
from policies.random import Random
from policies.round_robin import RoundRobin
from policies.testing import cluster, request


def seeded(policy, seed=0):
    policy.rng = np.random.default_rng(seed)
    return policy


def choices(policy, view, times, model="m"):
    return [policy.place(request(model=model), view).replica_id for _ in range(times)]


# -- least_loaded, least_requests --------------------------------------------------------------


def test_least_loaded_picks_the_replica_with_fewest_tokens():
    assert LeastLoaded().place(request(), cluster(r0=300, r1=100)) == Dispatch("q", "r1")


def test_least_loaded_breaks_ties_by_id():
    assert LeastLoaded().place(request(), cluster(r1=100, r0=100)) == Dispatch("q", "r0")


def test_least_requests_counts_requests_and_not_tokens():
    view = cluster(
        r0={"inflight_requests": 2, "outstanding_tokens": 10},
        r1={"inflight_requests": 1, "outstanding_tokens": 9000},
    )
    assert LeastRequests().place(request(), view) == Dispatch("q", "r1")


# -- round_robin -------------------------------------------------------------------------------


def test_round_robin_takes_turns():
    assert choices(RoundRobin(), cluster(r0=0, r1=0, r2=0), 5) == ["r0", "r1", "r2", "r0", "r1"]


def test_round_robin_takes_turns_for_each_model_alone():
    view = cluster(a0={"model": "a"}, a1={"model": "a"}, b0={"model": "b"})
    policy = RoundRobin()
    turns = [choices(policy, view, 1, model)[0] for model in ("a", "b", "a", "a")]
    assert turns == ["a0", "b0", "a1", "a0"]


def test_round_robin_goes_on_when_the_replica_of_the_last_turn_is_gone():
    policy = RoundRobin()
    choices(policy, cluster(r0=0, r1=0, r2=0), 2)
    assert choices(policy, cluster(r0=0, r2=0), 2) == ["r2", "r0"]


# -- random, power_of_two ----------------------------------------------------------------------


def within_five_sigma(count, trials, share):
    return abs(count - trials * share) < 5 * sqrt(trials * share * (1 - share))


def test_random_is_uniform_over_ready_replicas():
    picked = Counter(choices(seeded(Random()), cluster(r0=0, r1=9, r2=5, r3=7), 4000))
    assert all(within_five_sigma(picked[f"r{n}"], 4000, 1 / 4) for n in range(4))


def test_random_draws_from_its_own_generator():
    view = cluster(r0=0, r1=0, r2=0)
    assert choices(seeded(Random(), 1), view, 20) == choices(seeded(Random(), 1), view, 20)


def test_power_of_two_never_takes_the_heaviest():
    picked = choices(seeded(PowerOfTwo()), cluster(r0=1, r1=2, r2=3, r3=4), 300)
    assert "r3" not in picked


def test_power_of_two_compares_two_distinct_replicas_drawn_uniformly():
    """Of the 6 pairs of 4 replicas, the n-th lightest wins 3, 2, 1 and 0."""
    picked = Counter(choices(seeded(PowerOfTwo()), cluster(r0=1, r1=2, r2=3, r3=4), 6000))
    shares = {"r0": 3 / 6, "r1": 2 / 6, "r2": 1 / 6}
    assert all(within_five_sigma(picked[name], 6000, share) for name, share in shares.items())


def test_power_of_two_always_finds_the_lighter_of_two():
    assert set(choices(seeded(PowerOfTwo()), cluster(r0=5, r1=4), 50)) == {"r1"}


# -- least_kv ----------------------------------------------------------------------------------


def kv(blocks=100, usage=0.0, age_s=0.5, **fields):
    return {"kv_blocks": blocks, "kv_usage": usage, "age_s": age_s, **fields}


def test_least_kv_reads_the_gauge():
    view = cluster(r0=kv(usage=0.6), r1=kv(usage=0.4))
    assert LeastKv().place(request(), view) == Dispatch("q", "r1")


def test_least_kv_adds_what_was_dispatched_since_the_gauge():
    view = cluster(r0=kv(usage=0.5), r1=kv(usage=0.4, unscraped_tokens=400))
    assert LeastKv().place(request(), view) == Dispatch("q", "r0")


def test_least_kv_compares_shares_and_not_blocks():
    view = cluster(r0=kv(blocks=100, usage=0.3), r1=kv(blocks=1000, usage=0.2))
    assert LeastKv().place(request(), view) == Dispatch("q", "r1")


def test_least_kv_breaks_ties_by_outstanding_tokens():
    view = cluster(r0=kv(outstanding_tokens=50), r1=kv(outstanding_tokens=20))
    assert LeastKv().place(request(), view) == Dispatch("q", "r1")


def test_before_the_first_gauges_outstanding_tokens_stand_for_blocks():
    replica = cluster(r0=kv(age_s=inf, outstanding_tokens=160)).replica("r0")
    assert kv_share(replica) == 10 / 100


def test_where_blocks_are_unknown_outstanding_tokens_decide():
    view = cluster(r0=kv(blocks=0, outstanding_tokens=20), r1=kv(outstanding_tokens=50))
    assert LeastKv().place(request(), view) == Dispatch("q", "r0")


def test_least_kv_holds_while_the_prompt_has_no_room_below_the_limit():
    view = cluster(r0=kv(usage=0.85, inflight_requests=3))
    assert LeastKv(hold_above=0.9).place(request(prompt_tokens=160), view) == Hold()


def test_least_kv_dispatches_what_just_fits():
    view = cluster(r0=kv(usage=0.75, inflight_requests=3))
    assert LeastKv(hold_above=0.875).place(request(prompt_tokens=192), view) == Dispatch("q", "r0")


def test_an_idle_replica_takes_a_prompt_of_any_length():
    view = cluster(r0=kv(usage=0.0))
    assert LeastKv(hold_above=0.9).place(request(prompt_tokens=9999), view) == Dispatch("q", "r0")


@pytest.mark.parametrize("limit", [0, -0.5, 1.5, "0.9"])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match="give a share above 0, up to 1"):
        LeastKv(hold_above=limit)
