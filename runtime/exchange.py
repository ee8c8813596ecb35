"""One client's request on its way through the proxy, and the answer on its way back.

A stream is written to the client's transport as it comes from the worker: the head once, then
every piece with the framing it already has. aiohttp still parses requests, keeps connections
and times them out; it only does not touch the chunks.

What counts as an answer. A stream is held until its first event has come whole: an error there,
or any other failure before, can be tried elsewhere. From then on pieces go straight to the
client, and those are kept that say more than a token and that it goes on. `[DONE]` alone is no
success: vLLM sends it after an engine's death as well (FACTS section 6). So the piece with
`[DONE]` is looked at before it is passed on, with the last few that were kept, and where no
choice has a finish_reason the client gets an error event in its place. A stream that ends without
`[DONE]`, or breaks, ends in such an event too.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from runtime.driver import Job, WorkerError, WorkerRefused
from runtime.http1 import Head, ProtocolError, chunk, payload
from runtime.upstream import Connection

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade content-length server date x-request-id".split()
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), and those that we set ourselves."""

BUFFER_BYTES = 256 * 1024
"""What may wait in a client's socket before the worker is asked to pause."""
CLIENT_CHECK_S = 0.02
"""How often a client that reads slowly is looked at."""
CLIENT_STALL_S = 60.0
"""A client that takes nothing for so long has left."""
TAIL_PIECES = 6
"""How much of a stream's end is looked at: the last token, usage and [DONE], each in a piece
of its own, and some room for several choices."""
DONE_BYTES = 24
"""Where the last piece has its [DONE]: at the end, before a few line ends."""
MAX_FIRST_EVENT_BYTES = 1 << 20
MAX_WHOLE_BYTES = 1 << 28
"""Of an answer that is not a stream, which is held until it is whole."""
BROKE_OFF = "the worker's answer broke off"

_GOES_ON = b'"finish_reason":null'
_STOPS = b'"finish_reason":"'
_FINISHED = re.compile(
    rb'"finish_reason"\s*:\s*"(?!error")|"stop_reason"\s*:\s*"|response\.(?:completed|incomplete)"'
)
_USAGE = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_EVENT = re.compile(rb"(?ms)^(?:data:(?!\s*\[DONE\])|event:).*?\n\r?\n")
_ERROR_EVENT = re.compile(
    rb'^event:\s*error|^data:\s*(\{\s*(?:"error"\s*:|"object"\s*:\s*"error").*)', re.MULTILINE
)


class PassedStream(web.StreamResponse):
    """A stream that is written past aiohttp: its head and pieces are on the wire already."""

    def __init__(self, transport: asyncio.Transport, stays_open: bool) -> None:
        super().__init__()
        self._out = transport
        self._stays_open = stays_open

    @property
    def keep_alive(self) -> bool | None:
        """Whether the client's connection serves another request."""
        return self._stays_open

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """The head was written when the first byte came."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """The last chunk; without it the client sees that the stream is cut."""
        self._out.write(b"0\r\n\r\n")


@dataclass(frozen=True, slots=True)
class Busy:
    """The worker was too busy for the request, which is not the request's fault."""

    status: int
    retry_after: str


