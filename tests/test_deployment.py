"""Servers that a deployment starts, restarts, launches and retires: real processes, no vLLM."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.cards.watch import NoCards, capped
from runtime.cluster import free_ports, planned
from runtime.deployment import cards_beside
from tests.test_deploy import LIMIT_S, ask_many, linux_only
from viisim.config import load_experiment
from viisim.errors import InputError

ROOT = Path(__file__).parents[1]
MODEL = "qwen3-vl-8b-awq"

FILE = """
name: started
policy: {{class: policy.py:{policy}}}
cluster:
  replicas:
    - count: {count}
      device: radeon_vii
      model: {model}
      worker: {{kind: vllm, command: [{python}, {stub}]}}
  spare: {{device: radeon_vii, count: 1}}
workload: {{kind: synthetic, preset: azure_conv, rate_per_s: 1.0, requests: 10}}
seeds: [1]
"""

POLICY = '''
from policies.interface import Dispatch, Launch, Retire
from policies.least_requests import LeastRequests


class Plain(LeastRequests):
    """As it is."""


class Careless(LeastRequests):
    """Sends everything to a replica that does not exist."""

    def place(self, request, view):
        return Dispatch(request.id, "nowhere")


class Grows(LeastRequests):
    """A second replica when the first has work, and none any more when it has worked."""

    tick_s = 0.05

    def __init__(self) -> None:
        self.begun = False

    def plan(self, queue, view):
        second = [r for r in view.replicas if r.id != "r0"]
        if not self.begun:
            self.begun = True
            yield Launch(view.replicas[0].model, ("gpu1",))
        elif second and second[0].state == "ready" and "gpu1" in second[0].devices:
            yield Retire(second[0].id)
'''


class Started:
    """A running deployment."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, folder: Path) -> None:
        self.process = process
        self.url = url
        self.folder = folder

    def servers(self) -> list[psutil.Process]:
        """The stub servers that run."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ends at this moment
                if any("stub_vllm" in word for word in child.cmdline()):
                    found.append(child)
        return found

    def cards(self) -> list[str]:
        """Of the servers that run."""
        found = []
        for server in self.servers():
            with suppress(psutil.Error):
                found.append(server.environ()["HIP_VISIBLE_DEVICES"])
        return sorted(found)

    def reload(self) -> str:
        """Have the file read again; what is said of it."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGHUP)
        return self.process.stdout.readline().decode()

    def is_ready(self) -> bool:
        """Whether some worker takes requests."""
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=LIMIT_S) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def journal(self) -> list[Any]:
        """The events so far, and what they caused."""
        (path,) = (self.folder / "journal").iterdir()
        return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def started(
    folder: Path, policy: str = "Plain", count: int = 1, before: Sequence[str] = ()
) -> Iterator[Started]:
    """A deployment that is up; with a command `before`, after a reload that replaced that."""
    (folder / "policy.py").write_text(POLICY)
    stub = ROOT / "tests" / "stub_vllm.py"
    text = FILE.format(policy=policy, count=count, model=MODEL, python=sys.executable, stub=stub)
    first = text.replace(f"{sys.executable}, {stub}", ", ".join(before)) if before else text
    (folder / "file.yaml").write_text(first)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "viisim", "deploy", str(folder / "file.yaml")]
    command += ["--set", f"deploy.listen=127.0.0.1:{port}", "--state", str(folder / "state")]
    command += ["--journal", str(folder / "journal")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        found = Started(process, f"http://127.0.0.1:{port}", folder)
        if before:
            until(lambda: (folder / "state/logs/r0.log").exists())
            (folder / "file.yaml").write_text(text)
            assert "1 workers added, 1 retired" in found.reload()
        assert b"serving" in process.stdout.readline()
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other processes do."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.02)


CARDS = """
name: cards
policy: {{name: least_loaded}}
cluster: {{replicas: [{}]}}
workload: {{kind: synthetic, preset: azure_conv, rate_per_s: 1.0, requests: 10}}
seeds: [1]
"""
ENTRY = "{{count: {}, device: radeon_vii, model: qwen3-vl-8b-awq, worker: {{kind: vllm{}}}}}"


def beside(folder: Path, kept: dict[int, str], *entries: tuple[int, str]) -> list[tuple[int, ...]]:
    """The cards that these entries' replicas get."""
    file = folder / "cards.yaml"
    file.write_text(CARDS.format(", ".join(ENTRY.format(*entry) for entry in entries)))
    experiment = load_experiment(file)
    return list(cards_beside(kept, experiment, planned(experiment)).values())


class TestCardsBeside:
    def test_they_are_the_lowest_that_nobody_keeps(self, tmp_path: Path):
        assert beside(tmp_path, {1: "r1"}, (2, "")) == [(0,), (2,)]

    def test_what_the_file_names_is_left_for_whom_it_names(self, tmp_path: Path):
        assert beside(tmp_path, {}, (1, ""), (1, ", cards: [0]")) == [(1,), (0,)]

    def test_a_named_card_that_is_kept_is_one_clear_line(self, tmp_path: Path):
        with pytest.raises(InputError, match="card 0 is wanted for another replica, but r7 runs"):
            beside(tmp_path, {0: "r7"}, (1, ", cards: [0]"))

    def test_a_worker_without_cards_gets_none(self, tmp_path: Path):
        assert beside(tmp_path, {0: "r7"}, (1, ", cards: []")) == [()]


def test_who_sees_no_cards_forgets_no_cap_of_theirs(tmp_path: Path):
    note = '{"pci": "0000:03:00.0", "before_uw": 250000000, "after_uw": 180000000}'
    (tmp_path / "power_caps").write_text(note)
    with capped(NoCards(), {}, tmp_path / "power_caps"):
        pass
    assert (tmp_path / "power_caps").read_text() == note


def ends(folder: Path, *options: str) -> tuple[int, list[str]]:
    """The status of a deployment that ends by itself, and the lines that it says at last."""
    stub = ROOT / "tests" / "stub_vllm.py"
    (folder / "policy.py").write_text(POLICY)
    (folder / "file.yaml").write_text(
        FILE.format(policy="Plain", count=1, model=MODEL, python=sys.executable, stub=stub)
    )
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "viisim", "deploy", str(folder / "file.yaml")]
    command += ["--state", str(folder / "state"), "--set", f"deploy.listen=127.0.0.1:{port}"]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()


