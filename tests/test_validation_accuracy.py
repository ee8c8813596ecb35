"""Accuracy of a validation: rows, noise, limits, and the load at equal E2E."""

from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.validation.accuracy import (
    Accuracy,
    Capacity,
    LoadRun,
    compare,
    load_at_equal_e2e,
)
from viisim.validation.answers import Answers, Floats, between_tokens_s
from viisim.validation.limits import (
    FULL,
    QUICK,
    Check,
    capacity_checks,
    load_checks,
    step_checks,
)
from viisim.validation.steps import StepTimes, shared_drift, slowdowns_beside, step_errors

TOKENS = np.array([1, 11, 21, 31])


def answers(factor: float = 1.0, ttft: float = 1.0, **other: Any) -> Answers:
    """Four requests, a second apart, that take `factor` times as long, to the first token `ttft`
    times more."""
    ttft_s = factor * ttft * np.array([0.1, 0.2, 0.3, 0.4])
    e2e_s = ttft_s + factor * 0.05 * (TOKENS - 1)
    known: dict[str, Any] = {
        "ids": tuple("abcd"),
        "traffic_class": ("",) * 4,
        "due_s": np.arange(4.0),
        "ttft_s": ttft_s,
        "tpot_s": between_tokens_s(ttft_s, e2e_s, TOKENS),
        "e2e_s": e2e_s,
        "output_tokens": TOKENS,
        "preemptions": 0,
        "prefix_hit_tokens": 0,
        "prompt_tokens": 1000,
    }
    return Answers(**(known | other))


def compared(*measured: Answers, load: float = 0.3, simulated: Answers | None = None) -> Accuracy:
    return compare(LoadRun(load, 1.0, measured, (simulated or answers(),)))


def judged(accuracy: Accuracy, what: str, **limits: Any) -> Check:
    checks = load_checks(accuracy, replace(FULL, **limits))
    return next(check for check in checks if check.what == what)


def names(accuracy: Accuracy) -> set[str]:
    return {check.what for check in load_checks(accuracy, FULL)}


# -- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "p50", "p90", "p99"])
@pytest.mark.parametrize("metric", ["ttft_s", "tpot_s", "e2e_s"])
def test_an_error_is_signed_and_relative_to_the_mean_of_repetitions(
    metric: str, statistic: str
) -> None:
    row = compared(answers(1.5), answers(2.5)).row(metric, statistic)
    assert row is not None
    assert row.measured == pytest.approx(2 * row.predicted)
    assert row.error == pytest.approx(-0.5)


def test_noise_is_the_mean_difference_between_two_repetitions() -> None:
    row = compared(answers(0.9), answers(1.1), answers(1.1)).row("tpot_s", "mean")
    assert row is not None
    assert row.noise == pytest.approx(2 / 3 * 0.2)


def test_a_single_repetition_has_no_noise() -> None:
    assert {row.noise for row in compared(answers()).rows} == {None}


def test_counts_and_shares_differ_by_a_number() -> None:
    measured = (answers(preemptions=4), answers(preemptions=8, prefix_hit_tokens=500))
    accuracy = compared(*measured, simulated=answers(preemptions=7, prefix_hit_tokens=300))
    preemptions, hits = accuracy.row("preemptions"), accuracy.row("prefix_hit_share")
    assert preemptions is not None
    assert hits is not None
    assert (preemptions.error, preemptions.noise) == (1.0, 4.0)
    assert (hits.error, hits.noise) == pytest.approx((0.05, 0.5))


def test_what_nobody_measured_has_no_row() -> None:
    plain = answers(ttft_s=np.full(4, np.nan), tpot_s=np.full(4, np.nan))
    accuracy = compared(plain)
    assert accuracy.row("ttft_s", "mean") is None
    assert accuracy.row("e2e_s", "mean") is not None


# -- limits of a load ------------------------------------------------------------------------


