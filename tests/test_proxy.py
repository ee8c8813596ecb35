"""What clients send, and what becomes of it: bad input, limits, waiting, leaving, storms."""

import asyncio
import gzip
import json
from typing import Any

import numpy as np
import pytest

from policies.interface import (
    Arrived,
    Cancelled,
    ClusterView,
    Dispatch,
    Failed,
    Finished,
    Hold,
    Policy,
    ReplicaChanged,
    RequestView,
    Shed,
    Verdict,
)
from policies.interface import Limits as CoreLimits
from runtime.access import Client
from runtime.http1 import chunk
from runtime.proxy import Limits
from tests.stub_server import (
    DEATH,
    DONE,
    END,
    LAST,
    LIMIT_S,
    LOOPS,
    STREAM_HEAD,
    WHOLE,
    Answer,
    Received,
    Script,
    Served,
    StubServer,
    Wire,
    ask,
    asking,
    browser,
    plain,
    post,
    proxy,
    refusal,
    run,
    says,
    stream_of,
    token,
)

GOOD = stream_of(token(), LAST, DONE)
WELL = says(plain(200, WHOLE))
HANG = says(then="hang")
STREAM = post(asking())
PLAIN = post(asking(stream=False))


class OneAtATime(Policy):
    """Holds what finds every replica busy."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """A free replica, or none."""
        for replica in view.ready(request.model):
            if not replica.inflight_requests:
                return Dispatch(request.id, replica.id)
        return Hold()


class Sheds(Policy):
    """Takes nothing."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Refuse."""
        return Shed(request.id, "not today")


def answered(request: bytes, **options: Any) -> tuple[Answer, StubServer, Served]:
    """One request through a proxy with one server."""
    answers: list[tuple[Answer, Served]] = []
    stub = StubServer([WELL])

    async def scenario() -> None:
        async with stub.listening(), proxy(stub, **options) as served:
            answers.append((await ask(served.port, request), served))
            await served.emptied()

    run(scenario)
    answer, served = answers[0]
    return answer, stub, served


def viewed(body: dict[str, Any], path: str = "/v1/completions") -> RequestView:
    """What the scheduler is told of a request."""
    answer, _, served = answered(post(body, path))
    assert answer.status == 200, answer.body
    view: RequestView = served.of(Arrived)[0].request
    return view


BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "UTF-16": json.dumps(asking()).encode("utf-16"),
    "not UTF-8": b'{"model": "\xff"}',
    "NaN": json.dumps(asking(temperature=float("nan"))).encode(),
    "no model": {"prompt": "x"},
    "model of another type": {"model": 1, "prompt": "x"},
    "no prompt": {"model": "m"},
    "prompt of another type": asking(prompt=1),
    "no prompts": asking(prompt=[]),
    "mixed prompts": asking(prompt=["a", 1]),
    "token below zero": asking(prompt=[-1]),
    "token too large": asking(prompt=[2**70]),
    "token that is true": asking(prompt=[1, True]),
    "empty prompt of tokens": asking(prompt=[[]]),
    "stream of another type": asking(stream="yes"),
    "negative max_tokens": asking(max_tokens=-1),
    "fractional max_tokens": asking(max_tokens=1.5),
    "max_tokens that is true": asking(max_tokens=True),
    "max_tokens too large": asking(max_tokens=10**400),
    "n of 0": asking(n=0),
    "n of another type": asking(n="2"),
    "best_of too large": asking(best_of=10**9),
    "NaN priority": b'{"model": "m", "prompt": "x", "priority": NaN}',
    "infinite priority": b'{"model": "m", "prompt": "x", "priority": 1e999}',
    "fractional priority": asking(priority=0.5),
    "priority of another type": asking(priority="high"),
    "priority too large": asking(priority=2**40),
}


