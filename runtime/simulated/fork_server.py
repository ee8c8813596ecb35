"""Simulated workers without the second that an interpreter takes to start, for each and each time.

One process imports everything and reads the experiment; asked for a worker, it forks one. Its
workers end with it, and it ends with us, however that comes about: each holds one end of a pipe
whose other end only the former has.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from viisim.errors import InputError


class ForkServer:
    """`viisim worker --fork-server` of one experiment, as its file is now."""

    def __init__(self, file: Path, overrides: Sequence[str], speed: float) -> None:
        command = [sys.executable, "-m", "viisim", "worker", str(file), "--fork-server"]
        command += ["--speed", str(speed)]
        for override in overrides:
            command += ["--set", override]
        # A process group of its own: Ctrl-C is for the proxy, which ends its workers in order.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._turn = asyncio.Lock()

    async def start(self, replica: str, port: int) -> ForkedWorker:
        """A worker of that replica of the file. Raises InputError when the server is gone."""
        asked = asyncio.create_task(self._forked(replica, port))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            # The server was asked already; what it answers with nobody would end.
            asked.add_done_callback(_kill_unwanted)
            raise

    async def _forked(self, replica: str, port: int) -> ForkedWorker:
        async with self._turn:
            answer = await asyncio.to_thread(self._ask, f"{replica} {port}\n")
        if not answer.strip().isdigit():
            raise InputError("the simulated workers ended; see what they said above")
        return ForkedWorker(int(answer))

    def _ask(self, line: str) -> bytes:
        assert self._process.stdin is not None, "started with pipes"
        assert self._process.stdout is not None, "started with pipes"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except OSError:
            return b""

    def close(self) -> None:
        """End it and its workers, which hold nothing that is worth asking them."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "started with pipes"
            with suppress(OSError):
                pipe.close()


class ForkedWorker:
    """One simulated worker; see `runtime.supervisor.Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = asyncio.Event()
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended.set()
        else:
            asyncio.get_running_loop().add_reader(self._handle, self._on_end)

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._ended.is_set()

    async def ended(self) -> None:
        """Wait for its end."""
        await self._ended.wait()

    async def stop(self) -> None:
        """End it. It has no card to give back, so it is not asked but killed."""
        self.kill()
        await self._ended.wait()

    def kill(self) -> None:
        """Have it end at once."""
        if not self.has_ended:
            with suppress(ProcessLookupError):  # it has ended, and the loop has not told yet
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        os.close(self._handle)
        self._ended.set()


def _kill_unwanted(asked: asyncio.Task[ForkedWorker]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().kill()
