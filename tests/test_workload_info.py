"""Figures of a trace."""

import json
from pathlib import Path
from typing import Any

import pytest

from viisim.workload.info import TraceInfo, trace_info
from viisim.workload.trace_file import read_trace

AZURE_CONV = "traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
AZURE_CODE = "traces/azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz"
MOONCAKE = "traces/mooncake_fast25/conversation_trace.jsonl.gz"
RAGPULSE = "traces/ragpulse/0_trace.jsonl.gz"
LLMSERVINGSIM = (
    "calibration/llmservingsim_vllm/workloads/sharegpt-llama-3.1-8b-300-sps10.blk16.jsonl.gz"
)
BURSTGPT_3 = "traces/burstgpt/BurstGPT_3_first400.csv"
WEKA = "traces/samples/weka_14_sessions.ranges.jsonl"


def info_of(folder: Path, *rows: tuple[float, int, list[int]]) -> TraceInfo:
    """The figures of Mooncake rows (seconds, prompt tokens, hash ids), all with 10 outputs."""
    keys = ("timestamp", "input_length", "hash_ids")
    lines = [
        json.dumps({"output_length": 10, **dict(zip(keys, row, strict=True))})
        for row in ((int(s * 1000), tokens, ids) for s, tokens, ids in rows)
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return trace_info(path)


@pytest.mark.parametrize("trace", [AZURE_CONV, AZURE_CODE, MOONCAKE, RAGPULSE, LLMSERVINGSIM])
def test_real_traces_have_the_published_figures(shared: Path, trace: str):
    expected = json.loads((shared / "data/stats.json").read_text())[trace]
    info = trace_info(shared / "data" / trace).to_dict()
    rounded: dict[str, Any] = {
        "rows": info["requests"],
        "span_s": round(info["span_s"], 3),
        "mean_rate_rps": round(info["rate_per_s"], 5),
        "iat_cv": round(info["interarrival_cv"], 3),
        "iod_1s": round(info["dispersion_1s"], 3),
        "peak_60s_rps": round(info["peak_60s_per_s"], 3),
        "zero_output_rows": info["zero_outputs"],
        "input": {key: round(value, 3) for key, value in info["prompt_tokens"].items()},
        "output": {key: round(value, 3) for key, value in info["output_tokens"].items()},
    }
    assert rounded == {key: expected[key] for key in rounded}


@pytest.mark.parametrize("trace", [MOONCAKE, LLMSERVINGSIM])
def test_real_traces_have_the_published_prefix_figures(shared: Path, trace: str):
    expected = json.loads((shared / "data/stats.json").read_text())[trace]
    info = trace_info(shared / "data" / trace)
    assert info.prefix_share is not None
    assert round(info.prefix_share, 4) == expected["prefix_hit_token_share_infinite_cache"]
    assert info.unique_blocks == expected["unique_blocks"]
    assert info.block_tokens == expected["block_tokens"]


def test_ragpulse_has_the_published_prefix_figure_and_sessions(shared: Path):
    # The figure was published over the tokens of all components; `prefix_share` is over whole
    # prompts, which are a little longer.
    expected = json.loads((shared / "data/stats.json").read_text())[RAGPULSE]
    info = trace_info(shared / "data" / RAGPULSE)
    pieces = read_trace(shared / "data" / RAGPULSE).piece_tokens
    assert info.prefix_share is not None
    assert pieces is not None
    hit_tokens = info.prefix_share * info.prompt_tokens.mean * info.requests
    published = expected["prefix_hit_token_share_infinite_cache"]
    assert round(hit_tokens / pieces.sum(), 4) == published
    assert info.block_tokens is None
    assert (info.sessions, info.multi_turn_sessions) == (
        expected["sessions"],
        expected["multi_turn_sessions"],
    )


def test_failed_requests_of_burstgpt_are_counted_as_skipped(shared: Path):
    info = trace_info(shared / "data" / BURSTGPT_3, skip_bad=True)
    assert (info.requests, info.skipped_rows) == (399, 1)
    assert info.first_bad is not None
    assert info.first_bad.startswith("117: `Request tokens` is 0")


def test_agentic_sessions_are_closed_loop_and_share_most_of_their_prompts(shared: Path):
    info = trace_info(shared / "data" / WEKA)
    assert (info.requests, info.sessions, info.closed_loop_turns) == (219, 20, 199)
    assert info.prefix_share is not None
    assert 0.8 < info.prefix_share < 0.95


def test_a_trace_without_hash_ids_has_no_prefix_figures(shared: Path):
    info = trace_info(shared / "data/traces/samples/azure_conv_first300.csv")
    assert (info.format, info.skipped_rows, info.first_bad) == ("azure", 0, None)
    assert (info.prefix_share, info.unique_blocks, info.block_tokens) == (None, None, None)
    assert (info.sessions, info.multi_turn_sessions, info.closed_loop_turns) == (None, None, 0)


def test_a_prefix_ends_at_the_first_block_not_seen_before(tmp_path: Path):
    info = info_of(tmp_path, (0, 1536, [1, 2, 3]), (1, 1536, [1, 9, 3]))
    assert info.prefix_share == 512 / 3072
    assert info.unique_blocks == 4


def test_a_partial_block_counts_with_the_tokens_it_has(tmp_path: Path):
    info = info_of(tmp_path, (0, 600, [1, 2]), (1, 600, [1, 2]))
    assert info.prefix_share == 0.5


def test_regular_arrivals_have_no_burstiness(tmp_path: Path):
    info = info_of(tmp_path, *((second, 1, [second]) for second in range(10)))
    assert (info.interarrival_cv, info.dispersion_1s) == (0, 0)
    assert info.rate_per_s == 10 / 9


def test_empty_seconds_count_as_windows(tmp_path: Path):
    info = info_of(tmp_path, (0, 1, [1]), (0, 1, [2]), (3.5, 1, [3]), (3.6, 1, [4]))
    # Counts 2, 0, 0, 2: mean 1, variance 1.
    assert info.dispersion_1s == 1


def test_a_single_request_has_neither_rate_nor_burstiness(tmp_path: Path):
    info = info_of(tmp_path, (7, 5, [1]))
    assert (info.requests, info.span_s) == (1, 0)
    assert (info.rate_per_s, info.interarrival_cv) == (None, None)


def test_the_figures_are_plain_json(tmp_path: Path):
    info = info_of(tmp_path, (0, 600, [1, 2]), (1, 600, [1, 2])).to_dict()
    assert json.loads(json.dumps(info)) == info
