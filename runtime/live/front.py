"""viisim's own proxy in front of one worker that runs, as it will be when it is deployed.

On a machine whose proxy has no core of its own, it may take from the workers' (by how much,
`benchmarks/step_conditions.py` says). A calibration for such a machine is behind it, too.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from runtime.cluster import Planned, free_ports
from runtime.commands import WorkerCommand
from runtime.http_worker import HttpWorker
from runtime.processes import Home, WorkerProcess
from runtime.worker import WorkerError
from viisim.errors import InputError

_START_S = 60.0
_LOOK_S = 0.25


@asynccontextmanager
async def fronted(replica: Planned, home: Home) -> AsyncIterator[str]:
    """`viisim deploy` before the replica's worker: its URL. It has ended afterwards.

    Raises InputError when it does not come to serve.
    """
    name = f"{replica.id}.front"
    port = free_ports(1)[0]
    file, log = home.folder / f"{name}.yaml", home.folder / f"{name}.log"
    file.write_text(yaml.safe_dump(_experiment(replica, port)), encoding="utf-8")
    argv = [sys.executable, "-m", "viisim", "deploy", str(file)]
    argv += ["--state", str(home.folder / name), "--journal", str(home.folder / f"{name}.journal")]
    process = await WorkerProcess.start(WorkerCommand(tuple(argv), {}, None, {}), log, home)
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_ready(HttpWorker(name, replica.entry.model, url), process, log)
        yield url
    finally:
        await process.stop()


async def _until_ready(front: HttpWorker, process: WorkerProcess, log: Path) -> None:
    try:
        async with asyncio.timeout(_START_S):
            while not await _is_ready(front):
                if process.has_ended:
                    raise InputError(f"{front.id}: viisim deploy ended; look into {log}")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise InputError(f"{front.id}: not ready within {_START_S:g} s; look into {log}") from None
    finally:
        front.close()


async def _is_ready(front: HttpWorker) -> bool:
    try:
        return (await front.get("/ready"))[0] == 200
    except WorkerError:
        return False


def _experiment(replica: Planned, port: int) -> dict[str, Any]:
    """One worker that runs already. What it is simulated with, and under which traffic, does not
    matter here."""
    entry = replica.entry
    profile = entry.profile
    if profile is not None and profile.endswith((".yaml", ".yml")):
        profile = str(entry.located(profile).absolute())
    worker = {"kind": "url", "url": replica.url}
    own = entry.model_dump(mode="json", exclude_unset=True, exclude={"count", "worker"})
    return {
        "name": replica.id,
        "policy": {"name": "round_robin"},
        "cluster": {
            "replicas": [own | {"worker": worker} | ({"profile": profile} if profile else {})]
        },
        "workload": {
            "kind": "synthetic",
            "prompt_tokens": 1,
            "output_tokens": 1,
            "rate_per_s": 1.0,
            "requests": 1,
        },
        "seeds": [1],
        "deploy": {"listen": f"127.0.0.1:{port}"},
    }
