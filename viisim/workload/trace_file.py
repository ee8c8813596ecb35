"""Reads recorded traces into columns, whatever their format, plain or gzip.

A file is recognised by what it holds, not by its name: `trace_formats` lists what is known.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from viisim.errors import InputError
from viisim.workload.trace_formats import (
    MOONCAKE_BLOCK_TOKENS,
    BadLineError,
    Row,
    azure_rows,
    mooncake_rows,
)

Column: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TraceColumns:
    """A trace in memory: 32 bytes a request, and 8 a prefix block."""

    format: str
    arrived_ns: Column
    """Since the first arrival, never decreasing."""
    prompt_tokens: Column
    output_tokens: Column
    """As recorded: 0 is possible."""
    block_tokens: int
    """Prompt tokens per hash id; 0 when the format has none."""
    first_block: Column
    """Where in `block_ids` a request's ids begin."""
    block_ids: Column

    def __len__(self) -> int:
        return len(self.arrived_ns)

    def blocks(self, request: int) -> list[int]:
        """The hash ids of a request's prompt, the last one perhaps for a partial block."""
        if not self.block_tokens:
            return []
        start = int(self.first_block[request])
        count = ceil(int(self.prompt_tokens[request]) / self.block_tokens)
        return cast("list[int]", self.block_ids[start : start + count].tolist())


def read_trace(path: str | Path) -> TraceColumns:
    """The trace in `path`, sorted by arrival (equal times keep the order of the file).

    Raises InputError, naming the file and the line, for anything that is not such a trace.
    """
    lines = _Lines()
    try:
        with open(path, "rb") as file, _text(file) as text:
            return _recognised(lines.of(text))
    except BadLineError as problem:
        raise InputError(f"{path}:{lines.number}: {problem}") from None
    except csv.Error as problem:
        raise InputError(f"{path}:{lines.number}: {problem}; correct or delete the row") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        where = f"{path}:{lines.number + 1}"
        raise InputError(f"{where}: the gzip data are cut or damaged; fetch it again") from None
    except UnicodeDecodeError:
        where = f"{path}:{lines.number + 1}"
        raise InputError(f"{where}: not UTF-8 text; give an Azure CSV or Mooncake JSONL") from None
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; give a readable trace file") from None


class _Lines:
    """Counts the lines of a text as they are read."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, text: io.TextIOWrapper) -> Iterator[str]:
        for line in text:
            self.number += 1
            yield line


def _text(file: io.BufferedReader) -> io.TextIOWrapper:
    """The file as text, unpacked if it is gzip. Line ends stay: the CSV reader wants them."""
    is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
    data = gzip.GzipFile(fileobj=file) if is_gzip else file
    return io.TextIOWrapper(cast(BinaryIO, data), encoding="utf-8-sig", newline="\n")


def _recognised(text: Iterator[str]) -> TraceColumns:
    first = next((line for line in text if line.strip()), None)
    if first is None:
        raise BadLineError("the file is empty; give an Azure CSV or Mooncake JSONL")
    text = chain([first], text)
    if first.lstrip().startswith("{"):
        return _columns("mooncake", MOONCAKE_BLOCK_TOKENS, mooncake_rows(text))
    return _columns("azure", 0, azure_rows(text))


def _columns(trace_format: str, block_tokens: int, rows: Iterator[Row]) -> TraceColumns:
    """Collects the rows in 64-bit arrays, sorts them and counts time from the first."""
    arrived_ns, prompts, outputs, first_block, block_ids = (array("q") for _ in range(5))
    for arrived, prompt, output, blocks in rows:
        arrived_ns.append(arrived)
        prompts.append(prompt)
        outputs.append(output)
        first_block.append(len(block_ids))
        block_ids.extend(blocks)
    if not arrived_ns:
        raise BadLineError("there are no requests; give a trace with at least one row")
    arrivals = np.array(arrived_ns)
    order = np.argsort(arrivals, kind="stable")
    return TraceColumns(
        format=trace_format,
        arrived_ns=arrivals[order] - arrivals[order[0]],
        prompt_tokens=np.array(prompts)[order],
        output_tokens=np.array(outputs)[order],
        block_tokens=block_tokens,
        first_block=np.array(first_block)[order],
        block_ids=np.array(block_ids, dtype=np.int64),
    )
