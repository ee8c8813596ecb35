"""The lines of each format that a trace can be written in, with line ends.

The counterparts of the readers in `viisim.workload.formats`; units and counts of blocks are the
formats' own. `export` says what a format cannot hold; what depends on more than a missing field
is said by the `..._losses` beside the lines.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.workload.interface import own_segment
from viisim.workload.trace import next_turns, words_of
from viisim.workload.trace_file import Column, TraceColumns

Lines: TypeAlias = Iterator[str]

_BLOCK_TOKENS = 512  # of a Mooncake hash id
_AZURE_EPOCH = datetime(2000, 1, 1)
_ALL = slice(None)


def counted(requests: int, trace: TraceColumns) -> str:
    """How many requests a loss concerns, in words."""
    return f"({requests:,} of {len(trace):,} requests)"


def _rows(*columns: Column) -> Iterator[tuple[Any, ...]]:
    """The columns row by row, as plain Python values."""
    return zip(*(column.tolist() for column in columns), strict=True)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


# --------------------------------------------------------------------------------------
# Arrivals and lengths: CSV


def _seconds(ns: int) -> str:
    """Exact: a float of so many digits would round."""
    return f"{ns // 10**9}.{ns % 10**9:09d}"


def vidur_lines(trace: TraceColumns) -> Lines:
    """Times in seconds."""
    yield "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    for ns, prompt, output in _rows(trace.arrived_ns, trace.prompt_tokens, trace.output_tokens):
        yield f"{_seconds(ns)},{prompt},{output}\n"


def splitwise_lines(trace: TraceColumns) -> Lines:
    """Times in seconds. Request type 2 is a language model's; all belong to application 0."""
    yield (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
        "token_size\n"
    )
    rows = _rows(trace.arrived_ns, trace.prompt_tokens, trace.output_tokens)
    for index, (ns, prompt, output) in enumerate(rows):
        yield f"{index},2,0,{_seconds(ns)},1,{prompt},{output}\n"


