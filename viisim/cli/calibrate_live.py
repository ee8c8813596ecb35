"""`viisim calibrate --live`: the profile of a worker that is measured here and now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from viisim.cli.terminal import plain_table, show

if TYPE_CHECKING:
    from runtime.cluster import Planned
    from runtime.live.measured import Measured
    from viisim.calibration.calibrate import Calibration, Options
    from viisim.config import Experiment, ReplicaConfig
    from viisim.profile import ApiDelay, Profile


@dataclass(frozen=True, slots=True)
class Unseen:
    """Relative errors, on steps of traffic, of a fit that has not seen them. How steps follow the
    machine, where that is gauged, is two numbers that all steps were asked for, these too."""

    steps: int
    step_time_mape: float
    total_step_time: float

    def __str__(self) -> str:
        return (
            f"A fit of the sweeps alone is off by {self.step_time_mape:.1%} a step (mean size) and "
            f"{self.total_step_time:+.1%} in total on {self.steps:,} steps of mixed traffic"
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
            "busy_delays": None if measured.busy is None else asdict(measured.busy),
            "noise_floor": dict(measured.noise_floor),
            "response": None if measured.response is None else asdict(measured.response),
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
            f"{1e3 * overhead.p90_s:.1f}); {1e3 * overhead.request_s:.1f} ms and "
            f"{1e6 * overhead.request_per_prompt_token_s:.1f} us a prompt token before them, "
            f"{1e3 * overhead.answer_s:.1f} ms after; {overhead.requests} requests, each alone"
        )
        if (busy := measured.busy) is not None:
            typer.echo(
                f"while the engine is busy: {1e3 * busy.request_s:.1f} ms before them, "
                f"{1e3 * busy.answer_s:.1f} ms after; {busy.requests} requests"
            )
        typer.echo(
            f"{measured.folder}: {measured.sweep_s:.0f} s of sweep, {measured.total_s:.0f} s in all"
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """A replica's profile that is to be made."""

    replica_id: str
    folder: Path
    """For what is measured."""
    options: Options
    steps: Path | None = None
    """Step records of a server that runs already."""


def calibrated_live(
    experiment: Experiment,
    wanted: Sequence[Wanted],
    say: Callable[[str], None],
    *,
    as_deployed: bool = False,
) -> list[tuple[Calibration, Live]]:
    """Measure the workers of these replicas, all at once; fit the sweeps of each, judge that fit by
    traffic that it has not seen, then fit all.

    `as_deployed` is behind viisim's proxy, and beside all other workers of the experiment: see
    `runtime.live.calibration.measure`. Raises InputError, too, for a worker that cannot be
    measured. `say` is told what happens, a line each.
    """
    from runtime.cluster import planned

    replicas = {one.id: one for one in planned(experiment)}
    measured = _measured(experiment, replicas, wanted, as_deployed, say)
    return [
        _fitted(own, replicas[one.replica_id].entry, one.options)
        for own, one in zip(measured, wanted, strict=True)
    ]


def _fitted(measured: Measured, entry: ReplicaConfig, options: Options) -> tuple[Calibration, Live]:
    from viisim.calibration.calibrate import calibrate
    from viisim.calibration.read import read_measurements

    stated = _stated(options, entry, measured)
    swept = calibrate(read_measurements(measured.sweeps), stated)
    unseen = _unseen(swept.profile, measured.traffic)
    # What comes in practice counts as well, once it has said how far off the sweeps alone were.
    done = calibrate(read_measurements([*measured.sweeps, *measured.traffic]), stated)
    notes = f"{done.profile.notes} {unseen}."
    # The engine as it ran, switches included; the fit knows numbers only.
    update = {"engine": measured.engine, "api": _api(measured), "notes": notes}
    profile = done.profile.model_copy(update=update)
    return replace(done, profile=profile), Live(measured, unseen)


def _measured(
    experiment: Experiment,
    replicas: Mapping[str, Planned],
    wanted: Sequence[Wanted],
    as_deployed: bool,
    say: Callable[[str], None],
) -> list[Measured]:
    from runtime.cards.assignment import cards_of
    from runtime.live.calibration import Subject, measure
    from runtime.processes import Home
    from runtime.serve import run

    cards = cards_of(experiment)
    beside = None
    if as_deployed:
        others = replicas.keys() - {one.replica_id for one in wanted}
        beside = [(replicas[name], cards.get(name, ())) for name in sorted(others)]
    found: list[Measured] = []

    async def main() -> None:
        found.extend(await measure(subjects, beside=beside, say=say))

    with ExitStack() as stack:
        subjects = []
        for one in wanted:
            home = stack.enter_context(Home(one.folder))
            for pid in home.end_leftovers():
                say(f"ended process {pid}, which an earlier start left behind")
            own = cards.get(one.replica_id, ())
            subjects.append(Subject(replicas[one.replica_id], own, home, one.steps))
        run(main())
    return found


def _api(measured: Measured) -> ApiDelay:
    """As it is under traffic, where that is known: engines that are scheduled are seldom idle."""
    from viisim.calibration.profile_parts import rounded
    from viisim.profile import ApiDelay

    idle = measured.overhead
    way = measured.busy or idle
    return ApiDelay(
        request_s=rounded(way.request_s),
        request_per_prompt_token_s=rounded(idle.request_per_prompt_token_s),
        answer_s=rounded(way.answer_s),
    )


def _stated(options: Options, entry: ReplicaConfig, measured: Measured) -> Options:
    """What the experiment and the worker say, where the user does not."""
    settings = measured.engine.model_dump(exclude={"name", "version", "scheduling_policy"})
    return replace(
        options,
        device=options.device or entry.device or entry.load_profile().device,
        model=options.model or entry.model,
        tensor_parallel=options.tensor_parallel or entry.tensor_parallel,
        settings=settings,
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
