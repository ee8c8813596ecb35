"""Whether the simulator ranks policies as reality does: Kendall's tau, regret, and a verdict.

Only differences that are shown count, by a paired bootstrap over the measured requests. Requests
of one run share a queue, so it is blocks of arrivals that are drawn, not requests, and the same
ones for all policies: what a busy moment does to all of them cancels out. Blocks do not see what
differs from one run to the next (a machine that drifts, a queue that takes another turn), so the
draw has two stages: repetitions, then as many blocks of each as it has, both with replacement
(Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). With K
repetitions the interval's variance is right or too large as long as what a difference varies by
from run to run is at most K - 1 times what it varies by within one.

Two equal policies are called different in 5 % of cases, as promised, where three runs of a minute
forget themselves in 2 s; in 8 % where runs lie 10 % apart besides. Blocks stratified by repetition,
without the first stage, do so in 12 and 19 % (400 sets each, made as in the tests). Intervals are
percentiles, and each pair is judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from viisim.errors import InputError
from viisim.validation.answers import LATENCIES, STATISTICS, Answers, Floats

BLOCK_S = 5.0
"""Arrivals drawn together: longer than a burst and the queue that it leaves, short enough that
three runs of 45 s have 27. What lasts longer counts as a difference between repetitions."""
RESAMPLES = 2000
BLOCKS_NEEDED = 10
"""An interval from fewer is too narrow by 5 % and more, and shows nothing."""
REPETITIONS_NEEDED = 2
"""A single run does not tell how runs differ, and shows nothing."""

SIGNIFICANT_PAIRS_NEEDED = 6
"""Fewer significant pairs show nothing. Pairs of one ranking are not independent: a random order
of four policies agrees with all six of their pairs in 1 of 24 cases, of five with six that say
"these two before those three" in 1 of 10."""
TAU_NEEDED = 1.0
REGRET_ALLOWED = 0.02
"""Below it, the policy that the simulator picks is as good as the best."""

PASSED: Literal["PASSED"] = "PASSED"
FAILED: Literal["FAILED"] = "FAILED"
INCONCLUSIVE: Literal["INCONCLUSIVE"] = "INCONCLUSIVE"

Interval: TypeAlias = tuple[float, float]
Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Figure:
    """What policies are judged by in a workload. Smaller is better; seconds."""

    metric: str
    """One of `LATENCIES`."""
    statistic: str
    """One of `STATISTICS`."""
    traffic_class: str | None = None
    """None: requests of every class."""

    def __post_init__(self) -> None:
        for word, known in ((self.metric, LATENCIES), (self.statistic, tuple(STATISTICS))):
            if word not in known:
                raise InputError(f"unknown figure '{word}'; it is one of {', '.join(known)}")

    def __str__(self) -> str:
        name = f"{self.statistic} {self.metric.removesuffix('_s').upper()}"
        return name if self.traffic_class is None else f"{name} of {self.traffic_class}"

    def of(self, runs: Sequence[Answers]) -> float:
        """The figure of all requests of the repetitions. Raises InputError if none has it."""
        values = [run.latencies(self.metric, self.traffic_class) for run in runs]
        if not any(known.size for known in values):
            classes = sorted(set(chain.from_iterable(run.traffic_class for run in runs)))
            raise InputError(
                f"no answered request has a {self}; there are requests of "
                f"{', '.join(classes) or 'no class'}"
            )
        return STATISTICS[self.statistic](np.concatenate(values))

    def concerns(self, run: Answers) -> NDArray[np.bool_]:
        """Which requests are of its traffic class."""
        if self.traffic_class is None:
            return np.ones(len(run), dtype=np.bool_)
        return np.array([name == self.traffic_class for name in run.traffic_class], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy's figure, over all requests that it answered."""

    policy: str
    measured: float
    interval: Interval
    simulated: float
    error: float
    """Of the simulated figure, relative to the measured one."""
    as_calibrated: float | None
    at_own_speed: float | None
    """The same without what the probes say, and with the workers' own speed in each run, as of
    `Accuracy`."""
    failed: int
    """Requests that the real workers left without a whole answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two policies, over the requests that both answered. Differences are b's figure over a's,
    less one: positive where a is better."""

    a: str
    b: str
    difference: float
    interval: Interval
    significant: bool
    """0 lies outside the interval."""
    simulated_difference: float
    agrees: bool
    """The simulator has the same one for better; a simulated tie is no agreement."""
    left_out: int
    """Requests that failed under either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Policies of one workload, measured and simulated. Rows and pairs are in the given order."""

    figure: Figure
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    repetitions: int
    blocks: int
    """Of all repetitions together."""
    tau_all: float | None
    """Kendall's tau-b over all policies, shown differences or not; None if all are equal."""
    simulated_best: str
    measured_best: str
    regret: float
    """Measured figure of the simulated best over that of the measured best, less one."""
    regret_interval: Interval
    """Leans upwards: in each resample the best is the one that was lucky there."""

    @property
    def significant(self) -> int:
        """Pairs whose measured difference is shown."""
        return sum(pair.significant for pair in self.pairs)

    @property
    def concordant(self) -> int:
        """Significant pairs that the simulator ranks as measured."""
        return sum(pair.significant and pair.agrees for pair in self.pairs)

    @property
    def tau(self) -> float | None:
        """Kendall's tau over the significant pairs; None without any."""
        return _tau(self.concordant, self.significant)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "label": str(self.figure),
            "significant": self.significant,
            "concordant": self.concordant,
            "tau": self.tau,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rankings of all workloads show together."""

    outcome: Literal["PASSED", "FAILED", "INCONCLUSIVE"]
    significant: int
    tau: float | None
    """Over the significant pairs of all workloads; None without any."""
    regret: float
    """The largest of any workload."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def overall(rankings: Sequence[Ranking]) -> Verdict:
    """The verdict on at least one ranking; give one a workload, or its pairs count twice."""
    significant = sum(ranking.significant for ranking in rankings)
    tau = _tau(sum(ranking.concordant for ranking in rankings), significant)
    regret = max(ranking.regret for ranking in rankings)
    if tau is None or significant < SIGNIFICANT_PAIRS_NEEDED:
        return Verdict(INCONCLUSIVE, significant, tau, regret)
    right = tau >= TAU_NEEDED and regret < REGRET_ALLOWED
    return Verdict(PASSED if right else FAILED, significant, tau, regret)


