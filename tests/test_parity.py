"""Parity: what every shipped policy decided in real time, it decides again from the journal.

The driver of the proxy, five hundred requests, simulated workers inside the test, and every kind
of fault. Nothing about the run can be repeated except the decisions.
"""

import asyncio
import json
import zlib
from contextlib import aclosing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policies.interface import Arrived, Dispatch, Limits, ReplicaChanged, StepCosts
from policies.journal import Handled, Segment, handled_line, parse_line
from policies.registry import policy_names
from policies.testing import request
from runtime.driver import Driver, Job
from runtime.simulated.worker import Prompt, SimulatedWorker
from runtime.worker import Reading, WorkerError, WorkerRefused
from viisim.cli import app as cli
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.journal import JournalWriter, replay_journal

REQUESTS = 500
SPEED = 200.0
LIMIT_S = 60.0
LIMITS = Limits(max_queued=100, queue_timeout_s=0.5, eject_after=3, eject_s=0.02)


def dice(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return zlib.crc32(repr(key).encode()) / 2**32


def step_time(slowdown: float) -> StepTime:
    """Ten milliseconds a step, or more."""
    return StepTime([DecodePoint(1, 0.01 * slowdown, 0.0)], 8, 0.01 * slowdown, 5e-5)


class EngineWorker:
    """The engine model in real time as the driver's worker, with faults as the dice fall."""

    model = "m"
    devices: tuple[str, ...] = ()
    max_num_seqs = 8
    kv_blocks = 299
    block_tokens = 16
    step_costs = StepCosts()

    def __init__(self, worker_id: str) -> None:
        self.id = worker_id
        settings = SchedulerSettings(num_kv_blocks=300, max_num_seqs=8)
        self._simulated = SimulatedWorker("m", settings, step_time, SPEED)
        self._simulated.start()
        self._answers = count(1)
        self.inflight = 0

    async def answer(self, job: Job) -> int:
        """See `runtime.worker.Worker.answer`."""
        self.inflight += 1
        try:
            return await self._answer(job)
        finally:
            self.inflight -= 1

    async def _answer(self, job: Job) -> int:
        view = job.request
        luck = dice(self.id, view.id, job.attempt)
        if luck < 0.05:
            raise WorkerError("refuses connections")
        if luck < 0.08:
            raise WorkerRefused("a bad request")
        if next(self._answers) % 50 == 0:  # slow for fifty answers, then well again
            slowdown = 1.0 + 2.0 * (next(self._answers) // 50 % 2)
            self._simulated.engine.change_speed(step_time(slowdown))
        prompt = Prompt(((view.id, view.prompt_tokens),), view.prompt_tokens)
        output_tokens = 1 + int(30 * dice("output", view.id))
        made = 0
        async with aclosing(
            self._simulated.tokens(prompt, output_tokens, job.engine_priority)
        ) as answer:
            async for tokens, _ in answer:
                made += tokens
                if view.streamed:
                    job.begin()
                if luck < 0.16:
                    raise WorkerError("the stream is cut")
        return made

    async def gauges(self) -> Reading:
        """See `runtime.worker.GaugedWorker`."""
        return Reading(*self._simulated.engine.gauges())

    def close(self) -> None:
        """Compute no more."""
        self._simulated.engine.close()


async def client(driver: Driver, index: int) -> None:
    """One request; one client in ten is impatient."""
    view = request(
        id=f"q{index}",
        prompt_tokens=20 + int(600 * dice("prompt", index)),
        max_output_tokens=30,
        streamed=dice("streamed", index) < 0.8,
        priority=index % 3,
        tenant=f"t{index % 4}",
        prefix_blocks=(index % 7, index),
        prefix_block_tokens=16,
    )
    with suppress(TimeoutError):
        async with asyncio.timeout(0.02 if index % 10 == 0 else LIMIT_S):
            await driver.submit(view)


async def served(policy: str, path: Path, *later: str) -> list[EngineWorker]:
    """Five hundred requests in about a second, journaled; in the end under the `later` policies,
    each for twenty requests."""
    head = Segment(policy, seed=5, limits=LIMITS)
    core = head.make_core()
    workers = [EngineWorker(f"r{i}") for i in range(3)]
    with JournalWriter(path, head) as journal:
        driver = Driver(core, workers, journal=journal, scrape_s=0.02)
        async with asyncio.timeout(LIMIT_S), driver, asyncio.TaskGroup() as clients:
            for index in range(REQUESTS):
                clients.create_task(client(driver, index))
                left, turn = divmod(REQUESTS - index, 20)
                if not turn and left <= len(later):
                    driver.change(LIMITS, {"name": later[-left]})
                if index % 4 == 0:
                    await asyncio.sleep(0.005)
    assert core.queued_requests == core.inflight_requests == 0
    for worker in workers:
        worker.close()
    return workers


@pytest.mark.slow
@pytest.mark.parametrize("policy", policy_names())
def test_a_journal_of_faults_replays_with_zero_differences(policy: str, tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    workers = asyncio.run(served(policy, path))
    report = replay_journal(path)
    assert str(report.difference) == "None"
    assert report.actions >= REQUESTS
    assert [worker.inflight for worker in workers] == [0, 0, 0]


@pytest.mark.slow
def test_policies_changed_under_load_replay_with_zero_differences(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    workers = asyncio.run(served("round_robin", path, *policy_names()))
    assert str(replay_journal(path).difference) == "None"
    assert path.read_text().count('"event":"ConfigChanged"') == len(policy_names())
    assert [worker.inflight for worker in workers] == [0, 0, 0]


def test_the_faults_do_happen(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    asyncio.run(served("least_loaded", path))
    text = path.read_text()
    assert "refuses connections" in text
    assert "the stream is cut" in text
    assert '"attempt":2' in text
    assert '"event":"Gauges"' in text


# -- another policy's answers to the same questions --


def journal_of(policy: str, path: Path) -> Path:
    """Four requests of 150 tokens over two replicas, the first of them large; none ends."""
    head = Segment(policy, seed=5)
    core = head.make_core()
    story: list[Any] = [ReplicaChanged(0.0, name, "ready", model="m") for name in ("r0", "r1")]
    for i in range(4):
        view = request(id=f"q{i}", arrived_s=float(i), prompt_tokens=1000 if i == 0 else 100)
        story.append(Arrived(float(i), view))
    with JournalWriter(path, head) as journal:
        for event in story:
            journal.record(event, core.handle(event))
    return path


def replayed(*arguments: str) -> tuple[int, Any]:
    """Exit status and report of `viisim replay`."""
    done = CliRunner().invoke(cli, ["replay", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else str(done.exception)


class TestContrast:
    @pytest.mark.parametrize("policy", policy_names())
    def test_a_policy_agrees_with_itself(self, policy: str, tmp_path: Path):
        path = journal_of(policy, tmp_path / "journal.jsonl")
        _, found = replayed(str(path), "--policy", policy)
        assert (found["questions"], found["otherwise"]) == (4, {})

    def test_what_another_would_have_decided_is_shown_with_its_line(self, tmp_path: Path):
        # By tokens: r0, and then r1 three times. In turns: r0, r1, r0, r1.
        path = journal_of("least_loaded", tmp_path / "journal.jsonl")
        status, found = replayed(str(path), "--policy", "round_robin")
        assert (status, found["otherwise"]) == (0, {"dispatch elsewhere": 1})
        assert found["first"] == [
            {"line": 6, "request": "q2", "recorded": "dispatch to r1", "other": "dispatch to r0"}
        ]

    def test_the_recorded_decisions_stand(self, tmp_path: Path):
        # Asked about its own decisions instead, fewest requests would have alternated.
        path = journal_of("least_loaded", tmp_path / "journal.jsonl")
        _, found = replayed(str(path), "--policy", "least_requests")
        assert [f["request"] for f in found["first"]] == ["q2", "q3"]

    def test_every_file_of_a_folder_is_replayed(self, tmp_path: Path):
        for name in ("a", "b"):
            journal_of("random", tmp_path / f"{name}.jsonl")
        status, found = replayed(str(tmp_path))
        assert (status, [report["equal"] for report in found]) == (0, [True, True])

    def test_a_journal_that_does_not_replay_has_no_contrast(self, tmp_path: Path):
        path = journal_of("least_loaded", tmp_path / "journal.jsonl")
        *lines, last = path.read_text().splitlines()
        entry = parse_line(last)
        assert isinstance(entry, Handled)
        lines.append(handled_line(entry.event, [Dispatch("q3", "r0")]))
        path.write_text("\n".join(lines) + "\n")
        status, found = replayed(str(path), "--policy", "round_robin")
        assert (status, found["difference"]["line"]) == (1, 7)

    def test_a_folder_without_journals_is_an_error(self, tmp_path: Path):
        assert "no journals there" in replayed(str(tmp_path))[1]
