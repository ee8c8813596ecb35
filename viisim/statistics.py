"""Honest statistics over seeds: intervals of means, paired differences, and what they show.

Seeds are independent, so a figure of a policy is estimated by its mean over seeds with Student's
95 % interval. Policies under comparison are given the same arrivals and lengths in a seed, so
their difference is estimated from the differences within seeds, which vary far less than the
figures themselves.

A verdict on k policies against one baseline is k tests of one figure; Holm's step-down method
(1979) keeps the chance of any false verdict among them at 5 %. Intervals are left as they are:
one may lie beside 0 while the verdict, which had more ways to be wrong, shows nothing. Figures,
settings and loads are each judged by themselves: of twenty verdicts of "better" or "worse" on
equal policies one is to be expected, so a claim names its figure before it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
"""Chance of a false verdict that is accepted, over all policies compared in one figure."""

Direction: TypeAlias = Literal["higher", "lower", "neither"]
"""Which values of a figure are better."""

NO_DIFFERENCE = "no difference shown"
UNKNOWN = "too few seeds"


class Estimate(TypedDict):
    """Mean over the `seeds` seeds where the figure is defined, and its 95 % half width.

    None where undefined: the mean without any seed, the half width with fewer than two.
    """

    mean: float | None
    half_width: float | None
    seeds: int


class Difference(Estimate):
    """A figure less the baseline's in the same seed, over the seeds where both are defined."""

    p_value: float | None
    """Of the two-sided paired t test, six digits; None with fewer than two seeds."""


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and 95 % Student t half width of independent values, one a seed."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    n = known.size
    half_width = None
    if n > 1:
        # Six decimals of t, as printed tables have: the same figure whatever the C library.
        t = round(float(stats.t.ppf(0.975, n - 1)), 6)
        half_width = t * float(known.std(ddof=1)) / n**0.5
    return {"mean": float(known.mean()) if n else None, "half_width": half_width, "seeds": n}


def paired_difference(
    values: Sequence[float | None], baseline: Sequence[float | None]
) -> Difference:
    """How a figure differs from the baseline's. Both have one value a seed, in equal order."""
    gaps = [
        one - other
        for one, other in zip(values, baseline, strict=True)
        if one is not None and other is not None
    ]
    return {**estimate(gaps), "p_value": _p_value(gaps)}


def _p_value(gaps: Sequence[float]) -> float | None:
    n = len(gaps)
    if n < 2:
        return None
    mean, spread = float(np.mean(gaps)), float(np.std(gaps, ddof=1))
    if spread == 0:  # every seed says the same
        return float(mean == 0)
    p = 2 * float(stats.t.sf(abs(mean) / (spread / n**0.5), n - 1))
    return float(f"{p:.6g}")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values of one family, adjusted: below 0.05 means shown. Unknown ones stay None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = float(f"{largest:.6g}")
    return adjusted


def verdict(difference: Estimate, adjusted_p: float | None, better: Direction) -> str:
    """`better`, `worse`, `no difference shown` or `too few seeds`; where neither direction is
    better, `higher` or `lower`."""
    if adjusted_p is None or difference["mean"] is None:
        return UNKNOWN
    if adjusted_p >= SIGNIFICANCE:
        return NO_DIFFERENCE
    change = "higher" if difference["mean"] > 0 else "lower"
    if better == "neither":
        return change
    return "better" if change == better else "worse"
