"""Metrics against small cases computed by hand, and saturation against queues we know."""

import math
from typing import Any

import numpy as np
import pytest

from tests.result_builders import NS, Objectives, queue, result, row, samples, totals
from viisim.metrics import (
    DEFINITIONS,
    InvariantError,
    SeedMetrics,
    binned_distribution,
    check_invariants,
    distribution,
    estimate,
    is_saturated,
    seed_metrics,
    summarise,
)
from viisim.records import ITL_EDGES_S, REFUSED, SHED, UNFINISHED

ANY = Objectives()
NEVER = -1e-9


def metrics(
    *rows: dict[str, Any], slo: Objectives = ANY, warmup_fraction: float = 0.0, **other: Any
) -> SeedMetrics:
    return seed_metrics(result(*rows, **other), slo, warmup_fraction)


def unserved(outcome: int, arrived_s: float = 0.0) -> dict[str, Any]:
    """A request that was never dispatched."""
    return row(arrived_s, NEVER, NEVER, NEVER, NEVER, outcome=outcome, replica=-1, output_tokens=0)


# -- latencies --


def test_latencies_are_differences_of_instants() -> None:
    # Arrived 1, dispatched 2, started 4, first token 7, finished 12; ten gaps.
    latencies = metrics(row(1, 2, 4, 7, 12))["latencies"]
    means = {name: latencies[name]["mean"] for name in latencies}
    assert means == {
        "ttft_s": 6, "tpot_s": 0.5, "e2e_s": 11, "hold_s": 1, "queue_s": 2, "itl_s": None,
    }  # fmt: skip


