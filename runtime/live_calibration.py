"""What `viisim calibrate --live` asks of a real worker, and what it learns beside its step times.

The sweep (`runtime.live_sweep`) is sent three times with different contents: machines have fast
and slow minutes, and no batch size should be measured in one of them only. In between one list of
mixed requests is sent twice: the difference of the two is the noise floor, their steps are traffic
that a fit of the sweeps has not seen, and their clients' times tell the way to a busy engine.
Workers that share a machine are measured at once, so that none has it for itself.

The worker records its own steps (`runtime.vllm_plugin`). They carry the machine's monotonic clock,
as the client's notes do, and so each step is known to belong to a part of the sweep. Where the CPU
computes, each has beside it how many times as long as usual it took, by the speed of the machine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from policies.interface import RequestView
from runtime.cluster import Planned
from runtime.live_delays import BusyDelays, Overhead, busy_delays_of, overhead_of
from runtime.live_front import fronted
from runtime.live_sweep import Chain, Phase, decode_sizes, sweep, traffic
from runtime.live_worker import engine_of, gauge_path, running, steps_path
from runtime.load import LoadClient, Record
from runtime.processes import Home
from viisim.calibration.gauge import Gauge, Response, fit_response, read_gauge
from viisim.calibration.own_records import read_steps
from viisim.errors import InputError
from viisim.profile import EngineSettings, ProfileEngine
from viisim.workload.request import Request

_WARM_UP, _SWEEPS = "warm-up", ("sweep-1", "sweep-2", "sweep-3")
_TRAFFIC = "traffic-1", "traffic-2"
_PARTS = (_WARM_UP, "sweep-1", "traffic-1", "sweep-2", "traffic-2", "sweep-3")
"""Of a run in their order, and names of their files."""

_VOCABULARY = range(10, 100)
"""Token ids that every model has, none of them special in the usual vocabularies."""
_SETTLE_S = 1.5
"""A recorder's last lines are in the file within half a second; this is longer."""
_PAUSE_S = 0.05
"""Between two phases: an engine that schedules ahead ends its last, empty step."""

Row: TypeAlias = dict[str, Any]


# --------------------------------------------------------------------------------------
# What is learned


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker to be measured."""

    replica: Planned
    cards: Sequence[int]
    home: Home
    """What it shows is left in its folder, one a worker."""
    steps: Path | None = None
    """Step records of a server that runs already."""


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


# --------------------------------------------------------------------------------------
# Workers that are kept busy


@asynccontextmanager
async def _busy(replica: Planned, cards: Sequence[int], home: Home) -> AsyncIterator[None]:
    """Another worker of the machine, behind the proxy and under traffic meanwhile."""
    settings = replica.entry.engine.resolve(replica.entry.load_profile())
    steps = home.folder / f"{replica.id}.beside.steps.jsonl"
    async with (
        running(replica, cards, home, steps, replica.id),
        fronted(replica, home) as url,
        _under_traffic(url, replica.entry.model, settings),
    ):
        yield


@asynccontextmanager
async def _under_traffic(url: str, model: str, settings: EngineSettings) -> AsyncIterator[None]:
    """The worker has traffic meanwhile, of which nothing is kept."""
    task = asyncio.create_task(_keep_busy(url, model, settings))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _keep_busy(url: str, model: str, settings: EngineSettings) -> None:
    while True:
        for phase in traffic(settings):
            await send(url, model, "beside", phase)


# --------------------------------------------------------------------------------------
# The run


async def measure(
    subjects: Sequence[Subject],
    *,
    beside: Sequence[tuple[Planned, Sequence[int]]] | None = None,
    settle_s: float = _SETTLE_S,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Send everything to each worker, to all at once, and leave what they showed in their folders.

    With `beside` they are measured as they are deployed: behind viisim's proxy, and beside these
    workers, given with their cards, which have traffic of their own meanwhile. What all of them
    take from each other (cores, caches, memory bandwidth, power) is then in the measurement.
    Raises InputError for a worker that does not start, refuses a request or records nothing.
    """
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(_started(subject, beside is not None, say))
            for subject in subjects
        ]
        for other, own in beside or ():
            await stack.enter_async_context(_busy(other, own, subjects[0].home))
        sent = await _send_to_all(started, say)
        await asyncio.sleep(settle_s)
        rows = [_rows(one.file, own[0].begin_s) for one, own in zip(started, sent, strict=True)]
    return [_learned(*each) for each in zip(started, sent, rows, strict=True)]


@dataclass(frozen=True, slots=True)
class _Started:
    """A subject that serves."""

    subject: Subject
    file: Path
    """Of its step records."""
    url: str
    engine: ProfileEngine
    start_s: float


@asynccontextmanager
async def _started(
    subject: Subject, is_fronted: bool, say: Callable[[str], None]
) -> AsyncIterator[_Started]:
    replica, home = subject.replica, subject.home
    file = steps_path(replica, home.folder, subject.steps)
    settings = replica.entry.engine.resolve(replica.entry.load_profile())
    begun_s = time.monotonic()
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(running(replica, subject.cards, home, file))
        start_s = time.monotonic() - begun_s
        url = replica.url
        if is_fronted:
            url = await stack.enter_async_context(fronted(replica, home))
        engine = await engine_of(worker, settings)
        say(f"{replica.id} is ready after {start_s:.0f} s: vLLM {engine.version}")
        yield _Started(subject, file, url, engine, start_s)


