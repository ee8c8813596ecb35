"""Mooncake JSON lines, their session dialect, and what looks like them.

`timestamp` (ms), `input_length`, `output_length` and `hash_ids`: one id for each *started* block
of 512 prompt tokens, equal ids meaning equal prompts up to there. A prompt without ids is shared
with nobody. The dialect of aiperf's `mooncake_trace` and of Dynamo adds `session_id`, `delay`
(ms) and `priority`, and accepts `input_tokens`, `output_tokens`, `created_time` and `delay_ms`.

A later turn of a session with a `delay` is closed-loop: it follows the answer to the turn before
it after that pause. A later turn that has only a `timestamp` comes at that time, as recorded;
Dynamo itself would wait for the answer and then for the difference of the timestamps.

Three formats use the names `timestamp`, `input_length` and `output_length`. Decided by the first
rows of a file:

- ids for the *full* blocks of 16 tokens, where 512 does not fit: LLMServingSim (`llmservingsim`);
- no ids, no session, no delay and at least one `timestamp` with a decimal point: guidellm's
  `trace_synthetic`, in seconds;
- everything else is Mooncake, in milliseconds. A guidellm file whose times are all whole numbers
  cannot be told from it: write one of them as 1.0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    NS_PER_MS,
    NS_PER_S,
    BadRowError,
    Fields,
    nanoseconds,
    needed,
    priority,
    started_ids,
    tokens,
    word,
)

BLOCK_TOKENS = 512

_ALIASES = {
    "input_tokens": "input_length",
    "output_tokens": "output_length",
    "created_time": "timestamp",
    "delay_ms": "delay",
}
_NOT_GUIDELLM = ("hash_ids", "session_id", "delay", "delay_ms", "priority", "request_id")


class MooncakeReader(JsonReader):
    """Reads Mooncake rows, with sessions and delays or without."""

    name = "mooncake"
    fields = ("input_length", "output_length")
    words = ("session",)
    block_tokens = BLOCK_TOKENS

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._turn_before_ns: dict[str, int] = {}

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        canonical = {_ALIASES.get(name, name) for name in names}
        return canonical.issuperset(cls.fields) and not canonical.isdisjoint(("timestamp", "delay"))

    def of(self, fields: Fields) -> Sequence[Row]:
        if any(name in fields for name in _ALIASES):
            fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
        session = word("session_id", fields.get("session_id"))
        row = self._row(fields, session)
        if session:
            self._turn_before_ns[session] = row.arrived_ns
        return (row,)

    def _row(self, fields: Fields, session: str) -> Row:
        if fields.get("wait_for"):
            raise BadRowError("`wait_for` is not supported; order the turns of a session instead")
        before_ns = self._turn_before_ns.get(session)
        arrived_ns, think_ns = _times(fields, before_ns)
        lengths = needed(fields, "input_length", "output_length", of="a Mooncake row")
        prompt = tokens("input_length", lengths[0], 1)
        output = tokens("output_length", lengths[1])
        ids = started_ids(fields.get("hash_ids"), prompt, self.block_tokens)
        return Row(
            arrived_ns,
            prompt,
            output,
            ids,
            think_ns=think_ns,
            priority=priority(fields),
            words=(session,),
        )


def _times(fields: Fields, before_ns: int | None) -> tuple[int, int]:
    """When a row arrives, and how long it waits for the answer to the turn `before_ns`."""
    stamp, delay = fields.get("timestamp"), fields.get("delay")
    if before_ns is None:
        if "timestamp" not in fields:
            raise BadRowError(
                "`timestamp` missing; a row needs it, unless it has a `delay` after an earlier "
                "row of its session_id"
            )
        return nanoseconds("timestamp", stamp, NS_PER_MS), -1
    if stamp is None and delay is None:
        raise BadRowError("a later turn of a session needs `delay` or `timestamp`: add one")
    arrived_ns = before_ns if stamp is None else nanoseconds("timestamp", stamp, NS_PER_MS)
    think_ns = -1 if delay is None else nanoseconds("delay", delay, NS_PER_MS)
    return arrived_ns, think_ns


class GuidellmReader(JsonReader):
    """Reads guidellm's `trace_synthetic` JSON lines: as Mooncake without ids, but in seconds."""

    name = "guidellm"
    fields = ("timestamp", "input_length", "output_length")

    def of(self, fields: Fields) -> Sequence[Row]:
        time, prompt, output = needed(fields, *self.fields, of="a guidellm row")
        if foreign := [f"`{name}`" for name in _NOT_GUIDELLM if name in fields]:
            raise BadRowError(
                f"{', '.join(foreign)} in a row of guidellm, which the first rows of the file "
                "look like: delete the row"
            )
        return (
            Row(
                nanoseconds("timestamp", time, NS_PER_S),
                tokens("input_length", prompt, 1),
                tokens("output_length", output),
            ),
        )


def is_guidellm(head: Sequence[Fields]) -> bool:
    """Whether the first rows of a file are guidellm's; the rule is at the top."""
    plain = all(not any(name in row for name in _NOT_GUIDELLM) for row in head)
    return plain and any(isinstance(row.get("timestamp"), float) for row in head)
