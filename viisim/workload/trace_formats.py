"""The rows of each trace format, read by field or column name.

- Azure: CSV of the Azure Public Dataset with the columns TIMESTAMP (wall clock, up to 9 decimals,
  optional zone), ContextTokens and GeneratedTokens.
- Mooncake: JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`: one
  id for each started block of 512 prompt tokens, where equal ids mean equal prompts up to there.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from math import ceil, isfinite
from typing import Any, TypeAlias

from viisim.workload.parameters import MAX_TOKENS

Row: TypeAlias = tuple[int, int, int, list[int]]
"""Arrival (ns), prompt tokens, output tokens, hash ids."""

MOONCAKE_BLOCK_TOKENS = 512

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_INT64 = 2**63 - 1
_MOST_DIGITS = 19


class BadLineError(ValueError):
    """What is wrong with the line just read, and the repair."""


def azure_rows(text: Iterator[str]) -> Iterator[Row]:
    """The rows of an Azure CSV. Raises BadLineError for the line that was read last."""
    reader = csv.reader(text)
    header = [name.strip() for name in next(reader)]
    missing = [name for name in _AZURE_COLUMNS if name not in header]
    if missing:
        raise BadLineError(
            f"neither Mooncake JSONL nor an Azure CSV: no column {', '.join(missing)} in the "
            f"header; it needs {', '.join(_AZURE_COLUMNS)}"
        )
    stamp, prompt, output = (header.index(name) for name in _AZURE_COLUMNS)
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise BadLineError(
                f"{len(cells)} cells under {len(header)} columns; complete or delete the row"
            )
        yield (
            _wall_clock_ns(cells[stamp]),
            _tokens("ContextTokens", _number(cells[prompt]), 1),
            _tokens("GeneratedTokens", _number(cells[output]), 0),
            [],
        )


def mooncake_rows(text: Iterator[str]) -> Iterator[Row]:
    """The rows of Mooncake JSONL. Raises BadLineError for the line that was read last."""
    for line in text:
        if line.strip():
            row = _json_object(line)
            prompt = _tokens("input_length", row["input_length"], 1)
            output = _tokens("output_length", row["output_length"], 0)
            yield _milliseconds_ns(row["timestamp"]), prompt, output, _hash_ids(row, prompt)


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise BadLineError("not a JSON object; correct or delete the row") from None
    if not isinstance(row, dict):
        raise BadLineError("not a JSON object; correct or delete the row")
    missing = [f"`{name}`" for name in _MOONCAKE_FIELDS if name not in row]
    if missing:
        needs = ", ".join(_MOONCAKE_FIELDS)
        raise BadLineError(f"{', '.join(missing)} missing; a Mooncake row needs {needs}")
    return row


def _number(cell: str) -> int | str:
    """A cell as a number where it is one in plain digits; `_tokens` complains otherwise."""
    digits = cell.strip()
    plain = digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS
    return int(digits) if plain else cell


def _tokens(name: str, value: object, least: int) -> int:
    """A token count. A prompt of 0 tokens cannot be served; an output of 0 can be recorded."""
    if type(value) is not int or not least <= value <= MAX_TOKENS:
        raise BadLineError(
            f"`{name}` is {_short(value)}; it must be a whole number from {least}: "
            "correct or delete the row"
        )
    return value


def _wall_clock_ns(stamp: str) -> int:
    """Nanoseconds since 1970, to the last digit given (a float would lose the seventh)."""
    match = _TIMESTAMP.fullmatch(stamp.strip())
    try:
        if match is None:
            raise ValueError
        seconds, fraction, zone = match.groups()
        moment = datetime.fromisoformat(seconds + (zone or "+00:00"))
        ns = (moment - _EPOCH) // timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0"))
        if not 0 <= ns <= _MAX_INT64:
            raise ValueError
    except ValueError:
        raise BadLineError(
            f"`TIMESTAMP` is {_short(stamp)}; write it as YYYY-MM-DD HH:MM:SS.fffffff"
        ) from None
    return ns


def _milliseconds_ns(value: object) -> int:
    if type(value) is int and 0 <= value <= _MAX_INT64 // 10**6:
        return value * 10**6
    if type(value) is float and isfinite(value) and 0 <= value < _MAX_INT64 / 1e6:
        return round(value * 1e6)
    raise BadLineError(f"`timestamp` is {_short(value)}; it must be milliseconds from 0")


def _hash_ids(row: dict[str, Any], prompt_tokens: int) -> list[int]:
    ids = row["hash_ids"]
    blocks = ceil(prompt_tokens / MOONCAKE_BLOCK_TOKENS)
    if not isinstance(ids, list) or len(ids) != blocks:
        raise BadLineError(
            f"`hash_ids` must be a list of {blocks}, one for each started block of "
            f"{MOONCAKE_BLOCK_TOKENS} of the {prompt_tokens} prompt tokens: correct the row"
        )
    for value in ids:
        if type(value) is not int or not 0 <= value <= _MAX_INT64:
            raise BadLineError(
                f"`hash_ids` holds {_short(value)}; use whole numbers from 0 to 2^63 - 1"
            )
    return ids


def _short(value: object) -> str:
    """The value as the file has it, cut to what fits a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
