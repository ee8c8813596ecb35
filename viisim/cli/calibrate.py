"""`viisim calibrate`: a profile from measurements, of files or of a worker that runs here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import plain_table, refuse, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.calibration.calibrate import Calibration
    from viisim.cli.calibrate_live import Live

_COMMENT_WIDTH = 94
_OF_FILES = {
    "only",
    "first",
    "num_kv_blocks",
    "block_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
}
_OF_LIVE = {"steps", "as_deployed"}
"""Parameters of one way to use the command."""


def calibrate(
    context: typer.Context,
    *,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Results of `vllm bench serve --save-detailed`, step or request records, "
            "LLMServingSim requests, or splitwise's perf_model.csv; plain or gz.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The profile to write (YAML).", show_default=False
        ),
    ],
    live: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An experiment: start the worker of its first replica, and measure that.",
        ),
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --live and a worker of kind url: where it records its steps."
        ),
    ] = None,
    as_deployed: Annotated[
        bool,
        typer.Option(
            "--as-deployed",
            help="With --live: measure behind viisim's proxy and beside the experiment's other "
            "workers, under traffic, because they share cores.",
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Name of the device in the profile: radeon_vii.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model in the profile: qwen3-vl-8b-awq.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Use only measurements whose name or setup has TEXT."),
    ] = None,
    first: Annotated[
        int | None, typer.Option(min=2, help="Use only the first N requests or steps of a file.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1)] = None,
    power_cap: Annotated[
        float | None,
        typer.Option(metavar="WATTS", help="The cap to make the profile for, of several measured."),
    ] = None,
    num_kv_blocks: Annotated[int | None, typer.Option(min=2)] = None,
    block_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1)] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    notes: Annotated[
        str, typer.Option(metavar="TEXT", help="More to say in the profile's notes.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors as JSON.")] = False,
) -> None:
    """Fit step times to measurements of one model in one build: a profile, and its error.

    viisim calibrate results/*.json -o profiles/mine.yaml --device radeon_vii
    viisim calibrate worker0.steps.jsonl -o worker0.yaml --num-kv-blocks 223
    viisim calibrate --live experiments/deploy/vllm_cpu.yaml -o profiles/mine.yaml

    The error is measured on runs the fit has not seen: each run is predicted from the others.
    With --live a real worker is sent a sweep of requests; what it showed stays in a folder beside
    the profile (mine_live), with the delays and the noise that no profile holds.
    """
    from viisim.calibration.calibrate import Options
    from viisim.calibration.calibrate import calibrate as fit
    from viisim.calibration.profile_file import write_profile
    from viisim.calibration.read import first_of, read_measurements
    from viisim.cli.calibrate_live import Wanted, calibrated_live
    from viisim.config import load_experiment

    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"-o {out}: a profile is a .yaml file; give such a name")
    if (live is None) == (not files):
        raise InputError("calibrate: give files of measurements, or --live with an experiment")
    if live is None:
        refuse(context, _OF_LIVE, "only with --live")
    else:
        refuse(context, _OF_FILES, "not with --live, which uses all that it measures")
    given = {
        "num_kv_blocks": num_kv_blocks,
        "block_tokens": block_tokens,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    options = Options(device, model, tensor_parallel, power_cap, settings, notes)
    beside: Live | None = None
    if live is not None:
        experiment = load_experiment(live)
        (first_id, _), *_ = experiment.numbered_replicas()
        folder = out.with_name(f"{out.stem}_live")
        ((done, beside),) = calibrated_live(
            experiment,
            [Wanted(first_id, folder, options, steps)],
            lambda line: typer.echo(line, err=as_json),
            as_deployed=as_deployed,
        )
    else:
        done = fit([first_of(run, first) for run in read_measurements(files or [], only)], options)
    write_profile(done.profile, out, _comments(files or [], out, context.params))
    for warning in done.warnings:
        typer.echo(f"warning: {warning}", err=True)
    summary = _summary(out, done)
    if beside is not None:
        summary |= beside.summary()
        beside.write(summary)
    if as_json:
        show_json(summary)
        return
    _show(out, done)
    if beside is not None:
        beside.show()


def _summary(out: Path, done: Calibration) -> dict[str, object]:
    profile = done.profile
    return {
        "profile": str(out),
        "device": profile.device,
        "model": profile.model,
        "build": profile.engine.version,
        "power_cap_w": profile.power_cap_w,
        "calibrated_range": profile.range.model_dump(mode="json"),
        "noise": profile.noise.model_dump(mode="json") if profile.noise else None,
        "cross_validation": profile.cross_validation,
        "held_out_error": profile.held_out_error,
        "held_out": list(done.held_out),
        "warnings": list(done.warnings),
    }


def _show(out: Path, done: Calibration) -> None:
    profile = done.profile
    decode = plain_table("sequences", "base (ms)", "per 1,000 context tokens (ms)")
    for entry in profile.step_time.decode:
        decode.add_row(
            str(entry.sequences),
            f"{1e3 * entry.base_s:.2f}",
            f"{1e6 * entry.per_context_token_s:.3f}",
        )
    errors = plain_table(f"held out, by {profile.cross_validation}", "median", "p90")
    found = profile.held_out_error or {}
    for name in dict.fromkeys(key.rsplit("_", 1)[0] for key in found):
        errors.add_row(name, f"{found[f'{name}_p50']:.1%}", f"{found[f'{name}_p90']:.1%}")
    show(decode, errors) if found else show(decode)
    prefill = profile.step_time.prefill
    typer.echo(
        f"prefill: {1e3 * prefill.base_s:.1f} ms a step, {1e6 * prefill.per_token_s:.1f} us a "
        f"token, {1e9 * prefill.per_token_context_s:.1f} ns a pair"
    )
    typer.echo(f"{out}: profile of {profile.model} on {profile.device}, {profile.engine.version}")


def _comments(files: list[Path], out: Path, given: Mapping[str, object]) -> list[str]:
    """How the file came about: a command that holds no path of this machine."""
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(_worded(value))}"
        for name, value in given.items()
        if value not in (None, False) and name not in ("files", "out", "as_json", "notes")
    ]
    target = out.name if out.is_absolute() else out.as_posix()
    lines = ["viisim calibrate"]
    for word in [*_shown(files), f"-o {target}", *options]:
        if len(lines[-1]) + len(word) < _COMMENT_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    *first, last = lines
    return ["Made by:", *(f" {line} \\" for line in first), f" {last}"]


def _worded(value: object) -> str:
    """An option's value; of a file of this machine, its name."""
    return value.name if isinstance(value, Path) and value.is_absolute() else str(value)


def _shown(files: list[Path]) -> list[str]:
    """The files as a shell would find them again: in the shared folder, by a pattern where they
    are all of a folder."""
    from viisim.workload.config_parts import shared_folder

    shared = shared_folder().resolve()
    shown = []
    for folder in dict.fromkeys(path.resolve().parent for path in files):
        inside = {path.resolve() for path in files if path.resolve().parent == folder}
        ending = "".join(next(iter(inside)).suffixes[-2:])
        where = (
            f"$VIISIM_SHARED/{folder.relative_to(shared).as_posix()}/"
            if folder.is_relative_to(shared)
            else ""
        )
        if len(inside) > 1 and inside == set(folder.glob(f"*{ending}")):
            shown.append(f"{where}*{ending}")
        else:
            shown += [f"{where}{path.name}" for path in sorted(inside)]
    return shown
