"""RAGPulse JSON lines: prompts made of components that other prompts share.

`timestamp` is a *string* of whole seconds. `hash_ids` lists the ids of the components by kind, in
the order in which they stand in the prompt; their lengths are in files beside the trace
(`1_sys_prompt.jsonl` and so on, plain or .gz). A prompt is a few tokens longer than its
components together. Without any of those files the trace is read without shared components.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from viisim.errors import InputError
from viisim.workload.formats.rows import JsonReader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    BadRowError,
    Fields,
    chained,
    json_object,
    nanoseconds,
    needed,
    number,
    short,
    tokens,
    word,
)

#: Kinds of components in the order of the prompt, with the side file and its id field.
_COMPONENTS = {
    "sys_prompt": ("1_sys_prompt.jsonl", "sys_prompt_id"),
    "passages_ids": ("2_passages.jsonl", "passage_id"),
    "history": ("3_history.jsonl", "history_id"),
    "web_search": ("5_web_search.jsonl", "web_search_id"),
    "user_input": ("4_user_input.jsonl", "user_input_id"),
}


class RagPulseReader(JsonReader):
    """Reads a RAGPulse trace and the lengths beside it."""

    name = "ragpulse"
    fields = ("timestamp", "input_length", "output_length", "hash_ids")
    words = ("session",)

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._lengths = _component_lengths(folder) if folder else {}
        self.own_lengths = bool(self._lengths)

    def of(self, fields: Fields) -> Sequence[Row]:
        time, prompt, output, components = needed(fields, *self.fields, of="a RAGPulse row")
        seconds = number(time) if isinstance(time, str) else time
        prompt = tokens("input_length", prompt, 1)
        ids, lengths = self._pieces(components, prompt) if self.own_lengths else ((), ())
        return (
            Row(
                nanoseconds("timestamp", seconds, NS_PER_S),
                prompt,
                tokens("output_length", output),
                ids,
                lengths,
                words=(word("session_id", fields.get("session_id")),),
            ),
        )

    def _pieces(self, components: Any, prompt_tokens: int) -> tuple[list[int], list[int]]:
        """Chained ids, since what a component computes depends on what stands before it."""
        ids, lengths, chain = [], [], 0
        for kind in _COMPONENTS:
            for component in _listed(components, kind):
                length = self._lengths.get((kind, component))
                if length is None:
                    raise BadRowError(
                        f"`{kind}` {short(component)} has no length in {_COMPONENTS[kind][0]} "
                        "beside the trace: add it"
                    )
                if length:
                    chain = chained(chain, (component, length))
                    ids.append(chain)
                    lengths.append(length)
        if sum(lengths) > prompt_tokens:
            raise BadRowError(
                f"the components of `hash_ids` have {sum(lengths)} tokens, more than the "
                f"{prompt_tokens} of `input_length`: correct the row"
            )
        return ids, lengths


def _listed(components: Any, kind: str) -> list[Any]:
    ids = components.get(kind, []) if isinstance(components, dict) else None
    if not isinstance(ids, list) or not all(isinstance(component, int) for component in ids):
        raise BadRowError(
            f"`hash_ids` is {short(components)}; it must hold a list of ids for each of "
            f"{', '.join(_COMPONENTS)}"
        )
    return ids


def _component_lengths(folder: Path) -> dict[tuple[str, int], int]:
    """Tokens of each (kind, id) in the side files that are there."""
    lengths: dict[tuple[str, int], int] = {}
    for kind, (name, id_field) in _COMPONENTS.items():
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is not None:
            lengths.update(((kind, id_), size) for id_, size in _side_file(path, id_field))
    return lengths


def _side_file(path: Path, id_field: str) -> Iterator[tuple[int, int]]:
    opened = gzip.open if path.suffix == ".gz" else open
    line = 0
    try:
        with opened(path, "rt", encoding="utf-8") as text:
            for line, record in enumerate(text, 1):  # noqa: B007 - the error names it
                if not record.isspace():
                    component = json_object(record)
                    id_, length = needed(component, id_field, "token_length", of="a component")
                    yield tokens(id_field, id_), tokens("token_length", length)
    except BadRowError as problem:
        raise InputError(f"{path}:{line}: {problem}") from None
    except (EOFError, zlib.error, UnicodeDecodeError, OSError) as problem:
        raise InputError(f"{path}: {problem}; fetch it again") from None
