"""`viisim conform`: the engine against step traces of vLLM's own scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.folders import make_empty
from viisim.cli.terminal import progress
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.conform import Report
    from viisim.golden import Scenario


def conform(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Golden step traces, or folders. With --record: whose scenarios to record; "
            "none: a standard set.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Record the traces from vLLM into this folder, then compare those."
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The interpreter that has vLLM, for --record."),
    ] = None,
) -> None:
    """Compare the simulated engine, step by step, with traces of vLLM's own scheduler.

    Shows the first difference of each scenario that is not equal; exit status 0 only if all are.

    viisim conform traces/dev traces/async
    viisim conform --record golden --python ~/vllm/bin/python
    """
    if record is not None:
        _record(paths or [], record, python)
        paths = [record]
    elif python is not None:
        raise InputError("--python names the interpreter of --record DIR; give that too")
    report = _compare(paths or [])
    typer.echo(report.summary)
    if report.unequal:
        raise typer.Exit(1)


def _compare(paths: Sequence[Path]) -> Report:
    """Examine the simulated engine, saying each difference when it is found."""
    from viisim.conform import Report, check_scenario
    from viisim.engine.stepwise import SteppedScheduler
    from viisim.golden import golden_files, load_scenario

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
    return Report(tuple(outcomes))


def _record(paths: Sequence[Path], folder: Path, python: Path | None) -> None:
    """Record the scenarios into a new folder; of traces, say how many have changed."""
    from runtime.vllm_plugin.stepped import VllmProcess, record_golden

    if python is None:
        raise InputError("--record needs --python FILE: the interpreter that has vLLM")
    asked = _scenarios(paths)
    make_empty(folder, "--record")  # what is compared is what has been recorded
    changed = 0
    with VllmProcess(python) as vllm, progress("recording") as note:
        typer.echo(f"vLLM {vllm.version}: {len(asked)} scenarios", err=True)
        if vllm.warning is not None:
            typer.echo(vllm.warning, err=True)
        for number, scenario in enumerate(asked, 1):
            path = folder / f"{scenario.name}.jsonl.gz"
            difference = record_golden(vllm, scenario, path)
            if note is not None:
                note(number, len(asked))
            if scenario.steps and difference is not None:
                changed += 1
                typer.echo(f"{scenario.name}: recorded otherwise than given: {difference}")
    if paths:
        typer.echo(f"{len(asked) - changed}/{len(asked)} traces recorded as they were given")


def _scenarios(paths: Sequence[Path]) -> list[Scenario]:
    """Those of the traces at these paths; the standard ones where there are no paths."""
    from runtime.vllm_plugin.scenarios import standard_scenarios
    from viisim.golden import scenarios

    if not paths:
        return standard_scenarios()
    found = list(scenarios(paths))
    names = [scenario.name for scenario in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two traces are named {name!r}; record them into different folders")
    return found
