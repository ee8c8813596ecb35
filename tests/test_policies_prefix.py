"""Policies that follow prefixes: what they believe of caches, and what they decide by it."""

import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cache_aware import CacheAware
from policies.interface import Dispatch, Hold, ReplicaChanged
from policies.prefix import PrefixIndex
from policies.prefix_hash import PrefixHash
from policies.testing import cluster, request


def prompt(*blocks, **fields):
    """A request whose prompt is just these blocks of 16 tokens."""
    return request(
        prefix_blocks=blocks,
        prefix_block_tokens=16,
        **{"prompt_tokens": 16 * len(blocks), **fields},
    )


# -- the index ---------------------------------------------------------------------------------


def index(**held):
    made = PrefixIndex()
    for replica_id, blocks in held.items():
        made.insert(replica_id, blocks)
    return made


def test_a_match_is_the_longest_leading_run_of_known_blocks():
    assert index(r0=(1, 2, 3)).matched("r0", (1, 2, 7, 8)) == 2


def test_a_known_block_behind_an_unknown_one_is_no_match():
    assert index(r0=(1, 2, 3)).matched("r0", (9, 2, 3)) == 0


def test_a_replica_that_was_sent_nothing_matches_nothing():
    assert index(r0=(1, 2)).matched("r1", (1, 2)) == 0


def test_prompts_that_branch_share_their_trunk():
    made = index(r0=(1, 2, 3))
    made.insert("r0", (1, 2, 30, 40))
    assert [made.matched("r0", blocks) for blocks in [(1, 2, 3), (1, 2, 30, 40)]] == [3, 4]


def test_the_least_recently_used_prefix_is_forgotten_first():
    made = PrefixIndex()
    for blocks in [(1, 2), (3, 4), (1, 2), (5, 6)]:
        made.insert("r0", blocks, capacity_blocks=4)
    assert [made.matched("r0", blocks) for blocks in [(1, 2), (3, 4), (5, 6)]] == [2, 0, 2]


def test_of_one_prompt_the_last_block_is_forgotten_first():
    made = PrefixIndex()
    made.insert("r0", (1, 2, 3), capacity_blocks=4)
    made.insert("r0", (8, 9), capacity_blocks=4)
    assert made.matched("r0", (1, 2, 3)) == 2


def test_of_a_prompt_longer_than_the_cache_its_beginning_is_kept():
    made = PrefixIndex()
    made.insert("r0", (1, 2, 3, 4), capacity_blocks=2)
    assert made.matched("r0", (1, 2, 3, 4)) == 2


def test_the_best_replica_has_the_longest_match():
    view = cluster(r0=0, r1=0)
    best, matched = index(r0=(1,), r1=(1, 2)).best(view.ready("m"), (1, 2, 3))
    assert (best.id, matched) == ("r1", 2)


def test_of_equal_matches_the_lighter_replica_is_best():
    view = cluster(r0=200, r1=100, r2=100)
    best, _ = index(r0=(1,), r1=(1,), r2=(1,)).best(view.ready("m"), (1, 2))
    assert best.id == "r1"


def test_without_any_match_no_replica_is_best():
    assert index(r0=(1,)).best(cluster(r0=0).ready("m"), (2,)) == (None, 0)


def test_a_forgotten_replica_matches_nothing():
    made = index(r0=(1, 2), r1=(1, 2))
    made.forget("r0")
    assert [made.matched(name, (1, 2)) for name in ("r0", "r1")] == [0, 2]


@pytest.mark.parametrize(("state", "left"), [("gone", 0), ("starting", 0), ("draining", 2)])
def test_a_replica_loses_its_cache_with_its_process(state, left):
    made = index(r0=(1, 2))
    made.observe(ReplicaChanged(1.0, "r0", state))
    assert made.matched("r0", (1, 2)) == left


def test_believed_capacity_is_the_kv_cache_in_prefix_blocks():
    made, view = PrefixIndex(), cluster(r0={"kv_blocks": 8, "block_tokens": 16})
    long = request(prefix_blocks=(1, 2, 3, 4), prefix_block_tokens=64, prompt_tokens=256)
    made.dispatched(long, view.replica("r0"))
    assert made.matched("r0", (1, 2, 3, 4)) == 2


