"""Workers killed again and again under load: what clients lose, and what the proxy keeps.

    python benchmarks/chaos.py --kills 1000 --seed 1

Starts `viisim deploy` over eight simulated workers, keeps streams and plain requests under way, and
has one worker after the other die, freeze, break its connections, refuse, or send an error event.
Prints JSON, and exits with 1 unless

- every request that failed before its first byte had used up its attempts (the journal says so),
- no client got a token twice, and every whole answer has its exact length,
- nothing is in flight when the clients have left,
- the journal replays with zero differences.

`rss_mib` is the proxy's memory after a third of the kills and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from runtime.cluster import free_ports
from viisim.journal import replay_journal

ROOT = Path(__file__).resolve().parent.parent
KEY = "chaos"
MODEL = "qwen3-vl-8b-awq"
SPEED = 10.0
KINDS = ("kill", "freeze", "network_cut", "refuse", "error")
EXPERIMENT = f"""
name: chaos
policy: {{name: least_loaded}}
cluster:
  replicas:
    - {{count: 8, device: radeon_vii, model: {MODEL}}}
workload: {{kind: synthetic, preset: azure_conv, rate_per_s: 1.0, requests: 100}}
limits: {{eject_s: 0.2, queue_timeout_s: 60}}
deploy:
  admin_sha256: {hashlib.sha256(KEY.encode()).hexdigest()}
  max_restarts: 1000000
seeds: [1]
"""


class Chaos:
    """One run, and what is counted in it."""

    def __init__(self, options: argparse.Namespace, folder: Path, port: int) -> None:
        self.options = options
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.draws = random.Random(options.seed)
        self.ends: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.failed_early: list[str] = []
        self.wrong_lengths: list[str] = []
        self.number = 0
        self.over = asyncio.Event()
        self.workers: dict[int, int] = {}

    # -- clients --

    async def client(self, session: aiohttp.ClientSession) -> None:
        """One request after the other, until it is over."""
        while not self.over.is_set():
            self.number += 1
            request_id = f"q{self.number}"
            tokens = self.draws.randint(2, 200)
            body = {
                "model": MODEL,
                "prompt": "x" * self.draws.randint(10, 2000),
                "max_tokens": tokens,
                "stream": self.draws.random() < 0.7,
            }
            headers = {"X-Request-Id": request_id}
            async with session.post(
                f"{self.url}/v1/completions", json=body, headers=headers
            ) as answer:
                await self.judge(request_id, answer, tokens, bool(body["stream"]))

    async def judge(
        self, request_id: str, answer: aiohttp.ClientResponse, tokens: int, streamed: bool
    ) -> None:
        """Note how a request ended."""
        if answer.status != 200:
            self.ends[str(answer.status)] += 1
            self.failed_early.append(request_id)
            return
        if not streamed:
            made = (await answer.json())["usage"]["completion_tokens"]
            self.note("whole", request_id, made == tokens)
            return
        made, finished, failed = 0, False, False
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            failed |= "error" in event
            for choice in event.get("choices", ()):
                made += choice["text"].count("tok")
                finished |= choice["finish_reason"] is not None
        if failed:
            self.note("cut", f"{request_id}: {made} of {tokens}", 0 < made <= tokens)
        else:
            said = f"{request_id}: {made} of {tokens}, {'finished' if finished else 'not finished'}"
            self.note("whole", said, finished and made == tokens)

    def note(self, end: str, said: str, has_right_length: bool) -> None:
        """An answer that had begun has ended."""
        self.ends[end] += 1
        if not has_right_length:
            self.wrong_lengths.append(f"{end} {said}")

    # -- faults --

    async def torment(self, session: aiohttp.ClientSession, proxy: psutil.Process) -> list[float]:
        """One fault after the other; memory after a third of them and at the end, in MiB."""
        memory = []
        number = 0
        while number < self.options.kills:
            await asyncio.sleep(self.options.every_s)
            self.find_workers(proxy)
            if not self.workers:
                continue
            number += 1
            kind = self.draws.choice(KINDS)
            pid, port = self.draws.choice(sorted(self.workers.items()))
            self.faults[kind] += 1
            await self.strike(session, kind, pid, port)
            if number == self.options.kills // 3:
                memory.append(proxy.memory_info().rss / 2**20)
        return [*memory, proxy.memory_info().rss / 2**20]

    def find_workers(self, proxy: psutil.Process) -> None:
        """Process id and port of every worker that listens."""
        there = {worker.pid: worker for server in proxy.children() for worker in server.children()}
        self.workers = {pid: port for pid, port in self.workers.items() if pid in there}
        for pid in there.keys() - self.workers.keys():
            with suppress(psutil.Error):
                listening = [c for c in there[pid].net_connections() if c.status == "LISTEN"]
                if listening:
                    self.workers[pid] = listening[0].laddr.port

    async def strike(self, session: aiohttp.ClientSession, kind: str, pid: int, port: int) -> None:
        """One fault on one worker."""
        try:
            if kind == "kill":
                os.kill(pid, signal.SIGKILL)
            elif kind == "freeze":
                os.kill(pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(0.5, thaw, pid)
            else:
                fault = {"kind": kind}
                if kind == "refuse":
                    fault["duration_s"] = "10"
                    asyncio.get_running_loop().call_later(0.3, mend, session, port)
                url = f"http://127.0.0.1:{port}/fault"
                async with session.post(url, json=fault, timeout=TIMEOUT):
                    pass
        except (ProcessLookupError, aiohttp.ClientError, TimeoutError):
            self.faults["missed"] += 1  # it is down already


TIMEOUT = aiohttp.ClientTimeout(total=1.0)


def thaw(pid: int) -> None:
    """Let a frozen process go on, if it is still there."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def mend(session: aiohttp.ClientSession, port: int) -> None:
    """Have a worker that refuses accept again."""

    async def post() -> None:
        try:
            url = f"http://127.0.0.1:{port}/fault"
            async with session.post(url, json={"kind": "none"}, timeout=TIMEOUT):
                pass
        except (aiohttp.ClientError, TimeoutError):
            return  # killed meanwhile

    mending.add(task := asyncio.ensure_future(post()))
    task.add_done_callback(mending.discard)


