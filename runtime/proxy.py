"""The OpenAI API in front of one driver: requests in, the policy asked, answers passed back."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from aiohttp import web
from aiohttp.http import HttpVersion11

from policies.interface import RequestView, Shed
from runtime.access import Client, Keys, NoAccess
from runtime.driver import Answer, Driver
from runtime.exchange import HOP_BY_HOP, Exchange
from runtime.http_worker import HttpWorker
from runtime.tokens import PREFIX_BLOCK_BYTES, Prompt, TokenEstimate, output_tokens, read_prompt

log = logging.getLogger(__name__)

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings")

_DROPPED = HOP_BY_HOP | frozenset(
    b"host authorization expect accept-encoding content-encoding x-priority".split()
)
"""Headers of a client that no worker gets: hop by hop, our keys, what we set ourselves, and the
coding of a body, which aiohttp has undone."""

STATUS_OF_REASON = {
    "queue_full": (429, "too many requests are waiting"),
    "timeout": (408, "no worker took the request in time"),
    "deadline": (408, "the request's deadline has passed"),
    "closing": (503, "the server is shutting down"),
}
NO_WORKER = "no worker that serves the model is ready"
NO_WORKER_WAIT_S = 30.0
MAX_PRIORITY = 2**31 - 1
LOOK_S = 1.0
"""How often it is looked whether requests wait for workers that are all gone."""

_JSON = json.JSONDecoder(parse_constant=lambda name: _no_number(name))


class ApiError(Exception):
    """Becomes an OpenAI error answer."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(slots=True)
class Limits:
    """What one client may ask of the proxy itself."""

    max_body_bytes: int = 16 * 2**20
    default_output_tokens: int = 1024
    """Taken for a request that states no limit; the worker decides what it really is."""
    body_timeout_s: float = 60.0
    no_worker_wait_s: float | None = None
    """How long a request waits while no worker of its model is ready; None: as long as in the
    queue (`queue_timeout_s`), and `NO_WORKER_WAIT_S` where that has no limit."""