COMMAND = "cluster.replicas.0.worker.command"


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", f"{COMMAND}=[no-such-vllm]"), "error: r0: no-such-vllm: No such file"),
        (
            ("--set", f"{COMMAND}=['false']", "--set", "deploy.max_restarts=1"),
            "error: r0: the server ended, see ",
        ),
        (
            ("--set", "cluster.replicas.0.worker.log_dir=/dev/null/logs"),
            "error: worker.log_dir: /dev/null/logs: Not a directory",
        ),
        (("--set", "deploy.tokenizer=none.json"), "error: deploy.tokenizer: "),
        (("--speed", "0"), "error: --speed 0.0: give a number above 0"),
        (("--set", "deploy.listen=127.0.0.1:99999"), "error: deploy.listen: 99999 is no port"),
    ],
    ids=["no program", "it never stays up", "no folder", "no tokenizer", "no speed", "no port"],
)
def test_what_cannot_be_served_is_one_clear_line(
    options: tuple[str, ...], said: str, tmp_path: Path
):
    status, lines = ends(tmp_path, *options)
    assert (status, [line[: len(said)] for line in lines if "error: " in line]) == (2, [said])


@pytest.mark.slow
@linux_only
def test_each_server_gets_a_card_of_its_own(tmp_path: Path):
    with started(tmp_path, count=2) as found:
        until(lambda: len(found.servers()) == 2)
        cards = [server.environ()["HIP_VISIBLE_DEVICES"] for server in found.servers()]
    assert sorted(cards) == ["0", "1"]


@pytest.mark.slow
@linux_only
def test_a_server_that_dies_is_started_again(tmp_path: Path):
    with started(tmp_path) as found:
        (before,) = found.servers()
        before.kill()
        until(lambda: not found.is_ready())
        answers = asyncio.run(ask_many(found.url, 5, 5))  # they wait for the new one
        (after,) = found.servers()
    assert answers == [(200, 1)] * 5
    assert after.pid != before.pid


@pytest.mark.slow
@linux_only
def test_what_a_policy_launches_serves_and_what_it_retires_ends(tmp_path: Path):
    with started(tmp_path, "Grows") as found:

        def replica_events() -> list[tuple[str, str]]:
            asyncio.run(ask_many(found.url, 2, 2))  # the policy plans while there is work
            events = [line.get("event", {}) for line in found.journal()]
            changes = [event for event in events if event.get("event") == "ReplicaChanged"]
            return [(event["replica_id"], event["state"]) for event in changes]

        until(lambda: (f"{MODEL}-0", "gone") in replica_events())
        assert (f"{MODEL}-0", "ready") in replica_events()
        assert len(found.servers()) == 1


@pytest.mark.slow
@linux_only
def test_after_the_end_no_server_is_left(tmp_path: Path):
    with started(tmp_path, count=2) as found:
        until(lambda: len(found.servers()) == 2)
        servers = found.servers()
    assert not any(one.is_running() and one.status() != "zombie" for one in servers)


@pytest.mark.slow
@linux_only
def test_a_reload_replaces_what_never_comes_up(tmp_path: Path):
    with started(tmp_path, before=["sleep", "inf"]) as found:
        answers = asyncio.run(ask_many(found.url, 2, 2))
        (server,) = found.servers()
        card = server.environ()["HIP_VISIBLE_DEVICES"]
    assert (answers, card) == ([(200, 1)] * 2, "0")


@pytest.mark.slow
@linux_only
def test_what_one_reload_takes_away_the_next_brings_back(tmp_path: Path):
    with started(tmp_path, count=2) as found:
        until(lambda: len(found.servers()) == 2)
        one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
        file = tmp_path / "file.yaml"
        two.write_text(file.read_text())
        one.write_text(file.read_text().replace("count: 2", "count: 1"))
        for said, text in (("0 workers added, 1 retired", one), ("1 workers added, 0", two)):
            file.write_text(text.read_text())
            assert said in found.reload()
        until(lambda: found.cards() == ["0", "1"])


def test_a_policy_that_answers_nonsense_ends_the_deployment(tmp_path: Path):
    with started(tmp_path, "Careless") as found:
        assert asyncio.run(ask_many(found.url, 1, 1)) == [(500, 0)]
        assert found.process.wait(LIMIT_S) == 2
