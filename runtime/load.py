"""An open-loop client of any OpenAI endpoint: requests leave when the workload says so.

No request waits for another's answer, except the turns of a closed-loop session. Latencies count
from the instant at which a request was *due*, so a server that slows its client down is not
flattered (no coordinated omission); those from the actual sending are given beside them.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import aiohttp
from numpy.random import default_rng

from viisim.workload.request import Request

VOCABULARY = range(100, 30_000)
"""Token ids that most models have, none of them special."""
SMALL_VOCABULARY = range(10, 100)
"""Token ids that every model has, none of them special in the usual vocabularies."""
_LATE_S = 0.05


@dataclass(slots=True)
class Record:
    """What became of one request; seconds on the client's clock from the start of the run."""

    id: str
    due_s: float
    sent_s: float = -1.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, found in a prefix cache, where the server says so (vLLM with
    --enable-prompt-tokens-details)."""
    output_tokens: int = 0
    priority: int = 0
    tenant: str = ""
    traffic_class: str = ""
    streamed: bool = True
    status: int = 0
    """Of the HTTP answer; 0 without one."""
    error: str = ""
    """Empty for a whole answer."""
    ttft_s: float | None = None
    """From when the request was due; None for an answer that was not streamed."""
    ttft_from_sent_s: float | None = None
    e2e_s: float | None = None
    e2e_from_sent_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    """When each piece of the stream came."""

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


def token_ids(
    prompt: Iterable[tuple[Any, int]],
    vocabulary: range = VOCABULARY,
    salt: str = "",
    known: Mapping[Any, list[int]] | None = None,
) -> list[int]:
    """A prompt as token ids, equal where the workload says that prompts are equal; under another
    salt, no prompt begins like one of these. Segments that are `known`, being answers to earlier
    turns, are taken from there."""
    ids: list[int] = []
    for segment, tokens in prompt:
        if known is not None and len(known.get(segment, ())) >= tokens:
            ids += known[segment][:tokens]
            continue
        # Drawn, not counted up: with a small vocabulary unequal prompts would soon be equal.
        draw = default_rng(crc32(f"{salt}{segment!r}".encode()))
        ids += draw.integers(vocabulary.start, vocabulary.stop, tokens).tolist()
    return ids


class LoadClient:
    """Sends a workload to one server."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        exact_lengths: bool = True,
        speed: float = 1.0,
        vocabulary: range = VOCABULARY,
        salt: str = "",
        as_text: bool = False,
        timeout_s: float = 3600.0,
        on_done: Callable[[Record], None] = lambda record: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`speed` 10 sends ten seconds' worth in one; `exact_lengths` asks the server to ignore
        the end of an answer, so that it has the workload's length (a vLLM option). Prompts are
        made of the token ids in `vocabulary`; a `salt` of its own keeps a run from finding the
        prompts of another in a prefix cache; `as_text` sends characters of those numbers, for
        servers that take no ids. Latencies are read from `clock`, in seconds: by default a
        finer one than that of some event loops."""
        self._url = url.rstrip("/")
        self._key = key
        self._exact = exact_lengths
        self._speed = speed
        self._vocabulary = vocabulary
        self._salt = salt
        self._as_text = as_text
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._clock = clock
        self._records: list[Record] = []
        self._answers: dict[Any, list[int]] = {}
        """Token ids of answers, by segment: later turns of their sessions repeat them."""

    async def send(self, requests: Iterator[Request]) -> list[Record]:
        """Send all of them; returns their records in the order of sending."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=3600)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers
        ) as session:
            self._session = session
            self._start_s = self._clock()
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    await self._until(request.arrived_ns / 1e9 / self._speed)
                    group.create_task(self._session_of(request))
        return self._records

    def _now_s(self) -> float:
        return self._clock() - self._start_s

    async def _until(self, instant_s: float) -> None:
        delay_s = instant_s - self._now_s()
        if delay_s > 0:
            await asyncio.sleep(delay_s)

    async def _session_of(self, request: Request) -> None:
        """One request, and after its answer the next turn of its session, if it has one."""
        following: Request | None = request
        while following is not None:
            record = await self._ask(following)
            if record.error or following.next_turn is None:
                return
            following = following.next_turn(round(self._now_s() * self._speed * 1e9))
            await self._until(following.arrived_ns / 1e9 / self._speed)

    async def _ask(self, request: Request) -> Record:
        view = request.view
        record = Record(
            view.id,
            due_s=request.arrived_ns / 1e9 / self._speed,
            prompt_tokens=view.prompt_tokens,
            priority=view.priority,
            tenant=view.tenant,
            traffic_class=view.traffic_class,
            streamed=view.streamed,
        )
        self._records.append(record)
        prompt = token_ids(request.prompt, self._vocabulary, self._salt, self._answers)
        body: dict[str, Any] = {
            "model": view.model,
            "prompt": "".join(map(chr, prompt)) if self._as_text else prompt,
            "max_tokens": request.output_tokens,
            "stream": view.streamed,
        }
        if self._exact:
            # Greedy: what the sampler draws must not decide how long a step takes.
            body |= {"ignore_eos": True, "min_tokens": request.output_tokens, "temperature": 0.0}
        if view.priority:
            body["priority"] = view.priority
        if view.streamed:
            body["stream_options"] = {"include_usage": True}
        returned = None
        if request.next_turn is not None and request.output_segment is not None:
            # vLLM's; what another server makes of it, a session's prefix is shared up to its
            # last answer only.
            body["return_token_ids"] = True
            returned = self._answers[request.output_segment] = []
        try:
            await self._exchange(json.dumps(body).encode(), record, returned)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            record.error = str(error) or type(error).__name__
        self._on_done(record)
        return record

    async def _exchange(self, body: bytes, record: Record, returned: list[int] | None) -> None:
        """Send, and read the answer into the record, its token ids into `returned`."""
        headers = {"Content-Type": "application/json", "X-Request-Id": record.id}
        record.sent_s = self._now_s()
        async with self._session.post(
            f"{self._url}/v1/completions", data=body, headers=headers
        ) as answer:
            record.status = answer.status
            if answer.status != 200:
                record.error = (await answer.text())[:300]
                return
            if record.streamed:
                await self._read_stream(answer, record, returned)
            else:
                content = await answer.json()
                if returned is not None:
                    returned += content["choices"][0].get("token_ids") or ()
                usage = content.get("usage") or {}
                record.output_tokens = usage.get("completion_tokens", 0)
                details = usage.get("prompt_tokens_details") or {}
                record.cached_tokens = details.get("cached_tokens", 0)
        end_s = self._now_s()
        record.e2e_s = end_s - record.due_s
        record.e2e_from_sent_s = end_s - record.sent_s

    async def _read_stream(
        self, answer: aiohttp.ClientResponse, record: Record, returned: list[int] | None
    ) -> None:
        tail, whole = b"", bytearray()
        async for data in answer.content.iter_any():
            now_s = self._now_s()
            pieces = data.count(b'"text"') + data.count(b'"delta"')
            # Not before a token comes: routers send comments to keep a connection alive.
            if pieces and record.ttft_s is None:
                record.ttft_s = now_s - record.due_s
                record.ttft_from_sent_s = now_s - record.sent_s
            record.token_s += [now_s] * pieces
            tail = (tail + data)[-2048:]
            if returned is not None:
                whole += data
        if returned is not None:
            found = re.findall(rb'"token_ids": ?\[([0-9, ]+)\]', whole)
            returned += [int(number) for ids in found for number in ids.split(b",")]
        answered = _number(tail, b"completion_tokens")
        record.output_tokens = len(record.token_s) if answered is None else answered
        record.cached_tokens = _number(tail, b"cached_tokens") or 0
        if b'"error"' in tail:
            record.error = tail[-300:].decode(errors="replace")
        elif b'"finish_reason":"' not in tail.replace(b": ", b":"):
            record.error = "the stream ended without a finish_reason"


def _number(text: bytes, key: bytes) -> int | None:
    """The last value of a key in JSON text that may be cut off in front."""
    found = re.findall(rb'"%s": ?(\d+)' % key, text)
    return int(found[-1]) if found else None


def late_share(records: list[Record]) -> float:
    """Share of the requests that left more than 50 ms after they were due: whether the client
    kept its schedule."""
    sent = [record for record in records if record.sent_s >= 0]
    return sum(r.sent_s - r.due_s > _LATE_S for r in sent) / len(sent) if sent else 0.0


def inter_token_s(record: Record) -> list[float]:
    """The gaps between the pieces of a stream."""
    return [b - a for a, b in zip(record.token_s, record.token_s[1:], strict=False)]
