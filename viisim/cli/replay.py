"""`viisim replay`: a journal through a fresh scheduler core, or under another policy's eyes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viisim.cli.terminal import show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from policies.core import SchedulerCore
    from policies.interface import ClusterView, Policy, RequestView
    from policies.journal import Segment
    from policies.registry import PolicySpec
    from viisim.journal import ReplayReport

SHOWN = 10
"""How many of the questions that another policy answers otherwise are shown."""


def replay(
    journal: Annotated[
        Path,
        typer.Argument(
            metavar="JOURNAL", help="A journal (JSONL, or gz), or a folder.", show_default=False
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Ask this one too: where would it decide otherwise?"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of it. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Load checkpoints, with which rotated journals open: that can run code."
        ),
    ] = False,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where relative policy files are.")
    ] = Path(),
) -> None:
    """Feed a journal, simulated or from production, to a fresh core: the same decisions?

    Stops at the first difference; exit status 0 only if there is none. With --policy, another
    policy is asked every question that was asked then, at the moment it was; what was decided
    stands, so this says where the two disagree, and nothing of latencies.

    viisim replay runs/least_loaded/journals/seed-1.jsonl
    viisim replay journals --trust --policy round_robin
    """
    if set_ and policy is None:
        raise InputError("--set: a parameter of --policy; give that too")
    reports = list(_reports(_files(journal), _spec(policy, set_ or []), trust, folder))
    if as_json:
        found = [report.to_dict() for report in reports]
        show_json(found if journal.is_dir() else found[0])
    else:
        for report in reports:
            typer.echo(str(report))
    if not all(report.equal for report in reports):
        raise typer.Exit(1)


def _files(journal: Path) -> list[Path]:
    if not journal.is_dir():
        return [journal]
    files = sorted([*journal.glob("*.jsonl"), *journal.glob("*.jsonl.gz")])
    if not files:
        raise InputError(f"{journal}: no journals there (*.jsonl)")
    return files


def _spec(policy: str | None, parameters: list[str]) -> PolicySpec | None:
    from viisim.documents import override

    if policy is None:
        return None
    spec: dict[str, Any] = {"class" if ":" in policy else "name": policy}
    for parameter in parameters:
        override(spec, parameter)
    return spec


def _reports(
    files: list[Path], other: PolicySpec | None, trust: bool, folder: Path
) -> Iterator[ReplayReport | Contrast]:
    from viisim.journal import replay_journal

    rival = None if other is None else _Rival(other, folder)
    for file in files:
        report = replay_journal(file, trust=trust, folder=folder)
        # Questions are those of the time only as long as the journal itself replays.
        yield report if rival is None or not report.equal else contrast(file, rival)


# -- another policy's answers --


@dataclass(slots=True)
class Contrast:
    """How often and where another policy would have decided otherwise in one journal."""

    journal: str
    policy: str
    """The other one's class."""
    questions: int = 0
    otherwise: Counter[str] = field(default_factory=Counter)
    """Questions answered otherwise, by what would have been decided."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """The first of them."""
    equal: bool = True
    """The journal replays with its own policy: without that there is no contrast."""

    def to_dict(self) -> dict[str, Any]:
        """The report for programs (`--json`)."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def __str__(self) -> str:
        """The report for people."""
        number = self.otherwise.total()
        share = number / self.questions if self.questions else 0.0
        lines = [
            f"{self.journal}: {self.policy} would have answered {number:,} of "
            f"{self.questions:,} questions otherwise ({share:.1%})"
        ]
        lines += [f"  {times:,} times {what}" for what, times in self.otherwise.most_common()]
        lines += [
            f"  line {found['line']}: {found['request']}: {found['other']}, not {found['recorded']}"
            for found in self.first
        ]
        return "\n".join(lines)


class _Rival:
    """The other policy. It lives through the files of a folder, as the recorded one did."""

    def __init__(self, spec: PolicySpec, folder: Path) -> None:
        from policies.registry import policy_class

        self._spec = spec
        self._folder = folder
        self._policy: Policy | None = None
        self.name = policy_class(spec, folder).__name__
        self.report = Contrast("", self.name)
        self.line = 0

    def begin(self, segment: Segment) -> SchedulerCore:
        """The core of a segment, which shows the other policy all that its own is asked."""
        from policies.core import SchedulerCore
        from policies.registry import make_policy

        core = segment.make_core(self._folder)
        if self._policy is None or segment.checkpoint is None:
            # The stream that a core of this seed would give it: a policy agrees with itself.
            self._policy = SchedulerCore(make_policy(self._spec, self._folder), segment.seed).policy
        core._guard = self._listen
        core._observes = True
        return core

    def _listen(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Stands between a core and its policy, as guards do."""
        other = self._policy
        assert other is not None, "questions come after a segment has begun"
        if question.__name__ == "observe":
            other.observe(*arguments)
            return question(*arguments)
        if question.__name__ != "place":
            return question(*arguments)
        rival = self._answer(other, *arguments)
        verdict = question(*arguments)
        self._compare(arguments[0].id, _said(verdict), rival)
        return verdict

    def _answer(self, other: Policy, request: RequestView, view: ClusterView) -> str:
        from policies.interface import PolicyError

        try:
            return _said(other.place(request, view))
        except Exception as error:  # a policy is foreign code
            raise PolicyError(
                f"{self.report.journal}: line {self.line}: {type(other).__name__}.place failed "
                f"for {request.id!r}: {type(error).__name__}: {error}"
            ) from error

    def _compare(self, request_id: str, recorded: str, other: str) -> None:
        report = self.report
        report.questions += 1
        if recorded == other:
            return
        kind, other_kind = recorded.partition(" ")[0], other.partition(" ")[0]
        change = f"{kind} elsewhere" if kind == other_kind else f"{other_kind}, not {kind}"
        report.otherwise[change] += 1
        if len(report.first) < SHOWN:
            found = {"line": self.line, "request": request_id}
            report.first.append({**found, "recorded": recorded, "other": other})


def _said(verdict: object) -> str:
    """A verdict as it is compared and shown; attempts and reasons are no part of the decision."""
    from policies.interface import Dispatch, Preempt

    match verdict:
        case Dispatch(_, replica_id, None):
            return f"dispatch to {replica_id}"
        case Dispatch(_, replica_id, priority):
            return f"dispatch to {replica_id} with engine priority {priority}"
        case Preempt(request_id):
            return f"preempt {request_id}"
    return type(verdict).__name__.lower()


def contrast(path: Path, rival: _Rival) -> Contrast:
    """Ask the other policy every question of a journal that replays. Raises PolicyError when it
    fails."""
    from policies.journal import Segment
    from viisim.journal import JournalReader

    report = rival.report = Contrast(path.name, rival.name)
    core: SchedulerCore | None = None
    for rival.line, entry in JournalReader(path):
        if isinstance(entry, Segment):
            core = rival.begin(entry)
        else:
            assert core is not None, "a journal that replays opens with a segment"
            core.handle(entry.event)
    return report
