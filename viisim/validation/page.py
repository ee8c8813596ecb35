"""A validation's report as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from viisim.report import markdown_table, number
from viisim.validation.accuracy import METRICS, WHOLE, Accuracy
from viisim.validation.answers import LATENCIES
from viisim.validation.bootstrap import Interval
from viisim.validation.limits import Check
from viisim.validation.ranking import (
    INCONCLUSIVE,
    PASSED,
    SIGNIFICANT_PAIRS_NEEDED,
    Pair,
    Ranking,
    Verdict,
)
from viisim.validation.steps import BESIDE

if TYPE_CHECKING:
    from viisim.validation.parity import Parity
    from viisim.validation.report import Report

CPU_SHARE = 0.05
"""Client and proxy should have less of the CPU: what they take, the workers lack."""
_SHOWN = 10
"""Differences of journals, or of policies, that a page lists."""


def page(report: Report, pictures: str) -> Iterator[str]:
    yield headline(report)
    if any(not check.passed for check in report.checks):
        yield "## What failed"
        yield _check_table([check for check in report.checks if not check.passed])
    yield from _what_ran(report)
    yield from _accuracy(report)
    yield from _rankings(report)
    yield from _capacities_and_steps(report)
    yield from _parity(report.parity)
    yield from _conditions(report)
    if report.pictures:
        yield "## Figures"
        for file, caption in report.pictures:
            yield f"![{caption}]({pictures}/{file})\n\n{caption}"
    yield "## How to read it"
    yield _HOW_TO_READ
    yield "## Every check"
    yield _check_table(report.checks)
    yield "## Where it is from"
    yield f"    {report.command}"
    yield markdown_table(
        ["numbers", "file"], [[what, f"`{file}`"] for what, file in report.files.items()]
    )


_HOW_TO_READ = """\
- Errors are signed: predicted over measured, less one. Of counts and shares they are differences.
- Measured figures are means over repetitions of one list of requests. Beside an error stands the
  workers' own difference: the mean size of that between two repetitions. Their mean has an error of
  its own, so that even a perfect simulator would seem off by about 0.4 of that difference where
  there are three, 0.5 where there are two: an error smaller than this is luck.
- A limit of a mean latency is what the checks state, or twice the workers' own difference where
  that is more, up to 15%, which is lenient; the headline says how many checks hold only by that.
  Near the capacity latency moves more than load, so there the load at which the simulator has the
  measured E2E counts as well. Beyond it, queues grow for as long as the run lasts: latency is
  reported and not judged.
- Below the capacity throughput follows the arrivals, and an error of it says little; above, it is
  what the workers can do.
- A simulation takes its steps' times from the profile and the machine's gauge. The policies in it
  plan with the profile alone, as those that were deployed did.
- Steps scatter, on some machines more than on others. A profile of the same form, fitted to the
  very steps that are judged and scaled as is best for them, still has the error that stands beside
  the profile's own. A correlation between workers near 1 says that much of what is left is how fast
  the machine happens to be, or what its workers take from each other; near 0, that each scatters
  for itself.
