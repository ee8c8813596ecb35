"""Synthetic workloads."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from viisim.errors import InputError
from viisim.workload.arrivals import Gamma, RateCurve
from viisim.workload.interface import Labels, SharedPrefix
from viisim.workload.lengths import Constant, Geometric
from viisim.workload.prefixes import Library, Passages, Prefixes, chained_blocks
from viisim.workload.request import Request
from viisim.workload.synthetic import Synthetic

PREFIXES = Prefixes(share=0.5, groups=20, tokens=512)
PASSAGES = Passages(pool=500, per_request=4, zipf=0.7, tokens=Geometric(100), share=0.8)


def synthetic(**changes: Any) -> Synthetic:
    defaults: dict[str, Any] = {
        "requests": 200,
        "rate_per_s": 10.0,
        "prompt_tokens": "azure_conv",
        "output_tokens": "azure_conv",
        "model": "m",
    }
    return Synthetic(**(defaults | changes))


def drawn(seed: int = 1, **changes: Any) -> list[Request]:
    return list(synthetic(**changes).requests(seed))


def arrivals(requests: list[Request]) -> list[int]:
    return [request.arrived_ns for request in requests]


def lengths(requests: list[Request]) -> list[tuple[int, int]]:
    return [(request.view.prompt_tokens, request.output_tokens) for request in requests]


def test_equal_seeds_give_equal_requests():
    assert drawn(seed=4) == drawn(seed=4)


def test_other_seeds_give_other_requests():
    first, other = drawn(seed=4), drawn(seed=5)
    assert arrivals(first) != arrivals(other)
    assert lengths(first) != lengths(other)


@settings(max_examples=40)
@given(
    chunk=st.integers(1, 90),
    total=st.integers(1, 80),
    prefixes=st.sampled_from([None, PREFIXES]),
    passages=st.sampled_from([None, PASSAGES]),
    seed=st.integers(0, 2**40),
)
def test_a_request_depends_neither_on_the_chunk_size_nor_on_how_many_follow(
    chunk: int, total: int, prefixes: Prefixes | None, passages: Passages | None, seed: int
):
    given = {"prefixes": prefixes, "passages": passages, "streamed": 0.5, "gaps": Gamma(2.0)}
    whole = drawn(seed, requests=80, **given)
    parts = drawn(seed, requests=total, chunk_requests=chunk, **given)
    assert parts == whole[:total]


def test_the_rate_changes_arrivals_only():
    slow, fast = drawn(rate_per_s=1.0, streamed=0.5), drawn(rate_per_s=8.0, streamed=0.5)
    assert lengths(slow) == lengths(fast)
    assert [r.view.streamed for r in slow] == [r.view.streamed for r in fast]
    ratios = np.array(arrivals(slow)) / np.array(arrivals(fast))
    assert np.allclose(ratios, 8, rtol=1e-6)


def test_the_streamed_share_changes_nothing_else():
    none, half = drawn(streamed=0.0), drawn(streamed=0.5)
    assert arrivals(none) == arrivals(half)
    assert lengths(none) == lengths(half)


def test_the_output_lengths_change_nothing_else():
    short, long = drawn(output_tokens=1), drawn(output_tokens={"geometric": 50})
    assert arrivals(short) == arrivals(long)
    assert [prompt for prompt, _ in lengths(short)] == [prompt for prompt, _ in lengths(long)]


def test_prefixes_change_only_prompts_that_are_too_short_for_them():
    plain, shared = drawn(), drawn(prefixes=PREFIXES)
    assert arrivals(plain) == arrivals(shared)
    for before, after in zip(plain, shared, strict=True):
        least = 513 if len(after.prompt) == 2 else 0
        assert after.view.prompt_tokens == max(before.view.prompt_tokens, least)


def test_requests_are_numbered_in_order_of_arrival():
    requests = drawn()
    assert [request.view.id for request in requests] == [f"r{i}" for i in range(200)]
    assert arrivals(requests) == sorted(arrivals(requests))


def test_seconds_are_exactly_the_nanoseconds_over_a_billion():
    assert all(request.view.arrived_s == request.arrived_ns / 1e9 for request in drawn())


def test_the_pieces_of_a_prompt_add_up_to_its_length():
    for request in drawn(prefixes=PREFIXES):
        assert sum(tokens for _, tokens in request.prompt) == request.view.prompt_tokens


def test_only_prefixes_are_shared_between_prompts():
    own = [request.prompt[-1][0] for request in drawn(prefixes=PREFIXES)]
    prefixes = {r.prompt[0][0] for r in drawn(prefixes=PREFIXES) if len(r.prompt) == 2}
    assert len(set(own)) == len(own)
    assert not prefixes & set(own)


def test_the_scheduler_sees_a_prefix_as_one_block():
    for request in drawn(prefixes=PREFIXES):
        shared = [segment for segment, _ in request.prompt[:-1]]
        assert request.view.prefix_blocks == tuple(shared)
        assert request.view.prefix_block_tokens == 512


def test_prefix_groups_are_equally_likely_and_as_frequent_as_stated():
    requests = drawn(requests=20_000, prefixes=Prefixes(share=0.3, groups=4, tokens=8))
    groups = [r.view.prefix_blocks[0] for r in requests if r.view.prefix_blocks]
    counts = np.bincount(groups, minlength=4)
    for count, share in [(counts.sum(), 0.3), *((count, 0.3 / 4) for count in counts)]:
        assert abs(count / 20_000 - share) <= 4 * np.sqrt(share * (1 - share) / 20_000)


def test_the_streamed_share_is_as_stated():
    streamed = np.mean([request.view.streamed for request in drawn(requests=10_000, streamed=0.8)])
    assert abs(streamed - 0.8) <= 4 * np.sqrt(0.8 * 0.2 / 10_000)


def test_arrivals_are_poisson():
    count, rate_per_s = 40_000, 12.0
    arrived_s = np.array(arrivals(drawn(requests=count, rate_per_s=rate_per_s))) / 1e9
    gaps_s = np.diff(arrived_s, prepend=0.0)
    # Four standard errors: the last arrival is Erlang, and the CV of n exponential gaps
    # scatters by 1 / sqrt(n).
    assert abs(arrived_s[-1] * rate_per_s / count - 1) <= 4 / np.sqrt(count)
    assert abs(gaps_s.std() / gaps_s.mean() - 1) <= 4 / np.sqrt(count)


@pytest.mark.parametrize("rho", [-0.9, -0.3, 0.0, 0.5, 1.0])
def test_lengths_have_the_stated_rank_correlation(rho: float):
    count = 20_000
    table = {0: 1, 50: 500_000, 90: 4_000_000, 100: 90_000_000}
    pairs = np.array(
        lengths(
            drawn(
                requests=count,
                prompt_tokens=table,
                output_tokens=table,
                rank_correlation=rho,
                max_output_tokens=10**9,
            )
        )
    )
    # Four standard errors; 1 / sqrt(n - 1) is the standard error at 0, and the largest.
    assert abs(spearmanr(*pairs.T).statistic - rho) <= 4 / np.sqrt(count - 1)


def test_a_preset_keeps_its_mean_lengths():
    workload = Synthetic.from_preset("azure_conv", requests=20_000, model="m")
    pairs = np.array(lengths(list(workload.requests(1))))
    standard_errors = pairs.std(axis=0) / np.sqrt(len(pairs))
    means = (workload.prompt_tokens.mean_tokens, workload.output_tokens.mean_tokens)
    assert np.all(np.abs(pairs.mean(axis=0) - means) <= 4 * standard_errors)


def test_a_preset_brings_its_rate_unless_another_is_given():
    assert Synthetic.from_preset("azure_conv", requests=1, model="m").rate_per_s == 5.53042
    slow = Synthetic.from_preset("azure_conv", requests=1, model="m", rate_per_s=0.8)
    assert slow.rate_per_s == 0.8


def test_the_arrival_process_changes_arrivals_only():
    poisson, bursty = drawn(), drawn(gaps=Gamma(3.0), rate_curve=RateCurve({0: 0.5, 9: 2.0}))
    assert arrivals(poisson) != arrivals(bursty)
    assert lengths(poisson) == lengths(bursty)


def test_arrivals_have_the_stated_cv():
    gaps = np.diff(arrivals(drawn(requests=40_000, gaps=Gamma(2.0))))
    # Gamma gaps of shape k = 1/4: the cv of n scatters by sqrt((1 + k) / (2 n)) / k.
    assert abs(gaps.std() / gaps.mean() - 2) <= 4 * np.sqrt(1.25 / (2 * 40_000)) / 0.25


def test_labels_are_on_every_request():
    labels = Labels(traffic_class="batch", tenant="acme", priority=4, deadline_s=2.5)
    for request in drawn(labels=labels):
        view = request.view
        assert (view.traffic_class, view.tenant, view.priority) == ("batch", "acme", 4)
        assert view.deadline_s == view.arrived_s + 2.5


def test_labels_change_nothing_else():
    plain, marked = drawn(), drawn(labels=Labels(tenant="acme"))
    assert arrivals(plain) == arrivals(marked)
    assert lengths(plain) == lengths(marked)


def test_an_impossible_deadline_is_named():
    with pytest.raises(InputError, match="deadline_s: 0 is not possible"):
        Labels(deadline_s=0)


def test_a_named_prefix_has_a_segment_and_a_block_of_that_name():
    named = Prefixes(share=1.0, groups=1, tokens=512, name="system")
    (request,) = drawn(requests=1, prefixes=named)
    assert request.prompt[0] == (SharedPrefix("system", 0), 512)
    assert request.view.prefix_blocks == chained_blocks([request.prompt[0]], 512)
    assert request.view.prefix_blocks[0] < 0


# -- passages --------------------------------------------------------------------------------


def test_passages_come_on_top_of_the_prompt():
    plain, retrieved = drawn(prefixes=PREFIXES), drawn(prefixes=PREFIXES, passages=PASSAGES)
    for before, after in zip(plain, retrieved, strict=True):
        passages = [tokens for segment, tokens in after.prompt if segment >= 20]
        assert after.view.prompt_tokens == before.view.prompt_tokens + sum(passages)
        assert after.prompt[: len(before.prompt) - 1] == before.prompt[:-1]


def test_a_passage_has_the_same_length_in_every_prompt():
    pieces = {piece for request in drawn(passages=PASSAGES) for piece in request.prompt[:-1]}
    assert len(pieces) == len({segment for segment, _ in pieces})


def test_as_many_prompts_have_passages_as_stated():
    some = np.mean([len(r.prompt) > 1 for r in drawn(requests=5000, passages=PASSAGES)])
    assert abs(some - 0.8) <= 4 * np.sqrt(0.8 * 0.2 / 5000)


def test_popular_passages_are_as_popular_as_zipf_says():
    library = Library(PASSAGES, np.random.default_rng(1))
    drawn_ids = [p for row in library.draw(np.random.default_rng(2), 20_000) for p in row[:1]]
    weights = np.arange(1, 501) ** -0.7
    for top in (1, 5, 50):
        share = weights[:top].sum() / weights.sum()
        measured = np.mean(np.array(drawn_ids) < top)
        assert abs(measured - share) <= 4 * np.sqrt(share * (1 - share) / len(drawn_ids))


def test_no_passage_stands_twice_in_a_prompt():
    for request in drawn(passages=PASSAGES):
        segments = [segment for segment, _ in request.prompt]
        assert len(segments) == len(set(segments))


def test_the_scheduler_sees_all_full_blocks_of_a_prompt_with_passages():
    for request in drawn(passages=PASSAGES, prefixes=PREFIXES):
        assert request.view.prefix_block_tokens == 64
        assert len(request.view.prefix_blocks) == request.view.prompt_tokens // 64


def test_blocks_are_equal_as_far_as_prompts_are():
    fixed = Passages(pool=2, per_request=1, zipf=0.0, tokens=Constant(128))
    requests = drawn(passages=fixed)
    for first in requests[:20]:
        for other in requests[20:40]:
            same = first.prompt[0] == other.prompt[0]
            shared = set(first.view.prefix_blocks) & set(other.view.prefix_blocks)
            assert len(shared) == (2 if same else 0)


def test_own_tokens_before_the_passages_leave_no_block_in_common():
    behind = Passages(pool=2, per_request=1, zipf=0.0, tokens=Constant(128), behind_own_tokens=9)
    blocks = [block for r in drawn(passages=behind) for block in r.view.prefix_blocks]
    assert len(blocks) == len(set(blocks))


def test_block_ids_are_the_same_in_every_process():
    pieces = [(SharedPrefix("system", 1), 80), (7, 50)]
    assert chained_blocks(pieces, 64) == BLOCKS_OF_PIECES


BLOCKS_OF_PIECES = (-47838405348499851, 48598097942348042)


@pytest.mark.parametrize(
    "change",
    [{"pool": 0}, {"per_request": 0}, {"zipf": -1}, {"share": 2}, {"behind_own_tokens": -1}],
)
def test_impossible_passages_are_named(change: dict[str, Any]):
    (name,) = change
    given = {"pool": 9, "per_request": 4, "zipf": 0.7, "tokens": Constant(9)}
    with pytest.raises(InputError, match=f"passages.{name}: "):
        Passages(**(given | change))


# -- limits and mistakes ---------------------------------------------------------------------


def test_long_answers_are_cut_to_the_limit_and_counted():
    limited = synthetic(output_tokens={0: 1, 100: 1000}, max_output_tokens=600)
    outputs = [request.output_tokens for request in limited.requests(1)]
    uncut = [request.output_tokens for request in drawn(output_tokens={0: 1, 100: 1000})]
    assert outputs == [min(tokens, 600) for tokens in uncut]
    assert limited.cut_outputs == sum(tokens > 600 for tokens in uncut)


def test_every_request_states_the_same_limit_whatever_its_length():
    assert {r.view.max_output_tokens for r in drawn(max_output_tokens=700)} == {700}


def test_a_workload_survives_pickling():
    workload = synthetic()
    copy = pickle.loads(pickle.dumps(workload))
    assert list(copy.requests(1)) == list(workload.requests(1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rate_per_s": 0}, "rate_per_s: 0 is not possible; use a finite number above 0"),
        ({"rate_per_s": -1.5}, "rate_per_s: -1.5 is not possible"),
        ({"rate_per_s": float("nan")}, "rate_per_s: nan is not possible"),
        ({"rate_per_s": 1e-9}, "rate_per_s: 1e-09 spreads 200 requests over more than"),
        ({"requests": 0}, "requests: 0 is not possible; use a whole number from 1"),
        ({"streamed": 1.2}, "streamed: 1.2 is not a share"),
        ({"rank_correlation": -2}, "rank_correlation: -2 is not a correlation"),
        ({"max_output_tokens": 0}, "max_output_tokens: 0 is not possible"),
        ({"prompt_tokens": 0}, "prompt_tokens: 0 is not possible"),
        ({"prompt_tokens": 12.5}, "prompt_tokens: 12.5 is not possible"),
        ({"output_tokens": {"geometric": 0}}, "output_tokens.geometric: a mean of 0.0"),
        ({"output_tokens": "azure_con"}, "did you mean 'azure_conv'?"),
    ],
)
def test_an_impossible_parameter_is_named(change: dict[str, Any], complaint: str):
    with pytest.raises(InputError) as error:
        synthetic(**change)
    assert complaint in str(error.value)


@pytest.mark.parametrize("change", [{"share": 2}, {"groups": 0}, {"tokens": -1}])
def test_an_impossible_prefix_is_named(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(InputError, match=f"prefixes.{name}: "):
        Prefixes(**({"share": 0.5, "groups": 20, "tokens": 512} | change))


def test_a_negative_seed_is_refused_at_once():
    with pytest.raises(InputError, match="seed: -1 is negative"):
        synthetic().requests(-1)