class TestInput:
    @pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
    def test_a_bad_body_is_refused_with_openai_json(self, body: Any):
        answer, stub, served = answered(post(body))
        assert (answer.status, answer.error["code"]) == (400, 400)
        assert answer.error["type"] == "invalid_request_error"
        assert (stub.requests, served.of(Arrived)) == ([], [])

    @pytest.mark.parametrize(
        "messages", [None, [], "hi", [1], {"role": "user"}], ids=lambda value: type(value).__name__
    )
    def test_bad_messages_are_refused(self, messages: Any):
        body = {"model": "m", "messages": messages}
        answer, _, _ = answered(post(body, "/v1/chat/completions"))
        assert (answer.status, "messages" in answer.error["message"]) == (400, True)

    def test_a_bad_priority_in_the_header_is_refused(self):
        answer, _, _ = answered(post(asking(), headers=["x-priority: soon"]))
        assert (answer.status, "X-Priority" in answer.error["message"]) == (400, True)

    def test_an_unknown_model_is_not_found(self):
        answer, _, _ = answered(post(asking(model="other")))
        assert (answer.status, "`other` does not exist" in answer.error["message"]) == (404, True)

    def test_an_unknown_route_is_not_found(self):
        answer, _, _ = answered(post(asking(), "/v1/nothing"))
        assert (answer.status, answer.error["code"]) == (404, 404)

    def test_a_method_that_a_route_does_not_have_is_named(self):
        answer, _, _ = answered(b"GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (answer.status, answer.error["code"], answer.headers["allow"]) == (405, 405, "POST")

    def test_a_large_body_is_refused_before_it_is_there(self):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n"
        answer, _, _ = answered(head)
        assert (answer.status, answer.error["code"]) == (413, 413)

    def test_a_large_body_in_chunks_is_refused(self):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        body = chunk(b"x" * 2000)
        answer, _, _ = answered(head + body + END, limits=Limits(max_body_bytes=1000))
        assert answer.status == 413

    def test_a_body_that_is_not_what_its_coding_says_is_refused(self):
        answer, _, _ = answered(post(b"no gzip", headers=["content-encoding: gzip"]))
        assert (answer.status, answer.error["code"]) == (400, 400)

    def test_a_stream_needs_http_1_1(self):
        answer, _, _ = answered(STREAM.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (answer.status, "HTTP/1.1" in answer.error["message"]) == (400, True)

    def test_chunks_in_http_1_0_are_refused(self):
        head = b"POST /v1/completions HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        answer, _, _ = answered(head + END)
        assert answer.status == 400

    def test_an_error_of_ours_shows_no_traceback(self, monkeypatch):
        monkeypatch.setattr("runtime.proxy.read_prompt", lambda path, fields: 1 / 0)
        answer, _, _ = answered(STREAM)
        assert (answer.status, answer.error["message"]) == (500, "internal error")


class TestWhatTheSchedulerLearns:
    def test_output_tokens_are_of_all_choices_and_prompts(self):
        body = asking(prompt=["a", "b"], n=3, best_of=5, max_tokens=10, stream=False)
        assert viewed(body).max_output_tokens == 2 * 5 * 10

    def test_the_limit_of_a_chat_is_the_newer_field(self):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        body |= {"max_completion_tokens": 7, "max_tokens": 9}
        assert viewed(body, "/v1/chat/completions").max_output_tokens == 7

    def test_without_a_limit_the_default_is_taken(self):
        assert viewed({"model": "m", "prompt": "x"}).max_output_tokens == 1024

    def test_an_embedding_has_one_token_for_each_input(self):
        view = viewed({"model": "m", "input": ["a", "b"]}, "/v1/embeddings")
        assert view.max_output_tokens == 2

    def test_token_ids_are_counted(self):
        assert viewed(asking(prompt=[1, 2, 3], stream=False)).prompt_tokens == 3

    def test_token_ids_of_several_prompts_are_counted(self):
        assert viewed(asking(prompt=[[1, 2, 3], [4]], stream=False)).prompt_tokens == 4

    def test_text_is_counted_by_characters(self):
        assert viewed(asking(prompt="x" * 400, stream=False)).prompt_tokens == 100

    def test_an_image_is_not_counted_as_text(self):
        parts = [{"type": "text", "text": "x" * 400}]
        parts += [{"type": "image_url", "image_url": {"url": "data:" + "A" * 100_000}}]
        body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
        assert viewed(body, "/v1/chat/completions").prompt_tokens < 120

    def test_equal_beginnings_have_equal_blocks(self):
        one = viewed(asking(prompt="x" * 600 + "y" * 300, stream=False))
        other = viewed(asking(prompt="x" * 600 + "z" * 300, stream=False))
        assert one.prefix_blocks[:2] == other.prefix_blocks[:2]
        assert one.prefix_blocks[2] != other.prefix_blocks[2]

    def test_the_usage_of_workers_corrects_the_estimate(self):
        async def scenario() -> None:
            usage = {"usage": {"prompt_tokens": 400, "completion_tokens": 1}}
            body = post(asking(prompt="x" * 400, stream=False))
            async with (
                StubServer([says(plain(200, WHOLE | usage))]).listening() as stub,
                proxy(stub) as served,
            ):
                for _ in range(50):
                    await ask(served.port, body)
                tokens = [event.request.prompt_tokens for event in served.of(Arrived)]
                assert tokens[0] == 100
                assert 300 < tokens[-1] <= 400

        run(scenario)


AMBIGUOUS = {
    "length and chunks": b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"content-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
    "two equal lengths": b"content-length: 4\r\ncontent-length: 4\r\n\r\nabcd",
    "a list of lengths": b"content-length: 4, 4\r\n\r\nabcd",
    "a signed length": b"content-length: +4\r\n\r\nabcd",
    "a bare line feed": b"x: y\nz: w\r\ncontent-length: 4\r\n\r\nabcd",
    "a bare carriage return": b"x: y\rz: w\r\ncontent-length: 4\r\n\r\nabcd",
    "a space before a colon": b"content-length : 4\r\n\r\nabcd",
    "a folded line": b"x: y\r\n z\r\ncontent-length: 4\r\n\r\nabcd",
    "a coding that is no chunks": b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a NUL": b"x: a\0b\r\ncontent-length: 4\r\n\r\nabcd",
    "two hosts": b"host: other\r\ncontent-length: 4\r\n\r\nabcd",
}


class TestFraming:
    @pytest.mark.parametrize("rest", AMBIGUOUS.values(), ids=AMBIGUOUS)
    def test_ambiguous_framing_is_refused_and_the_connection_closed(self, rest: bytes):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub) as served,
                browser(served.port) as client,
            ):
                answer = await client.ask(
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + rest + STREAM
                )
                assert (answer.status, answer.error["code"]) == (400, 400)
                assert await client.reader.read() == b""
                assert stub.requests == []

        run(scenario)

    def test_a_bare_line_feed_in_a_chunk_is_refused(self):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        answer, stub, _ = answered(head + b"1\na\n0\n\n")
        assert (answer.status, answer.error["code"], stub.requests) == (400, 400, [])

    def test_a_head_of_64_kb_is_refused(self):
        answer, stub, _ = answered(post(asking(), headers=["x: " + "y" * 65_536]))
        assert (answer.status, answer.error["code"], stub.requests) == (431, 431, [])

    def test_two_requests_at_once_are_answered_in_order(self):
        async def scenario() -> None:
            scripts = [says(GOOD, apart_s=0.01), WELL]
            async with (
                StubServer(scripts).listening() as stub,
                proxy(stub) as served,
                browser(served.port) as client,
            ):
                first = await client.ask(STREAM + PLAIN)
                second = await client.answer()
                assert first.raw == GOOD.removeprefix(STREAM_HEAD)
                assert json.loads(second.body) == WHOLE

        run(scenario)