def rank(
    figure: Figure,
    measured: Mapping[str, Sequence[Answers]],
    simulated: Mapping[str, Sequence[Answers]],
    as_calibrated: Mapping[str, Sequence[Answers]] | None = None,
    at_own_speed: Mapping[str, Sequence[Answers]] | None = None,
    rng_seed: int = 0,
) -> Ranking:
    """Rank policies by their repetitions, which have the same request lists in the same order.
    `as_calibrated` and `at_own_speed` are the same simulated otherwise, as `Accuracy` says, on
    which no rank depends.

    Measured requests are paired by id. One that is missing under a policy counts as failed there:
    a session that broke off. Raises InputError if the policies or their runs do not match.
    """
    _check(measured, simulated)
    known = {policy: figure.of(runs) for policy, runs in measured.items()}
    guess = {policy: figure.of(simulated[policy]) for policy in measured}
    table = _tabulate(figure, measured)
    draws = _draws(table.blocks, np.random.default_rng(rng_seed))
    samples = [_resampled(figure, values, table.block, draws) for values in table.values_s]
    picked, best = min(guess, key=guess.__getitem__), min(known, key=known.__getitem__)

    def error(policy: str, runs: Mapping[str, Sequence[Answers]] | None) -> float | None:
        return figure.of(runs[policy]) / known[policy] - 1 if runs else None

    regrets = samples[list(known).index(picked)] / np.min(samples, axis=0) - 1
    return Ranking(
        figure=figure,
        rows=tuple(
            Row(
                policy=policy,
                measured=known[policy],
                interval=_interval(samples[index]),
                simulated=guess[policy],
                error=guess[policy] / known[policy] - 1,
                as_calibrated=error(policy, as_calibrated),
                at_own_speed=error(policy, at_own_speed),
                failed=int(table.failed[index].sum()),
            )
            for index, policy in enumerate(known)
        ),
        pairs=tuple(_pairs(figure, table, draws, guess)),
        repetitions=len(table.blocks),
        blocks=sum(table.blocks),
        tau_all=_tau_all(list(known.values()), list(guess.values())),
        simulated_best=picked,
        measured_best=best,
        regret=known[picked] / known[best] - 1,
        regret_interval=_interval(regrets),
    )


