"""A running inference server, as the driver's `Worker`: requests out, answers passed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias
from urllib.parse import urlsplit

from policies.interface import StepCosts
from runtime.adapters import VLLM, Adapter, error_of
from runtime.driver import Job
from runtime.exchange import Exchange
from runtime.http1 import Head, ProtocolError, payload
from runtime.reply import Reply
from runtime.upstream import Connection, Pool, UpstreamError
from runtime.worker import Reading, WorkerError
from viisim.errors import InputError

PROBE_S = 3.0
"""How long a look at health, models or metrics may take."""
MAX_COLLECTED_BYTES = 1 << 26

CardState: TypeAlias = Callable[[], tuple[float | None, float | None]]
"""Watts of a worker's cards together, and degrees Celsius of the hottest; None where unknown."""


class HttpWorker:
    """A server of the adapter's kind at a URL.

    `forwards_priority`: the engine schedules by priority, so it is told what the policy wants. One
    that does not (vLLM's default, fcfs) answers 400 to any priority, and is told none. A worker
    that says nothing for `silence_s` has failed; mind that a request which is not streamed shows
    nothing before its end. `card_state` tells the watts and the temperature of its cards, for the
    gauges. Raises InputError for a URL that is no server's address, and for
    priorities to a kind of server that knows none.
    """

    def __init__(
        self,
        id: str,
        model: str,
        url: str,
        *,
        adapter: Adapter = VLLM,
        card_state: CardState | None = None,
        devices: tuple[str, ...] = (),
        max_num_seqs: int = 0,
        kv_blocks: int = 0,
        block_tokens: int = 16,
        step_costs: StepCosts = StepCosts(),  # noqa: B008 - frozen
        forwards_priority: bool = False,
        silence_s: float = 600.0,
    ) -> None:
        self.id = id
        self.model = model
        self.url = url
        self.adapter = adapter
        self._card_state = card_state
        self.devices = devices
        self.max_num_seqs = max_num_seqs
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.step_costs = step_costs
        if forwards_priority and not adapter.takes_priority:
            raise InputError(
                f"{id}: engine.scheduling_policy: {adapter.title} knows no priorities; write fcfs"
            )
        self._forwards_priority = forwards_priority
        host, port, tls = _address(id, url)
        self._pool = Pool(host, port, tls=tls, silence_s=silence_s)
        self._host = f"host: {urlsplit(url).netloc}\r\n".encode()

    async def answer(self, job: Job) -> int:
        """See `runtime.worker.Worker.answer`."""
        exchange: Exchange = job.client
        body = exchange.body
        if self._forwards_priority:
            body = with_priority(body, job.engine_priority)
        exchange.busy = None
        exchange.at_worker = True
        try:
            reply = await self._pool.ask(
                self._request(exchange.head, body),
                lambda connection: Reply(job, exchange, connection),
            )
            return reply.result()
        except UpstreamError as error:
            raise WorkerError(str(error)) from error
        finally:
            exchange.at_worker = False

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and content of a plain request. Raises WorkerError, at the latest after
        `PROBE_S`."""
        request = b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), self._host)
        try:
            async with asyncio.timeout(PROBE_S):
                collected = await self._pool.ask(request, _Collected)
        except UpstreamError as error:
            raise WorkerError(str(error)) from error
        except TimeoutError:
            raise WorkerError(f"{path} took longer than {PROBE_S:g} s") from None
        return collected.status, collected.content()

    async def forward(self, head: bytes, body: bytes) -> tuple[int, dict[str, str], bytes] | None:
        """The whole answer to a small request; None when there is none."""
        try:
            collected = await self._pool.ask(self._request(head, body), _Collected)
        except UpstreamError:
            return None
        return collected.status, {"Content-Type": collected.content_type}, collected.content()

    async def gauges(self) -> Reading:
        """See `runtime.worker.GaugedWorker`. Of a server that tells none they stay infinitely old:
        0 would be taken for a worker without work."""
        if self.adapter.gauges is None:
            raise WorkerError(f"{self.adapter.title} tells no gauges")
        reading = self.adapter.read(await self._content("/metrics"))
        if self._card_state is None:
            return reading
        power_w, temperature_c = self._card_state()
        return replace(reading, power_w=power_w, temperature_c=temperature_c)

    async def models(self) -> list[str]:
        """The names of what it serves. Raises WorkerError."""
        return self.adapter.models(await self._content(self.adapter.models_path))

    async def is_healthy(self) -> bool:
        """Whether it takes requests: up, and its model loaded."""
        try:
            await self._content(self.adapter.health_path)
        except WorkerError:
            return False
        return True

    async def _content(self, path: str) -> bytes:
        status, content = await self.get(path)
        if status != 200:
            raise WorkerError(f"{path} answered {status}: {error_of(content)[1]}")
        return content

    def close(self) -> None:
        """Drop the idle connections."""
        self._pool.close()

    def _request(self, head: bytes, body: bytes) -> bytes:
        return b"%s%scontent-length: %d\r\n\r\n%s" % (head, self._host, len(body), body)


def _address(id: str, url: str) -> tuple[str, int, bool]:
    """Host, port, and whether to use TLS. Raises InputError."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    try:
        port = parts.port or (443 if tls else 80)
    except ValueError:
        port = 0
    if not parts.hostname or not port or "@" in parts.netloc or parts.path not in ("", "/"):
        raise InputError(
            f"{id}: url: {url!r} is no address of a server; write http://HOST:PORT, without a path"
        )
    return parts.hostname, port, tls


def with_priority(body: bytes, priority: int) -> bytes:
    """The body with vLLM's top-level `priority`, spliced in without parsing it again. It is an
    object that names its model, so it is not empty, and states no priority yet."""
    if not priority:
        return body
    start = body.index(b"{") + 1
    return b'%s"priority":%d,%s' % (body[:start], priority, body[start:])


class _Collected:
    """A whole answer."""

    def __init__(self, _: Connection) -> None:
        self.status = 0
        self.content_type = "application/json"
        self._parts: list[bytes] = []
        self._size = 0
        self._chunked = False

    def head(self, head: Head) -> None:
        self.status = head.status
        self.content_type = (head.get(b"content-type") or b"application/json").decode("latin-1")
        self._chunked = head.is_chunked

    def body(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size > MAX_COLLECTED_BYTES:
            raise ProtocolError("the answer is too long")

    def cut(self) -> None:
        """Whoever asked learns it from the error."""

    def content(self) -> bytes:
        whole = b"".join(self._parts)
        return payload(whole) if self._chunked else whole