def test_equal_sides_hold_every_limit_at_every_load() -> None:
    for load in (0.3, 0.7, 0.9, 1.1):
        checks = load_checks(compared(answers(), answers(), load=load), FULL)
        assert all(check.passed for check in checks)


def test_a_decode_that_is_30_percent_slow_names_its_metrics() -> None:
    checks = load_checks(compared(answers(), answers(), simulated=answers(1.3)), FULL)
    failed = {check.name for check in checks if not check.passed}
    assert {"load 0.3: mean E2E", "load 0.3: mean TPOT", "load 0.3: mean TTFT"} <= failed


@pytest.mark.parametrize(
    ("spread", "limit"), [(0.01, 0.05), (0.025, 0.05), (0.04, 0.08), (0.30, 0.15)]
)
def test_a_limit_is_twice_the_noise_within_its_bounds(spread: float, limit: float) -> None:
    accuracy = compared(answers(1 - spread / 2), answers(1 + spread / 2))
    assert judged(accuracy, "mean TPOT").limit == pytest.approx(limit)


@pytest.mark.parametrize(("factor", "lenient"), [(1.02, False), (1.07, True), (1.3, False)])
def test_a_check_that_holds_by_noise_alone_is_told_from_others(
    factor: float, lenient: bool
) -> None:
    accuracy = compared(answers(0.98), answers(1.02), simulated=answers(factor))
    assert judged(accuracy, "mean TPOT").lenient is lenient


def test_a_limit_beyond_the_plain_one_says_why() -> None:
    why = judged(compared(answers(0.9), answers(1.1)), "mean TPOT").why
    assert why == "the most that counts of 2 times the workers' own difference of 20.0%, not 5%"


def test_noise_does_not_tighten_a_limit_above_its_ceiling() -> None:
    accuracy = compared(answers(0.5), answers(1.5))
    assert judged(accuracy, "mean E2E", e2e=QUICK.e2e).limit == 0.20


def test_the_first_token_may_be_further_off() -> None:
    accuracy = compared(answers(), answers(), simulated=answers(ttft=1.08))
    check = judged(accuracy, "mean TTFT")
    assert (check.limit, check.passed) == (0.10, True)


def test_only_throughput_and_counts_are_judged_in_overload() -> None:
    assert names(compared(answers(), load=1.1)) == {"whole answers", "output tokens", "throughput"}


def test_close_to_capacity_only_e2e_is_judged_of_latency() -> None:
    counts = {"whole answers", "output tokens"}
    assert names(compared(answers(), load=0.9)) == counts | {"mean E2E", "throughput"}


@pytest.mark.parametrize(
    ("equal_load", "passed"), [(None, False), (0.88, True), (0.92, True), (0.86, False)]
)
def test_close_to_capacity_the_load_at_equal_e2e_will_do(
    equal_load: float | None, passed: bool
) -> None:
    run = LoadRun(0.9, 1.0, (answers(),), (answers(1.3),), equal_load=equal_load)
    check = judged(compare(run), "mean E2E")
    assert check.passed is passed
    assert check.value == pytest.approx(0.3)


def test_an_answer_lost_in_one_repetition_fails_whatever_the_mean() -> None:
    lost = answers(e2e_s=np.array([0.1, 0.7, 1.3, np.nan]), output_tokens=np.array([1, 11, 21, 0]))
    accuracy = compared(answers(), lost, load=1.1)
    assert judged(accuracy, "whole answers").value == 1
    assert not judged(accuracy, "output tokens").passed


def test_nothing_measured_does_not_pass() -> None:
    plain = answers(ttft_s=np.full(4, np.nan), tpot_s=np.full(4, np.nan))
    check = judged(compared(plain), "mean TTFT")
    assert (check.value, check.passed) == (None, False)


# -- capacity and steps ----------------------------------------------------------------------


@pytest.mark.parametrize(("predicted", "passed"), [(10.4, True), (10.6, False), (9.4, False)])
def test_capacity_is_judged_against_the_mean_of_repetitions(predicted: float, passed: bool) -> None:
    [check] = capacity_checks(
        [Capacity("the cluster", "requests/s", (9.0, 11.0), (predicted,))], FULL
    )
    assert check.passed is passed


