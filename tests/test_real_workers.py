"""`viisim deploy` in front of two real vLLM workers, and what it does when one of them is killed.

Runs where $VIISIM_VLLM names the folder that experiments/vllm_cpu/install.sh filled. The tests
share one deployment, in the order of the file: a minute's start is paid once.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from runtime.cluster import free_ports
from viisim.config import load_experiment
from viisim.journal import replay_journal

ROOT = Path(__file__).parents[1]
START_S = 300.0
LIMIT_S = 120.0
LONG = 900

VLLM = os.environ.get("VIISIM_VLLM", "")
pytestmark = pytest.mark.skipif(not VLLM, reason="$VIISIM_VLLM names no folder with vLLM in it")


class Served:
    """The running deployment."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.file = folder / "experiment.yaml"
        self.said = folder / "said.log"
        self.seen: set[int] = set()
        """Every process of it that any test has seen."""

    def workers(self) -> dict[str, psutil.Process]:
        """The API servers by replica, as far as they run."""
        found = {}
        for child in self._children():
            words = _words(child)
            if "serve" in words and "--port" in words:
                with_core = "0" if psutil.Process(child.pid).cpu_affinity() == [0] else "1"
                found[f"r{with_core}"] = child
        return found

    def engine_of(self, worker: str) -> psutil.Process:
        """The process in which the worker's engine runs."""
        server = self.workers()[worker]
        return next(p for p in server.children(recursive=True) if "EngineCore" in p.name())

    def port_of(self, worker: str) -> int:
        """Where the worker itself listens."""
        words = _words(self.workers()[worker])
        return int(words[words.index("--port") + 1])

    def _children(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.seen.update(child.pid for child in children)
        return children

    def wait_until_up(self, *workers: str) -> None:
        """Until all of these take requests."""

        def up() -> bool:
            state = asyncio.run(get(f"{self.url}/metrics"))
            return all(
                f'viisim_worker_ready{{model="tiny",worker="{w}"}} 1.0' in state for w in workers
            )

        until(up, START_S)
        self._children()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def lives(pid: int) -> bool:
    """Whether the process is there, and no zombie that nobody has asked after."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def until(condition: Callable[[], bool], limit_s: float) -> None:
    """Wait for something that other processes do."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s:g} s"
        time.sleep(0.2)


async def get(url: str) -> str:
    """The text at a URL; empty when nobody listens there yet."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return await answer.text()
    except aiohttp.ClientError:
        return ""


@contextmanager
def deployed(folder: Path, workers: Sequence[str] = ("r0", "r1")) -> Iterator[Served]:
    """Workers behind a proxy, and its journal in `journals`."""
    text = (ROOT / "tests" / "real_workers.yaml").read_text()
    text = text.replace("$VLLM", str(Path(VLLM).resolve()))
    text = text.replace("../experiments", str(ROOT / "experiments"))
    text = text.replace("count: 2", f"count: {len(workers)}")
    (folder / "experiment.yaml").write_text(text)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "viisim", "deploy", str(folder / "experiment.yaml")]
    command += ["--set", f"deploy.listen=127.0.0.1:{port}", "--state", str(folder / "state")]
    command += ["--journal", str(folder / "journals")]
    with (folder / "said.log").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    served = Served(process, port, folder)
    try:
        served.wait_until_up(*workers)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The deployment of all tests here."""
    with deployed(tmp_path_factory.mktemp("real")) as found:
        yield found


def asking(tokens: int, **fields: Any) -> dict[str, Any]:
    """A request for exactly so many tokens."""
    return {
        "model": "tiny",
        "prompt": "x" * 20,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    } | fields


class Told:
    """What a client saw of one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.events: list[Any] = []
        self.ended_s = 0.0

    @property
    def tokens(self) -> int:
        """As the worker counted them at the end; events may hold several."""
        return int((self.events[-1].get("usage") or {}).get("completion_tokens", 0))

    @property
    def failed(self) -> bool:
        """Whether it ended in an error event."""
        return any("error" in event for event in self.events)


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Told:
    """Ask, and read the whole stream."""
    told = Told()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        told.status = answer.status
        async for line in answer.content:
            if line.startswith(b"data: {"):
                told.events.append(json.loads(line[6:]))
    told.ended_s = time.monotonic()
    return told


async def streams(url: str, bodies: list[dict[str, Any]], meanwhile: Any = None) -> list[Told]:
    """Many at once; `meanwhile` is awaited when all have been sent."""
    async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(stream(session, url, body)) for body in bodies]
        if meanwhile is not None:
            await meanwhile()
        return await asyncio.gather(*tasks)


async def counted(port: int, metric: str, labels: str = "") -> float:
    """What a worker itself counts."""
    text = await get(f"http://127.0.0.1:{port}/metrics")
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{metric}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if labels in line)


async def running(port: int) -> float:
    """Requests in a worker's engine."""
    return await counted(port, "num_requests_running")


async def generated(ports: Sequence[int]) -> float:
    """Tokens that these workers have computed."""
    return sum([await counted(port, "generation_tokens_total") for port in ports])


async def until_async(condition: Callable[[], Awaitable[bool]], limit_s: float = LIMIT_S) -> None:
    """Wait for something that a worker says."""
    async with asyncio.timeout(limit_s):
        while not await condition():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.02)


