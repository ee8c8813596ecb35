"""Writes docs/policies.md: every policy's own words, and what a standard comparison shows.

    python docs/make_policies.py

Runs the comparisons named on the page into runs/policies (again only what is not there yet) and
fills the page from their files; no figure on it is written by hand.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policies.registry import policy_class, policy_names
from viisim.cells import settings_of
from viisim.compare import Compared, compare

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "policies"
SEEDS = "seeds=[1,2,3,4,5]"

COLUMNS = {
    "goodput_requests_per_s": ("goodput (requests/s)", 3),
    "slo_attainment": ("met every SLO (%)", 0),
    "ttft_s.p99": ("TTFT p99 (s)", 1),
    "tpot_s.mean": ("TPOT mean (ms)", 0),
    "e2e_s.p99": ("E2E p99 (s)", 1),
    "prefix_hit_rate": ("prefix hits (%)", 1),
}

SCALES = {"slo_attainment": 100, "tpot_s.mean": 1000, "prefix_hit_rate": 100}
"""From the units of the files to those of the page."""


class Study:
    """One experiment under several policies."""

    def __init__(
        self,
        experiment: str,
        policies: Sequence[str],
        loads: Sequence[float] = (),
        overrides: Sequence[str] = (),
        name: str = "",
    ) -> None:
        self.command = f"viisim compare experiments/{experiment}.yaml --policies " + ",".join(
            policies
        )
        if loads:
            self.command += " --load " + ",".join(map(str, loads))
        for override in overrides:
            self.command += f" --set {override}"
        settings = settings_of(
            [ROOT / "experiments" / f"{experiment}.yaml"], policies, [*overrides, SEEDS]
        )
        self.found: Compared = compare(RUNS / (name or experiment), settings, loads, jobs=2)
        self.cells = self.found.comparison["cells"]
        print(f"{name or experiment}: {len(self.cells)} cells, {self.found.reused} taken over")

    def value(
        self, policy: str, metric: str, load: float | None = None, part: str | None = None
    ) -> dict[str, Any] | None:
        """An estimate: mean and half width of its 95 % interval."""
        cell: Any = self._cell(policy, load)
        values = cell["values"] if part is None else cell["classes"][part]
        found: dict[str, Any] | None = values.get(metric)
        scale = SCALES.get(metric, 1)
        if found is None or found["mean"] is None:
            return None
        half_width = found["half_width"]
        return {
            "mean": scale * found["mean"],
            "half_width": None if half_width is None else scale * half_width,
        }

    def says(
        self,
        policy: str,
        metric: str,
        load: float | None = None,
        part: str | None = None,
        digits: int = 1,
    ) -> str:
        """An estimate in words."""
        return _words(self.value(policy, metric, load, part), digits)

    def table(self, load: float | None = None) -> list[str]:
        """All policies of the study, a line each."""
        heads = [head for head, _ in COLUMNS.values()]
        lines = [f"| policy | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for policy in self.policies:
            figures = [
                _words(self.value(policy, metric, load), digits)
                for metric, (_, digits) in COLUMNS.items()
            ]
            star = "\\*" if self._cell(policy, load)["saturated_seeds"] else ""
            lines.append(f"| `{policy}`{star} | {' | '.join(figures)} |")
        return lines

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(cell["variant"] for cell in self.cells))

    def tenants(self, policy: str) -> Any:
        """The summary's figures by tenant."""
        return self._run(policy).summary["tenants"]

    def largest_share(self, policy: str) -> float:
        """Of all requests, the share that went to the replica that got most, in percent."""
        replicas = self._run(policy).requests(None, ["replica"])["replica"].to_numpy()
        counts = np.bincount(replicas[replicas >= 0])
        return 100 * float(counts.max() / counts.sum())

    def best_other(self, policy: str, metric: str, left_out: Sequence[str] = ()) -> str:
        """Which other policy has the highest mean."""
        others = [p for p in self.policies if not p.startswith(policy) and p not in left_out]
        return max(others, key=lambda other: self.value(other, metric)["mean"])

    def _cell(self, policy: str, load: float | None) -> Any:
        return next(c for c in self.cells if c["variant"] == policy and c["load"] == load)

    def _run(self, policy: str) -> Any:
        return next(run for cell, run in self.found.runs if cell.variant == policy)