def recorded(
    measured_s: Floats, *, worker: str = "w1", start_s: Floats | None = None, **other: Any
) -> StepTimes:
    """Steps of one run, decodes of one sequence, a second apart, on a machine that is as fast as
    when it was calibrated; predicted and refitted to take a second."""
    count = len(measured_s)
    known: dict[str, Any] = {
        "worker": worker,
        "start_s": np.arange(float(count)) if start_s is None else start_s,
        "decodes": np.ones(count, dtype=np.int64),
        "measured_s": measured_s,
        "calibrated_s": np.ones(count),
        "refitted_s": np.ones(count),
        "with_prefill": np.zeros(count, dtype=np.bool_),
        "slowdown": np.ones(count),
        "run": np.zeros(count, dtype=np.int64),
    }
    return StepTimes(**(known | other))


def steps(predicted_s: list[float], **other: Any) -> StepTimes:
    """Of a second each, one after the other."""
    return recorded(np.ones(len(predicted_s)), calibrated_s=np.array(predicted_s), **other)


def test_step_errors_that_cancel_leave_the_total_alone() -> None:
    errors = step_errors(steps([1.2, 0.8]))
    assert (errors.mape, errors.total) == pytest.approx((0.2, 0.0))
    assert [check.passed for check in step_checks([errors], FULL)] == [False, True]


def test_the_limit_of_a_steps_error_is_the_same_however_much_they_scatter() -> None:
    scattered = np.array([0.5, 1.0, 2.0])
    check, _ = step_checks([step_errors(steps([1.2, 1.2, 1.2], refitted_s=scattered))], FULL)
    assert (check.limit, check.passed) == (0.12, False)


@given(st.lists(st.floats(0.2, 5.0), min_size=1, max_size=40))
def test_no_scale_of_a_refit_has_a_smaller_error_than_the_one_reported(ratios: list[float]) -> None:
    refitted_s = np.array(ratios)
    least = step_errors(steps(ratios, refitted_s=refitted_s)).refitted_mape
    scales = np.concatenate([1 / refitted_s, np.linspace(0.1, 5.0, 50)])
    assert least <= min(np.abs(scale * refitted_s - 1).mean() for scale in scales) + 1e-12


