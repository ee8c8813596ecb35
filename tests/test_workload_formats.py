"""Every trace format: the real files in the shared folder, and samples made by hand.

A sample that starts with `HAND_MADE_` is written after the documentation of its format, because
there is no real file at hand; its figures mean nothing.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.interface import Arrived, Finished, RequestView
from policies.journal import Segment, handled_line, segment_line
from tests.result_builders import Objectives, result, row
from viisim.errors import InputError
from viisim.metrics import summarise
from viisim.records import UNFINISHED
from viisim.results import make_manifest, write_run
from viisim.workload.formats import known_formats
from viisim.workload.trace_file import TraceColumns, read_trace

RAGPULSE = "traces/ragpulse/0_trace.jsonl.gz"
BURSTGPT_1 = "traces/burstgpt/BurstGPT_1_first400.csv"
BURSTGPT_3 = "traces/burstgpt/BurstGPT_3_first400.csv"
VIDUR = "traces/vidur/arxiv_summarization_lengths.csv.gz"
WEKA = "traces/samples/weka_original_trace_0026.json"
WEKA_RANGES = "traces/samples/weka_14_sessions.ranges.jsonl"
LLMSERVINGSIM = (
    "calibration/llmservingsim_vllm/workloads/sharegpt-llama-3.1-8b-300-sps10.blk16.jsonl.gz"
)
TRACELAB = "traces/tracelab/example_round_trace.jsonl"
CLIENT_RECORDS = "calibration/vllm_cpu_steps/worker0.requests.jsonl.gz"

HAND_MADE_AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.5+00:00,2399,6
2024-05-10 00:00:01+00:00,76,15
"""
HAND_MADE_AZURE_MULTIMODAL = """TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-10-12 00:00:00.1000000,3,2162,5
"""
HAND_MADE_SPLITWISE = """request_id,request_type,application_id,arrival_timestamp,batch_size,\
prompt_size,token_size
0,2,0,0.25,1,374,44
1,2,0,4.5645,1,396,109
"""
HAND_MADE_VIDUR = """arrived_at,num_prefill_tokens,num_decode_tokens
0.5,374,44
4.25,396,109
"""
HAND_MADE_GUIDELLM_CSV = "timestamp,input_length,output_length\n1,374,44\n3.5,396,109\n"


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


HAND_MADE_MOONCAKE_SESSIONS = jsonl(
    {"session_id": "a", "timestamp": 1000, "input_length": 600, "output_length": 5},
    {"session_id": "b", "created_time": 1500, "input_tokens": 10, "output_tokens": 2},
    {"session_id": "a", "delay": 250, "input_length": 900, "output_length": 5, "priority": -3},
    {"session_id": "b", "delay_ms": 0.5, "timestamp": 9000, "input_length": 9, "output_length": 1},
    {"session_id": "b", "timestamp": 9500, "input_length": 9, "output_length": 1},
    {"timestamp": 10000, "input_length": 513, "output_length": 1, "hash_ids": [4, 5]},
)
HAND_MADE_QWEN_SESSIONS = jsonl(
    *(
        {"chat_id": chat, "parent_chat_id": parent, "timestamp": time, "type": kind}
        | {"input_length": 17, "output_length": 3, "turn": 1, "hash_ids": [1, chat + 10]}
        for chat, parent, time, kind in (
            (1, -1, 0.0, "text"),
            (2, -1, 1.5, "search"),
            (3, 1, 2.0, "text"),
            (4, 3, 3.0, "text"),
            (5, 99, 4.0, "image"),
        )
    )
)
HAND_MADE_GUIDELLM = jsonl(
    {"timestamp": 0, "input_length": 374, "output_length": 44},
    {"timestamp": 2.5, "input_length": 396, "output_length": 109},
)
HAND_MADE_LLMSERVINGSIM = jsonl(
    {"input_toks": 40, "output_toks": 9, "arrival_time_ns": 5, "input_tok_ids": list(range(40))},
    {
        "session_id": "task-0",
        "arrival_time_ns": 1_000_000,
        "sub_requests": [
            {"input_toks": 1472, "output_toks": 133, "tool_duration_ns": 127_348_767},
            {"input_toks": 1582, "output_toks": 125, "tool_duration_ns": 0},
        ],
    },
    {
        "input_toks": 40,
        "output_toks": 9,
        "arrival_time_ns": 2_000_000,
        "input_tok_ids": [*range(16), 99, *range(17, 40)],
    },
)