def test_percentiles_interpolate_linearly() -> None:
    values = distribution(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (values["p50"], values["p90"], values["p99"]) == pytest.approx((3.0, 4.6, 4.96))


def test_tpot_of_a_single_token_is_left_out_and_counted() -> None:
    seed = metrics(row(0, output_tokens=1), row(1, 2, 3, 4, 14))
    assert seed["tpot_undefined_requests"] == 1
    assert seed["latencies"]["tpot_s"]["count"] == 1
    assert seed["latencies"]["tpot_s"]["mean"] == 1.0


def test_plain_requests_have_an_end_but_no_visible_first_token() -> None:
    latencies = metrics(row(0, streamed=False))["latencies"]
    assert (latencies["e2e_s"]["count"], latencies["ttft_s"]["count"]) == (1, 0)
    assert latencies["ttft_s"]["p99"] is None


def test_warm_up_leaves_out_the_first_to_arrive() -> None:
    rows = [row(i, i, i, i, i + (100 if i < 2 else 1)) for i in range(10)]
    seed = metrics(*rows, warmup_fraction=0.2)
    assert (seed["requests"], seed["measured_requests"]) == (10, 8)
    assert seed["latencies"]["e2e_s"]["mean"] == 1.0


def test_every_request_is_counted_by_what_became_of_it() -> None:
    outcomes = metrics(
        row(0), unserved(SHED), unserved(REFUSED), unserved(UNFINISHED), unserved(UNFINISHED)
    )["outcomes"]
    assert outcomes == {"finished": 1, "shed": 1, "refused": 1, "unfinished": 2}


def test_gaps_between_tokens_are_read_from_their_bins() -> None:
    rng = np.random.default_rng(1)
    gaps_s = rng.lognormal(math.log(0.03), 0.8, 100_000)
    counts, _ = np.histogram(gaps_s, ITL_EDGES_S)
    read, exact = binned_distribution(counts), distribution(gaps_s)
    width = ITL_EDGES_S[1] / ITL_EDGES_S[0] - 1
    for name in ("mean", "p50", "p90", "p99"):
        assert read[name] == pytest.approx(exact[name], rel=width)


def test_equal_gaps_have_all_percentiles_in_their_bin() -> None:
    counts = np.zeros(ITL_EDGES_S.size - 1, dtype=np.int64)
    counts[400] = 7
    read = binned_distribution(counts)
    low, high = ITL_EDGES_S[400:402]
    assert low < read["p50"] < read["p90"] < read["p99"] <= high


# -- rates --


def test_throughput_counts_what_finishes_in_the_window() -> None:
    # One of four is warm-up; it ends at 3 s, within the window from 2 s to 12 s.
    rows = [row(1, 1, 1, 1, 3), *(row(2 + i, 2 + i, 2 + i, 3 + i, 10 + i) for i in range(3))]
    seed = metrics(*rows, warmup_fraction=0.25)
    assert seed["window_s"] == 10.0
    assert seed["values"]["throughput_requests_per_s"] == 0.4
    assert seed["values"]["throughput_output_tokens_per_s"] == 4.4
    assert seed["values"]["throughput_total_tokens_per_s"] == 44.4


def test_goodput_takes_every_objective() -> None:
    slo = Objectives(ttft_s=2.0, tpot_s=0.1, e2e_s=2.5)
    rows = [
        row(0, 0, 0, 1.0, 2.0),  # meets all, TPOT exactly
        row(0, 0, 0, 2.1, 2.4),  # TTFT too late
        row(0, 0, 0, 1.0, 2.1),  # TPOT too long
        row(0, 0, 0, 1.9, 2.6, output_tokens=101),  # E2E too long
        unserved(SHED),
        unserved(UNFINISHED),
    ]
    values = metrics(*rows, slo=slo)["values"]
    assert values["slo_attainment"] == 1 / 6
    assert values["goodput_requests_per_s"] == 1 / 2.6


@pytest.mark.parametrize(("finished_s", "met"), [(3.0, 1.0), (3.001, 0.0)])
def test_a_plain_request_must_end_when_a_stream_that_just_meets_the_slo_would(
    finished_s: float, met: float
) -> None:
    slo = Objectives(ttft_s=2.0, tpot_s=0.1)
    plain = row(0, 0, 0, 2.9, finished_s, streamed=False)
    assert metrics(plain, slo=slo)["values"]["slo_attainment"] == met


def test_a_stream_of_one_token_has_no_tpot_to_miss() -> None:
    one = row(0, 0, 0, 1, 1, output_tokens=1)
    assert metrics(one, slo=Objectives(tpot_s=0.001))["values"]["slo_attainment"] == 1.0


def test_without_an_slo_there_is_no_goodput() -> None:
    values = metrics(row(0))["values"]
    assert values["goodput_requests_per_s"] is None
    assert values["slo_attainment"] is None


def test_engine_counters_are_summed_over_replicas() -> None:
    replicas = (
        totals(preemptions=2, prefix_queried_tokens=300, prefix_hit_tokens=100, busy_ns=NS),
        totals(preemptions=1, prefix_queried_tokens=100, prefix_hit_tokens=100, busy_ns=3 * NS),
    )
    rows = [(0, 0, 1, 0, 10), (0, 1, 1, 0, 30), (2 * NS, 0, 1, 0, 90), (99 * NS, 0, 0, 0, 0)]
    values = metrics(
        row(0, 1, 1, 1, 4), replica_ids=("a", "b"), replicas=replicas, samples=samples(rows)
    )["values"]
    assert (values["preemptions"], values["prefix_hit_rate"]) == (3, 0.5)
    assert values["busy_share"] == 0.5
    assert values["kv_use_max"] == 0.9
    assert values["kv_use_mean"] == pytest.approx((0.1 + 0.3 + 0.9) / 3)


def test_a_run_in_which_nothing_was_served_has_counts_and_no_figures() -> None:
    seed = metrics(unserved(SHED), slo=Objectives(e2e_s=1.0), ended_ns=0)
    assert seed["values"]["throughput_requests_per_s"] is None
    assert seed["values"]["slo_attainment"] == 0.0
    assert seed["latencies"]["e2e_s"]["count"] == 0


# -- over seeds --


def test_interval_is_students() -> None:
    # Mean 4, standard deviation 2, t(0.975, 2) = 4.302653: half width 4.302653 * 2 / sqrt(3).
    assert estimate([2.0, 4.0, 6.0]) == {
        "mean": 4.0,
        "half_width": pytest.approx(4.968275),
        "seeds": 3,
    }


def test_one_seed_has_no_interval() -> None:
    assert estimate([2.0, None]) == {"mean": 2.0, "half_width": None, "seeds": 1}


def test_a_summary_says_how_it_was_computed() -> None:
    summary = summarise([queue(0.8, 500, seed) for seed in (3, 4)], Objectives(ttft_s=2.0), 0.1)
    assert summary["definitions"] == DEFINITIONS
    assert summary["warmup_fraction"] == 0.1
    assert summary["slo"] == {"ttft_s": 2.0, "tpot_s": None, "e2e_s": None}
    assert [seed["seed"] for seed in summary["seeds"]] == [3, 4]
    assert summary["outcomes"]["finished"] == 1000


def test_every_figure_of_a_summary_is_defined() -> None:
    summary = summarise([queue(0.8, 500)], ANY, 0.1)
    assert summary["latencies"].keys() | summary["values"].keys() <= DEFINITIONS.keys()


# -- saturation --


@pytest.mark.parametrize("load", [0.5, 0.7, 0.8, 0.9])
def test_a_stable_queue_is_not_saturated(load: float) -> None:
    # Ten runs: none was flagged of hundreds at these loads and this length.
    assert not any(is_saturated(queue(load, 4000, seed).requests) for seed in range(10))


@pytest.mark.parametrize("load", [1.2, 1.5, 3.0])
def test_a_growing_queue_is_saturated(load: float) -> None:
    assert all(is_saturated(queue(load, 4000, seed).requests) for seed in range(10))


def test_growing_traffic_on_a_cluster_that_keeps_up_is_not_saturated() -> None:
    gaps_s = np.linspace(0.2, 0.02, 4000)
    arrivals_s = np.cumsum(gaps_s)
    requests = result(*(row(a, a, a, a + 1, a + 10) for a in arrivals_s)).requests
    assert not is_saturated(requests)


def test_a_queue_cut_off_while_growing_is_saturated() -> None:
    requests = queue(1.5, 2000).requests
    late = requests["finished_ns"] > requests["arrived_ns"][-1]
    requests["outcome"][late], requests["finished_ns"][late] = UNFINISHED, -1
    assert is_saturated(requests)


def test_shed_requests_do_not_make_a_queue_grow() -> None:
    rows = [row(i, i, i, i, i + 0.5) if i < 500 else unserved(SHED, i) for i in range(1000)]
    assert not is_saturated(result(*rows).requests)


# -- invariants --


def test_a_proper_result_obeys_the_invariants() -> None:
    check_invariants(queue(0.9, 1000, servers=3))
    check_invariants(result(row(0), unserved(SHED, 1), unserved(REFUSED, 1)))


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"outcome": 7}, "I1 conservation: no known outcome"),
        ({"outcome": SHED}, "I1 conservation: outcome and finished_ns disagree"),
        ({"replica": -1}, "I1 conservation: finished nowhere"),
        ({"request": 0}, "I1 conservation: a request is recorded twice"),
        ({"started_ns": -1}, "I1 conservation: finished, no started_ns"),
        ({"started_ns": 1}, "I2 causality: started_ns < dispatched_ns"),
        ({"first_token_ns": 60 * NS}, "I2 causality: finished_ns < first_token_ns"),
        ({"arrived_ns": 0}, "I3 clock: arrivals out of order"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_its_invariant(change: dict[str, int], broken: str) -> None:
    rows = [row(1), row(1) | change, row(1)]
    with pytest.raises(InvariantError, match=broken):
        check_invariants(result(*rows, ended_ns=10 * NS))


def test_an_event_after_the_end_breaks_the_clock() -> None:
    with pytest.raises(InvariantError, match="I3 clock"):
        check_invariants(result(row(0), ended_ns=1))


def test_more_blocks_than_there_are_break_the_cache() -> None:
    with pytest.raises(InvariantError, match=r"I4 KV blocks \(sample 1\)"):
        check_invariants(result(row(0), samples=samples([(0, 0, 1, 0, 100), (1, 0, 1, 0, 101)])))
