"""What a streamed token and a small request cost in the proxy's CPU, beside a plain pass-through.

    python benchmarks/proxy.py

Starts eight stub workers in a process of their own, which send a token to every open stream each
20 ms and answer small requests at once; drives 800 streams, then small requests, through viisim
and through `floor`, the plainest proxy that aiohttp and uvloop make, in turns; and prints JSON:
CPU time of the proxy's process per chunk and per request, latency added to a direct request, the
highest rate of chunks, and memory after a million of them.

A proxy that uses a whole core (`cores_used`) finds several tokens in one read, which flatters
it; therefore chunks are measured at half of the streams as well (`..._half_load`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKEN_S = 0.02
PHASES = 20
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = EVENT.replace(b'"finish_reason":null', b'"finish_reason":"length"') + b"data: [DONE]\n\n"
PLAIN = json.dumps(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "choices": [{"index": 0, "text": " token", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9},
    }
).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SMALL = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(PLAIN)
) + PLAIN

# -- stub workers -----------------------------------------------------------------------------


class Stub(asyncio.Protocol):
    """Answers a request as a vLLM server would, with no thought in between."""

    def __init__(self, phases: list[dict[Stub, int]], numbers: list[int]) -> None:
        self._phases = phases
        self._numbers = numbers
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._data[:end].lower()
        at = head.find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._data) < end + 4 + length:
            return
        body = json.loads(self._data[end + 4 :] or b"{}")
        self._data = b""
        if not body.get("stream"):
            self.transport.write(SMALL)
            return
        self.transport.write(HEAD + chunk(EVENT))
        self._numbers[0] += 1
        phase = self._phases[self._numbers[0] % PHASES]
        phase[self] = body["max_tokens"] - 1

    def connection_lost(self, exc: Exception | None) -> None:
        for phase in self._phases:
            phase.pop(self, None)


async def serve_stubs(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    phases: list[dict[Stub, int]] = [{} for _ in range(PHASES)]
    numbers = [0]
    for port in ports:
        await loop.create_server(lambda: Stub(phases, numbers), "127.0.0.1", port)
    token, last = chunk(EVENT), chunk(LAST) + b"0\r\n\r\n"
    tick, start = 0, loop.time()
    while True:
        tick += 1
        await asyncio.sleep(max(0.0, start + tick * TOKEN_S / PHASES - loop.time()))
        phase = phases[tick % PHASES]
        for stub, left in list(phase.items()):
            if left > 1:
                phase[stub] = left - 1
                stub.transport.write(token)
            else:
                del phase[stub]
                stub.transport.write(last)


# -- proxies ----------------------------------------------------------------------------------


def serve_floor(port: int, workers: list[int]) -> None:
    """The plainest proxy: aiohttp on both sides, workers in turn, nothing looked at."""
    from aiohttp import ClientSession, TCPConnector, web

    turn = iter(range(1 << 62))

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        worker = workers[next(turn) % len(workers)]
        url = f"http://127.0.0.1:{worker}{request.path_qs}"
        async with request.app["session"].post(url, data=body) as upstream:
            if "text/event-stream" not in upstream.headers["Content-Type"]:
                return web.Response(body=await upstream.read(), content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for data in upstream.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    async def session(app: web.Application) -> AsyncIterator[None]:
        app["session"] = ClientSession(connector=TCPConnector(limit=0))
        yield
        await app["session"].close()

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/completions", handle)
    _run(app, port)


def serve_viisim(port: int, workers: list[int], policy: str) -> None:
    from policies.registry import make_policy
    from runtime.app import make_app
    from runtime.http_worker import HttpWorker

    clients = [
        HttpWorker(f"r{index}", "m", f"http://127.0.0.1:{worker}")
        for index, worker in enumerate(workers)
    ]
    _run(make_app(make_policy(policy), clients, scrape_s=None), port)


def _run(app: Any, port: int) -> None:
    import uvloop
    from aiohttp import web

    loop = uvloop.new_event_loop()
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        print=None,
        access_log=None,
        loop=loop,
        handler_cancellation=True,
    )


# -- load -------------------------------------------------------------------------------------


class Reader(asyncio.Protocol):
    """One client connection: counts events, and knows when an answer has ended."""

    def __init__(self) -> None:
        self.events = 0
        self.failed = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, body: dict[str, Any]) -> asyncio.Future[None]:
        self.ended = asyncio.get_running_loop().create_future()
        self._tail = b""
        data = json.dumps(body).encode()
        self.transport.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        self._stream = bool(body.get("stream"))
        return self.ended

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        self._tail = (self._tail + data)[-len(PLAIN) - 400 :]
        done = self._tail.endswith(b"0\r\n\r\n") if self._stream else PLAIN in self._tail
        if done and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.failed = True
        if hasattr(self, "ended") and not self.ended.done():
            self.ended.set_exception(ConnectionError("closed"))


async def connect(port: int) -> Reader:
    loop = asyncio.get_running_loop()
    _, reader = await loop.create_connection(Reader, "127.0.0.1", port)
    return reader


STREAM = {"model": "m", "prompt": "a prompt of eight tokens or so", "stream": True}
REQUEST = {"model": "m", "prompt": "a prompt of eight tokens or so", "max_tokens": 1}


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def stream_chunks(port: int, pid: int, streams: int, tokens: int) -> tuple[float, float, int]:
    """CPU and wall seconds for so many streams at once, and the chunks that came."""
    readers = [await connect(port) for _ in range(streams)]
    before, start = cpu_s(pid), time.perf_counter()
    answers = []
    for index, reader in enumerate(readers):
        answers.append(reader.ask(STREAM | {"max_tokens": tokens}))
        if not index % 20:
            await asyncio.sleep(0.001)
    await asyncio.gather(*answers)
    spent, wall = cpu_s(pid) - before, time.perf_counter() - start
    for reader in readers:
        reader.transport.close()
    return spent, wall, sum(reader.events for reader in readers)


async def small_requests(port: int, pid: int, clients: int, each: int) -> tuple[float, int]:
    """CPU seconds for small requests, by clients that wait for each answer."""
    readers = [await connect(port) for _ in range(clients)]

    async def ask(reader: Reader) -> None:
        for _ in range(each):
            await reader.ask(REQUEST)

    before = cpu_s(pid)
    await asyncio.gather(*map(ask, readers))
    spent = cpu_s(pid) - before
    for reader in readers:
        reader.transport.close()
    return spent, clients * each


async def latencies_us(port: int, number: int) -> list[float]:
    """Of one request after the other."""
    reader = await connect(port)
    times = []
    for _ in range(number):
        start = time.perf_counter()
        await reader.ask(REQUEST)
        times.append(1e6 * (time.perf_counter() - start))
    reader.transport.close()
    return times


# -- putting it together ----------------------------------------------------------------------


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@asynccontextmanager
async def process(*arguments: str, port: int) -> AsyncIterator[int]:
    """This file again, in another role; its process id once it listens."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    child = subprocess.Popen(command, env=environment)  # noqa: ASYNC220 - before anything is measured
    try:
        for _ in range(200):
            try:
                (await connect(port)).transport.close()
                break
            except OSError:
                await asyncio.sleep(0.05)
        yield child.pid
    finally:
        child.kill()
        child.wait()


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    ports = free_ports(options.workers + 2)
    stubs, proxies = ports[:-2], {"viisim": ports[-2], "floor": ports[-1]}
    text = ",".join(map(str, stubs))
    results: dict[str, dict[str, list[float]]] = {name: {} for name in proxies}

    def note(name: str, **values: float) -> None:
        for key, value in values.items():
            results[name].setdefault(key, []).append(value)

    async with (
        process("stubs", text, port=stubs[0]),
        process("viisim", text, str(proxies["viisim"]), port=proxies["viisim"]) as viisim,
        process("floor", text, str(proxies["floor"]), port=proxies["floor"]) as floor,
    ):
        pids = {"viisim": viisim, "floor": floor}
        for name, port in proxies.items():  # warm up
            await stream_chunks(port, pids[name], 50, 20)
            await small_requests(port, pids[name], 8, 50)
        direct = await latencies_us(stubs[0], options.requests // 4)
        for _ in range(options.repeat):
            for name, port in proxies.items():
                for key, streams in (("", options.streams), ("_half_load", options.streams // 2)):
                    spent, wall, chunks = await stream_chunks(
                        port, pids[name], streams, options.tokens
                    )
                    note(name, **{f"cpu_us_per_chunk{key}": 1e6 * spent / chunks})
                    note(name, **{f"cores_used{key}": spent / wall})
                spent, requests = await small_requests(port, pids[name], 32, options.requests // 32)
                note(name, cpu_us_per_request=1e6 * spent / requests)
                added = await latencies_us(port, options.requests // 4)
                p50, p99 = (statistics.quantiles(added, n=100)[q] for q in (49, 98))
                base50, base99 = (statistics.quantiles(direct, n=100)[q] for q in (49, 98))
                note(name, added_p50_us=p50 - base50, added_p99_us=p99 - base99)
        for name, port in proxies.items():
            total = 0
            while total < options.memory_chunks:
                _, _, chunks = await stream_chunks(port, pids[name], options.streams, 250)
                total += chunks
            note(name, rss_mib=rss_mib(pids[name]))
    medians = {
        name: {key: round(statistics.median(values), 2) for key, values in found.items()}
        for name, found in results.items()
    }
    for found in medians.values():
        found["max_chunks_per_s"] = round(1e6 / found["cpu_us_per_chunk"])
    ratio = {
        key: round(medians["viisim"][key] / medians["floor"][key], 3)
        for key in ("cpu_us_per_chunk", "cpu_us_per_chunk_half_load", "cpu_us_per_request")
    }
    return {**medians["viisim"], "floor": medians["floor"], "ratio": ratio}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("stubs", "viisim", "floor"):
        role, ports = sys.argv[1], [int(port) for port in sys.argv[2].split(",")]
        if role == "stubs":
            import uvloop

            uvloop.run(serve_stubs(ports))
        elif role == "viisim":
            serve_viisim(int(sys.argv[3]), ports, "least_loaded")
        else:
            serve_floor(int(sys.argv[3]), ports)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--streams", type=int, default=800)
    parser.add_argument("--tokens", type=int, default=150, help="of each stream")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory-chunks", type=int, default=1_000_000)
    import uvloop

    print(json.dumps(uvloop.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
