"""Named random streams."""

import pytest

from viisim.errors import InputError
from viisim.streams import Streams


def test_a_stream_is_the_same_generator_each_time_it_is_asked_for():
    streams = Streams(1)
    assert streams["arrivals"] is streams["arrivals"]


def test_equal_seeds_and_names_draw_equal_numbers():
    assert Streams(7)["arrivals"].random() == Streams(7)["arrivals"].random()


def test_other_names_draw_other_numbers():
    streams = Streams(7)
    assert streams["arrivals"].random() != streams["lengths"].random()


def test_other_seeds_draw_other_numbers():
    assert Streams(7)["arrivals"].random() != Streams(8)["arrivals"].random()


def test_a_new_stream_disturbs_no_other():
    alone, among_others = Streams(3), Streams(3)
    among_others["policy"].random(100)
    assert alone["arrivals"].random(5).tolist() == among_others["arrivals"].random(5).tolist()


def test_a_stream_draws_the_same_numbers_in_every_release():
    assert Streams(1)["arrivals"].random() == FIRST_ARRIVALS_DRAW_OF_SEED_1


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match=r"seed: -1 is negative; use a whole number from 0"):
        Streams(-1)


FIRST_ARRIVALS_DRAW_OF_SEED_1 = 0.8395780972376699
