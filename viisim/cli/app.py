"""The commands put together, and the one place where errors of the user's input are said."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from policies import compiled
from viisim import __version__
from viisim.cli.calibrate import calibrate
from viisim.cli.check import check
from viisim.cli.compare import compare
from viisim.cli.conform import conform
from viisim.cli.deploy import deploy
from viisim.cli.doctor import doctor
from viisim.cli.list import list_
from viisim.cli.load import load
from viisim.cli.new import new
from viisim.cli.plan import plan
from viisim.cli.replay import replay
from viisim.cli.report import report
from viisim.cli.run import run
from viisim.cli.schema import schema
from viisim.cli.trace import trace
from viisim.cli.validate import validate
from viisim.cli.verify import verify
from viisim.cli.worker import worker
from viisim.errors import InputError

app = typer.Typer(
    help="""Simulate, check and compare schedulers for LLM serving, to the token and to the byte.

    viisim run experiments/least_loaded.yaml
    viisim run experiments/least_loaded.yaml --set policy.name=round_robin
    viisim compare experiments/least_loaded.yaml --policies round_robin,least_loaded
    viisim verify runs/least_loaded
    viisim new policy my_policy
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(run)
app.command()(compare)
app.command()(report)
app.command()(verify)
app.command(name="list")(list_)
app.command()(schema)
app.command()(check)
app.add_typer(new, name="new")
app.command()(conform)
app.command()(calibrate)
app.command()(validate)
app.command()(plan)
app.add_typer(trace, name="trace")
app.command()(replay)
app.command()(deploy)
app.command()(doctor)
app.command()(worker)
app.command()(load)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"viisim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of no command in particular."""
    if sys.stderr.isatty() and compiled.status() == "stale":
        typer.echo(
            "warning: a compiled module is older than its source, so sources are run, at half the "
            "speed; `pip install -e .` compiles again",
            err=True,
        )


def main() -> None:
    """Run the command line: the entry point of `viisim` and of `python -m viisim`."""
    # Asked to end (`kill`, a job's time limit): clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="viisim")
    except Exception as error:
        if not _is_users(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Whether the user can repair it: a mistake in the input, or in a policy."""
    from policies.interface import PolicyError

    return isinstance(error, (InputError, PolicyError))
