"""Rankings of policies: closed forms, data of known truth, and what a verdict needs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viisim.errors import InputError
from viisim.validation.answers import STATISTICS, Answers, Figure
from viisim.validation.bootstrap import BLOCK_S, draws_of, resampled
from viisim.validation.ranking import FAILED, INCONCLUSIVE, PASSED, Ranking, overall, rank

MEAN = Figure("e2e_s", "mean")


def answers(e2e_s: Any, classes: Sequence[str] = (), due_s: Any = None) -> Answers:
    """A run whose requests arrive one a second, unless told; its first tokens come half way."""
    times_s = np.array(e2e_s, dtype=np.float64)
    count = times_s.size
    return Answers(
        ids=tuple(f"r{i}" for i in range(count)),
        traffic_class=tuple(classes) or ("chat",) * count,
        due_s=np.arange(count, dtype=np.float64) if due_s is None else due_s,
        ttft_s=times_s / 2,
        tpot_s=times_s / 100,
        e2e_s=times_s,
        output_tokens=np.full(count, 10),
        preemptions=0,
        prefix_hit_tokens=0,
        prompt_tokens=100 * count,
    )


def constant(value_s: float, seconds: int = 40, repetitions: int = 3) -> list[Answers]:
    """Runs in which every request takes as long."""
    return [answers([value_s] * seconds)] * repetitions


def noisy(seed: int, factor: float = 1.0, repetitions: int = 3) -> list[Answers]:
    """Runs of random latencies; the same requests for the same seed."""
    rng = np.random.default_rng(seed)
    return [answers(factor * rng.lognormal(size=60)) for _ in range(repetitions)]


def by_policy(run: Callable[[float], list[Answers]], *values: float) -> dict[str, list[Answers]]:
    return dict(zip("abcdefgh", map(run, values), strict=False))


def ranked(measured: Sequence[float], simulated: Sequence[float]) -> Ranking:
    """Policies whose every request takes as long as given."""
    return rank(MEAN, by_policy(constant, *measured), by_policy(constant, *simulated))


# --------------------------------------------------------------------------------------
# Closed forms


def test_a_constant_shift_is_significant_and_agreed_upon() -> None:
    ranking = ranked([1, 2], [3, 4])
    assert (ranking.significant, ranking.tau, ranking.regret) == (1, 1.0, 0.0)


def test_a_pair_tells_how_much_slower_the_second_policy_is() -> None:
    pair = ranked([2, 3], [4, 5]).pairs[0]
    assert (pair.difference, pair.interval, pair.simulated_difference) == (0.5, (0.5, 0.5), 0.25)


def test_a_row_tells_the_signed_error() -> None:
    row = ranked([2, 3], [1, 3]).rows[0]
    assert (row.measured, row.interval, row.simulated, row.error) == (2, (2, 2), 1, -0.5)


def test_identical_policies_are_not_significant() -> None:
    runs = {"a": noisy(1), "b": noisy(1)}
    assert rank(MEAN, runs, by_policy(constant, 1, 2)).significant == 0


def test_without_a_significant_pair_there_is_no_tau() -> None:
    ranking = ranked([1, 1], [1, 2])
    assert (ranking.tau, ranking.tau_all) == (None, None)


def test_a_reversed_simulation_has_tau_minus_one() -> None:
    ranking = ranked([1, 1.5, 3], [3, 2, 1])
    assert (ranking.tau, ranking.tau_all) == (-1.0, -1.0)


def test_a_reversed_simulation_regrets_what_its_choice_costs() -> None:
    ranking = ranked([1, 1.5, 3], [3, 2, 1])
    assert (ranking.simulated_best, ranking.measured_best, ranking.regret) == ("c", "a", 2.0)


def test_the_interval_of_a_certain_regret_is_a_point() -> None:
    assert ranked([1, 3], [3, 1]).regret_interval == (2.0, 2.0)


def test_a_simulated_tie_is_discordant() -> None:
    assert ranked([1, 2, 3], [1, 2, 2]).tau == pytest.approx(1 / 3)


def test_pairing_shows_a_difference_far_smaller_than_the_spread() -> None:
    runs = {"a": noisy(1), "b": noisy(1, factor=1.01)}
    assert rank(MEAN, runs, by_policy(constant, 1, 2)).tau == 1.0


@pytest.mark.parametrize("statistic", list(STATISTICS))
def test_every_statistic_shows_a_shift(statistic: str) -> None:
    runs = {"a": noisy(1), "b": noisy(1, factor=1.1)}
    ranking = rank(Figure("e2e_s", statistic), runs, by_policy(constant, 1, 2))
    assert ranking.pairs[0].interval == pytest.approx((0.1, 0.1))


def test_one_class_is_judged_by_its_own_requests() -> None:
    classes = ["chat", "batch"] * 30
    runs = {
        "a": [answers([1, 9] * 30, classes)] * 2,
        "b": [answers([2, 5] * 30, classes)] * 2,
    }
    ranking = rank(Figure("ttft_s", "p50", "chat"), runs, runs)
    assert [row.measured for row in ranking.rows] == [0.5, 1.0]


def test_a_figure_reads_as_words() -> None:
    assert str(Figure("ttft_s", "mean", "interactive")) == "mean TTFT of interactive"


def test_requests_are_paired_by_id_whatever_their_order() -> None:
    forward = noisy(1)
    backward = [
        replace(run, ids=run.ids[::-1], e2e_s=1.1 * run.e2e_s[::-1], due_s=run.due_s[::-1].copy())
        for run in forward
    ]
    runs = {"a": forward, "b": backward}
    assert rank(MEAN, runs, by_policy(constant, 1, 2)).pairs[0].interval == pytest.approx(
        (0.1, 0.1)
    )


# --------------------------------------------------------------------------------------
# Failed requests


def with_failures(runs: Sequence[Answers], *failed: int) -> list[Answers]:
    def without(values: Any) -> Any:
        return np.where(np.isin(np.arange(values.size), failed), np.nan, values)

    return [
        replace(
            run, ttft_s=without(run.ttft_s), tpot_s=without(run.tpot_s), e2e_s=without(run.e2e_s)
        )
        for run in runs
    ]


def test_a_request_that_failed_under_either_is_left_out_of_the_pair() -> None:
    slow_start = [answers([50.0, 60.0] + [1.0] * 38)] * 3
    runs = {"a": with_failures(slow_start, 0), "b": with_failures(slow_start, 1)}
    pair = rank(MEAN, runs, by_policy(constant, 1, 2)).pairs[0]
    assert (pair.difference, pair.interval, pair.left_out) == (0, (0, 0), 6)


def test_a_row_counts_its_own_failures() -> None:
    runs = {"a": with_failures(constant(1), 0, 7), "b": constant(2)}
    assert [row.failed for row in rank(MEAN, runs, runs).rows] == [6, 0]


def test_a_request_that_was_never_sent_counts_as_failed() -> None:
    runs = {"a": constant(1, seconds=40), "b": constant(2, seconds=38)}
    assert rank(MEAN, runs, runs).pairs[0].left_out == 6


def test_an_answer_of_one_token_is_no_failure() -> None:
    runs = {
        policy: [replace(run, tpot_s=np.where(run.due_s < 5, np.nan, run.tpot_s)) for run in runs]
        for policy, runs in by_policy(constant, 1, 2).items()
    }
    pair = rank(Figure("tpot_s", "p90"), runs, runs).pairs[0]
    assert (pair.left_out, pair.difference) == (0, 1.0)


# --------------------------------------------------------------------------------------
# The bootstrap


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_resample_has_the_figure_of_its_requests_written_out(data: st.DataObject) -> None:
    seconds = data.draw(st.lists(st.floats(0.01, 100), min_size=3, max_size=30))
    values = np.array(seconds)
    block = np.array(
        data.draw(st.lists(st.integers(0, 2), min_size=values.size, max_size=values.size))
    )
    statistic = data.draw(st.sampled_from(sorted(STATISTICS)))
    draws = np.array([[1, 0, 2], [1, 1, 1], [0, 3, 0]])
    expected = [
        STATISTICS[statistic](written) if written.size else np.nan
        for written in (np.repeat(values, counts[block]) for counts in draws)
    ]
    sampled = resampled(Figure("e2e_s", statistic), values, block, draws)
    assert sampled == pytest.approx(np.array(expected), nan_ok=True)


@given(blocks=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_repetition_is_drawn_with_as_many_blocks_as_it_has(blocks: list[int], seed: int) -> None:
    draws = draws_of(blocks, np.random.default_rng(seed))
    drawn = np.add.reduceat(draws, np.cumsum([0, *blocks[:-1]]), axis=1) / blocks
    assert np.array_equal(drawn, np.round(drawn))
    assert (drawn.sum(axis=1) == len(blocks)).all()


REQUESTS = 240
AGES_S = np.abs(np.subtract.outer(np.arange(REQUESTS), np.arange(REQUESTS))) / 4
CORRELATED = np.linalg.cholesky(np.exp(-AGES_S / 2))
"""Makes of independent noise such as forgets itself in 2 s, at four requests a second."""


def equal_policies(
    seed: int, spread_between_runs: float, names: str = "ab"
) -> dict[str, list[Answers]]:
    """The same requests in three runs of a minute under policies that do not differ."""
    rng = np.random.default_rng(seed)
    runs: dict[str, list[Answers]] = {name: [] for name in names}
    for _ in range(3):
        requests = 0.6 * CORRELATED @ rng.normal(size=REQUESTS) + 0.3 * rng.normal(size=REQUESTS)
        for policy in runs:
            own = 0.5 * CORRELATED @ rng.normal(size=REQUESTS) + 0.2 * rng.normal(size=REQUESTS)
            own += spread_between_runs * rng.normal()
            runs[policy].append(answers(np.exp(requests + own), due_s=np.arange(REQUESTS) / 4))
    return runs


@pytest.mark.parametrize("spread_between_runs", [0.0, 0.1])
def test_equal_policies_are_rarely_called_different(spread_between_runs: float) -> None:
    shown = 0
    for seed in range(200):
        runs = equal_policies(seed, spread_between_runs)
        shown += rank(MEAN, runs, runs).significant
    # 5 % are 10 sets, 8 % where runs differ 16; with every repetition kept it would be 25 and 38.
    assert shown <= 24


def test_among_many_equal_policies_hardly_any_two_are_called_different() -> None:
    shown = 0
    for seed in range(30):
        runs = equal_policies(seed, 0.0, "abcdef")
        shown += rank(MEAN, runs, runs).significant > 0
    # With each of the 15 pairs judged by itself it would be every second ranking.
    assert shown <= 5


def test_one_repetition_shows_nothing() -> None:
    runs = {"a": constant(1, repetitions=1), "b": constant(2, repetitions=1)}
    assert rank(MEAN, runs, runs).significant == 0


def test_few_blocks_show_nothing() -> None:
    seconds = int(2 * BLOCK_S)
    runs = {"a": constant(1, seconds), "b": constant(2, seconds)}
    assert rank(MEAN, runs, runs).significant == 0


def test_the_same_seed_gives_the_same_bytes() -> None:
    measured = {"a": noisy(1), "b": noisy(2), "c": noisy(3)}
    once, again = (json.dumps(rank(MEAN, measured, measured).to_dict()) for _ in range(2))
    assert once == again


def test_another_seed_draws_otherwise() -> None:
    measured = {"a": noisy(1), "b": noisy(2)}
    one, other = (
        rank(MEAN, measured, measured, rng_seed=seed).pairs[0].interval for seed in (0, 1)
    )
    assert one != other


def test_a_further_policy_changes_no_other_pair() -> None:
    measured = {"a": noisy(1), "b": noisy(2), "c": noisy(3)}
    two = {policy: measured[policy] for policy in "ab"}
    assert rank(MEAN, measured, measured).pairs[0] == rank(MEAN, two, two).pairs[0]


# --------------------------------------------------------------------------------------
# Verdicts


def test_six_pairs_ranked_rightly_pass() -> None:
    verdict = overall([ranked([1, 2, 3], [2, 4, 5])] * 2)
    assert (verdict.outcome, verdict.significant, verdict.tau) == (PASSED, 6, 1.0)


def test_fewer_than_six_significant_pairs_are_inconclusive() -> None:
    assert overall([ranked([1, 2, 3], [2, 4, 5])]).outcome == INCONCLUSIVE


def test_one_pair_ranked_wrongly_fails() -> None:
    right, wrong = ranked([1, 2, 3], [1, 2, 3]), ranked([1, 2, 3], [1, 3, 2])
    assert overall([right, wrong]).outcome == FAILED


def test_the_tau_of_a_verdict_is_over_the_pairs_of_all_workloads() -> None:
    right, wrong = ranked([1, 2, 3], [1, 2, 3]), ranked([1, 2, 3], [1, 3, 2])
    assert overall([right, wrong]).tau == pytest.approx(2 / 3)


def test_a_regret_of_two_per_cent_fails() -> None:
    right = ranked([1, 2, 3], [1, 2, 3])
    verdict = overall([right, replace(right, regret=0.02)])
    assert (verdict.outcome, verdict.regret) == (FAILED, 0.02)


def test_no_significant_pair_at_all_is_inconclusive() -> None:
    assert overall([ranked([1, 1], [1, 2])]).outcome == INCONCLUSIVE


# --------------------------------------------------------------------------------------
# Wrong input


def test_an_unknown_statistic_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown figure 'p42'"):
        Figure("e2e_s", "p42")


def test_a_class_that_no_run_has_is_an_error() -> None:
    runs = by_policy(constant, 1, 2)
    with pytest.raises(InputError, match="mean TTFT of video; there are requests of chat"):
        rank(Figure("ttft_s", "mean", "video"), runs, runs)


def test_a_policy_that_was_not_simulated_is_an_error() -> None:
    with pytest.raises(InputError, match="both: c"):
        rank(MEAN, by_policy(constant, 1, 2, 3), by_policy(constant, 1, 2))


def test_unequal_repetitions_are_an_error() -> None:
    runs = {"a": constant(1), "b": constant(2, repetitions=2)}
    with pytest.raises(InputError, match="a 3, b 2"):
        rank(MEAN, runs, runs)


def test_one_policy_is_no_ranking() -> None:
    with pytest.raises(InputError, match="two policies"):
        ranked([1], [1])


def test_runs_without_ids_cannot_be_paired() -> None:
    runs = {"a": constant(1), "b": [replace(run, ids=("r",) * 40) for run in constant(2)]}
    with pytest.raises(InputError, match="runs of b: every request needs an id"):
        rank(MEAN, runs, runs)


def test_policies_without_a_common_request_are_an_error() -> None:
    others = [replace(run, ids=tuple(f"s{i}" for i in range(40))) for run in constant(2)]
    runs = {"a": constant(1), "b": others}
    with pytest.raises(InputError, match="a and b answered no request in common"):
        rank(MEAN, runs, runs)
