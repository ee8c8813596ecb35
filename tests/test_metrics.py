"""Metrics against small cases computed by hand, and saturation against queues we know."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.comparison_builders import in_classes
from tests.result_builders import NS, Objectives, queue, result, row, samples, totals
from viisim.definitions import DEFINITIONS
from viisim.fairness import fair_shares, jain
from viisim.invariants import InvariantError, check_invariants
from viisim.metrics import (
    SeedMetrics,
    binned_distribution,
    distribution,
    seed_metrics,
    summarise,
)
from viisim.records import ITL_EDGES_S, REFUSED, SHED, UNFINISHED
from viisim.saturation import is_saturated
from viisim.statistics import estimate

ANY = Objectives()


@dataclass(frozen=True)
class ClassObjectives(Objectives):
    """Objectives with others for some traffic classes."""

    classes: Mapping[str, Objectives] = field(default_factory=dict)


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


# -- traffic classes --

CHAT, BATCH = 0, 1


def two_classes(slo: Objectives = ANY, **other: Any) -> SeedMetrics:
    """Two chat requests with a TTFT of 1 s, then two of batch with one of 5 s."""
    chat = [row(i, i, i, i + 1, i + 2, traffic_class=CHAT) for i in (0, 1)]
    batch = [row(i, i, i, i + 5, i + 9, traffic_class=BATCH) for i in (2, 3)]
    return metrics(*chat, *batch, slo=slo, traffic_classes=("chat", "batch"), **other)


def test_a_class_is_measured_by_its_own_requests() -> None:
    classes = two_classes()["classes"]
    assert [classes[name]["latencies"]["ttft_s"]["mean"] for name in ("chat", "batch")] == [1, 5]
    assert classes["batch"]["outcomes"]["finished"] == 2


def test_rates_of_the_classes_add_up_to_the_whole() -> None:
    seed = two_classes()
    name = "throughput_output_tokens_per_s"
    each = [group["values"][name] for group in seed["classes"].values()]
    assert sum(each) == seed["values"][name]


def test_the_warm_up_of_a_class_is_its_part_of_the_whole() -> None:
    classes = two_classes(warmup_fraction=0.25)["classes"]
    assert [group["measured_requests"] for group in classes.values()] == [1, 2]


def test_a_class_is_judged_by_its_own_objectives_instead_of_the_general_ones() -> None:
    slo = ClassObjectives(ttft_s=2.0, classes={"batch": Objectives(e2e_s=10.0)})
    seed = two_classes(slo)
    assert seed["values"]["slo_attainment"] == 1.0
    strict = two_classes(ClassObjectives(ttft_s=2.0, classes={"batch": Objectives(e2e_s=8.0)}))
    assert strict["classes"]["batch"]["values"]["slo_attainment"] == 0.0
    assert strict["values"]["slo_attainment"] == 0.5


def test_a_class_without_any_objective_has_no_goodput() -> None:
    slo = ClassObjectives(ttft_s=2.0, classes={"batch": Objectives()})
    seed = two_classes(slo)
    assert seed["classes"]["batch"]["values"]["goodput_requests_per_s"] is None
    assert seed["values"]["slo_attainment"] == 1.0


def test_requests_of_no_class_are_not_listed_apart() -> None:
    assert metrics(row(0))["classes"] == {}


def test_a_class_that_a_seed_lacks_is_estimated_from_the_others() -> None:
    classes = ("chat", "batch")
    both = result(row(0, traffic_class=CHAT), row(1, traffic_class=BATCH), traffic_classes=classes)
    chat = result(row(0), seed=2, traffic_classes=("chat",))
    summary = summarise([both, chat], ANY, 0.0)
    each = {name: group["latencies"]["e2e_s"]["mean"] for name, group in summary["classes"].items()}
    assert (each["chat"]["seeds"], each["batch"]["seeds"]) == (2, 1)


# -- tenants --


def test_shares_are_max_min_fair() -> None:
    # 10 for four: the two modest get what they want, the others half of what is left each.
    assert fair_shares(np.array([1.0, 9.0, 2.0, 5.0]), 10.0).tolist() == [1.0, 3.5, 2.0, 3.5]


def test_shares_never_exceed_the_demand() -> None:
    assert fair_shares(np.array([1.0, 2.0]), 10.0).tolist() == [1.0, 2.0]


def test_jains_index_is_one_over_n_when_one_gets_everything() -> None:
    assert jain(np.array([3.0, 3.0, 3.0])) == 1.0
    assert jain(np.array([7.0, 0.0, 0.0, 0.0])) == 0.25


def two_tenants(*finished_s: float) -> SeedMetrics:
    """Requests of 122 weighted tokens at 0, 0, 1 and 1 s, of tenants a, b, a and b in turn, and
    one at 10 s that closes the window; -1: never finished."""
    rows = []
    for number, end_s in enumerate(finished_s):
        start_s = number // 2
        times = (start_s, start_s, start_s, end_s) if end_s > 0 else (NEVER,) * 4
        outcome = {} if end_s > 0 else {"outcome": UNFINISHED, "output_tokens": 11}
        rows.append(row(start_s, *times, tenant=number % 2, **outcome))
    last = row(10, 10, 10, 10, 20, tenant=0)
    return metrics(*rows, last, tenants=("a", "b"))


def test_service_is_the_weighted_tokens_finished_while_requests_arrive() -> None:
    tenants = two_tenants(2, 3, 4, 15)["tenants"]
    assert {name: one["service_tokens"] for name, one in tenants.items()} == {"a": 244, "b": 122}
    assert {name: one["demand_tokens"] for name, one in tenants.items()} == {"a": 366, "b": 244}


def test_tenants_who_get_equally_much_of_what_is_short_are_served_fairly() -> None:
    values = two_tenants(2, 3, 15, 15)["values"]
    assert (values["jain_tenants"], values["service_min_over_max"]) == (1.0, 1.0)
    assert values["service_gap_tokens"] == 0.0


def test_a_tenant_who_gets_nothing_shows() -> None:
    values = two_tenants(2, 15, 4, -1)["values"]
    assert (values["jain_tenants"], values["service_min_over_max"]) == (0.5, 0.0)
    assert values["service_gap_tokens"] == 244.0


def test_a_modest_tenant_does_not_make_service_unfair() -> None:
    # Tenant b wants a tenth, and gets it.
    rows = [row(i, i, i, i, i + 0.5, tenant=int(i == 5)) for i in range(10)]
    closing = row(11, 11, 11, 11, 12, prompt_tokens=0, output_tokens=0)
    values = metrics(*rows, closing, tenants=("a", "b"))["values"]
    assert values["jain_tenants"] == 1.0
    assert values["jain_service"] == pytest.approx(100 / (2 * 82))


def test_what_can_never_be_served_is_not_demand() -> None:
    refused = unserved(REFUSED) | {"tenant": 1}
    seed = metrics(row(0, 0, 0, 0, 1), refused, row(2), tenants=("a", "b"))
    assert seed["tenants"]["b"]["demand_tokens"] == 0.0
    assert seed["values"]["jain_tenants"] is None


def test_a_single_tenant_has_no_fairness() -> None:
    seed = metrics(row(0))
    assert (seed["tenants"], seed["values"]["jain_tenants"]) == ({}, None)


# -- over seeds --


def test_turns_that_were_never_sent_are_counted() -> None:
    assert metrics(row(0), unsent_requests=3)["values"]["unsent_requests"] == 3


def test_a_summary_names_the_length_predictor() -> None:
    predictor = {"kind": "noisy", "rank_correlation": 0.7}
    assert summarise([result(row(0))], ANY, 0.0, predictor)["predictor"] == predictor


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
    tenants = summarise([in_classes(queue(0.8, 500))], ANY, 0.1)["tenants"]
    assert tenants["a"].keys() - {"outcomes"} <= DEFINITIONS.keys()


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
