"""One client's request on its way through the proxy; `runtime.reply` has the answer's way back.

A stream is written to the client's transport as it comes from the worker: the head once, then
every piece with the framing it already has. aiohttp still parses requests, keeps connections
and times them out; it only does not touch the chunks.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from runtime.http1 import Head, chunk

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade content-length server date x-request-id".split()
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), and those that we set ourselves."""


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


def error_event(message: str) -> bytes:
    """A server-sent event in the form of vLLM's errors, and the end of the stream."""
    body = {"error": {"message": message, "type": "InternalServerError", "code": 500}}
    return b"data: " + json.dumps(body).encode() + b"\n\ndata: [DONE]\n\n"
