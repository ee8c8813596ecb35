"""Each kind of server behind the proxy: its own streams, answers, errors, gauges and health.

What the stubs say is built after the servers' sources and documentation, named in
`runtime.adapters`.
"""

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from policies.interface import Failed, Finished
from runtime.adapters import ADAPTERS, LLAMA_CPP, MLC, TGI, VLLM, Adapter, adapter, error_of
from runtime.http1 import chunk
from runtime.http_worker import HttpWorker
from runtime.worker import Reading, WorkerError
from tests.stub_server import (
    DONE,
    END,
    STREAM_HEAD,
    Answer,
    Script,
    StubServer,
    ask,
    asking,
    browser,
    plain,
    post,
    proxy,
    run,
    says,
    sse,
    stream_of,
)
from viisim.errors import InputError

STREAM = post(asking())
PLAIN = post(asking(stream=False))
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def choice(text: str, finish_reason: str | None, **more: Any) -> dict[str, Any]:
    """One choice of a completion, its keys in no server's order in particular."""
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason, **more}


@dataclass(frozen=True)
class Sample:
    """What one kind of server says."""

    kind: Adapter
    stream: tuple[bytes, ...]
    """Three tokens of a completion, as events."""
    whole: dict[str, Any]
    refusal: tuple[int, Any]
    """Status and body when the request is wrong, and what a log line shows of it."""
    says: str
    failure: tuple[int, Any]
    """When the server is at fault."""
    loading: Script | None
    """What health gets while the model loads; None: nobody listens yet."""
    models: Any
    served: list[str]
    metrics: bytes = b""
    reading: Reading | None = None


VLLM_CARD = {"id": "cmpl-9", "object": "text_completion", "created": 1, "model": "m"}
LLAMA_CARD = {"created": 1, "model": "m", "system_fingerprint": "b6-1", "object": "text_completion"}
TGI_CARD = {"object": "text_completion", "id": "", "created": 1, "model": "m"}
MLC_CARD = {"created": 1, "model": "m", "object": "text_completion"}

LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}

