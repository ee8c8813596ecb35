"""`viisim validate --live`: calibrate on real workers, predict, measure, and compare."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from viisim.cli.folders import make_empty
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.config import Experiment, ReplicaConfig
    from viisim.validation.config import PartConfig, ValidationConfig
    from viisim.validation.judge import Measurements
    from viisim.validation.report import Report

Say: TypeAlias = Callable[[str], None]

ABOUT = "measured.json"
FORMAT = 3
"""Of a folder of measurements: another number whenever what is measured changes."""


def validated_live(file: Path, folder: Path, *, quick: bool, again: bool, say: Say) -> Report:
    """Measure what the file asks for into `folder`, and judge it; with `again`, judge what the
    folder holds already, as quick as that was. Raises InputError for a mistake in the file, a
    worker that does not start, and a folder that holds something else."""
    from viisim.validation.config import load_validation
    from viisim.validation.judge import judge

    if not again:
        _measure(file, load_validation(file, quick=quick), folder, quick, say)
    about = _about(folder)
    config = load_validation(file, quick=about["quick"])
    command = f"viisim validate --live {shlex.quote(file.as_posix())}"
    return judge(_measured(config, folder, about), command + (" --quick" if about["quick"] else ""))


def write_page(report: Report, folder: Path, page: Path) -> None:
    """Write the report as a page among others, its figures in images/NAME beside it."""
    images = page.parent / "images" / page.stem
    try:
        images.mkdir(parents=True, exist_ok=True)
        for name, _ in report.pictures:
            shutil.copyfile(folder / "plots" / name, images / name)
        page.write_text(report.markdown(f"images/{page.stem}"), encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(
            f"--page {page}: {error.strerror}; give a file that can be written"
        ) from None


def _about(folder: Path) -> dict[str, Any]:
    """What was measured into the folder."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / ABOUT}: {error}; measure first, without --again") from None
    if about.get("format") != FORMAT:
        raise InputError(
            f"{folder / ABOUT}: format: another version of viisim measured this; measure again, "
            "into another folder"
        )
    return about


def _measured(config: ValidationConfig, folder: Path, about: dict[str, Any]) -> Measurements:
    """What the folder holds."""
    from viisim.config import load_experiment
    from viisim.validation.judge import Measurements
    from viisim.validation.measured import Part

    workers = Workers(config, folder / "profiles")
    experiments = {
        name: load_experiment(part.file, workers.overrides(part))
        for name, part in config.parts.items()
        if name in about["wall_s"] or Part(folder / name).has_runs
    }
    return Measurements(folder, config, experiments, about)


class Workers:
    """The kinds of workers in a validation's experiments, each with a profile of its own. Those of
    one kind have the same neighbours, too: workers take memory's bandwidth from each other.

    Raises InputError for a worker that is not started here.
    """

    def __init__(self, config: ValidationConfig, folder: Path) -> None:
        from viisim.config import load_experiment

        self._folder = folder
        self._labels: dict[str, str] = {}
        """By what tells kinds apart."""
        self._kinds_of: Counter[str] = Counter()
        """By the name of their weights."""
        self._parts: list[tuple[Experiment, dict[str, str]]] = []
        """Experiments, and the first replica of each kind in them, by label."""
        for part in config.parts.values():
            experiment = load_experiment(part.file, part.overrides)
            for replica_id, entry in experiment.numbered_replicas():
                if entry.worker.kind != "vllm":
                    raise InputError(
                        f"{part.file}: {replica_id}: worker.kind: {entry.worker.kind}; live "
                        "validation starts the workers itself: give kind vllm"
                    )
            first: dict[str, str] = {}
            for replica_id, label in self._labels_of(experiment).items():
                first.setdefault(label, replica_id)
            self._parts.append((experiment, first))

    @property
    def labels(self) -> list[str]:
        """Of all kinds."""
        return list(self._labels.values())

    def calibrations(self) -> Iterator[tuple[Experiment, dict[str, str]]]:
        """Deployments in which every kind is once, those of most kinds first: replicas by label."""
        left = set(self.labels)
        for experiment, first in sorted(self._parts, key=lambda part: -len(part[1])):
            if own := {label: replica for label, replica in first.items() if label in left}:
                yield experiment, own
                left -= own.keys()

    def _labels_of(self, experiment: Experiment) -> dict[str, str]:
        """Of each replica."""
        entries = dict(experiment.numbered_replicas())
        ignored = {"count", "model", "profile"}
        settings = {
            replica_id: json.dumps(entry.model_dump(mode="json", exclude=ignored))
            for replica_id, entry in entries.items()
        }
        return {
            replica_id: self._label(
                entry,
                settings[replica_id],
                sorted(settings[other] for other in entries if other != replica_id),
            )
            for replica_id, entry in entries.items()
        }

    def _label(self, entry: ReplicaConfig, settings: str, beside: Sequence[str]) -> str:
        """The name of the weights, with a number where other settings had it before."""
        kind = json.dumps([settings, *beside])
        if kind not in self._labels:
            name = Path(entry.worker.weights or entry.model).name
            self._kinds_of[name] += 1
            number = self._kinds_of[name]
            self._labels[kind] = name if number == 1 else f"{name}-{number}"
        return self._labels[kind]

    def profile(self, label: str) -> Path:
        """Where the profile of such a worker is, or will be."""
        return (self._folder / f"{label}.yaml").absolute()

    def overrides(self, part: PartConfig) -> list[str]:
        """What makes the part's experiment one with these profiles."""
        from viisim.config import load_experiment

        experiment = load_experiment(part.file, part.overrides)
        labels = iter(self._labels_of(experiment).values())
        own = [set(islice(labels, entry.count)) for entry in experiment.cluster.replicas]
        profiles = [str(self.profile(label)) for (label,) in own]
        return [
            *part.overrides,
            *(f"cluster.replicas.{i}.profile={json.dumps(p)}" for i, p in enumerate(profiles)),
        ]


