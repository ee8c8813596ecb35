"""`viisim calibrate --live`: the profile of a worker that is measured here and now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from viisim.cli.terminal import plain_table, show

if TYPE_CHECKING:
    from runtime.live_calibration import Measured
    from viisim.calibration.calibrate import Calibration, Options
    from viisim.config import Experiment
    from viisim.profile import Profile


@dataclass(frozen=True, slots=True)
class Unseen:
    """Errors of the profile on the steps of traffic that it was not fitted to; relative."""

    steps: int
    step_time_mape: float
    total_step_time: float

    def __str__(self) -> str:
        return (
            f"{self.steps:,} steps of mixed traffic, not fitted: mean absolute error "
            f"{self.step_time_mape:.1%} a step, {self.total_step_time:+.1%} of their total"
        )


@dataclass(frozen=True, slots=True)
class Live:
    """What a live calibration shows beside the fit."""

    measured: Measured
    unseen: Unseen

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        measured = self.measured
        return {
            "unseen_traffic": asdict(self.unseen),
            "host_overhead": asdict(measured.overhead),
            "noise_floor": dict(measured.noise_floor),
            "start_s": measured.start_s,
            "sweep_s": measured.sweep_s,
            "total_s": measured.total_s,
            "folder": str(measured.folder),
        }

    def write(self, summary: dict[str, Any]) -> None:
        """Leave the summary beside the measurements."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (self.measured.folder / "summary.json").write_text(text, encoding="utf-8")

    def show(self) -> None:
        """On the terminal."""
        measured, overhead = self.measured, self.measured.overhead
        floor = plain_table("one list, twice", "difference of means")
        for name, share in measured.noise_floor.items():
            floor.add_row(name, f"{share:+.1%}")
        show(floor)
        typer.echo(str(self.unseen))
        typer.echo(
            f"time to first token beyond the engine's steps: {1e3 * overhead.p50_s:.1f} ms (p90 "
            f"{1e3 * overhead.p90_s:.1f}), {1e6 * overhead.per_prompt_token_s:.1f} us a prompt "
            f"token of it; {overhead.requests} requests, each alone"
        )
        typer.echo(
            f"{measured.folder}: {measured.sweep_s:.0f} s of sweep, {measured.total_s:.0f} s in all"
        )


def calibrated_live(
    file: Path, steps: Path | None, folder: Path, options: Options, *, quiet: bool
) -> tuple[Calibration, Live]:
    """Measure the worker of the experiment's first replica, fit its sweep, and judge the fit by
    traffic that it has not seen. What was measured stays in `folder`.

    `steps`: see `runtime.live_calibration.measure`. Raises InputError, too, for a worker that
    cannot be measured. `quiet` leaves stdout to the caller.
    """
    from viisim.calibration.calibrate import calibrate
    from viisim.calibration.read import read_measurements
    from viisim.config import load_experiment

    experiment = load_experiment(file)
    measured = _measured(experiment, steps, folder, quiet)
    done = calibrate(read_measurements(measured.sweeps), _stated(options, experiment, measured))
    unseen = _unseen(done.profile, measured.traffic)
    notes = f"{done.profile.notes} {unseen}."
    # The engine as it ran, switches included; the fit knows numbers only.
    profile = done.profile.model_copy(update={"engine": measured.engine, "notes": notes})
    return replace(done, profile=profile), Live(measured, unseen)


def _measured(experiment: Experiment, steps: Path | None, folder: Path, quiet: bool) -> Measured:
    from runtime.cards import cards_of
    from runtime.cluster import planned
    from runtime.live_calibration import measure
    from runtime.processes import Home
    from runtime.serve import run

    replica = planned(experiment)[0]
    cards = cards_of(experiment).get(replica.id, ())
    found: list[Measured] = []

    def say(line: str) -> None:
        typer.echo(line, err=quiet)

    async def main() -> None:
        found.append(await measure(replica, cards, home, steps=steps, say=say))

    with Home(folder) as home:
        for pid in home.end_leftovers():
            say(f"ended process {pid}, which an earlier start left behind")
        run(main())
    return found[0]


def _stated(options: Options, experiment: Experiment, measured: Measured) -> Options:
    """What the experiment and the worker say, where the user does not."""
    entry = experiment.cluster.replicas[0]
    settings = measured.engine.model_dump(exclude={"name", "version", "scheduling_policy"})
    return replace(
        options,
        device=options.device or entry.device or entry.load_profile().device,
        model=options.model or entry.model,
        tensor_parallel=options.tensor_parallel or entry.tensor_parallel,
        settings={**settings, **options.settings},
    )


def _unseen(profile: Profile, files: Sequence[Path]) -> Unseen:
    from viisim.calibration.measurements import StepLog
    from viisim.calibration.read import read_measurements
    from viisim.calibration.validate import predicted_s

    runs = read_measurements(files)
    log = StepLog.joined([run.steps for run in runs if run.steps is not None])
    predicted = predicted_s(log, profile)
    mape = float(np.abs(predicted / log.duration_s - 1).mean())
    return Unseen(len(log), mape, float(predicted.sum() / log.duration_s.sum() - 1))
