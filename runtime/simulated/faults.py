"""Faults over simulated workers: what `viisim.fault_player` plays to a simulation, in real time.

A worker that has a fault is looked at again and again until the fault is over, and one that has
been started anew in the meantime is given it as well: a host that hangs does not get well because
its process was replaced. A worker that crashed is kept from being ready in the same way until it
is due.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import aiohttp

from runtime.simulated.worker import NO_FAULT
from viisim.faults import Fault

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
"""How often a worker with a fault is looked at. A worker that starts must be unwell for longer
than that (`SimulatedWorker.start_s`), or a look at its health may come first."""
ANSWER_S = 2.0
"""How long a worker may take to answer: a fault is no excuse."""


async def inject(
    schedule: Iterable[Fault],
    workers: Mapping[str, str],
    speed: float,
    kill: Callable[[str], None],
) -> None:
    """Play the faults, the first instant of their schedule being now.

    `workers` are the addresses of simulated workers by replica, each of which keeps its address
    when it is started again; faults on others are left out. `speed` is that of the workers. `kill`
    ends a replica's process as SIGKILL does; somebody else starts it again. Returns when the last
    fault is over, which for one with a rate is never: cancel it then.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        player = _Player(session, workers, speed, kill)
        async with asyncio.TaskGroup() as group:
            for fault in schedule:
                await player.sleep_until(fault.at_s)
                if fault.replica in workers:
                    log.info("fault: %s on %s", fault.kind, fault.replica)
                    group.create_task(player.play(fault))


class _Player:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        workers: Mapping[str, str],
        speed: float,
        kill: Callable[[str], None],
    ) -> None:
        self._session = session
        self._workers = workers
        self._speed = speed
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()

    def now_s(self) -> float:
        """On the schedule's clock."""
        return (self._loop.time() - self._start_s) * self._speed

    async def sleep_until(self, instant_s: float) -> None:
        """Until then on the schedule's clock."""
        await asyncio.sleep(max(0.0, (instant_s - self.now_s()) / self._speed))

    async def play(self, fault: Fault) -> None:
        """One fault from its beginning to its end."""
        if fault.kind == "crash":
            await self._crash(fault)
        elif fault.duration_s:
            await self._hold(fault, fault.until_s)
        else:
            await self._tell(fault)
            return
        await self._tell(replace(fault, kind=NO_FAULT))

    async def _crash(self, fault: Fault) -> None:
        starting = replace(fault, kind="refuse")
        part_s = fault.duration_s / (1 + fault.failed_starts)
        for start in range(1 + fault.failed_starts):
            self._kill(fault.replica)
            await self._hold(starting, fault.at_s + (1 + start) * part_s)

    async def _hold(self, fault: Fault, until_s: float) -> None:
        """Whoever answers at the replica's address has the fault until then."""
        while self.now_s() < until_s:
            if await self._ask("GET", fault.replica) != fault.kind:
                await self._tell(fault)
            left_s = max(0.0, until_s - self.now_s()) / self._speed
            await asyncio.sleep(min(LOOK_EVERY_S, left_s))

    async def _tell(self, fault: Fault) -> None:
        await self._ask("POST", fault.replica, asdict(fault))

    async def _ask(self, method: str, replica: str, body: Any = None) -> str | None:
        """The fault that the worker says it has; None without an answer."""
        try:
            async with self._session.request(
                method, f"{self._workers[replica]}/fault", json=body
            ) as answer:
                content = await answer.json()
                answer.raise_for_status()
                return str(content["fault"])
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