# --------------------------------------------------------------------------------------
# Measuring


def _measure(file: Path, config: ValidationConfig, folder: Path, quick: bool, say: Say) -> None:
    from runtime.live.validation import Clock
    from runtime.processes import Home
    from runtime.serve import run
    from viisim.validation.config import ACCURACY, RANKING
    from viisim.validation.measure import measure_accuracy, measure_ranking
    from viisim.validation.measured import Part

    workers, clock = Workers(config, folder / "profiles"), Clock()
    make_empty(folder, "--out", ", or give --again to judge what was measured there")
    for experiment, replicas in workers.calibrations():
        profiles = {label: workers.profile(label) for label in replicas}
        with clock.timing(f"calibrating {' and '.join(replicas)}"):
            _calibrate(experiment, replicas, profiles, say)

    measuring = {ACCURACY: partial(measure_accuracy, config.accuracy)}
    if config.ranking is not None:
        measuring[RANKING] = partial(measure_ranking, config.ranking)
    for name, measure in measuring.items():
        part = Part(folder / name)
        with clock.timing(name), Home(part.folder) as home:
            run(measure(workers.overrides(config.parts[name]), part, home, say))
        about = {
            "format": FORMAT,
            "file": file.name,
            "quick": quick,
            "machine": machine(),
            "cores": os.cpu_count(),
            "weights": workers.labels,
            "wall_s": clock.wall_s,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / ABOUT).write_text(text, encoding="utf-8")


def machine() -> str:
    """Cores and processor that the workers ran on, as Linux calls it."""
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{os.cpu_count()} cores of {name}"


def _calibrate(
    experiment: Experiment, replicas: Mapping[str, str], profiles: Mapping[str, Path], say: Say
) -> None:
    """Fit the profiles of these workers, by label, which are started for that and ended, as they
    are deployed: behind the proxy, and beside each other and the others of their experiment. What
    they take from each other on one machine belongs to their step times."""
    from viisim.calibration.calibrate import Options
    from viisim.calibration.profile_file import write_profile
    from viisim.cli.calibrate_live import Wanted, calibrated_live

    say(f"calibrating {' and '.join(replicas)}")
    wanted = []
    for label, replica_id in replicas.items():
        folder = profiles[label].with_suffix("")
        folder.mkdir(parents=True)
        wanted.append(Wanted(replica_id, folder, Options(model=label)))
    found = calibrated_live(experiment, wanted, say, as_deployed=True)
    for (label, out), (done, live) in zip(profiles.items(), found, strict=True):
        comment = f"Made by viisim validate --live: {experiment.name}, {label}"
        write_profile(done.profile, out, [comment])
        live.write(live.summary())
