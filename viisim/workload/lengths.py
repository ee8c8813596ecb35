"""Distributions of prompt and output lengths.

Each maps standard normal variates to token counts by its inverse distribution function, and
never decreases. So two lengths keep the rank correlation of the variates they were drawn from,
and a length moves as little as possible when the distribution's parameters do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from viisim.errors import InputError
from viisim.workload.parameters import MAX_TOKENS, whole

Normals: TypeAlias = NDArray[np.float64]
Tokens: TypeAlias = NDArray[np.int64]


class Lengths(Protocol):
    """A distribution of token counts."""

    @property
    def mean_tokens(self) -> float:
        """The mean before rounding to whole tokens."""

    def tokens(self, normals: Normals) -> Tokens:
        """One count, at least 1, for each standard normal variate."""


class Constant:
    """Always the same number of tokens."""

    def __init__(self, tokens: int, name: str = "tokens") -> None:
        """Raises InputError, naming the parameter as `name`, unless `tokens` is from 1."""
        self._tokens = whole(name, tokens, MAX_TOKENS)
        self.mean_tokens = float(tokens)

    def tokens(self, normals: Normals) -> Tokens:
        """The constant, as often as there are variates."""
        return np.full(normals.shape, self._tokens, dtype=np.int64)


class Geometric:
    """Whole numbers from 1, without memory: the discrete sibling of exponential service."""

    def __init__(self, mean_tokens: float, name: str = "geometric") -> None:
        """Raises InputError, naming the parameter as `name`, unless the mean is from 1."""
        if not 1 <= mean_tokens <= MAX_TOKENS:
            raise InputError(f"{name}: a mean of {mean_tokens!r} is not possible; use at least 1")
        self.mean_tokens = float(mean_tokens)

    def tokens(self, normals: Normals) -> Tokens:
        """Inverse of P(more than k) = (1 - 1/mean)^k, taken in logarithms for the far tail."""
        if self.mean_tokens == 1:
            return np.ones(normals.shape, dtype=np.int64)
        log_tail: Normals = log_ndtr(-normals)
        counts = np.ceil(log_tail / math.log1p(-1 / self.mean_tokens))
        return np.maximum(counts, 1).astype(np.int64)


class QuantileTable:
    """Lengths by their quantiles, linear in between: `{0: 2, 50: 1020, 100: 14050}`.

    Keys are percentages, in any order, with 0 (the shortest) and 100 (the longest); values are
    tokens.
    """

    def __init__(self, table: Mapping[float, float], name: str = "quantiles") -> None:
        """Raises InputError, naming the parameter as `name`, for a table that is no
        distribution of lengths."""
        self.quantiles = dict(sorted(table.items()))
        """Tokens by percentage, in order."""
        percents = np.array(list(self.quantiles), dtype=np.float64)
        tokens = np.array(list(self.quantiles.values()), dtype=np.float64)
        if len(table) < 2 or percents[0] != 0 or percents[-1] != 100:
            raise InputError(f"{name}: a quantile table goes from 0 to 100; add the ends")
        if not np.all(np.diff(tokens) >= 0):
            raise InputError(f"{name}: a quantile is below the one before it; correct the table")
        if not 1 <= tokens[0] <= tokens[-1] <= MAX_TOKENS:
            raise InputError(f"{name}: lengths must be from 1 to {MAX_TOKENS:,} tokens")
        self._shares = percents / 100
        self._tokens = tokens

    @property
    def mean_tokens(self) -> float:
        """The mean of the interpolated distribution."""
        middles = (self._tokens[1:] + self._tokens[:-1]) / 2
        return float(np.sum(middles * np.diff(self._shares)))

    def tokens(self, normals: Normals) -> Tokens:
        """The table's quantile at each variate's own probability, rounded to whole tokens."""
        probabilities: Normals = ndtr(normals)
        tokens = np.interp(probabilities, self._shares, self._tokens)
        return np.rint(tokens).astype(np.int64)


LengthSpec: TypeAlias = "Lengths | int | str | Mapping[str, float] | Mapping[float, float]"
"""How a length is written: a number, a preset's name, `{geometric: mean}` or a quantile table."""


def lengths_from_mapping(
    name: str, mapping: Mapping[str, float] | Mapping[float, float]
) -> Geometric | QuantileTable:
    """`{geometric: mean}` or a quantile table, whose keys may be text. Raises InputError."""
    is_geometric = set(mapping) == {"geometric"}
    try:
        values = [float(value) for value in mapping.values()]
        percents = [] if is_geometric else [float(key) for key in mapping]
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: {dict(mapping)!r} is neither {{geometric: mean}} nor a table "
            "{percent: tokens}; write one of them"
        ) from None
    if is_geometric:
        return Geometric(values[0], f"{name}.geometric")
    return QuantileTable(dict(zip(percents, values, strict=True)), name)