class Exchange:
    """What the proxy knows of one request and its answer."""

    __slots__ = (
        "at_worker",
        "body",
        "busy",
        "head",
        "plain",
        "prompt_tokens",
        "request",
        "request_id",
        "stream",
        "streams",
        "transport",
    )

    def __init__(
        self, request: web.Request, request_id: str, head: bytes, body: bytes, streams: bool
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.head = head
        """Request line and headers for the worker, up to what only the worker's client knows."""
        self.body = body
        """Without a `priority`: what an engine is told of that is for the policy to say."""
        self.streams = streams
        self.prompt_tokens = 0
        """As the worker counted them, where it says so."""
        self.at_worker = False
        """Whether a worker has the request at the moment."""
        self.busy: Busy | None = None
        """Set when the last worker that was asked was too busy."""
        self.stream: PassedStream | None = None
        """Set when the first byte has been written to the client."""
        self.plain: tuple[int, list[tuple[str, str]], bytes] | None = None
        """Status, headers and content of an answer that is not a stream, whole."""
        transport: Any = request.transport
        self.transport: asyncio.Transport = transport

    def open_stream(self, head: Head, first: bytes) -> None:
        """Write the worker's head and the first piece to the client."""
        stays_open = self.request.keep_alive
        self.stream = PassedStream(self.transport, stays_open)
        lines = [b"HTTP/1.1 200 OK"]
        lines += [b"%s: %s" % pair for pair in _passed_on(head)]
        lines += [b"x-request-id: %s" % self.request_id.encode(), b"transfer-encoding: chunked"]
        lines += [b"connection: %s" % (b"keep-alive" if stays_open else b"close"), b"", first]
        self.transport.write(b"\r\n".join(lines))

    def end_in_error(self, message: str) -> None:
        """A stream that cannot go on ends with an event of its own."""
        self.transport.write(chunk(error_event(message)))

    def take_plain(self, status: int, head: Head, content: bytes) -> None:
        """Keep a whole answer until the core says that it counts."""
        headers = [
            (name.decode(errors="replace"), value.decode(errors="replace"))
            for name, value in _passed_on(head)
        ]
        self.plain = (status, headers, content)

    @property
    def is_waiting(self) -> bool:
        """Whether no worker has it, and none has answered it."""
        return not self.at_worker and self.stream is None and self.plain is None

    def response(self) -> web.StreamResponse:
        """What the handler returns to aiohttp once the request has been answered."""
        if self.stream is not None:
            return self.stream
        assert self.plain is not None, "an answer is a stream or whole"
        status, headers, content = self.plain
        return web.Response(status=status, headers=headers, body=content)


def _passed_on(head: Head) -> list[tuple[bytes, bytes]]:
    """The headers that are for the client."""
    headers = [pair for pair in head.headers if pair[0] not in HOP_BY_HOP]
    connection = head.get(b"connection")
    if connection is None:
        return headers
    named = {name.strip() for name in connection.lower().split(b",")}
    return [pair for pair in headers if pair[0] not in named]


class Reply:
    """The answer of one worker to one job, passed on while it comes."""

    __slots__ = (
        "_broken",
        "_buffered_bytes",
        "_connection",
        "_ending",
        "_events",
        "_exchange",
        "_head",
        "_held",
        "_held_bytes",
        "_is_stream",
        "_job",
        "_loop",
        "_stalled",
        "_tail",
        "_write",
    )

    def __init__(self, job: Job, exchange: Exchange, connection: Connection) -> None:
        self._job = job
        self._exchange = exchange
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._write = exchange.transport.write
        self._buffered_bytes = exchange.transport.get_write_buffer_size
        self._head = Head(0, ())
        self._is_stream = False
        self._held: list[bytes] | None = []
        """What has come while it is not yet decided whether it counts; None once it does."""
        self._held_bytes = 0
        self._tail: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._events = 0
        self._ending: bytes | None = None
        """The last pieces of a stream, once [DONE] has come."""
        self._broken = False
        """The client has been told that the stream is no whole answer."""
        self._stalled = (0, 0.0)
        """What waits for a slow client, and since when it has been so much."""

    # -- from the connection --

    def head(self, head: Head) -> None:
        """See `Listener`."""
        self._head = head
        kind = head.get(b"content-type") or b""
        self._is_stream = (
            self._exchange.streams
            and head.status == 200
            and head.is_chunked
            and kind.startswith(b"text/event-stream")
        )

    def body(self, data: bytes) -> None:
        """See `Listener`."""
        if self._held is not None:
            self._hold(self._held, data)
            return
        events = data.count(b"data: ")
        self._events += events
        # A token like any other is not kept: of 800 streams, that is memory which no cache holds.
        if data.count(_GOES_ON) != events or _STOPS in data:
            self._tail.append(data)
            if b"[DONE]" in data[-DONE_BYTES:]:
                data = self._checked(data)
        self._write(data)
        if self._buffered_bytes() > BUFFER_BYTES:
            self._wait_for_client()

    def cut(self) -> None:
        """See `Listener`: a client that has seen some of the stream is told so."""
        if self._held is None:
            self._break_off()

    def _hold(self, held: list[bytes], data: bytes) -> None:
        held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_WHOLE_BYTES:
            raise ProtocolError("the answer is too long")
        if self._is_stream:
            self._begin(b"".join(held))

    def _begin(self, held: bytes) -> None:
        """Pass the stream on once its first event is there and is no error."""
        content = payload(held)
        if not _EVENT.search(content):
            if len(held) > MAX_FIRST_EVENT_BYTES:
                raise ProtocolError("the first event does not end")
            return
        if b"error" in content and _ERROR_EVENT.search(content):
            return  # judged at the end, when all of it is there
        if not self._job.begin():
            self._connection.close()
            return
        self._held = None
        self._events = held.count(b"data: ")
        self._tail.append(held)
        self._exchange.open_stream(
            self._head, self._checked(held) if b"[DONE]" in held[-DONE_BYTES:] else held
        )

    def _checked(self, piece: bytes) -> bytes:
        """The piece with `[DONE]`, the last of the tail; with an error event instead of it unless
        the stream is a whole answer."""
        self._ending = payload(b"".join(self._tail))
        if _FINISHED.search(self._ending) or _ERROR_EVENT.search(self._ending):
            return piece
        content = payload(piece)
        done = _DONE.search(content)
        if done is None:
            return piece  # a model that writes about [DONE]
        self._broken = True
        before = content[: done.start()]
        return (chunk(before) if before else b"") + chunk(error_event(BROKE_OFF))

    # -- a slow client --

    def _wait_for_client(self) -> None:
        self._connection.pause(self)
        self._stalled = (self._buffered_bytes(), self._loop.time())
        self._loop.call_later(CLIENT_CHECK_S, self._look_at_client)

    def _look_at_client(self) -> None:
        transport, waiting = self._exchange.transport, self._buffered_bytes()
        if transport.is_closing() or waiting <= BUFFER_BYTES // 2:
            self._connection.resume(self)
            return
        before, since_s = self._stalled
        now_s = self._loop.time()
        if waiting != before:
            self._stalled = (waiting, now_s)
        elif now_s > since_s + CLIENT_STALL_S:
            transport.abort()
            return
        self._loop.call_later(CLIENT_CHECK_S, self._look_at_client)

    # -- at the end --

    def result(self) -> int:
        """Tokens of the answer. Raises WorkerError unless it is a whole one."""
        if self._held is None:
            return self._stream_result()
        whole = b"".join(self._held)
        content = payload(whole) if self._head.is_chunked else whole
        if self._is_stream:
            raise self._stream_failure(content)
        if not 200 <= self._head.status < 300:
            raise self._failure(self._head.status, content)
        self._exchange.take_plain(self._head.status, self._head, content)
        return self._usage(content) or 0

    def _stream_result(self) -> int:
        ending = payload(b"".join(self._tail)) if self._ending is None else self._ending
        if self._broken:
            raise WorkerError("the stream ended without a finish_reason")
        if b"error" in ending and _ERROR_EVENT.search(ending):
            raise WorkerError("the stream ended in an error of the worker")
        if not _FINISHED.search(ending):
            self._break_off()
            raise WorkerError("the stream ended without a finish_reason")
        # Without usage, events are the tokens, but for [DONE].
        return self._usage(ending) or max(1, self._events - 1)

    def _break_off(self) -> None:
        if not self._broken:
            self._broken = True
            self._exchange.end_in_error(BROKE_OFF)

    def _stream_failure(self, content: bytes) -> WorkerError:
        """What a stream without a first event that counts says."""
        found = _ERROR_EVENT.search(content)
        if not found:
            return WorkerError("the stream ended before its first event")
        said = found[1] or content
        try:
            body = json.loads(said)
            status = int(body.get("error", body)["code"])
        except (ValueError, TypeError, KeyError, AttributeError):
            status = 500
        return self._failure(status if 400 <= status < 600 else 500, said)

    def _failure(self, status: int, content: bytes) -> WorkerError:
        """The error of an answer that is none."""
        message = f"the worker answered {status}: {_message(content)}"
        if status in (429, 503):
            given = self._head.get(b"retry-after") or b""
            seconds = given.decode() if given.isdigit() and len(given) < 5 else "2"
            self._exchange.busy = Busy(status, seconds)
        elif 400 <= status < 500 and status != 408:
            head = self._head
            if self._is_stream:
                head = Head(status, ((b"content-type", b"application/json"),))
            self._exchange.take_plain(status, head, content)
            return WorkerRefused(message)
        return WorkerError(message)

    def _usage(self, content: bytes) -> int | None:
        """Output tokens as the worker counted them at last; notes those of the prompt."""
        prompt, output = _PROMPT.findall(content), _USAGE.findall(content)
        if prompt:
            self._exchange.prompt_tokens = int(prompt[-1])
        return int(output[-1]) if output else None


def error_event(message: str) -> bytes:
    """A server-sent event in the form of vLLM's errors, and the end of the stream."""
    body = {"error": {"message": message, "type": "InternalServerError", "code": 500}}
    return b"data: " + json.dumps(body).encode() + b"\n\ndata: [DONE]\n\n"


def _message(content: bytes) -> str:
    """What an error answer says, in one line."""
    try:
        body: Any = json.loads(content)
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        text = content[:200].decode(errors="replace")
    return " ".join(text.split())[:200]
