"""The open-loop client against servers inside the test, and what is made of its records."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner

from policies.testing import request
from runtime.load import LoadClient, Record, late_share, token_ids
from runtime.simulated.api import make_app
from tests.test_simulated_worker import SimulatedWorker, step_time
from viisim.cli import app as cli
from viisim.cli.load import summarised
from viisim.config import Slo
from viisim.engine.scheduler import SchedulerSettings
from viisim.workload.request import Request

LIMIT_S = 60.0
MS = 1_000_000


def due(at_ns: int, name: str = "q", **view: Any) -> Request:
    """A request that is to leave at an instant."""
    return Request(
        request(id=name, prompt_tokens=40, **view), at_ns, prompt=((name, 40),), output_tokens=6
    )


def sent(app: web.Application, requests: Iterable[Request], **options: Any) -> list[Record]:
    """The records of a load on a server."""

    async def scenario() -> list[Record]:
        async with asyncio.timeout(LIMIT_S), TestServer(app) as server:
            return await LoadClient(str(server.make_url("/")), **options).send(iter(requests))

    return asyncio.run(scenario())


def worker() -> web.Application:
    """A simulated worker, fast."""
    settings = SchedulerSettings(num_kv_blocks=300, max_num_seqs=8)
    return make_app(SimulatedWorker("m", settings, step_time, speed=1000.0))


def answering(answer: Any) -> web.Application:
    """A server that answers everything with a handler."""
    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    return app


class TestSchedule:
    def test_requests_leave_when_due_however_slow_the_answers(self):
        release = asyncio.Event()
        seen: list[str] = []

        async def hold(asked: web.Request) -> web.Response:
            seen.append(asked.headers["X-Request-Id"])
            if len(seen) == 5:
                release.set()
            await release.wait()
            return web.json_response({"usage": {"completion_tokens": 6}})

        # All five are there before the first is answered, or this would never end.
        requests = [due(i * MS, f"q{i}", streamed=False) for i in range(5)]
        records = sent(answering(hold), requests)
        assert [record.error for record in records] == [""] * 5

    def test_latency_counts_from_when_a_request_was_due(self):
        (record,) = sent(worker(), [due(0)])
        assert record.ttft_s is not None
        assert record.ttft_from_sent_s is not None
        behind_s = record.sent_s - record.due_s
        assert record.ttft_s - record.ttft_from_sent_s == pytest.approx(behind_s)

    def test_speed_brings_the_schedule_forward(self):
        records = sent(worker(), [due(0, "a"), due(1000 * MS, "b")], speed=100.0)
        assert [record.due_s for record in records] == [0.0, 0.01]

    def test_a_session_waits_for_its_answer(self):
        second = due(0, "second")
        first = replace(
            due(0, "first"), next_turn=lambda now_ns: replace(second, arrived_ns=now_ns)
        )
        records = sent(worker(), [first])
        assert [record.id for record in records] == ["first", "second"]
        assert records[1].due_s >= records[0].due_s + (records[0].e2e_s or 0.0) - 1e-3

    def test_those_that_left_late_are_counted(self):
        on_time, late = Record("a", due_s=1.0, sent_s=1.01), Record("b", due_s=1.0, sent_s=1.2)
        assert late_share([on_time, late]) == 0.5


class TestRecords:
    @pytest.mark.parametrize("streamed", [True, False])
    def test_answers_have_the_workloads_length(self, streamed: bool):
        (record,) = sent(worker(), [due(0, streamed=streamed)])
        assert (record.error, record.output_tokens) == ("", 6)
        assert len(record.token_s) == (6 if streamed else 0)

    def test_a_refusal_is_recorded_with_its_words(self):
        async def refuse(asked: web.Request) -> web.Response:
            return web.Response(status=429, text="too many")

        (record,) = sent(answering(refuse), [due(0)])
        assert (record.status, record.error) == (429, "too many")

    def test_a_server_that_is_not_there_is_an_error_of_each_request(self):
        async def scenario() -> list[Record]:
            return await LoadClient("http://127.0.0.1:9").send(iter([due(0)]))

        (record,) = asyncio.run(scenario())
        assert record.status == 0
        assert record.error

    @pytest.mark.parametrize(
        "events",
        [
            [b'{"choices": [{"text": "a", "finish_reason": null}]}', b"[DONE]"],
            [b'{"choices": [{"text": "a", "finish_reason": null}]}', b'{"error": {}}', b"[DONE]"],
        ],
    )
    def test_done_without_a_finish_reason_is_a_failure(self, events: Sequence[bytes]):
        async def stream(asked: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(asked)
            for event in events:
                await response.write(b"data: " + event + b"\n\n")
            return response

        (record,) = sent(answering(stream), [due(0)])
        assert record.error

    def test_equal_segments_are_equal_tokens(self):
        shared, other = token_ids([("a", 8), ("b", 4)]), token_ids([("a", 8), ("c", 4)])
        assert shared[:8] == other[:8]
        assert shared[8:] != other[8:]

    def test_tokens_come_from_the_vocabulary_that_is_named(self):
        assert set(token_ids([("a", 500)], range(8, 20))) == set(range(8, 20))

    def test_prompts_of_a_small_vocabulary_soon_differ(self):
        beginnings = {tuple(token_ids([(n, 32)], range(8, 105))) for n in range(1000)}
        assert len(beginnings) == 1000


class TestSummary:
    def test_failures_are_counted_and_left_out_of_the_latencies(self):
        whole = Record("a", 0.0, 0.0, e2e_s=2.0, output_tokens=3, streamed=False)
        found = summarised([whole, Record("b", 0.0, 0.0, error="cut")])
        assert (found["requests"], found["failed"], found["first_error"]) == (2, 1, "cut")
        assert found["e2e_s"]["mean"] == 2.0

    def test_time_per_token_counts_the_gaps(self):
        record = Record("a", 0.0, 0.0, output_tokens=3, e2e_s=2.0, token_s=[1.0, 1.5, 2.0])
        assert summarised([record])["tpot_s"]["mean"] == 0.5


class TestCommand:
    def test_a_trace_needs_a_model(self, tmp_path: Path):
        done = CliRunner().invoke(cli, ["load", "http://127.0.0.1:9", str(tmp_path / "t.csv")])
        assert "--model" in str(done.exception)

    def test_an_address_is_asked_for(self, tmp_path: Path):
        done = CliRunner().invoke(cli, ["load", "127.0.0.1:9", str(tmp_path / "t.csv")])
        assert "http://HOST:PORT" in str(done.exception)

    def test_records_are_lines_of_json(self):
        record = json.loads(Record("a", 1.0, token_s=[2.0]).line())
        assert (record["id"], record["due_s"], record["token_s"]) == ("a", 1.0, [2.0])


class TestSlo:
    SLO = Slo(ttft_s=1.0, tpot_s=0.1)

    def met(self, speed: float = 1.0, **fields: Any) -> int:
        """How many of one record."""
        usual = {"ttft_s": 0.9, "e2e_s": 1.8, "output_tokens": 11, "streamed": True}
        record = Record("a", 0.0, 0.0, **(usual | fields))
        found: int = summarised([record], self.SLO, speed)["met_slo"]
        return found

    def test_a_stream_meets_both_objectives(self):
        assert self.met() == 1

    @pytest.mark.parametrize("late", [{"ttft_s": 1.1}, {"e2e_s": 2.0}], ids=["first", "later"])
    def test_a_late_stream_does_not(self, late: dict[str, float]):
        assert self.met(**late) == 0

    def test_a_failed_one_does_not(self):
        assert self.met(error="cut") == 0

    def test_a_plain_one_has_the_time_of_a_stream(self):
        assert [self.met(streamed=False, ttft_s=None, e2e_s=s) for s in (1.9, 2.1)] == [1, 0]

    def test_at_a_higher_speed_everything_must_be_sooner(self):
        assert self.met(speed=2.0) == 0


class TestPrompts:
    def test_another_salt_changes_every_block_of_a_prompt(self):
        one, other = (token_ids([("a", 64)], salt=salt) for salt in ("x", "y"))
        blocks = zip(range(0, 64, 8), range(8, 72, 8), strict=True)
        assert all(one[a:b] != other[a:b] for a, b in blocks)

    def test_an_answer_that_is_known_is_repeated(self):
        known = {"answer": [7, 8, 9]}
        assert token_ids([("answer", 2)], known=known) == [7, 8]

    def test_an_answer_cut_short_is_made_up(self):
        assert token_ids([("answer", 2)], known={"answer": [7]}) == token_ids([("answer", 2)])


def recording(bodies: list[dict[str, Any]], **answer: Any) -> web.Application:
    """A server that keeps what it was asked, and streams one piece."""

    async def complete(asked: web.Request) -> web.StreamResponse:
        bodies.append(await asked.json())
        stream = web.StreamResponse()
        await stream.prepare(asked)
        choice = {"text": "x", "finish_reason": "length", **answer}
        usage = {"completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 32}}
        for event in ({"choices": [choice]}, {"choices": [], "usage": usage}):
            await stream.write(b"data: " + json.dumps(event, separators=(",", ":")).encode())
        return stream

    return answering(complete)


def test_a_comment_that_keeps_the_connection_alive_is_no_token() -> None:
    async def complete(asked: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(asked)
        await stream.write(b": keep-alive\n\n")
        return stream

    (record,) = sent(answering(complete), [due(0)])
    assert (record.ttft_s, record.ttft_from_sent_s, record.token_s) == (None, None, [])


class TestBody:
    def test_exact_lengths_are_asked_for_greedily(self):
        bodies: list[dict[str, Any]] = []
        sent(recording(bodies), [due(0)])
        assert bodies[0]["temperature"] == 0.0

    def test_as_text_a_prompt_has_a_character_a_token(self):
        bodies: list[dict[str, Any]] = []
        sent(recording(bodies), [due(0)], as_text=True, vocabulary=range(97, 123))
        assert len(bodies[0]["prompt"]) == 40
        assert bodies[0]["prompt"].islower()

    def test_cached_tokens_are_recorded(self):
        (record,) = sent(recording([]), [due(0)])
        assert record.cached_tokens == 32

    def test_the_next_turn_repeats_the_answer_that_was_given(self):
        bodies: list[dict[str, Any]] = []
        second = replace(due(0, "second"), prompt=(("first", 40), ("answer", 6)))
        first = replace(
            due(0, "first"),
            output_segment="answer",
            next_turn=lambda now_ns: replace(second, arrived_ns=now_ns),
        )
        sent(recording(bodies, token_ids=[1, 2, 3, 4, 5, 6]), [first])
        assert bodies[1]["prompt"] == bodies[0]["prompt"] + [1, 2, 3, 4, 5, 6]
