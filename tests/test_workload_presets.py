"""Presets, and that they are what their comments say."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.test_workload_sessions import played
from viisim.config import build_workload
from viisim.errors import InputError
from viisim.workload.config import SessionsWorkload
from viisim.workload.lengths import QuantileTable
from viisim.workload.presets import load_preset, preset_names, session_preset
from viisim.workload.request import Request
from viisim.workload.synthetic import Synthetic

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """What the presets need of a trace."""

    arrived_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray


def of_rows(rows: Rows, stamp: str, prompt: str, output: str, unit_s: float = 1.0) -> Columns:
    return Columns(
        np.sort([float(row[stamp]) for row in rows]) * unit_s,
        np.array([int(row[prompt]) for row in rows]),
        np.array([int(row[output]) for row in rows]),
    )


@cache
def json_rows(path: Path) -> Rows:
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt") as text:
        return [json.loads(line) for line in text if line.strip()]


def azure(shared: Path, name: str) -> Columns:
    path = shared / f"data/traces/azure_llm_2023/AzureLLMInferenceTrace_{name}.csv.gz"
    with gzip.open(path, "rt") as text:
        rows = list(csv.DictReader(text))
    for row in rows:
        stamp = np.datetime64(row["TIMESTAMP"], "ns")
        row["seconds"] = int(stamp - np.datetime64("2023-11-16", "ns")) / 1e9
    return of_rows(rows, "seconds", "ContextTokens", "GeneratedTokens")


def mooncake_rows(shared: Path) -> Rows:
    return json_rows(shared / "data/traces/mooncake_fast25/conversation_trace.jsonl.gz")


def rag_rows(shared: Path) -> Rows:
    return json_rows(shared / "data/traces/ragpulse/0_trace.jsonl.gz")


def component_tokens(shared: Path, name: str, id_field: str) -> dict[int, int]:
    rows = json_rows(shared / f"data/traces/ragpulse/{name}.jsonl.gz")
    return {row[id_field]: row["token_length"] for row in rows}


def rag(shared: Path) -> Columns:
    """Prompts without their passages."""
    rows = rag_rows(shared)
    tokens = component_tokens(shared, "2_passages", "passage_id")
    columns = of_rows(rows, "timestamp", "input_length", "output_length")
    passages = [sum(tokens[p] for p in row["hash_ids"]["passages_ids"]) for row in rows]
    return Columns(
        columns.arrived_s, columns.prompt_tokens - np.array(passages), columns.output_tokens
    )


def trace_of(preset: str, shared: Path) -> Columns:
    if preset.startswith("azure_"):
        return azure(shared, preset.removeprefix("azure_"))
    if preset == "rag":
        return rag(shared)
    rows = mooncake_rows(shared)
    return of_rows(rows, "timestamp", "input_length", "output_length", 1e-3)


TRACED = ["azure_code", "azure_conv", "mooncake_conversation", "rag"]


def is_quantiles_of(table: QuantileTable, values: Iterable[int] | np.ndarray) -> bool:
    tokens = np.array(values)
    return table.quantiles == {
        percent: round(np.quantile(tokens, percent / 100)) for percent in table.quantiles
    }


def test_every_preset_loads_and_names_its_source_and_licence():
    for name in preset_names():
        preset = load_preset(name)
        assert preset.source
        assert preset.licence


def test_every_preset_can_be_drawn_from():
    for name in preset_names():
        assert list(Synthetic.from_preset(name, requests=20, model="m").requests(1))


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(InputError, match=r"there is no 'azure_cov'; did you mean 'azure_conv'\?"):
        load_preset("azure_cov")


def test_an_unknown_preset_like_none_lists_those_there_are():
    with pytest.raises(InputError, match=r"there is no 'x'; there are: agentic_coding, azure_code"):
        load_preset("x")


def test_a_preset_without_sessions_says_which_have_them():
    with pytest.raises(InputError, match=r"use one of agentic_coding, mooncake_conversation"):
        session_preset("azure_conv")


# -- against the traces ----------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("name", TRACED)
def test_a_preset_has_the_quantiles_of_its_trace(shared: Path, name: str, column: str):
    table: QuantileTable = getattr(load_preset(name), column)
    assert is_quantiles_of(table, getattr(trace_of(name, shared), column))


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("name", TRACED)
def test_a_preset_has_the_means_of_its_trace(shared: Path, name: str, column: str):
    table: QuantileTable = getattr(load_preset(name), column)
    mean = getattr(trace_of(name, shared), column).mean()
    # azure_code's answers have one of 1,899 tokens in 8,819: 28.7 instead of 27.9.
    assert table.mean_tokens == pytest.approx(mean, rel=0.04 if name == "azure_code" else 0.01)


@pytest.mark.parametrize("name", TRACED)
def test_a_preset_has_the_rank_correlation_of_its_trace(shared: Path, name: str):
    trace = trace_of(name, shared)
    measured = spearmanr(trace.prompt_tokens, trace.output_tokens).statistic
    assert load_preset(name).rank_correlation == round(measured, 4)


@pytest.mark.parametrize("name", TRACED)
def test_a_preset_has_the_rate_and_burstiness_of_its_trace(shared: Path, name: str):
    gaps_s = np.diff(trace_of(name, shared).arrived_s)
    preset = load_preset(name)
    assert preset.rate_per_s == round((len(gaps_s) + 1) / gaps_s.sum(), 5)
    assert preset.interarrival_cv == round(gaps_s.std() / gaps_s.mean(), 3)


# -- conversations of Mooncake ---------------------------------------------------------------


@dataclass(frozen=True)
class Continuations:
    """Which requests of the trace go on from which, as the preset's comment defines it."""

    turns: list[int]
    first_tokens: list[int]
    turn_tokens: list[int]
    pauses_s: np.ndarray
    span_s: float


