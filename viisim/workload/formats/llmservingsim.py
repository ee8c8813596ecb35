"""LLMServingSim workloads, JSON lines in *nanoseconds*.

- A request: `input_toks`, `output_toks`, `arrival_time_ns` and perhaps `input_tok_ids`. Of the
  token ids each full block of 16 becomes a chained id; the tail stays the request's own.
- An agentic session: `session_id`, `arrival_time_ns` and `sub_requests`. A sub-request follows
  the answer to the one before it after the latter's `tool_duration_ns`. Both kinds may mix.
- Workloads whose token ids were replaced by block ids have Mooncake's names, with times in
  *milliseconds* and one id for each *full* block of 16 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from viisim.workload.formats.mooncake import BLOCK_TOKENS as MOONCAKE_BLOCK_TOKENS
from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    NS_PER_MS,
    BadRowError,
    Fields,
    chained,
    full_ids,
    nanoseconds,
    needed,
    short,
    started_blocks,
    tokens,
    word,
)

BLOCK_TOKENS = 16


class LlmServingSimReader(JsonReader):
    """Reads flat requests and agentic sessions."""

    name = "llmservingsim"
    fields = ("arrival_time_ns",)
    words = ("session",)
    block_tokens = BLOCK_TOKENS

    def of(self, fields: Fields) -> Sequence[Row]:
        (time,) = needed(fields, "arrival_time_ns", of="a request")
        arrived_ns = nanoseconds("arrival_time_ns", time, 1)
        session = word("session_id", fields.get("session_id"))
        if "sub_requests" not in fields:
            return (_request(fields, arrived_ns, session, -1),)
        return list(_turns(fields["sub_requests"], arrived_ns, session))


def _turns(turns: Any, arrived_ns: int, session: str) -> Iterator[Row]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"`sub_requests` is {short(turns)}; it must be a list of requests")
    if not session:
        raise BadRowError("`session_id` missing; sub_requests need it")
    pause_ns = -1
    for turn in turns:
        yield _request(turn, arrived_ns, session, pause_ns)
        pause_ns = nanoseconds("tool_duration_ns", turn.get("tool_duration_ns", 0), 1)


def _request(fields: Fields, arrived_ns: int, session: str, think_ns: int) -> Row:
    prompt, output = needed(fields, "input_toks", "output_toks", of="a request")
    prompt = tokens("input_toks", prompt, 1)
    return Row(
        arrived_ns,
        prompt,
        tokens("output_toks", output),
        _block_ids(fields.get("input_tok_ids") or [], prompt),
        think_ns=think_ns,
        words=(session,),
    )


def _block_ids(token_ids: Any, prompt_tokens: int) -> Sequence[int]:
    if not isinstance(token_ids, list) or len(token_ids) > prompt_tokens:
        raise BadRowError(
            f"`input_tok_ids` is {short(token_ids)}; it must be a list of at most the "
            f"{prompt_tokens} of `input_toks`"
        )
    ids, chain = [], 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        chain = chained(chain, token_ids[start : start + BLOCK_TOKENS])
        ids.append(chain)
    return ids


class BlockedReader(JsonReader):
    """Reads workloads with block ids in the place of token ids."""

    name = "llmservingsim_blocks"
    fields = ("timestamp", "input_length", "output_length", "hash_ids")
    block_tokens = BLOCK_TOKENS

    def of(self, fields: Fields) -> Sequence[Row]:
        time, prompt, output, ids = needed(fields, *self.fields, of="a row")
        prompt = tokens("input_length", prompt, 1)
        ids = full_ids(ids, prompt, BLOCK_TOKENS)
        arrived_ns = nanoseconds("timestamp", time, NS_PER_MS)
        return (Row(arrived_ns, prompt, tokens("output_length", output), ids),)


def is_blocked(head: Sequence[Fields]) -> bool:
    """Whether all first rows have as many ids as full blocks of 16, and not all of them as many
    as Mooncake's started blocks of 512."""
    counts = [_counts(row) for row in head]
    return all(ids == full for ids, full, _ in counts) and any(
        ids != started for ids, _, started in counts
    )


def _counts(row: Fields) -> tuple[int, int, int]:
    """Ids of a row, its full blocks of 16, its started blocks of 512."""
    prompt, ids = row.get("input_length"), row.get("hash_ids")
    if type(prompt) is not int or not isinstance(ids, list):
        return -1, 0, 0
    return len(ids), prompt // BLOCK_TOKENS, started_blocks(prompt, MOONCAKE_BLOCK_TOKENS)
