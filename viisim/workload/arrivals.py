"""Arrival processes: renewal processes of several burstinesses, and rates that change in the day.

A process is a sequence of gaps with mean 1, drawn from one stream in order, so request k does
not depend on how many follow. Gaps are divided by the rate and rounded to whole nanoseconds
before they are summed: sums of whole numbers do not depend on where a chunk begins. A rate curve
then maps that steady time to the time of day (time change of a unit-rate process): the draws are
the same under every curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gamma, gammaln

from viisim.errors import InputError
from viisim.workload import parameters

Floats: TypeAlias = NDArray[np.float64]
Times: TypeAlias = NDArray[np.int64]

LONGEST_SPAN_S = 1e8  # three years: nanoseconds stay far from the end of 64 bits
_LEAST_CV, _MOST_CV = 0.01, 100.0
_TAIL_GAPS = 30
"""A gap above `_TAIL_GAPS * cv**2` means comes once in 10^13, whatever the process."""


class Gaps(Protocol):
    """The gaps of a renewal process, as multiples of their mean."""

    @property
    def cv(self) -> float:
        """Standard deviation over mean; 1 for a Poisson process, above it for bursts."""

    def unit_gaps(self, stream: Generator, count: int) -> Floats:
        """The next `count` gaps, of mean 1."""


class Poisson:
    """Exponential gaps: arrivals without memory."""

    cv = 1.0

    def unit_gaps(self, stream: Generator, count: int) -> Floats:
        """See `Gaps.unit_gaps`."""
        return stream.standard_exponential(count)


class Gamma:
    """Gamma gaps of a stated coefficient of variation; the shape is 1 / cv^2."""

    def __init__(self, cv: float, name: str = "arrivals.cv") -> None:
        """Raises InputError, naming the parameter, for a cv outside 0.01 to 100."""
        self.cv = _coefficient(name, cv)
        self._shape = 1 / cv**2

    @classmethod
    def of_burstiness(cls, burstiness: float) -> Gamma:
        """By the shape, as `vllm bench serve --burstiness` has it: 1 is Poisson, less is
        burstier. Raises InputError for one outside 0.0001 to 10,000."""
        parameters.positive("arrivals.burstiness", burstiness)
        return cls(1 / math.sqrt(burstiness), "arrivals.burstiness: its cv")

    def unit_gaps(self, stream: Generator, count: int) -> Floats:
        """See `Gaps.unit_gaps`."""
        return stream.standard_gamma(self._shape, count) / self._shape

    def spacing(self, stream: Generator, count: int) -> Floats:
        """`count` gaps stretched to add up to 1."""
        # Of shape k: a variate of shape k + 1 times U^(1/k), in logarithms because U^(1/k)
        # underflows for bursty shapes.
        logs = np.log(stream.standard_gamma(self._shape + 1, count))
        return _stretched(logs + np.log1p(-stream.random(count)) / self._shape)


class Weibull:
    """Weibull gaps of a stated coefficient of variation."""

    def __init__(self, cv: float, name: str = "arrivals.cv") -> None:
        """Raises InputError, naming the parameter, for a cv outside 0.01 to 100."""
        self.cv = _coefficient(name, cv)
        self._power = _weibull_power(cv)
        self._mean = float(gamma(1 + self._power))

    def unit_gaps(self, stream: Generator, count: int) -> Floats:
        """See `Gaps.unit_gaps`."""
        gaps: Floats = stream.standard_exponential(count) ** self._power / self._mean
        return gaps

    def spacing(self, stream: Generator, count: int) -> Floats:
        """`count` gaps stretched to add up to 1."""
        return _stretched(self._power * np.log(stream.standard_exponential(count)))


def _coefficient(name: str, cv: float) -> float:
    if not _LEAST_CV <= cv <= _MOST_CV:
        raise InputError(
            f"{name}: {cv!r} is not possible; use a number from {_LEAST_CV} to {_MOST_CV:.0f}"
        )
    return cv


@lru_cache(maxsize=4096)
def _weibull_power(cv: float) -> float:
    """1 / shape of the Weibull distribution whose cv^2 + 1 is E[X^2] / E[X]^2."""

    def excess(power: float) -> float:
        return float(gammaln(1 + 2 * power) - 2 * gammaln(1 + power) - math.log1p(cv**2))

    return float(brentq(excess, 1e-6, 100.0, xtol=1e-12))


def _stretched(logs: Floats) -> Floats:
    """Positive numbers with these logarithms, divided by their sum."""
    gaps: Floats = np.exp(logs - logs.max())
    gaps /= gaps.sum()
    return gaps


class RateCurve:
    """A factor on the rate that changes in time and repeats with its period.

    Between points the factor is interpolated (`linear`; behind the last point towards the first
    of the next period) or stays (`steps`). Factors are used as given: with a mean of 0.5, half
    as many requests arrive in a period as `rate_per_s` alone would bring.
    """

    def __init__(
        self,
        points: Mapping[float, float] | Mapping[str, float],
        period_s: float = 86_400.0,
        shape: Literal["linear", "steps"] = "linear",
    ) -> None:
        """`points`: factor by time in seconds. Raises InputError, naming what is wrong."""
        parameters.positive("rate_curve.period_s", period_s)
        table = _rate_points(points)
        nodes, factors = np.array(list(table)), np.array(list(table.values()))
        if nodes[0] != 0 or nodes[-1] >= period_s:
            raise InputError("rate_curve.points: times go from 0 to below period_s; correct them")
        ends = np.append(factors[1:], factors[0]) if shape == "linear" else factors
        widths = np.diff(nodes, append=period_s)
        areas = widths * (factors + ends) / 2
        if not (np.all(np.isfinite(factors)) and factors.min() >= 0 and areas.sum() > 0):
            raise InputError("rate_curve.points: factors must be from 0 and not all 0; correct")
        self.mean_factor = float(areas.sum() / period_s)
        self._nodes, self._factors, self._slopes = nodes, factors, (ends - factors) / widths
        self._steady_s = np.concatenate(([0.0], np.cumsum(areas)))
        self._period_ns = round(period_s * 1e9)
        self._steady_period_ns = max(round(float(self._steady_s[-1]) * 1e9), 1)

    def times_ns(self, steady_ns: Times) -> Times:
        """The times at which as much has arrived as by `steady_ns` at a factor of 1."""
        periods, rest_ns = np.divmod(steady_ns, self._steady_period_ns)
        rest_s = rest_ns / 1e9
        piece = np.searchsorted(self._steady_s, rest_s, side="right") - 1
        piece = np.minimum(piece, len(self._nodes) - 1)
        area, factor = rest_s - self._steady_s[piece], self._factors[piece]
        # factor * x + slope * x^2 / 2 = area, solved without cancellation.
        root = np.sqrt(np.maximum(factor**2 + 2 * self._slopes[piece] * area, 0))
        steepness = factor + root
        into_s = np.where(steepness > 0, 2 * area / np.where(steepness > 0, steepness, 1), 0)
        offset_ns = np.rint((self._nodes[piece] + into_s) * 1e9).astype(np.int64)
        times: Times = periods * self._period_ns + offset_ns
        return times


def _rate_points(points: Mapping[float, float] | Mapping[str, float]) -> dict[float, float]:
    try:
        table = {float(second): float(factor) for second, factor in points.items()}
    except (TypeError, ValueError):
        raise InputError(
            f"rate_curve.points: {dict(points)!r} is no table {{second: factor}}; write one"
        ) from None
    if not table:
        raise InputError("rate_curve.points: empty; give at least the factor at 0")
    return dict(sorted(table.items()))


class Arrivals:
    """`rate_per_s`, the gaps and the rate curve: the times at which things arrive."""

    def __init__(
        self, rate_per_s: float, gaps: Gaps | None = None, curve: RateCurve | None = None
    ) -> None:
        """Poisson without `gaps`. Raises InputError for an impossible rate."""
        self.rate_per_s = parameters.positive("rate_per_s", rate_per_s)
        self.gaps = gaps or Poisson()
        self.curve = curve

    @property
    def mean_rate_per_s(self) -> float:
        """Over whole periods of the rate curve."""
        return self.rate_per_s * (self.curve.mean_factor if self.curve else 1)

    def check_span(self, count: int, things: str = "requests") -> None:
        """Raises InputError when `count` arrivals would take years."""
        tail = _TAIL_GAPS * max(self.gaps.cv**2 - 1, 0)
        if (count + tail) / self.mean_rate_per_s > LONGEST_SPAN_S:
            raise InputError(
                f"rate_per_s: {self.rate_per_s!r} spreads {count:,} {things} over more than "
                f"{LONGEST_SPAN_S:.0e} s; use a higher rate"
            )

    def chunks_ns(self, stream: Generator, sizes: Iterator[int]) -> Iterator[Times]:
        """The arrival times in order, in chunks of these sizes; they never decrease."""
        steady_last_ns = last_ns = 0
        for size in sizes:
            times = steady_last_ns + np.cumsum(self._gaps_ns(stream, size))
            steady_last_ns = int(times[-1])
            if self.curve is not None:
                # Rounding may swap neighbours a nanosecond apart.
                times = np.maximum.accumulate(np.maximum(self.curve.times_ns(times), last_ns))
                last_ns = int(times[-1])
            yield times

    def _gaps_ns(self, stream: Generator, count: int) -> Times:
        gaps_s = self.gaps.unit_gaps(stream, count) / self.rate_per_s
        return np.rint(gaps_s * 1e9).astype(np.int64)