@pytest.fixture
def reading(tmp_path: Path) -> Callable[..., TraceColumns]:
    """Reads a text as a trace."""

    def read(text: str, **options: Any) -> TraceColumns:
        path = tmp_path / "trace"
        path.write_text(text)
        return read_trace(path, **options)

    return read


Reading = Callable[..., TraceColumns]


def words(trace: TraceColumns, name: str) -> list[str]:
    """The words of all rows, "" where there is none."""
    found = trace.words[name]
    return ["" if code < 0 else found.names[code] for code in found.codes]


def real(shared: Path, name: str, **options: Any) -> TraceColumns:
    return read_trace(shared / "data" / name, **options)


@pytest.fixture
def stats(shared: Path) -> Any:
    return json.loads((shared / "data/stats.json").read_text())


# -- recognition --


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HAND_MADE_AZURE_2024, "azure"),
        (HAND_MADE_AZURE_MULTIMODAL, "azure"),
        (HAND_MADE_VIDUR, "vidur"),
        (HAND_MADE_SPLITWISE, "splitwise"),
        (HAND_MADE_GUIDELLM_CSV, "guidellm"),
        (HAND_MADE_MOONCAKE_SESSIONS, "mooncake"),
        (HAND_MADE_QWEN_SESSIONS, "qwen_bailian"),
        (HAND_MADE_GUIDELLM, "guidellm"),
        (HAND_MADE_LLMSERVINGSIM, "llmservingsim"),
    ],
    ids=lambda text: text if len(text) < 20 else "",
)
def test_a_format_is_recognised_whatever_the_file_is_called(
    reading: Reading, text: str, expected: str
):
    assert reading(text).format == expected


def test_a_packed_trace_reads_as_a_plain_one(tmp_path: Path, reading: Reading):
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(HAND_MADE_QWEN_SESSIONS.encode(), mtime=0))
    plain = reading(HAND_MADE_QWEN_SESSIONS)
    assert read_trace(packed).arrived_ns.tolist() == plain.arrived_ns.tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traces/azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz", ("azure", 8819)),
        ("traces/mooncake_fast25/conversation_trace.jsonl.gz", ("mooncake", 12031)),
        (VIDUR, ("vidur", 28257)),
        (WEKA, ("weka", 3)),
        (WEKA_RANGES, ("weka", 219)),
        (LLMSERVINGSIM, ("llmservingsim_blocks", 300)),
        (TRACELAB, ("tracelab", 19)),
        (CLIENT_RECORDS, ("viisim_requests", 1050)),
        ("traces/samples/qwen_bailian_format_example.jsonl", ("qwen_bailian", 3)),
    ],
)
def test_a_real_file_is_recognised_with_all_its_requests(
    shared: Path, name: str, expected: tuple[str, int]
):
    trace = real(shared, name)
    assert (trace.format, len(trace)) == expected


def test_every_format_has_one_name():
    assert len(known_formats()) == len(set(known_formats())) == 15


# -- Azure --


def test_azure_2024_has_a_zone_and_fractions_of_any_length(reading: Reading):
    trace = reading(HAND_MADE_AZURE_2024)
    assert trace.arrived_ns.tolist() == [0, 490_070_000, 990_070_000]


def test_azure_multimodal_has_a_column_of_images_that_does_not_matter(reading: Reading):
    trace = reading(HAND_MADE_AZURE_MULTIMODAL)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([2162], [5])


# -- BurstGPT --


@pytest.mark.parametrize("name", [BURSTGPT_1, BURSTGPT_3])
def test_burstgpt_rows_of_no_tokens_are_failures_that_cannot_be_served(shared: Path, name: str):
    with pytest.raises(InputError, match=r"`Request tokens` is 0: BurstGPT records failed"):
        real(shared, name)


