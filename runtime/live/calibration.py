"""What `viisim calibrate --live` asks of a real worker, and what it learns beside its step times.

The sweep (`runtime.live.sweep`) is sent three times with different contents: machines have fast
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
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from policies.interface import RequestView
from runtime.cluster import Planned
from runtime.live.front import fronted
from runtime.live.measured import PARTS, SWEEPS, TRAFFIC, WARM_UP, Measured, Sent, learned
from runtime.live.sweep import Chain, Phase, decode_sizes, sweep, traffic
from runtime.live.worker import engine_of, running, steps_path
from runtime.load import SMALL_VOCABULARY, LoadClient
from runtime.processes import Home
from viisim.errors import InputError
from viisim.profile import EngineSettings, ProfileEngine
from viisim.workload.request import Request

_SETTLE_S = 1.5
"""A recorder's last lines are in the file within half a second; this is longer."""
_PAUSE_S = 0.05
"""Between two phases: an engine that schedules ahead ends its last, empty step."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker to be measured."""

    replica: Planned
    cards: Sequence[int]
    home: Home
    """What it shows is left in its folder, one a worker."""
    steps: Path | None = None
    """Step records of a server that runs already."""


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
    """The worker has traffic meanwhile, of which nothing is kept; an error of it ends the block."""
    try:
        async with asyncio.TaskGroup() as group:
            busy = group.create_task(_keep_busy(url, model, settings))
            yield
            busy.cancel()
    except* InputError as errors:
        raise errors.exceptions[0] from None


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
    return [
        learned(one.subject.home.folder, one.file, own, one.engine, one.start_s)
        for one, own in zip(started, sent, strict=True)
    ]


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


async def _send_all(
    url: str, model: str, engine: EngineSettings, say: Callable[[str], None]
) -> list[Sent]:
    """Warm up with the largest batches, which touch most of the memory, then send each part."""
    phases = sweep(engine)
    largest = [phase for phase in phases if len(phase.chains) == decode_sizes(engine)[-1]]
    content = {WARM_UP: largest, **dict.fromkeys(SWEEPS, phases)}
    content |= dict.fromkeys(TRAFFIC, traffic(engine))
    sent = []
    for part in PARTS:
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

    records = await LoadClient(url, vocabulary=SMALL_VOCABULARY).send(turns())
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
