"""`viisim new`: something to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from viisim.errors import InputError

new = typer.Typer(help="Write something to start from.", no_args_is_help=True)


@new.callback()
def _new() -> None:
    """Write something to start from."""


@new.command()
def policy(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="For example my_policy.", show_default=False)
    ],
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="The folder to write into.")
    ] = Path(),
) -> None:
    """Write a policy that works, and its tests.

    viisim new policy my_policy --dir policies_of_mine
    """
    from policies.scaffold import scaffold

    files = {folder / file: text for file, text in scaffold(name).items()}
    for path in files:
        if path.exists():
            raise InputError(f"{path}: exists already; choose another name, or another --dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; give another folder with --dir") from error
    source, tests = files
    cls = "".join(word.capitalize() for word in name.split("_"))
    typer.echo(f"{source} and {tests} are written. Next:")
    typer.echo(f"  pytest {tests}")
    typer.echo(f"  viisim check {source}:{cls}")
    spec = f'policy={{class: "{source.resolve()}:{cls}"}}'
    typer.echo(f"  viisim run experiments/least_loaded.yaml --set '{spec}'")
