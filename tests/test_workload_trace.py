"""Replay of recorded traces."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.errors import InputError
from viisim.workload import trace as replay
from viisim.workload.request import Request
from viisim.workload.trace import TraceReplay, earliest, next_turns
from viisim.workload.trace_file import TraceColumns, Words

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951691,879,55
"""


def mooncake(*rows: dict[str, Any]) -> str:
    defaults = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
    return "".join(json.dumps(defaults | row) + "\n" for row in rows)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def replayed(path: Path, **changes: Any) -> list[Request]:
    return list(TraceReplay(path=path, model="m", **changes).requests(seed=1))


def arrivals(requests: list[Request]) -> list[int]:
    return [request.arrived_ns for request in requests]


def prompts(requests: list[Request]) -> list[int]:
    return [request.view.prompt_tokens for request in requests]


# Azure


def test_azure_arrivals_start_at_0_and_keep_the_seventh_digit(tmp_path: Path):
    path = written(tmp_path, AZURE)
    assert arrivals(replayed(path)) == [0, 4_314_579_000, 4_314_579_100]


def test_azure_lengths_become_prompts_and_outputs(tmp_path: Path):
    requests = replayed(written(tmp_path, AZURE))
    assert prompts(requests) == [374, 396, 879]
    assert [request.output_tokens for request in requests] == [44, 109, 55]


def test_azure_prompts_share_nothing(tmp_path: Path):
    requests = replayed(written(tmp_path, AZURE))
    assert [request.prompt for request in requests] == [((-1, 374),), ((-2, 396),), ((-3, 879),)]
    assert {request.view.prefix_blocks for request in requests} == {()}


def test_azure_columns_are_found_by_name(tmp_path: Path):
    text = (
        "GeneratedTokens,NumImages,TIMESTAMP,ContextTokens\n7,0,2024-05-10 00:00:00.009930+00:00,9"
    )
    (request,) = replayed(written(tmp_path, text))
    assert (request.view.prompt_tokens, request.output_tokens) == (9, 7)


@pytest.mark.parametrize(
    "later",
    [
        "2024-05-10 00:00:01.5",
        "2024-05-10 00:00:01.500000000",
        "2024-05-10 00:00:01.500000+00:00",
        "2024-05-10T00:00:01.5Z",
        "2024-05-10 02:00:01.5+02:00",
    ],
)
def test_azure_stamps_may_have_any_precision_and_a_zone(tmp_path: Path, later: str):
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,1\n{later},1,1\n"
    assert arrivals(replayed(written(tmp_path, text))) == [0, 1_500_000_000]


def test_windows_line_ends_byte_order_mark_and_blank_lines_are_harmless(tmp_path: Path):
    text = "\ufeff\n" + AZURE.replace("\n", "\r\n") + "\r\n\r\n"
    assert prompts(replayed(written(tmp_path, text))) == [374, 396, 879]


def test_rows_out_of_order_are_sorted_and_equal_times_keep_their_order(tmp_path: Path):
    stamps = [(5, 10), (2, 20), (5, 30), (2, 40)]
    rows = [{"timestamp": ms, "input_length": n, "hash_ids": [n]} for ms, n in stamps]
    requests = replayed(written(tmp_path, mooncake(*rows)))
    assert arrivals(requests) == [0, 0, 3_000_000, 3_000_000]
    assert prompts(requests) == [20, 40, 10, 30]
    assert [request.view.prefix_blocks for request in requests] == [(20,), (40,), (10,), (30,)]
    assert [request.view.id for request in requests] == ["r0", "r1", "r2", "r3"]


# Mooncake


def test_a_mooncake_prompt_is_one_piece_a_block_and_the_last_may_be_partial(tmp_path: Path):
    (request,) = replayed(written(tmp_path, mooncake({"input_length": 1100})))
    assert request.prompt == ((1, 512), (2, 512), (3, 76))


def test_a_mooncake_prompt_of_whole_blocks_ends_with_a_whole_piece(tmp_path: Path):
    row = {"input_length": 1024, "hash_ids": [8, 9]}
    (request,) = replayed(written(tmp_path, mooncake(row)))
    assert request.prompt == ((8, 512), (9, 512))


def test_the_scheduler_sees_the_hash_ids(tmp_path: Path):
    (request,) = replayed(written(tmp_path, mooncake({"hash_ids": [4, 5, 6]})))
    assert request.view.prefix_blocks == (4, 5, 6)
    assert request.view.prefix_block_tokens == 512


def test_mooncake_times_are_milliseconds(tmp_path: Path):
    path = written(tmp_path, mooncake({"timestamp": 27}, {"timestamp": 28.25}))
    assert arrivals(replayed(path)) == [0, 1_250_000]


# Parameters


@given(st.floats(0.01, 100))
def test_the_time_scale_multiplies_every_gap(shared_trace: Path, scale: float):
    plain = arrivals(replayed(shared_trace))
    assert arrivals(replayed(shared_trace, time_scale=scale)) == [round(ns * scale) for ns in plain]


@pytest.fixture(scope="module")
def shared_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("trace"), AZURE)