SAMPLES = {
    "vllm": Sample(
        VLLM,
        (
            *(sse(**VLLM_CARD, choices=[choice(" a", None, stop_reason=None)]) for _ in range(2)),
            sse(**VLLM_CARD, choices=[choice(" b", "length", stop_reason=None)], usage=None),
            sse(**VLLM_CARD, choices=[], usage=USAGE),
            DONE,
        ),
        {**VLLM_CARD, "choices": [choice(" a a b", "length")], "usage": USAGE},
        (
            400,
            {
                "error": {
                    "message": "maximum context length is 512",
                    "type": "BadRequestError",
                    "param": None,
                    "code": 400,
                }
            },
        ),
        "maximum context length is 512",
        (
            500,
            {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}},
        ),
        says(plain(503, b"")),
        {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]},
        ["m"],
        b"# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        b"# TYPE vllm:num_requests_running gauge\n"
        b'vllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        b'vllm:num_requests_running{engine="1",model_name="m"} 2.0\n'
        b'vllm:num_requests_waiting{engine="0",model_name="m"} 1.0\n'
        b'vllm:num_requests_waiting{engine="1",model_name="m"} 0.0\n'
        b'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
        b'vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5\n',
        Reading(5, 1, 0.5),
    ),
    "tgi": Sample(
        TGI,
        (
            *(sse(**TGI_CARD, choices=[choice(" a", "")]) for _ in range(2)),
            sse(**TGI_CARD, choices=[choice(" b", "length")], usage=USAGE),
            DONE,
        ),
        {**TGI_CARD, "choices": [choice(" a a b", "length")], "usage": USAGE},
        (
            422,
            {
                "error": "Input validation error: `inputs` must have less than 1024 tokens",
                "error_type": "validation",
            },
        ),
        "Input validation error: `inputs` must have less than 1024 tokens",
        (500, {"error": "Incomplete generation", "error_type": "incomplete_generation"}),
        says(plain(503, {"error": "unhealthy", "error_type": "healthcheck"})),
        {"model_id": "org/m", "max_concurrent_requests": 128, "version": "3.3.4"},
        ["org/m"],
        b"# TYPE tgi_queue_size gauge\ntgi_queue_size 6\n\n"
        b"# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size 4\n\n"
        b"# TYPE tgi_batch_current_max_tokens gauge\ntgi_batch_current_max_tokens 2048\n",
        Reading(4, 6, 0.0),
    ),
    "mlc": Sample(
        MLC,
        (
            *(sse(id="c", choices=[choice(" a", None)], **MLC_CARD, usage=None) for _ in range(2)),
            sse(id="c", choices=[choice(" b", "length")], **MLC_CARD, usage=None),
            sse(id="c", choices=[], **MLC_CARD, usage={**USAGE, "extra": None}),
            DONE,
        ),
        {"id": "c", "choices": [choice(" a a b", "length")], **MLC_CARD, "usage": USAGE},
        (
            400,
            json.dumps({"object": "error", "message": 'The model "n" is not served.', "code": 400}),
        ),
        'The model "n" is not served.',
        (500, b"Internal Server Error"),
        None,
        {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "MLC-LLM"}]},
        ["m"],
    ),
    "llama.cpp": Sample(
        LLAMA_CPP,
        (
            *(sse(choices=[choice(" a", None)], **LLAMA_CARD, id="chatcmpl-x") for _ in range(2)),
            sse(choices=[choice(" b", None)], **LLAMA_CARD, id="chatcmpl-x"),
            sse(
                choices=[choice("", "length")],
                **LLAMA_CARD,
                usage=USAGE,
                id="chatcmpl-x",
                timings={"prompt_n": 7, "predicted_n": 3, "predicted_ms": 66.1},
            ),
            DONE,
        ),
        {"choices": [choice(" a a b", "length")], **LLAMA_CARD, "usage": USAGE},
        (
            400,
            {
                "error": {
                    "code": 400,
                    "message": "the request exceeds the available context size",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": 600,
                    "n_ctx": 512,
                }
            },
        ),
        "the request exceeds the available context size",
        (500, {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}),
        says(plain(503, LOADING)),
        {"object": "list", "data": [{"id": "code", "aliases": ["code", "m"], "meta": None}]},
        ["code", "m"],
        b"# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.\n"
        b"# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 600\n"
        b"# HELP llamacpp:requests_processing Number of requests processing\n"
        b"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 4\n"
        b"# HELP llamacpp:requests_deferred Number of requests deferred\n"
        b"# TYPE llamacpp:requests_deferred gauge\nllamacpp:requests_deferred 46\n",
        Reading(4, 46, 0.0),
    ),
}

each_kind = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


def answered(
    kind: Adapter, request: bytes, *scripts: Sequence[Script]
) -> tuple[Answer, list[Any], list[int]]:
    """One request through a proxy with a server for each list of scripts: the client's answer,
    the core's terminal events, and how many requests each server got."""
    results: list[tuple[Answer, list[Any], list[int]]] = []

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            stubs = [
                await stack.enter_async_context(StubServer(script).listening())
                for script in scripts
            ]
            served = await stack.enter_async_context(proxy(*stubs, adapter=kind))
            answer = await ask(served.port, request)
            await served.emptied()
            events = [event for event in served.events if isinstance(event, Finished | Failed)]
            results.append((answer, events, [len(stub.requests) for stub in stubs]))

    run(scenario)
    return results[0]


def probed(kind: Adapter, script: Script, probe: str) -> tuple[Any, list[str]]:
    """What a worker's probe makes of a script, or the error; and the request lines."""
    results: list[tuple[Any, list[str]]] = []

    async def scenario() -> None:
        async with StubServer([script]).listening() as stub:
            worker = HttpWorker("r0", "m", stub.url, adapter=kind)
            try:
                found = await getattr(worker, probe)()
            except WorkerError as error:
                found = error
            worker.close()
            results.append((found, [request.line for request in stub.requests]))

    run(scenario)
    return results[0]