@pytest.mark.parametrize("name", [BURSTGPT_1, BURSTGPT_3])
def test_burstgpt_has_the_published_figures_without_its_failures(
    shared: Path, stats: Any, name: str
):
    # The published figures count the failures as rows of 0 tokens: sums and extremes agree,
    # means and quantiles need not.
    expected, trace = stats[name], real(shared, name, skip_bad=True)
    assert trace.skipped_rows == expected["zero_input_rows"]
    assert len(trace) + trace.skipped_rows == expected["rows"]
    assert trace.arrived_ns[-1] / 1e9 == expected["span_s"]
    for tokens, figures in (
        (trace.prompt_tokens, expected["input"]),
        (trace.output_tokens, expected["output"]),
    ):
        assert tokens.sum() / expected["rows"] == pytest.approx(figures["mean"], abs=6e-4)
        assert tokens.max() == figures["max"]


def test_burstgpt_3_is_read_by_the_names_of_its_columns(shared: Path):
    trace = real(shared, BURSTGPT_3, skip_bad=True)
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (906, 446)
    assert words(trace, "model")[:2] == ["GPT-4", "ChatGPT"]


def test_burstgpt_3_has_sessions_but_not_in_its_api_log(shared: Path, stats: Any):
    trace = real(shared, BURSTGPT_3, skip_bad=True)
    sessions = words(trace, "session")
    # One session of the file consists of a failed request only.
    assert len(set(sessions) - {""}) == stats[BURSTGPT_3]["sessions"] - 1
    assert sessions.count("") == stats[BURSTGPT_3]["rows_without_session"]
    logs = words(trace, "traffic_class")
    assert {log for log, name in zip(logs, sessions, strict=True) if not name} == {"API log"}


def test_burstgpt_1_has_no_sessions(shared: Path):
    assert "session" not in real(shared, BURSTGPT_1, skip_bad=True).words


# -- tables of simulators --


def test_vidur_has_seconds(reading: Reading):
    assert reading(HAND_MADE_VIDUR).arrived_ns.tolist() == [0, 3_750_000_000]


def test_vidur_lengths_without_arrivals_all_come_at_once(shared: Path, stats: Any):
    trace, expected = real(shared, VIDUR), stats[VIDUR]
    assert not trace.arrived_ns.any()
    assert (trace.prompt_tokens.mean(), trace.output_tokens.mean()) == pytest.approx(
        (expected["input"]["mean"], expected["output"]["mean"]), abs=6e-4
    )


def test_splitwise_has_seconds(reading: Reading):
    trace = reading(HAND_MADE_SPLITWISE)
    assert trace.arrived_ns.tolist() == [0, 4_314_500_000]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 396], [44, 109])


def test_splitwise_requests_of_other_services_are_refused(reading: Reading):
    with pytest.raises(InputError, match="only 2 is a language model"):
        reading(HAND_MADE_SPLITWISE.replace("1,2,0", "1,1,0"))


# -- Mooncake, its session dialect, and guidellm --


def test_mooncake_has_milliseconds_and_ids_for_started_blocks(reading: Reading):
    trace = reading(HAND_MADE_MOONCAKE_SESSIONS)
    assert trace.arrived_ns[-1] == 9_000_000_000
    assert trace.pieces(5) == [(4, 512), (5, 1)]


def test_mooncake_ids_of_full_blocks_only_are_refused(reading: Reading):
    with pytest.raises(InputError, match="must be a list of 2, one for each started block of 512"):
        reading(HAND_MADE_MOONCAKE_SESSIONS.replace("[4, 5]", "[4]"))


def test_a_turn_with_a_delay_waits_for_the_answer_before_it(reading: Reading):
    trace = reading(HAND_MADE_MOONCAKE_SESSIONS)
    pauses = dict(zip(trace.prompt_tokens.tolist()[:3], trace.think_ns.tolist()[:3], strict=True))
    assert pauses == {600: -1, 900: 250_000_000, 10: -1}


def test_a_turn_without_a_time_has_that_of_the_turn_before(reading: Reading):
    trace = reading(HAND_MADE_MOONCAKE_SESSIONS)
    assert trace.prompt_tokens.tolist()[:3] == [600, 900, 10]
    assert trace.arrived_ns.tolist()[:3] == [0, 0, 500_000_000]


def test_a_later_turn_with_only_a_timestamp_comes_at_that_time(reading: Reading):
    trace = reading(HAND_MADE_MOONCAKE_SESSIONS)
    assert (trace.arrived_ns[4], trace.think_ns[4]) == (8_500_000_000, -1)


