"""Checks of the values in a row: each returns what a row needs or raises BadRowError."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from math import isfinite
from typing import Any, TypeAlias

from viisim.workload.parameters import MAX_TOKENS

Fields: TypeAlias = Mapping[str, Any]

NS_PER_S, NS_PER_MS = 10**9, 10**6

_MAX_INT64 = 2**63 - 1
_MOST_DIGITS = 19
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)


class BadRowError(ValueError):
    """What is wrong with a row, and the repair."""


class UnfinishedError(BadRowError):
    """Nothing is wrong with the row, but its request never got its answer, whose length is
    therefore unknown: it is left out and counted without being asked to."""


def json_object(line: str) -> dict[str, Any]:
    """The object in a line. Raises BadRowError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object; correct or delete the row")
    return value


def needed(fields: Fields, *names: str, of: str) -> list[Any]:
    """The values under `names`, of which none may be missing."""
    missing = [f"`{name}`" for name in names if name not in fields]
    if missing:
        raise BadRowError(f"{', '.join(missing)} missing; {of} needs {', '.join(names)}")
    return [fields[name] for name in names]


def number(cell: str) -> int | str:
    """A cell as a whole number where it is one in plain digits, else as it is."""
    digits = cell.strip()
    plain = digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS
    return int(digits) if plain else cell


def decimal(cell: str) -> float | str:
    """A cell as a number where it is one, else as it is."""
    try:
        return float(cell)
    except ValueError:
        return cell


def tokens(name: str, value: object, least: int = 0) -> int:
    """A token count. A prompt of 0 tokens cannot be served; an output of 0 can be recorded."""
    if type(value) is int and least <= value <= MAX_TOKENS:
        return value
    failed = ", since a prompt without tokens cannot be served" if value == 0 else ""
    raise BadRowError(
        f"`{name}` is {short(value)}; it must be a whole number from {least}{failed}: "
        "correct or delete the row"
    )


def nanoseconds(name: str, value: object, unit_ns: int, *, negative: bool = False) -> int:
    """A time or a pause, from 0 unless it may be `negative`, given in units of `unit_ns`."""
    # Half of the range each way, so that no difference of two times leaves it.
    least, most = (-_MAX_INT64 // 2, _MAX_INT64 // 2) if negative else (0, _MAX_INT64)
    if type(value) is int and least <= value * unit_ns <= most:
        return value * unit_ns
    if type(value) is float and isfinite(value) and least <= value * unit_ns < most:
        return round(value * unit_ns)
    unit = {1: "nanoseconds", NS_PER_MS: "milliseconds", NS_PER_S: "seconds"}[unit_ns]
    raise BadRowError(
        f"`{name}` is {short(value)}; it must be {unit}{'' if negative else ' from 0'}"
    )


def wall_clock_ns(name: str, stamp: object) -> int:
    """Nanoseconds since 1970, to the last digit given (a float would lose the seventh)."""
    match = _TIMESTAMP.fullmatch(stamp.strip()) if isinstance(stamp, str) else None
    try:
        if match is None:
            raise ValueError
        seconds, fraction, zone = match.groups()
        ns = _seconds_since_1970(seconds, zone) * NS_PER_S + int((fraction or "").ljust(9, "0"))
        if not 0 <= ns <= _MAX_INT64:
            raise ValueError
    except ValueError:
        raise BadRowError(
            f"`{name}` is {short(stamp)}; write it as YYYY-MM-DD HH:MM:SS.fffffff"
        ) from None
    return ns


@lru_cache(maxsize=64)
def _seconds_since_1970(stamp: str, zone: str | None) -> int:
    """Cached, because neighbouring rows mostly share their second."""
    return (datetime.fromisoformat(stamp + (zone or "+00:00")) - _EPOCH) // timedelta(seconds=1)


def priority(fields: Fields) -> int:
    """The `priority` of a row, where smaller is more urgent; 0 without one."""
    value = fields.get("priority")
    if value is None:
        return 0
    if type(value) is not int or abs(value) >= 2**31:
        raise BadRowError(f"`priority` is {short(value)}; it must be a whole number of 32 bits")
    return value


def word(name: str, value: object) -> str:
    """A name as text; None is none."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    raise BadRowError(f"`{name}` is {short(value)}; it must be a name or a number")


def started_blocks(prompt_tokens: int, block_tokens: int) -> int:
    """Blocks that a prompt needs, the last one perhaps partly filled."""
    return -(-prompt_tokens // block_tokens)


def started_ids(value: object, prompt_tokens: int, block_tokens: int) -> Sequence[int]:
    """Ids of which there is one for each started block of a prompt, or none at all."""
    blocks = started_blocks(prompt_tokens, block_tokens)
    return _ids_of(value, blocks, f"started block of {block_tokens} of the {prompt_tokens}")


def full_ids(value: object, prompt_tokens: int, block_tokens: int) -> Sequence[int]:
    """Ids of which there is one for each full block of a prompt, or none at all."""
    blocks = prompt_tokens // block_tokens
    return _ids_of(value, blocks, f"full block of {block_tokens} of the {prompt_tokens}")


def _ids_of(value: object, blocks: int, what: str) -> Sequence[int]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or len(value) != blocks:
        raise BadRowError(
            f"`hash_ids` must be a list of {blocks}, one for each {what} prompt tokens: "
            "correct the row"
        )
    return hash_ids(value)


def hash_ids(value: object, name: str = "hash_ids") -> Sequence[int]:
    """A list of ids from 0 to 2^63 - 1."""
    if not isinstance(value, list):
        raise BadRowError(f"`{name}` is {short(value)}; it must be a list of whole numbers")
    try:
        ids = array("q", value)
        if ids and min(ids) < 0:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        wrong = next(v for v in value if type(v) is not int or not 0 <= v <= _MAX_INT64)
        raise BadRowError(
            f"`{name}` holds {short(wrong)}; use whole numbers from 0 to 2^63 - 1"
        ) from None
    return ids


def chained(previous: int, content: object) -> int:
    """A 63-bit id of `content` behind the prefix `previous`, the same in every process."""
    digest = hashlib.blake2b(f"{previous}:{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def short(value: object) -> str:
    """The value as the file has it, cut to what fits a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
