"""`viisim calibrate --live`: how long requests and answers are on their way."""

from typing import Any

import numpy as np
import pytest

from runtime.live.delays import BusyDelays, Overhead, busy_delays_of, overhead_of
from runtime.load import Record
from viisim.errors import InputError


def record(prompt: int, ttft_s: float, sent_s: float = 0.0) -> Record:
    return Record("0", 0.0, sent_s=sent_s, prompt_tokens=prompt, ttft_from_sent_s=ttft_s)


def step(
    prefill: int,
    exec_s: float,
    gap_s: float | None = 0.5,
    start_s: float = 0.0,
    waiting: int = 0,
) -> dict[str, Any]:
    return {
        "start_s": start_s,
        "prefill_tokens": prefill,
        "exec_s": exec_s,
        "host_s": 0.001,
        "gap_s": gap_s,
        "waiting": waiting,
    }


def lone(prompts: list[int], way_s: list[float], back_s: list[float]) -> Overhead:
    """Of requests sent a second apart, whose only step takes 0.1 s."""
    records = [
        record(prompt, way + 0.1 + back, sent_s=float(second))
        for second, (prompt, way, back) in enumerate(zip(prompts, way_s, back_s, strict=True))
    ]
    steps = [
        step(prompt, 0.099, start_s=second + way)
        for second, (prompt, way) in enumerate(zip(prompts, way_s, strict=True))
    ]
    return overhead_of(records, steps)


def test_the_overhead_is_what_the_steps_of_the_prompt_do_not_explain() -> None:
    steps = [step(90, 0.1, None), step(0, 9.0), step(64, 0.05), step(36, 0.03, 0.002)]
    found = overhead_of([record(90, 0.111), record(100, 0.103)], steps)
    assert found.mean_s == pytest.approx(0.5 * (0.111 - 0.101 + 0.103 - 0.084))


def test_the_way_to_the_engine_has_a_fixed_part_and_one_a_prompt_token() -> None:
    found = lone([10, 60, 110], [0.0052, 0.0062, 0.0072], [0.002, 0.004, 0.003])
    assert found.request_per_prompt_token_s == pytest.approx(2e-5)
    assert found.request_s == pytest.approx(0.005)


def test_the_way_back_is_the_rest() -> None:
    found = lone([10, 60, 110], [0.0052, 0.0062, 0.0072], [0.002, 0.004, 0.003])
    assert found.answer_s == pytest.approx(0.003)


def test_a_hiccup_does_not_turn_the_line() -> None:
    prompts = [10, 20, 40, 80, 160]
    found = lone(prompts, [0.005, 0.005, 0.005, 0.005, 0.5], [0.002] * 5)
    assert (found.request_s, found.request_per_prompt_token_s) == pytest.approx((0.005, 0.0))


def test_a_line_that_falls_is_level() -> None:
    found = lone([10, 60, 110], [0.007, 0.006, 0.005], [0.002] * 3)
    assert (found.request_s, found.request_per_prompt_token_s) == pytest.approx((0.006, 0.0))


def test_prompts_of_one_length_have_no_slope() -> None:
    found = lone([16, 16], [0.005, 0.007], [0.002, 0.002])
    assert (found.request_s, found.request_per_prompt_token_s) == pytest.approx((0.006, 0.0))


def test_steps_of_another_client_are_an_error() -> None:
    with pytest.raises(InputError, match="another client"):
        overhead_of([record(100, 0.1)], [step(90, 0.1)])


# -- a busy engine --

STEP_S = 0.05


def busy(
    request_s: float,
    per_prompt_token_s: float = 0.0,
    *,
    answer_s: float = 0.004,
    waiting: int = 0,
    gap_s: float = 0.0002,
) -> BusyDelays | None:
    """Of an engine that makes step after step, and requests that come at any moment of one: each
    is in the first step that begins after its way."""
    rng = np.random.default_rng(1)
    tokens: dict[int, int] = {}
    records = []
    for number, moment in enumerate(rng.uniform(0, STEP_S, 200)):
        prompt, sent_s = int(rng.integers(10, 100)), 10 * number * STEP_S + float(moment)
        own = int((sent_s + request_s + per_prompt_token_s * prompt) // STEP_S) + 1
        tokens[own] = prompt
        records.append(record(prompt, (own + 1) * STEP_S - gap_s + answer_s - sent_s, sent_s))
    steps = [
        step(tokens.get(k, 0), STEP_S - gap_s - 0.001, gap_s, k * STEP_S, waiting)
        for k in range(max(tokens) + 1)
    ]
    return busy_delays_of(records, steps, per_prompt_token_s)


@pytest.mark.parametrize("request_s", [0.0, 0.004, 0.02, 0.07])
def test_a_busy_engine_shows_the_way_in_the_step_that_a_request_misses(request_s: float) -> None:
    found = busy(request_s)
    assert found is not None
    assert found.request_s == pytest.approx(request_s, abs=0.001)


def test_each_prompt_s_share_is_taken_off() -> None:
    found = busy(0.004, 2e-4)
    assert found is not None
    assert found.request_s == pytest.approx(0.004, abs=0.001)


def test_the_way_back_is_from_the_end_of_the_step_that_made_the_token() -> None:
    found = busy(0.004, answer_s=0.006)
    assert found is not None
    assert found.answer_s == pytest.approx(0.006)


def test_a_step_that_was_scheduled_ahead_begins_with_the_end_of_the_last() -> None:
    steps = [step(10, 0.1, None), *(step(10, 0.1, 0.0, start_s=0.02 + 0.1 * k) for k in range(20))]
    records = [record(10, 0.101 * (k + 1) + 0.005 - 0.05 * k, 0.05 * k) for k in range(21)]
    found = busy_delays_of(records, steps, 0.0)
    assert found is not None
    assert found.answer_s == pytest.approx(0.005)


def test_requests_that_found_others_waiting_say_nothing_of_their_way() -> None:
    assert busy(0.004, waiting=1) is None


def test_requests_that_found_an_idle_engine_are_not_counted() -> None:
    assert busy(0.004, gap_s=0.01) is None


def test_steps_of_another_client_are_an_error_under_traffic_too() -> None:
    with pytest.raises(InputError, match="another client"):
        busy_delays_of([record(100, 0.1)], [step(90, 0.1)], 0.0)
