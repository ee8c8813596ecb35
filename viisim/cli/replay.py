"""`viisim replay`: a journal through a fresh scheduler core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from viisim.cli.terminal import show_json


def replay(
    journal: Annotated[
        Path,
        typer.Argument(metavar="JOURNAL", help="A journal (JSONL, or gz).", show_default=False),
    ],
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

    Stops at the first difference; exit status 0 only if there is none.

    viisim replay runs/least_loaded/journals/seed-1.jsonl
    """
    from viisim.journal import replay_journal

    report = replay_journal(journal, trust=trust, folder=folder)
    if as_json:
        show_json(report.to_dict())
    else:
        typer.echo(str(report))
    if not report.equal:
        raise typer.Exit(1)
