"""Which requests shared a step, what was cached, and the coefficients that come of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.closed_loop import (
    BASE_S,
    PER_CONTEXT_S,
    PER_PAIR_S,
    PER_TOKEN_S,
    PREFILL_BASE_S,
    bench_result,
)
from viisim.calibration.batches import steps_of
from viisim.calibration.bench import read_bench
from viisim.calibration.fit import fit_steps
from viisim.calibration.measurements import Measurement, RequestLog, StepLog
from viisim.calibration.reuse import Series, find_series, with_cached_prompts


def run_of(content: dict[str, Any], name: str = "r") -> Measurement:
    return read_bench(content, Path(f"{name}.json"), "0" * 64)


def log_of(content: dict[str, Any]) -> RequestLog:
    requests = run_of(content).requests
    assert requests is not None
    return requests


def mixed_run(concurrency: int, requests: int = 40, longest: int = 3000) -> dict[str, Any]:
    rng = np.random.default_rng(concurrency)
    prompts = rng.integers(200, longest, requests).tolist()
    outputs = rng.integers(2, 120, requests).tolist()
    return bench_result(prompts, outputs, concurrency)


def exact_s(log: StepLog) -> Any:
    """What each entry takes in the made-up server."""
    base = np.array([BASE_S.get(int(n), 0.0) for n in log.decodes])
    prefills = log.prefill_tokens > 0
    first = np.where(prefills, np.maximum(base, PREFILL_BASE_S), base)
    return (
        first
        + (log.steps - 1) * PREFILL_BASE_S
        + PER_CONTEXT_S * log.context_tokens
        + PER_TOKEN_S * log.prefill_tokens
        + PER_PAIR_S * log.prefill_pairs
    )


# -- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_reconstructed_steps_take_what_the_server_took(concurrency: int) -> None:
    steps = steps_of(log_of(mixed_run(concurrency)), 2048)
    error_s = np.abs(steps.duration_s - exact_s(steps))
    # Idle servers wait for the next request, which the client's file cannot tell from computing.
    assert np.quantile(error_s, 0.95) < 0.002


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_nearly_every_token_finds_its_step(concurrency: int) -> None:
    content = mixed_run(concurrency)
    steps = steps_of(log_of(content), 2048)
    decodes = steps.decodes.sum()
    assert decodes == pytest.approx(sum(map(len, content["itls"])), rel=0.03)


def test_batch_sizes_never_exceed_the_concurrency() -> None:
    assert steps_of(log_of(mixed_run(3)), 2048).decodes.max() == 3


def test_small_delays_of_the_client_do_not_add_up() -> None:
    content = mixed_run(2)
    content["ttfts"] = [ttft - 0.003 for ttft in content["ttfts"]]
    content["itls"] = [[*gaps[:-1], gaps[-1]] for gaps in content["itls"]]
    steps = steps_of(log_of(content), 2048)
    together = steps.part(steps.decodes == 2)
    assert len(together) > 500


def test_a_cut_list_says_nothing_of_what_ran_beside_its_end() -> None:
    log = log_of(mixed_run(4))
    assert len(steps_of(log.first(20), 2048)) < len(steps_of(log, 2048)) / 2


# -- the prefix cache ------------------------------------------------------------------------


def test_the_request_that_was_tested_first_is_cached() -> None:
    content = mixed_run(1)
    content["ttfts"][0] = 0.07
    run = with_cached_prompts(run_of(content), 16)
    assert run.requests is not None
    assert np.flatnonzero(~run.requests.uncached).tolist() == [0]


def test_equal_prompts_that_come_impossibly_fast_are_cached() -> None:
    content = bench_result([4096] * 10, [50] * 10, 1)
    content["ttfts"] = [0.1] * 10
    run = with_cached_prompts(run_of(content), 16)
    assert run.requests is not None
    assert run.requests.repeats_one_prompt
    assert run.requests.cached.tolist() == [4080] * 10


def test_equal_prompts_that_take_their_time_are_computed() -> None:
    run = with_cached_prompts(run_of(bench_result([4096] * 10, [50] * 10, 1)), 16)
    assert run.requests is not None
    assert run.requests.uncached.all()


def series_runs(cached: bool) -> list[Measurement]:
    """Prompts of 4,096, 8,192 and 12,288 tokens; if `cached`, each run computes 4,096."""
    runs = [run_of(mixed_run(1), "mixed")]
    for length in (4096, 8192, 12288):
        start = length - 4096 if cached else 0
        content = bench_result([length] * 8, [1] * 8, 1)
        tokens = length - start
        pairs = tokens * start + tokens * (tokens + 1) / 2
        chunks = -(-tokens // 2048)
        seconds = chunks * PREFILL_BASE_S + PER_TOKEN_S * tokens + PER_PAIR_S * pairs
        content["ttfts"] = [seconds] * 8
        runs.append(run_of(content, f"pp{length}"))
    return runs


def test_runs_that_extend_each_others_prompts_are_found_out() -> None:
    assert find_series(series_runs(cached=True), 2048) == Series(4096)


def test_runs_that_compute_all_of_their_prompts_are_no_series() -> None:
    assert find_series(series_runs(cached=False), 2048) is None


# -- coefficients ----------------------------------------------------------------------------


def test_a_fit_finds_the_coefficients_behind_runs() -> None:
    fit = fit_steps([steps_of(log_of(mixed_run(c)), 2048) for c in (1, 2, 3, 4)])
    assert fit.sequences.tolist() == [1, 2, 3, 4]
    # The fit expects slopes that fall with the batch; here they do not, and bases make up for it.
    assert fit.base_s == pytest.approx(list(BASE_S.values()), rel=0.08)
    assert fit.slope_s[0] == pytest.approx(PER_CONTEXT_S, rel=0.3)
    assert fit.prefill[1] == pytest.approx(PER_TOKEN_S, rel=0.05)


def test_predictions_of_unseen_runs_are_close() -> None:
    fit = fit_steps([steps_of(log_of(mixed_run(c)), 2048) for c in (1, 2, 3, 4)])
    unseen = steps_of(log_of(mixed_run(4, requests=60, longest=2500)), 2048)
    ratio = fit.predict(unseen) / exact_s(unseen)
    assert np.quantile(np.abs(ratio - 1), 0.9) < 0.03


def test_stalls_do_not_move_the_fit() -> None:
    steps = steps_of(log_of(mixed_run(2)), 2048)
    stalled = steps.part(np.s_[:])
    stalled.duration_s[::50] += 1.0
    assert fit_steps([stalled]).base_s == pytest.approx(fit_steps([steps]).base_s, rel=0.03)


def test_coefficients_are_never_negative() -> None:
    steps = steps_of(log_of(mixed_run(2)), 2048)
    falling = StepLog(
        0.05 - 1e-6 * steps.context_tokens,
        steps.decodes,
        steps.context_tokens,
        steps.steps,
        steps.prefill_tokens,
        steps.prefill_pairs,
        steps.host_s,
    )
    fit = fit_steps([falling])
    assert min(fit.base_s.min(), fit.slope_s.min(), fit.prefill.min()) >= 0


def test_beyond_the_last_batch_size_bases_follow_the_trend_of_all() -> None:
    fit = fit_steps([steps_of(log_of(mixed_run(c)), 2048) for c in (1, 2, 3, 4)])
    eight = StepLog(*(np.array([value]) for value in (0.0, 8, 0, 1, 0, 0, 0.0)))
    slope = np.polyfit(fit.sequences, fit.base_s, 1)[0]
    assert fit.predict(eight)[0] == pytest.approx(fit.base_s[-1] + 4 * slope)
