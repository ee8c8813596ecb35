"""Keeps a deployment's workers running: starts them, watches their health, restarts, ends them.

One task looks after each worker, for as long as the worker belongs to the deployment. A process
that ends, or is ill for too long, is ended with all of its children and started again after a
pause that doubles; one that never stays up is given up. Of a server that somebody else runs, only
the health is watched. The driver is told no more than whether a worker is up.

Limits are those of VIIWork, which runs the same cards (FACTS section 2).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from runtime.http_worker import HttpWorker
from viisim.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited for what; seconds."""

    health_s: float = 5.0
    """Between two looks at a worker that is well."""
    doubt_s: float = 0.25
    """Between two looks at one that is not, or has just failed a request."""
    failures: int = 3
    """So many looks in a row that fail, and the worker is down: it gets no requests."""
    kill_s: float = 30.0
    """A server that is still down then is ended and started again. One that is merely slow has
    the time to come back, and what it was sent goes on."""
    restart_s: float = 1.0
    """Before the first restart; each further one takes twice as long."""
    max_restart_s: float = 60.0
    stable_s: float = 300.0
    """A worker that was up for so long has its earlier failures forgiven."""
    max_restarts: int = 8
    """In a row, without having been stable; then the worker is given up."""

    def at_speed(self, speed: float) -> Patience:
        """For workers whose time passes faster."""
        seconds = {
            name: getattr(self, name) / speed
            for name in self.__dataclass_fields__
            if name.endswith("_s")
        }
        return replace(self, **seconds)


class Process(Protocol):
    """A server that runs, with all of its children."""

    @property
    def pid(self) -> int:
        """Of the server itself."""

    @property
    def has_ended(self) -> bool:
        """Whether the server itself has."""

    async def ended(self) -> None:
        """Wait for the server's end."""

    async def stop(self) -> None:
        """End it; nothing of it is left afterwards."""


@dataclass(eq=False, slots=True)
class _Kept:
    """One worker that is looked after."""

    worker: HttpWorker
    start: Callable[[], Awaitable[Process]] | None
    """None: somebody else runs it."""
    log: Path | None
    start_limit_s: float
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of its requests failed."""
    up: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: str = ""
    """Why it is not restarted any more."""
    process: Process | None = None
    task: asyncio.Task[None] | None = None
    restarts: int = 0
    up_since_s: float | None = None
    """When its process was up for the first time, on the loop's clock."""


class _NotUpError(Exception):
    """The server is to be ended, or has ended; the reason."""