def _check(
    measured: Mapping[str, Sequence[Answers]], simulated: Mapping[str, Sequence[Answers]]
) -> None:
    if len(measured) < 2:
        raise InputError(f"a ranking needs two policies or more; measured: {', '.join(measured)}")
    if odd := sorted(measured.keys() ^ simulated.keys()):
        raise InputError(f"policies must be measured and simulated both: {', '.join(odd)}")
    if len({len(runs) for runs in measured.values()}) > 1:
        counts = ", ".join(f"{policy} {len(runs)}" for policy, runs in measured.items())
        raise InputError(f"every policy needs the same measured repetitions; there are: {counts}")
    for policy, runs in measured.items():
        if any(len(set(run.ids)) != len(run) for run in runs):
            raise InputError(f"measured runs of {policy}: every request needs an id of its own")


def _tau(concordant: int, pairs: int) -> float | None:
    return (2 * concordant - pairs) / pairs if pairs else None


def _tau_all(measured: Sequence[float], simulated: Sequence[float]) -> float | None:
    tau = float(stats.kendalltau(measured, simulated).statistic)
    return None if math.isnan(tau) else tau


# --------------------------------------------------------------------------------------
# Measured requests, side by side


@dataclass(frozen=True, slots=True)
class _Table:
    """Requests of all repetitions: a column each; a row a policy."""

    values_s: Floats
    """NaN where the policy's run has none."""
    failed: NDArray[np.bool_]
    block: Counts
    """Of each request; numbered through all repetitions."""
    blocks: tuple[int, ...]
    """Of each repetition."""


def _tabulate(figure: Figure, measured: Mapping[str, Sequence[Answers]]) -> _Table:
    parts = [_side_by_side(figure, runs) for runs in zip(*measured.values(), strict=True)]
    blocks = [int(block.max(initial=-1)) + 1 for _, _, block in parts]
    firsts = np.cumsum([0, *blocks[:-1]])
    return _Table(
        values_s=np.hstack([values for values, _, _ in parts]),
        failed=np.hstack([failed for _, failed, _ in parts]),
        block=np.hstack(
            [block + first for (_, _, block), first in zip(parts, firsts, strict=True)]
        ),
        blocks=tuple(count for count in blocks if count),
    )


def _side_by_side(
    figure: Figure, runs: Sequence[Answers]
) -> tuple[Floats, NDArray[np.bool_], Counts]:
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


# --------------------------------------------------------------------------------------
# The bootstrap


def _draws(blocks: Sequence[int], rng: np.random.Generator) -> Counts:
    """How often each resample has each block: first repetitions are drawn, then their blocks."""
    count = len(blocks)
    times = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = [
        rng.multinomial(times[:, index] * size, np.full(size, 1 / size))
        for index, size in enumerate(blocks)
    ]
    return np.hstack(drawn)


def _resampled(figure: Figure, values: Floats, block: Counts, draws: Counts) -> Floats:
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


def _interval(samples: Floats) -> Interval:
    low, high = np.nanquantile(samples, (0.025, 0.975))
    return float(low), float(high)


def _pairs(
    figure: Figure, table: _Table, draws: Counts, simulated: Mapping[str, float]
) -> Iterator[Pair]:
    enough = len(table.blocks) >= REPETITIONS_NEEDED and sum(table.blocks) >= BLOCKS_NEEDED
    for (i, a), (j, b) in combinations(enumerate(simulated), 2):
        failed = table.failed[i] | table.failed[j]
        both = ~np.isnan(table.values_s[i] + table.values_s[j]) & ~failed
        if not both.any():
            raise InputError(f"{a} and {b} answered no request in common: are they the same list?")
        of_a, of_b = table.values_s[i, both], table.values_s[j, both]
        block = table.block[both]
        low, high = _interval(
            _resampled(figure, of_b, block, draws) / _resampled(figure, of_a, block, draws) - 1
        )
        statistic = STATISTICS[figure.statistic]
        difference = statistic(of_b) / statistic(of_a) - 1
        simulated_difference = simulated[b] / simulated[a] - 1
        yield Pair(
            a=a,
            b=b,
            difference=difference,
            interval=(low, high),
            significant=enough and (low > 0 or high < 0),
            simulated_difference=simulated_difference,
            agrees=difference * simulated_difference > 0,
            left_out=int(failed.sum()),
        )
