"""What a calibration's run of a real worker showed, and the files that keep it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from runtime.live.delays import BusyDelays, Overhead, busy_delays_of, overhead_of
from runtime.live.worker import gauge_path
from runtime.load import Record
from viisim.calibration.gauge import Gauge, Response, fit_response, read_gauge
from viisim.calibration.own_records import step_log
from viisim.errors import InputError
from viisim.profile import ProfileEngine

WARM_UP, SWEEPS = "warm-up", ("sweep-1", "sweep-2", "sweep-3")
TRAFFIC = "traffic-1", "traffic-2"
PARTS = (WARM_UP, "sweep-1", "traffic-1", "sweep-2", "traffic-2", "sweep-3")
"""Of a run in their order, and names of their files."""

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sent:
    """A phase, as it went."""

    part: str
    """The pass it belongs to, and so the name of its file."""
    name: str
    begin_s: float
    """Zero of the records' clock."""
    end_s: float
    records: Sequence[Record]

    def records_by_steps_clock(self) -> list[Record]:
        """The records, their `sent_s` on the machine's monotonic clock."""
        return [replace(one, sent_s=self.begin_s + one.sent_s) for one in self.records]


@dataclass(frozen=True, slots=True)
class Measured:
    """A worker's measurements, and where their files are."""

    folder: Path
    engine: ProfileEngine
    sweeps: tuple[Path, ...]
    traffic: tuple[Path, ...]
    """Step records of the passes."""
    overhead: Overhead
    """On an idle engine."""
    busy: BusyDelays | None
    """None where it was idle most of the time."""
    noise_floor: Mapping[str, float]
    """Relative difference of the means of `ttft`, `tpot` and `e2e` between two equal lists."""
    response: Response | None
    """How the steps follow the machine; the profile is for its mean speed. None where that was not
    gauged."""
    start_s: float
    """How long the worker took to start."""
    sweep_s: float
    total_s: float
    """From the first request to the last answer."""


def noise_floor_of(first: Sequence[Record], second: Sequence[Record]) -> dict[str, float]:
    """Relative difference of the means between two runs of one list."""
    means = [_means(records) for records in (first, second)]
    return {name: means[1][name] / means[0][name] - 1 for name in means[0]}


def _means(records: Sequence[Record]) -> dict[str, float]:
    ttft_s = np.array([record.ttft_from_sent_s for record in records], dtype=float)
    e2e_s = np.array([record.e2e_from_sent_s for record in records], dtype=float)
    gaps = np.array([record.output_tokens - 1 for record in records])
    tpot_s = (e2e_s - ttft_s)[gaps > 0] / gaps[gaps > 0]
    return {"ttft": ttft_s.mean(), "tpot": tpot_s.mean(), "e2e": e2e_s.mean()}


def learned(
    folder: Path, file: Path, sent: Sequence[Sent], engine: ProfileEngine, start_s: float
) -> Measured:
    """What the requests show, and the step records in `file`; left in `folder`, a file a part.

    Raises InputError when there are no records of steps since the first request.
    """
    rows = _step_rows(file, sent[0].begin_s)
    gauge, response = read_gauge(gauge_path(file)), None
    if gauge is not None:
        response = _gauged(file, rows, gauge, gauge.mean_s(sent[0].begin_s, sent[-1].end_s))
    _write_requests(folder / "requests.jsonl", sent)
    files = {part: _write_steps(folder, part, sent, rows) for part in PARTS}
    lone = [one for one in sent if one.name == "alone"]
    lists = {part: [one for one in sent if one.part == part] for part in TRAFFIC}
    traffics = [one for own in lists.values() for one in own]
    swept = [one for one in sent if one.part in SWEEPS]
    overhead = overhead_of(_records(lone), list(_during(lone, rows)))
    return Measured(
        folder=folder,
        engine=engine.model_copy(update={"async_scheduling": _is_ahead(rows)}),
        sweeps=tuple(files[part] for part in SWEEPS),
        traffic=tuple(files[part] for part in TRAFFIC),
        overhead=overhead,
        busy=busy_delays_of(
            _records(traffics), list(_during(traffics, rows)), overhead.request_per_prompt_token_s
        ),
        noise_floor=noise_floor_of(*(_records(own) for own in lists.values())),
        response=response,
        start_s=start_s,
        sweep_s=sum(one.end_s - one.begin_s for one in swept),
        total_s=sent[-1].end_s - sent[0].begin_s,
    )


def _step_rows(file: Path, since_s: float) -> list[Row]:
    """The worker's steps from then on. Raises InputError when there are none."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["start_s"] >= since_s]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no step records ({error}); look into the server's log") from None
    if not rows:
        raise InputError(f"{file}: the worker recorded no step; look into its log for `viisim:`")
    return rows


def _gauged(file: Path, rows: Sequence[Row], gauge: Gauge, work_s: float) -> Response:
    """How the steps of the file follow the machine; to each is added how many times as long as
    usual it took by that."""
    busy = [row for row in rows if row["decode_seqs"] or row["prefill_tokens"]]
    log = step_log(busy, file)
    start_s = np.array([row["start_s"] for row in busy])
    response, slowdowns = fit_response(log, start_s, gauge, work_s)
    for row, slowdown in zip(busy, slowdowns, strict=True):
        row["slowdown"] = round(float(slowdown), 4)
    return response


def _records(sent: Sequence[Sent]) -> list[Record]:
    """By the clock of the steps."""
    return [record for one in sent for record in one.records_by_steps_clock()]


def _during(sent: Sequence[Sent], rows: Sequence[Row]) -> Iterator[Row]:
    for one in sent:
        yield from (row for row in rows if one.begin_s <= row["start_s"] < one.end_s)


def _write_steps(folder: Path, part: str, sent: Sequence[Sent], rows: Sequence[Row]) -> Path:
    path = folder / f"{part}.steps.jsonl"
    own = _during([one for one in sent if one.part == part], rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return path


def _write_requests(path: Path, sent: Sequence[Sent]) -> None:
    """Every request as the client saw it, with the part and the phase it belongs to."""
    lines = (
        json.dumps({"part": one.part, "phase": one.name, **asdict(record)}) + "\n"
        for one in sent
        for record in one.records
    )
    path.write_text("".join(lines), encoding="utf-8")


def _is_ahead(rows: Sequence[Row]) -> bool:
    """Whether the engine schedules a step while the last one executes: then most steps follow it
    without any gap."""
    return median(0.0 if row["gap_s"] == 0.0 else 1.0 for row in rows) == 0.0