def test_two_hundred_mixed_requests_have_their_exact_lengths(served: Served) -> None:
    records = served.folder / "records.jsonl"
    command = [sys.executable, "-m", "viisim", "load", served.url, str(served.file)]
    command += ["--token-ids", "8:105", "--out", str(records)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = load_experiment(served.file).build_workload().requests(1)
    wanted = {request.view.id: request.output_tokens for request in asked}
    got = [json.loads(line) for line in records.read_text().splitlines()]
    assert {one["id"]: one["output_tokens"] for one in got} == wanted
    assert {one["streamed"] for one in got} == {True, False}


def test_urgent_requests_overtake_those_that_can_wait(served: Served) -> None:
    patient = [asking(60, priority=10, prompt=f"{n:03} {'y' * 40}") for n in range(60)]
    urgent = [asking(60, priority=-5, prompt=f"u{n} {'y' * 40}") for n in range(6)]
    told = asyncio.run(streams(served.url, patient + urgent))
    assert {one.tokens for one in told} == {60}
    last_urgent_s = max(one.ended_s for one in told[60:])
    assert sum(one.ended_s > last_urgent_s for one in told[:60]) >= 30


def test_a_client_that_leaves_frees_its_worker(served: Served) -> None:
    ports = [served.port_of(worker) for worker in ("r0", "r1")]

    async def freed() -> bool:
        return not sum([await running(port) for port in ports])

    async def scenario() -> float:
        await until_async(freed)
        before = await generated(ports)
        async with aiohttp.ClientSession() as session:
            for _ in ports:
                body = asking(LONG)
                answer = await session.post(f"{served.url}/v1/completions", json=body)
                await answer.content.readline()
                answer.close()
        await until_async(freed)
        return await generated(ports) - before

    assert 2 <= asyncio.run(scenario()) < LONG


def test_the_policy_of_the_file_is_changed_by_sighup(served: Served) -> None:
    served.file.write_text(served.file.read_text().replace("name: hybrid", "name: least_loaded"))
    served.process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded: 0 workers added, 0 retired" in served.said.read_text(), LIMIT_S)
    (journal,) = served.folder.glob("journals/*")
    assert '"policy":{"name":"least_loaded"}' in journal.read_text()


@pytest.mark.parametrize(
    ("worker", "part"), [("r0", "engine"), ("r1", "server")], ids=["EngineCore", "API server"]
)
def test_a_killed_process_costs_only_streams_that_had_begun(
    served: Served, worker: str, part: str
) -> None:
    served.wait_until_up("r0", "r1")

    async def kill() -> None:
        port = served.port_of(worker)

        async def is_busy() -> bool:
            return await running(port) >= 2

        await until_async(is_busy)
        engine = served.engine_of(worker)
        (engine if part == "engine" else served.workers()[worker]).kill()

    # More than run at once, so that some wait in the engines and have shown nothing yet.
    bodies = [asking(200, prompt=f"{n:03} {'z' * 100}") for n in range(40)]
    told = asyncio.run(streams(served.url, bodies, kill))
    assert {one.status for one in told} == {200}
    whole = [one for one in told if not one.failed]
    assert {one.tokens for one in whole} == {200}
    cut = [one for one in told if one.failed]
    assert cut
    # It had shown something, and what it showed ends in an error that clients notice.
    assert all(len(one.events) > 1 and "error" in one.events[-1] for one in cut)
    assert len(whole) >= 20
    served.wait_until_up("r0", "r1")


def test_the_journal_of_all_this_replays_with_zero_differences(served: Served) -> None:
    reports = [
        replay_journal(path, trust=True) for path in sorted(served.folder.glob("journals/*"))
    ]
    assert [str(report.difference) for report in reports] == ["None"] * len(reports)
    assert sum(report.actions for report in reports) >= 300


def test_after_the_end_no_process_is_left(served: Served) -> None:
    served.wait_until_up("r0", "r1")
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(LIMIT_S) == 0
    assert [pid for pid in served.seen if lives(pid)] == []


def test_what_a_killed_proxy_leaves_is_ended_by_the_next_start(tmp_path: Path) -> None:
    with deployed(tmp_path, ["r0"]) as first:
        left = first.seen | {one.pid for one in first.workers().values()}
        first.process.kill()
        first.process.wait(LIMIT_S)
        assert any(map(lives, left))
        with deployed(tmp_path, ["r0"]) as second:
            assert not any(map(lives, left))
            assert "which an earlier start left behind" in second.said.read_text()