def test_matched_tokens_count_whole_blocks():
    assert index(r0=(1, 2)).matched_tokens("r0", prompt(1, 2, 3)) == 32


def test_blocks_counted_in_bytes_match_in_proportion():
    in_bytes = request(prefix_blocks=(1, 2, 3, 4), prefix_block_tokens=64, prompt_tokens=40)
    assert index(r0=(1, 2)).matched_tokens("r0", in_bytes) == 20


def test_blocks_of_a_part_of_the_prompt_match_that_part_only():
    assert index(r0=(1, 2)).matched_tokens("r0", prompt(1, 2, prompt_tokens=1000)) == 32


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(PATHS, max_size=20), PATHS, st.integers(1, 12))
def test_what_is_known_is_always_a_tree_within_its_capacity(sent, asked, capacity):
    """The binary search relies on it: no known block behind an unknown one."""

    def chained(path):
        return tuple(hash(tuple(path[: n + 1])) for n in range(len(path)))

    made = PrefixIndex()
    for path in sent:
        made.insert("r0", chained(path), capacity)
    known = made._held.get("r0", {})
    run = [block in known for block in chained(asked)]
    assert run == sorted(run, reverse=True)
    assert made.matched("r0", chained(asked)) == sum(run)
    assert len(known) <= capacity


# -- cache_aware -------------------------------------------------------------------------------


def warmed(policy, replica_id, *blocks):
    """The policy after it sent a prompt of these blocks to the replica."""
    policy.place(prompt(*blocks), cluster(**{replica_id: 0}))
    return policy


def busy(**inflight):
    return cluster(**{name: {"inflight_requests": count} for name, count in inflight.items()})


def test_cache_aware_follows_the_prefix_it_sent():
    policy = warmed(CacheAware(), "r1", 1, 2)
    assert policy.place(prompt(1, 2, 3), busy(r0=0, r1=5)) == Dispatch("q", "r1")


def test_cache_aware_takes_the_lightest_for_an_unknown_prompt():
    policy = warmed(CacheAware(), "r1", 1, 2)
    assert policy.place(prompt(7, 8), busy(r0=2, r1=5)) == Dispatch("q", "r0")


def test_a_match_of_just_the_threshold_does_not_count():
    policy = warmed(CacheAware(cache_threshold=0.5), "r1", 1, 2)
    assert policy.place(prompt(1, 2, 3, 4), busy(r0=0, r1=5)) == Dispatch("q", "r0")


def test_a_match_above_the_threshold_counts():
    policy = warmed(CacheAware(cache_threshold=0.5), "r1", 1, 2, 3)
    assert policy.place(prompt(1, 2, 3, 4), busy(r0=0, r1=5)) == Dispatch("q", "r1")


def test_uneven_load_goes_before_the_prefix():
    policy = warmed(CacheAware(), "r1", 1, 2)
    assert policy.place(prompt(1, 2), busy(r0=0, r1=65)) == Dispatch("q", "r0")


def test_a_difference_of_just_the_threshold_is_even():
    policy = warmed(CacheAware(), "r1", 1, 2)
    assert policy.place(prompt(1, 2), busy(r0=0, r1=64)) == Dispatch("q", "r1")


def test_a_large_difference_of_like_loads_is_even():
    policy = warmed(CacheAware(), "r1", 1, 2)
    assert policy.place(prompt(1, 2), busy(r0=200, r1=300)) == Dispatch("q", "r1")


def test_cache_aware_breaks_ties_by_outstanding_tokens():
    assert CacheAware().place(prompt(1), cluster(r0=9, r1=5, r2=5)) == Dispatch("q", "r1")


def test_cache_aware_forgets_a_replica_that_is_gone():
    policy = warmed(CacheAware(), "r1", 1, 2)
    policy.observe(ReplicaChanged(1.0, "r1", "gone"), cluster())
    assert policy.place(prompt(1, 2), busy(r0=0, r1=5)) == Dispatch("q", "r0")