def test_the_limit_keeps_the_earliest_requests(tmp_path: Path):
    path = written(tmp_path, mooncake({"timestamp": 9}, {"timestamp": 1}, {"timestamp": 3}))
    workload = TraceReplay(path=path, model="m", limit=2)
    assert arrivals(list(workload.requests(1))) == [0, 2_000_000]
    assert workload.total_requests == 2


def test_answers_above_the_limit_are_cut_and_counted(tmp_path: Path):
    workload = TraceReplay(path=written(tmp_path, AZURE), model="m", max_output_tokens=50)
    assert [request.output_tokens for request in workload.requests(1)] == [44, 50, 50]
    assert workload.cut_outputs == 2


def test_an_answer_of_0_tokens_is_replayed_with_1_and_counted(tmp_path: Path):
    workload = TraceReplay(path=written(tmp_path, mooncake({"output_length": 0})), model="m")
    assert [request.output_tokens for request in workload.requests(1)] == [1]
    assert workload.zero_outputs == 1


def test_the_stated_limit_does_not_tell_the_length(tmp_path: Path):
    requests = replayed(written(tmp_path, AZURE))
    assert {request.view.max_output_tokens for request in requests} == {2048}


def test_the_seed_decides_only_who_streams(tmp_path: Path):
    workload = TraceReplay(path=written(tmp_path, AZURE), model="m", streamed=0.5)
    streamed = {
        tuple(request.view.streamed for request in workload.requests(seed)) for seed in range(20)
    }
    assert len(streamed) > 1
    assert {tuple(prompts(list(workload.requests(seed)))) for seed in range(20)} == {
        (374, 396, 879)
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"time_scale": 0}, "time_scale: 0 is not possible; use a finite number above 0"),
        ({"time_scale": -2.0}, "time_scale: -2.0 is not possible"),
        ({"time_scale": 1e20}, "time_scale: 1e+20 makes the trace outlast a century"),
        ({"limit": 0}, "limit: 0 is not possible; use a whole number from 1"),
        ({"streamed": -0.1}, "streamed: -0.1 is not a share"),
        ({"max_output_tokens": 0}, "max_output_tokens: 0 is not possible"),
    ],
)
def test_an_impossible_parameter_is_named(tmp_path: Path, change: dict[str, Any], complaint: str):
    with pytest.raises(InputError) as error:
        replayed(written(tmp_path, AZURE), **change)
    assert complaint in str(error.value)


# What a format may know besides


def columns(*arrived_ns: int, **changes: Any) -> TraceColumns:
    """A trace of such arrivals, one block of 16 tokens each, as an importer would give it."""
    rows = len(arrived_ns)
    plain = {
        "format": "made here",
        "arrived_ns": np.array(arrived_ns),
        "prompt_tokens": np.full(rows, 20),
        "output_tokens": np.full(rows, 5),
        "block_tokens": 16,
        "first_block": np.arange(rows),
        "block_count": np.ones(rows, dtype=np.int64),
        "block_ids": np.arange(100, 100 + rows),
        "piece_tokens": None,
        "think_ns": np.full(rows, -1),
        "priority": np.zeros(rows, dtype=np.int64),
        "words": {},
        "skipped_rows": 0,
        "first_bad": "",
    }
    return TraceColumns(**plain | changes)


def words(*codes: int) -> Words:
    return Words(np.array(codes), ("ann", "bob"))


Replay = Callable[..., TraceReplay]


@pytest.fixture
def replay_of(monkeypatch: pytest.MonkeyPatch) -> Replay:
    """A replay of columns instead of a file."""

    def make(trace: TraceColumns, **changes: Any) -> TraceReplay:
        monkeypatch.setattr(replay, "read_trace", lambda path, skip_bad: trace)
        return TraceReplay(path="trace", model="m", **changes)

    return make


def test_session_tenant_class_and_priority_reach_the_scheduler(replay_of: Replay):
    trace = columns(
        0,
        1,
        words={"session": words(1, -1), "tenant": words(0, 1), "traffic_class": words(-1, 0)},
        priority=np.array([3, 0]),
    )
    views = [request.view for request in replay_of(trace).requests(1)]
    assert [(v.session, v.tenant, v.traffic_class, v.priority) for v in views] == [
        ("bob", "ann", "", 3),
        ("", "bob", "ann", 0),
    ]


def test_the_experiment_says_which_model_is_served(replay_of: Replay):
    trace = columns(0, words={"model": words(0)})
    assert [request.view.model for request in replay_of(trace).requests(1)] == ["m"]


def test_what_is_behind_the_last_full_block_is_the_requests_own(replay_of: Replay):
    (request,) = replay_of(columns(0)).requests(1)
    assert request.prompt == ((100, 16), (-1, 4))
    assert request.view.prefix_blocks == (100,)


