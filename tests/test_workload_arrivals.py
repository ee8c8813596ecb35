"""Arrival processes.

Tolerances are four standard errors. The mean of n gaps scatters by cv / sqrt(n); the squared
standard error of a sample's cv is cv^2 / n * (cv^2 - s cv + (k - 1) / 4) with the skewness s and
the kurtosis k of the gaps (delta method).
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gamma

from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload.arrivals import Arrivals, Gamma, Gaps, Poisson, RateCurve, Weibull

GAPS = 200_000


def gaps_of(process: Gaps, count: int = GAPS, seed: int = 1) -> np.ndarray:
    return process.unit_gaps(Streams(seed)["arrivals"], count)


def standard_error_of_cv(process: Gaps) -> float:
    """By the moments of the process itself."""
    if isinstance(process, Weibull):
        raw = [gamma(1 + k * process._power) / process._mean**k for k in range(5)]
    else:
        shape = 1 / process.cv**2
        raw = [1.0]
        for k in range(4):
            raw.append(raw[-1] * (shape + k) / shape)
    third = raw[3] - 3 * raw[2] + 2
    fourth = raw[4] - 4 * raw[3] + 6 * raw[2] - 3
    cv = process.cv
    skewness, kurtosis = third / cv**3, fourth / cv**4
    return cv * math.sqrt((cv**2 - skewness * cv + (kurtosis - 1) / 4) / GAPS)


PROCESSES = [
    Poisson(),
    Gamma(0.5),
    Gamma(2.0),
    Gamma.of_burstiness(0.4),
    Weibull(0.5),
    Weibull(1.0),
    Weibull(2.0),
]
NAMES = ["poisson", "gamma-0.5", "gamma-2", "burstiness-0.4", "weibull-0.5", "weibull-1", "w-2"]


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_gaps_have_a_mean_of_one(process: Gaps):
    assert abs(gaps_of(process).mean() - 1) <= 4 * process.cv / math.sqrt(GAPS)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_gaps_have_the_stated_cv(process: Gaps):
    gaps = gaps_of(process)
    assert abs(gaps.std() / gaps.mean() - process.cv) <= 4 * standard_error_of_cv(process)


def test_burstiness_is_the_shape_as_vllm_has_it():
    assert Gamma.of_burstiness(0.25).cv == 2.0


def test_a_weibull_process_of_cv_one_is_poisson():
    assert gaps_of(Weibull(1.0), 1000) == pytest.approx(gaps_of(Poisson(), 1000), rel=1e-9)


@pytest.mark.parametrize("process", [Gamma(3.0), Weibull(3.0)], ids=["gamma", "weibull"])
def test_a_spacing_adds_up_to_one(process: Gamma | Weibull):
    gaps = process.spacing(Streams(1)["a"], 500)
    assert gaps.sum() == pytest.approx(1)
    assert gaps.min() >= 0


def test_a_spacing_exists_even_where_every_gap_would_underflow():
    assert Gamma(90.0).spacing(Streams(3)["a"], 5).sum() == pytest.approx(1)


@pytest.mark.parametrize("process", [Gamma(2.0), Weibull(2.0)], ids=["gamma", "weibull"])
def test_a_spacing_has_the_cv_of_its_process(process: Gamma | Weibull):
    gaps = process.spacing(Streams(1)["a"], GAPS)
    assert abs(gaps.std() / gaps.mean() - 2) <= 4 * standard_error_of_cv(process)


# -- the rate curve --------------------------------------------------------------------------

DAY = {0: 0.3, 43_200: 1.6}


def rate_at(curve: RateCurve, second: float) -> float:
    """The factor, read off the times between many arrivals around this second."""
    steady_ns = np.arange(0, 2 * 86_400, 1) * 10**9
    times_s = curve.times_ns(steady_ns) / 1e9
    before, after = np.searchsorted(times_s, [second - 300, second + 300])
    return float(after - before) / 600


@pytest.mark.parametrize(("second", "factor"), [(43_200, 1.6), (21_600, 0.95), (64_800, 0.95)])
def test_a_linear_curve_interpolates_and_comes_back(second: float, factor: float):
    assert rate_at(RateCurve(DAY), second) == pytest.approx(factor, abs=0.01)


@pytest.mark.parametrize(("second", "factor"), [(20_000, 0.3), (60_000, 1.6), (100_000, 0.3)])
def test_steps_stay_and_repeat(second: float, factor: float):
    assert rate_at(RateCurve(DAY, shape="steps"), second) == pytest.approx(factor, abs=0.01)


def test_a_curve_of_one_changes_nothing():
    steady_ns = np.cumsum(np.arange(1000, dtype=np.int64) * 12_345_678)
    assert np.array_equal(RateCurve({0: 1.0}).times_ns(steady_ns), steady_ns)


def test_a_period_brings_its_mean_factor():
    curve = RateCurve(DAY)
    assert curve.mean_factor == pytest.approx(0.95)
    whole_ns = round(0.95 * 86_400e9)
    assert curve.times_ns(np.array([whole_ns, 3 * whole_ns])).tolist() == [86_400e9, 3 * 86_400e9]


def test_nothing_arrives_while_the_factor_is_zero():
    curve = RateCurve({0: 1.0, 100: 0.0, 200: 1.0}, period_s=300, shape="steps")
    times_s = curve.times_ns(np.arange(0, 1000) * 10**9) / 1e9 % 300
    assert not np.any((times_s > 100.001) & (times_s < 199.999))


@given(
    st.dictionaries(st.integers(1, 99), st.floats(0, 50), max_size=5),
    st.lists(st.integers(0, 10**13), min_size=2, max_size=50),
    st.sampled_from(["linear", "steps"]),
)
def test_later_stays_later_under_every_curve(inner, steady, shape):
    curve = RateCurve({0: 1.0, **inner}, period_s=100, shape=shape)
    assert np.all(np.diff(curve.times_ns(np.sort(np.array(steady)))) >= -1)


def test_draws_do_not_depend_on_the_curve():
    steady = next(Arrivals(5.0).chunks_ns(Streams(1)["a"], iter([50])))
    curve = RateCurve(DAY)
    curved = next(Arrivals(5.0, curve=curve).chunks_ns(Streams(1)["a"], iter([50])))
    assert np.array_equal(curved, curve.times_ns(steady))


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_arrivals_do_not_depend_on_the_chunks(process: Gaps):
    arrivals = Arrivals(5.0, process, RateCurve(DAY))
    whole = np.concatenate(list(arrivals.chunks_ns(Streams(1)["a"], iter([60]))))
    parts = np.concatenate(list(arrivals.chunks_ns(Streams(1)["a"], iter([7, 1, 30, 12]))))
    assert np.array_equal(parts, whole[:50])


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("cv", [0, -1, 101, math.nan])
def test_an_impossible_cv_is_named(cv: float):
    with pytest.raises(InputError, match=r"arrivals\.cv: .* use a number from 0\.01 to 100"):
        Gamma(cv)


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        ({}, "empty; give at least the factor at 0"),
        ({5: 1.0}, "times go from 0 to below period_s"),
        ({0: 1.0, 90_000: 2.0}, "times go from 0 to below period_s"),
        ({0: -1.0}, "factors must be from 0 and not all 0"),
        ({0: 0.0}, "factors must be from 0 and not all 0"),
        ({0: math.nan}, "factors must be from 0 and not all 0"),
        ({"noon": 1.0}, "is no table {second: factor}"),
    ],
)
def test_an_impossible_curve_is_named(points: dict, complaint: str):
    with pytest.raises(InputError, match=r"rate_curve\.points: ") as error:
        RateCurve(points)
    assert complaint in str(error.value)


def test_a_rate_that_takes_years_under_its_curve_is_refused():
    with pytest.raises(InputError, match="rate_per_s: 1e-05 spreads 900 requests over more than"):
        Arrivals(1e-5, curve=RateCurve({0: 0.5})).check_span(900)