def _words(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None or estimate["mean"] is None:
        return "–"
    mean, half_width = estimate["mean"], estimate["half_width"]
    text = f"{mean:,.{digits}f}"
    return text if half_width is None else f"{text} ± {half_width:,.{digits}f}"


def gain(study: Study, policy: str, other: str, metric: str = "goodput_requests_per_s") -> str:
    """By how much one policy's mean exceeds another's, in percent."""
    ours, theirs = study.value(policy, metric), study.value(other, metric)
    assert ours is not None
    assert theirs is not None
    return f"{100 * (ours['mean'] / theirs['mean'] - 1):+.0f} %"


# --------------------------------------------------------------------------------------
# The page


def main() -> None:
    every = [name for name in policy_names() if name != "random"] + ["twin/shed_late=true"]
    studies = {
        name: Study(name, every)
        for name in (
            "policy_comparison",
            "interactive_vs_batch",
            "tenants",
            "prefix_routing",
            "slow_card",
        )
    }
    overload = Study(
        "interactive_vs_batch",
        ["least_loaded", "hybrid", "twin"],
        [1.1],
        name="interactive_overload",
    )
    first_come = ["cluster.replicas.0.engine.scheduling_policy=fcfs"]
    unordered = [
        Study("interactive_vs_batch", ["least_loaded"], loads, first_come, f"first_come{suffix}")
        for loads, suffix in (((), ""), ([1.1], "_overload"))
    ]
    one_prefix = Study(
        "prefix_routing",
        ["least_loaded", "cache_aware", "twin"],
        overrides=[
            "workload.prefixes.groups=1",
            "workload.prefixes.share=1.0",
            "workload.prefixes.tokens=3072",
            "workload.turns=1",
        ],
        name="one_prefix",
    )
    page = [
        "# Policies",
        "",
        "Made by `python docs/make_policies.py` from the docstrings and from the runs named below: "
        "five seeds each, the same requests for every policy, means with 95 % intervals. "
        "Four simulated Radeon VII (profile `radeon_vii/qwen3-vl-8b-awq`, which extrapolates above "
        "four sequences), no length predictor. \\*: saturated in some seed.",
        "",
        *_claims(studies, overload, unordered, one_prefix),
        *_tables([*studies.values(), one_prefix]),
        *_costs(),
        "## What each does",
        "",
        *_descriptions(),
    ]
    (ROOT / "docs" / "policies.md").write_text("\n".join(page), encoding="utf-8")


def _claims(
    studies: dict[str, Study], overload: Study, unordered: Sequence[Study], one_prefix: Study
) -> list[str]:
    prefix, mixed, tenants = (
        studies[name] for name in ("prefix_routing", "interactive_vs_batch", "tenants")
    )
    lines = [
        "## What the runs show",
        "",
        "**Prefixes.** Where conversations grow turn by turn (`prefix_routing`), `cache_aware` beats "
        f"`least_loaded`: goodput {prefix.says('cache_aware', 'goodput_requests_per_s', digits=2)} "
        f"against {prefix.says('least_loaded', 'goodput_requests_per_s', digits=2)} requests/s, "
        f"prefix hits {prefix.says('cache_aware', 'prefix_hit_rate')} against "
        f"{prefix.says('least_loaded', 'prefix_hit_rate')} % of prompt tokens. Where every request "
        "is new but for one system prompt of 3,072 tokens that all share, it collapses: "
        f"{one_prefix.largest_share('cache_aware'):.0f} % of the requests go to one card of four "
        f"({one_prefix.largest_share('least_loaded'):.0f} % under `least_loaded`), and goodput is "
        f"{one_prefix.says('cache_aware', 'goodput_requests_per_s', digits=2)} against "
        f"{one_prefix.says('least_loaded', 'goodput_requests_per_s', digits=2)}: its threshold of 64 "
        "requests more than the lightest card is never reached on four cards.",
        "",
        *_priorities(mixed, overload, *unordered),
        "",
        "**Tenants.** One tenant asks for four times what each of three others does, more than is "
        "left. Slowest hundredth's first token:",
        "",
        "| policy | greedy (s) | anna (s) | bert (s) | carl (s) | least / most served of fair share |",
        "|---|---|---|---|---|---|",
    ]
    for policy in ("least_loaded", "vtc", "twin"):
        found = tenants.tenants(policy)
        cells = [
            _words(found[name]["ttft_s"]["p99"], 1) for name in ("greedy", "anna", "bert", "carl")
        ]
        summary = tenants._run(policy).summary["values"]["service_min_over_max"]
        lines.append(f"| `{policy}` | {' | '.join(cells)} | {_words(summary, 2)} |")
    return [*lines, "", *_twin(studies), ""]


def _priorities(
    mixed: Study, overload: Study, first_come: Study, first_come_overload: Study
) -> list[str]:
    rows = [
        ("first come, first served in engines and queue", "least_loaded", first_come,
         first_come_overload),
        ("engines by priority", "least_loaded", mixed, overload),
        ("queue and engines by priority, with aging", "hybrid", mixed, overload),
    ]  # fmt: skip
    lines = [
        "**Priorities.** On `interactive_vs_batch`, as it is and at 1.1 times the capacity. Engines by "
        "priority keep interactive requests quick, and make batch pay for it in overload; `hybrid` "
        "does as much for interactive ones, and batch waits no longer than it otherwise would. All "
        "of it finishes.",
        "",
        "| order | policy | interactive p99 TTFT (s) | batch p99 E2E (s) | overload: interactive p99 "
        "TTFT (s) | overload: batch p99 E2E (s) |",
        "|---|---|---|---|---|---|",
    ]
    for order, policy, calm, loaded in rows:
        cells = [
            calm.says(policy, "ttft_s.p99", part="interactive"),
            calm.says(policy, "e2e_s.p99", part="batch"),
            loaded.says(policy, "ttft_s.p99", 1.1, "interactive"),
            loaded.says(policy, "e2e_s.p99", 1.1, "batch"),
        ]
        lines.append(f"| {order} | `{policy}` | {' | '.join(cells)} |")
    return lines


def _twin(studies: dict[str, Study]) -> list[str]:
    goodput = "goodput_requests_per_s"
    lines = [
        "**What `twin` gains.** Goodput against the best policy that serves every request, and against "
        "`viiwork`, which refuses what it cannot place at once and so keeps those that it serves fast; "
        "`twin` with `shed_late` refuses as well, those that can no longer meet their objective:",
        "",
        "| experiment | twin | best that serves all | gain | viiwork | gain | twin shed_late | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, study in studies.items():
        best = study.best_other("twin", goodput, ["viiwork"])
        shedding = next(policy for policy in study.policies if "shed_late" in policy)
        lines.append(
            f"| {name} | {study.says('twin', goodput, digits=2)} "
            f"| `{best}` {study.says(best, goodput, digits=2)} | {gain(study, 'twin', best)} "
            f"| {study.says('viiwork', goodput, digits=2)} | {gain(study, 'twin', 'viiwork')} "
            f"| {study.says(shedding, goodput, digits=2)} | {gain(study, shedding, 'viiwork')} |"
        )
    return [
        *lines,
        "",
        "What it costs: requests that can no longer meet their objective wait behind those that can, "
        "so `twin` has the longest p99 TTFT of the policies that serve all (tables below). Its "
        "constants were chosen on other seeds of the same families of workloads. Gains in the last "
        "column are over `viiwork`. All of this is simulated; what `twin` gained on two real workers "
        "beside other routers is in [field.md](field.md), and it is less.",
    ]


def _tables(studies: Sequence[Study]) -> list[str]:
    lines = []
    for study in studies:
        lines += [f"### `{study.command}`", "", *study.table(), ""]
    return lines


def _costs() -> list[str]:
    """What `benchmarks/policy_costs.py` wrote when it was run last."""
    found = json.loads((ROOT / "docs" / "policy_costs.json").read_text(encoding="utf-8"))
    lines = [
        "## What each costs",
        "",
        "`python benchmarks/policy_costs.py > docs/policy_costs.json`: microseconds that the core and "
        "the policy take for a request's arrival and end, by replicas of the cluster, and the speed of "
        "the simulator's standard benchmark under each policy, beside `least_loaded`.",
        "",
        "| policy | 4 (us) | 16 (us) | 64 (us) | simulator |",
        "|---|---|---|---|---|",
    ]
    for name, costs in found["us_per_decision"].items():
        cells = " | ".join(f"{costs[size]['us']:.0f}" for size in ("4", "16", "64"))
        lines.append(f"| `{name}` | {cells} | {found['simulator'][name]['ratio']:.2f} |")
    return [*lines, ""]


def _descriptions() -> list[str]:
    lines = []
    for name in policy_names():
        kind = policy_class(name)
        parameters = [str(p) for p in inspect.signature(kind).parameters.values()]
        lines += [f"### {name}", "", inspect.getdoc(kind) or "", ""]
        if parameters:
            lines += [f"Parameters: `{', '.join(parameters)}`", ""]
    return lines


if __name__ == "__main__":
    main()
