"""`viisim run`: simulate an experiment and leave a run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import seed_progress, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.config import Experiment

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the file; entries of lists go by number. May be repeated.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the seeds; results do not depend on it. "
        "[dim]\\[default: as many as pay][/dim]",
        show_default=False,
    ),
]

_REQUESTS_PER_PROCESS = 20_000
"""A process takes about a second to start, in which this many requests are simulated."""


def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The experiment (YAML).", show_default=False)
    ],
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the run directory goes. [dim]\\[default: runs/NAME, numbered][/dim]",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="5 for seeds 1 to 5, or a list: 7,11.")
    ] = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    journal: Annotated[
        bool, typer.Option("--journal", help="Keep what the scheduler was told and decided.")
    ] = False,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the figures.")] = True,
) -> None:
    """Simulate an experiment: a table, and a run directory that anybody can reproduce.

    viisim run experiments/least_loaded.yaml
    viisim run experiments/least_loaded.yaml --set policy.name=random --seeds 9
    viisim run experiments/azure_conv.yaml --set cluster.replicas.0.count=8
    viisim run experiments/least_loaded.yaml --set policy='{class: mine.py:Mine}'

    Paths in the file, and in what is set, start in the file's folder, or else where you
    stand.
    """
    from viisim.config import load_experiment
    from viisim.experiment import run_into
    from viisim.results import open_run

    overrides = [*(set_ or []), *([] if seeds is None else [f"seeds={seed_list(seeds)}"])]
    experiment = load_experiment(file, overrides)
    folder = out or Path("runs") / experiment.name
    with (
        open_run(folder, numbered=out is None) as directory,
        seed_progress(experiment.name, experiment.seeds) as note,
    ):
        done = run_into(
            directory,
            experiment,
            jobs=jobs or worthwhile_jobs(experiment),
            on_progress=note,
            plots=plots,
            journals=journal,
        )
    if as_json:
        show_json({"run": str(directory.path), "name": experiment.name, **done.summary})
        return
    show(done)
    typer.echo(
        f"\n{directory.path}: tables, manifest{' and plots' if plots else ''}; to repeat it:"
    )
    typer.echo(f"viisim verify {directory.path}")


def seed_list(text: str) -> list[int]:
    """What `--seeds` means: `3` is 1, 2 and 3; `7,` and `7,11` are a list."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        if "," not in text:
            numbers = list(range(1, numbers[0] + 1))
        if not numbers or min(numbers) < 0:
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(
            f"--seeds {text}: give a number of seeds from 1 (5), or a list of whole numbers (7,11)"
        ) from None
    return numbers


def worthwhile_jobs(experiment: Experiment) -> int:
    """As many processes as there are seeds and processors, but none that would not pay."""
    seeds = len(experiment.seeds)
    most = min(seeds, os.cpu_count() or 1)
    if most == 1:
        return 1
    requests = seeds * experiment.build_workload().total_requests
    return max(1, min(most, requests // _REQUESTS_PER_PROCESS))