def test_the_dialect_has_sessions_and_priorities(reading: Reading):
    trace = reading(HAND_MADE_MOONCAKE_SESSIONS)
    assert words(trace, "session") == ["a", "a", "b", "b", "b", ""]
    assert trace.priority.tolist() == [0, -3, 0, 0, 0, 0]


def test_a_request_without_ids_shares_nothing(reading: Reading):
    assert reading(HAND_MADE_MOONCAKE_SESSIONS).pieces(0) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"session_id": "a", "delay": 5}, "`timestamp` missing; a row needs it, unless"),
        ({"session_id": "s"}, "a later turn of a session needs `delay` or `timestamp`"),
        ({"session_id": "s", "delay": -5}, "`delay` is -5; it must be milliseconds from 0"),
        ({"session_id": [1], "timestamp": 1}, "`session_id` is [1]; it must be a name"),
        ({"timestamp": 1, "priority": 0.5}, "`priority` is 0.5; it must be a whole number"),
        ({"timestamp": 1, "wait_for": ["r1"]}, "`wait_for` is not supported"),
    ],
)
def test_a_broken_row_of_the_dialect_is_named(
    reading: Reading, change: dict[str, Any], expected: str
):
    lengths = {"input_length": 5, "output_length": 5}
    with pytest.raises(InputError) as error:
        reading(jsonl(lengths | {"session_id": "s", "timestamp": 0}, lengths | change))
    assert f"trace:2: {expected}" in str(error.value)


def test_guidellm_has_seconds(reading: Reading):
    assert reading(HAND_MADE_GUIDELLM).arrived_ns.tolist() == [0, 2_500_000_000]
    assert reading(HAND_MADE_GUIDELLM_CSV).arrived_ns.tolist() == [0, 2_500_000_000]


def test_rows_of_three_fields_with_whole_times_are_mooncake_milliseconds(reading: Reading):
    trace = reading(HAND_MADE_GUIDELLM.replace("2.5", "2500"))
    assert (trace.format, trace.arrived_ns.tolist()) == ("mooncake", [0, 2_500_000_000])


def test_mooncake_milliseconds_with_a_decimal_point_are_known_by_their_ids(reading: Reading):
    trace = reading(HAND_MADE_GUIDELLM.replace("}", ', "hash_ids": [1]}'))
    assert (trace.format, trace.arrived_ns.tolist()) == ("mooncake", [0, 2_500_000])


def test_mooncake_rows_behind_guidellm_rows_are_refused(reading: Reading):
    rows = HAND_MADE_GUIDELLM * 8 + HAND_MADE_GUIDELLM.replace("}", ', "hash_ids": [1]}')
    with pytest.raises(InputError, match="trace:17: `hash_ids` in a row of guidellm"):
        reading(rows)


# -- Qwen --


