"""`viisim deploy --dry-run`: the workers' commands, to read or to paste into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from runtime.cluster import Planned
    from runtime.commands import WorkerCommand
    from viisim.config import Experiment

WIDTH = 96
"""Columns of a command's line, before the backslash."""
_NAME_WIDTH = 34


def print_commands(
    experiment: Experiment, replicas: Sequence[Planned], deployment: str | None = None
) -> None:
    """Print how each worker would be started; `deployment` marks them, the experiment's name if
    None. Raises InputError for cards that overlap."""
    typer.echo(commands_text(experiment, replicas, deployment or experiment.name), nl=False)


def commands_text(experiment: Experiment, replicas: Sequence[Planned], deployment: str) -> str:
    """A shell script of commands that do not return while a worker serves.

    Above each, the source of its flags and variables; one that was named before is not repeated.
    """
    from runtime.cards.assignment import cards_of
    from runtime.commands import command_of

    cards = cards_of(experiment)
    said: set[str] = set()
    blocks = []
    for replica in replicas:
        lines = [_title(replica, cards.get(replica.id))]
        if replica.id in cards:
            command = command_of(replica, cards[replica.id], deployment)
            lines += [line for line in _sources(command) if line not in said]
            said.update(lines)
            lines += _command(command)
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _title(replica: Planned, cards: Sequence[int] | None) -> str:
    what = f"# {replica.id}: {replica.entry.model}"
    if cards is None:
        running = replica.entry.worker.kind == "url"
        return f"{what}, {f'runs at {replica.url}' if running else 'simulated'}"
    numbers = ", ".join(map(str, cards))
    where = f"card{'s' * (len(cards) > 1)} {numbers}" if cards else "no cards"
    return f"{what} on {where}, {replica.url}"


def _sources(command: WorkerCommand) -> Iterator[str]:
    for name, why in command.why.items():
        yield f"#   {name:{_NAME_WIDTH}}  {why}"


def _command(command: WorkerCommand) -> Iterator[str]:
    """The command over several lines, and for a container, what ends it."""
    given = [shlex.quote(f"{name}={value}") for name, value in command.env.items()]
    yield from _broken([*(["env", *given] if given else []), *_units(command.argv)])
    if command.stop_argv is not None:
        yield f"# ends with: {shlex.join(command.stop_argv)}"


def _units(argv: Sequence[str]) -> list[str]:
    """Words for the shell, a flag together with its value."""
    units: list[str] = []
    for word in argv:
        if units and _awaits_value(units[-1]) and not word.startswith("-"):
            units[-1] += " " + shlex.quote(word)
        else:
            units.append(shlex.quote(word))
    return units


def _awaits_value(unit: str) -> bool:
    return unit.startswith("-") and " " not in unit and "=" not in unit


def _broken(units: Sequence[str]) -> Iterator[str]:
    """Lines of up to `WIDTH` columns, all but the last with a backslash at the end."""
    line = ""
    for unit in units:
        if line and len(line) + 1 + len(unit) > WIDTH:
            yield line + " \\"
            line = "  " + unit
        else:
            line = f"{line} {unit}" if line else unit
    yield line
