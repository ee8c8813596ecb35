"""The folder of a validation's measurements, and how its runs are read.

measured.json                    which parts were measured, on which machine
profiles/LABEL.yaml              calibrated, a kind of worker each; LABEL/ has the measurements
accuracy/, ranking/              a deployment each:
    runs.jsonl                   its runs, a line each
    NAME.requests.jsonl          what the client saw in a run, a line a request
    steps/REPLICA.steps.jsonl    what each worker's engine computed, a line a step
    steps/REPLICA.gauge.jsonl    how fast the machine was meanwhile, where its CPU computed
    journal/                     what the scheduler was told and decided
    deploy.log, state/           what the deployment and its workers said
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from viisim.errors import InputError
from viisim.records import FINISHED, SHED
from viisim.validation.answers import Answers, between_tokens_s

Row: TypeAlias = dict[str, Any]

WARM_UP, CAPACITY = "warm-up", "capacity"
"""Groups of a part's runs beside those that are compared."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run that is to be measured."""

    name: str
    group: str
    """Runs that belong together: those of a load, or of a ranked workload."""
    policy: Mapping[str, Any]
    seed: int
    rate_per_s: float
    """Of its requests; 0 in a closed loop, as is `run_s`, for how long they arrive."""
    run_s: float


@dataclass(frozen=True, slots=True)
class MeasuredRun(PlannedRun):
    """One that was: a line of `runs.jsonl`."""

    begin_s: float
    end_s: float
    """On the machine's monotonic clock, as the workers' steps are."""
    client_cpu_s: float
    proxy_cpu_s: float


class Part:
    """The folder of one deployment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self._runs = folder / "runs.jsonl"
        self._steps: dict[str, list[Row]] = {}
        """By replica, once they were read."""
        self._requests: dict[str, list[Row]] = {}
        """By run, once they were read."""

    def steps_file(self, replica_id: str) -> Path:
        """A worker's step records."""
        return self.folder / "steps" / f"{replica_id}.steps.jsonl"

    def gauge_file(self, replica_id: str) -> Path:
        """How fast the machine was beside the worker."""
        return self.folder / "steps" / f"{replica_id}.gauge.jsonl"

    def requests_file(self, name: str) -> Path:
        """What the client saw in a run."""
        return self.folder / f"{name}.requests.jsonl"

    def add(self, run: MeasuredRun) -> None:
        """Note a run that is over."""
        with self._runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")

    @property
    def has_runs(self) -> bool:
        """Whether any is over."""
        return self._runs.exists()

    def runs(self) -> list[MeasuredRun]:
        """Those that are over, in their order. Raises InputError where there are none."""
        return [MeasuredRun(**row) for row in rows_of(self._runs)]

    def requests(self, name: str) -> list[Row]:
        """A run's request records in order of arrival. Raises InputError where there are none."""
        if name not in self._requests:
            rows = rows_of(self.requests_file(name))
            self._requests[name] = sorted(rows, key=lambda row: float(row["due_s"]))
        return self._requests[name]

    def steps(self, replica_id: str, runs: Sequence[MeasuredRun]) -> list[Row]:
        """The steps that a worker began during these runs. Raises InputError, as `runs`."""
        if replica_id not in self._steps:
            self._steps[replica_id] = rows_of(self.steps_file(replica_id))
        return [
            row
            for row in self._steps[replica_id]
            if any(run.begin_s <= row["start_s"] < run.end_s for run in runs)
        ]


def rows_of(file: Path) -> list[Row]:
    """The lines of a file of measurements. Raises InputError where there is none."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise _not_measured(file, error) from None


def _not_measured(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: nothing was measured there ({error}); measure it again")


def calibration_summary(folder: Path) -> Row:
    """What a calibration left beside its measurements. Raises InputError where there is none."""
    file = folder / "summary.json"
    try:
        summary: Row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_measured(file, error) from None
    return summary


def measured_answers(part: Part, run: MeasuredRun, replicas: Sequence[str]) -> Answers:
    """A measured run as its client saw it; preemptions are those in its replicas' steps."""
    rows = part.requests(run.name)
    whole = np.array([not row["error"] for row in rows], dtype=np.bool_)

    def column(name: str) -> Any:
        values = [np.nan if row[name] is None else float(row[name]) for row in rows]
        return np.where(whole, values, np.nan)

    output_tokens = np.where(whole, [row["output_tokens"] for row in rows], 0)
    ttft_s, e2e_s = column("ttft_s"), column("e2e_s")
    steps = (step for name in replicas for step in part.steps(name, [run]))
    return Answers(
        ids=tuple(row["id"] for row in rows),
        traffic_class=tuple(row["traffic_class"] for row in rows),
        due_s=np.array([row["due_s"] for row in rows], dtype=np.float64),
        ttft_s=ttft_s,
        tpot_s=between_tokens_s(ttft_s, e2e_s, output_tokens),
        e2e_s=e2e_s,
        output_tokens=output_tokens.astype(np.int64),
        preemptions=sum(step["preempted"] for step in steps),
        prefix_hit_tokens=sum(row["cached_tokens"] for row in rows),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
    )


def work_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """A measured run in the columns of which `viisim.capacity.work_rate_per_s` makes a rate."""
    ends_s = [row["due_s"] + (row["e2e_s"] or 0.0) for row in rows]
    return {
        "outcome": np.array([SHED if row["error"] else FINISHED for row in rows]),
        "finished_ns": np.array(ends_s) * 1e9,
        **{
            name: np.array([row[name] for row in rows], dtype=np.int64)
            for name in ("prompt_tokens", "cached_tokens", "output_tokens")
        },
    }
