"""Worker processes: started so that they can be found, ended so that nothing is left of them.

vLLM's API server has children (EngineCore, Worker) that outlive it when it is killed (FACTS
section 6). So each server leads a session of its own, which is noted in the deployment's folder:
what a killed `viisim deploy` left behind is found at its next start, and nobody else's
processes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from runtime.commands import DEPLOYMENT_LABEL, DEPLOYMENT_VARIABLE, WorkerCommand
from viisim.errors import InputError

log = logging.getLogger(__name__)

TERM_S = 20.0
"""How long a server may take to end before it is killed."""
KILL_S = 5.0
"""How long the system may take to remove what was killed."""
CONTAINER_S = 60.0
"""How long docker or podman may take to answer."""


class WorkerProcess:
    """A server that was started here, and all of its children; see `supervisor.Process`."""

    def __init__(self, process: asyncio.subprocess.Process, command: WorkerCommand) -> None:
        self._process = process
        self._command = command

    @classmethod
    async def start(cls, command: WorkerCommand, log: Path, home: Home) -> WorkerProcess:
        """Start it; what it says goes to the end of `log`. Raises InputError when there is no
        such program, OSError when the system cannot start it now."""
        with log.open("ab") as out:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **command.env},
                    # Ctrl-C is for the proxy, which ends its workers in order.
                    start_new_session=True,
                )
            except (FileNotFoundError, PermissionError) as error:
                raise InputError(
                    f"{command.argv[0]}: {error.strerror}; install it, or say how vLLM is "
                    "started: worker.command"
                ) from error
        started = cls(process, command)
        try:
            home.note(process.pid)
        except OSError:  # no room on the disk: nobody would find it after a crash
            await started.stop()
            raise
        return started

    @property
    def pid(self) -> int:
        """Of the server; also of its process group."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the server itself, not all of its children, has ended."""
        return self._process.returncode is not None

    async def ended(self) -> None:
        """Wait for the server's end."""
        await self._process.wait()

    async def stop(self) -> None:
        """End the server and its children; they are gone afterwards."""
        if self._command.stop_argv is not None:
            await _run(self._command.stop_argv)
        elif not self.has_ended:
            _signal_group(self.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_S):
                await self._process.wait()
        # Of a server that was killed, children live on in its group.
        _signal_group(self.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_S):
                await self._process.wait()
                await _gone(self.pid)
        except TimeoutError:  # a driver that hangs holds its processes
            log.error("process group %d was killed, and does not end", self.pid)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


async def _gone(group: int) -> None:
    """Wait until no process of the group is left: the card's memory is free only then."""
    while _group_lives(group):  # noqa: ASYNC110 - other processes set no event
        await asyncio.sleep(0.02)


def _group_lives(group: int) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


async def _run(argv: tuple[str, ...]) -> None:
    """Run a command of a container engine, whose failure is no news: the container is gone."""
    with contextlib.suppress(OSError):
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(CONTAINER_S):
                await process.wait()
        except TimeoutError:
            process.kill()


# --------------------------------------------------------------------------------------
# What an earlier start left behind


class Home:
    """The folder of a deployment: what must outlast a crash of it. One process has it at a time;
    use it as a context manager.

    Entering raises InputError when another process has the folder, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        """In the environment of every process of the deployment, and on its containers."""
        self._started = folder / "started.jsonl"

    def __enter__(self) -> Home:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(f"--state {self.folder}: {error.strerror}; give a folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"--state {self.folder}: another viisim deploy uses it; end that, or give a "
                "folder of your own"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def note(self, pid: int) -> None:
        """A process was started that leads a session of its own."""
        with contextlib.suppress(psutil.Error), self._started.open("a") as file:
            born_s = psutil.Process(pid).create_time()
            file.write(json.dumps({"session": pid, "born_s": born_s}) + "\n")

    def end_leftovers(self) -> list[int]:
        """End what an earlier process left, before this one starts anything; process ids.

        They are found by the mark, and by their session: vLLM's processes change their titles
        and lose the environment that would show the mark.
        """
        for engine in ("docker", "podman"):
            _remove_containers(engine, self.mark)
        noted = self._noted()
        found = [
            process
            for process in psutil.process_iter()
            if _has_mark(process, self.mark) or _is_of(process, noted)
        ]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=KILL_S)
        self._started.unlink(missing_ok=True)
        return [process.pid for process in found]

    def _noted(self) -> dict[int, float]:
        """When the leader of each session was born, for those whose number is no other's now."""
        noted: dict[int, float] = {}
        with contextlib.suppress(OSError):
            for line in self._started.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a crash
                    one = json.loads(line)
                    noted[int(one["session"])] = float(one["born_s"])
        return {session: born_s for session, born_s in noted.items() if _is_same(session, born_s)}


def _is_same(session: int, born_s: float) -> bool:
    """Whether a session's leader is the one that was born then, or is gone."""
    try:
        return abs(psutil.Process(session).create_time() - born_s) < 1.0
    except psutil.Error:
        return born_s > psutil.boot_time()


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(DEPLOYMENT_VARIABLE) == mark
    except (psutil.Error, OSError):  # of others, or gone meanwhile
        return False


def _is_of(process: psutil.Process, sessions: Mapping[int, float]) -> bool:
    """Whether the process belongs to one of the sessions, and came after its leader."""
    with contextlib.suppress(psutil.Error, OSError):
        born_s = sessions.get(os.getsid(process.pid))
        return born_s is not None and process.create_time() >= born_s - 1.0
    return False


def _remove_containers(engine: str, mark: str) -> None:
    label = f"label={DEPLOYMENT_LABEL}={mark}"
    try:
        listed = subprocess.run(
            [engine, "ps", "-aq", "--filter", label],
            capture_output=True,
            text=True,
            timeout=CONTAINER_S,
            check=True,
        )
        if listed.stdout.split():
            command = [engine, "rm", "-f", *listed.stdout.split()]
            subprocess.run(command, capture_output=True, timeout=CONTAINER_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return  # no such engine here, or it is not running: then no container of it is either
