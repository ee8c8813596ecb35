"""Answers of workers on their way to the client: whole, in pieces, wrong, broken off."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from policies.interface import (
    Cancelled,
    ClusterView,
    Dispatch,
    Failed,
    Finished,
    Hold,
    Policy,
    RequestView,
    Verdict,
)
from runtime.http1 import chunk, payload
from runtime.http_worker import HttpWorker, with_priority
from runtime.reply import TAIL_PIECES
from runtime.worker import WorkerError
from tests.stub_server import (
    DEATH,
    DONE,
    END,
    LAST,
    STREAM_HEAD,
    USAGE,
    WHOLE,
    Answer,
    Received,
    Script,
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
    sse,
    stream_of,
    token,
)
from viisim.errors import InputError

STREAM = post(asking())
PLAIN = post(asking(stream=False))
GOOD = stream_of(token(), token(), LAST, DONE)


def answered(request: bytes, *scripts: Sequence[Script]) -> tuple[Answer, list[Any], list[int]]:
    """One request through a proxy with a server for each list of scripts: the client's answer,
    the core's terminal events, and how many requests each server got."""
    answer: list[Answer] = []
    events: list[Any] = []
    stubs = [StubServer(script) for script in scripts]

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            stop = asyncio.Event()
            for stub in stubs:
                group.create_task(_listen(stub, stop))
            while not all(stub.port for stub in stubs):  # noqa: ASYNC110 - a few loop turns
                await asyncio.sleep(0)
            async with proxy(*stubs) as served:
                answer.append(await ask(served.port, request))
                await served.emptied()
                events.extend(e for e in served.events if isinstance(e, Finished | Failed))
            stop.set()

    run(scenario)
    return answer[0], events, [len(stub.requests) for stub in stubs]


async def _listen(stub: StubServer, stop: asyncio.Event) -> None:
    async with stub.listening():
        await stop.wait()