def test_qwen_has_seconds_and_ids_for_started_blocks_of_16(reading: Reading):
    trace = reading(HAND_MADE_QWEN_SESSIONS)
    assert trace.arrived_ns.tolist() == [0, 1_500_000_000, 2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert trace.pieces(0) == [(1, 16), (11, 1)]


def test_qwen_ids_of_full_blocks_only_are_refused(reading: Reading):
    with pytest.raises(InputError, match="a list of 2, one for each started block of 16 of the 17"):
        reading(HAND_MADE_QWEN_SESSIONS.replace("[1, 12]", "[1]"))


def test_qwen_sessions_are_what_descends_from_one_root(reading: Reading):
    trace = reading(HAND_MADE_QWEN_SESSIONS)
    assert words(trace, "session") == ["1", "2", "1", "1", "99"]
    assert words(trace, "traffic_class") == ["text", "search", "text", "text", "image"]


# -- RAGPulse --


@pytest.fixture(scope="module")
def ragpulse(shared: Path) -> TraceColumns:
    return real(shared, RAGPULSE)


def test_ragpulse_times_are_strings_of_seconds_and_get_sorted(
    shared: Path, ragpulse: TraceColumns, stats: Any
):
    trace = ragpulse
    with gzip.open(shared / "data" / RAGPULSE, "rt") as text:
        times = [int(json.loads(line)["timestamp"]) for line in text if line.strip()]
    assert np.count_nonzero(np.diff(times) < 0) == stats[RAGPULSE]["unsorted_pairs"] == 1
    assert (trace.arrived_ns / 1e9).tolist() == [time - min(times) for time in sorted(times)]


def test_ragpulse_prompts_share_components_of_their_own_lengths(ragpulse: TraceColumns, stats: Any):
    trace, expected = ragpulse, stats[RAGPULSE]
    assert (trace.block_tokens, len(trace.words["session"].names)) == (0, expected["sessions"])
    prompts = range(len(trace))
    shares = [sum(tokens for _, tokens in trace.pieces(index)) for index in prompts]
    shares /= trace.prompt_tokens
    figures = expected["component_sum_over_input_length"]
    assert (shares.min(), shares.max()) == pytest.approx((figures["min"], figures["max"]))
    assert shares.mean() == pytest.approx(figures["mean"], abs=6e-4)


def test_ragpulse_components_count_by_what_stands_before_them(tmp_path: Path):
    order = {"sys_prompt": [1], "passages_ids": [2, 3]}
    turned = {"sys_prompt": [1], "passages_ids": [3, 2]}
    trace = rag_trace(tmp_path, order, turned, order)
    first, second, third = (trace.blocks(index) for index in range(3))
    assert first == third
    assert first[0] == second[0]
    assert not set(first[1:]) & set(second[1:])
    assert trace.pieces(0) == list(zip(first, (10, 20, 30), strict=True))


def rag_trace(folder: Path, *components: dict[str, list[int]]) -> TraceColumns:
    """A trace with side files for system prompt 1 and passages 2 and 3."""
    rows = (
        {"timestamp": "5", "input_length": 70, "output_length": 5, "hash_ids": ids}
        for ids in components
    )
    (folder / "0_trace.jsonl").write_text(jsonl(*rows))
    (folder / "1_sys_prompt.jsonl").write_text(jsonl({"sys_prompt_id": 1, "token_length": 10}))
    passages = ({"passage_id": id_, "token_length": id_ * 10} for id_ in (2, 3))
    packed = gzip.compress(jsonl(*passages).encode(), mtime=0)
    (folder / "2_passages.jsonl.gz").write_bytes(packed)
    return read_trace(folder / "0_trace.jsonl")


def test_ragpulse_without_its_side_files_shares_nothing(shared: Path):
    trace = real(shared, "traces/samples/ragpulse_first100.jsonl")
    assert (trace.format, len(trace), len(trace.block_ids)) == ("ragpulse", 100, 0)


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ({"passages_ids": [7]}, "`passages_ids` 7 has no length in 2_passages.jsonl"),
        ({"passages_ids": [2, 3, 2, 3]}, "have 100 tokens, more than the 70 of `input_length`"),
        ({"passages_ids": [[2]]}, "it must hold a list of ids for each of sys_prompt"),
    ],
)
def test_a_broken_ragpulse_prompt_is_named(
    tmp_path: Path, components: dict[str, Any], expected: str
):
    with pytest.raises(InputError) as error:
        rag_trace(tmp_path, components)
    assert "0_trace.jsonl:1: " in str(error.value)
    assert expected in str(error.value)


def test_a_broken_side_file_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "3_history.jsonl").write_text('{"history_id": 1, "token_length": 2}\n{}\n')
    with pytest.raises(InputError, match=r"3_history.jsonl:2: `history_id`, `token_length` miss"):
        rag_trace(tmp_path, {"sys_prompt": [1]})


# -- Weka --


