"""From an experiment's `cluster` block to running workers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.http_worker import HttpWorker
from viisim.config import Experiment, ReplicaConfig, SimulatedReplica
from viisim.errors import InputError
from viisim.step_costs import step_costs_of

HEALTH_EVERY_S = 0.05
STOP_S = 5.0
"""How long workers may take to end before they are killed."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One replica of the file: its id, as the simulator gives it, and what it is."""

    id: str
    entry: ReplicaConfig
    url: str
    """Where it listens, or will."""


def planned(experiment: Experiment) -> list[Planned]:
    """Every replica of the cluster, with a free port for each that is to be started.

    Raises InputError for a kind of worker that this version does not start.
    """
    entries = numbered(experiment)
    for replica_id, entry in entries:
        if entry.worker.kind not in ("simulated", "url"):
            raise InputError(
                f"{experiment.name}: cluster.replicas: {replica_id}: {entry.worker.kind!r} workers "
                "are not started yet; start the server yourself and give kind: url with its address"
            )
    ports = free_ports(len(entries))
    return [
        Planned(replica_id, entry, entry.worker.url or f"http://127.0.0.1:{port}")
        for (replica_id, entry), port in zip(entries, ports, strict=True)
    ]


def numbered(experiment: Experiment) -> list[tuple[str, ReplicaConfig]]:
    """Every replica's id, the same as in a simulation, and its entry in the file."""
    entries = [entry for entry in experiment.cluster.replicas for _ in range(entry.count)]
    width = len(str(len(entries) - 1))
    return [(f"r{index:0{width}}", entry) for index, entry in enumerate(entries)]


def client_of(replica: Planned) -> HttpWorker:
    """The driver's side of the replica."""
    entry = replica.entry
    if entry.device is None and entry.profile is None:
        by_priority = entry.engine.scheduling_policy == "priority"
        return HttpWorker(replica.id, entry.model, replica.url, forwards_priority=by_priority)
    simulated = SimulatedReplica.of(replica.id, entry)
    settings = simulated.settings.scheduler_settings()
    return HttpWorker(
        replica.id,
        entry.model,
        replica.url,
        devices=tuple(f"{replica.id}/gpu{number}" for number in range(entry.tensor_parallel)),
        max_num_seqs=settings.max_num_seqs,
        kv_blocks=settings.usable_blocks,
        block_tokens=settings.block_tokens,
        step_costs=step_costs_of(simulated.profile, settings.max_num_batched_tokens),
        forwards_priority=settings.scheduling_policy == "priority",
    )


def free_ports(number: int) -> list[int]:
    """Ports on the loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class SimulatedProcesses:
    """The `viisim worker` processes of a deployment; none outlives it.

    They watch their standard input, whose other end is ours alone: it ends when this process
    does, however that comes about.
    """

    def __init__(self) -> None:
        self._launched: list[subprocess.Popen[bytes]] = []

    def start(
        self, file: Path, overrides: Sequence[str], replicas: Sequence[Planned], speed: float
    ) -> None:
        """Start a worker for each of the replicas of the experiment in `file`."""
        # One interpreter imports everything and forks, where that is sound: starting up costs a
        # second of processor time, and a laptop should not pay it for every replica.
        at_once = len(replicas) if sys.platform == "linux" else 1
        for first in range(0, len(replicas), at_once or 1):
            self._launch(file, overrides, replicas[first : first + at_once], speed)

    def _launch(
        self, file: Path, overrides: Sequence[str], replicas: Sequence[Planned], speed: float
    ) -> None:
        command = [sys.executable, "-m", "viisim", "worker", str(file), "--until-eof"]
        command += ["--speed", str(speed)]
        for replica in replicas:
            command += ["--replica", replica.id, "--port", replica.url.rpartition(":")[2]]
        for override in overrides:
            command += ["--set", override]
        # A process group of its own: Ctrl-C is for the proxy, which ends its workers in order.
        self._launched.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        )

    def stop(self) -> None:
        """End them all."""
        for process in self._launched:
            assert process.stdin is not None, "launched with a pipe"
            process.stdin.close()
        for process in self._launched:
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def have_ended(self) -> bool:
        """Whether workers ended by themselves."""
        return any(process.poll() is not None for process in self._launched)


async def wait_until_healthy(
    worker: HttpWorker, limit_s: float, has_ended: Callable[[], bool] = lambda: False
) -> None:
    """Return once the worker answers. Raises InputError when it does not in time, or when
    `has_ended` says that it never will."""
    try:
        async with asyncio.timeout(limit_s):
            while not await worker.is_healthy():
                if has_ended():
                    raise InputError(f"{worker.id}: the worker ended as it started")
                await asyncio.sleep(HEALTH_EVERY_S)
    except TimeoutError:
        raise InputError(
            f"{worker.id}: {worker.url} did not become healthy within {limit_s:g} s; "
            "look whether the server runs there"
        ) from None
