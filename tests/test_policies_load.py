"""Policies that read gauges: `token_load` and `freeness`."""

import pytest

from policies.freeness import Freeness
from policies.interface import Dispatch, StepCosts
from policies.state import IN_FLIGHT, Entry
from policies.testing import cluster, request
from policies.token_load import TokenLoad, queued_tokens


def gauged(**fields):
    return {"kv_blocks": 100, "age_s": 0.5, **fields}


def put_in_flight(view, replica_id, *prompts, dispatched_s=-9.0):
    replica = view.replica(replica_id)
    for prompt_tokens in prompts:
        sent = request(id=f"{replica_id}-{len(replica.inflight)}", prompt_tokens=prompt_tokens)
        entry = Entry(sent, "m", 0.0, order=0)
        entry.state, entry.dispatched_s = IN_FLIGHT, dispatched_s
        replica.inflight[sent.id] = entry


# -- queued tokens -----------------------------------------------------------------------------


def test_what_was_dispatched_since_the_gauges_is_queued():
    view = cluster(r0=gauged(unscraped_tokens=400))
    assert queued_tokens(view.replica("r0"), view) == 400


def test_as_many_of_the_newest_prompts_are_queued_as_were_waiting():
    view = cluster(r0=gauged(waiting=2))
    put_in_flight(view, "r0", 1000, 20, 3)
    assert queued_tokens(view.replica("r0"), view) == 23


def test_no_prompt_is_counted_twice():
    view = cluster(r0=gauged(waiting=1))
    put_in_flight(view, "r0", 1000, 20)
    put_in_flight(view, "r0", 3, dispatched_s=0.0)
    assert queued_tokens(view.replica("r0"), view) == 23


# -- token_load --------------------------------------------------------------------------------


def test_token_load_takes_the_shorter_queue():
    view = cluster(r0=gauged(unscraped_tokens=400), r1=gauged(unscraped_tokens=300))
    assert TokenLoad().place(request(), view) == Dispatch("q", "r1")


def test_token_load_measures_the_queue_in_time():
    """400 tokens at 4,000 a second are less than 300 at 1,000."""
    fast = StepCosts(prefill_per_token_s=1 / 4000)
    view = cluster(
        r0=gauged(unscraped_tokens=300), r1=gauged(unscraped_tokens=400, step_costs=fast)
    )
    assert TokenLoad(tokens_per_s=1000).place(request(), view) == Dispatch("q", "r1")


def test_a_full_cache_outweighs_a_short_queue():
    """0.15 * 9 = 1.35 s at 90 % against a second of queue at 0 %."""
    view = cluster(r0=gauged(kv_usage=0.9), r1=gauged(unscraped_tokens=1000))
    assert TokenLoad(tokens_per_s=1000).place(request(), view) == Dispatch("q", "r1")


def test_a_half_full_cache_does_not():
    """0.15 s at 50 % against a second of queue."""
    view = cluster(r0=gauged(kv_usage=0.5), r1=gauged(unscraped_tokens=1000))
    assert TokenLoad(tokens_per_s=1000).place(request(), view) == Dispatch("q", "r0")


def test_a_cache_that_is_quite_full_has_a_finite_load():
    view = cluster(r0=gauged(kv_usage=1.0), r1=gauged(kv_usage=1.0, unscraped_tokens=1))
    assert TokenLoad().place(request(), view) == Dispatch("q", "r0")


@pytest.mark.parametrize("rate", [0, -5, "fast"])
def test_a_throughput_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="give a number above 0"):
        TokenLoad(tokens_per_s=rate)


# -- freeness ----------------------------------------------------------------------------------


def test_freeness_divides_free_blocks_among_requests():
    """60 free blocks for 6 requests are less than 50 for 2."""
    view = cluster(
        r0=gauged(kv_usage=0.4, inflight_requests=6), r1=gauged(kv_usage=0.5, inflight_requests=2)
    )
    assert Freeness().place(request(), view) == Dispatch("q", "r1")


def test_what_waits_counts_its_blocks_already():
    """50 free - 40 waiting for 1 request are less than 60 free for 4."""
    view = cluster(
        r0=gauged(kv_usage=0.5, unscraped_tokens=640), r1=gauged(kv_usage=0.4, inflight_requests=4)
    )
    assert Freeness().place(request(), view) == Dispatch("q", "r1")


def test_freeness_counts_blocks_and_not_shares():
    view = cluster(r0=gauged(kv_usage=0.1), r1=gauged(kv_blocks=1000, kv_usage=0.5))
    assert Freeness().place(request(), view) == Dispatch("q", "r1")


def test_where_blocks_are_unknown_outstanding_tokens_decide():
    view = cluster(r0=gauged(kv_blocks=0, outstanding_tokens=20), r1=gauged(outstanding_tokens=50))
    assert Freeness().place(request(), view) == Dispatch("q", "r0")
