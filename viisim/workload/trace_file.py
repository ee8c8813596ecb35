"""Reads recorded traces into columns, whatever their format, plain or gzip.

A file is recognised by what it holds, not by its name: `formats` lists what is known.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from viisim.errors import InputError
from viisim.workload.formats import HEAD_LINES, reader_of
from viisim.workload.formats.columns import Column, ColumnsBuilder, TraceColumns, Words
from viisim.workload.formats.records import RunReader, run_records
from viisim.workload.formats.rows import CsvReader, Reader
from viisim.workload.formats.values import BadRowError, UnfinishedError

__all__ = ["Column", "TraceColumns", "Words", "read_trace"]

Line = TypeVar("Line")

RUN_FILE = "requests.parquet"
_PARQUET = b"PAR1"


def read_trace(path: str | Path, *, skip_bad: bool = False) -> TraceColumns:
    """The trace in `path`, sorted by arrival (equal times keep the order of the file).

    `path` may be a run directory. With `skip_bad`, broken rows are left out and counted. Raises
    InputError, naming the file and the line, for anything that is not such a trace.
    """
    path = Path(path)
    if (path / RUN_FILE).is_file():
        path = path / RUN_FILE
    lines = _Lines()
    try:
        with open(path, "rb") as file:
            if file.peek(4)[:4] == _PARQUET:
                return _columns(RunReader(), lines.of(run_records(path)), lines, skip_bad)
            with _text(file) as text:
                return _read_text(text, path.parent, lines, skip_bad)
    except BadRowError as problem:
        raise InputError(f"{path}:{lines.number}: {problem}") from None
    except csv.Error as problem:
        raise InputError(f"{path}:{lines.number}: {problem}; correct or delete the row") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        where = f"{path}:{lines.number + 1}"
        raise InputError(f"{where}: the gzip data are cut or damaged; fetch it again") from None
    except UnicodeDecodeError:
        where = f"{path}:{lines.number + 1}"
        raise InputError(f"{where}: not UTF-8 text; give a trace as CSV or JSON lines") from None
    except OSError as problem:
        repair = "give a readable trace file or run directory"
        raise InputError(f"{path}: {problem.strerror}; {repair}") from None


class _Lines:
    """Counts the lines of a text, or the rows of a table, as they are read."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            self.number += 1
            yield line


def _text(file: io.BufferedReader) -> io.TextIOWrapper:
    """The file as text, unpacked if it is gzip. Line ends stay: the CSV reader wants them."""
    is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
    data = gzip.GzipFile(fileobj=file) if is_gzip else file
    return io.TextIOWrapper(cast(BinaryIO, data), encoding="utf-8-sig", newline="\n")


def _read_text(text: Iterable[str], folder: Path, lines: _Lines, skip_bad: bool) -> TraceColumns:
    text = iter(text)
    head = _head(lines.of(text))
    first = next((line for line in head if not line.isspace()), None)
    if first is None:
        raise BadRowError("the file is empty; give a trace as CSV or JSON lines")
    # Lines are counted anew: from here on they are read one by one.
    lines.number = head.index(first) + 1
    reader = reader_of(head[lines.number - 1 :], folder)
    lines.number = 0
    counted = lines.of(chain(head, text))
    if not isinstance(reader, CsvReader):
        return _columns(reader, counted, lines, skip_bad)
    records = csv.reader(counted)
    next(cells for cells in records if any(cells))  # the header
    return _columns(reader, records, lines, skip_bad)


def _head(lines: Iterator[str]) -> list[str]:
    """The first lines, up to HEAD_LINES that are not blank."""
    head: list[str] = []
    held = 0
    for line in lines:
        head.append(line)
        held += not line.isspace()
        if held == HEAD_LINES:
            break
    return head


def _columns(
    reader: Reader[Line], records: Iterator[Line], lines: _Lines, skip_bad: bool
) -> TraceColumns:
    builder = ColumnsBuilder(reader)
    while True:
        try:
            record = next(records, None)
            if record is None:
                break
            for row in reader.rows(record):
                builder.add(row)
        except (BadRowError, csv.Error) as problem:
            if not (skip_bad or isinstance(problem, UnfinishedError)):
                raise
            builder.skip(lines.number, str(problem))
    for unfinished in reader.unfinished():
        builder.skip(lines.number, unfinished)
    if not len(builder):
        raise BadRowError(_nothing(builder))
    return builder.columns()


def _nothing(builder: ColumnsBuilder) -> str:
    if not builder.skipped_rows:
        return "there are no requests; give a trace with at least one row"
    return f"none of {builder.skipped_rows} requests can be used; line {builder.first_bad}"
