"""`viisim conform`: the engine against step traces of vLLM's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from viisim.cli.terminal import progress


def conform(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Golden step traces, or folders."),
    ],
) -> None:
    """Compare the simulated engine, step by step, with traces of vLLM's own scheduler.

    Shows the first difference of each scenario that is not equal; exit status 0 only if all are.

    viisim conform ../shared/golden/dev ../shared/golden/async
    """
    from viisim.conform import Report, check_scenario, golden_files, load_scenario
    from viisim.engine.stepwise import SteppedScheduler

    files = golden_files(paths)
    outcomes = []
    with progress("scenarios") as note:
        for number, file in enumerate(files, 1):
            outcome = check_scenario(load_scenario(file), SteppedScheduler)
            outcomes.append(outcome)
            if note is not None:
                note(number, len(files))
            if outcome.difference is not None:
                typer.echo(str(outcome))
    report = Report(tuple(outcomes))
    typer.echo(report.summary)
    if report.unequal:
        raise typer.Exit(1)
