"""Agentic sessions of Weka and kv-cache-tester: one JSON object each, alone or one a line.

Times are in seconds, `requests[].t` from the beginning of the session. `hash_ids` has one id for
each *full* block of `block_size` prompt tokens (the rest has none), chained, and local to the
session unless `hash_id_scope` is "global". `hash_ranges` may stand in its place: half-open
ranges of ids. Requests are closed-loop: `think_time` passes between an answer and the next.

A `subagent` among the requests has a conversation of its own: it becomes a session that begins at
its `t`. The parent waited for it; its own next `think_time` includes that wait.

Sessions have no time among each other: all begin at 0 s.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    BadRowError,
    Fields,
    full_ids,
    nanoseconds,
    needed,
    short,
    tokens,
    word,
)

_LOCAL_IDS = 2**32


class WekaReader(JsonReader):
    """Reads sessions, subagents included."""

    name = "weka"
    fields = ("block_size", "requests")
    words = ("session", "model")

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._sessions = 0

    def of(self, fields: Fields) -> Sequence[Row]:
        block_tokens, requests = needed(fields, *self.fields, of="a session")
        self._set_block_tokens(tokens("block_size", block_tokens, 1))
        self._sessions += 1
        is_global = fields.get("hash_id_scope") == "global"
        first_id = 0 if is_global else self._sessions * _LOCAL_IDS
        name = word("id", fields.get("id")) or f"session {self._sessions}"
        return list(self._turns(requests, name, 0, first_id))

    def _set_block_tokens(self, block_tokens: int) -> None:
        if self.block_tokens and block_tokens != self.block_tokens:
            raise BadRowError(
                f"`block_size` is {block_tokens}, but {self.block_tokens} in the first session; "
                "keep sessions of different block sizes in different files"
            )
        self.block_tokens = block_tokens

    def _turns(self, requests: Any, session: str, start_ns: int, first_id: int) -> Iterator[Row]:
        if not isinstance(requests, list):
            raise BadRowError(f"`requests` is {short(requests)}; it must be a list of requests")
        turns = agents = 0
        for request in requests:
            if not isinstance(request, dict):
                raise BadRowError(f"`requests` holds {short(request)}; it must hold objects")
            (begin,) = needed(request, "t", of="a request")
            at_ns = start_ns + nanoseconds("t", begin, NS_PER_S)
            if request.get("type") == "subagent":
                agents += 1
                own = word("agent_id", request.get("agent_id")) or f"agent {agents}"
                yield from self._turns(request.get("requests"), f"{session}/{own}", at_ns, first_id)
            else:
                yield self._turn(request, session, at_ns, first_id, is_first=not turns)
                turns += 1

    def _turn(
        self, request: Fields, session: str, at_ns: int, first_id: int, *, is_first: bool
    ) -> Row:
        prompt, output = needed(request, "in", "out", of="a request")
        prompt = tokens("in", prompt, 1)
        think_ns = nanoseconds("think_time", request.get("think_time", 0), NS_PER_S)
        return Row(
            at_ns,
            prompt,
            tokens("out", output),
            self._ids(request, prompt, first_id),
            think_ns=-1 if is_first else think_ns,
            words=(session, word("model", request.get("model"))),
        )

    def _ids(self, request: Fields, prompt_tokens: int, first_id: int) -> Sequence[int]:
        ids = request.get("hash_ids")
        if ids is None and "hash_ranges" in request:
            ids = _in_ranges(request["hash_ranges"], prompt_tokens // self.block_tokens)
        local = full_ids(ids, prompt_tokens, self.block_tokens)
        if not first_id:
            return local
        if local and max(local) >= _LOCAL_IDS:
            raise BadRowError(f"`hash_ids` holds {max(local)}; local ids must be below 2^32")
        return array("q", [first_id + block for block in local])


def _in_ranges(ranges: Any, most: int) -> list[int]:
    """The ids in half-open ranges, cut one behind `most`, which is one too many."""
    ids: list[int] = []
    try:
        for first, stop in ranges:
            ids.extend(range(first, min(stop, first + most + 1)))
    except (TypeError, ValueError):
        raise BadRowError(
            f"`hash_ranges` is {short(ranges)}; it must be a list of [first, behind the last]"
        ) from None
    return ids
