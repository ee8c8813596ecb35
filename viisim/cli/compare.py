"""`viisim compare`: policies side by side, seed by seed, at the loads asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.run import Jobs, Overrides, seed_list
from viisim.cli.terminal import progress, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.cells import Setting

_REQUESTS_PER_PROCESS = 20_000
"""As in `viisim run`: fewer are simulated before another process has started."""


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Experiments (YAML).", show_default=False),
    ],
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Policies to run every file with: names, module:Class or file.py:Class, each "
            "with /parameter=value if wanted. The others are compared with the first.",
        ),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(
            metavar="0.5,0.9,...", help="Offered loads, as fractions of the measured capacity."
        ),
    ] = None,
    set_: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|LIST", help="5 for seeds 1 to 5, or a list: 7,11.")
    ] = None,
    jobs: Jobs = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The comparison's folder; one that is there is taken up again. "
            "[dim]\\[default: runs/NAME-comparison][/dim]",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run every cell, whatever is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
) -> None:
    """Compare policies on the same requests: tables and figures that a paper can take.

    viisim compare experiments/least_loaded.yaml --policies round_robin,least_loaded
    viisim compare experiments/least_loaded.yaml --policies random,mine.py:Mine --load 0.5,0.7,0.9
    viisim compare experiments/azure_conv.yaml experiments/mooncake_prefix.yaml --seeds 5

    Without --policies, the files themselves are compared, with the first. Every cell (a policy on
    an experiment at a load) is a run directory; those that are complete are not run again.
    """
    from viisim.cells import settings_of
    from viisim.compare import compare as carry_out
    from viisim.comparison_tables import terminal_report

    overrides = [*(set_ or []), *([] if seeds is None else [f"seeds={seed_list(seeds)}"])]
    names = [] if policies is None else [name for name in policies.split(",") if name.strip()]
    settings = settings_of(files, names, overrides)
    loads = load_list(load) if load is not None else []
    folder = out or Path("runs") / f"{settings[0].name}-comparison"
    with progress("simulations") as note:
        done = carry_out(
            folder,
            settings,
            loads,
            jobs=jobs or worthwhile_jobs(settings, len(loads)),
            fresh=fresh,
            on_progress=note,
        )
    if as_json:
        show_json(done.comparison)
        return
    show(*terminal_report(done.comparison))
    cells = len(done.runs)
    again = f", {done.reused} of {cells} cells taken over from before" if done.reused else ""
    typer.echo(f"\n{folder}: tables, plots and captions{again}; as a page:")
    typer.echo(f"viisim report {folder}")
    code = done.comparison["code"]
    if done.reused and code is not None and code["dirty"]:
        typer.echo(
            "note: the code has uncommitted changes, which only --fresh is sure to take in",
            err=True,
        )


def load_list(text: str) -> list[float]:
    """What `--load` means: rising fractions of capacity. Raises InputError for anything else."""
    try:
        loads = sorted({float(part) for part in text.split(",") if part.strip()})
        if not loads or not 0 < loads[0] <= loads[-1] <= 100:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--load {text}: give fractions of capacity above 0, such as 0.5,0.7,0.9"
        ) from None
    return loads


def worthwhile_jobs(settings: Sequence[Setting], loads: int) -> int:
    """As many processes as there are simulations and processors, but none that would not pay."""
    simulations, requests = 0, 0
    for setting in settings:
        each = max(1, loads) * len(setting.variants) * len(setting.first.seeds)
        simulations += each
        requests += each * setting.first.build_workload().total_requests
    most = min(simulations, os.cpu_count() or 1)
    return max(1, min(most, requests // _REQUESTS_PER_PROCESS))
