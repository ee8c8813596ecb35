"""Servers that a deployment starts, restarts, launches and retires: real processes, no vLLM."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.cluster import free_ports
from tests.test_deploy import LIMIT_S, ask_many, linux_only

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
from policies.interface import Launch, Retire
from policies.least_requests import LeastRequests


class Plain(LeastRequests):
    """As it is."""


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
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if any("stub_vllm" in w for w in one.cmdline())]

    def journal(self) -> list[Any]:
        """The events so far, and what they caused."""
        (path,) = (self.folder / "journal").iterdir()
        return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def started(folder: Path, policy: str = "Plain", count: int = 1) -> Iterator[Started]:
    """A deployment that is up."""
    (folder / "policy.py").write_text(POLICY)
    stub = ROOT / "tests" / "stub_vllm.py"
    (folder / "file.yaml").write_text(
        FILE.format(policy=policy, count=count, model=MODEL, python=sys.executable, stub=stub)
    )
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "viisim", "deploy", str(folder / "file.yaml")]
    command += ["--set", f"deploy.listen=127.0.0.1:{port}", "--state", str(folder / "state")]
    command += ["--journal", str(folder / "journal")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        assert b"serving" in process.stdout.readline()
        yield Started(process, f"http://127.0.0.1:{port}", folder)
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


pytestmark = [pytest.mark.slow, linux_only]


def test_each_server_gets_a_card_of_its_own(tmp_path: Path):
    with started(tmp_path, count=2) as found:
        until(lambda: len(found.servers()) == 2)
        cards = [server.environ()["HIP_VISIBLE_DEVICES"] for server in found.servers()]
    assert sorted(cards) == ["0", "1"]


def test_a_server_that_dies_is_started_again(tmp_path: Path):
    with started(tmp_path) as found:
        (before,) = found.servers()
        before.kill()
        answers = asyncio.run(ask_many(found.url, 5, 5))  # they wait for the new one
        (after,) = found.servers()
    assert answers == [(200, 1)] * 5
    assert after.pid != before.pid


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


def test_after_the_end_no_server_is_left(tmp_path: Path):
    with started(tmp_path, count=2) as found:
        until(lambda: len(found.servers()) == 2)
        servers = found.servers()
    assert not any(one.is_running() and one.status() != "zombie" for one in servers)