def test_pieces_keep_lengths_of_their_own(replay_of: Replay):
    trace = columns(
        0,
        block_tokens=0,
        block_count=np.array([2]),
        block_ids=np.array([7, 8]),
        piece_tokens=np.array([3, 10]),
    )
    (request,) = replay_of(trace).requests(1)
    assert request.prompt == ((7, 3), (8, 10), (-1, 7))
    assert request.view.prefix_blocks == (7, 8)
    assert request.view.prefix_block_tokens == 7  # (3 + 10) / 2, rounded up


# Closed loop


SESSIONS = columns(
    0,
    10,
    20,
    30,
    40,
    words={"session": words(0, 1, 0, 0, -1)},
    think_ns=np.array([-1, -1, 7, 0, 5]),
)


def test_a_turn_waits_for_the_answer_and_the_pause(replay_of: Replay):
    ann, bob, alone = replay_of(SESSIONS).requests(1)
    assert [r.view.id for r in (ann, bob, alone)] == ["r0", "r1", "r4"]
    second = following(ann, answered_ns=1000)
    assert (second.view.id, second.arrived_ns, second.view.arrived_s) == ("r2", 1007, 1007 / 1e9)
    third = following(second, answered_ns=2000)
    assert (third.view.id, third.arrived_ns) == ("r3", 2000)
    assert (bob.next_turn, third.next_turn, alone.next_turn) == (None, None, None)


def following(request: Request, answered_ns: int) -> Request:
    assert request.next_turn is not None
    return request.next_turn(answered_ns)


def test_all_turns_count(replay_of: Replay):
    assert replay_of(SESSIONS).total_requests == 5


def test_the_time_scale_leaves_pauses_alone(replay_of: Replay):
    ann, bob, _ = replay_of(SESSIONS, time_scale=3.0).requests(1)
    assert bob.arrived_ns == 30
    assert following(ann, answered_ns=1000).arrived_ns == 1007


def test_without_a_closed_loop_turns_come_at_their_recorded_times(replay_of: Replay):
    requests = list(replay_of(SESSIONS, closed_loop=False).requests(1))
    assert arrivals(requests) == [0, 10, 20, 30, 40]
    assert all(request.next_turn is None for request in requests)


def test_both_loops_have_the_same_requests(replay_of: Replay):
    """Who streams, prompts and lengths do not depend on when a turn comes."""
    plain = {
        request.view.id: (replace(request.view, arrived_s=0.0), request.prompt)
        for request in replay_of(SESSIONS, closed_loop=False, streamed=0.5).requests(1)
    }
    waiting = replay_of(SESSIONS, streamed=0.5).requests(1)
    turns = [turn for request in waiting for turn in at_once(request)]
    assert {r.view.id: (replace(r.view, arrived_s=0.0), r.prompt) for r in turns} == plain


def at_once(request: Request) -> Iterator[Request]:
    """The request and its next turns, as if every answer took no time."""
    yield request
    if request.next_turn is not None:
        yield from at_once(request.next_turn(request.arrived_ns))


def test_a_turn_follows_the_latest_before_it_even_one_that_came_by_itself():
    trace = columns(0, 1, 2, words={"session": words(0, 0, 0)}, think_ns=np.array([-1, -1, 4]))
    assert next_turns(trace).tolist() == [-1, 2, -1]


def test_the_earliest_of_a_trace_leave_nothing_of_the_others():
    kept = earliest(SESSIONS, 2)
    assert len(kept) == 2
    assert next_turns(kept).tolist() == [-1, -1]
    assert earliest(SESSIONS, None) is SESSIONS


def test_a_session_slows_down_with_its_answers(tmp_path: Path):
    rows = [
        {"session_id": "s", "timestamp": 100},
        {"session_id": "s", "delay": 250, "hash_ids": [1, 2, 9]},
    ]
    path = tmp_path / "sessions.jsonl"
    path.write_text("".join(json.dumps(turn(**row)) + "\n" for row in rows))
    (first,) = replayed(path)
    second = following(first, answered_ns=5_000_000_000)
    assert second.arrived_ns == 5_250_000_000
    assert second.view.prefix_blocks == (1, 2, 9)
    assert second.view.session == first.view.session == "s"


def turn(**row: Any) -> dict[str, Any]:
    return {"input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]} | row


# The real files


def test_gzip_is_recognised_by_content_whatever_the_name(tmp_path: Path):
    assert prompts(replayed(written(tmp_path, gzip.compress(AZURE.encode())))) == [374, 396, 879]


def test_the_azure_conversation_trace_replays_whole(shared: Path):
    path = shared / "data/traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
    workload = TraceReplay(path=path, model="m", time_scale=2.0)
    requests = list(workload.requests(1))
    assert len(requests) == workload.total_requests == 19_366
    assert (workload.cut_outputs, workload.zero_outputs) == (0, 0)
    assert arrivals(requests)[-1] == 2 * 3_501_721_937_000


def test_the_mooncake_conversation_trace_replays_whole(shared: Path):
    path = shared / "data/traces/mooncake_fast25/conversation_trace.jsonl.gz"
    requests = replayed(path)
    assert len(requests) == 12_031
    assert all(sum(n for _, n in r.prompt) == r.view.prompt_tokens for r in requests)
    assert len({segment for r in requests for segment, _ in r.prompt}) == 182_790
