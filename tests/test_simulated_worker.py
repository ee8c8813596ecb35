"""The simulated worker behind vLLM's HTTP API, in this process and a thousand times as fast."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientError
from aiohttp.test_utils import TestClient, TestServer

from runtime.simulated.api import make_app
from runtime.simulated.worker import SimulatedWorker
from tests.idle_clock import IdleClockLoop
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime

LIMIT_S = 60.0
HTTP = TestClient[Any, Any]


def step_time(slowdown: float) -> StepTime:
    """Ten milliseconds a step, or more."""
    return StepTime([DecodePoint(1, 0.01 * slowdown, 0.0)], 8, 0.01 * slowdown, 5e-5)


def asked(
    question: Callable[[HTTP], Awaitable[None]],
    start_s: float = 0.0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **settings: Any,
) -> None:
    """Ask a worker of a small engine."""
    engine = SchedulerSettings(**{"num_kv_blocks": 300, "max_num_seqs": 8, **settings})

    async def scenario() -> None:
        app = make_app(SimulatedWorker("m", engine, step_time, 1000.0, start_s))
        async with asyncio.timeout(LIMIT_S), TestClient(TestServer(app)) as client:
            await question(client)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


async def completion(client: HTTP, **body: Any) -> Any:
    """The answer to a plain request."""
    async with client.post("/v1/completions", json={"prompt": "hello", **body}) as response:
        return await response.json()


async def events(client: HTTP, path: str = "/v1/completions", **body: Any) -> list[Any]:
    """The events of a streamed answer; `[DONE]` as it is."""
    async with client.post(path, json={"prompt": "hello", "stream": True, **body}) as response:
        lines = (await response.text()).split("\n\n")
    texts = [line.removeprefix("data: ") for line in lines if line]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


async def metric(client: HTTP, name: str) -> float:
    """One of vLLM's metrics."""
    async with client.get("/metrics") as response:
        text = await response.text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))
    return float(line.rpartition(" ")[2])


class TestAnswers:
    def test_a_plain_answer_has_the_asked_length_and_says_so(self):
        async def question(client: HTTP) -> None:
            answer = await completion(client, max_tokens=7)
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"] == {
                "prompt_tokens": 2,
                "completion_tokens": 7,
                "total_tokens": 9,
            }

        asked(question)

    def test_a_stream_has_a_piece_a_token_then_usage_then_done(self):
        async def question(client: HTTP) -> None:
            *pieces, usage, done = await events(
                client, max_tokens=5, stream_options={"include_usage": True}
            )
            assert [p["choices"][0]["finish_reason"] for p in pieces] == [*[None] * 4, "length"]
            assert (usage["usage"]["completion_tokens"], done) == (5, "[DONE]")

        asked(question)

    def test_a_prompt_that_is_too_long_is_refused_as_vllm_does(self):
        async def question(client: HTTP) -> None:
            async with client.post("/v1/completions", json={"prompt": [7] * 5000}) as response:
                assert response.status == 400
                assert "maximum context length" in (await response.json())["error"]["message"]

        asked(question, max_model_len=1024)

    def test_a_repeated_prompt_is_found_in_the_prefix_cache(self):
        async def question(client: HTTP) -> None:
            for _ in range(2):
                await completion(client, prompt=list(range(100)), max_tokens=1)
            assert await metric(client, "prefix_cache_hits_total") == 96

        asked(question)

    def test_a_client_that_leaves_frees_its_blocks(self):
        async def question(client: HTTP) -> None:
            body = {"prompt": "hello", "stream": True, "max_tokens": 2000}
            response = await client.post("/v1/completions", json=body)
            await response.content.readuntil(b"\n\n")
            response.close()
            while await metric(client, "num_requests_running"):
                pass
            assert await metric(client, "kv_cache_usage_perc") == 0

        asked(question)