async def _send_to_all(started: Sequence[_Started], say: Callable[[str], None]) -> list[list[Sent]]:
    """To all at once; those that have had everything have traffic until all have."""
    sending, all_sent = len(started), asyncio.Event()

    async def send_to(one: _Started) -> list[Sent]:
        nonlocal sending
        replica = one.subject.replica
        sent = await _send_all(
            one.url, replica.entry.model, one.engine, lambda line: say(f"{replica.id}: {line}")
        )
        sending -= 1
        if not sending:
            all_sent.set()
        else:
            async with _under_traffic(one.url, replica.entry.model, one.engine):
                await all_sent.wait()
        return sent

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send_to(one)) for one in started]
    except* InputError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _learned(started: _Started, sent: Sequence[Sent], rows: Sequence[Row]) -> Measured:
    """What the requests and the steps show, and their files."""
    folder = started.subject.home.folder
    gauge, response = read_gauge(gauge_path(started.file)), None
    if gauge is not None:
        response = _gauged(rows, gauge, gauge.mean_s(sent[0].begin_s, sent[-1].end_s))
    _write_requests(folder / "requests.jsonl", sent)
    files = {part: _write_steps(folder, part, sent, rows) for part in _PARTS}
    lone = [one for one in sent if one.name == "alone"]
    lists = {part: [one for one in sent if one.part == part] for part in _TRAFFIC}
    traffics = [one for own in lists.values() for one in own]
    swept = [one for one in sent if one.part in _SWEEPS]
    overhead = overhead_of(_records(lone), list(_during(lone, rows)))
    return Measured(
        folder=folder,
        engine=started.engine.model_copy(update={"async_scheduling": _is_ahead(rows)}),
        sweeps=tuple(files[part] for part in _SWEEPS),
        traffic=tuple(files[part] for part in _TRAFFIC),
        overhead=overhead,
        busy=busy_delays_of(
            _records(traffics), list(_during(traffics, rows)), overhead.request_per_prompt_token_s
        ),
        noise_floor=noise_floor_of(*(_records(own) for own in lists.values())),
        response=response,
        start_s=started.start_s,
        sweep_s=sum(one.end_s - one.begin_s for one in swept),
        total_s=sent[-1].end_s - sent[0].begin_s,
    )


async def _send_all(
    url: str, model: str, engine: EngineSettings, say: Callable[[str], None]
) -> list[Sent]:
    """Warm up with the largest batches, which touch most of the memory, then send each part."""
    phases = sweep(engine)
    largest = [phase for phase in phases if len(phase.chains) == decode_sizes(engine)[-1]]
    content = {_WARM_UP: largest, **dict.fromkeys(_SWEEPS, phases)}
    content |= dict.fromkeys(_TRAFFIC, traffic(engine))
    sent = []
    for part in _PARTS:
        own = content[part]
        begun_s = time.monotonic()
        sent += [await send(url, model, part, phase) for phase in own]
        say(f"{part}: {len(own)} phases in {time.monotonic() - begun_s:.1f} s")
    return sent


async def send(url: str, model: str, part: str, phase: Phase) -> Sent:
    """Send a phase and wait for all its answers. Raises InputError when one is an error."""
    begin_s = 0.0

    def turns() -> Iterator[Request]:
        nonlocal begin_s
        begin_s = time.monotonic()  # the client, too, counts from when it asks for a request
        for number, chain in enumerate(phase.chains):
            # Contents of their own in each run: none may find another's in the prefix cache.
            yield _turn(chain, 0, model, (begin_s, number), 0)

    records = await LoadClient(url, vocabulary=_VOCABULARY).send(turns())
    for record in records:
        if record.error:
            raise InputError(
                f"{url}: {phase.name}: a request of {record.prompt_tokens} tokens failed "
                f"({record.error}); look into the server's log"
            )
    await asyncio.sleep(_PAUSE_S)
    return Sent(part, phase.name, begin_s, time.monotonic(), records)


def _turn(chain: Chain, number: int, model: str, mark: tuple[float, int], now_ns: int) -> Request:
    """A request of a chain, and behind it the next one."""
    ask, name = chain[number], f"{mark[1]}.{number}"
    due_ns = now_ns + round(ask.pause_s * 1e9)
    view = RequestView(name, model, due_ns / 1e9, ask.prompt_tokens, ask.output_tokens)
    goes_on = number + 1 < len(chain)
    following = partial(_turn, chain, number + 1, model, mark) if goes_on else None
    prompt = (((*mark, number), ask.prompt_tokens),)
    return Request(view, due_ns, prompt, ask.output_tokens, next_turn=following)


# --------------------------------------------------------------------------------------
# Files


def _rows(file: Path, since_s: float) -> list[Row]:
    """The worker's steps from then on. Raises InputError when there are none."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["start_s"] >= since_s]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no step records ({error}); look into the server's log") from None
    if not rows:
        raise InputError(f"{file}: the worker recorded no step; look into its log for `viisim:`")
    return rows


def _gauged(rows: Sequence[Row], gauge: Gauge, work_s: float) -> Response:
    """How the steps follow the machine; to each is added how many times as long as usual it took
    by that."""
    busy = [row for row in rows if row["decode_seqs"] or row["prefill_tokens"]]
    log = read_steps(busy, Path(), "").steps
    assert log is not None, "it was read from steps"
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