- Answers and their tokens are counted and must be equal at every load.
- In a ranking only pairs count whose measured difference is significant: by a paired bootstrap, and
  so that of those called significant at most 5% are expected to be so by chance (Benjamini and
  Hochberg); intervals are those of 95%, of each pair by itself. Regret is what one loses by taking
  the policy that the simulator has for best."""


# --------------------------------------------------------------------------------------
# The verdict


def headline(report: Report) -> str:
    checks = report.checks
    bad = [check for check in checks if not check.passed]
    reasons = [f"{len(bad)} of {len(checks)} checks do not hold: {_listed(bad)}"] if bad else []
    if not bad:
        lenient = sum(check.lenient for check in checks) or "none"
        reasons = [
            f"all {len(checks)} checks hold ({report.limits.source} limits; {lenient} of them only "
            "by leniency for noise)"
        ]
    if report.missing:
        reasons.append(f"not measured: {', '.join(report.missing)}")
    if report.ranking is not None:
        unjudged = "" if report.limits.judge_ranking else " (not judged)"
        reasons.append(_ranking_words(report.ranking) + unjudged)
    return f"**{report.verdict}**: {'; '.join(reasons)}."


def _listed(checks: Sequence[Check]) -> str:
    """Part by part; checks of a part follow each other."""
    return ", ".join(
        f"{part} ({', '.join(f'{check.what} {_value(check)}' for check in own)})"
        for part, own in groupby(checks, key=lambda check: check.part)
    )


def _ranking_words(verdict: Verdict) -> str:
    if verdict.outcome == INCONCLUSIVE:
        return (
            f"only {verdict.significant} pairs of policies differ significantly, of at least "
            f"{SIGNIFICANT_PAIRS_NEEDED} that a ranking needs"
        )
    right = "as measured" if verdict.outcome == PASSED else "otherwise than measured"
    return (
        f"policies are ranked {right} (Kendall's tau {verdict.tau:.2f} over {verdict.significant} "
        f"significant pairs; regret of the simulated best {verdict.regret:.1%})"
    )


def _check_table(checks: Sequence[Check]) -> str:
    return markdown_table(
        ["part", "what", "off by", "limit", "why that", ""],
        [
            [
                check.part,
                check.what,
                _value(check),
                f"{check.limit:g}" if check.kind == "count" else f"{check.limit:.1%}",
                check.why,
                "holds" if check.passed else "**FAILED**",
            ]
            for check in checks
        ],
    )


def _value(check: Check) -> str:
    if check.value is None:
        return "nothing measured"
    formats = {"error": "+.1%", "size": ".1%", "count": "+g"}
    return format(check.value, formats[check.kind])


# --------------------------------------------------------------------------------------
# Parts


def _what_ran(report: Report) -> Iterator[str]:
    setup = report.setup
    yield "## What ran"
    yield f"{setup.engine}, model {setup.model}, on {setup.machine}."
    errors = sorted({name for worker in setup.workers for name in worker.held_out_error})
    rows = [
        [worker.id, f"`{worker.profile}`", worker.cores]
        + [_size(worker.held_out_error.get(name)) for name in errors]
        + [_size(worker.halted), _percent(worker.gauge_offset)]
        for worker in setup.workers
    ]
    held_out = [f"held out: {name}" for name in errors]
    headings = ["worker", "profile", "cores", *held_out, "machine halted", "gauge at its quickest"]
    yield markdown_table(headings, rows)
    if report.calibration:
        yield "Calibration found:"
        yield markdown_table(
            ["figure", "value"],
            [[one.what, f"{number(one.value)} {one.unit}".strip()] for one in report.calibration],
        )


_SPEED = """\
A machine is faster in some minutes than in others. Errors here and above are with the workers'
speed *as gauged*: beside each worker on the CPU, and on its cores, a small work that is always the
same and has nothing to do with the worker is timed ten times a second, during the calibration and
in all runs. Where it takes g times as long as in the mean of the calibration, in means over two
seconds, decode and prefill are predicted to take so many times as long as the profile says: powers
of g, which the calibration found ("Step times" has what comes of it by run). A gauge that even at
its quickest is more than 3% off that of the calibration ("What ran") is taken to be so much off
always, by itself and not by the machine. Where the machine halted, as the gauge sees by its own
sleep, nothing is predicted to go on. What else could have been assumed:

- *as calibrated*: the profiles alone, as if every hour were like that of the calibration.
- *their own speed*: in each run, steps take as many times what the profile says as they all
  together took there. Known only afterwards, so no prediction. It takes out the machine's speed,
  and with it what is wrong with a profile as a whole; the rest is scheduling, queues and the way to
  the engine."""


def _accuracy(report: Report) -> Iterator[str]:
    if not report.loads:
        return
    yield "## Accuracy"
    yield "Errors of means, in brackets the workers' own difference from run to run."
    metrics = (
        ("ttft_s", "mean"),
        ("tpot_s", "mean"),
        ("e2e_s", "mean"),
        ("throughput_per_s", WHOLE),
    )
    labels = [f"{'mean ' if stat == 'mean' else ''}{METRICS[key].label}" for key, stat in metrics]
    rows = []
    for one in report.loads:
        cells = [f"{one.load:g}", number(one.rate_per_s), f"{one.requests:,} x {one.repetitions}"]
        for key, statistic in metrics:
            row = one.row(key, statistic)
            cells.append(f"{_percent(row.error)} ({_size(row.noise)})" if row else "–")
        rows.append([*cells, _percent(one.load_error)])
    yield markdown_table(["load", "requests/s", "requests", *labels, "load at equal E2E"], rows)
    if any(worker.gauged for worker in report.setup.workers):
        yield _SPEED
    speeds = {
        "as calibrated": [one.as_calibrated for one in report.loads],
        "their own speed": [one.at_own_speed for one in report.loads],
    }
    yield markdown_table(
        [
            "load",
            *(f"mean {METRICS[key].label}, {speed}" for speed in speeds for key in LATENCIES),
        ],
        [
            [f"{one.load:g}", *(_percent(e.get(key)) for e in errors for key in LATENCIES)]
            for one, *errors in zip(report.loads, *speeds.values(), strict=True)
        ],
    )
    for one in report.loads:
        yield f"### Load {one.load:g}"
        yield _row_table(one)


def _row_table(accuracy: Accuracy) -> str:
    rows = []
    for row in accuracy.rows:
        metric = METRICS[row.metric]
        which = "" if row.statistic == WHOLE else f" {row.statistic}"
        amounts = [_amount(metric.unit, value) for value in (row.measured, row.predicted)]
        error, noise = _difference(metric.unit, row.error), _difference(metric.unit, row.noise)
        unit = f", {metric.unit}" if metric.unit == "tokens/s" else ""
        rows.append([metric.label + which + unit, *amounts, error, noise.removeprefix("+")])
    return markdown_table(["", "measured", "predicted", "error", "workers' own difference"], rows)


def _rankings(report: Report) -> Iterator[str]:
    if not report.rankings:
        return
    yield "## Ranking of policies"
    for workload, ranking in report.rankings.items():
        yield f"### {workload}: by {ranking.figure}"
        yield _policy_table(ranking)
        yield _pair_table(ranking.pairs)
        tau = "–" if ranking.tau is None else f"{ranking.tau:.2f}"
        tau_all = "–" if ranking.tau_all is None else f"{ranking.tau_all:.2f}"
        yield (
            f"{ranking.significant} of {len(ranking.pairs)} pairs are significant, in "
            f"{ranking.repetitions} repetitions ({ranking.blocks} blocks of arrivals). Kendall's "
            f"tau over those is {tau}, over all pairs {tau_all}. The simulator's best is "
            f"`{ranking.simulated_best}`, the measured best `{ranking.measured_best}`: a regret of "
            f"{ranking.regret:.1%} {_between(ranking.regret_interval)}."
        )


def _policy_table(ranking: Ranking) -> str:
    return markdown_table(
        [
            "policy",
            "measured",
            "95% interval",
            "simulated",
            "error",
            "as calibrated",
            "their own speed",
            "without an answer",
        ],
        [
            [
                f"`{row.policy}`",
                _amount("s", row.measured),
                f"{_amount('s', row.interval[0])} to {_amount('s', row.interval[1])}",
                _amount("s", row.simulated),
                _percent(row.error),
                _percent(row.as_calibrated),
                _percent(row.at_own_speed),
                str(row.failed),
            ]
            for row in sorted(ranking.rows, key=lambda row: row.measured)
        ],
    )


def _pair_table(pairs: Sequence[Pair]) -> str:
    return markdown_table(
        ["pair", "second over first, less one", "95% interval", "simulated", "ranked"],
        [
            [
                f"`{pair.a}`, `{pair.b}`",
                f"{pair.difference:+.1%}",
                _between(pair.interval),
                f"{pair.simulated_difference:+.1%}",
                _ranked(pair),
            ]
            for pair in pairs
        ],
    )


def _ranked(pair: Pair) -> str:
    if not pair.significant:
        return "no significant difference"
    return "alike" if pair.agrees else "**otherwise**"


def _capacities_and_steps(report: Report) -> Iterator[str]:
    if report.capacities:
        yield "## Capacity"
        rows = [
            [
                one.of,
                f"{number(one.measured)} {one.unit}",
                ", ".join(map(number, one.repetitions)),
                number(one.predicted),
                f"{one.error:+.1%}",
                _percent(one.as_calibrated),
                _percent(one.at_own_speed),
            ]
            for one in report.capacities
        ]
        headings = ["", "measured", "each time", "predicted", "error"]
        yield markdown_table([*headings, "as calibrated", "their own speed"], rows)
    if report.steps:
        yield "## Step times"
        rows = [
            [
                one.worker,
                f"{one.steps:,}",
                f"{one.mape:.1%}",
                f"{one.refitted_mape:.1%}",
                f"{one.total:+.1%}",
                f"{one.total_as_calibrated:+.1%}",
                _range(one.gauged_by_run),
                _range(one.by_run),
                _size(one.gauge_error),
            ]
            for one in report.steps
        ]
        headings = [
            "worker",
            "steps",
            "mean size of a step's error",
            "of a fit to these very steps",
            "all steps",
            "as calibrated",
            "gauged, by run: times as long",
            "measured, by run",
            "between the two",
        ]
        yield markdown_table(headings, rows)
    if any(one.beside for one in report.steps):
        yield "Measured over calibrated, while the other workers of the machine are:"
        rows = [
            [one.worker, *(f"{one.beside[do]:.2f}" if do in one.beside else "–" for do in BESIDE)]
            for one in report.steps
        ]
        yield markdown_table(["worker", *BESIDE], rows)
    if report.step_drift is not None:
        yield (
            "How slow steps are beside others of as many sequences, in means over ten seconds, "
            f"correlates by {report.step_drift:.2f} between the workers of a machine."
        )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _parity(parity: Parity | None) -> Iterator[str]:
    if parity is None:
        return
    found = [*parity.policy_differences, *parity.differences]
    yield "## Parity"
    yield (
        f"{parity.journals} journals of the deployments, {parity.events:,} events and "
        f"{parity.actions:,} actions, were replayed by fresh cores: "
        f"{len(parity.differences) or 'none'} of them differently. Policies deployed otherwise "
        f"than simulated: {len(parity.policy_differences) or 'none'}."
    )
    if found:
        more = [f"- and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        yield "\n".join([*(f"- {line}" for line in found[:_SHOWN]), *more])


def _conditions(report: Report) -> Iterator[str]:
    cpu = {f"load {one.load:g}": one.cpu for one in report.loads if one.cpu is not None}
    cpu |= report.cpu
    if cpu:
        yield "## What measuring took"
        most = max(one.both for one in cpu.values())
        word = "less" if most < CPU_SHARE else "**not less**"
        yield (
            f"Client and proxy had at most {most:.1%} of the machine's CPU time, {word} than the "
            f"{CPU_SHARE:.0%} that are allowed them."
        )
        rows = [[name, f"{one.client:.1%}", f"{one.proxy:.1%}"] for name, one in cpu.items()]
        yield markdown_table(["runs", "client", "proxy"], rows)
    if report.wall_s:
        yield "## How long it took"
        rows = [[part, f"{wall_s / 60:.1f}"] for part, wall_s in report.wall_s.items()]
        yield markdown_table(
            ["part", "minutes"], [*rows, ["all", f"{sum(report.wall_s.values()) / 60:.1f}"]]
        )


# --------------------------------------------------------------------------------------
# Numbers


def _amount(unit: str, value: float) -> str:
    if unit == "s":
        return f"{number(value)} s" if abs(value) >= 0.9995 else f"{number(value, 1000)} ms"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.1f}".removesuffix(".0")


def _difference(unit: str, value: float | None) -> str:
    if value is None:
        return "–"
    if unit == "count":
        return f"{value:+,.1f}".removesuffix(".0")
    return f"{100 * value:+.1f} points" if unit == "share" else f"{value:+.1%}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _size(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _between(interval: Interval) -> str:
    return f"[{interval[0]:+.1%}, {interval[1]:+.1%}]"