class TestFaults:
    def test_a_refusing_worker_answers_503_until_it_is_well_again(self):
        async def question(client: HTTP) -> None:
            statuses = []
            for kind in ("refuse", "none"):
                await client.post("/fault", json={"kind": kind})
                statuses.append((await client.get("/health")).status)
            assert statuses == [503, 200]

        asked(question)

    def test_a_cut_stream_ends_in_the_middle(self):
        async def question(client: HTTP) -> None:
            await client.post("/fault", json={"kind": "cut"})
            with pytest.raises(ClientError):
                await events(client, max_tokens=50)

        asked(question)

    def test_an_error_comes_as_an_event_before_done(self):
        async def question(client: HTTP) -> None:
            await client.post("/fault", json={"kind": "error"})
            *_, error, done = await events(client, max_tokens=50)
            assert (error["error"]["code"], done) == (500, "[DONE]")

        asked(question)

    def test_a_hanging_worker_answers_when_it_is_well_again(self):
        async def question(client: HTTP) -> None:
            await client.post("/fault", json={"kind": "hang"})
            waiting = asyncio.create_task(completion(client, max_tokens=3))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.get("/health")
            await client.post("/fault", json={"kind": "none"})
            assert (await waiting)["usage"]["completion_tokens"] == 3

        asked(question)

    def test_a_slow_worker_takes_longer_by_its_own_clock(self):
        async def question(client: HTTP) -> None:
            took_s = []
            for factor in (1.0, 100.0):
                await client.post("/fault", json={"kind": "slow", "factor": factor})
                before_s = await metric(client, "e2e_request_latency_seconds_sum")
                await completion(client, max_tokens=10)
                took_s.append(await metric(client, "e2e_request_latency_seconds_sum") - before_s)
            assert took_s[1] > 10 * took_s[0]

        asked(question)

    def test_a_cut_network_ends_every_request_and_the_worker_goes_on(self):
        async def question(client: HTTP) -> None:
            await client.post("/fault", json={"kind": "slow", "factor": 1000.0})
            asking = [asyncio.create_task(completion(client, max_tokens=4000)) for _ in range(2)]
            while await metric(client, "num_requests_running") < 2:
                pass
            await client.post("/fault", json={"kind": "network_cut"})
            ended = await asyncio.gather(*asking, return_exceptions=True)
            assert [isinstance(error, ClientError) for error in ended] == [True, True]
            assert (await completion(client, max_tokens=3))["usage"]["completion_tokens"] == 3

        asked(question, num_kv_blocks=600, max_model_len=8192)

    def test_a_distant_worker_gets_its_requests_later_by_its_own_clock(self):
        async def question(client: HTTP) -> None:
            loop = asyncio.get_running_loop()
            await client.post("/fault", json={"kind": "network_delay", "delay_s": 200.0})
            before_s = loop.time()
            await completion(client, max_tokens=1)
            assert loop.time() - before_s > 200.0 / 1000

        asked(question)

    def test_a_hot_worker_slows_down_under_load_and_recovers(self):
        draw = {"idle_w": 20.0, "decode_w": 250.0, "prefill_w": 250.0}
        heat = {"cooling": {"time_constant_s": 1.0}, "draw": draw}

        async def question(client: HTTP) -> None:
            took_s = []
            for kind in ("none", "thermal", "none"):
                await client.post("/fault", json={"kind": kind, "heat": heat})
                before_s = await metric(client, "e2e_request_latency_seconds_sum")
                await completion(client, max_tokens=600)
                took_s.append(await metric(client, "e2e_request_latency_seconds_sum") - before_s)
            assert took_s[1] > 1.3 * took_s[0]
            assert took_s[2] < 1.1 * took_s[0]

        # By a clock that stands still while there is work: no card cools while the loop is late.
        asked(question, loop_factory=IdleClockLoop, num_kv_blocks=2000, max_model_len=8192)

    def test_a_lasting_fault_can_be_read_and_one_that_is_over_cannot(self):
        async def question(client: HTTP) -> None:
            seen = []
            for kind in ("hang", "network_cut", "refuse", "none"):
                await client.post("/fault", json={"kind": kind})
                seen.append((await (await client.get("/fault")).json())["fault"])
            assert seen == ["hang", "none", "refuse", "none"]

        asked(question)

    def test_a_worker_that_starts_is_not_healthy_yet(self):
        async def question(client: HTTP) -> None:
            assert (await client.get("/health")).status == 503
            assert (await client.get("/fault")).status == 200

        asked(question, start_s=LIMIT_S)

    def test_an_unknown_fault_is_refused_with_those_there_are(self):
        async def question(client: HTTP) -> None:
            async with client.post("/fault", json={"kind": "fire"}) as response:
                assert "one of crash, hang" in (await response.json())["error"]["message"]

        asked(question)


class TestMetrics:
    def test_the_gauges_are_those_that_the_proxy_reads(self):
        from runtime.metrics_text import read_gauges
        from runtime.worker import Reading

        async def question(client: HTTP) -> None:
            async with client.get("/metrics") as response:
                assert read_gauges(await response.read()) == Reading(0, 0, 0.0)

        asked(question)

    def test_tokens_are_counted(self):
        async def question(client: HTTP) -> None:
            await completion(client, max_tokens=7)
            assert await metric(client, "generation_tokens_total") == 7
            assert await metric(client, "prompt_tokens_total") == 2

        asked(question)
