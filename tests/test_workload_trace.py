"""Replay of recorded traces."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.errors import InputError
from viisim.workload.request import Request
from viisim.workload.trace import TraceReplay

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
