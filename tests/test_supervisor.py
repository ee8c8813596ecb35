"""Workers that end, hang, come back, or never come up; and what of them is found again."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.commands import WorkerCommand
from runtime.processes import Home, WorkerProcess
from runtime.simulated.fork_server import ForkedWorker
from runtime.supervisor import Patience, Supervisor
from viisim.errors import InputError

LIMIT_S = 20.0
QUICK = Patience(
    health_s=0.01,
    doubt_s=0.001,
    failures=2,
    kill_s=0.05,
    restart_s=0.001,
    max_restart_s=0.01,
    max_restarts=3,
)


class FakeServer:
    """A process that a test ends; see `runtime.supervisor.Process`."""

    pid = 1

    def __init__(self) -> None:
        self._end = asyncio.Event()
        self.stopping = asyncio.Event()
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.stopped = False
        self.let_go = asyncio.Event()
        """Set when somebody who waited for its end does so no more."""

    @property
    def has_ended(self) -> bool:
        """Whether the test, or the supervisor, has ended it."""
        return self._end.is_set()

    async def ended(self) -> None:
        """Until then."""
        try:
            await self._end.wait()
        except asyncio.CancelledError:
            self.let_go.set()
            for _ in range(3):  # whoever has cancelled this has to wait
                await asyncio.sleep(0)
            raise

    async def stop(self) -> None:
        """End it, as soon as it may."""
        self.stopping.set()
        await self.may_stop.wait()
        self.stopped = True
        self._end.set()

    def die(self) -> None:
        """End by itself."""
        self._end.set()


class Scene:
    """One worker under a supervisor, and what the driver is told."""

    def __init__(self, patience: Patience = QUICK) -> None:
        self.id = "r0"
        self.healthy = True
        self.told: list[bool] = []
        self.servers: list[FakeServer] = []
        self.refuses_to_start = False
        self.failures_to_start = 0
        self.closed = False
        self._changed = asyncio.Event()
        self.supervisor = Supervisor(self.tell, patience)

    def tell(self, worker_id: str, is_up: bool) -> None:
        """As the driver is."""
        if not self.told or self.told[-1] is not is_up:
            self.told.append(is_up)
            self._changed.set()

    async def start(self) -> FakeServer:
        """A new process."""
        if self.refuses_to_start:
            raise InputError("vllm: No such file")
        if self.failures_to_start:
            self.failures_to_start -= 1
            raise OSError("no memory")
        self.servers.append(FakeServer())
        return self.servers[-1]

    async def is_healthy(self) -> bool:
        """As the worker's client says."""
        return self.healthy

    def close(self) -> None:
        """As the worker's client does with its connections."""
        self.closed = True

    async def until(self, *told: bool) -> None:
        """Until the driver has been told so."""
        while self.told != list(told):
            self._changed.clear()
            await self._changed.wait()


def run(scenario: Callable[[Scene], Awaitable[None]], patience: Patience = QUICK) -> Scene:
    """A scenario on a loop of its own, which leaves nothing running."""
    scenes: list[Scene] = []

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            scene = Scene(patience)
            scenes.append(scene)
            await scenario(scene)
            await scene.supervisor.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(limited())
    return scenes[0]


def keep(scene: Any, *, starts: bool = True) -> None:
    """Have the supervisor look after the scene's worker."""
    scene.supervisor.keep(scene, scene.start if starts else None)


def test_a_worker_that_is_healthy_is_up():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.supervisor.until_up("r0")
        assert scene.told == [True]

    assert run(scenario).servers[0].stopped


def test_a_process_that_ends_is_started_again():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        scene.servers[0].die()
        await scene.until(True, False, True)
        assert len(scene.servers) == 2

    run(scenario)


def test_one_that_is_ill_for_a_moment_is_not_ended():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        scene.healthy = False
        await scene.until(True, False)
        scene.healthy = True
        await scene.until(True, False, True)
        assert [server.stopped for server in scene.servers] == [False]

    run(scenario, Patience(health_s=0.01, doubt_s=0.001, kill_s=LIMIT_S))


def test_one_that_stays_ill_is_ended_and_started_again():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        scene.healthy = False
        while len(scene.servers) < 2:  # noqa: ASYNC110 - the loop is the supervisor's
            await asyncio.sleep(0.001)
        scene.healthy = True
        await scene.until(True, False, True)

    assert run(scenario).servers[0].stopped