class TestHeaders:
    def test_what_belongs_to_one_connection_stays_there(self):
        headers = ["connection: keep-alive, X-Hop", "x-hop: 1", "te: trailers", "x-kept: 2"]
        headers += ["keep-alive: timeout=5", "proxy-authorization: secret", "accept-encoding: gzip"]
        headers += ["authorization: Bearer secret"]
        _, stub, _ = answered(post(asking(), headers=headers))
        names = [name for name, _ in stub.requests[0].headers]
        assert sorted(names) == ["content-length", "content-type", "host", "x-kept", "x-request-id"]

    def test_values_pass_byte_by_byte(self):
        _, stub, _ = answered(post(asking()).replace(b"host: proxy", b"host: proxy\r\nx: \xe4\xff"))
        assert stub.requests[0].values("x") == ["äÿ"]

    def test_the_query_is_passed_on(self):
        _, stub, _ = answered(post(asking(), "/v1/completions?api-version=1%202"))
        assert stub.requests[0].line == "POST /v1/completions?api-version=1%202 HTTP/1.1"

    def test_a_compressed_body_reaches_the_worker_unpacked(self):
        data = gzip.compress(json.dumps(asking(stream=False)).encode(), mtime=0)
        answer, stub, _ = answered(post(data, headers=["content-encoding: gzip"]))
        assert (answer.status, stub.requests[0].fields()) == (200, asking(stream=False))
        assert stub.requests[0].values("content-encoding") == []

    def test_a_body_in_chunks_reaches_the_worker_with_its_length(self):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        data = json.dumps(asking(stream=False)).encode()
        _, stub, _ = answered(head + chunk(data[:9]) + chunk(data[9:]) + END)
        assert stub.requests[0].body == data