class TestAnswers:
    @each_kind
    def test_a_stream_passes_and_its_tokens_are_counted(self, sample: Sample):
        answer, (event,), _ = answered(sample.kind, STREAM, [says(stream_of(*sample.stream))])
        assert answer.body == b"".join(sample.stream)
        assert (type(event), event.output_tokens) == (Finished, 3)

    @each_kind
    def test_a_stream_that_is_cut_ends_in_an_error_event(self, sample: Sample):
        beginning = STREAM_HEAD + chunk(sample.stream[0]) + chunk(sample.stream[1])
        answer, (event,), _ = answered(sample.kind, STREAM, [says(beginning, then="cut")])
        assert b'data: {"error":' in answer.body
        assert (event.retryable, event.worker_fault) == (False, True)

    @each_kind
    def test_a_whole_answer_passes_and_its_tokens_are_counted(self, sample: Sample):
        answer, (event,), _ = answered(sample.kind, PLAIN, [says(plain(200, sample.whole))])
        assert (json.loads(answer.body), event.output_tokens) == (sample.whole, 3)

    @each_kind
    def test_a_client_that_leaves_hangs_up_on_the_server(self, sample: Sample):
        async def scenario() -> None:
            hangs = says(STREAM_HEAD + chunk(sample.stream[0]), then="hang")
            async with (
                StubServer([hangs]).listening() as stub,
                proxy(stub, adapter=sample.kind) as served,
            ):
                async with browser(served.port) as client:
                    client.writer.write(STREAM)
                    await client.head()
                    client.leave()
                    await stub.aborted.get()
                await served.emptied()
                assert served.is_empty

        run(scenario)


