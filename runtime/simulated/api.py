"""The HTTP API of a vLLM server, with the engine model behind it.

Clients, the proxy and `vllm bench serve` see what a real server would show: token streams at the
engine model's step times, with queueing, KV limits, prefix cache, preemption and priorities in
the latencies and in `/metrics` under vLLM's names. Only the words are no answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest

from runtime.simulated.worker import (
    BYTES_PER_TOKEN,
    NO_FAULT,
    BadRequest,
    Prompt,
    SimulatedWorker,
)

FAULTS = (
    *("crash", "hang", "refuse", "slow", "thermal", "network_delay", "network_cut"),
    *("cut", "error"),
)
"""Those of experiments (`viisim.faults`), and two that befall one stream."""

WORKER = web.AppKey("WORKER", SimulatedWorker)

_WORD = " tok"
"""One token of an answer."""

# --------------------------------------------------------------------------------------
# The application


def make_app(worker: SimulatedWorker) -> web.Application:
    """The server's application; `worker` starts when it does."""
    app = web.Application(client_max_size=64 * 2**20, middlewares=[_as_vllm_answers])
    app[WORKER] = worker

    async def running(_: web.Application) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()

    app.cleanup_ctx.append(running)
    app.router.add_get("/health", _health)
    app.router.add_get("/ping", _health)
    app.router.add_get("/version", _version)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/responses", _responses)
    app.router.add_post("/v1/embeddings", _embeddings)
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_post("/detokenize", _detokenize)
    app.router.add_get("/fault", _lasting_fault)
    app.router.add_post("/fault", _fault)
    return app


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _as_vllm_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    worker, client = request.app[WORKER], request.transport
    try:
        if request.path == "/fault":
            return await handler(request)
        if client is not None:
            worker.clients.add(client)
        if worker.delay_s:
            await asyncio.sleep(worker.delay_s / worker.speed)
        await worker.hanging.wait()
        if not worker.is_healthy:
            return _error(503, "the server refuses requests", "ServiceUnavailableError")
        return await handler(request)
    except BadRequest as error:
        return _error(400, str(error), "BadRequestError")
    finally:
        if client is not None:
            worker.clients.discard(client)


def _error(status: int, message: str, kind: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status)


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": f"viisim-{metadata.version('viisim')}"})


async def _metrics(request: web.Request) -> web.Response:
    text = generate_latest(request.app[WORKER].registry)
    return web.Response(body=text, content_type="text/plain", charset="utf-8")


async def _models(request: web.Request) -> web.Response:
    worker = request.app[WORKER]
    card = {"id": worker.model, "object": "model", "created": 0, "owned_by": "viisim"}
    card |= {"root": worker.model, "max_model_len": worker.settings.max_model_len}
    return web.json_response({"object": "list", "data": [card]})


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    worker = request.app[WORKER]
    if body.get("model", worker.model) != worker.model:
        raise BadRequest(f"The model `{body['model']}` does not exist.")
    return body


def _whole(body: dict[str, Any], name: str, default: int, least: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadRequest(f"{name} must be a whole number from {least}, got {value!r}.")
    return value


def _output_tokens(worker: SimulatedWorker, body: dict[str, Any], prompt: Prompt, most: int) -> int:
    """How long the answer will be: to its limit, as with `ignore_eos`."""
    room = worker.settings.max_model_len - prompt.tokens
    limit = _whole(body, "max_tokens", _whole(body, "max_completion_tokens", most, 1), 1)
    if room < 1 or (limit > room and ("max_tokens" in body or "max_completion_tokens" in body)):
        raise BadRequest(
            f"This model's maximum context length is {worker.settings.max_model_len} tokens. "
            f"However, you requested {limit} output tokens and your prompt contains "
            f"{prompt.tokens} input tokens."
        )
    return min(limit, room)


# -- endpoints that generate --


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How one endpoint words its answers."""

    kind: str
    chunk_kind: str
    identifier: str
    piece: Callable[[str], dict[str, Any]]
    """A choice's part of a chunk."""
    whole: Callable[[str], dict[str, Any]]
    """A choice's part of a complete answer."""


_COMPLETION = _Dialect(
    "text_completion",
    "text_completion",
    "cmpl",
    lambda text: {"text": text},
    lambda text: {"text": text},
)
_CHAT = _Dialect(
    "chat.completion",
    "chat.completion.chunk",
    "chatcmpl",
    lambda text: {"delta": {"content": text}},
    lambda text: {"message": {"role": "assistant", "content": text}},
)


async def _completions(request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    worker = request.app[WORKER]
    content = body.get("prompt")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], (str, list)):
        content = content[0]
    numbers = isinstance(content, list) and content and all(isinstance(n, int) for n in content)
    if not numbers and not (isinstance(content, str) and content):
        raise BadRequest("prompt must be a text, or a list of token ids.")
    assert isinstance(content, (str, list)), "checked above"
    return await _generate(request, body, worker.prompt_of(content), 16, _COMPLETION)


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message.")
    prompt = request.app[WORKER].prompt_of(_rendered(messages))
    return await _generate(request, body, prompt, 256, _CHAT)


def _rendered(messages: list[Any]) -> str:
    lines = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise BadRequest("each message needs a role and content.")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        lines.append(f"<|{message['role']}|>{content}")
    return "".join(lines)


