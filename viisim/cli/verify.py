"""`viisim verify`: run again what a run directory says, and compare the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.run import Jobs, worthwhile_jobs
from viisim.cli.terminal import seed_progress
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.config import Experiment
    from viisim.results import LoadedRun


def verify(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)
    ],
    jobs: Jobs = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the trace is, if it is not found by itself."),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where relative paths of the experiment start: the folder of its file.",
        ),
    ] = Path(),
) -> None:
    """Run again what the manifest says, and compare every file to the byte.

    viisim verify runs/least_loaded
    viisim verify runs/azure_conv --trace ~/traces/AzureLLMInferenceTrace_conv.csv.gz
    """
    from viisim.experiment import JOURNALS, run_into
    from viisim.results import compare_bytes, compare_manifests, load_run, open_run

    recorded = load_run(run)
    experiment = recorded_experiment(recorded, folder, trace)
    with TemporaryDirectory(prefix="viisim-verify-") as scratch:
        with (
            open_run(Path(scratch) / "run") as directory,
            seed_progress(experiment.name, experiment.seeds) as note,
        ):
            run_into(
                directory,
                experiment,
                jobs=jobs or worthwhile_jobs(experiment),
                on_progress=note,
                plots=(run / "plots").exists(),
                journals=(run / JOURNALS).exists(),
            )
        differences = compare_bytes(run, directory.path)
        made_of = compare_manifests(run, directory.path)
        files = sum(file.is_file() for file in directory.path.rglob("*")) - 1  # the manifest
    for line in differences:
        typer.echo(line)
    unequal = f"not equal: {len(differences)} of {files} files"
    typer.echo(unequal if differences else f"equal: {files} files")
    for line in made_of:
        if not line.startswith("config.workload.path:"):
            typer.echo(f"recorded and now: {line}")
    if differences:
        raise typer.Exit(1)


def recorded_experiment(recorded: LoadedRun, folder: Path, trace: Path | None) -> Experiment:
    """The experiment of a run directory, with its trace found and seen to be the same.

    Raises InputError when the trace is missing or another one.
    """
    from viisim.config import experiment_from, workload_files
    from viisim.results import file_hash

    manifest = recorded.path / "manifest.json"
    moved = [] if trace is None else [f"workload.path={json.dumps(str(trace.resolve()))}"]
    try:
        experiment = experiment_from(recorded.manifest["config"], str(manifest), folder, moved)
    except InputError as error:
        raise InputError(f"{error} (--folder DIR says where relative paths start)") from error
    for key, file in workload_files(experiment.workload).items():
        how = "--trace FILE" if key == "path" else "--folder DIR, where relative paths start"
        if not file.is_file():
            raise InputError(f"{file}: no such trace; say with {how} where it is")
        if file_hash(file) != recorded.manifest["sha256"].get(f"workload.{key}"):
            raise InputError(
                f"{file}: not the trace that was run (its SHA-256 differs from {manifest}); give "
                f"that one with {how}"
            )
    return experiment