mending: set[asyncio.Future[None]] = set()


# -- what the journal says --


def attempts_of(journal: Path) -> Counter[str]:
    """How often each request failed on a worker."""
    failures: Counter[str] = Counter()
    for line in journal.read_text().splitlines():
        event = json.loads(line).get("event", {})
        if event.get("event") == "Failed":
            failures[event["request_id"]] += 1
    return failures


async def state(session: aiohttp.ClientSession, url: str) -> Any:
    """The proxy's own state."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with session.get(f"{url}/admin/state", headers=headers) as answer:
        return await answer.json()


async def torment_deployment(options: argparse.Namespace, folder: Path, port: int) -> Any:
    """Load and faults together; the figures."""
    chaos = Chaos(options, folder, port)
    (folder / "chaos.yaml").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "viisim", "deploy", str(folder / "chaos.yaml")]
    command += ["--set", f"deploy.listen=127.0.0.1:{port}", "--speed", str(SPEED)]
    command += ["--journal", str(folder / "journal"), "--journal-mib", "1000"]
    command += ["--state", str(folder / "state")]
    with (folder / "said.log").open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=said, cwd=ROOT
        )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        proxy = psutil.Process(process.pid)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=NO_TIMEOUT) as session:
            clients = [asyncio.create_task(chaos.client(session)) for _ in range(options.clients)]
            memory = await chaos.torment(session, proxy)
            chaos.over.set()
            await asyncio.gather(*clients)
            after = await state(session, chaos.url)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
    return report(chaos, memory, after)


NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


def report(chaos: Chaos, memory: list[float], after: Any) -> dict[str, Any]:
    """Everything that is judged, and the verdict."""
    (journal,) = (chaos.folder / "journal").iterdir()
    failures = attempts_of(journal)
    most = after["limits"]["max_attempts"]
    lost = [name for name in chaos.failed_early if failures[name] < most]
    in_flight = after["inflight_requests"] + after["queued_requests"]
    replay = replay_journal(journal)
    return {
        "kills": sum(chaos.faults.values()),
        "faults": dict(sorted(chaos.faults.items())),
        "requests": chaos.number,
        "ends": dict(sorted(chaos.ends.items())),
        "failed_before_the_first_byte": len(chaos.failed_early),
        "lost_with_attempts_left": len(lost),
        "wrong_lengths": chaos.wrong_lengths,
        "in_flight_at_the_end": in_flight,
        "journal_differences": 0 if replay.equal else 1,
        "rss_mib": [round(value, 1) for value in memory],
        "passed": not lost and not chaos.wrong_lengths and not in_flight and replay.equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--every-s", type=float, default=0.15)
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(torment_deployment(options, Path(folder), port))
        found["log_tail"] = (Path(folder) / "said.log").read_text().splitlines()[-3:]
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["passed"] else 1)


if __name__ == "__main__":
    main()
