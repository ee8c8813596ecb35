"""`viisim report`: a run or a comparison as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from viisim.errors import InputError


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A run directory, or a comparison's.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where the page goes. [dim]\\[default: DIR.html][/dim]",
        ),
    ] = None,
) -> None:
    """Write one HTML page: what was run, tables, figures, and how to repeat it.

    viisim report runs/least_loaded
    viisim report runs/least_loaded-comparison -o comparison.html

    The page holds its figures and style itself, and asks the network for nothing.
    """
    from viisim.report_page import page_of

    whole = folder if folder.name.strip(".") else folder.resolve()
    path = out or whole.with_name(f"{whole.name}.html")
    text = page_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there ({error.strerror}); give another file with -o"
        ) from error
    typer.echo(f"{path}: {len(text.encode()) / 1e6:.1f} MB")