@pytest.fixture(scope="module")
def continuations(shared: Path) -> Continuations:
    rows = mooncake_rows(shared)
    holder: dict[int, int] = {}
    root: list[int] = []
    first, added, pauses = [], [], []
    for index, row in enumerate(rows):
        ids = row["hash_ids"]
        known = next((k for k, block in enumerate(ids) if block not in holder), len(ids))
        before = rows[holder[ids[known - 1]]] if known else row
        new = row["input_length"] - before["input_length"] - before["output_length"]
        if known > 1 and len(before["hash_ids"]) - known <= 1 and new >= 1:
            root.append(root[holder[ids[known - 1]]])
            added.append(new)
            pauses.append((row["timestamp"] - before["timestamp"]) / 1e3)
        else:
            root.append(index)
            first.append(row["input_length"] - 512)
        holder.update(dict.fromkeys(ids, index))
    span_s = (rows[-1]["timestamp"] - rows[0]["timestamp"]) / 1e3
    return Continuations(list(Counter(root).values()), first, added, np.array(pauses), span_s)


def test_mooncake_sessions_have_the_tokens_of_the_trace(continuations: Continuations):
    _, sessions = session_preset("mooncake_conversation")
    assert is_quantiles_of(sessions.first_tokens, continuations.first_tokens)
    assert is_quantiles_of(sessions.turn_tokens, continuations.turn_tokens)


def test_mooncake_sessions_have_the_turns_of_the_trace(continuations: Continuations):
    _, sessions = session_preset("mooncake_conversation")
    shares = np.linspace(0.5, 99.5, 200)
    drawn = np.interp(
        shares, list(sessions.turns.quantiles), list(sessions.turns.quantiles.values())
    )
    assert np.array_equal(
        np.rint(drawn), np.quantile(continuations.turns, shares / 100, method="inverted_cdf")
    )


def test_mooncake_sessions_begin_and_pause_as_in_the_trace(continuations: Continuations):
    _, sessions = session_preset("mooncake_conversation")
    pauses_s = continuations.pauses_s
    assert sessions.rate_per_s == round(len(continuations.first_tokens) / continuations.span_s, 5)
    assert sessions.think_s["median"] == round(np.median(pauses_s))
    assert sessions.think_s["cv"] == round(pauses_s.std() / pauses_s.mean(), 2)