class TestRequestId:
    @pytest.mark.parametrize("script", [WELL, says(GOOD)], ids=["whole", "stream"])
    def test_the_clients_own_reaches_the_worker_and_comes_back(self, script: Script):
        async def scenario() -> None:
            async with StubServer([script]).listening() as stub, proxy(stub) as served:
                request = post(asking(), headers=["x-request-id: mine-1"])
                answer = await ask(served.port, request)
                assert answer.headers["x-request-id"] == "mine-1"
                assert stub.requests[0].values("x-request-id") == ["mine-1"]

        run(scenario)

    def test_without_one_it_is_generated(self):
        answer, stub, served = answered(STREAM)
        (forwarded,) = stub.requests[0].values("x-request-id")
        assert answer.headers["x-request-id"] == forwarded == served.of(Arrived)[0].request.id

    def test_a_refusal_has_it_as_well(self):
        answer, _, _ = answered(post({}, headers=["x-request-id: mine-1"]))
        assert (answer.status, answer.headers["x-request-id"]) == (400, "mine-1")

    @pytest.mark.parametrize("given", ["x" * 200, "\u00e4", "a\tb"], ids=["long", "umlaut", "tab"])
    def test_one_that_is_unfit_is_replaced(self, given: str):
        answer, _, _ = answered(post(asking(), headers=[f"x-request-id: {given}"]))
        assert answer.headers["x-request-id"].startswith("viisim-")

    def test_two_requests_with_the_same_are_kept_apart(self):
        async def scenario() -> None:
            both = asyncio.Barrier(2)

            async def together(received: Received, wire: Wire) -> None:
                await both.wait()
                await wire.send(plain(200, WHOLE))

            async with StubServer([together]).listening() as stub, proxy(stub) as served:
                request = post(asking(), headers=["x-request-id: mine-1"])
                answers = await asyncio.gather(*(ask(served.port, request) for _ in range(2)))
                assert {answer.headers["x-request-id"] for answer in answers} == {"mine-1"}
                assert len({event.request.id for event in served.of(Arrived)}) == 2

        run(scenario)


class TestQueue:
    def test_a_full_queue_is_429(self):
        async def scenario() -> None:
            limits = CoreLimits(max_queued=1)
            async with (
                StubServer([HANG]).listening() as stub,
                proxy(stub, policy=OneAtATime(), core_limits=limits) as served,
                browser(served.port) as first,
                browser(served.port) as second,
            ):
                first.writer.write(STREAM)
                await stub.taken.get()
                second.writer.write(STREAM)
                await _queued(served, 1)
                answer = await ask(served.port, STREAM)
                assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
                assert int(answer.headers["retry-after"]) > 0

        run(scenario)

    def test_waiting_too_long_is_408(self):
        async def scenario() -> None:
            limits = CoreLimits(queue_timeout_s=0.02)
            async with (
                StubServer([HANG]).listening() as stub,
                proxy(stub, policy=OneAtATime(), core_limits=limits) as served,
                browser(served.port) as first,
            ):
                first.writer.write(STREAM)
                await stub.taken.get()
                answer = await ask(served.port, STREAM)
                assert (answer.status, answer.error["type"]) == (408, "timeout_error")

        run(scenario)

    def test_what_the_policy_sheds_is_429_with_its_reason(self):
        answer, _, _ = answered(STREAM, policy=Sheds())
        assert (answer.status, answer.error["message"]) == (429, "not today")

    def test_a_client_that_leaves_the_queue_is_removed(self):
        async def scenario() -> None:
            async with (
                StubServer([HANG]).listening() as stub,
                proxy(stub, policy=OneAtATime()) as served,
                browser(served.port) as first,
                browser(served.port) as second,
            ):
                first.writer.write(STREAM)
                await stub.taken.get()
                second.writer.write(STREAM)
                await _queued(served, 1)
                second.leave()
                await _queued(served, 0)
                assert [event.attempt for event in served.of(Cancelled)] == [0]
                assert len(stub.requests) == 1

        run(scenario)

    def test_a_key_has_only_so_many_requests(self):
        async def scenario() -> None:
            digest = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
            request = post(asking(), headers=["authorization: Bearer password"])
            async with (
                StubServer([HANG]).listening() as stub,
                proxy(stub, clients=[Client(digest, max_requests=1)]) as served,
                browser(served.port) as first,
            ):
                first.writer.write(request)
                await stub.taken.get()
                answer = await ask(served.port, request)
                assert (answer.status, "retry-after" in answer.headers) == (429, True)
                first.leave()
                await served.emptied()

        run(scenario)