class Supervisor:
    """Looks after workers. `tell` is called with a worker's id and whether it is up, whenever
    that changes: `Driver.set_up`."""

    def __init__(self, tell: Callable[[str, bool], None], patience: Patience | None = None) -> None:
        self._tell = tell
        self._patience = patience or Patience()
        self._kept: dict[str, _Kept] = {}

    def keep(
        self,
        worker: HttpWorker,
        start: Callable[[], Awaitable[Process]] | None = None,
        *,
        log: Path | None = None,
        start_limit_s: float = 60.0,
    ) -> None:
        """Look after a worker from now on; with `start`, start its server, again and again.
        `log` is where the server says why it ended."""
        kept = self._kept[worker.id] = _Kept(worker, start, log, start_limit_s)
        kept.task = asyncio.create_task(self._look_after(kept))

    def doubt(self, worker_id: str) -> None:
        """A request failed there: look at once."""
        if worker_id in self._kept:
            self._kept[worker_id].doubted.set()

    async def until_up(self, worker_id: str) -> None:
        """Wait for it. Raises InputError when it is given up, or ended, first."""
        kept = self._kept[worker_id]
        assert kept.task is not None, "set by keep"
        up = asyncio.create_task(kept.up.wait())
        try:
            await asyncio.wait([up, kept.task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if not kept.up.is_set():
            raise InputError(f"{worker_id}: {kept.given_up or 'ended before it was up'}")

    async def end(self, worker_id: str) -> None:
        """Look after it no more; if it was started here, nothing of it is left afterwards."""
        kept = self._kept.get(worker_id)
        if kept is None or kept.task is None:
            return
        if not kept.task.cancelling():  # a second time would interrupt what the first began
            kept.task.cancel()
        await asyncio.wait([kept.task])
        # Known until now: whoever asks meanwhile waits for the same end.
        self._kept.pop(worker_id, None)
        kept.worker.close()

    async def close(self) -> None:
        """End all of them."""
        await asyncio.gather(*map(self.end, list(self._kept)))

    def pid(self, worker_id: str) -> int | None:
        """Of a running worker that was started here."""
        kept = self._kept.get(worker_id)
        process = None if kept is None else kept.process
        return None if process is None or process.has_ended else process.pid

    # -- one worker --

    async def _look_after(self, kept: _Kept) -> None:
        pause_s = self._patience.restart_s
        loop = asyncio.get_running_loop()
        while not kept.given_up:
            kept.up_since_s = None
            try:
                await self._one_life(kept)
            except (_NotUpError, OSError) as error:  # OSError: no memory, no room on the disk
                reason = str(error)
            except InputError as error:  # there is nothing that could be started
                kept.given_up = str(error)
                continue
            if kept.start is None:
                log.warning("%s: %s", kept.worker.id, reason)
                continue
            # Loading does not count: it may take long, and fail each time.
            up_since_s = loop.time() if kept.up_since_s is None else kept.up_since_s
            if loop.time() - up_since_s > self._patience.stable_s:
                kept.restarts, pause_s = 0, self._patience.restart_s
            if kept.restarts == self._patience.max_restarts:
                kept.given_up = f"{reason}, for the {kept.restarts + 1}th time"
                continue
            log.warning("%s: %s; starts again in %g s", kept.worker.id, reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._patience.max_restart_s)
            kept.restarts += 1
        log.error("%s: given up: %s", kept.worker.id, kept.given_up)

    async def _one_life(self, kept: _Kept) -> None:
        """From the start to the end. Raises _NotUpError then, InputError when there is no such
        program."""
        try:
            if kept.start is not None:
                kept.process = await kept.start()
            await self._until_healthy(kept, kept.start_limit_s)
            kept.up_since_s = asyncio.get_running_loop().time()
            while True:
                log.info("%s is up", kept.worker.id)
                kept.up.set()
                self._tell(kept.worker.id, True)
                await self._until_ill(kept)
                log.warning("%s is not healthy any more", kept.worker.id)
                kept.up.clear()
                self._tell(kept.worker.id, False)
                await self._until_healthy(kept, self._patience.kill_s)
        finally:
            kept.up.clear()
            self._tell(kept.worker.id, False)
            if kept.process is not None:
                # Whatever cancels this waits: a child that is left would keep the card.
                await _to_its_end(kept.process.stop())
                kept.process = None

    async def _until_healthy(self, kept: _Kept, limit_s: float) -> None:
        """Raises _NotUpError after so long, if the server is ours to be ended then."""
        try:
            async with asyncio.timeout(None if kept.start is None else limit_s):
                while not await kept.worker.is_healthy():
                    self._check_process(kept)
                    await asyncio.sleep(self._patience.doubt_s)
        except TimeoutError:
            raise _NotUpError(f"not healthy for {limit_s:g} s") from None

    async def _until_ill(self, kept: _Kept) -> None:
        """Return after so many looks that failed. Raises _NotUpError when the server ends."""
        failures = 0
        while failures < self._patience.failures:
            await self._pause(kept, self._patience.doubt_s if failures else self._patience.health_s)
            self._check_process(kept)
            kept.doubted.clear()
            failures = 0 if await kept.worker.is_healthy() else failures + 1

    async def _pause(self, kept: _Kept, seconds: float) -> None:
        """Wait, at most until the process ends or somebody doubts that the worker is well."""
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(kept.doubted.wait())]
        if kept.process is not None:
            waits.append(asyncio.create_task(kept.process.ended()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)  # raises nothing of theirs, but what cancels this

    @staticmethod
    def _check_process(kept: _Kept) -> None:
        if kept.process is not None and kept.process.has_ended:
            raise _NotUpError(f"the server ended{f', see {kept.log}' if kept.log else ''}")


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do all of it, also when cancelled meanwhile; the cancellation takes effect afterwards."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
