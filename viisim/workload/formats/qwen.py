"""Qwen-Bailian JSON lines: Mooncake's names with other units.

`timestamp` is in *seconds*, an id of `hash_ids` stands for each *started* block of *16* prompt
tokens. `chat_id` names a request and `parent_chat_id` the one it goes on from (-1: none); all
that descend from one root are a session. `type` (text, search, image, ...) is the traffic class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    Fields,
    nanoseconds,
    needed,
    started_ids,
    tokens,
    word,
)

_NO_PARENT = ("", "-1")


class QwenReader(JsonReader):
    """Reads a Qwen-Bailian usage trace."""

    name = "qwen_bailian"
    fields = ("chat_id", "timestamp", "input_length", "output_length")
    words = ("session", "traffic_class")
    block_tokens = 16

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._roots: dict[str, str] = {}

    def of(self, fields: Fields) -> Sequence[Row]:
        chat, time, prompt, output = needed(fields, *self.fields, of="a Qwen-Bailian row")
        chat = word("chat_id", chat)
        parent = word("parent_chat_id", fields.get("parent_chat_id"))
        # A parent before the beginning of the file still ties its children together.
        root = chat if parent in _NO_PARENT else self._roots.get(parent, parent)
        prompt = tokens("input_length", prompt, 1)
        row = Row(
            nanoseconds("timestamp", time, NS_PER_S),
            prompt,
            tokens("output_length", output),
            started_ids(fields.get("hash_ids"), prompt, self.block_tokens),
            words=(root, word("type", fields.get("type"))),
        )
        self._roots[chat] = root
        return (row,)