async def _generate(
    request: web.Request, body: dict[str, Any], prompt: Prompt, most: int, dialect: _Dialect
) -> web.StreamResponse:
    worker = request.app[WORKER]
    output_tokens = _output_tokens(worker, body, prompt, most)
    priority = body.get("priority") or 0
    if not isinstance(priority, int):
        raise BadRequest(f"priority must be a whole number, got {priority!r}.")
    if priority and worker.settings.scheduling_policy != "priority":
        raise BadRequest("priority needs a server started with --scheduling-policy priority.")
    number = request.headers.get("X-Request-Id") or str(next(worker.numbers))
    head = {"id": f"{dialect.identifier}-{number}", "created": int(time.time())}
    head |= {"model": worker.model}
    usage = {
        "prompt_tokens": prompt.tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt.tokens + output_tokens,
    }
    answer = worker.tokens(prompt, output_tokens, priority)
    if body.get("stream"):
        options = body.get("stream_options") or {}
        return await _stream(
            request, answer, head, dialect, usage if options.get("include_usage") else None
        )
    async for _ in answer:
        pass
    choice = {"index": 0, "finish_reason": "length", "logprobs": None}
    choice |= dialect.whole(_WORD * output_tokens)
    whole = head | {"object": dialect.kind, "choices": [choice], "usage": usage}
    return web.json_response(whole)


async def _stream(
    request: web.Request,
    answer: AsyncIterator[tuple[int, bool]],
    head: dict[str, Any],
    dialect: _Dialect,
    usage: dict[str, int] | None,
) -> web.StreamResponse:
    worker = request.app[WORKER]
    head |= {"object": dialect.chunk_kind}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    fault, worker.cut_next = worker.cut_next, ""
    await response.prepare(request)
    async for tokens, last in answer:
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        choice |= dialect.piece(_WORD * tokens) | {"finish_reason": "length" if last else None}
        await response.write(_event(head | {"choices": [choice]}))
        if fault == "cut" and request.transport is not None:
            request.transport.abort()
        elif fault == "error":
            message = {"message": "EngineCore died", "type": "InternalServerError", "code": 500}
            await response.write(_event({"error": message}) + b"data: [DONE]\n\n")
            return response
    if usage is not None:
        await response.write(_event(head | {"choices": [], "usage": usage}))
    await response.write(b"data: [DONE]\n\n")
    return response


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _responses(request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    worker = request.app[WORKER]
    content = body.get("input")
    text = _rendered(content) if isinstance(content, list) else content
    if not isinstance(text, str) or not text:
        raise BadRequest("input must be a text, or a list of messages.")
    prompt = worker.prompt_of(text)
    output_tokens = _output_tokens(
        worker, {"max_tokens": body.get("max_output_tokens", 256)}, prompt, 256
    )
    async for _ in worker.tokens(prompt, output_tokens, 0):
        pass
    part = {"type": "output_text", "text": _WORD * output_tokens, "annotations": []}
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    usage: dict[str, int] = {"input_tokens": prompt.tokens, "output_tokens": output_tokens}
    usage["total_tokens"] = prompt.tokens + output_tokens
    answer: dict[str, Any] = {
        "id": f"resp-{next(worker.numbers)}",
        "object": "response",
        "status": "completed",
    }
    answer |= {"created_at": int(time.time()), "model": worker.model}
    return web.json_response(answer | {"output": [message], "usage": usage})


async def _embeddings(request: web.Request) -> web.StreamResponse:
    """A prompt computed, and a vector of its hash."""
    body = await _body(request)
    worker = request.app[WORKER]
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise BadRequest("input must be a text, or a list of texts.")
    prompts = [worker.prompt_of(text) for text in texts]
    data = []
    for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        async for _ in worker.tokens(prompt, 1, 0):
            pass
        digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
        vector = [byte / 127.5 - 1 for byte in digest]
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(prompt.tokens for prompt in prompts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "model": worker.model, "data": data, "usage": usage}
    return web.json_response(answer)


async def _tokenize(request: web.Request) -> web.Response:
    body = await _body(request)
    text = _rendered(body["messages"]) if "messages" in body else body.get("prompt")
    if not isinstance(text, str):
        raise BadRequest("prompt must be a text.")
    data = text.encode()
    tokens = [
        int.from_bytes(data[start : start + BYTES_PER_TOKEN].ljust(BYTES_PER_TOKEN, b"\0"))
        for start in range(0, len(data), BYTES_PER_TOKEN)
    ]
    most = request.app[WORKER].settings.max_model_len
    return web.json_response({"count": len(tokens), "max_model_len": most, "tokens": tokens})


async def _detokenize(request: web.Request) -> web.Response:
    body = await _body(request)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise BadRequest("tokens must be a list of token ids.")
    data = b"".join((token & 0xFFFFFFFF).to_bytes(BYTES_PER_TOKEN) for token in tokens)
    text = data.replace(b"\0", b"").decode(errors="replace")
    return web.json_response({"prompt": text})


async def _fault(request: web.Request) -> web.Response:
    """`{"kind": ..., "factor": 2}`: have something go wrong, or with kind `none` well again."""
    worker = request.app[WORKER]
    body = json.loads(await request.read())
    kind = body.get("kind")
    if kind not in (*FAULTS, NO_FAULT):
        raise BadRequest(f"unknown fault {kind!r}: one of {', '.join((*FAULTS, NO_FAULT))}.")
    if kind == "crash":
        os._exit(137)
    if kind == NO_FAULT:
        worker.recover()
    else:
        worker.befall(kind, body)
    return web.json_response({"fault": worker.fault})


async def _lasting_fault(request: web.Request) -> web.Response:
    """The kind of the fault that lasts."""
    return web.json_response({"fault": request.app[WORKER].fault})
