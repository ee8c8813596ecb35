"""The report of a validation: what ran, how far off it was, and whether that will do.

A report is facts alone, and what follows from them: the same ones give the same bytes. Where the
files lie, it says for each part; it reads none of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from viisim.validation.accuracy import Accuracy, Capacity, Cpu
from viisim.validation.limits import (
    FULL,
    Check,
    Limits,
    capacity_checks,
    load_checks,
    step_checks,
)
from viisim.validation.page import headline, page
from viisim.validation.parity import Parity
from viisim.validation.ranking import (
    FAILED,
    INCONCLUSIVE,
    PASSED,
    Ranking,
    Verdict,
    overall,
)
from viisim.validation.steps import StepErrors

Outcome: TypeAlias = Literal["PASSED", "FAILED", "INCONCLUSIVE"]


@dataclass(frozen=True, slots=True)
class Worker:
    """One real worker, and how well its profile is known."""

    id: str
    profile: str
    cores: str
    held_out_error: Mapping[str, float]
    """Of the fit, as the profile states it."""
    on_cpu: bool = False
    """It computes on the machine's own CPU, whose speed changes, and so is to be gauged."""
    halted: float | None = None
    """The share of the runs in which the machine halted beside it; None where how fast that was is
    not known for all runs."""
    gauge_offset: float | None = None
    """Of the gauge at its quickest, relative to that of the calibration; likewise."""

    @property
    def gauged(self) -> bool:
        """How fast the machine was beside it is known for all runs."""
        return self.halted is not None


@dataclass(frozen=True, slots=True)
class Setup:
    """What ran."""

    engine: str
    """With its version."""
    model: str
    machine: str
    workers: tuple[Worker, ...]


@dataclass(frozen=True, slots=True)
class Stated:
    """A figure that calibration found, in its unit."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of a validation."""

    name: str
    command: str
    """The command line that makes it again."""
    setup: Setup
    limits: Limits = FULL
    calibration: tuple[Stated, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    loads: tuple[Accuracy, ...] = ()
    steps: tuple[StepErrors, ...] = ()
    step_drift: float | None = None
    """How far workers' steps are slow and fast at once, as `shared_drift` says."""
    rankings: Mapping[str, Ranking]
    """By workload."""
    parity: Parity | None = None
    """None if no journal was replayed."""
    cut_off: tuple[str, ...] = ()
    """Parts that were not measured to their end."""
    cpu: Mapping[str, Cpu]
    """Of runs other than those of `loads`, by what they are called."""
    wall_s: Mapping[str, float]
    """How long each part took."""
    files: Mapping[str, str]
    """Where the numbers of each part lie, from the report's folder."""
    pictures: tuple[tuple[str, str], ...] = ()
    """File names and captions, as `viisim.validation.figures.draw` returns them."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """All but the ranking's, which `ranking` judges as a whole."""
        found = list(capacity_checks(self.capacities, self.limits))
        for accuracy in self.loads:
            found += load_checks(accuracy, self.limits)
        found += step_checks(self.steps, self.limits)
        if self.parity is not None:
            found += self.parity.checks()
        return tuple(found)

    @property
    def ranking(self) -> Verdict | None:
        """Of all workloads together; None without any."""
        return overall(list(self.rankings.values())) if self.rankings else None

    @property
    def missing(self) -> tuple[str, ...]:
        """What is asked for and nobody measured: parts, ends of parts, and speeds."""
        limits = self.limits
        steps_judged = limits.step_mape is not None or limits.step_total is not None
        parts = {
            "capacity": limits.capacity is None or self.capacities,
            "accuracy": self.loads,
            "steps": not steps_judged or self.steps,
            "ranking": not limits.judge_ranking or self.rankings,
            "parity": self.parity is not None and self.parity.events,
        }
        return (
            *(part for part, there in parts.items() if not there),
            *(f"the end of {part}" for part in self.cut_off),
            *(
                f"the machine's speed beside {worker.id}"
                for worker in self.setup.workers
                if worker.on_cpu and not worker.gauged
            ),
        )

    @property
    def failed(self) -> tuple[str, ...]:
        """The checks that failed, by metric and part."""
        names = [check.name for check in self.checks if not check.passed]
        if self._ranking_is(FAILED):
            names.append("ranking of the policies")
        return tuple(names)

    @property
    def verdict(self) -> Outcome:
        """FAILED if any check is; else INCONCLUSIVE if there is too little to say."""
        if self.failed:
            return FAILED
        return INCONCLUSIVE if self.missing or self._ranking_is(INCONCLUSIVE) else PASSED

    def _ranking_is(self, outcome: Outcome) -> bool:
        ranking = self.ranking if self.limits.judge_ranking else None
        return ranking is not None and ranking.outcome == outcome

    @property
    def exit_status(self) -> int:
        """0 if all that was to be shown is."""
        return 0 if self.verdict == PASSED else 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "failed": self.failed,
            "missing": self.missing,
            "command": self.command,
            "setup": asdict(self.setup),
            "limits": asdict(self.limits),
            "checks": [check.to_dict() for check in self.checks],
            "calibration": [asdict(one) for one in self.calibration],
            "capacities": [one.to_dict() for one in self.capacities],
            "loads": [one.to_dict() for one in self.loads],
            "steps": [one.to_dict() for one in self.steps],
            "step_drift": self.step_drift,
            "rankings": {name: one.to_dict() for name, one in self.rankings.items()},
            "ranking": self.ranking.to_dict() if self.ranking else None,
            "parity": asdict(self.parity) if self.parity else None,
            "cpu": {name: asdict(one) for name, one in self.cpu.items()},
            "wall_s": dict(self.wall_s),
            "files": dict(self.files),
            "pictures": [file for file, _ in self.pictures],
        }

    def markdown(self, pictures: str = "plots") -> str:
        """The page. `pictures` is the folder of its figures, seen from it."""
        return "\n\n".join([f"# {self.name}: simulated and real", *page(self, pictures)]) + "\n"

    @property
    def headline(self) -> str:
        """The verdict and what it rests on, in a sentence."""
        return headline(self).replace("**", "")

    def write(self, folder: Path) -> None:
        """`report.json` and `report.md` in a folder that exists, figures in its `plots`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8", newline="\n")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8", newline="\n")
