"""One simulated worker: the engine model in real time, its prompts, and its metrics.

There is no tokenizer: four bytes of UTF-8 are a token, and a prompt given as token ids is taken
as it is. Equal beginnings of prompts are shared block by block, as in vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from runtime.simulated.engine import RealTimeEngine, Stream
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import StepTime
from viisim.faults import HEAT_EVERY_S, Heat, Throttle
from viisim.power import Cooling, PowerDraw

NO_FAULT = "none"
BYTES_PER_TOKEN = 4

_LABELS = ("model_name", "engine")
_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)


class BadRequest(Exception):  # noqa: N818 - named after the answer it becomes
    """The client's mistake: answered with status 400."""


@dataclass(slots=True)
class Prompt:
    """A prompt as the engine takes it."""

    pieces: tuple[tuple[Hashable, int], ...]
    tokens: int


@dataclass(eq=False)
class SimulatedWorker(Collector):
    """What one server is made of."""

    model: str
    settings: SchedulerSettings
    step_time: Callable[[float], StepTime]
    """Step times at a slowdown factor."""
    speed: float = 1.0
    start_s: float = 0.0
    """Its health is bad for so long after the start, by the wall clock: whoever wants to find it
    in a certain state has time to put it there."""
    engine: RealTimeEngine = field(init=False)
    fault: str = NO_FAULT
    """The kind of the one that lasts."""
    delay_s: float = 0.0
    """A request reaches it so much later, by its own clock."""
    hanging: asyncio.Event = field(init=False)
    """Not set while the server hangs."""
    cut_next: str = ""
    """`cut` or `error`: what befalls the next stream after its first token."""
    clients: set[asyncio.Transport] = field(default_factory=set)
    """Connections with a request that has not been answered."""
    finished: dict[str, int] = field(default_factory=lambda: {"length": 0, "abort": 0})
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def start(self) -> None:
        """On the running loop."""
        self.engine = RealTimeEngine(self.settings, self.step_time(1.0), self.speed)
        self.engine.on_step = self._observe
        self.hanging = asyncio.Event()
        self.hanging.set()
        self._healthy_s = asyncio.get_running_loop().time() + self.start_s
        self._heating: asyncio.TimerHandle | None = None
        self._ttft_s = self._histogram("time_to_first_token_seconds")
        self._itl_s = self._histogram("inter_token_latency_seconds")
        self._e2e_s = self._histogram("e2e_request_latency_seconds")
        self.registry.register(self)

    def _histogram(self, name: str) -> Histogram:
        words = name.replace("_", " ")
        family = Histogram(f"vllm:{name}", words, _LABELS, buckets=_SECONDS, registry=self.registry)
        return family.labels(self.model, "0")

    def _observe(self, stream: Stream, now_ns: int) -> None:
        if stream.last_ns < 0:
            self._ttft_s.observe((now_ns - stream.arrived_ns) / 1e9)
        else:
            self._itl_s.observe((now_ns - stream.last_ns) / 1e9)
        if stream.visible == stream.output_tokens:
            self._e2e_s.observe((now_ns - stream.arrived_ns) / 1e9)

    def collect(self) -> Iterator[Any]:
        """Gauges and counters under vLLM's names, read when they are scraped."""
        running, waiting, usage = self.engine.gauges()
        preemptions, queried, hits = self.engine.counters()
        gauges = {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": usage,
        }
        counters = {
            "num_preemptions": preemptions,
            "prefix_cache_queries": queried,
            "prefix_cache_hits": hits,
            "prompt_tokens": self.engine.prompt_tokens,
            "generation_tokens": self.engine.output_tokens,
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                family = kind(f"vllm:{name}", name.replace("_", " "), labels=_LABELS)
                family.add_metric((self.model, "0"), value)
                yield family
        ended = CounterMetricFamily(
            "vllm:request_success", "requests ended", labels=(*_LABELS, "finished_reason")
        )
        for reason, number in self.finished.items():
            ended.add_metric((self.model, "0", reason), number)
        yield ended
        settings = self.settings
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "cache configuration",
            labels=("block_size", "num_gpu_blocks", "enable_prefix_caching"),
        )
        config.add_metric(
            (str(settings.block_tokens), str(settings.num_kv_blocks), str(settings.prefix_caching)),
            1,
        )
        yield config

    # -- faults --

    @property
    def is_healthy(self) -> bool:
        """Whether it has started, and takes requests."""
        return self.fault != "refuse" and asyncio.get_running_loop().time() >= self._healthy_s

    def befall(self, kind: str, body: Mapping[str, Any]) -> None:
        """Have something go wrong, in place of what did until now; `body` has the fields of
        `viisim.faults.Fault` that the kind needs. What does not last leaves nothing behind."""
        self.recover()
        match kind:
            case "cut" | "error":
                self.cut_next = kind
                return
            case "network_cut":
                for client in list(self.clients):
                    client.abort()
                return
            case "hang":
                self.hanging.clear()
            case "slow":
                self.engine.change_speed(self.step_time(float(body.get("factor", 2.0))))
            case "network_delay":
                self.delay_s = float(body["delay_s"])
            case "thermal":
                heat = body["heat"]
                heat = Heat(Cooling(**heat["cooling"]), PowerDraw(**heat["draw"]))
                self._heat(Throttle(heat, self.engine.now_ns(), *self.engine.spent_ns()))
        self.fault = kind

    def recover(self) -> None:
        """All is well again."""
        self.fault, self.cut_next, self.delay_s = NO_FAULT, "", 0.0
        self.hanging.set()
        if self._heating is not None:
            self._heating.cancel()
        self.engine.change_speed(self.step_time(1.0))

    def _heat(self, throttle: Throttle) -> None:
        before = throttle.factor
        throttle.advance(self.engine.now_ns(), *self.engine.spent_ns())
        if throttle.factor != before:
            self.engine.change_speed(self.step_time(throttle.factor))
        loop = asyncio.get_running_loop()
        self._heating = loop.call_later(HEAT_EVERY_S / self.speed, self._heat, throttle)

    def close(self) -> None:
        """Compute no more."""
        if self._heating is not None:
            self._heating.cancel()
        self.engine.close()

    # -- requests --

    def prompt_of(self, content: str | list[int]) -> Prompt:
        """A prompt of token ids, or of text."""
        ids: Sequence[bytes]
        if isinstance(content, str):
            data = content.encode()
            tokens = max(1, -(-len(data) // BYTES_PER_TOKEN))
            size = self.settings.block_tokens * BYTES_PER_TOKEN
        else:
            data, tokens = struct.pack(f"{len(content)}q", *content), len(content)
            size = self.settings.block_tokens * 8
        whole = tokens // self.settings.block_tokens
        ids = [data[size * block : size * (block + 1)] for block in range(whole)]
        return Prompt(tuple(self._pieces(ids, data[size * whole :], tokens)), tokens)

    def _pieces(
        self, blocks: Sequence[bytes], tail: bytes, tokens: int
    ) -> Iterator[tuple[Hashable, int]]:
        chain = b""
        for block in blocks:
            chain = hashlib.blake2b(chain + block, digest_size=12).digest()
            yield chain, self.settings.block_tokens
        left = tokens - len(blocks) * self.settings.block_tokens
        if left:
            yield (chain, tail), left

    async def tokens(
        self, prompt: Prompt, output_tokens: int, priority: int
    ) -> AsyncIterator[tuple[int, bool]]:
        """The answer's tokens as they come; closing the iterator aborts the request."""
        news: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        stream = Stream(
            f"s{next(self.numbers)}",
            prompt.pieces,
            output_tokens,
            lambda tokens, last: news.put_nowait((tokens, last)),
            priority,
        )
        self.engine.submit(stream)
        last = False
        try:
            while not last:
                tokens, last = await news.get()
                await self.hanging.wait()
                yield tokens, last
        finally:
            self.finished["length" if last else "abort"] += 1
            if not last:
                self.engine.abort(stream)
