"""`viisim deploy` as a process: ready, served through the official client, gone without a trace;
and the journal it keeps."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from policies.interface import Arrived, Finished, ReplicaChanged
from policies.journal import Segment
from policies.testing import request
from runtime.cluster import free_ports
from runtime.rolling_journal import RollingJournal
from tests.small_experiment import small_file
from viisim.config import load_experiment
from viisim.errors import InputError
from viisim.journal import replay_journal

LIMIT_S = 60.0
MODEL = "qwen3-vl-8b-awq"


class Deployment:
    """A running `viisim deploy`."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.group = workers_of(process.pid)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=LIMIT_S) as answer:
            return json.load(answer)


@contextmanager
def deployed(file: Path, *options: str) -> Iterator[Deployment]:
    """Start it and wait until it says that it serves."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "viisim", "deploy", str(file), "--speed", "20"]
    command += ["--set", f"deploy.listen=127.0.0.1:{port}", *options]
    command += ["--state", str(file.parent / "state")]
    # In a folder of its own, and yet these sources: the ones under test.
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **here}
    )
    try:
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        yield Deployment(process, port)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def workers_of(pid: int) -> list[int]:
    """All processes that descend from one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = {int(line.split()[0]): int(line.split()[1]) for line in listed.stdout.splitlines()}
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def all_end(pids: list[int]) -> bool:
    """Whether all processes end in time."""
    deadline_s = time.monotonic() + LIMIT_S
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.slow
class TestProcess:
    def test_the_official_client_streams_through_it_and_the_journal_replays(self, tmp_path: Path):
        openai = pytest.importorskip("openai")
        journals = tmp_path / "journals"
        with deployed(small_file(tmp_path), "--journal", str(journals)) as deployment:
            client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none")
            messages = [{"role": "user", "content": "hello"}]
            stream = client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=8, stream=True
            )
            ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
            plain = client.completions.create(model=MODEL, prompt="hello", max_tokens=8)
            client.close()
        assert (ends[-1], len(ends)) == ("length", 8)
        assert plain.usage.completion_tokens == 8
        assert deployment.process.returncode == 0
        (file,) = journals.iterdir()
        report = replay_journal(file)
        assert (report.equal, report.actions) == (True, 2)

    @linux_only
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_no_worker_outlives_it(self, number: signal.Signals, tmp_path: Path):
        with deployed(small_file(tmp_path)) as deployment:
            assert len(deployment.group) >= 2
            deployment.process.send_signal(number)
            deployment.process.wait(LIMIT_S)
            assert all_end(deployment.group)

    @linux_only
    def test_a_viewer_of_the_live_page_does_not_hold_it_up(self, tmp_path: Path):
        with deployed(small_file(tmp_path)) as deployment:
            viewer = urllib.request.urlopen(f"{deployment.url}/dashboard/events", timeout=LIMIT_S)
            snapshot = json.loads(viewer.readline().removeprefix(b"data: "))
            deployment.process.send_signal(signal.SIGINT)
            deployment.process.wait(LIMIT_S / 4)
            viewer.close()
        assert [worker["id"] for worker in snapshot["workers"]] == ["r0", "r1"]

    def test_an_address_in_use_is_one_clear_line(self, tmp_path: Path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            command = [sys.executable, "-m", "viisim", "deploy", str(small_file(tmp_path))]
            command += ["--state", str(tmp_path / "state")]
            done = subprocess.run(
                [*command, "--set", f"deploy.listen={listen}"],
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"error: {listen}: cannot listen there" in done.stderr


RELOADED = [("count: 2", "count: 4"), ("least_loaded", "round_robin"), ("count: 4", "count: 1")]
"""Workers are added, the policy changes, workers go."""


async def ask_many(url: str, number: int, at_once: int) -> list[tuple[int, int]]:
    """Status and tokens of so many requests."""
    body = {"model": MODEL, "prompt": "x" * 50, "max_tokens": 20}
    left, answers = iter(range(number)), []

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                usage = (await answer.json()).get("usage", {})
                answers.append((answer.status, usage.get("completion_tokens", 0)))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(at_once)))
    return answers


