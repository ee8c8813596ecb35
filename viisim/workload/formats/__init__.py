"""The trace formats that viisim reads, and how a file is recognised by its first rows.

Every format is a reader in a module of its own family, which says what the format is and what
its units are. Recognition goes by the names of fields or columns; where formats share names,
`mooncake` documents the rule.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from viisim.workload.formats.azure import AzureReader
from viisim.workload.formats.burstgpt import BurstGptReader
from viisim.workload.formats.llmservingsim import (
    BlockedReader,
    LlmServingSimReader,
    is_blocked,
)
from viisim.workload.formats.mooncake import GuidellmReader, MooncakeReader, is_guidellm
from viisim.workload.formats.qwen import QwenReader
from viisim.workload.formats.ragpulse import RagPulseReader
from viisim.workload.formats.records import ClientRecordReader, JournalReader, RunReader
from viisim.workload.formats.rows import CsvReader, JsonReader, Reader
from viisim.workload.formats.tables import GuidellmCsvReader, SplitwiseReader, VidurReader
from viisim.workload.formats.tracelab import TraceLabReader
from viisim.workload.formats.values import BadRowError, Fields, json_object, short
from viisim.workload.formats.weka import WekaReader

Kind = TypeVar("Kind", bound=Reader[Any])

HEAD_LINES = 16
"""As many lines are looked at to recognise a file."""

CSV_READERS: tuple[type[CsvReader], ...] = (
    AzureReader,
    BurstGptReader,
    VidurReader,
    SplitwiseReader,
    GuidellmCsvReader,
)
#: The more particular ones first: several formats have Mooncake's fields and some of their own.
JSON_READERS: tuple[type[JsonReader], ...] = (
    QwenReader,
    WekaReader,
    TraceLabReader,
    LlmServingSimReader,
    ClientRecordReader,
    JournalReader,
    MooncakeReader,
)
_JOURNAL_HEAD = "segment"
_SERVEGEN = ("pool", "clients")


def reader_of(head: Sequence[str], folder: Path) -> Reader[Any]:
    """A reader for the file that begins with the lines `head` and lies in `folder`.

    Raises BadRowError for what is no known format.
    """
    if not head[0].lstrip().startswith("{"):
        header = next(csv.reader(head[:1]))
        kind = _recognised(CSV_READERS, [name.strip() for name in header], "columns")
        return kind(header)
    rows = _objects(head)
    if not rows:
        json_object(head[0])  # raises the reason
    return _json_kind(rows)(folder)


def _json_kind(rows: Sequence[Fields]) -> type[JsonReader]:
    if all(name in rows[0] for name in _SERVEGEN):
        raise BadRowError(
            "a ServeGen pool describes clients, not requests; generate a workload from it with "
            "`kind: servegen`"
        )
    if _JOURNAL_HEAD in rows[0]:
        return JournalReader
    if any(isinstance(row.get("hash_ids"), dict) for row in rows):
        return RagPulseReader
    kind = next((k for row in rows for k in JSON_READERS if k.recognises(row)), None)
    if kind is MooncakeReader and is_guidellm(rows):
        return GuidellmReader
    if kind is MooncakeReader and is_blocked(rows):
        return BlockedReader
    return kind or _recognised(JSON_READERS, list(rows[0]), "fields")


def _objects(head: Sequence[str]) -> list[Fields]:
    """What the lines hold, as far as they can be read."""
    rows: list[Fields] = []
    for line in head:
        try:
            rows.append(json_object(line))
        except BadRowError:
            continue
    return rows


def _recognised(kinds: Sequence[type[Kind]], names: Collection[str], what: str) -> type[Kind]:
    """The kind that recognises the names; otherwise says what the most similar one misses."""
    for kind in kinds:
        if kind.recognises(names):
            return kind
    closest: type[Reader[Any]] = max(
        kinds, key=lambda kind: sum(name in names for name in kind.fields)
    )
    missing = [name for name in closest.fields if name not in names]
    if len(missing) == len(closest.fields):
        hint = f"known are {', '.join(known_formats())}"
    else:
        hint = f"{closest.name} needs {', '.join(missing)} too"
    raise BadRowError(f"no known trace has the {what} {short(', '.join(names))}; {hint}")


def known_formats() -> list[str]:
    """The names of all formats, in alphabetical order."""
    kinds: list[type[Reader[Any]]] = [*CSV_READERS, *JSON_READERS]
    kinds += [RagPulseReader, GuidellmReader, BlockedReader, RunReader]
    return sorted({kind.name for kind in kinds})
