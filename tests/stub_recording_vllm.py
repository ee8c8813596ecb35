"""vLLM as far as a live calibration sees it: `stub_recording_vllm.py WEIGHTS --port N ...`.

It batches as vLLM does, first come first served with chunked prefill, streams the tokens, and
writes a record of every step to the file that VIISIM_STEP_RECORDS names. A step takes no time;
what it says of its time follows a straight line, times how slow the machine is just then. That is
written to the file that VIISIM_MACHINE_GAUGE names.
"""

import asyncio
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from aiohttp import web

DECODE_BASE_S, DECODE_CONTEXT_S = 2e-4, 2e-8
PREFILL_BASE_S, PREFILL_TOKEN_S = 3e-4, 1e-6
HOST_S, GAP_S = 1e-5, 1e-6
REQUEST_S, ANSWER_S = 3e-3, 5e-3
"""How long its front end keeps a request, and the beginning of an answer."""


def word(name: str) -> str:
    """What follows a flag."""
    return sys.argv[sys.argv.index(name) + 1]


def lines_to(variable: str) -> TextIO:
    """The file that the environment names, open as long as the server runs."""
    return open(os.environ[variable], "a", buffering=1)


def slowdown(step: int) -> float:
    """Of the machine, the same for all that run on it but for their quick moments, which they have
    all the time."""
    return 0.9 if step % 20 == 0 else 1 + 0.05 * math.sin(time.monotonic() / 5)


@dataclass(eq=False)
class Sequence:
    """One request in the engine."""

    prompt: int
    outputs: int
    tokens: "asyncio.Queue[int]" = field(default_factory=asyncio.Queue)
    computed: int = 0
    sent: int = 0


class Engine:
    """Steps over the sequences for as long as there are any."""

    def __init__(self) -> None:
        self.steps = 0
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.arrived = asyncio.Event()
        self.budget = int(word("--max-num-batched-tokens"))
        self.most = int(word("--max-num-seqs"))
        self.records = lines_to("VIISIM_STEP_RECORDS")
        self.gauge = lines_to("VIISIM_MACHINE_GAUGE")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            gap_s: float | None = GAP_S
            while not (self.running or self.waiting):
                gap_s = None
                self.arrived.clear()
                await self.arrived.wait()
            times = {"start_s": time.monotonic(), "gap_s": gap_s}
            self.records.write(json.dumps({**times, **self.step()}) + "\n")
            await asyncio.sleep(0)

    def step(self) -> dict[str, Any]:
        """Compute one batch; its record."""
        free = self.most - len(self.running)
        self.running += self.waiting[:free]
        del self.waiting[:free]
        decodes = [one for one in self.running if one.computed == one.prompt]
        room, context = self.budget - len(decodes), 0
        prefill = pairs = 0
        for one in decodes:
            context += one.prompt + one.sent
            self.send(one)
        for one in [one for one in self.running if one.computed < one.prompt]:
            chunk = min(room, one.prompt - one.computed)
            pairs += chunk * one.computed + chunk * (chunk + 1) // 2
            one.computed, room, prefill = one.computed + chunk, room - chunk, prefill + chunk
            if one.computed == one.prompt:
                self.send(one)
        base_s = max(DECODE_BASE_S if decodes else 0.0, PREFILL_BASE_S if prefill else 0.0)
        self.steps += 1
        slow = slowdown(self.steps)
        self.gauge.write(json.dumps({"at_s": time.monotonic(), "cpu_s": 0.002 * slow}) + "\n")
        return {
            "exec_s": slow * (base_s + DECODE_CONTEXT_S * context + PREFILL_TOKEN_S * prefill),
            "host_s": slow * HOST_S,
            "waiting": len(self.waiting),
            "decode_seqs": len(decodes),
            "decode_context_tokens": context,
            "prefill_tokens": prefill,
            "prefill_pairs": pairs,
            "preempted": 0,
        }

    def send(self, one: Sequence) -> None:
        """The next token of a sequence, which may be its last."""
        one.sent += 1
        one.tokens.put_nowait(one.sent)
        if one.sent == one.outputs:
            self.running.remove(one)


async def complete(request: web.Request) -> web.StreamResponse:
    """A stream of exactly the tokens asked for."""
    body, engine = await request.json(), request.app[ENGINE]
    assert body["ignore_eos"]
    assert body["min_tokens"] == body["max_tokens"]
    sequence = Sequence(len(body["prompt"]), body["max_tokens"])
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await asyncio.sleep(REQUEST_S)
    engine.waiting.append(sequence)
    engine.arrived.set()
    number = 0
    while number < sequence.outputs:
        before, number = number, await sequence.tokens.get()
        if not before:
            await asyncio.sleep(ANSWER_S)
        reason = "length" if number == sequence.outputs else None
        await answer.write(event(choices=[{"index": 0, "text": "x", "finish_reason": reason}]))
    usage = {"prompt_tokens": sequence.prompt, "completion_tokens": number}
    await answer.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")
    return answer


def event(**fields: Any) -> bytes:
    """One event of the stream, as compact as vLLM's."""
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


async def healthy(request: web.Request) -> web.Response:
    """Always."""
    return web.Response()


async def version(request: web.Request) -> web.Response:
    """As vLLM words it."""
    return web.json_response({"version": "0.0.stub"})


async def metrics(request: web.Request) -> web.Response:
    """What vLLM tells of its blocks."""
    return web.Response(text='vllm:cache_config_info{block_size="16",num_gpu_blocks="99"} 1.0\n')


ENGINE = web.AppKey("ENGINE", Engine)


async def serve(port: int) -> None:
    """Until killed."""
    app = web.Application()
    app[ENGINE] = Engine()
    app.router.add_get("/health", healthy)
    app.router.add_get("/version", version)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await app[ENGINE].run()


if __name__ == "__main__":
    asyncio.run(serve(int(word("--port"))))