@pytest.mark.slow
class TestReload:
    def reload(self, deployment: Deployment, said: Iterator[str]) -> str:
        """Have the file read again; what the deployment says of it."""
        deployment.process.send_signal(signal.SIGHUP)
        return next(said)

    def test_no_request_is_lost_over_reloads(self, tmp_path: Path):
        file = small_file(tmp_path)
        text = file.read_text()
        with deployed(file) as deployment:
            assert deployment.process.stdout is not None
            said = iter(deployment.process.stdout.readline, "")
            reports = []

            async def reload_thrice() -> None:
                nonlocal text
                for old, new in RELOADED:
                    await asyncio.sleep(0.3)
                    assert old in text
                    text = text.replace(old, new)
                    file.write_text(text)
                    reports.append(await asyncio.to_thread(self.reload, deployment, said))

            async def scenario() -> list[tuple[int, int]]:
                asking = asyncio.create_task(ask_many(deployment.url, 2000, 40))
                await reload_thrice()
                return await asking

            answers = asyncio.run(scenario())
            ids = [model["id"] for model in deployment.get("/v1/models")["data"]]
        assert (len(answers), set(answers), ids) == (2000, {(200, 20)}, [MODEL])
        assert reports == [
            "reloaded: 2 workers added, 0 retired\n",
            "reloaded: 0 workers added, 0 retired\n",
            "reloaded: 0 workers added, 3 retired\n",
        ]

    def test_a_file_that_is_wrong_changes_nothing(self, tmp_path: Path):
        file = small_file(tmp_path)
        with deployed(file) as deployment:
            assert deployment.process.stdout is not None
            file.write_text(file.read_text().replace("least_loaded", "lest_loaded"))
            said = self.reload(deployment, iter(deployment.process.stdout.readline, ""))
            answers = asyncio.run(ask_many(deployment.url, 1, 1))
        assert "not reloaded: " in said
        assert "Did you mean 'least_loaded'" in said
        assert answers == [(200, 20)]


class TestRollingJournal:
    HEAD = Segment("least_loaded")

    def written(self, folder: Path, requests: int, *, files: int = 3) -> RollingJournal:
        """A journal of so many requests, in files of a few hundred events."""
        core = self.HEAD.make_core()
        journal = RollingJournal(folder, self.HEAD, core, 50_000, files)
        journal.record(*self.handled(core, ReplicaChanged(0.0, "r0", "ready", model="m")))
        for i in range(requests):
            journal.record(*self.handled(core, Arrived(float(i), request(id=f"q{i}"))))
            journal.record(*self.handled(core, Finished(float(i), f"q{i}", 1, 5)))
        journal.close()
        return journal

    @staticmethod
    def handled(core: Any, event: Any) -> tuple[Any, Any]:
        """An event and what it caused."""
        return event, core.handle(event)

    def test_only_the_latest_files_are_kept(self, tmp_path: Path):
        journal = self.written(tmp_path, 1000)
        names = [path.name for path in journal.paths()]
        assert len(names) == 3
        assert names == [f"journal-{n:06d}.jsonl" for n in range(int(names[0][8:14]), 99)][:3]

    def test_every_file_that_is_kept_replays_alone(self, tmp_path: Path):
        paths = self.written(tmp_path, 1000).paths()
        assert [replay_journal(path, trust=True).equal for path in paths] == [True] * 3

    def test_files_are_about_as_large_as_asked(self, tmp_path: Path):
        first, *_ = self.written(tmp_path, 1000, files=99).paths()
        assert 50_000 <= first.stat().st_size < 2 * 50_000 + 100_000

    def test_a_new_start_goes_on_after_the_old_files(self, tmp_path: Path):
        self.written(tmp_path, 1)
        assert [path.name for path in self.written(tmp_path, 1).paths()] == [
            "journal-000001.jsonl",
            "journal-000002.jsonl",
        ]

    def test_lines_are_on_disk_at_once(self, tmp_path: Path):
        core = self.HEAD.make_core()
        journal = RollingJournal(tmp_path, self.HEAD, core, 50_000, 3)
        journal.record(*self.handled(core, ReplicaChanged(0.0, "r0", "ready", model="m")))
        assert replay_journal(journal.paths()[0]).events == 1
        journal.close()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_a_disk_without_room_ends_the_journal_and_not_the_service(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        core = self.HEAD.make_core()
        full = RollingJournal(tmp_path, self.HEAD, core, 50_000, 3)
        assert full._writer is not None
        full._writer.close()
        full._writer._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - the writer closes it
        for now_s in (0.0, 1.0):
            full.record(*self.handled(core, ReplicaChanged(now_s, "r0", "ready", model="m")))
        assert [record.message[:21] for record in caplog.records] == ["the journal ends here"]

    def test_a_file_in_the_place_of_the_folder_is_a_clear_error(self, tmp_path: Path):
        (tmp_path / "taken").touch()
        with pytest.raises(InputError, match=r"--journal .*taken"):
            self.written(tmp_path / "taken", 1)


def test_worker_ids_are_those_of_the_simulation(tmp_path: Path):
    from runtime.cluster import planned

    experiment = load_experiment(small_file(tmp_path))
    simulated = [replica.id for replica in experiment.simulated_replicas()]
    assert [replica.id for replica in planned(experiment)] == simulated