class TestErrors:
    @each_kind
    @pytest.mark.parametrize("request_", [STREAM, PLAIN], ids=["streamed", "plain"])
    def test_a_refusal_is_passed_on_as_it_is(self, sample: Sample, request_: bytes):
        refuses, good = says(plain(*sample.refusal)), says(plain(200, sample.whole))
        answer, (event,), counts = answered(sample.kind, request_, [refuses], [good])
        status, body = sample.refusal
        assert (answer.status, json.loads(answer.body), counts) == (status, body, [1, 0])
        assert (event.retryable, event.worker_fault) == (False, False)

    @each_kind
    def test_what_a_refusal_says_is_found(self, sample: Sample):
        body = json.dumps(sample.refusal[1]).encode()
        assert error_of(body) == (sample.refusal[0], sample.says)

    @each_kind
    def test_a_failure_before_the_first_byte_is_tried_elsewhere(self, sample: Sample):
        fails, good = says(plain(*sample.failure)), says(stream_of(*sample.stream))
        answer, events, counts = answered(sample.kind, STREAM, [fails], [good])
        assert (answer.body, counts) == (b"".join(sample.stream), [1, 1])
        assert [type(event) for event in events] == [Failed, Finished]

    @pytest.mark.parametrize(
        ("kind", "status", "body"),
        [
            (TGI, 429, {"error": "Model is overloaded", "error_type": "overloaded"}),
            (LLAMA_CPP, 503, LOADING),
            (VLLM, 503, {"error": {"message": "paused", "type": "x", "code": 503}}),
            (MLC, 503, b"behind a proxy"),
        ],
        ids=["tgi", "llama.cpp", "vllm", "mlc"],
    )
    def test_a_busy_server_tells_the_client_to_come_again(
        self, kind: Adapter, status: int, body: Any
    ):
        answer, _, _ = answered(kind, PLAIN, [says(plain(status, body))])
        assert (answer.status, answer.headers["retry-after"]) == (status, "2")

    def test_a_chat_stream_that_tgi_refuses_without_a_word_is_tried_elsewhere(self):
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        said = sse(choices=[{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}])
        request = post(chat, "/v1/chat/completions")
        answer, _, counts = answered(TGI, request, [says(stream_of(DONE))], [says(stream_of(said))])
        assert (answer.body, counts) == (said, [1, 1])

    def test_an_error_field_of_an_old_llama_cpp_is_tried_elsewhere(self):
        old = b'error: {"code":400,"message":"too long","type":"invalid_request_error"}\n\n'
        good = stream_of(*SAMPLES["llama.cpp"].stream)
        answer, _, counts = answered(LLAMA_CPP, STREAM, [says(stream_of(old, DONE))], [says(good)])
        assert (answer.raw, counts) == (good.removeprefix(STREAM_HEAD), [1, 1])
        assert answer.raw.endswith(END)

    def test_a_generation_that_failed_at_tgi_is_tried_elsewhere(self):
        failed = plain(424, {"error": "CUDA error", "error_type": "generation"})
        whole = plain(200, SAMPLES["tgi"].whole)
        answer, events, counts = answered(TGI, PLAIN, [says(failed)], [says(whole)])
        assert (answer.status, counts, events[0].worker_fault) == (200, [1, 1], True)

    @pytest.mark.parametrize("kind", [LLAMA_CPP, VLLM], ids=["llama.cpp", "vllm"])
    def test_what_was_not_switched_on_is_a_refusal(self, kind: Adapter):
        off = {"error": {"code": 501, "message": "Start it with `--embeddings`", "type": "x"}}
        request = post({"model": "m", "input": "x"}, "/v1/embeddings")
        answer, (event,), counts = answered(kind, request, [says(plain(501, off))], [says(b"")])
        assert (answer.status, json.loads(answer.body), counts) == (501, off, [1, 0])
        assert not event.worker_fault

    @pytest.mark.parametrize(
        ("error_type", "status", "is_fault"),
        [("overloaded", 429, False), ("validation", 422, False), ("generation", 502, True)],
    )
    def test_an_error_in_a_stream_of_tgi_counts_as_its_status_would(
        self, error_type: str, status: int, is_fault: bool
    ):
        said = sse(error="no", error_type=error_type)
        answer, events, _ = answered(TGI, STREAM, [says(stream_of(said, DONE))])
        assert (answer.status, events[-1].worker_fault) == (status, is_fault)

    def test_a_stream_of_tgi_that_breaks_before_done_is_no_success(self):
        going_on = SAMPLES["tgi"].stream[0]
        answer, (event,), _ = answered(TGI, STREAM, [says(stream_of(going_on, going_on, DONE))])
        assert type(event) is Failed
        assert b'data: {"error":' in answer.body

    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            (b'{"error": "full", "error_type": "overloaded"}', 429, "full"),
            (b'{"error": "died", "error_type": "generation"}', 424, "died"),
            (b'{"error": "?", "error_type": "new"}', None, "?"),
            (b'{"error": {"message": "no", "code": "model_not_found"}}', None, "no"),
            (b'{"object": "error", "message": "no", "code": "404"}', 404, "no"),
            (b'{"error": {"message": "no", "code": 200}}', None, "no"),
            (b'{"error": {"message": "no", "code": 1e999}}', None, "no"),
            (b'{"error": "x", "error_type": ["y"]}', None, '{"error": "x", "error_type": ["y"]}'),
            (b'{"detail": "Not Found"}', None, "{'detail': 'Not Found'}"),
            (b'"text"', None, '"text"'),
            (b"[1]", None, "[1]"),
            (b"", None, ""),
            (b"two\nlines \xff", None, "two lines \ufffd"),
            (b'{"error": "' + b"x" * 999 + b'"}', None, "x" * 200),
        ],
    )
    def test_any_error_body_is_read(self, body: bytes, status: int | None, message: str):
        assert error_of(body) == (status, message)