def test_one_that_never_comes_up_is_given_up():
    async def scenario(scene: Scene) -> None:
        scene.healthy = False
        scene.supervisor.keep(scene, scene.start, start_limit_s=0.005)  # type: ignore[arg-type]  # it is its own worker
        with pytest.raises(InputError, match=r"r0: not healthy for 0\.005 s, for the 4th time"):
            await scene.supervisor.until_up("r0")

    scene = run(scenario)
    assert (len(scene.servers), scene.told) == (QUICK.max_restarts + 1, [False])


def test_a_program_that_is_not_there_is_no_matter_of_patience():
    async def scenario(scene: Scene) -> None:
        scene.refuses_to_start = True
        keep(scene)
        with pytest.raises(InputError, match="r0: vllm: No such file"):
            await scene.supervisor.until_up("r0")

    run(scenario)


def test_what_the_system_cannot_start_now_is_tried_again():
    async def scenario(scene: Scene) -> None:
        scene.failures_to_start = 2
        keep(scene)
        await scene.supervisor.until_up("r0")

    run(scenario)


def test_time_spent_loading_forgives_nothing():
    async def scenario(scene: Scene) -> None:
        scene.healthy = False
        scene.supervisor.keep(scene, scene.start, start_limit_s=0.01)  # type: ignore[arg-type]  # it is its own worker
        with pytest.raises(InputError, match="for the 4th time"):
            await scene.supervisor.until_up("r0")

    run(scenario, replace(QUICK, stable_s=0.001))


def test_whoever_waits_for_one_that_is_ended_is_told():
    async def scenario(scene: Scene) -> None:
        scene.healthy = False
        keep(scene)
        waits = asyncio.create_task(scene.supervisor.until_up("r0"))
        await asyncio.sleep(0)
        await scene.supervisor.end("r0")
        with pytest.raises(InputError, match="r0: ended before it was up"):
            await waits
        assert scene.closed
        await asyncio.sleep(0)

    run(scenario)


def test_the_end_waits_for_a_process_that_is_being_stopped():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        server = scene.servers[0]
        server.may_stop.clear()
        server.die()
        await server.stopping.wait()
        ends = [asyncio.create_task(scene.supervisor.end("r0")) for _ in range(2)]
        _, waiting = await asyncio.wait(ends, timeout=0.01)
        assert (len(waiting), server.stopped) == (2, False)
        server.may_stop.set()
        await asyncio.gather(*ends)
        assert server.stopped

    run(scenario)


def test_one_is_ended_also_in_the_midst_of_a_look_at_it():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        await scene.servers[0].let_go.wait()
        await scene.supervisor.end("r0")

    assert run(scenario).servers[0].stopped


def test_a_server_of_somebody_else_is_only_watched():
    async def scenario(scene: Scene) -> None:
        keep(scene, starts=False)
        await scene.until(True)
        scene.healthy = False
        await scene.until(True, False)
        scene.healthy = True
        await scene.until(True, False, True)

    assert run(scenario).servers == []


def test_doubt_has_it_looked_at_at_once():
    async def scenario(scene: Scene) -> None:
        keep(scene)
        await scene.until(True)
        scene.healthy = False
        scene.supervisor.doubt("r0")
        await scene.until(True, False)

    run(scenario, Patience(health_s=LIMIT_S, doubt_s=0.001, kill_s=LIMIT_S))


def test_patience_shrinks_with_speed_and_counts_do_not():
    quick = Patience().at_speed(10)
    assert (quick.health_s, quick.kill_s, quick.failures) == (0.5, 3.0, 3)


# -- real processes --

SERVER = "import subprocess,sys,time; subprocess.Popen(['sleep','600']); time.sleep(600)"
"""A server with a child."""


def command(code: str = SERVER) -> WorkerCommand:
    """A command as `runtime.commands` makes it."""
    return WorkerCommand((sys.executable, "-c", code), {}, None, {})


