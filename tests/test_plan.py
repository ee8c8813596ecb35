"""`viisim plan`: candidates, the search for a load, and the cheapest that meets a goal."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from viisim.cli.plan import find_workload, parse_slo, plan
from viisim.config import Slo, SyntheticWorkload
from viisim.errors import InputError
from viisim.plan import (
    Demand,
    Planned,
    Prices,
    affordable,
    candidates,
    cheapest,
    highest_load,
    plan_one,
)

PRICES = Prices()


def demand(prompt_tokens: int = 200, **slo: float) -> Demand:
    content = {
        "kind": "synthetic",
        "requests": 1,
        "rate_per_s": 1.0,
        "prompt_tokens": prompt_tokens,
        "output_tokens": 50,
    }
    workload = SyntheticWorkload.model_validate(content)
    return Demand(workload=workload, slo=Slo(**slo), requests_per_card=60)


@cache
def planned(replicas_up_to: int) -> list[Planned]:
    tried = candidates("qwen3-8b", ["radeon_vii"], replicas_up_to, ["w4a16"])
    alone = [each for each in tried if each.profile.tensor_parallel == 1]
    return [plan_one(each, demand(ttft_s=2.0, tpot_s=0.1), PRICES) for each in alone]


# --------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("threshold", [0.05, 0.7, 1.9])
def test_the_search_ends_just_below_the_threshold(threshold: float):
    load = highest_load(lambda load: load <= threshold, 1.0)
    assert load is not None
    assert threshold / 1.03 <= load <= threshold


def test_no_load_is_found_where_a_light_one_fails():
    assert highest_load(lambda load: False, 1.0) is None


def test_a_cluster_that_finishes_nothing_is_not_searched():
    assert highest_load(lambda load: True, 0.0) is None


# --------------------------------------------------------------------------------------
# Candidates


def test_a_device_takes_part_with_the_formats_it_computes_in():
    found = candidates("qwen3-8b", ["radeon_vii", "rtx_4090"], 2)
    with_fp8 = {each.device.name for each in found if each.quantisation == "fp8"}
    assert with_fp8 == {"rtx_4090"}


def test_a_model_too_large_for_one_card_starts_at_the_group_that_holds_it():
    found = candidates("qwen3-8b", ["radeon_vii"], 4, ["fp16"])
    assert [(each.profile.tensor_parallel, each.replicas) for each in found] == [
        (2, 1),
        (2, 2),
        (4, 1),
    ]


def test_no_candidate_has_more_cards_than_allowed():
    assert max(each.cards for each in candidates("qwen3-8b", ["mi50"], 6)) == 6


def test_a_measured_profile_goes_before_the_roofline():
    found = candidates("qwen3-vl-8b", ["radeon_vii"], 2, ["w4a16"])
    labels = {each.profile.tensor_parallel: each.label for each in found}
    assert labels == {1: "calibrated", 2: "uncalibrated"}


def test_a_model_that_fits_nowhere_is_told_what_would_fit():
    with pytest.raises(InputError, match="it fits with tensor_parallel 4"):
        candidates("llama-2-70b", ["radeon_vii"], 2)


def test_a_device_without_the_only_format_asked_for_is_an_error():
    with pytest.raises(InputError, match="give another --quantisation"):
        candidates("qwen3-8b", ["radeon_vii"], 2, ["fp8"])


def test_a_budget_leaves_out_what_costs_more():
    tried = candidates("qwen3-8b", ["radeon_vii"], 8, ["w4a16"])
    assert max(each.cards for each in affordable(tried, 1300, PRICES)) == 2


def test_a_budget_for_nothing_is_an_error():
    tried = candidates("qwen3-8b", ["radeon_vii"], 1, ["w4a16"])
    with pytest.raises(InputError, match="--budget 100"):
        affordable(tried, 100, PRICES)


def test_a_card_without_a_known_price_is_within_no_budget():
    tried = candidates("qwen3-8b", ["mi250x_gcd"], 1, ["fp16"])
    with pytest.raises(InputError, match="--budget"):
        affordable(tried, 1e9, PRICES)


# --------------------------------------------------------------------------------------
# Plans


def test_a_plan_is_the_same_every_time():
    first = planned(1)[0]
    again = plan_one(first.candidate, demand(ttft_s=2.0, tpot_s=0.1), PRICES)
    assert again == first


def test_two_replicas_sustain_about_twice_the_load():
    one, two = planned(2)
    assert two.load_per_s == pytest.approx(2 * one.load_per_s, rel=0.3)


def test_users_are_load_times_stay_and_fit_the_objectives():
    row = planned(1)[0]
    longest_s = 2.0 + 49 * 0.1
    assert 0 < row.users <= row.load_per_s * longest_s


def test_tokens_per_second_are_the_load_times_the_answer():
    row = planned(1)[0]
    assert row.tokens_per_s == pytest.approx(50 * row.load_per_s, rel=0.2)


def test_power_lies_between_idle_and_the_cap():
    assert 25 < planned(1)[0].power_w < 250


def test_an_objective_that_a_lone_request_misses_is_named():
    candidate = planned(1)[0].candidate
    row = plan_one(candidate, demand(tpot_s=0.001), PRICES)
    assert (row.load_per_s, row.limit.split()[:2]) == (0.0, ["TPOT", "p95"])


def test_prompts_longer_than_the_context_are_named():
    candidate = candidates("llama-2-7b", ["radeon_vii"], 1, ["fp16"])[0]
    row = plan_one(candidate, demand(prompt_tokens=3000, ttft_s=60.0), PRICES)
    assert row.limit == "no prompt fits its 2,400 tokens"


def test_the_cheapest_for_a_load_is_the_smallest_that_sustains_it():
    one, two = planned(2)
    assert cheapest([one, two], load_per_s=1.2 * one.load_per_s) is two
    assert cheapest([one, two], load_per_s=0.5 * one.load_per_s) is one


def test_nothing_is_cheapest_for_more_users_than_any_sustains():
    assert cheapest(planned(2), users=1e6) is None


def test_what_has_no_price_is_never_the_cheapest():
    row = replace(planned(1)[0], usd_per_hour=None, usd_per_million_tokens=None)
    assert cheapest([row]) is None


# --------------------------------------------------------------------------------------
# The command


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.stdout


SMALL = ("--model", "qwen3-8b", "--device", "rtx_4090", "--max-cards", "1", "--requests", "50")


def test_every_row_of_the_table_is_labelled():
    out = run(*SMALL, "--slo", "ttft=5s,tpot=100ms")
    rows = [line for line in out.splitlines() if line.lstrip().startswith("1xTP1")]
    assert len(rows) == 3
    assert all("uncalibrated" in row for row in rows)


def test_the_document_has_the_rows_the_prices_and_the_cheapest():
    out = run(*SMALL, "--slo", "ttft=5s", "--quantisation", "w4a16", "--json")
    document: dict[str, Any] = json.loads(out)
    assert document["cheapest"] == document["configurations"][0]
    assert document["prices"]["lifetime_years"] == 3.0
    assert document["configurations"][0]["profile"] == "uncalibrated"


def test_objectives_are_read_in_seconds():
    assert parse_slo("ttft=2s,tpot=100ms") == Slo(ttft_s=2.0, tpot_s=0.1)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=2", "ttft=0s", "speed=2s", "ttft=-1s"])
def test_an_objective_that_cannot_be_read_is_an_error(text: str):
    with pytest.raises(InputError, match="write ttft=2s,tpot=100ms"):
        parse_slo(text)


def test_an_unknown_workload_is_an_error():
    with pytest.raises(InputError, match="azure_conv"):
        find_workload("azure_con")
