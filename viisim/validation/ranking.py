"""Whether the simulator ranks policies as reality does: Kendall's tau, regret, and a verdict.

Only differences that are shown count, by `viisim.validation.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import stats

from viisim.errors import InputError
from viisim.validation.answers import STATISTICS, Answers, Figure
from viisim.validation.bootstrap import Bootstrap, Interval, interval, p_value

SIGNIFICANT_PAIRS_NEEDED = 6
"""Fewer significant pairs show nothing. Pairs of one ranking are not independent: a random order
of four policies agrees with all six of their pairs in 1 of 24 cases, of five with six that say
"these two before those three" in 1 of 10."""
FALSE_DISCOVERIES = 0.05
"""Of the pairs that are called different, so many may be so by chance."""
TAU_NEEDED = 1.0
REGRET_ALLOWED = 0.02
"""Below it, the policy that the simulator picks is as good as the best."""

PASSED: Literal["PASSED"] = "PASSED"
FAILED: Literal["FAILED"] = "FAILED"
INCONCLUSIVE: Literal["INCONCLUSIVE"] = "INCONCLUSIVE"


@dataclass(frozen=True, slots=True)
class Ranked:
    """One policy's figure, over all requests that it answered."""

    policy: str
    measured: float
    interval: Interval
    simulated: float
    error: float
    """Of the simulated figure, relative to the measured one."""
    as_calibrated: float | None
    at_own_speed: float | None
    """The same without what the gauge says, and with the workers' own speed in each run, as of
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
    p_value: float
    """How often two policies that do not differ are as far apart."""
    significant: bool
    """The difference is shown, though many pairs are looked at."""
    simulated_difference: float
    agrees: bool
    """The simulator has the same one for better; a simulated tie is no agreement."""
    left_out: int
    """Requests that failed under either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Policies of one workload, measured and simulated. Rows and pairs are in the given order."""

    figure: Figure
    rows: tuple[Ranked, ...]
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
    bootstrap = Bootstrap(figure, measured, np.random.default_rng(rng_seed))
    samples = [bootstrap.samples(index) for index in range(len(measured))]
    picked, best = min(guess, key=guess.__getitem__), min(known, key=known.__getitem__)

    def error(policy: str, runs: Mapping[str, Sequence[Answers]] | None) -> float | None:
        return figure.of(runs[policy]) / known[policy] - 1 if runs else None

    regrets = samples[list(known).index(picked)] / np.min(samples, axis=0) - 1
    return Ranking(
        figure=figure,
        rows=tuple(
            Ranked(
                policy=policy,
                measured=known[policy],
                interval=interval(samples[index]),
                simulated=guess[policy],
                error=guess[policy] / known[policy] - 1,
                as_calibrated=error(policy, as_calibrated),
                at_own_speed=error(policy, at_own_speed),
                failed=int(bootstrap.failed[index].sum()),
            )
            for index, policy in enumerate(known)
        ),
        pairs=tuple(_pairs(figure, bootstrap, guess)),
        repetitions=len(bootstrap.blocks),
        blocks=sum(bootstrap.blocks),
        tau_all=_tau_all(list(known.values()), list(guess.values())),
        simulated_best=picked,
        measured_best=best,
        regret=known[picked] / known[best] - 1,
        regret_interval=interval(regrets),
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


def _pairs(figure: Figure, bootstrap: Bootstrap, simulated: Mapping[str, float]) -> Iterator[Pair]:
    """Of many pairs one in twenty that do not differ seems to; Benjamini and Hochberg's procedure
    (Journal of the Royal Statistical Society B 57, 1995) asks the more for it, the fewer do."""
    pairs = [
        _pair(figure, bootstrap, simulated, *two) for two in combinations(enumerate(simulated), 2)
    ]
    adjusted = stats.false_discovery_control([pair.p_value for pair in pairs])
    for pair, among_all in zip(pairs, adjusted, strict=True):
        shown = bootstrap.shows_anything and bool(among_all <= FALSE_DISCOVERIES)
        yield replace(pair, significant=shown)


def _pair(
    figure: Figure,
    bootstrap: Bootstrap,
    simulated: Mapping[str, float],
    first: tuple[int, str],
    second: tuple[int, str],
) -> Pair:
    """As if it were the only one, and not yet called significant."""
    (i, a), (j, b) = first, second
    failed = bootstrap.failed[i] | bootstrap.failed[j]
    both = ~np.isnan(bootstrap.values_s[i] + bootstrap.values_s[j]) & ~failed
    if not both.any():
        raise InputError(f"{a} and {b} answered no request in common: are they the same list?")
    of_a, of_b = bootstrap.values_s[i, both], bootstrap.values_s[j, both]
    differences = bootstrap.samples(j, both) / bootstrap.samples(i, both) - 1
    statistic = STATISTICS[figure.statistic]
    difference = statistic(of_b) / statistic(of_a) - 1
    simulated_difference = simulated[b] / simulated[a] - 1
    return Pair(
        a=a,
        b=b,
        difference=difference,
        interval=interval(differences),
        p_value=p_value(differences),
        significant=False,
        simulated_difference=simulated_difference,
        agrees=difference * simulated_difference > 0,
        left_out=int(failed.sum()),
    )
