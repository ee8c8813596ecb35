"""Confidence intervals of measured policies: a paired bootstrap over blocks of arrivals.

Requests of one run share a queue, so it is blocks of arrivals that are drawn, not requests, and the
same ones for all policies: what a busy moment does to all of them cancels out. Blocks do not see
what differs from one run to the next (a machine that drifts, a queue that takes another turn), so
the draw has two stages: repetitions, then as many blocks of each as it has, both with replacement
(Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). With K
repetitions the interval's variance is right or too large as long as what a difference varies by
from run to run is at most K - 1 times what it varies by within one.

Two equal policies are called different in 5 % of cases, as promised, where three runs of a minute
forget themselves in 2 s; in 8 % where runs lie 10 % apart besides. Blocks stratified by repetition,
without the first stage, do so in 12 and 19 % (400 sets each, made as in the tests). Intervals are
percentiles. All this is of one pair by itself; `viisim.validation.ranking` looks at many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.validation.answers import Answers, Figure, Floats

BLOCK_S = 5.0
"""Arrivals drawn together: longer than a burst and the queue that it leaves, short enough that
three runs of 45 s have 27. What lasts longer counts as a difference between repetitions."""
RESAMPLES = 2000
BLOCKS_NEEDED = 10
"""An interval from fewer is too narrow by 5 % and more, and shows nothing."""
REPETITIONS_NEEDED = 2
"""A single run does not tell how runs differ, and shows nothing."""

Interval: TypeAlias = tuple[float, float]
Counts: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


class Bootstrap:
    """Measured requests of all policies side by side, and resamples of them, the same for all.

    `measured` has the repetitions of each policy; their requests are paired by id. One that is
    missing under a policy counts as failed there. `figure` says which requests matter, and what
    is made of them.
    """

    def __init__(
        self, figure: Figure, measured: Mapping[str, Sequence[Answers]], rng: np.random.Generator
    ) -> None:
        self._figure = figure
        parts = [_side_by_side(figure, runs) for runs in zip(*measured.values(), strict=True)]
        counts = [int(block.max(initial=-1)) + 1 for _, _, block in parts]
        firsts = np.cumsum([0, *counts[:-1]])
        blocks = [block + first for (_, _, block), first in zip(parts, firsts, strict=True)]
        self.values_s: Floats = np.hstack([values for values, _, _ in parts])
        """A row a policy, a column each request; NaN where the policy's run has no value."""
        self.failed: Flags = np.hstack([failed for _, failed, _ in parts])
        """In the same form."""
        self._block: Counts = np.hstack(blocks)
        """Of each request; numbered through all repetitions."""
        self.blocks = tuple(count for count in counts if count)
        """Of each repetition."""
        self._draws = draws_of(self.blocks, rng)

    @property
    def shows_anything(self) -> bool:
        """Whether there is enough for an interval."""
        return len(self.blocks) >= REPETITIONS_NEEDED and sum(self.blocks) >= BLOCKS_NEEDED

    def samples(self, policy: int, kept: Flags | None = None) -> Floats:
        """The figure of a policy in each resample, over the requests that are kept."""
        values_s, block = self.values_s[policy], self._block
        if kept is not None:
            values_s, block = values_s[kept], block[kept]
        return resampled(self._figure, values_s, block, self._draws)


def _side_by_side(figure: Figure, runs: Sequence[Answers]) -> tuple[Floats, Flags, Counts]:
    """One repetition's values, failures and blocks."""
    columns = {name: at for at, name in enumerate(dict.fromkeys(chain(*(r.ids for r in runs))))}
    values_s = np.full((len(runs), len(columns)), np.nan)
    failed = np.ones(values_s.shape, dtype=np.bool_)
    due_s = np.full(len(columns), np.inf)
    wanted = np.zeros(len(columns), dtype=np.bool_)
    for row, run in enumerate(runs):
        at = [columns[name] for name in run.ids]
        values_s[row, at] = getattr(run, figure.metric)
        failed[row, at] = np.isnan(run.e2e_s)
        due_s[at] = np.minimum(due_s[at], run.due_s)
        wanted[at] = figure.concerns(run)
    _, block = np.unique(due_s[wanted] // BLOCK_S, return_inverse=True)
    return values_s[:, wanted], failed[:, wanted], block


def draws_of(blocks: Sequence[int], rng: np.random.Generator) -> Counts:
    """How often each resample has each block: first repetitions are drawn, then their blocks."""
    count = len(blocks)
    times = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = [
        rng.multinomial(times[:, index] * size, np.full(size, 1 / size))
        for index, size in enumerate(blocks)
    ]
    return np.hstack(drawn)


def resampled(figure: Figure, values: Floats, block: Counts, draws: Counts) -> Floats:
    """The figure in every resample; NaN where no request with a value was drawn."""
    known = ~np.isnan(values)
    values, block = values[known], block[known]
    if figure.statistic == "mean":
        return _means(values, block, draws)
    return _quantiles(values, block, draws, float(figure.statistic[1:]) / 100)


def _means(values: Floats, block: Counts, draws: Counts) -> Floats:
    sums = draws @ np.bincount(block, values, minlength=draws.shape[1])
    sizes = draws @ np.bincount(block, minlength=draws.shape[1])
    means = np.full(len(draws), np.nan)
    np.divide(sums, sizes, out=means, where=sizes > 0)
    return means


def _quantiles(values: Floats, block: Counts, draws: Counts, q: float) -> Floats:
    """`np.quantile` of each resample, without writing its repeated values out."""
    order = np.argsort(values)
    ordered = values[order]
    upto = draws[:, block[order]].cumsum(axis=1)
    last = upto[:, -1] - 1
    place = q * last
    low = np.floor(place).astype(np.int64)
    below, above = (
        ordered[(upto <= at[:, np.newaxis]).sum(axis=1)] for at in (low, np.minimum(low + 1, last))
    )
    quantiles: Floats = below + (place - low) * (above - below)
    quantiles[last < 0] = np.nan
    return quantiles


def interval(samples: Floats) -> Interval:
    """In which 95 % of the samples lie."""
    low, high = np.nanquantile(samples, (0.025, 0.975))
    return float(low), float(high)


def p_value(samples: Floats) -> float:
    """Of the hypothesis that what was resampled is 0, two-sided: 0.05 or less where 0 lies outside
    of the interval. Never 0: the measurement itself is one of the samples."""
    known = samples[~np.isnan(samples)]
    on_one_side = 1 + min((known <= 0).sum(), (known >= 0).sum())
    return min(1.0, float(2 * on_one_side / (len(known) + 1)))