class Proxy:
    """Handlers of the OpenAI endpoints."""

    def __init__(
        self, driver: Driver, workers: dict[str, HttpWorker], keys: Keys, limits: Limits
    ) -> None:
        self._driver = driver
        self._workers = workers
        self._keys = keys
        self._limits = limits
        self._numbers = count(1)
        self._id_prefix = f"viisim-{secrets.token_hex(4)}"
        self._estimate = TokenEstimate()
        self._waits = Waits(self._is_ready, self._no_worker_wait_s)

    # -- endpoints --

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions` and its like: the policy chooses a worker."""
        request_id = self._request_id(request)
        try:
            response = await self._generated(request, request_id)
        except (ApiError, NoAccess) as error:
            response = error_response(error.status, str(error), error.headers)
        response.headers["X-Request-Id"] = request_id  # a stream's head has it already
        return response

    async def _generated(self, request: web.Request, request_id: str) -> web.StreamResponse:
        client = self._keys.client(request.headers)
        with self._keys.admitted(client):
            body = await self._body(request)
            fields = _parsed(body)
            view, prompt = self._view(request, request_id, client, fields)
            if "priority" in fields:
                # The scheduler has it; the engine's is for the policy to say.
                del fields["priority"]
                body = json.dumps(fields).encode()
            head = _worker_head(request, view.id)
            exchange = Exchange(request, request_id, head, body, view.streamed)
            answer = await self._submitted(view, exchange)
        if isinstance(answer, Shed):
            return self._refusal(answer, exchange, view.model)
        if exchange.prompt_tokens:
            self._estimate.observe(prompt, exchange.prompt_tokens)
        return exchange.response()

    async def models(self, request: web.Request) -> web.Response:
        """`/v1/models`: every model that some worker serves."""
        self._keys.client(request.headers)
        names = sorted({worker.model for worker in self._workers.values()})
        cards = [
            {"id": name, "object": "model", "created": 0, "owned_by": "viisim"} for name in names
        ]
        return web.json_response({"object": "list", "data": cards})

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """`/tokenize` and other small requests: to the first worker of the model that answers."""
        client = self._keys.client(request.headers)
        with self._keys.admitted(client):
            body = await self._body(request)
            model = _parsed(body).get("model") if body else None
            workers = [w for w in self._workers.values() if model is None or w.model == model]
            if not workers:
                raise _unknown_model(model)
            head = _worker_head(request, self._request_id(request))
            answer = None
            for worker in workers:
                answer = await worker.forward(head, body) or answer
                if answer is not None and answer[0] < 500:
                    break
        if answer is None:
            raise ApiError(503, "no worker answers", Retry_After="5")
        status, headers, content = answer
        return web.Response(status=status, headers=headers, body=content)

    # -- requests --

    async def _body(self, request: web.Request) -> bytes:
        most = self._limits.max_body_bytes
        if request.version < HttpVersion11 and "Transfer-Encoding" in request.headers:
            # HTTP/1.0 has no chunks: who is in front may see another end (RFC 9112, 6.1).
            raise ApiError(400, "transfer-encoding: not in HTTP/1.0")
        try:
            if (request.content_length or 0) > most:
                raise ApiError(413, f"the body is larger than {most} bytes")
            if request.content.is_eof():
                return await request.read()
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"the body is larger than {most} bytes") from None
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        except web.RequestPayloadError:
            raise ApiError(400, "the body is not what its headers say") from None

    def _view(
        self, request: web.Request, request_id: str, client: Client, fields: dict[str, Any]
    ) -> tuple[RequestView, Prompt]:
        """What the scheduler may know."""
        model = fields.get("model")
        if not isinstance(model, str) or not model:
            raise ApiError(400, "model: required, the name of a model")
        if all(worker.model != model for worker in self._workers.values()):
            raise _unknown_model(model)
        try:
            prompt = read_prompt(request.path, fields)
            default = self._limits.default_output_tokens
            most = output_tokens(request.path, fields, prompt.number, default)
            streamed = _streamed(request, fields)
            priority = client.priority(_priority(request, fields))
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        view = RequestView(
            self._unused(request_id),
            model,
            0.0,
            self._estimate.tokens(prompt),
            most,
            streamed,
            priority,
            client.tenant,
            client.traffic_class,
            None,
            prompt.blocks(),
            PREFIX_BLOCK_BYTES,
        )
        return view, prompt

    def _request_id(self, request: web.Request) -> str:
        """The client's own name for the request, or one of ours."""
        given = request.headers.get("X-Request-Id", "")
        if given and len(given) <= 128 and given.isascii() and given.isprintable():
            return given
        return f"{self._id_prefix}-{next(self._numbers)}"

    def _unused(self, request_id: str) -> str:
        if not self._driver.knows(request_id):
            return request_id
        return f"{request_id}-{self._id_prefix}-{next(self._numbers)}"

    # -- waiting --

    async def _submitted(self, view: RequestView, exchange: Exchange) -> Answer:
        """The driver's answer, or a refusal when no worker becomes ready in time."""
        wait = self._waits.begin(view.model, exchange)
        try:
            return await self._driver.submit(view, exchange)
        except asyncio.CancelledError:
            if not wait.is_in_vain or wait.task.uncancel():
                raise  # the client has left
            raise ApiError(503, NO_WORKER, Retry_After="5") from None
        finally:
            self._waits.end(wait)

    def _is_ready(self, model: str) -> bool:
        return bool(self._driver.core._view.ready(model))

    def _no_worker_wait_s(self) -> float:
        chosen = self._limits.no_worker_wait_s
        if chosen is None:
            chosen = self._driver.core.limits.queue_timeout_s
        return NO_WORKER_WAIT_S if chosen is None else chosen

    # -- refusals --

    def _refusal(self, shed: Shed, exchange: Exchange, model: str) -> web.StreamResponse:
        """How a request that was shed ends for its client."""
        if exchange.stream is not None:
            return exchange.stream  # it had begun: its end has been told in the stream
        if exchange.plain is not None and exchange.plain[0] >= 400:
            return exchange.response()  # what the worker said of the request itself
        if shed.reason == "timeout" and not self._is_ready(model):
            raise ApiError(503, NO_WORKER, Retry_After="5")
        if shed.reason in STATUS_OF_REASON:
            status, message = STATUS_OF_REASON[shed.reason]
            raise ApiError(status, message, Retry_After="2")
        if not shed.reason.startswith("failed: "):
            raise ApiError(429, shed.reason, Retry_After="2")
        message = shed.reason.removeprefix("failed: ")
        if exchange.busy is not None:
            raise ApiError(exchange.busy.status, message, Retry_After=exchange.busy.retry_after)
        raise ApiError(502, message)


@dataclass(eq=False, slots=True)
class Wait:
    """A request in the driver."""

    model: str
    exchange: Exchange
    task: asyncio.Task[Any]
    since_s: float
    is_in_vain: bool = False
    """It was cancelled by us."""


class Waits:
    """Ends the wait of requests whose model has no ready worker.

    The core holds a request until a worker takes it, and cannot know that none will come back.
    `is_ready` says whether a model has a worker that takes requests, `most_s` how long may be
    waited for one.
    """

    def __init__(self, is_ready: Callable[[str], bool], most_s: Callable[[], float]) -> None:
        self._is_ready = is_ready
        self._most_s = most_s
        self._waits: dict[Wait, None] = {}
        self._unready_since_s: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, model: str, exchange: Exchange) -> Wait:
        """The current task is cancelled if it waits in vain, until `end`."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "called by a handler"
        wait = Wait(model, exchange, task, loop.time())
        self._waits[wait] = None
        if self._timer is None:
            self._arm(loop)
        return wait

    def end(self, wait: Wait) -> None:
        """The request has left the driver."""
        del self._waits[wait]

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        every_s = min(LOOK_S, self._most_s() / 4)
        self._timer = loop.call_later(every_s, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if not self._waits:
            self._unready_since_s.clear()
            return
        now_s, most_s = loop.time(), self._most_s()
        for model in {wait.model for wait in self._waits}:
            if self._is_ready(model):
                self._unready_since_s.pop(model, None)
            else:
                self._unready_since_s.setdefault(model, now_s)
        for wait in self._waits:
            since_s = max(wait.since_s, self._unready_since_s.get(wait.model, now_s))
            due = now_s >= since_s + most_s and not wait.is_in_vain
            if due and wait.exchange.is_waiting:
                wait.is_in_vain = True
                wait.task.cancel()
        self._arm(loop)


# --------------------------------------------------------------------------------------
# Reading requests


def _unknown_model(model: Any) -> ApiError:
    return ApiError(404, f"The model `{str(model)[:100]}` does not exist.")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        # Strictly UTF-8: `json.loads` would take others, into which no priority can be spliced.
        fields = _JSON.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    return fields


def _streamed(request: web.Request, fields: dict[str, Any]) -> bool:
    streamed = fields.get("stream")
    if streamed is None:
        return False
    if not isinstance(streamed, bool):
        raise ValueError("stream: true or false")
    if streamed and request.version < HttpVersion11:
        raise ValueError("stream: needs HTTP/1.1")
    return streamed


def _priority(request: web.Request, fields: dict[str, Any]) -> int | None:
    """The priority that the client asks for, smaller first; None for that of its key."""
    name, value = "priority", fields.get("priority")
    if value is None:
        text = request.headers.get("X-Priority")
        if text is None:
            return None
        name, value = "X-Priority", _integer(text)
    if type(value) is not int or abs(value) > MAX_PRIORITY:
        raise ValueError(f"{name}: no whole number between -2^31 and 2^31")
    return value


def _integer(text: str) -> int | None:
    try:
        return int(text[:40])
    except ValueError:
        return None


def _worker_head(request: web.Request, request_id: str) -> bytes:
    """Request line and headers for a worker, up to the host."""
    path = request.raw_path if request.raw_path.startswith("/") else request.path_qs
    line = f"{request.method} {path} HTTP/1.1".encode(errors="surrogateescape")
    headers = [(name.lower(), value) for name, value in request.raw_headers]
    dropped = _DROPPED
    for name, value in headers:
        if name == b"connection":
            dropped = dropped | {option.strip() for option in value.lower().split(b",")}
    lines = [b"%s: %s" % pair for pair in headers if pair[0] not in dropped]
    return b"\r\n".join((line, *lines, b"x-request-id: %s" % request_id.encode(), b""))


# --------------------------------------------------------------------------------------
# Errors

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


def error_body(status: int, message: str) -> bytes:
    """An error as the OpenAI API words it."""
    kind = _TYPES.get(status, "server_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return json.dumps(body).encode()


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """An error as the OpenAI API words it, as an answer."""
    body = error_body(status, message)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as OpenAI error JSON, ours in the log and without a traceback outside."""
    try:
        return await handler(request)
    except (ApiError, NoAccess) as error:
        return error_response(error.status, str(error), error.headers)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        message = f"{request.method} {request.path[:200]}: {error.reason}"
        return error_response(error.status, message, allowed)
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s %s", request.method, request.path)
        return error_response(500, "internal error")