class TestGauges:
    @pytest.mark.parametrize("name", ["vllm", "tgi", "llama.cpp"])
    def test_gauges_are_read_from_the_servers_own_names(self, name: str):
        sample = SAMPLES[name]
        reading, lines = probed(sample.kind, says(plain(200, sample.metrics)), "gauges")
        assert (reading, lines) == (sample.reading, ["GET /metrics HTTP/1.1"])

    def test_a_server_without_gauges_is_not_asked_for_them(self):
        error, lines = probed(MLC, says(plain(200, b"prompt_tokens_sum\t41\n")), "gauges")
        assert (str(error), lines) == ("MLC-LLM tells no gauges", [])

    def test_gauges_that_tgi_has_not_set_yet_are_0(self):
        assert TGI.read(b"# nothing has been asked yet\n") == Reading(0, 0, 0.0)

    @pytest.mark.parametrize(
        ("kind", "text", "repair"),
        [
            (VLLM, SAMPLES["llama.cpp"].metrics, "no vllm:num_requests_running in /metrics"),
            (LLAMA_CPP, b"", "no llamacpp:requests_processing in /metrics"),
            (TGI, b"tgi_queue_size NaN\n", "a gauge in /metrics is no number"),
            (TGI, b"tgi_queue_size many\n", "a gauge in /metrics is no number"),
            (MLC, b"", "MLC-LLM tells no gauges"),
        ],
        ids=["another server", "empty", "NaN", "a word", "no gauges"],
    )
    def test_a_page_that_is_not_the_servers_is_an_error(
        self, kind: Adapter, text: bytes, repair: str
    ):
        with pytest.raises(WorkerError, match=f"^{repair}$"):
            kind.read(text)

    def test_the_names_of_an_older_vllm_count_where_the_newer_are_missing(self):
        text = SAMPLES["vllm"].metrics.replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
        assert VLLM.read(text) == Reading(5, 1, 0.5)

    def test_a_llama_cpp_without_metrics_says_how_to_get_them(self):
        body = {"error": {"code": 501, "message": "Start it with `--metrics`", "type": "x"}}
        error, _ = probed(LLAMA_CPP, says(plain(501, body)), "gauges")
        assert str(error) == "/metrics answered 501: Start it with `--metrics`"


class TestHealth:
    @each_kind
    def test_a_server_is_healthy_when_its_model_is_loaded(self, sample: Sample):
        healthy, lines = probed(sample.kind, says(plain(200, sample.models)), "is_healthy")
        path = "/v1/models" if sample.kind is MLC else "/health"
        assert (healthy, lines) == (True, [f"GET {path} HTTP/1.1"])

    @each_kind
    def test_a_server_that_loads_is_not_healthy(self, sample: Sample):
        async def scenario() -> None:
            stub = StubServer([sample.loading] if sample.loading else [])
            async with stub.listening():
                worker = HttpWorker("r0", "m", stub.url, adapter=sample.kind)
                if sample.loading is not None:
                    assert not await worker.is_healthy()
            assert not await worker.is_healthy()
            worker.close()

        run(scenario)


class TestModels:
    @each_kind
    def test_models_are_those_that_the_server_names(self, sample: Sample):
        found, lines = probed(sample.kind, says(plain(200, sample.models)), "models")
        path = "/info" if sample.kind is TGI else "/v1/models"
        assert (found, lines) == (sample.served, [f"GET {path} HTTP/1.1"])

    @each_kind
    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b"{}", b'{"data": []}', b'{"data": [{"id": 1}]}', b'{"model_id": null}'],
    )
    def test_an_answer_without_models_is_an_error(self, sample: Sample, content: bytes):
        with pytest.raises(WorkerError, match="names no models"):
            sample.kind.models(content)

    def test_models_of_a_server_that_loads_are_an_error(self):
        error, _ = probed(LLAMA_CPP, says(plain(503, LOADING)), "models")
        assert str(error) == "/v1/models answered 503: Loading model"


class TestKinds:
    def test_samples_are_of_every_kind(self):
        assert {name: sample.kind for name, sample in SAMPLES.items()} == ADAPTERS

    def test_a_mistyped_kind_is_refused_with_the_nearest(self):
        with pytest.raises(InputError, match=r"unknown server 'llamacpp'\. Did you mean"):
            adapter("llamacpp")

    @pytest.mark.parametrize("kind", [TGI, MLC, LLAMA_CPP], ids=lambda kind: kind.name)
    def test_priorities_for_a_server_that_knows_none_are_refused(self, kind: Adapter):
        with pytest.raises(InputError, match=r"r0: engine.scheduling_policy: .*; write fcfs"):
            HttpWorker("r0", "m", "http://127.0.0.1:1", adapter=kind, forwards_priority=True)

    def test_vllm_lacks_nothing(self):
        assert VLLM.cannot == ()

    @pytest.mark.parametrize("kind", [TGI, MLC, LLAMA_CPP], ids=lambda kind: kind.name)
    def test_what_a_server_cannot_do_is_said_in_whole_sentences(self, kind: Adapter):
        assert all(text.startswith(kind.title) and text.endswith(".") for text in kind.cannot)

    def test_missing_paths_are_named(self):
        assert "MLC-LLM has no /v1/responses, /tokenize." in MLC.cannot
