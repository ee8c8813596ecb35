"""Connections to one worker: a request out, its answer to whoever listens.

One `Connection` carries one request at a time and is kept for the next. A `Listener` hears of
the answer while it comes, from within the event loop's read: nothing is queued or copied on the
way from the worker's socket to the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from runtime.http1 import ChunkedBody, Head, ProtocolError, parse_head

STALE_S = 1.0
"""A kept connection that breaks this soon after a request had been closed before it. One that
breaks later took the request, and what may have killed the worker is not sent there again."""


class UpstreamError(Exception):
    """The worker cannot be reached, closed the connection, or does not speak HTTP."""


class _StaleError(UpstreamError):
    """The worker had closed a kept connection, as it may when it was idle: not a fault."""


class Listener(Protocol):
    """Hears one answer."""

    def head(self, head: Head) -> None:
        """Status and headers came."""

    def body(self, data: bytes) -> None:
        """More of the body came; of a chunked one whole chunks, without the last."""

    def cut(self) -> None:
        """The connection broke before the end of an answer that had begun."""


AnyListener = TypeVar("AnyListener", bound=Listener)


class Connection(asyncio.Protocol):
    """One connection to a worker."""

    __slots__ = (
        "_chunks",
        "_data",
        "_ended",
        "_head",
        "_heard",
        "_left",
        "_listener",
        "_loop",
        "_may_stay",
        "_paused",
        "_pool",
        "_sent_s",
        "_surplus",
        "_transport",
        "_was_used",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._ended: asyncio.Future[None] | None = None
        self._head: Head | None = None
        self._chunks: ChunkedBody | None = None
        self._left: int | None = None
        self._may_stay = False
        self._surplus = False
        self._data = b""
        self._sent_s = 0.0
        self._heard = False
        self._paused = False
        self._was_used = False

    # -- for whoever asks --

    async def exchange(self, request: bytes, listener: Listener) -> None:
        """Send a request; returns when its whole answer has been heard. Raises UpstreamError.

        When cancelled, the connection is closed: the worker sees its client leave.
        """
        assert self._transport is not None, "connected"
        self._listener, self._head, self._chunks = listener, None, None
        self._left, self._data, self._heard = None, b"", True
        ended = self._ended = self._loop.create_future()
        self._sent_s = self._loop.time()
        self._transport.write(request)
        self._pool.watch(self)
        try:
            await ended
        except BaseException as error:
            self.close()
            if isinstance(error, UpstreamError) and self._head is not None:
                listener.cut()
            raise
        finally:
            self._pool.unwatch(self)
            self._listener = None
        self._keep()

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether a request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def pause(self, listener: Listener) -> None:
        """Read no more of this answer for now: the client is slower than the worker."""
        if self._listener is listener and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self, listener: Listener) -> None:
        """Read on, if the answer still comes."""
        if self._listener is listener:
            self._read_on()

    # -- from the event loop --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._pool.forget(self)
        if self._ended is None or self._ended.done():
            return
        until_close = self._head is not None and self._chunks is None and self._left is None
        if until_close and exc is None:
            self._ended.set_result(None)
        elif self._was_used and self._is_unanswered and self._loop.time() < self._sent_s + STALE_S:
            self._ended.set_exception(_StaleError("the worker closed the connection"))
        else:
            self._fail("the worker closed the connection")

    @property
    def _is_unanswered(self) -> bool:
        return self._head is None and not self._data

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard = True
        try:
            if self._chunks is not None:
                self._receive_chunks(self._chunks, data)
            elif self._head is None:
                self._receive_head(data)
            else:
                self._receive_body(data)
        except ProtocolError as error:
            self._fail(str(error))
            self.close()

    def _receive_head(self, data: bytes) -> None:
        if self._listener is None:
            raise ProtocolError("an answer without a request")
        self._data += data
        parsed = parse_head(self._data)
        if parsed is None:
            return
        head, rest = parsed
        if head.status == 101:
            raise ProtocolError("the worker wants to speak another protocol")
        if head.status < 200:
            self._data = b""
            self._receive_head(rest)
            return
        if head.is_chunked:
            self._chunks = ChunkedBody()
        elif head.status in (204, 304):
            self._left = 0
        else:
            self._left = head.content_length
        self._head, self._data = head, b""
        is_delimited = self._chunks is not None or self._left is not None
        self._may_stay = is_delimited and head.keeps_alive
        self._listener.head(head)
        if self._chunks is not None:
            self._receive_chunks(self._chunks, rest)
        elif rest or self._left == 0:
            self._receive_body(rest)

    def _receive_chunks(self, chunks: ChunkedBody, data: bytes) -> None:
        if self._listener is None:
            raise ProtocolError("an answer without a request")
        data = chunks.feed(data)
        if data:
            self._listener.body(data)
        if chunks.ended:
            self._finish(chunks.surplus)

    def _receive_body(self, data: bytes) -> None:
        listener = self._listener
        if listener is None:
            raise ProtocolError("an answer without a request")
        left = self._left
        if left is None:
            listener.body(data)
            return
        if data:
            listener.body(data[:left])
        self._left = left - len(data)
        if self._left <= 0:
            self._finish(surplus=self._left < 0)

    def _finish(self, surplus: bool) -> None:
        self._surplus = surplus
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(UpstreamError(reason))

    # -- between two requests --

    def _keep(self) -> None:
        """The answer was whole: keep the connection if it can carry another."""
        assert self._transport is not None, "connected"
        unsent = self._transport.get_write_buffer_size()
        if not self.is_open or not self._may_stay or self._surplus or unsent:
            self.close()
            return
        self._was_used = True
        self._read_on()
        self._pool.put_back(self)

    def _read_on(self) -> None:
        if self._paused and self.is_open and self._transport is not None:
            self._transport.resume_reading()
        self._paused = False

    def check_heard(self, silence_s: float) -> None:
        """Give the worker up if nothing came since the last check; it holds its slot no longer."""
        if not self._heard and not self._paused:
            self._fail(f"the worker was silent for {silence_s:g} s")
            self.close()
        self._heard = False


class Pool:
    """The connections to one worker, idle ones kept for the next request.

    A worker that is silent for `silence_s`, and at most twice as long, has failed. One timer
    looks after all connections: one for each request would cost more than what it guards against.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: bool = False,
        connect_timeout_s: float = 5.0,
        silence_s: float = 600.0,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._silence_s = silence_s
        self._idle: dict[Connection, None] = {}
        """In the order in which they became idle."""
        self._busy: dict[Connection, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def idle_connections(self) -> int:
        """Connections kept for the next request."""
        return len(self._idle)

    async def ask(self, request: bytes, listen: Callable[[Connection], AnyListener]) -> AnyListener:
        """Have one request answered; the listener, which `listen` makes for the connection, once
        it has heard all. Raises UpstreamError."""
        connection = self._kept() or await self._connect()
        listener = listen(connection)
        try:
            await connection.exchange(request, listener)
        except _StaleError:
            connection = await self._connect()
            listener = listen(connection)
            await connection.exchange(request, listener)
        return listener

    def _kept(self) -> Connection | None:
        while self._idle:
            # The latest first: the others may be closed by the worker as idle.
            connection, _ = self._idle.popitem()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    self._host,
                    self._port,
                    ssl=self._tls or None,
                )
        except TimeoutError:
            raise UpstreamError("the worker cannot be reached in time") from None
        except OSError as error:
            # Not str(error): it names the address, which is no business of a client.
            raise UpstreamError("the worker cannot be reached") from error
        return connection

    def watch(self, connection: Connection) -> None:
        """The connection waits for an answer."""
        self._busy[connection] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._silence_s, self._look_for_silence)

    def unwatch(self, connection: Connection) -> None:
        """It waits no more."""
        del self._busy[connection]

    def _look_for_silence(self) -> None:
        self._timer = None
        for connection in self._busy:
            connection.check_heard(self._silence_s)
        if self._busy:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._silence_s, self._look_for_silence)

    def put_back(self, connection: Connection) -> None:
        """The connection is free."""
        if self._closed:
            connection.close()
        else:
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Drop the idle connections, and every other once its answer has ended."""
        self._closed = True
        while self._idle:
            self._idle.popitem()[0].close()