def reused_share(requests: Iterable[Request]) -> float:
    """Share of the prompt tokens in full blocks seen before: an unbounded prefix cache's hits."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        blocks = request.view.prefix_blocks
        known = next((k for k, block in enumerate(blocks) if block not in seen), len(blocks))
        hits += known * request.view.prefix_block_tokens
        total += request.view.prompt_tokens
        seen.update(blocks[known:])
    return hits / total


def session_turns(preset: str, requests: int) -> list[Request]:
    config = SessionsWorkload(kind="sessions", preset=preset, requests=requests)
    workload: Any = build_workload(config, "m")
    return list(played(workload))


def test_mooncake_sessions_reuse_nearly_as_much_as_the_trace():
    turns = session_turns("mooncake_conversation", 12_031)
    # 37.4 % in the trace, with the edited prompts that sessions do not show; see the preset.
    assert reused_share(turns) == pytest.approx(0.34, abs=0.03)
    assert np.mean([r.view.prompt_tokens for r in turns]) == pytest.approx(12_035, rel=0.1)


# -- coding agents ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agents(shared: Path) -> Rows:
    """Sessions with the requests of the main agent."""
    sessions = json_rows(shared / "data/traces/samples/weka_14_sessions.ranges.jsonl")
    return [
        {**session, "requests": [r for r in session["requests"] if r["type"] in "ns"]}
        for session in sessions
    ]


def test_agentic_coding_has_the_quantiles_of_the_sample(agents: Rows):
    requests = [request for session in agents for request in session["requests"]]
    preset, sessions = session_preset("agentic_coding")
    prompts, outputs = ([request[key] for request in requests] for key in ("in", "out"))
    assert is_quantiles_of(preset.prompt_tokens, prompts)
    assert is_quantiles_of(preset.output_tokens, outputs)
    assert preset.rank_correlation == round(spearmanr(prompts, outputs).statistic, 4)
    assert sessions.max_prompt_tokens == max(prompts)


def test_agentic_coding_has_the_sessions_of_the_sample(agents: Rows):
    _, sessions = session_preset("agentic_coding")
    first = [session["requests"][0]["in"] - session["tool_tokens"] for session in agents]
    added = [
        max(after["in"] - before["in"] - before["out"], 1)
        for session in agents
        for before, after in zip(session["requests"], session["requests"][1:], strict=False)
    ]
    assert is_quantiles_of(sessions.turns, [len(session["requests"]) for session in agents])
    assert is_quantiles_of(sessions.first_tokens, first)
    assert is_quantiles_of(sessions.turn_tokens, added)


def test_agentic_coding_has_the_tools_of_the_sample(agents: Rows):
    _, sessions = session_preset("agentic_coding")
    tools = [session["tool_tokens"] for session in agents]
    assert sessions.prefixes is not None
    assert sessions.prefixes.tokens == np.median(tools)
    assert sessions.prefixes.groups == len(set(tools))


def test_agentic_coding_has_the_pauses_and_the_rate_of_the_sample(agents: Rows):
    preset, sessions = session_preset("agentic_coding")
    pauses_s = [r["think_time"] for session in agents for r in session["requests"][1:]]
    positive_s = np.array([pause for pause in pauses_s if pause > 0])
    lasted_s = sum(s["requests"][-1]["t"] + s["requests"][-1]["api_time"] for s in agents)
    requests = sum(len(session["requests"]) for session in agents)
    sigma = np.log(positive_s).std()
    assert sessions.think_s["median"] == np.median(positive_s)
    assert sessions.think_s["cv"] == round(np.sqrt(np.expm1(sigma**2)), 2)
    assert preset.rate_per_s == round(requests / lasted_s, 5)
    assert sessions.rate_per_s == round(len(agents) / lasted_s, 6)


# -- retrieval -------------------------------------------------------------------------------


def test_rag_has_the_passages_of_the_trace(shared: Path):
    passages = load_preset("rag").passages
    assert passages is not None
    lists = [row["hash_ids"]["passages_ids"] for row in rag_rows(shared)]
    references = Counter(passage for one in lists for passage in one)
    counts = np.array(sorted(references.values(), reverse=True))
    tokens = component_tokens(shared, "2_passages", "passage_id")
    assert passages.pool == len(counts)
    assert passages.share == round(np.mean([bool(one) for one in lists]), 3)
    assert passages.per_request == round(np.mean([len(one) for one in lists if one]))
    assert is_quantiles_of(
        passages.tokens, np.repeat([tokens[p] for p in references], list(references.values()))
    )
    weights = np.arange(1, passages.pool + 1) ** -passages.zipf
    top = passages.pool // 100
    assert weights[:top].sum() / weights.sum() == pytest.approx(0.178, abs=0.001)
    assert counts[:top].sum() / counts.sum() == pytest.approx(0.178, abs=0.001)


def test_rag_has_the_system_prompts_of_the_trace(shared: Path):
    prefixes = load_preset("rag").prefixes
    assert prefixes is not None
    pairs = Counter(tuple(row["hash_ids"]["sys_prompt"][:2]) for row in rag_rows(shared))
    shares = np.array(list(pairs.values())) / sum(pairs.values())
    assert prefixes.groups == round(1 / np.sum(shares**2))
    assert prefixes.tokens == 2 * 512


def test_rag_reuses_system_prompts_as_much_as_the_trace():
    prefixes = load_preset("rag").prefixes
    requests = list(Synthetic.from_preset("rag", requests=7106, model="m").requests(1))
    assert prefixes is not None
    mean_tokens = np.mean([request.view.prompt_tokens for request in requests])
    assert mean_tokens == pytest.approx(2943.6, rel=0.01)
    # All but the first occurrences of 22 prefixes.
    hits = prefixes.tokens * (prefixes.share - prefixes.groups / 7106) / mean_tokens
    assert hits == pytest.approx(0.3153, abs=0.003)
    assert reused_share(requests) == pytest.approx(0.325, abs=0.01)
