"""The OpenAI API in front of one driver: requests in, the policy asked, answers passed back."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from aiohttp import web
from aiohttp.http import HttpVersion11

from policies.interface import RequestView, Shed
from runtime.access import Client, Keys, NoAccess
from runtime.driver import Answer, Driver
from runtime.errors import ApiError, error_response
from runtime.exchange import HOP_BY_HOP, Exchange
from runtime.http_worker import HttpWorker
from runtime.tokens import Prompt, TokenCount, TokenEstimate, output_tokens, read_prompt
from runtime.waits import Waits

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

_JSON = json.JSONDecoder(parse_constant=lambda name: _no_number(name))


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
        self,
        driver: Driver,
        workers: Mapping[str, HttpWorker],
        keys: Keys,
        limits: Limits,
        token_count: TokenCount | None = None,
    ) -> None:
        self._driver = driver
        self._workers = workers
        self._keys = keys
        self._limits = limits
        self._numbers = count(1)
        self._id_prefix = f"viisim-{secrets.token_hex(4)}"
        self._token_count = token_count or TokenEstimate()
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
            self._token_count.observe(prompt, exchange.prompt_tokens)
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
        tokens = self._token_count.tokens(prompt)
        view = RequestView(
            self._unused(request_id),
            model,
            0.0,
            tokens,
            most,
            streamed,
            priority,
            client.tenant,
            client.traffic_class,
            None,
            prompt.blocks(),
            prompt.block_tokens(tokens),
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
        return bool(self._driver.core.view.ready(model))

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
