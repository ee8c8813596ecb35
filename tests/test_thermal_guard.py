"""The thermal guard: which readings drain a card, and which take it back."""

import pytest

from runtime.cards.readers import CardReading
from runtime.cards.thermal_guard import GuardAnswer, ThermalGuard
from viisim.errors import InputError


def hot(junction_c: float | None, card: str = "card1", **fields) -> CardReading:
    return CardReading(card=card, pci="0000:03:00.0", junction_c=junction_c, **fields)


@pytest.fixture
def guard():
    return ThermalGuard(limit_c=100, resume_c=90)


@pytest.fixture
def drained(guard):
    """A guard that has drained `card1`."""
    guard.observe([hot(105)])
    return guard


def test_a_card_below_the_limit_is_let_alone(guard):
    assert guard.observe([hot(99.9)]) == GuardAnswer()


def test_a_card_at_the_limit_is_drained(guard):
    assert guard.observe([hot(100)]) == GuardAnswer(drain=("card1",))


def test_a_hot_card_is_drained_once(drained):
    assert drained.observe([hot(106)]) == GuardAnswer()


def test_a_card_that_has_cooled_is_taken_back(drained):
    assert drained.observe([hot(90)]) == GuardAnswer(resume=("card1",))


def test_a_card_between_the_two_stays_as_it_is(drained):
    assert drained.observe([hot(95)]) == GuardAnswer()


def test_a_card_taken_back_can_be_drained_again(drained):
    drained.observe([hot(60)])
    assert drained.observe([hot(101)]) == GuardAnswer(drain=("card1",))


def test_cards_are_judged_one_by_one(drained):
    answer = drained.observe([hot(80), hot(70, "card2"), hot(110, "card3")])
    assert answer == GuardAnswer(drain=("card3",), resume=("card1",))


def test_the_drained_cards_are_known(drained):
    drained.observe([hot(110, "card3"), hot(50, "card2")])
    assert drained.hot == ("card1", "card3")


def test_a_missing_reading_drains_nothing(guard):
    assert guard.observe([hot(None)]) == GuardAnswer()


def test_an_old_reading_drains_nothing(guard):
    assert guard.observe([hot(120, age_s=10.5)]) == GuardAnswer()


def test_a_missing_reading_takes_nothing_back(drained):
    assert drained.observe([hot(None)]) == GuardAnswer()


def test_an_old_reading_takes_nothing_back(drained):
    assert drained.observe([hot(40, age_s=10.5)]) == GuardAnswer()


def test_without_a_junction_the_edge_counts(guard):
    assert guard.observe([hot(None, edge_c=101)]) == GuardAnswer(drain=("card1",))


@pytest.mark.parametrize("resume_c", [100, 101, float("nan")])
def test_a_card_must_cool_before_it_is_taken_back(resume_c):
    with pytest.raises(InputError, match="give less than limit_c, 100"):
        ThermalGuard(limit_c=100, resume_c=resume_c)