def test_beliefs_survive_a_checkpoint():
    policy = pickle.loads(pickle.dumps(warmed(CacheAware(), "r1", 1, 2)))
    assert policy.place(prompt(1, 2), busy(r0=0, r1=5)) == Dispatch("q", "r1")


@pytest.mark.parametrize(
    ("parameters", "repair"),
    [
        ({"cache_threshold": 1.5}, "give a share from 0 to 1"),
        ({"balance_abs_threshold": -1}, "give a number of requests"),
        ({"balance_rel_threshold": 0.5}, "give a ratio of 1 or more"),
    ],
)
def test_cache_aware_refuses_impossible_thresholds(parameters, repair):
    with pytest.raises(ValueError, match=repair):
        CacheAware(**parameters)


# -- prefix_hash -------------------------------------------------------------------------------

FOUR = ("r0", "r1", "r2", "r3")


def homes(replica_ids, prefixes=400, **parameters):
    """Where each of many prompts of one block goes on an idle cluster."""
    policy, view = PrefixHash(**parameters), cluster(**dict.fromkeys(replica_ids, 0))
    return [policy.place(prompt(number), view).replica_id for number in range(prefixes)]


def test_prefix_hash_is_the_same_in_every_process():
    assert homes(FOUR, 8) == ["r0", "r1", "r2", "r0", "r0", "r1", "r0", "r2"]


def test_the_ring_spreads_prefixes():
    """With 160 points each, a replica's share has a spread of about 1/sqrt(160) = 8 %."""
    counts = Counter(homes(FOUR, 4000))
    assert all(abs(counts[name] - 1000) < 5 * 80 for name in FOUR)


def test_losing_a_replica_moves_its_own_prefixes_only():
    before, after = homes(FOUR), homes(("r0", "r1", "r3"))
    assert all(new == old for old, new in zip(before, after, strict=True) if old != "r2")


def test_prompts_that_agree_in_the_first_256_tokens_go_together():
    policy, view = PrefixHash(), cluster(**dict.fromkeys(FOUR, 0))
    same = tuple(range(16))
    placed = {policy.place(prompt(*same, 99 + n), view).replica_id for n in range(30)}
    assert len(placed) == 1


def test_prompts_that_differ_within_them_part():
    policy, view = PrefixHash(), cluster(**dict.fromkeys(FOUR, 0))
    same = tuple(range(15))
    placed = {policy.place(prompt(*same, 99 + n), view).replica_id for n in range(30)}
    assert len(placed) > 1


def test_an_overloaded_home_is_passed_over_for_the_least_loaded():
    home = PrefixHash().place(prompt(1), cluster(r0=0, r1=0)).replica_id
    other = "r1" if home == "r0" else "r0"
    view = busy(**{home: 4, other: 1})
    assert PrefixHash().place(prompt(1), view) == Dispatch("q", other)


def test_a_home_with_just_the_bounded_load_is_kept():
    """5 = 1.25 * (7 + 1) / 2."""
    home = PrefixHash().place(prompt(1), cluster(r0=0, r1=0)).replica_id
    other = "r1" if home == "r0" else "r0"
    assert PrefixHash().place(prompt(1), busy(**{home: 5, other: 2})) == Dispatch("q", home)


def test_a_prompt_without_blocks_goes_to_the_least_loaded():
    assert PrefixHash().place(request(), busy(r0=3, r1=1)) == Dispatch("q", "r1")


@pytest.mark.parametrize(
    ("parameters", "repair"),
    [
        ({"prefix_tokens": 0}, "give a whole number above 0"),
        ({"load_factor": 0.9}, "give a factor of 1 or more"),
    ],
)
def test_prefix_hash_refuses_impossible_parameters(parameters, repair):
    with pytest.raises(ValueError, match=repair):
        PrefixHash(**parameters)


@pytest.mark.parametrize("policy", [CacheAware(), PrefixHash()], ids=["cache_aware", "hash"])
def test_prefix_policies_hold_without_a_ready_replica(policy):
    assert policy.place(prompt(1, 2), cluster()) == Hold()