def in_session(pid: int) -> list[int]:
    """The processes of a session that are no zombies."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


async def with_child(process: WorkerProcess) -> list[int]:
    """Wait until its child is there too; both."""
    async with asyncio.timeout(LIMIT_S):
        while len(found := in_session(process.pid)) < 2:  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "without its leader"])
def test_stopping_leaves_nothing_of_a_process(killed: bool, tmp_path: Path):
    async def scenario() -> list[int]:
        with Home(tmp_path) as home:
            process = await WorkerProcess.start(command(), tmp_path / "log", home)
            await with_child(process)
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                await process.ended()
            await process.stop()
            return in_session(process.pid)

    assert asyncio.run(scenario()) == []


def test_what_a_server_says_is_in_its_log(tmp_path: Path):
    async def scenario() -> None:
        with Home(tmp_path) as home:
            process = await WorkerProcess.start(command("print('up')"), tmp_path / "log", home)
            await process.ended()

    asyncio.run(scenario())
    assert (tmp_path / "log").read_text() == "up\n"


def test_a_program_that_is_missing_is_one_clear_line(tmp_path: Path):
    async def scenario() -> None:
        with Home(tmp_path) as home:
            missing = WorkerCommand(("no-such-vllm",), {}, None, {})
            await WorkerProcess.start(missing, tmp_path / "log", home)

    with pytest.raises(InputError, match=r"no-such-vllm: .*; install it, or say how"):
        asyncio.run(scenario())


def test_a_process_that_cannot_be_noted_is_not_left_running(tmp_path: Path):
    ours = f"import time; time.sleep(600)  # {tmp_path}"

    async def scenario() -> None:
        with Home(tmp_path) as home:
            (tmp_path / "started.jsonl").mkdir()
            await WorkerProcess.start(command(ours), tmp_path / "log", home)

    with pytest.raises(IsADirectoryError):
        asyncio.run(scenario())
    assert not any(ours in one.cmdline() for one in psutil.Process().children())


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd")
def test_stopping_a_forked_worker_that_has_just_ended_is_no_error():
    process = subprocess.Popen(["sleep", "600"])

    async def scenario() -> None:
        worker = ForkedWorker(process.pid)
        process.kill()
        process.wait()  # the loop has not seen it yet
        assert not worker.has_ended
        await worker.stop()
        await worker.stop()

    asyncio.run(scenario())


def test_a_folder_in_use_is_refused(tmp_path: Path):
    with (
        Home(tmp_path),
        pytest.raises(InputError, match="another viisim deploy uses it"),
        Home(tmp_path),
    ):
        pass


class TestLeftovers:
    def left(self, folder: Path, leader: bool) -> tuple[int, list[int]]:
        """A session that a killed deployment left; with its leader, or only the child."""
        code = (
            "import asyncio,os,sys\n"
            "from pathlib import Path\n"
            "from runtime.processes import Home, WorkerProcess\n"
            "from tests.test_supervisor import command, with_child\n"
            "async def main():\n"
            f"    with Home(Path({str(folder)!r})) as home:\n"
            f"        process = await WorkerProcess.start(command(), Path(os.devnull), home)\n"
            "        await with_child(process)\n"
            f"        if not {leader}: os.kill(process.pid, 9); await process.ended()\n"
            "        print(process.pid, flush=True)\n"
            "        os.kill(os.getpid(), 9)\n"
            "asyncio.run(main())\n"
        )
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=root,
            check=False,
        )
        session = int(done.stdout)
        return session, in_session(session)

    @pytest.mark.parametrize("leader", [True, False], ids=["whole", "an orphan"])
    def test_they_are_ended(self, leader: bool, tmp_path: Path):
        session, processes = self.left(tmp_path, leader)
        assert len(processes) == 1 + leader
        with Home(tmp_path) as home:
            assert sorted(home.end_leftovers()) == sorted(processes)
        assert in_session(session) == []

    def test_those_of_another_deployment_are_not(self, tmp_path: Path):
        session, processes = self.left(tmp_path / "other", True)
        with Home(tmp_path / "mine") as home:
            assert home.end_leftovers() == []
        assert in_session(session) == processes
        with Home(tmp_path / "other") as home:
            home.end_leftovers()

    def test_a_number_that_is_somebody_elses_now_is_left_alone(self, tmp_path: Path):
        somebody = subprocess.Popen(["sleep", "600"], start_new_session=True)
        try:
            with Home(tmp_path) as home:
                (tmp_path / "started.jsonl").write_text(
                    f'{{"session": {somebody.pid}, "born_s": 1000000000.0}}\n'
                )
                assert home.end_leftovers() == []
            assert somebody.poll() is None
        finally:
            somebody.kill()
            somebody.wait()