async def _queued(served: Served, number: int) -> None:
    while served.core.queued_requests != number:  # noqa: ASYNC110 - of the proxy's own doing
        await asyncio.sleep(0.001)


class TestNoWorker:
    @pytest.mark.parametrize(
        ("core_limits", "limits"),
        [
            (CoreLimits(queue_timeout_s=0.02), Limits()),
            (CoreLimits(), Limits(no_worker_wait_s=0.02)),
            (CoreLimits(queue_timeout_s=60.0), Limits(no_worker_wait_s=0.02)),
        ],
        ids=["as long as in the queue", "a time of its own", "less than in the queue"],
    )
    def test_it_is_503_after_a_while(self, core_limits: CoreLimits, limits: Limits):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub, core_limits=core_limits, limits=limits) as served,
            ):
                served.driver.report(ReplicaChanged(served.driver.now_s(), "r0", "draining"))
                answer = await ask(served.port, STREAM)
                assert (answer.status, answer.error["type"]) == (503, "server_error")
                assert int(answer.headers["retry-after"]) > 0
                await served.emptied()

        run(scenario)

    def test_an_ejected_worker_is_none(self):
        async def scenario() -> None:
            core_limits = CoreLimits(eject_after=1, eject_s=60.0)
            async with (
                StubServer([says(then="cut")]).listening() as stub,
                proxy(
                    stub, core_limits=core_limits, limits=Limits(no_worker_wait_s=0.02)
                ) as served,
            ):
                statuses = [(await ask(served.port, STREAM)).status for _ in range(2)]
                assert (statuses, len(stub.requests)) == ([502, 503], 1)

        run(scenario)

    def test_a_worker_that_comes_back_in_time_takes_the_request(self):
        async def scenario() -> None:
            limits = Limits(no_worker_wait_s=0.2)
            async with StubServer([WELL]).listening() as stub, proxy(stub, limits=limits) as served:
                served.driver.report(ReplicaChanged(served.driver.now_s(), "r0", "draining"))
                asked = asyncio.ensure_future(ask(served.port, STREAM))
                await _queued(served, 1)
                served.driver.report(ReplicaChanged(served.driver.now_s(), "r0", "ready"))
                assert (await asked).status == 200

        run(scenario)

    def test_a_request_that_a_draining_worker_has_is_left_in_peace(self):
        async def scenario() -> None:
            script = says(STREAM_HEAD, stream_of(LAST, DONE)[len(STREAM_HEAD) :], apart_s=0.05)
            limits = Limits(no_worker_wait_s=0.01)
            async with (
                StubServer([script]).listening() as stub,
                proxy(stub, limits=limits) as served,
            ):
                asked = asyncio.ensure_future(ask(served.port, STREAM))
                await stub.taken.get()
                served.driver.report(ReplicaChanged(served.driver.now_s(), "r0", "draining"))
                assert (await asked).status == 200

        run(scenario)

    def test_a_held_request_waits_on_where_a_worker_is_ready(self):
        async def scenario() -> None:
            limits = Limits(no_worker_wait_s=0.01)
            async with (
                StubServer(
                    [says(STREAM_HEAD, chunk(LAST) + END, apart_s=0.04)]
                ).listening() as stub,
                proxy(stub, policy=OneAtATime(), limits=limits) as served,
            ):
                answers = await asyncio.gather(*(ask(served.port, STREAM) for _ in range(2)))
                assert [answer.status for answer in answers] == [200, 200]

        run(scenario)


