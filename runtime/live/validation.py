"""The measured half of `viisim validate --live`: traffic through `viisim deploy`, on real workers.

Everything goes into one folder, and `viisim.validation` judges what is there: who changes the
simulator can have old measurements judged again. A part of a validation (accuracy, ranking) is one
deployment, whose workers record their steps; the policy changes between runs, the workers stay.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import psutil

from runtime.cluster import free_ports
from runtime.commands import WorkerCommand
from runtime.load import SMALL_VOCABULARY, LoadClient
from runtime.processes import Home, WorkerProcess
from runtime.vllm_plugin import SCHEDULER_CLS, recording_environment
from viisim.config import Experiment, load_experiment
from viisim.errors import InputError
from viisim.validation.measured import MeasuredRun, Part, PlannedRun
from viisim.workload.request import Request

Say: TypeAlias = Callable[[str], None]

_LOOK_S = 0.5
_PAUSE_S = 1.0
"""Between two runs: the last scrape of gauges must say that nothing runs."""
_END_S = 120.0
"""How long a deployment may take to end its workers."""


def recording(file: Path, part: Part, overrides: Sequence[str]) -> list[str]:
    """The overrides under which the experiment's workers, all of kind `vllm`, record their steps
    in the part's folder, and those without cards the machine's speed."""
    changes = list(overrides)
    for index, entry in enumerate(load_experiment(file, overrides).cluster.replicas):
        key = f"cluster.replicas.{index}.worker"
        args = [*entry.worker.args, "--scheduler-cls", SCHEDULER_CLS]
        gauge = part.gauge_file("{replica}") if entry.worker.without_cards else None
        environment = recording_environment(part.steps_file("{replica}"), gauge)
        changes.append(f"{key}.args={json.dumps(args)}")
        changes.append(f"{key}.env={json.dumps({**environment, **entry.worker.env})}")
    return changes


class Clock:
    """How long each part takes."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Note how long the block takes."""
        begun_s = time.monotonic()
        yield
        self.wall_s[part] = round(time.monotonic() - begun_s, 1)


# --------------------------------------------------------------------------------------
# A deployment


class Served:
    """A running `viisim deploy`."""

    def __init__(
        self, url: str, admin_key: str, pid: int, log: Path, session: aiohttp.ClientSession
    ) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {admin_key}"}
        self._process = psutil.Process(pid)
        self._log = log
        self._session = session

    async def is_ready(self, workers: int) -> bool:
        """Whether so many workers take requests."""
        try:
            async with self._session.get(
                f"{self.url}/admin/state", headers=self._headers
            ) as answer:
                states = [one["state"] for one in (await answer.json())["workers"]]
        except aiohttp.ClientError:
            return False
        return states.count("ready") == workers

    async def schedule_by(self, policy: Mapping[str, Any]) -> None:
        """Change the policy. Raises InputError when the deployment refuses it, or has ended."""
        try:
            async with self._session.post(
                f"{self.url}/admin/policy", headers=self._headers, json=dict(policy)
            ) as answer:
                if answer.status != 200:
                    raise InputError(f"policy {dict(policy)}: refused: {await answer.text()}")
        except aiohttp.ClientError as error:
            raise InputError(f"viisim deploy: {error}; look into {self._log}") from None

    def cpu_s(self) -> float:
        """What the proxy has computed so far; its workers not counted. Raises InputError when it
        has ended."""
        try:
            times = self._process.cpu_times()
        except psutil.NoSuchProcess:
            raise InputError(f"viisim deploy ended during a run; look into {self._log}") from None
        return float(times.user + times.system)


@asynccontextmanager
async def deployed(
    file: Path, overrides: Sequence[str], part: Part, home: Home, say: Say
) -> AsyncIterator[Served]:
    """`viisim deploy` of the experiment, all workers ready; it has ended afterwards.

    Raises InputError when a worker does not become ready.
    """
    part.steps_file("").parent.mkdir(parents=True, exist_ok=True)
    admin_key, port = secrets.token_hex(16), free_ports(1)[0]
    ours = {
        "deploy.listen": f"127.0.0.1:{port}",
        "deploy.admin_sha256": hashlib.sha256(admin_key.encode()).hexdigest(),
    }
    changes = [
        *recording(file, part, overrides),
        *(f"{k}={json.dumps(v)}" for k, v in ours.items()),
    ]
    argv = [sys.executable, "-m", "viisim", "deploy", str(file)]
    argv += ["--journal", str(part.journal), "--state", str(_state(part))]
    argv += [word for change in changes for word in ("--set", change)]
    log = part.folder / "deploy.log"
    experiment = load_experiment(file, changes)
    process = await WorkerProcess.start(WorkerCommand(tuple(argv), {}, None, {}), log, home)
    try:
        async with aiohttp.ClientSession() as session:
            served = Served(f"http://127.0.0.1:{port}", admin_key, process.pid, log, session)
            begun_s = time.monotonic()
            await _until_ready(served, process, experiment, log)
            say(f"{experiment.name}: ready after {time.monotonic() - begun_s:.0f} s")
            yield served
    finally:
        await _end(process, part)


async def _until_ready(
    served: Served, process: WorkerProcess, experiment: Experiment, log: Path
) -> None:
    entries = [entry for _, entry in experiment.numbered_replicas()]
    limit_s = max(entry.worker.start_limit(entry.devices) for entry in entries)
    try:
        async with asyncio.timeout(limit_s):
            while not await served.is_ready(len(entries)):
                if process.has_ended:
                    raise InputError(f"{experiment.name}: viisim deploy ended; look into {log}")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise InputError(
            f"{experiment.name}: not all workers are ready within {limit_s:g} s; look into {log}"
        ) from None


async def _end(process: WorkerProcess, part: Part) -> None:
    """The deployment ends its workers, which takes longer than a worker takes; those that it
    leaves behind, as it was killed or takes too long, are ended here."""
    if not process.has_ended:
        os.kill(process.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await process.ended()
    await process.stop()
    with Home(_state(part)) as state:
        state.end_leftovers()


def _state(part: Part) -> Path:
    """The folder of the deployment's own."""
    return part.folder / "state"


# --------------------------------------------------------------------------------------
# A run


async def measure_run(
    served: Served, part: Part, planned: PlannedRun, requests: Sequence[Request]
) -> MeasuredRun:
    """Send the requests, and leave in the part's folder what became of them."""
    await served.schedule_by(planned.policy)
    await asyncio.sleep(_PAUSE_S)
    # Contents of its own: no run finds another's prompts in a prefix cache.
    client = LoadClient(served.url, vocabulary=SMALL_VOCABULARY, salt=planned.name)
    begin_s, client_cpu_s, proxy_cpu_s = time.monotonic(), time.process_time(), served.cpu_s()
    records = await client.send(iter(requests))
    end_s, client_end_cpu_s = time.monotonic(), time.process_time()
    lines = "".join(record.line() + "\n" for record in records)
    part.requests_file(planned.name).write_text(lines, encoding="utf-8")
    run = MeasuredRun(
        **asdict(planned),
        begin_s=begin_s,
        end_s=end_s,
        client_cpu_s=client_end_cpu_s - client_cpu_s,
        proxy_cpu_s=served.cpu_s() - proxy_cpu_s,
    )
    part.add(run)
    return run
