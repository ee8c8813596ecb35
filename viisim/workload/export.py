"""Writes traces in the formats of other simulators and load generators.

Every format holds less than another: what a trace loses in one is said in a line each, and
everything else comes back when the file is read again.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from viisim.documents import nearest
from viisim.errors import InputError
from viisim.workload import export_formats
from viisim.workload.export_formats import Lines, counted
from viisim.workload.trace_file import TraceColumns

_PREFIXES = "shared prefixes"
_SESSIONS, _PAUSES, _PRIORITIES = "sessions", "pauses before next turns", "priorities"
_WORDS = {
    "session": _SESSIONS,
    "tenant": "tenants",
    "traffic_class": "traffic classes",
    "model": "models",
}


def _nothing(_: TraceColumns) -> Lines:
    yield from ()


@dataclass(frozen=True, slots=True)
class Exporter:
    """One format that a trace can be written in."""

    title: str
    resolution_ns: int
    """Arrivals are rounded to multiples of it."""
    holds: frozenset[str]
    """What it has a field for, besides arrivals and lengths."""
    lines: Callable[[TraceColumns], Lines]
    """The text of a trace, line by line, with line ends."""
    also_loses: Callable[[TraceColumns], Lines] = _nothing

    def losses(self, trace: TraceColumns) -> Lines:
        """What the trace holds and the format cannot, a line each."""
        rounded = int(np.count_nonzero(trace.arrived_ns % self.resolution_ns))
        if rounded:
            yield f"arrivals: rounded to {self.resolution_ns:,} ns {counted(rounded, trace)}"
        for fact, requests in _facts(trace):
            if requests and fact not in self.holds:
                yield f"{fact}: left out of {self.title} {counted(requests, trace)}"
        yield from self.also_loses(trace)


def export_trace(trace: TraceColumns, target: str, file: Path) -> list[str]:
    """Write a trace in the format `target`, a key of EXPORTERS; gzip if the name ends in `.gz`.

    Returns what the format cannot hold of it, a line each. The file is written aside and
    renamed, so it is whole or not there; what had its name is replaced. The same trace gives
    the same bytes. Raises InputError for an unknown format or a path that cannot be written.
    """
    exporter = EXPORTERS.get(target)
    if exporter is None:
        raise InputError(f"unknown trace format {target!r}. {nearest(target, EXPORTERS)}")
    _write(file, exporter.lines(trace))
    return list(exporter.losses(trace))


def _write(file: Path, lines: Iterable[str]) -> None:
    aside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with open(aside, "wb") as raw, _text(raw, packed=file.suffix == ".gz") as text:
            text.writelines(lines)
        aside.replace(file)
    except OSError as problem:
        raise InputError(f"{file}: {problem.strerror}; give a path that can be written") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _text(raw: BinaryIO, packed: bool) -> io.TextIOWrapper:
    data = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
    return io.TextIOWrapper(cast(BinaryIO, data), encoding="utf-8", newline="\n")


def _facts(trace: TraceColumns) -> Iterator[tuple[str, int]]:
    """What a trace may hold besides arrivals and lengths, and how many requests have it."""
    yield _PREFIXES, int(np.count_nonzero(trace.block_count))
    yield _PAUSES, int(np.count_nonzero(trace.think_ns >= 0))
    yield _PRIORITIES, int(np.count_nonzero(trace.priority))
    for name, words in trace.words.items():
        yield _WORDS[name], int(np.count_nonzero(words.codes >= 0))


EXPORTERS: Mapping[str, Exporter] = {
    "mooncake": Exporter(
        "Mooncake JSONL",
        1_000_000,
        frozenset({_PREFIXES, _SESSIONS, _PAUSES, _PRIORITIES}),
        export_formats.mooncake_lines,
        export_formats.mooncake_losses,
    ),
    "vidur": Exporter("vidur CSV", 1, frozenset(), export_formats.vidur_lines),
    "azure": Exporter("Azure CSV", 100, frozenset(), export_formats.azure_lines),
    "splitwise": Exporter("splitwise-sim CSV", 1, frozenset(), export_formats.splitwise_lines),
    "llmservingsim": Exporter(
        "LLMServingSim JSONL",
        1,
        frozenset({_SESSIONS, _PAUSES}),
        export_formats.llmservingsim_lines,
        export_formats.llmservingsim_losses,
    ),
}
"""The formats that a trace can be written in, by the name to ask for."""