class TestConnections:
    def test_a_slow_head_is_cut(self):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub, head_timeout_s=0.03) as served,
                browser(served.port) as client,
            ):
                client.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost:")
                assert await client.reader.read() == b""

        run(scenario)

    def test_a_slow_second_head_is_cut(self):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub, head_timeout_s=0.03) as served,
                browser(served.port) as client,
            ):
                await client.ask(PLAIN)
                await asyncio.sleep(0.05)
                client.writer.write(b"POST")
                assert await client.reader.read() == b""

        run(scenario)

    def test_a_long_answer_is_not_cut(self):
        async def scenario() -> None:
            script = says(
                STREAM_HEAD + chunk(token()), chunk(LAST) + chunk(DONE) + END, apart_s=0.05
            )
            async with (
                StubServer([script]).listening() as stub,
                proxy(stub, head_timeout_s=0.02) as served,
            ):
                assert (await ask(served.port, STREAM)).body.endswith(DONE)

        run(scenario)

    def test_a_slow_body_is_408(self):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub, limits=Limits(body_timeout_s=0.03)) as served,
            ):
                assert (await ask(served.port, PLAIN[:-3])).status == 408

        run(scenario)

    def test_one_connection_too_many_is_503(self):
        async def scenario() -> None:
            async with (
                StubServer([WELL]).listening() as stub,
                proxy(stub, max_connections=1) as served,
            ):
                async with browser(served.port) as client:
                    assert (await client.ask(PLAIN)).status == 200
                    async with browser(served.port) as another:
                        assert (await another.answer()).status == 503
                    client.leave()
                await asyncio.sleep(0.01)
                assert (await ask(served.port, PLAIN)).status == 200

        run(scenario)


class TestOtherEndpoints:
    def test_a_model_is_listed_once(self):
        async def scenario() -> None:
            async with proxy("http://127.0.0.1:1", "http://127.0.0.1:2") as served:
                answer = await ask(served.port, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                assert [card["id"] for card in json.loads(answer.body)["data"]] == ["m"]

        run(scenario)

    def test_small_requests_are_passed_to_the_first_worker_that_answers(self):
        async def scenario() -> None:
            ill, well = StubServer([says(refusal(500, "ill"))]), StubServer([WELL])
            async with (
                ill.listening(),
                well.listening(),
                proxy("http://127.0.0.1:1", ill, well) as served,
            ):
                answer = await ask(served.port, post({"model": "m"}, "/tokenize"))
                assert (answer.status, json.loads(answer.body)) == (200, WHOLE)

        run(scenario)

    def test_without_any_they_are_503(self):
        async def scenario() -> None:
            async with proxy("http://127.0.0.1:1") as served:
                answer = await ask(served.port, post({"model": "m"}, "/tokenize"))
                assert (answer.status, answer.error["code"]) == (503, 503)

        run(scenario)


STORM: list[Script] = [
    says(GOOD),
    says(GOOD, each=40),
    WELL,
    HANG,
    says(then="cut"),
    says(refusal(500, "boom")),
    says(refusal(503, "busy")),
    says(refusal(400, "bad")),
    says(STREAM_HEAD, then="cut"),
    says(STREAM_HEAD + chunk(token()), then="cut"),
    says(STREAM_HEAD + chunk(token()), then="hang"),
    says(STREAM_HEAD + chunk(token()) + b"zz\r\n"),
    says(stream_of(DEATH, DONE)),
    says(stream_of(token(), DONE)),
    says(b"nonsense\r\n\r\n"),
    says(plain(200, WHOLE)[:-9], then="close"),
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_a_storm_of_faults_nothing_is_in_flight(seed: int, loop: str):
    rng = np.random.default_rng(seed)
    scripts = [[STORM[i] for i in rng.integers(len(STORM), size=400)] for _ in range(3)]
    begins_s = rng.random(120) * 0.03
    leaves_s = np.where(rng.random(120) < 0.3, rng.random(120) * 0.03, LIMIT_S)
    streams = rng.random(120) < 0.5
    limits = CoreLimits(max_queued=20, queue_timeout_s=0.2, eject_after=10, eject_s=0.02)
    statuses: set[int] = set()

    async def one(port: int, number: int) -> None:
        request = post(asking(stream=bool(streams[number])))
        await asyncio.sleep(begins_s[number])
        async with browser(port) as client:
            try:
                async with asyncio.timeout(leaves_s[number]):
                    statuses.add((await client.ask(request)).status)
            except TimeoutError:
                client.leave()

    async def scenario() -> None:
        async with (
            StubServer(scripts[0]).listening() as a,
            StubServer(scripts[1]).listening() as b,
            StubServer(scripts[2]).listening() as c,
            proxy(a, b, c, core_limits=limits, silence_s=0.05) as served,
        ):
            await asyncio.gather(*(one(served.port, number) for number in range(120)))
            await served.emptied()
            ends = [len(served.of(kind)) for kind in (Finished, Failed, Cancelled)]
            assert all(ends), ends
            assert 200 in statuses
            assert statuses <= {200, 400, 408, 429, 502, 503}

    run(scenario, loop)