def said(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream, but for [DONE]."""
    events = answer.body.decode().split("\n\n")
    return [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]


class TestStreams:
    @pytest.mark.parametrize("each", [None, 1, 7, 64], ids=["at once", "1", "7", "64"])
    def test_bytes_pass_unchanged_with_their_framing(self, each: int | None):
        answer, _, _ = answered(STREAM, [says(GOOD, each=each)])
        assert answer.raw == GOOD.removeprefix(STREAM_HEAD)

    def test_a_token_passes_before_the_next_one_is_there(self):
        async def scenario() -> None:
            go_on = asyncio.Event()

            async def slowly(received: Received, wire: Wire) -> None:
                await wire.send(STREAM_HEAD + chunk(token(" first")))
                await go_on.wait()
                await wire.send(chunk(LAST) + chunk(DONE) + END)

            async with (
                StubServer([slowly]).listening() as stub,
                proxy(stub) as served,
                browser(served.port) as client,
            ):
                client.writer.write(STREAM)
                await client.head()
                assert b"first" in await client.reader.readuntil(b"\n\n")
                go_on.set()
                await client.reader.readuntil(END)

        run(scenario)

    def test_tokens_are_those_of_the_usage_at_the_end(self):
        early = token().replace(b"]}", b'], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}')
        _, (event,), _ = answered(STREAM, [says(stream_of(early, LAST, USAGE, DONE))])
        assert event.output_tokens == 3

    def test_without_usage_tokens_are_the_events(self):
        _, (event,), _ = answered(STREAM, [says(GOOD)])
        assert event.output_tokens == 3

    def test_a_stream_of_a_worker_that_sends_a_large_event_passes(self):
        large = token("x" * 300_000)
        answer, events, _ = answered(STREAM, [says(stream_of(large, LAST, DONE), each=10_000)])
        assert answer.body == large + LAST + DONE
        assert type(events[0]) is Finished

    def test_a_comment_is_no_first_event(self):
        answer, _, counts = answered(
            STREAM, [says(STREAM_HEAD, chunk(b": ping\n\n"), then="cut")], [says(GOOD)]
        )
        assert (answer.status, counts) == (200, [1, 1])

    def test_responses_end_with_an_event_of_their_own(self):
        done = b'event: response.completed\ndata: {"type": "response.completed"}\n\n'
        request = post({"model": "m", "input": "x", "stream": True}, "/v1/responses")
        answer, events, _ = answered(request, [says(stream_of(token(), done))])
        assert (answer.body, type(events[0])) == (token() + done, Finished)

    def test_headers_of_one_connection_stay_there(self):
        head = STREAM_HEAD.replace(
            b"\r\n\r\n",
            b"\r\nconnection: keep-alive, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\n"
            b"x-request-id: theirs\r\nx-kept: 2\r\n\r\n",
        )
        answer, _, _ = answered(STREAM, [says(GOOD.replace(STREAM_HEAD, head))])
        assert answer.headers["x-kept"] == "2"
        assert {"x-hop", "keep-alive"}.isdisjoint(answer.headers)
        assert answer.headers["x-request-id"] != "theirs"


class TestWholeAnswers:
    def test_an_answer_passes_whole(self):
        answer, (event,), _ = answered(PLAIN, [says(plain(200, WHOLE, "x-kept: 2"))])
        assert (answer.status, json.loads(answer.body)) == (200, WHOLE)
        assert (answer.headers["x-kept"], event.output_tokens) == ("2", 1)

    def test_a_chunked_answer_passes_whole(self):
        data = json.dumps(WHOLE).encode()
        head = STREAM_HEAD.replace(b"text/event-stream", b"application/json")
        answer, _, _ = answered(PLAIN, [says(head + chunk(data[:9]) + chunk(data[9:]) + END)])
        assert json.loads(answer.body) == WHOLE

    def test_an_answer_that_ends_with_the_connection_passes_whole(self):
        head = b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n"
        data = json.dumps(WHOLE).encode()
        answer, _, _ = answered(PLAIN, [says(head + data, then="close")])
        assert json.loads(answer.body) == WHOLE

    def test_a_worker_that_does_not_stream_is_passed_on_whole(self):
        answer, _, _ = answered(STREAM, [says(plain(200, WHOLE))])
        assert json.loads(answer.body) == WHOLE


BAD_STARTS = {
    "500": says(refusal(500, "boom")),
    "307": says(plain(307, b"", "location: http://elsewhere/")),
    "cut before the head": says(then="cut"),
    "cut in the head": says(b"HTTP/1.1 200", then="cut"),
    "cut before the first event": says(STREAM_HEAD, b"20\r\ndata: {", then="cut"),
    "error event": says(stream_of(DEATH, DONE)),
    "named error event": says(stream_of(b"event: error\n" + DEATH, DONE)),
    "old error event": says(stream_of(sse(object="error", message="x", code=500), DONE)),
    "no event": says(stream_of()),
    "[DONE] alone": says(stream_of(DONE)),
    "no HTTP": says(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "a broken length": says(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"),
}


class TestFailuresBeforeTheFirstByte:
    @pytest.mark.parametrize("start", BAD_STARTS.values(), ids=BAD_STARTS)
    def test_another_worker_is_tried(self, start: Script):
        answer, events, counts = answered(STREAM, [start], [says(GOOD)])
        assert (answer.status, answer.raw, counts) == (200, GOOD.removeprefix(STREAM_HEAD), [1, 1])
        assert [(type(e), e.attempt) for e in events] == [(Failed, 1), (Finished, 2)]

    @pytest.mark.parametrize("start", BAD_STARTS.values(), ids=BAD_STARTS)
    def test_after_a_second_failure_the_client_is_told(self, start: Script):
        answer, _, counts = answered(STREAM, [start], [start], [start])
        assert (answer.status, answer.error["code"]) == (502, 502)
        assert sorted(counts) == [0, 1, 1]

    def test_a_plain_answer_that_breaks_off_is_tried_elsewhere(self):
        half = says(plain(200, WHOLE)[:-10], then="cut")
        answer, _, counts = answered(PLAIN, [half], [says(plain(200, WHOLE))])
        assert (answer.status, counts) == (200, [1, 1])

    def test_a_worker_that_refuses_connections_is_passed_over(self):
        async def scenario() -> None:
            gone = StubServer()
            async with gone.listening():
                pass
            async with StubServer([says(GOOD)]).listening() as stub, proxy(gone, stub) as served:
                assert (await ask(served.port, STREAM)).status == 200
                assert len(served.of(Failed)) == 1

        run(scenario)

    def test_the_client_does_not_learn_where_workers_are(self):
        async def scenario() -> None:
            gone = StubServer()
            async with gone.listening():
                pass
            async with proxy(gone) as served:
                answer = await ask(served.port, STREAM)
                assert (answer.status, str(gone.port) in str(answer)) == (502, False)

        run(scenario)


class TestRefusals:
    @pytest.mark.parametrize("status", [400, 401, 404, 422])
    def test_a_refusal_is_passed_on_as_it_is(self, status: int):
        body = {"error": {"message": "too long", "code": status, "extra": [1]}}
        answer, (event,), counts = answered(STREAM, [says(plain(status, body))], [says(GOOD)])
        assert (answer.status, json.loads(answer.body), counts) == (status, body, [1, 0])
        assert (event.retryable, event.worker_fault) == (False, False)

    def test_a_refusal_in_the_first_event_is_one(self):
        event = sse(error={"message": "too long", "type": "BadRequestError", "code": 400})
        answer, (ended,), counts = answered(STREAM, [says(stream_of(event, DONE))], [says(GOOD)])
        assert (answer.status, answer.error["message"], counts) == (400, "too long", [1, 0])
        assert answer.headers["content-type"] == "application/json"
        assert not ended.worker_fault

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_busy_worker_is_passed_over(self, status: int):
        answer, _, counts = answered(STREAM, [says(refusal(status, "busy"))], [says(GOOD)])
        assert (answer.status, counts) == (200, [1, 1])

    @pytest.mark.parametrize("status", [429, 503])
    def test_when_all_are_busy_the_client_learns_when_to_come_again(self, status: int):
        busy = [says(refusal(status, "busy", "retry-after: 17"))]
        answer, _, _ = answered(STREAM, busy, busy)
        assert (answer.status, answer.headers["retry-after"]) == (status, "17")
        assert "busy" in answer.error["message"]

    def test_a_time_to_come_again_that_is_none_is_replaced(self):
        busy = [says(refusal(503, "busy", "retry-after: Wed, 21 Oct 2015 07:28:00 GMT"))]
        answer, _, _ = answered(STREAM, busy)
        assert answer.headers["retry-after"] == "2"

    def test_the_last_failure_counts(self):
        busy, dead = [says(refusal(503, "busy"))], [says(refusal(500, "dead"))]
        answer, _, _ = answered(STREAM, busy, dead)
        assert (answer.status, "retry-after" in answer.headers) == (502, False)


class TestBrokenStreams:
    @pytest.mark.parametrize(
        "rest",
        [b"", chunk(token())[:20], b"1", chunk(token())[:-1]],
        ids=["between chunks", "inside a chunk", "inside a size", "before a line end"],
    )
    def test_a_stream_that_is_cut_ends_in_an_error_event(self, rest: bytes):
        script = says(STREAM_HEAD + chunk(token(" one")), rest, then="cut")
        answer, (event,), _ = answered(STREAM, [script], [says(GOOD)])
        first, last = said(answer)
        assert (first["choices"][0]["text"], last["error"]["code"]) == (" one", 500)
        assert answer.body.endswith(DONE)
        assert (event.retryable, event.worker_fault) == (False, True)

    def test_a_framing_error_ends_in_an_error_event(self):
        script = says(STREAM_HEAD + chunk(token()), b"zz\r\n", apart_s=0.01)
        answer, _, _ = answered(STREAM, [script])
        assert said(answer)[-1]["error"]["code"] == 500

    @pytest.mark.parametrize("each", [None, 1, 9], ids=["at once", "1", "9"])
    def test_done_without_a_finish_reason_becomes_an_error_event(self, each: int | None):
        bare = stream_of(token(" one"), token(" two"), DONE)
        answer, (event,), _ = answered(STREAM, [says(bare, each=each)])
        assert [next(iter(e)) for e in said(answer)] == ["choices", "choices", "error"]
        assert answer.body.count(DONE) == 1
        assert event.reason == "the stream ended without a finish_reason"

    def test_done_in_one_chunk_with_a_token_leaves_the_token(self):
        answer, _, _ = answered(STREAM, [says(stream_of(token(), token(" two") + DONE))])
        assert [next(iter(e)) for e in said(answer)] == ["choices", "choices", "error"]

    def test_an_event_with_a_choice_that_ends_and_one_that_goes_on_is_an_end(self):
        choices = [
            {"index": n, "text": "a", "finish_reason": end} for n, end in [(0, "stop"), (1, None)]
        ]
        many = [token()] * (TAIL_PIECES + 1)
        answer, (event,), _ = answered(
            STREAM, [says(stream_of(sse(choices=choices), *many, DONE), each=60)]
        )
        assert type(event) is Finished
        assert answer.body.endswith(token() + DONE)

    def test_an_end_in_spaced_json_is_found(self):
        spaced = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
        _, (event,), _ = answered(STREAM, [says(stream_of(token(), spaced, DONE), each=60)])
        assert type(event) is Finished

    def test_an_end_without_done_and_finish_reason_is_an_error_event(self):
        answer, (event,), _ = answered(STREAM, [says(stream_of(token()))])
        assert list(said(answer)[-1]) == ["error"]
        assert type(event) is Failed

    def test_an_error_event_of_the_worker_is_passed_on_and_counts_as_a_failure(self):
        dying = chunk(DEATH) + chunk(DONE) + END
        script = says(STREAM_HEAD + chunk(token()), dying, apart_s=0.01)
        answer, (event,), _ = answered(STREAM, [script])
        assert answer.raw == chunk(token()) + dying
        assert (type(event), event.worker_fault) == (Failed, True)

    def test_an_error_that_comes_with_the_first_token_is_one_before_the_first_byte(self):
        dying = says(stream_of(token(), DEATH, DONE))
        answer, _, counts = answered(STREAM, [dying], [says(GOOD)])
        assert (answer.raw, counts) == (GOOD.removeprefix(STREAM_HEAD), [1, 1])

    def test_a_finish_reason_that_is_an_error_is_no_success(self):
        answer, (event,), _ = answered(
            STREAM, [says(stream_of(token(), token(finish_reason="error"), DONE))]
        )
        assert type(event) is Failed
        assert list(said(answer)[-1]) == ["error"]

    def test_a_model_may_write_about_the_end(self):
        words = token('data: [DONE]\n\ndata: {"error": 1}')
        answer, (event,), _ = answered(STREAM, [says(stream_of(token(), words, LAST, DONE))])
        assert answer.body == token() + words + LAST + DONE
        assert type(event) is Finished


class _Urgent(Policy):
    """Sends everything to the first replica, with the request's priority for the engine."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Dispatch."""
        for replica in view.ready(request.model):
            return Dispatch(request.id, replica.id, request.priority)
        return Hold()


class TestPriority:
    @pytest.mark.parametrize(
        "body",
        [
            b'{"model": "m", "prompt": "x"}',
            b' {"model": "m", "prompt": "x", "priority": -7}',
            b'{"priority": 9, "model": "m", "prompt": "x", "priority": -7}',
            b'{"model": "m", "prompt": "x", "\\u0070riority": -7}',
        ],
        ids=["none", "one", "two", "escaped"],
    )
    def test_the_engine_gets_the_policys_priority_once(self, body: bytes):
        async def scenario() -> None:
            async with (
                StubServer([says(plain(200, WHOLE))]).listening() as stub,
                proxy(stub, policy=_Urgent(), forwards_priority=True) as served,
            ):
                await ask(served.port, post(body, headers=["x-priority: -7"]))
                assert stub.requests[0].body.count(b"riority") == 1
                assert stub.requests[0].fields() == {"model": "m", "prompt": "x", "priority": -7}
                assert stub.requests[0].values("x-priority") == []

        run(scenario)

    @pytest.mark.parametrize("priority", [-7, 0, None], ids=["urgent", "zero", "null"])
    def test_an_engine_that_does_not_schedule_by_priority_gets_none(self, priority: int | None):
        async def scenario() -> None:
            async with (
                StubServer([says(plain(200, WHOLE))]).listening() as stub,
                proxy(stub, policy=_Urgent()) as served,
            ):
                await ask(served.port, post(asking(stream=False, priority=priority)))
                assert stub.requests[0].fields() == asking(stream=False)

        run(scenario)

    def test_a_body_without_priority_is_not_touched(self):
        async def scenario() -> None:
            body = b'{ "prompt" : "\\u00e4", "model":"m" ,"temperature":1.0e0}'
            async with StubServer([says(plain(200, WHOLE))]).listening() as stub:
                async with proxy(stub, forwards_priority=True) as served:
                    await ask(served.port, post(body))
                assert stub.requests[0].body == body

        run(scenario)

    def test_a_priority_is_spliced_in_behind_the_brace(self):
        assert with_priority(b' {"a": 1}', -3) == b' {"priority":-3,"a": 1}'


class TestLeaving:
    @pytest.mark.parametrize(
        ("request_", "script"),
        [
            (STREAM, says(STREAM_HEAD + chunk(token()), then="hang")),
            (STREAM, says(STREAM_HEAD, then="hang")),
            (PLAIN, says(then="hang")),
            (PLAIN, says(plain(200, WHOLE)[:-5], then="hang")),
        ],
        ids=["streamed", "before the first event", "plain", "half an answer"],
    )
    def test_a_client_that_leaves_aborts_the_request_at_the_worker(
        self, request_: bytes, script: Script
    ):
        async def scenario() -> None:
            async with StubServer([script]).listening() as stub, proxy(stub) as served:
                async with browser(served.port) as client:
                    client.writer.write(request_)
                    await stub.taken.get()
                    await asyncio.sleep(0.01)
                    client.leave()
                    await stub.aborted.get()
                await served.emptied()
                assert [event.attempt for event in served.of(Cancelled)] == [0, 1]

        run(scenario)


class TestSlowClients:
    def test_a_slow_client_pauses_the_worker_and_gets_everything(self):
        async def scenario() -> None:
            pieces = [chunk(token("x" * 4000)) for _ in range(4000)]
            answer = STREAM_HEAD + b"".join(pieces) + chunk(LAST) + chunk(DONE) + END
            async with (
                StubServer([says(answer, each=16 * 1024)]).listening() as stub,
                proxy(stub) as served,
                browser(served.port, buffer_bytes=16 * 1024) as client,
            ):
                client.writer.write(STREAM)
                await client.head()
                sent = -1
                while sent != stub.sent_bytes:
                    sent = stub.sent_bytes
                    await asyncio.sleep(0.05)
                # Kernel buffers of two connections, and ours.
                assert sent < len(answer) // 2
                passed = await _all_of(client.reader)
                assert passed == answer.removeprefix(STREAM_HEAD)

        run(scenario)

    def test_a_client_that_takes_nothing_any_more_loses_its_slot(self, monkeypatch):
        async def scenario() -> None:
            monkeypatch.setattr("runtime.reply.CLIENT_STALL_S", 0.05)

            async def for_ever(received: Received, wire: Wire) -> None:
                await wire.send(STREAM_HEAD)
                while True:
                    await wire.send(chunk(token("x" * 4000)))

            async with (
                StubServer([for_ever]).listening() as stub,
                proxy(stub) as served,
                browser(served.port, buffer_bytes=16 * 1024) as client,
            ):
                client.writer.write(STREAM)
                await stub.aborted.get()
                await served.emptied()

        run(scenario)


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    while not b"".join(parts[-2:]).endswith(END):
        parts.append(await reader.read(1 << 16))
    return b"".join(parts)


class TestSmallRequests:
    def test_health_and_gauges_are_read_over_one_connection(self):
        async def scenario() -> None:
            metrics = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 2\n"
            metrics += b'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
            async with StubServer(
                [says(plain(200, {})), says(plain(200, metrics))]
            ).listening() as stub:
                worker = HttpWorker("r0", "m", stub.url)
                assert await worker.is_healthy()
                reading = await worker.gauges()
                assert (reading.running, reading.waiting, reading.kv_usage) == (3, 2, 0.25)
                assert stub.connections == 1
                worker.close()

        run(scenario)

    @pytest.mark.parametrize(
        "script",
        [says(plain(503, {})), says(then="cut"), says(then="hang")],
        ids=["503", "cut", "hang"],
    )
    def test_a_worker_that_is_ill_is_not_healthy(self, script: Script, monkeypatch):
        async def scenario() -> None:
            monkeypatch.setattr("runtime.http_worker.PROBE_S", 0.03)
            async with StubServer([script]).listening() as stub:
                worker = HttpWorker("r0", "m", stub.url)
                assert not await worker.is_healthy()
                with pytest.raises(WorkerError):
                    await worker.gauges()
                worker.close()

        run(scenario)

    @pytest.mark.parametrize(
        "url", ["http://h:1/v1", "http://u:p@h:1", "http://", "http://h:99999", "h:1"]
    )
    def test_a_url_that_is_no_servers_address_is_refused(self, url: str):
        with pytest.raises(InputError, match=r"r0: url: .* write http://HOST:PORT"):
            HttpWorker("r0", "m", url)


def test_payload_of_an_error_event_can_be_read():
    assert payload(chunk(DEATH)) == DEATH
