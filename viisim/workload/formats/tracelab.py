"""TraceLab rounds, JSON lines: what coding agents asked a provider, one round of a session a line.

A round is sent with the last of the inputs (a user's message, tool results) that open its
`timing_events`, and answered with the last event. So the pause before a round is what tools and
user took after the answer before it: rounds are closed-loop.

`prefix_tokens` is how much of the prompt the provider had cached, a count without ids. It is
taken as shared with the previous round of the session, in full blocks of 64 tokens; what a
session's first round shared, and with whom, is not recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    BadRowError,
    Fields,
    needed,
    short,
    tokens,
    wall_clock_ns,
    word,
)

_INPUTS = ("user_message", "tool_result")


@dataclass(slots=True)
class _Round:
    answered_ns: int
    ids: Sequence[int]


class TraceLabReader(JsonReader):
    """Reads rounds; those of a session stand in their order."""

    name = "tracelab"
    fields = ("session_id", "input_tokens_total", "output_tokens", "timing_events")
    words = ("session", "model")
    block_tokens = 64

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._before: dict[str, _Round] = {}
        self._next_id = 0

    def of(self, fields: Fields) -> Sequence[Row]:
        session, prompt, output, events = needed(fields, *self.fields, of="a TraceLab round")
        session = word("session_id", session)
        prompt = tokens("input_tokens_total", prompt, 1)
        prefix = tokens("prefix_tokens", fields.get("prefix_tokens") or 0)
        output = tokens("output_tokens", output)
        sent_ns, answered_ns = _times(events)
        before = self._before.get(session)
        ids = self._ids(prompt, prefix, before)
        self._before[session] = _Round(answered_ns, ids)
        think_ns = -1 if before is None else max(0, sent_ns - before.answered_ns)
        model = word("model", fields.get("model"))
        return (Row(sent_ns, prompt, output, ids, think_ns=think_ns, words=(session, model)),)

    def _ids(self, prompt: int, prefix: int, before: _Round | None) -> Sequence[int]:
        blocks = prompt // self.block_tokens
        shared = min(prefix, prompt) // self.block_tokens
        ids = [] if before is None else list(before.ids[:shared])
        first_own = self._next_id
        self._next_id += blocks - len(ids)
        return [*ids, *range(first_own, self._next_id)]


def _times(events: Any) -> tuple[int, int]:
    """When the round was sent, and when its answer was complete."""
    if not isinstance(events, list) or not events or not all(isinstance(e, dict) for e in events):
        raise BadRowError(f"`timing_events` is {short(events)}; it must be a list of events")
    stamps = [wall_clock_ns("timestamp", event.get("timestamp")) for event in events]
    inputs = list(takewhile(lambda event: event.get("event_type") in _INPUTS, events))
    return max(stamps[: max(1, len(inputs))]), max(stamps)
