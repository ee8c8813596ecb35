"""Serving until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from runtime.errors import error_body, error_response
from viisim.errors import InputError

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75.0
"""How long a client's idle connection is kept."""
DRAIN_S = 60.0
"""How long running requests may take to end once the server is told to stop."""


class GuardedHandler(RequestHandler):
    """aiohttp's handler of one connection, which gives a client so long for a request's head."""

    __slots__ = ("_guard", "_head_timeout_s", "_on_close")

    def __init__(
        self,
        server: Any,
        loop: asyncio.AbstractEventLoop,
        head_timeout_s: float,
        on_close: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(server, loop=loop, **options)
        self._head_timeout_s = head_timeout_s
        self._on_close = on_close
        self._guard: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._guard = self._loop.call_later(self._head_timeout_s, self._cut)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self.head_came()
        self._on_close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._guard is None and self._current_request is None:
            self._guard = self._loop.call_later(self._head_timeout_s, self._cut)
        super().data_received(data)

    def head_came(self) -> None:
        """A request has begun: its body has the limits of the application."""
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What a client gets for a request that never reached the application: ambiguous framing,
        a bare line feed, a head that is too long. Neither the answer nor the log quotes it, for
        there may be a key in it."""
        if isinstance(exc, LineTooLong):
            status = 431
        log.info("refused a request from %s: %s", request.remote, type(exc).__name__)
        text = "the head is too long" if status == 431 else "the request is not valid HTTP/1.1"
        response = error_response(status, "internal error" if status == 500 else text)
        response.force_close()
        return response

    def _cut(self) -> None:
        self._guard = None
        if self._current_request is None and self.transport is not None:
            self.transport.abort()


@web.middleware
async def _note_head(request: web.Request, handler: Any) -> web.StreamResponse:
    guarded: Any = request.protocol
    if isinstance(guarded, GuardedHandler):
        guarded.head_came()
    response: web.StreamResponse = await handler(request)
    return response


@contextlib.asynccontextmanager
async def listening(
    app: web.Application,
    host: str,
    port: int,
    *,
    head_timeout_s: float = 10.0,
    max_connections: int = 4096,
    drain_s: float = DRAIN_S,
) -> AsyncIterator[int]:
    """Serve while inside; gives the port, which for `port` 0 is a free one. At the end no
    connection is taken any more, and running requests have `drain_s` to end.

    Raises InputError when the address cannot be used.
    """
    app.middlewares.insert(0, _note_head)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=drain_s,
    )
    await runner.setup()
    loop = asyncio.get_running_loop()
    server: Any = runner.server
    room = max_connections

    def closed() -> None:
        nonlocal room
        room += 1

    def connection() -> asyncio.Protocol:
        nonlocal room
        room -= 1
        if room < 0:
            return _Refusal(closed)
        return GuardedHandler(server, loop, head_timeout_s, closed, **server._kwargs)

    try:
        try:
            listener = await loop.create_server(connection, host, port, backlog=1024)
        except OSError as error:
            raise InputError(
                f"{host}:{port}: cannot listen there ({error.strerror}); give another with "
                "deploy.listen"
            ) from error
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()
    finally:
        await runner.cleanup()


async def serve(
    app: web.Application,
    host: str,
    port: int,
    *,
    head_timeout_s: float = 10.0,
    max_connections: int = 4096,
) -> None:
    """Serve until SIGINT or SIGTERM. Raises InputError when the address cannot be used."""
    with stop_signals() as stop:
        async with listening(
            app, host, port, head_timeout_s=head_timeout_s, max_connections=max_connections
        ):
            await stop.wait()


class _Refusal(asyncio.Protocol):
    """One connection too many."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        out = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        body = error_body(503, "too many connections")
        out.write(
            b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nretry-after: 2\r\nconnection: close\r\n\r\n%s"
            % (len(body), body)
        )
        out.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._on_close()


@contextlib.contextmanager
def stop_signals(
    on_reload: Callable[[], None] | None = None,
) -> Iterator[asyncio.Event]:
    """While inside, SIGINT and SIGTERM set the event, and SIGHUP calls `on_reload`."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    handlers: dict[int, Callable[[], object]] = {
        signal.SIGINT: stop.set,
        signal.SIGTERM: stop.set,
    }
    if on_reload is not None:
        handlers[signal.SIGHUP] = on_reload
    with contextlib.suppress(NotImplementedError):  # on Windows loops take no signals
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
    yield stop


def run(main: Any) -> None:
    """Run a coroutine on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
