"""`viisim validate`: measured runs beside the same runs in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import plain_table, refuse, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from viisim.calibration.validate import RunReport, Validation

_UNITS = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "E2E", "step_s": "step"}
_OF_LIVE = {"quick", "again", "out", "page"}
_OF_FILES = {"files", "profile", "only", "skip", "plots"}
"""Parameters of one way to use the command."""


def validate(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MEASURED",
            help="Measured runs, in any format that `viisim calibrate` takes.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", "-p", metavar="P", help="A profile's name or file.", show_default=False
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Use only measurements whose name or setup has TEXT."),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            min=0, help="Replay whole runs, but compare only what comes after the first N entries."
        ),
    ] = 0,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw figures into this folder.")
    ] = None,
    live: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A validation (YAML): start its workers, and measure."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --live: minutes, and loose limits.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --live: judge anew what --out holds already.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="With --live: for measurements and report. [dim]\\[default: runs/NAME][/dim]",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --live: write the report there, too; figures to images/."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Replay measured runs in the simulator: measured and predicted figures side by side.

    viisim validate results/*.json --profile profiles/mine.yaml
    viisim validate results/*.json --profile mi50/qwen3-vl-8b-awq --plots figures
    viisim validate --live experiments/validation/vllm_cpu.yaml

    Errors are signed: predicted over measured, less one. With --live, real workers are calibrated,
    loaded and compared with the simulator, which takes an hour; exit status 0 only if the report
    says PASSED. A profile that was changed in the folder's profiles/ is judged with --again.
    """
    if live is not None:
        refuse(context, _OF_FILES, "not with --live, which measures by itself")
        _validate_live(live, out, page, quick, again, as_json)
        return
    refuse(context, _OF_LIVE, "only with --live")
    if not files or profile is None:
        raise InputError("validate: give files of measurements and --profile, or --live FILE")
    from viisim.calibration.read import read_measurements
    from viisim.calibration.validate import validate as compare
    from viisim.profile import load_profile

    found = load_profile(profile)
    runs = read_measurements(files, only)
    done = compare(runs, found, skip)
    drawn: list[Path] = []
    if plots is not None:
        from viisim.calibration.figures import draw_validation

        drawn = draw_validation(done, runs, found, plots)
    if as_json:
        show_json(done.to_dict())
        return
    _show(done)
    for path in drawn:
        typer.echo(str(path))


def _validate_live(
    file: Path, out: Path | None, page: Path | None, quick: bool, again: bool, as_json: bool
) -> None:
    from viisim.cli.validate_live import validated_live, write_page

    folder = out or Path("runs") / file.stem
    report = validated_live(
        file, folder, quick=quick, again=again, say=lambda line: typer.echo(line, err=as_json)
    )
    if page is not None:
        write_page(report, folder, page)
    if as_json:
        show_json(report.to_dict())
    else:
        typer.echo(report.headline)
        typer.echo(f"{folder / 'report.md'}: the report")
    if report.exit_status:
        raise typer.Exit(report.exit_status)


def _show(done: Validation) -> None:
    show(_means(done.runs))
    content = done.to_dict()
    for key, title in (
        ("overall", "|error| of means, over runs"),
        ("outside_calibrated_range", "the same, larger batches than calibrated"),
    ):
        if content.get(key):
            table = plain_table(title, "median", "p90")
            for name, errors in content[key].items():
                both = errors["mean_abs_error_pct"]
                table.add_row(name, f"{both['p50']:.1f} %", f"{both['p90']:.1f} %")
            show(table)
    cached = sum(run.cached_requests for run in done.runs)
    if cached:
        typer.echo(
            f"{cached} requests found most of their prompt in the prefix cache, by their times; "
            f"the simulated ones did too"
        )


def _means(runs: tuple[RunReport, ...]) -> Table:
    """Measured and predicted means of every run."""
    table = plain_table("run", "metric", "measured", "predicted", "error")
    for column in table.columns[2:]:
        column.justify = "right"
    for run in runs:
        name = run.name
        for metric, label in _UNITS.items():
            if metric not in run.metrics:
                continue
            mean = run.metrics[metric]["mean"]
            table.add_row(
                name,
                f"mean {label}",
                _time(mean["measured"]),
                _time(mean["predicted"]),
                f"{mean['error_pct']:+.1f} %",
            )
            name = ""
    return table


def _time(value_s: float) -> str:
    return f"{value_s:.2f} s" if value_s >= 1 else f"{1e3 * value_s:.2f} ms"
