"""Length distributions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.errors import InputError
from viisim.workload.lengths import Constant, Geometric, QuantileTable, lengths_from_mapping

NORMALS = np.random.default_rng(1).standard_normal(100_000)

percents = st.lists(st.floats(0.1, 99.9), max_size=8, unique=True)


@st.composite
def tables(draw: st.DrawFn) -> QuantileTable:
    inner = sorted(draw(percents))
    tokens = sorted(draw(st.lists(st.integers(1, 10_000), min_size=len(inner) + 2, max_size=10)))
    keys = [0.0, *inner, 100.0]
    return QuantileTable(dict(zip(keys, tokens, strict=False)))


@given(tables(), st.lists(st.floats(-40, 40), min_size=2))
def test_the_inverse_of_a_table_never_decreases(table: QuantileTable, normals: list[float]):
    tokens = table.tokens(np.sort(np.array(normals)))
    assert np.all(np.diff(tokens) >= 0)


def test_a_table_gives_its_own_quantiles_at_their_probabilities():
    table = QuantileTable({0: 10, 50: 20, 100: 120})
    quartiles = np.array([-np.inf, -0.6744897501960817, 0.0, 0.6744897501960817, np.inf])
    assert table.tokens(quartiles).tolist() == [10, 15, 20, 70, 120]


def test_the_mean_of_a_table_is_that_of_its_straight_pieces():
    assert QuantileTable({0: 10, 50: 20, 100: 120}).mean_tokens == 0.5 * 15 + 0.5 * 70


def test_a_table_may_be_written_in_any_order_and_with_text_as_keys():
    table = lengths_from_mapping("output_tokens", {"0": 1, "100": 9, "50": 2})
    assert table.tokens(np.array([0.0])).tolist() == [2]


def test_a_constant_is_always_the_same():
    assert Constant(512).tokens(NORMALS[:3]).tolist() == [512, 512, 512]


@pytest.mark.parametrize("mean", [1, 1.5, 20, 3000])
def test_a_geometric_length_has_the_mean_and_the_spread_of_theory(mean: float):
    tokens = Geometric(mean).tokens(NORMALS)
    deviation = np.sqrt(mean * (mean - 1))
    assert tokens.min() == 1
    # Four standard errors: of a mean, and of a deviation whose kurtosis is 9 as an exponential's.
    assert abs(tokens.mean() - mean) <= 4 * deviation / np.sqrt(NORMALS.size)
    assert abs(tokens.std() - deviation) <= 4 * deviation * np.sqrt(8 / (4 * NORMALS.size))


def test_a_geometric_length_is_memoryless():
    tokens = Geometric(10).tokens(NORMALS)
    share_above_5 = np.mean(tokens > 5)
    expected = 0.9**5
    assert abs(share_above_5 - expected) <= 4 * np.sqrt(expected * (1 - expected) / NORMALS.size)


@pytest.mark.parametrize(
    ("mapping", "complaint"),
    [
        ({0: 1, 50: 5}, "goes from 0 to 100"),
        ({}, "goes from 0 to 100"),
        ({0: 1, 50: 9, 100: 5}, "a quantile is below the one before it"),
        ({0: 0, 100: 5}, "lengths must be from 1"),
        ({0: 1, 100: float("inf")}, "lengths must be from 1"),
        ({"mean": 5}, "neither {geometric: mean} nor a table"),
        ({0: "few", 100: "many"}, "neither {geometric: mean} nor a table"),
        ({"geometric": 0.5}, "a mean of 0.5 is not possible"),
        ({"geometric": float("nan")}, "a mean of nan is not possible"),
    ],
)
def test_a_table_that_is_no_distribution_of_lengths_is_refused(mapping, complaint: str):
    with pytest.raises(InputError, match=f"^prompt_tokens.*{complaint}"):
        lengths_from_mapping("prompt_tokens", mapping)
