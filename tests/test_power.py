"""Power, energy, cost and heat against sums done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.errors import InputError
from viisim.hardware import load_device
from viisim.power import (
    Cooling,
    CostModel,
    PowerDraw,
    ThermalState,
    energy_j,
    mean_power_w,
    per_million,
    power_draw,
    prefill_slowdown,
    purchase_usd,
    sampled_power_w,
)

VII = load_device("radeon_vii")
DRAW = PowerDraw(idle_w=20, decode_w=150, prefill_w=250)


def test_a_radeon_vii_draws_its_cap_in_prefill_and_less_in_decode() -> None:
    draw = power_draw(VII)
    assert (draw.decode_w, draw.prefill_w) == (150, 250)


def test_an_unknown_idle_power_is_assumed_and_said_so() -> None:
    draw = power_draw(VII)
    assert draw.idle_w == 25
    assert "idle 25 W is assumed: 10% of the cap" in draw.assumptions


def test_a_known_idle_power_is_taken() -> None:
    draw = power_draw(VII, idle_w=18)
    assert draw.idle_w == 18
    assert not any("idle" in assumption for assumption in draw.assumptions)


def test_a_cap_bounds_prefill_and_decode() -> None:
    draw = power_draw(VII, cap_w=120)
    assert (draw.decode_w, draw.prefill_w) == (120, 120)


def test_a_cap_above_the_default_changes_nothing() -> None:
    assert power_draw(VII, cap_w=400) == power_draw(VII)


def test_a_cap_below_the_idle_power_is_refused() -> None:
    with pytest.raises(InputError, match="20 W is not above the 25 W"):
        power_draw(VII, cap_w=20)


def test_four_cards_draw_four_times_as_much() -> None:
    assert (DRAW * 4).prefill_w == 1000


def test_the_slowdown_is_the_measured_one_between_225_and_150_watts() -> None:
    ratio = prefill_slowdown(VII, 150) / prefill_slowdown(VII, 225)
    assert ratio == pytest.approx(2534 / 2138, rel=0.002)


def test_nothing_slows_at_the_default_cap() -> None:
    assert prefill_slowdown(VII, 250) == prefill_slowdown(VII, 300) == 1


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="cap_w: must be above 0"):
        prefill_slowdown(VII, 0)


def test_mean_power_weighs_the_three_states() -> None:
    assert mean_power_w(DRAW, 0.5, 0.2) == pytest.approx(0.5 * 20 + 0.3 * 150 + 0.2 * 250)


def test_power_between_samples_follows_the_counters() -> None:
    watts = sampled_power_w(DRAW, [0, 1, 3], busy_s=[0, 0, 2], prefill_s=[0, 0, 1])
    assert watts.tolist() == [20, 200]


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1)), min_size=1),
)
def test_sampled_power_integrates_to_the_energy(spans: list[tuple[float, float, float]]) -> None:
    time, busy, prefill = [0.0], [0.0], [0.0]
    for span, busy_share, prefill_share in spans:
        time.append(time[-1] + span)
        busy.append(busy[-1] + span * busy_share)
        prefill.append(prefill[-1] + span * busy_share * prefill_share)
    total = float((sampled_power_w(DRAW, time, busy, prefill) * np.diff(time)).sum())
    assert total == pytest.approx(energy_j(DRAW, time[-1], busy[-1], prefill[-1]))


def test_energy_per_million_tokens_needs_tokens() -> None:
    assert per_million(250, 100) == 2.5e6
    assert per_million(250, 0) is None


def test_cost_is_purchase_and_electricity() -> None:
    cost = CostModel(purchase_usd=8766, lifetime_years=1, usd_per_kwh=0.2, host_w=100, overhead=1.1)
    assert cost.usd_per_hour(400) == pytest.approx(1 + 0.55 * 0.2)
    # 1.11 dollars buy 3,600 x 100 tokens.
    assert cost.usd_per_million_tokens(400, 100) == pytest.approx(1.11 / 0.36)
    assert cost.usd_per_million_tokens(400, 0) is None


def test_the_electricity_of_a_run_is_its_energy() -> None:
    cost = CostModel(purchase_usd=0, usd_per_kwh=0.5, host_w=100)
    assert cost.electricity_usd(cards_j=3.6e6, duration_s=3600) == pytest.approx(0.5 * 1.1)


def test_a_price_that_nobody_knows_is_none() -> None:
    assert purchase_usd(load_device("mi250x_gcd"), 8) is None
    assert purchase_usd(VII, 4, host_usd=500) == 2900


def test_a_passive_card_throttles_after_a_minute() -> None:
    state, seconds = ThermalState(), 0
    while not state.throttled:
        state, seconds = state.after(250, 1), seconds + 1
    assert 55 <= seconds <= 65
    assert state.clock == pytest.approx(930 / 1725)


def test_a_throttled_card_recovers_below_the_resume_temperature() -> None:
    hot = ThermalState(Cooling(), junction_c=95, throttled=True)
    assert hot.after(100, 1).throttled
    assert not hot.after(0, 60).throttled


def test_a_cool_card_settles() -> None:
    assert ThermalState().after(100, 1e6).junction_c == pytest.approx(30 + 45)


@given(st.floats(0, 400), st.floats(0.1, 50), st.floats(0.1, 50))
def test_two_spans_heat_as_one(watts: float, first_s: float, second_s: float) -> None:
    at_once = ThermalState().after(watts, first_s + second_s).junction_c
    in_two = ThermalState().after(watts, first_s).after(watts, second_s).junction_c
    assert in_two == pytest.approx(at_once)