def drifting(seed: int, *, machine: float = 0.0, misfit: float = 0.0) -> StepTimes:
    """Two minutes of ten steps a second, whose times scatter; all workers have the same batches,
    which change every ten seconds, as does the machine's speed. `machine` and `misfit` say how
    much of a step's time is due to it, and to a fit that is wrong by the size of the batch."""
    start_s = np.arange(0.0, 120.0, 0.1)
    span = (start_s // 10).astype(np.int64)
    decodes = 1 + span % 4
    speed = np.random.default_rng(0).normal(0, 0.1, 12)[span]
    own = np.random.default_rng(seed).normal(0, 0.1, len(start_s))
    measured_s = np.exp(machine * speed + misfit * decodes + own)
    return recorded(measured_s, start_s=start_s, decodes=decodes)


def test_workers_on_a_machine_of_changing_speed_are_slow_at_once() -> None:
    drift = shared_drift([drifting(1, machine=1.0), drifting(2, machine=1.0)])
    assert drift is not None
    assert drift > 0.8


@pytest.mark.parametrize("misfit", [0.0, 0.2], ids=["noise", "a wrong fit"])
def test_workers_with_the_same_traffic_share_no_drift_by_that(misfit: float) -> None:
    drift = shared_drift([drifting(1, misfit=misfit), drifting(2, misfit=misfit)])
    assert drift is not None
    assert abs(drift) < 0.6


def test_one_worker_or_a_short_recording_shows_no_shared_drift() -> None:
    short = steps([1.0] * 5)
    assert shared_drift([drifting(1, machine=1.0)]) is None
    assert shared_drift([short, short]) is None


# -- the load at equal E2E -------------------------------------------------------------------


def queue_e2e_s(load: float) -> float:
    return 1 / (1 - load) if load < 1 else inf


def test_the_error_at_the_workers_own_speed_is_of_the_means_of_repetitions() -> None:
    measured, own = (answers(1.0), answers(3.0)), (answers(1.1), answers(3.3))
    accuracy = compare(LoadRun(0.7, 1.0, measured, (answers(1.0),), at_own_speed=own))
    assert accuracy.at_own_speed["e2e_s"] == pytest.approx(0.1)


def test_an_error_is_of_the_mean_of_simulated_repetitions() -> None:
    accuracy = compare(LoadRun(0.7, 1.0, (answers(2.0),), (answers(1.0), answers(3.0))))
    row = accuracy.row("e2e_s", "mean")
    assert row is not None
    assert row.error == pytest.approx(0.0)


def test_steps_are_predicted_at_the_machines_speed() -> None:
    errors = step_errors(steps([1.0] * 5, slowdown=np.full(5, 1.5)))
    assert (errors.mape, errors.total, errors.total_as_calibrated) == (0.5, 0.5, 0.0)


def test_the_speed_of_each_run_is_told_as_gauged_and_as_it_was() -> None:
    measured_s, slowdown = np.array([1.0, 1.0, 2.0]), np.array([0.8, 1.0, 2.4])
    errors = step_errors(recorded(measured_s, slowdown=slowdown, run=np.array([3, 3, 5])))
    assert errors.by_run == (1.0, 2.0)
    assert errors.gauged_by_run == pytest.approx((0.9, 2.4))
    assert errors.gauge_error == pytest.approx(0.15)


def test_slowdowns_are_told_apart_by_what_the_other_worker_does() -> None:
    idle, decoding, prefilling = (np.arange(40.0) + shift for shift in (0.0, 100.0, 200.0))
    start_s = np.concatenate([idle, decoding, prefilling])
    measured_s = np.repeat([0.1, 0.2, 0.3], 40)
    mine = recorded(measured_s, start_s=start_s, calibrated_s=np.full(120, 0.1))
    busy_s = start_s[40:]
    other = recorded(np.full(80, 0.9), start_s=busy_s, with_prefill=busy_s >= 200)
    beside = slowdowns_beside(mine, [other])
    assert beside == pytest.approx({"idle": 1.0, "decoding": 2.0, "prefilling": 3.0})


def test_without_other_workers_all_steps_are_beside_idle_ones() -> None:
    assert slowdowns_beside(steps([2.0] * 30), []) == {"idle": 0.5}
    assert slowdowns_beside(steps([2.0] * 5), []) == {}


def test_the_error_as_calibrated_is_against_the_mean_of_repetitions() -> None:
    measured, calibrated = (answers(1.0), answers(3.0)), answers(1.5)
    accuracy = compare(LoadRun(0.7, 1.0, measured, (answers(1.0),), as_calibrated=calibrated))
    assert accuracy.as_calibrated["e2e_s"] == pytest.approx(-0.25)


def test_without_steps_no_error_is_given_at_the_workers_own_speed() -> None:
    assert not compare(LoadRun(0.7, 1.0, (answers(),), (answers(),))).at_own_speed


def test_without_any_answer_there_is_no_load_of_equal_e2e() -> None:
    assert load_at_equal_e2e(nan, queue_e2e_s, 0.74) is None


def test_the_load_at_equal_e2e_is_found() -> None:
    assert load_at_equal_e2e(8.0, queue_e2e_s, 0.74) == pytest.approx(0.875, abs=1e-3)


@pytest.mark.parametrize("measured_s", [1.0, 50.0])
def test_a_load_too_far_away_is_none(measured_s: float) -> None:
    assert load_at_equal_e2e(measured_s, queue_e2e_s, 0.7) is None