def azure_lines(trace: TraceColumns) -> Lines:
    """Stamps count from the beginning of 2000, with seven decimals as Azure's own have."""
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for ns, prompt, output in _rows(trace.arrived_ns, trace.prompt_tokens, trace.output_tokens):
        seconds, ticks = divmod((ns + 50) // 100, 10**7)
        yield f"{_AZURE_EPOCH + timedelta(seconds=seconds)}.{ticks:07d},{prompt},{output}\n"


# --------------------------------------------------------------------------------------
# Mooncake


def mooncake_lines(trace: TraceColumns) -> Lines:
    """Mooncake's four fields, times in milliseconds, an id for each started block of 512 tokens;
    where the trace has them, also the `session_id`, `delay` and `priority` of its dialect.
    """
    blocks = _mooncake_blocks(trace)
    columns = (trace.arrived_ns, trace.prompt_tokens, trace.output_tokens)
    rows = _rows(*columns, trace.think_ns, trace.priority)
    sessions = words_of(trace, "session", _ALL)
    for index, (values, session) in enumerate(zip(rows, sessions, strict=False)):
        arrived_ns, prompt, output, think_ns, priority = values
        row = {
            "timestamp": _milliseconds(arrived_ns),
            "input_length": prompt,
            "output_length": output,
            "hash_ids": blocks(index),
        }
        if session:
            row["session_id"] = session
        if think_ns >= 0:
            row["delay"] = _milliseconds(think_ns)
        if priority:
            row["priority"] = priority
        yield _json_line(row)


def _milliseconds(ns: int) -> int:
    return (ns + 500_000) // 1_000_000


def _mooncake_blocks(trace: TraceColumns) -> Callable[[int], list[int]]:
    """The ids of a request's started blocks of 512 tokens.

    The trace's own where they are just that. Otherwise a block is known by its end and by the
    piece in which it ends: that piece's id stands for everything before. What no id covers gets
    blocks that no other request has.
    """
    started = -(-trace.prompt_tokens // _BLOCK_TOKENS)
    if trace.block_tokens == _BLOCK_TOKENS and np.array_equal(trace.block_count, started):
        return trace.blocks
    numbers: dict[tuple[int, int], int] = {}

    def blocks(request: int) -> list[int]:
        prompt_tokens = int(trace.prompt_tokens[request])
        pieces = trace.pieces(request)
        piece_ends = list(accumulate(tokens for _, tokens in pieces))
        ids = []
        for begin in range(0, prompt_tokens, _BLOCK_TOKENS):
            end = min(begin + _BLOCK_TOKENS, prompt_tokens)
            piece = bisect_left(piece_ends, end)
            segment = pieces[piece][0] if piece < len(pieces) else own_segment(request)
            ids.append(numbers.setdefault((segment, end), len(numbers)))
        return ids

    return blocks


def mooncake_losses(trace: TraceColumns) -> Lines:
    """What other block sizes, other readers' sessions and whole milliseconds cost."""
    if trace.block_count.any() and trace.block_tokens != _BLOCK_TOKENS:
        size = f"blocks of {trace.block_tokens} tokens" if trace.block_tokens else "pieces"
        yield (
            f"shared prefixes: {size} become blocks of {_BLOCK_TOKENS}; what is shared for less "
            "than a whole one is lost"
        )
    by_themselves = _later_turns(trace) & (trace.think_ns < 0)
    if by_themselves.any():
        yield (
            "sessions: later turns keep their times, but Dynamo lets them wait for the answer "
            f"before {counted(int(by_themselves.sum()), trace)}"
        )
    rounded = int(np.count_nonzero((trace.think_ns >= 0) & (trace.think_ns % 1_000_000 != 0)))
    if rounded:
        yield f"pauses before next turns: rounded to 1,000,000 ns {counted(rounded, trace)}"


def _later_turns(trace: TraceColumns) -> NDArray[np.bool_]:
    """Which requests are of a session that an earlier request is of."""
    later = np.zeros(len(trace), dtype=np.bool_)
    if "session" in trace.words:
        codes = trace.words["session"].codes
        later[:] = codes >= 0
        later[np.unique(codes, return_index=True)[1]] = False
    return later


# --------------------------------------------------------------------------------------
# LLMServingSim


def llmservingsim_lines(trace: TraceColumns) -> Lines:
    """A line a request; turns that wait for one another are `sub_requests` of one line.

    LLMServingSim keeps one chain of turns by the name of its session, so a session's second
    chain is named NAME#2, and so on.
    """
    following = next_turns(trace)
    chains: Counter[str] = Counter()
    for first, session in _first_turns(trace, following):
        arrival = {"arrival_time_ns": int(trace.arrived_ns[first])}
        if following[first] < 0:
            name = {"session_id": session} if session else {}
            yield _json_line(name | arrival | _lengths(trace, first))
            continue
        chains[session] += 1
        part = f"#{chains[session]}" if chains[session] > 1 else ""
        turns = list(_turns(trace, first, following))
        yield _json_line({"session_id": session + part, **arrival, "sub_requests": turns})


def _first_turns(trace: TraceColumns, following: Column) -> Iterator[tuple[int, str]]:
    """The requests that wait for no answer, and their sessions."""
    sessions = words_of(trace, "session", _ALL)
    waiting = set(following.tolist())
    pairs = zip(range(len(trace)), sessions, strict=False)
    return (pair for pair in pairs if pair[0] not in waiting)


def _turns(trace: TraceColumns, turn: int, following: Column) -> Iterator[dict[str, int]]:
    """A turn and those that wait for it. The pause belongs to the turn that it comes after."""
    while turn >= 0:
        later = int(following[turn])
        pause_ns = int(trace.think_ns[later]) if later >= 0 else 0
        yield _lengths(trace, turn) | {"tool_duration_ns": pause_ns}
        turn = later


def _lengths(trace: TraceColumns, request: int) -> dict[str, int]:
    prompt, output = trace.prompt_tokens[request], trace.output_tokens[request]
    return {"input_toks": int(prompt), "output_toks": int(output)}


def llmservingsim_losses(trace: TraceColumns) -> Lines:
    """What is lost by having one arrival a line, and one chain of turns a session."""
    following = next_turns(trace)
    waits = following >= 0
    moved = trace.arrived_ns[waits] != trace.arrived_ns[following[waits]]
    if moved.any():
        yield f"arrivals: later turns keep only their pauses {counted(int(moved.sum()), trace)}"
    firsts = _first_turns(trace, following)
    chains = Counter(session for first, session in firsts if following[first] >= 0)
    renamed = sum(count - 1 for count in chains.values())
    if renamed:
        yield f"sessions: {renamed:,} that begin again become NAME#2 and so on"
