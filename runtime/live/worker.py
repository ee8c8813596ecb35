"""A real worker that records its steps: how it is started, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.cluster import Planned, client_of
from runtime.commands import WorkerCommand, command_of
from runtime.http_worker import HttpWorker
from runtime.processes import Home, WorkerProcess
from runtime.vllm_plugin import RECORDS_VARIABLE, SCHEDULER_CLS, recording_environment
from runtime.worker import WorkerError
from viisim.errors import InputError
from viisim.profile import EngineSettings, ProfileEngine

_LOOK_S = 0.5
_URL_LIMIT_S = 10.0
"""How long a server that runs already may take to say so."""
_NUM_BLOCKS = re.compile(rb'^vllm:cache_config_info\{[^}]*\bnum_gpu_blocks="(\d+)"', re.MULTILINE)


def recording_command(
    command: WorkerCommand, steps: Path, gauge: Path | None = None
) -> WorkerCommand:
    """The same server with a record of each step in `steps`, and of the machine's speed."""
    argv = (*command.argv, "--scheduler-cls", SCHEDULER_CLS)
    return replace(command, argv=argv, env={**recording_environment(steps, gauge), **command.env})


def gauge_path(steps: Path) -> Path:
    """Where the speed of the machine goes, beside a worker's step records."""
    return steps.with_name(steps.name.removesuffix(".steps.jsonl") + ".gauge.jsonl")


def steps_path(replica: Planned, folder: Path, given: Path | None) -> Path:
    """Where the worker's step records are. Raises InputError for a replica of another kind than
    `vllm` and `url`, and for the latter when it is not said."""
    kind = replica.entry.worker.kind
    if kind == "vllm":
        return folder / "worker.steps.jsonl"
    if kind != "url":
        raise InputError(
            f"{replica.id}: worker.kind: {kind} cannot be calibrated; give kind: vllm, or start "
            f"the server with --scheduler-cls {SCHEDULER_CLS} and give kind: url and --steps FILE"
        )
    if given is None or not given.is_file():
        raise InputError(
            f"{replica.id}: a server that runs already must record its steps on this machine: "
            f"start it with --scheduler-cls {SCHEDULER_CLS} and {RECORDS_VARIABLE}=FILE, and give "
            "--steps FILE"
        )
    return given


@asynccontextmanager
async def running(
    replica: Planned, cards: Sequence[int], home: Home, steps: Path, name: str = "worker"
) -> AsyncIterator[HttpWorker]:
    """The worker, ready; one that was started here has ended afterwards. `name` is of its log."""
    async with AsyncExitStack() as stack:
        worker = client_of(replica, cards or None)
        stack.callback(worker.close)
        process, limit_s = None, _URL_LIMIT_S
        hint = f"look whether the server runs at {replica.url}"
        if replica.entry.worker.kind == "vllm":
            gauge = None if cards else gauge_path(steps)  # without cards, the CPU computes
            for file in (steps, gauge_path(steps)):
                file.unlink(missing_ok=True)  # the recorder would add to it
            log = home.folder / f"{name}.log"
            command = recording_command(command_of(replica, cards, home.mark), steps, gauge)
            process = await WorkerProcess.start(command, log, home)
            stack.push_async_callback(process.stop)
            limit_s = replica.entry.worker.start_limit(replica.entry.devices)
            hint = f"look into {log}"
        await _until_healthy(worker, process, limit_s, hint)
        yield worker


async def _until_healthy(
    worker: HttpWorker, process: WorkerProcess | None, limit_s: float, hint: str
) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not await worker.is_healthy():
                if process is not None and process.has_ended:
                    raise InputError(f"{worker.id}: the server ended before it was ready; {hint}")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise InputError(f"{worker.id}: not healthy within {limit_s:g} s; {hint}") from None


async def engine_of(worker: HttpWorker, settings: EngineSettings) -> ProfileEngine:
    """The settings, with the version and the blocks that the server tells of, if it does."""
    known: dict[str, Any] = {"name": "vllm", "version": "unknown", **settings.model_dump()}
    with suppress(WorkerError, ValueError, KeyError, TypeError):
        known["version"] = str(json.loads((await worker.get("/version"))[1])["version"])
    with suppress(WorkerError):
        blocks = _NUM_BLOCKS.search((await worker.get("/metrics"))[1])
        if blocks is not None:
            known["num_kv_blocks"] = int(blocks[1])
    return ProfileEngine.model_validate(known)
