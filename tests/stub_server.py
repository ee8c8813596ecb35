"""A vLLM server as far as sockets go: scripted answers, byte by byte if need be, errors and cuts.

Also the proxy in front of such servers, on a free port, and a client that sends raw bytes.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from policies.core import SchedulerCore
from policies.interface import Action, Event, Policy
from policies.interface import Limits as CoreLimits
from policies.least_loaded import LeastLoaded
from runtime.access import Client, Keys
from runtime.driver import Driver
from runtime.errors import openai_errors
from runtime.http1 import chunk, payload
from runtime.http_worker import HttpWorker
from runtime.proxy import GENERATING, Limits, Proxy
from runtime.serve import listening

LIMIT_S = 20.0
"""A test that hangs fails after this long."""

# -- what a server says --


def sse(**fields: Any) -> bytes:
    """One event of a completion stream, as compact as vLLM's."""
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def token(text: str = " a", finish_reason: str | None = None) -> bytes:
    """An event with one token."""
    return sse(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


LAST = token(finish_reason="length")
DONE = b"data: [DONE]\n\n"
USAGE = sse(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DEATH = sse(error={"message": "EngineCore died", "type": "InternalServerError", "code": 500})
END = b"0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
WHOLE = {
    "choices": [{"index": 0, "text": " a", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
}


def stream_of(*events: bytes) -> bytes:
    """A whole answer of so many events, each in a chunk."""
    return STREAM_HEAD + b"".join(map(chunk, events)) + END


def plain(status: int, body: Any, *headers: str) -> bytes:
    """A whole answer that is no stream."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Whatever", "content-type: application/json", *headers]
    lines += [f"content-length: {len(data)}", "", ""]
    return "\r\n".join(lines).encode() + data


def refusal(status: int, message: str, *headers: str) -> bytes:
    """An error as vLLM words it."""
    return plain(status, {"error": {"message": message, "code": status}}, *headers)


# -- a server --


@dataclass
class Received:
    """One request as it came."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        """Of the headers of that name."""
        return [value for key, value in self.headers if key == name]

    def fields(self) -> dict[str, Any]:
        """The body as JSON."""
        fields: dict[str, Any] = json.loads(self.body)
        return fields


class Wire(asyncio.Protocol):
    """One connection of the server."""

    def __init__(self, server: StubServer) -> None:
        self._server = server
        self._data = b""
        self._task: asyncio.Task[None] | None = None
        self._received: Received | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def send(self, data: bytes, each: int | None = None) -> None:
        """Write, in pieces of `each` bytes if that is given; waits while the client reads not."""
        for start in range(0, len(data), each or max(1, len(data))):
            piece = data[start : start + each] if each else data
            self.transport.write(piece)
            self._server.sent_bytes += len(piece)
            await asyncio.sleep(0)
            await self._writable.wait()

    def cut(self) -> None:
        """Break the connection off."""
        self.transport.abort()

    def close(self) -> None:
        """End the connection in order."""
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        self.transport = transport
        transport.set_write_buffer_limits(high=16 * 1024)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self._server.wires.append(self)
        self._server.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._server.wires.remove(self)
        self._writable.set()
        if self._task is not None and not self._task.done() and self._received is not None:
            self._task.cancel()
            self._server.aborted.put_nowait(self._received)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = [
            (name.lower(), value.strip()) for name, _, value in (h.partition(":") for h in lines)
        ]
        length = next((int(value) for name, value in headers if name == "content-length"), 0)
        if len(rest) < length:
            return
        self._data = rest[length:]
        received = self._received = Received(line, headers, rest[:length])
        self._server.requests.append(received)
        self._server.taken.put_nowait(received)
        self._task = asyncio.get_running_loop().create_task(self._server.answer(received, self))


Script = Callable[[Received, Wire], Awaitable[None]]


def says(*pieces: bytes, each: int | None = None, apart_s: float = 0, then: str = "") -> Script:
    """Send the pieces, some time apart; `then` `cut` or `close` the connection, or `hang`."""

    async def script(received: Received, wire: Wire) -> None:
        for piece in pieces:
            await wire.send(piece, each)
            await asyncio.sleep(apart_s)
        if then == "hang":
            await asyncio.Event().wait()
        elif then:
            getattr(wire, then)()

    return script


@dataclass
class StubServer:
    """Answers each request by the next script; the last one stays."""

    scripts: Sequence[Script] = ()
    requests: list[Received] = field(default_factory=list)
    taken: asyncio.Queue[Received] = field(default_factory=asyncio.Queue)
    aborted: asyncio.Queue[Received] = field(default_factory=asyncio.Queue)
    """Requests whose client left before the script had ended."""
    wires: list[Wire] = field(default_factory=list)
    connections: int = 0
    sent_bytes: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, received: Received, wire: Wire) -> None:
        """Perform the script for a request."""
        number = len(self.requests) - 1
        await self.scripts[min(number, len(self.scripts) - 1)](received, wire)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[StubServer]:
        """While inside; the port is a free one, unless it has been given."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Wire(self), "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for wire in list(self.wires):
                wire.cut()


# -- the proxy --


class Recorder:
    """A journal in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one handled event."""
        self.events.append(event)


@dataclass
class Served:
    """A proxy, and what it consists of."""

    port: int
    core: SchedulerCore
    driver: Driver
    keys: Keys
    events: list[Event]

    def of(self, kind: type) -> list[Any]:
        """The core's events of one kind."""
        return [event for event in self.events if type(event) is kind]

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits and nothing is counted as in flight."""
        driver, core = self.driver, self.core
        counts = (core.inflight_requests, core.queued_requests, self.keys.inside)
        return counts == (0, 0, 0) and not driver._calls and not driver._attempts

    async def emptied(self) -> None:
        """Wait until it is."""
        while not self.is_empty:  # noqa: ASYNC110 - what ends it is in many places
            await asyncio.sleep(0.001)


@asynccontextmanager
async def proxy(
    *stubs: StubServer | str,
    policy: Policy | None = None,
    core_limits: CoreLimits | None = None,
    limits: Limits | None = None,
    clients: Sequence[Client] = (),
    head_timeout_s: float = 10.0,
    max_connections: int = 4096,
    **of_workers: Any,
) -> AsyncIterator[Served]:
    """The proxy in front of the servers, which are `r0`, `r1` and so on, all with model `m`."""
    urls = [stub if isinstance(stub, str) else stub.url for stub in stubs]
    workers = [HttpWorker(f"r{n}", "m", url, **of_workers) for n, url in enumerate(urls)]
    core = SchedulerCore(policy or LeastLoaded(), 0, core_limits)
    recorder = Recorder()
    driver = Driver(core, workers, journal=recorder)
    keys = Keys(clients)
    limits = limits or Limits()
    handlers = Proxy(driver, {worker.id: worker for worker in workers}, keys, limits)
    app = web.Application(client_max_size=limits.max_body_bytes, middlewares=[openai_errors])
    for path in GENERATING:
        app.router.add_post(path, handlers.generate)
    app.router.add_post("/tokenize", handlers.pass_on)
    app.router.add_get("/v1/models", handlers.models)
    async with (
        driver,
        listening(
            app,
            "127.0.0.1",
            0,
            head_timeout_s=head_timeout_s,
            max_connections=max_connections,
            drain_s=0.0,
        ) as port,
    ):
        yield Served(port, core, driver, keys, recorder.events)
    for worker in workers:
        worker.close()


# -- a client --


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    raw: bytes
    """The body with its framing."""

    @property
    def body(self) -> bytes:
        """The body without it."""
        chunked = self.headers.get("transfer-encoding") == "chunked"
        return payload(self.raw.removesuffix(END)) if chunked else self.raw

    @property
    def error(self) -> dict[str, Any]:
        """The error of an OpenAI error answer."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


def post(body: Any, path: str = "/v1/completions", headers: Sequence[str] = ()) -> bytes:
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: proxy", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


class Browser:
    """A client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> Answer:
        """Send bytes and read an answer. Raises IncompleteReadError when there is none."""
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> Answer:
        """Read an answer."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, await self.reader.readuntil(END))
        length = int(headers.get("content-length", 0))
        return Answer(status, headers, await self.reader.readexactly(length))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of an answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.strip().split("\r\n")
        pairs = (text.partition(":") for text in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return int(line.split()[1]), headers

    def leave(self) -> None:
        """Hang up."""
        self.writer.transport.abort()


@asynccontextmanager
async def browser(port: int, buffer_bytes: int | None = None) -> AsyncIterator[Browser]:
    """A connection to the proxy; with a small receive buffer if that is given."""
    sock = socket.socket()
    if buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=buffer_bytes or 1 << 20)
    try:
        yield Browser(reader, writer)
    finally:
        writer.transport.abort()


async def ask(port: int, request: bytes) -> Answer:
    """One request on a connection of its own."""
    async with browser(port) as client:
        return await client.ask(request)


def asking(stream: bool = True, **fields: Any) -> dict[str, Any]:
    """A body for `/v1/completions`."""
    return {"model": "m", "prompt": "once upon a time", "max_tokens": 4, "stream": stream, **fields}


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
"""What a proxy may run on; the last one is what `viisim deploy` takes."""
with suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


def run(
    scenario: Callable[[], Awaitable[None]],
    loop: str = "",
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run a scenario on a loop of its own, by default of the kind that a deployment runs on."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    with asyncio.Runner(loop_factory=loop_factory or LOOPS[loop or list(LOOPS)[-1]]) as runner:
        runner.run(limited())