def test_weka_has_ids_for_full_blocks_only(shared: Path):
    trace = real(shared, WEKA)
    assert trace.block_tokens == 64
    assert trace.block_count.tolist() == (trace.prompt_tokens // 64).tolist() == [238, 271, 313]
    assert sum(tokens for _, tokens in trace.pieces(0)) == 238 * 64 < trace.prompt_tokens[0]


def test_weka_ids_of_started_blocks_are_refused(reading: Reading, shared: Path):
    session = json.loads((shared / "data" / WEKA).read_text())
    session["requests"][0]["hash_ids"].append(9999)
    with pytest.raises(InputError, match="a list of 238, one for each full block of 64 of the 15"):
        reading(json.dumps(session))


def test_weka_turns_wait_for_the_answer_and_the_think_time(shared: Path):
    trace = real(shared, WEKA)
    assert trace.arrived_ns.tolist() == [0, 94 * 10**9, 146 * 10**9]
    assert trace.think_ns.tolist() == [-1, 48 * 10**9, 4 * 10**9]


def test_weka_ids_are_local_to_their_session(reading: Reading, shared: Path):
    session = json.loads((shared / "data" / WEKA).read_text())
    trace = reading(jsonl(session, session | {"id": "other"}))
    first, second = (set(trace.blocks(index)) for index in (0, 1))
    assert (len(first), len(second), first & second) == (238, 238, set())


def test_weka_ids_of_global_scope_are_shared_by_sessions(reading: Reading, shared: Path):
    session = json.loads((shared / "data" / WEKA).read_text()) | {"hash_id_scope": "global"}
    trace = reading(jsonl(session, session | {"id": "other"}))
    assert trace.blocks(0) == trace.blocks(1)


def test_weka_ranges_of_ids_are_the_ids(shared: Path):
    ranges, whole = real(shared, WEKA_RANGES), real(shared, WEKA)
    at = words(ranges, "session").index("trace_0026")
    base = ranges.blocks(at)[0] - whole.blocks(0)[0]
    assert [block - base for block in ranges.blocks(at)] == whole.blocks(0)


def test_weka_subagents_are_sessions_that_begin_at_their_time(shared: Path):
    trace = real(shared, WEKA_RANGES)
    sessions = np.array(words(trace, "session"))
    agent = np.flatnonzero(sessions == "trace_0277/agent_001")
    assert len(agent) == 4
    assert trace.arrived_ns[agent].tolist() == [
        round((79.224 + later) * 1e9) for later in (0, 6, 13, 19)
    ]
    assert trace.think_ns[agent].tolist() == [-1, 4 * 10**9, 5 * 10**9, 3 * 10**9]
    assert words(trace, "model")[agent[0]] == "claude-haiku-4-5-20251001"


def test_weka_sessions_of_different_block_sizes_do_not_mix(reading: Reading):
    session = {"block_size": 64, "requests": [{"t": 0, "in": 9, "out": 1}]}
    with pytest.raises(InputError, match="trace:2: `block_size` is 16, but 64 in the first"):
        reading(jsonl(session, session | {"block_size": 16}))


# -- LLMServingSim --


def test_llmservingsim_has_nanoseconds(reading: Reading):
    trace = reading(HAND_MADE_LLMSERVINGSIM)
    assert trace.arrived_ns.tolist() == [0, 999_995, 999_995, 1_999_995]


def test_llmservingsim_token_ids_become_chained_ids_of_full_blocks(reading: Reading):
    trace = reading(HAND_MADE_LLMSERVINGSIM)
    first, last = trace.blocks(0), trace.blocks(3)
    assert (len(first), len(last), trace.block_tokens) == (2, 2, 16)
    assert first[0] == last[0]
    assert first[1] != last[1]


def test_ids_from_token_ids_are_the_same_in_every_process(reading: Reading):
    blocks = reading(HAND_MADE_LLMSERVINGSIM).blocks(0)
    assert blocks == [3899305706421463927, 8970668859292675697]


def test_llmservingsim_sub_requests_wait_for_the_answer_and_the_tool(reading: Reading):
    trace = reading(HAND_MADE_LLMSERVINGSIM)
    assert trace.think_ns.tolist() == [-1, -1, 127_348_767, -1]
    assert words(trace, "session") == ["", "task-0", "task-0", ""]


def test_llmservingsim_block_ids_are_for_full_blocks_and_times_in_milliseconds(
    shared: Path, stats: Any
):
    trace = real(shared, LLMSERVINGSIM)
    assert trace.block_count.tolist() == (trace.prompt_tokens // 16).tolist()
    assert trace.arrived_ns[-1] / 1e9 == pytest.approx(stats[LLMSERVINGSIM]["span_s"], abs=6e-4)


# -- TraceLab --


def test_tracelab_rounds_are_sent_with_their_last_input(shared: Path):
    trace = real(shared, TRACELAB)
    sessions = words(trace, "session")
    claude = [index for index, name in enumerate(sessions) if name.startswith("claude")]
    # Sent at 05:40:20.151 and, with the second of two tool results, at 05:40:50.938.
    assert trace.arrived_ns[claude[1]] - trace.arrived_ns[claude[0]] == 30_787_000_000
    # The answer before ended with a tool call at 05:40:31.647.
    assert trace.think_ns[claude[1]] == 19_291_000_000


def test_tracelab_prefix_counts_share_blocks_with_the_round_before(shared: Path):
    trace = real(shared, TRACELAB)
    second = np.flatnonzero(trace.prompt_tokens == 35740)[0]
    first = np.flatnonzero(trace.prompt_tokens == 32272)[0]
    shared_blocks = len(set(trace.blocks(first)) & set(trace.blocks(second)))
    assert shared_blocks == 29380 // 64


# -- viisim's own --


def test_a_run_directory_is_a_trace_of_its_first_seed(tmp_path: Path):
    rows = [
        row(0.5, prompt_tokens=7, output_tokens=2),
        row(2.0, prompt_tokens=9, output_tokens=4, priority=1, tenant=1),
        row(3.0, outcome=UNFINISHED, finished_ns=-1),
    ]
    words_of = {"tenants": ("", "acme"), "traffic_classes": ("chat",)}
    results = [result(*rows, seed=seed, **words_of) for seed in (1, 2)]
    manifest = make_manifest({"name": "t"}, (1, 2), {"trace": "0" * 64})
    summary = summarise(results, Objectives(), 0.1)
    folder = write_run(tmp_path / "run", manifest, results, summary, make_plots=False)
    trace = read_trace(folder)
    assert (trace.format, trace.arrived_ns.tolist()) == ("viisim_run", [0, 1_500_000_000])
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([7, 9], [2, 4])
    assert trace.priority.tolist() == [0, 1]
    assert words(trace, "tenant") == ["", "acme"]
    assert words(trace, "traffic_class") == ["chat", "chat"]
    assert trace.skipped_rows == 1
    assert "the request was unfinished: its answer is unknown" in trace.first_bad


def test_another_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "requests.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"not the requests\.parquet of a run \("):
        read_trace(tmp_path)


def test_client_records_may_begin_before_their_clock(shared: Path):
    trace = real(shared, CLIENT_RECORDS)
    # Sent at -0.003936 s and at 0.023355 s.
    assert trace.arrived_ns.tolist()[:2] == [0, 27_291_000]
    assert (trace.prompt_tokens[1], trace.output_tokens[1], trace.priority[1]) == (146, 124, 1)


def journal(*events: Arrived | Finished) -> str:
    lines = [segment_line(Segment("least_loaded")), *(handled_line(one, ()) for one in events)]
    return "".join(line + "\n" for line in lines)


def test_a_journal_is_a_trace_of_what_finished(reading: Reading):
    first = RequestView("a", "m", 1.0, 40, 99, priority=2, tenant="t", session="s")
    blocks = {"prefix_blocks": (5, 6), "prefix_block_tokens": 16}
    events = (
        Arrived(1.0, first),
        Arrived(1.5, RequestView("b", "m", 1.5, 40, 99, traffic_class="chat", **blocks)),
        Arrived(2.0, RequestView("c", "m", 2.0, 40, 99)),
        Finished(3.0, "b", 1, 7),
        Finished(4.0, "a", 1, 8),
        Finished(4.0, "before", 1, 8),
    )
    trace = reading(journal(*events))
    assert (trace.format, trace.arrived_ns.tolist()) == ("viisim_journal", [0, 500_000_000])
    assert (trace.output_tokens.tolist(), trace.priority.tolist()) == ([8, 7], [2, 0])
    assert [words(trace, name) for name in ("session", "tenant", "traffic_class", "model")] == [
        ["s", ""],
        ["t", ""],
        ["", "chat"],
        ["m", "m"],
    ]
    assert (trace.blocks(0), trace.pieces(1)) == ([], [(5, 16), (6, 16)])
    assert (trace.skipped_rows, trace.first_bad) == (
        1,
        "7: request c never finished: its answer is unknown",
    )


def test_a_journal_whose_blocks_are_bytes_shares_nothing(reading: Reading):
    bytes_ = {"prefix_blocks": (5, 6, 7), "prefix_block_tokens": 64}
    request = RequestView("a", "m", 1.0, 40, 99, **bytes_)
    trace = reading(journal(Arrived(1.0, request), Finished(2.0, "a", 1, 3)))
    assert (trace.blocks(0), trace.block_tokens) == ([], 0)
