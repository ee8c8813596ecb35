"""Length predictors: what they know, and how well `Noisy` keeps its stated correlation."""

import numpy as np
import pytest
from scipy import stats

from policies.predictor import History
from policies.testing import request
from viisim.predictors import Noisy, Oracle

SAMPLE = 4000
LENGTHS = np.random.default_rng(7).geometric(1 / 200, SAMPLE).tolist()


def guess(predictor, truth=None, **fields):
    return predictor.predict(request(**fields), truth).predicted_output_tokens


def guesses(predictor):
    return [guess(predictor, truth, id=f"q{n}") for n, truth in enumerate(LENGTHS)]


# -- History -----------------------------------------------------------------------------------


def test_history_guesses_nothing_before_it_has_seen_an_answer():
    assert guess(History()) is None


def test_history_guesses_the_mean_so_far():
    history = History()
    for tokens in (10, 20, 33):
        history.observe(request(), tokens)
    assert guess(history) == 21


@pytest.mark.parametrize("kind", ["model", "tenant", "traffic_class"])
def test_history_learns_for_each_kind_apart(kind):
    history = History()
    history.observe(request(**{kind: "seen"}), 10)
    assert guess(history, **{kind: "other"}) is None


def test_history_keeps_to_the_output_limit():
    history = History()
    history.observe(request(), 900)
    assert guess(history, max_output_tokens=50) == 50


def test_history_needs_no_truth_and_does_not_look_at_it():
    history = History()
    history.observe(request(), 10)
    assert guess(history, truth=40) == 10


# -- Oracle ------------------------------------------------------------------------------------


def test_the_oracle_tells_the_truth():
    assert guess(Oracle(), truth=123) == 123


# -- Noisy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [0.0, 0.3, 0.6, 0.9])
def test_noisy_keeps_the_stated_rank_correlation(stated):
    """Within five standard errors. Of Spearman's rho over n pairs of a normal copula it is at
    most sqrt((1 + rho^2 / 2) / (n - 3)) * (1 - rho^2) (Bonett and Wright 2000); ties between equal
    lengths and their 1 - 1 / n weigh less than the 0.01 added."""
    found = stats.spearmanr(LENGTHS, guesses(Noisy(stated, LENGTHS, seed=1))).statistic
    standard_error = np.sqrt((1 + stated**2 / 2) / (SAMPLE - 3)) * (1 - stated**2)
    assert abs(found - stated) < 5 * standard_error + 0.01


def test_noisy_guesses_perfectly_at_a_correlation_of_one():
    """But for where equal lengths end: a guess is at most one length of the sample off."""
    found = stats.spearmanr(LENGTHS, guesses(Noisy(1.0, LENGTHS, seed=1))).statistic
    assert found > 0.999


def test_noisy_preserves_the_distribution_of_lengths():
    """The two-sample Kolmogorov-Smirnov distance stays below its 0.1 % critical value."""
    distance = stats.ks_2samp(LENGTHS, guesses(Noisy(0.5, LENGTHS, seed=1))).statistic
    assert distance < 1.95 * np.sqrt(2 / SAMPLE)


def test_noisy_repeats_its_guesses():
    assert guesses(Noisy(0.5, LENGTHS, seed=3)) == guesses(Noisy(0.5, LENGTHS, seed=3))


def test_the_guess_for_a_request_does_not_depend_on_those_before_it():
    noisy = Noisy(0.5, LENGTHS, seed=3)
    fresh = guess(noisy, LENGTHS[9], id="q9")
    assert guesses(noisy)[9] == fresh


def test_another_seed_makes_other_guesses():
    assert guesses(Noisy(0.5, LENGTHS, seed=3)) != guesses(Noisy(0.5, LENGTHS, seed=4))
