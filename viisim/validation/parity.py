"""Whether what was deployed decides as what is simulated: journals replayed, policies compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from policies.interface import ConfigChanged
from policies.journal import Segment
from policies.registry import PolicySpec
from viisim.journal import JournalReader, ReplayReport, replay_journal
from viisim.validation.config import RANKING
from viisim.validation.deployment import Deployment
from viisim.validation.limits import Check
from viisim.validation.measured import MeasuredRun


@dataclass(frozen=True, slots=True)
class Parity:
    """Whether what was deployed decides as what was simulated does."""

    journals: int
    events: int
    actions: int
    differences: tuple[str, ...] = ()
    """Of the deployments' journals, replayed by fresh cores: an entry a journal that differs."""
    policy_differences: tuple[str, ...] = ()
    """Between the policies that were simulated and those that were deployed, in words."""

    def checks(self) -> Iterator[Check]:
        """Nothing may differ."""
        why = "one core, the same decisions"
        for what, found in (
            ("journals that replay otherwise", self.differences),
            ("policies unlike the simulated", self.policy_differences),
        ):
            yield Check("parity", what, len(found), 0.0, why, not found, "count")


def parity_of(deployments: Sequence[Deployment]) -> Parity:
    """Every journal through fresh cores, and the policies in it beside those simulated."""
    reports: list[tuple[str, ReplayReport]] = []
    unlike: list[str] = []
    for deployment in deployments:
        files = sorted(deployment.part.journal.glob("*.jsonl"))
        reports += [(deployment.name, replay_journal(file, trust=True)) for file in files]
        simulated = [_simulated_policy(deployment, run) for run in deployment.runs]
        unlike += policy_differences(_policies_in(files), simulated, one_more=deployment.cut_off)
    return Parity(
        journals=len(reports),
        events=sum(report.events for _, report in reports),
        actions=sum(report.actions for _, report in reports),
        differences=tuple(f"{name}/{report}" for name, report in reports if not report.equal),
        policy_differences=tuple(unlike),
    )


def _simulated_policy(deployment: Deployment, run: MeasuredRun) -> PolicySpec:
    """Of a run of the ranking it is the run's own, by which the run is found."""
    return run.policy if deployment.name == RANKING else deployment.experiment.policy.spec


def _policies_in(files: Sequence[Path]) -> list[PolicySpec]:
    """The policies that a deployment was scheduled by, in their order."""
    found: list[PolicySpec] = []
    for file in files:
        for _, line in JournalReader(file):
            if isinstance(line, Segment):
                found.append(line.policy)
            elif isinstance(line.event, ConfigChanged) and line.event.policy is not None:
                found.append(line.event.policy)
    return _changes(found)


def _changes(policies: Sequence[PolicySpec]) -> list[PolicySpec]:
    return [policy for policy, _ in groupby(policies)]


def policy_differences(
    deployed: Sequence[PolicySpec], planned: Sequence[PolicySpec], *, one_more: bool = False
) -> Iterator[str]:
    """Where the policies of a deployment's journal, in their order, are not those that its runs
    are simulated under. `one_more` may be in the journal, of a run that was cut off."""
    wanted = _changes(planned)
    if len(deployed) != len(wanted) + (one_more and len(deployed) > len(wanted)):
        yield f"{len(deployed)} policies were deployed in turn, {len(wanted)} were to be"
    for number, (one, other) in enumerate(zip(deployed, wanted, strict=False), start=1):
        if one != other:
            yield f"policy {number}: deployed {one}, simulated {other}"
