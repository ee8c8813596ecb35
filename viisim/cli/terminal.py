"""What the commands show: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from viisim.errors import InputError


def show(*renderables: Any) -> None:
    """Tables and the like on stdout: 80 columns where that is no terminal."""
    console = Console()
    for renderable in renderables:
        console.print(renderable)


def show_json(content: Any) -> None:
    """For programs: one JSON document on stdout."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def refuse(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raise InputError if any of these parameters is in the command line: they would do nothing."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise InputError(f"{', '.join(given)}: {why}")


def plain_table(*headings: str) -> Table:
    """A table in the style of all of ours, with left-aligned columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that is told (done, total) while the block runs. None where nobody would see it:
    stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)

        def note(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield note


@contextmanager
def seed_progress(
    name: str, seeds: Sequence[int]
) -> Iterator[Callable[[int, int, int], None] | None]:
    """A bar over the requests of all seeds; what it is told, `viisim.experiment.Progress` says."""
    arrived: dict[int, int] = {}
    with progress(f"{name}: requests") as note:

        def note_seed(seed: int, done: int, total: int) -> None:
            assert note is not None, "there is a terminal"
            arrived[seed] = done
            if total:
                note(sum(arrived.values()), total * len(seeds))

        yield None if note is None else note_seed
