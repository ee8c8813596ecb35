"""`thermal_aware`: how a temperature weighs against load."""

import numpy as np
import pytest

from policies.check import check_policy
from policies.interface import Dispatch, Hold
from policies.least_loaded import LeastLoaded
from policies.testing import cluster, request
from policies.thermal_aware import ThermalAware


def card(temperature_c, tokens=0, age_s=0.5):
    return {"temperature_c": temperature_c, "outstanding_tokens": tokens, "age_s": age_s}


def chosen(view, prompt_tokens=1000, **limits):
    """The replica that a prompt of this length goes to."""
    verdict = ThermalAware(**limits).place(request(prompt_tokens=prompt_tokens), view)
    assert isinstance(verdict, Dispatch)
    return verdict.replica_id


def test_keeps_every_clause():
    check_policy(ThermalAware)


def test_without_telemetry_it_is_least_loaded():
    rng = np.random.default_rng(5)
    for tokens in rng.integers(0, 5, size=(50, 4)):
        view = cluster(**{f"r{i}": int(n) for i, n in enumerate(tokens)})
        assert ThermalAware().place(request(), view) == LeastLoaded().place(request(), view)


def test_holds_without_replicas():
    assert ThermalAware().place(request(), cluster()) == Hold()


def test_cool_cards_differ_by_load_alone():
    assert chosen(cluster(r0=card(30, tokens=2), r1=card(89, tokens=1))) == "r1"


def test_of_equal_loads_the_cooler_card_is_taken():
    assert chosen(cluster(r0=card(96), r1=card(93))) == "r1"


def test_a_long_prompt_leaves_the_warm_card():
    """Half way, 2,000 tokens count for 2000 * 0.5 * (1725 / 930 - 1) = 855 more."""
    assert chosen(cluster(r0=card(95), r1=card(50, tokens=850)), prompt_tokens=2000) == "r1"


def test_a_short_prompt_takes_it():
    assert chosen(cluster(r0=card(95), r1=card(50, tokens=850)), prompt_tokens=1900) == "r0"


def test_a_card_at_the_hard_limit_is_avoided_whatever_the_load():
    assert chosen(cluster(r0=card(100), r1=card(50, tokens=10**6)), prompt_tokens=1) == "r1"


def test_when_all_are_too_hot_load_decides():
    assert chosen(cluster(r0=card(104, tokens=300), r1=card(120, tokens=200))) == "r1"


def test_an_old_temperature_counts_for_nothing():
    assert chosen(cluster(r0=card(105, age_s=31), r1=card(50, tokens=1))) == "r0"


def test_the_limits_are_parameters():
    view = cluster(r0=card(75), r1=card(50, tokens=100))
    assert chosen(view, soft_c=60, hard_c=80) == "r1"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"soft_c": 100}, "give less than hard_c, 100"),
        ({"hard_c": "hot"}, "give degrees Celsius"),
    ],
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        ThermalAware(**limits)
