"""A trace in memory: one column for each fact about a request."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from viisim.workload.formats.rows import Reader, Row

Column: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Words:
    """A column of words, each kept once."""

    codes: Column
    """Indices into `names`; -1 where a row has none."""
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TraceColumns:
    """A trace in memory: 56 bytes a request, 8 for each word, and 8 for each hash id."""

    format: str
    arrived_ns: Column
    """Since the first arrival, never decreasing. A turn without a recorded time has the time of
    the turn before it."""
    prompt_tokens: Column
    output_tokens: Column
    """As recorded: 0 is possible."""
    block_tokens: int
    """Prompt tokens per hash id; 0 where the format has no ids, or ids of pieces with lengths
    of their own."""
    first_block: Column
    """Where in `block_ids` a request's ids begin."""
    block_count: Column
    """How many ids a request has: the started blocks of a Mooncake or Qwen prompt, the full
    blocks of a Weka prompt."""
    block_ids: Column
    """Chained: equal ids mean equal prompts up to there."""
    piece_tokens: Column | None
    """Where ids stand for pieces with lengths of their own: the tokens of each of `block_ids`."""
    think_ns: Column
    """Closed loop: the pause after the answer to the previous turn of the session; -1 where a
    request comes at `arrived_ns`, whatever happened to others."""
    priority: Column
    """Smaller is more urgent; 0 where the format has none."""
    words: Mapping[str, Words]
    """Of "session", "tenant", "traffic_class" and "model", those that the format has."""
    skipped_rows: int
    """Broken rows that `skip_bad` passed over."""
    first_bad: str
    """The first of them, as "line: what is wrong with it"; empty without any."""

    def __len__(self) -> int:
        return len(self.arrived_ns)

    def blocks(self, request: int) -> list[int]:
        """The chained ids of a request's prompt."""
        start = int(self.first_block[request])
        stop = start + int(self.block_count[request])
        return cast("list[int]", self.block_ids[start:stop].tolist())

    def pieces(self, request: int) -> list[tuple[int, int]]:
        """(id, tokens) of the part of a prompt that others may share, from its beginning.

        What is left of `prompt_tokens` behind them is the request's own.
        """
        ids = self.blocks(request)
        if self.piece_tokens is not None:
            start = int(self.first_block[request])
            return list(zip(ids, self.piece_tokens[start : start + len(ids)].tolist(), strict=True))
        pieces = [(block, self.block_tokens) for block in ids]
        beyond = len(ids) * self.block_tokens - int(self.prompt_tokens[request])
        if beyond > 0:  # the last block is a started one
            pieces[-1] = (ids[-1], self.block_tokens - beyond)
        return pieces


class ColumnsBuilder:
    """Collects the rows of a reader in 64-bit arrays."""

    def __init__(self, reader: Reader[Any]) -> None:
        self._reader = reader
        self._numbers = [array("q") for _ in range(6)]
        self._ids, self._piece_tokens = array("q"), array("q")
        self._codes = [array("q") for _ in reader.words]
        self._names: list[dict[str, int]] = [{"": -1} for _ in reader.words]
        self.skipped_rows = 0
        self.first_bad = ""

    def __len__(self) -> int:
        return len(self._numbers[0])

    def add(self, row: Row) -> None:
        """One more request, whatever its time."""
        arrived, prompts, outputs, first_block, thinks, priorities = self._numbers
        arrived.append(row.arrived_ns)
        prompts.append(row.prompt_tokens)
        outputs.append(row.output_tokens)
        first_block.append(len(self._ids))
        thinks.append(row.think_ns)
        priorities.append(row.priority)
        if row.ids:
            self._ids.extend(row.ids)
            self._piece_tokens.extend(row.piece_tokens)
        for name, codes, names in zip(row.words, self._codes, self._names, strict=True):
            codes.append(names.setdefault(name, len(names) - 1))

    def skip(self, line: int, problem: str) -> None:
        """Counts a request that is left out."""
        self.skipped_rows += 1
        self.first_bad = self.first_bad or f"{line}: {problem}"

    def columns(self) -> TraceColumns:
        """Sorted by arrival, with time from the first."""
        numbers = [np.array(column) for column in self._numbers]
        order = np.argsort(numbers[0], kind="stable")
        block_count = np.diff(numbers[3], append=len(self._ids))[order]
        arrived, prompts, outputs, first_block, thinks, priorities = (n[order] for n in numbers)
        return TraceColumns(
            format=self._reader.name,
            arrived_ns=arrived - arrived[0],
            prompt_tokens=prompts,
            output_tokens=outputs,
            block_tokens=self._reader.block_tokens,
            first_block=first_block,
            block_count=block_count,
            block_ids=np.array(self._ids),
            piece_tokens=np.array(self._piece_tokens) if self._reader.own_lengths else None,
            think_ns=thinks,
            priority=priorities,
            words=self._words(order),
            skipped_rows=self.skipped_rows,
            first_bad=self.first_bad,
        )

    def _words(self, order: Column) -> dict[str, Words]:
        """The columns with at least one word."""
        columns = zip(self._reader.words, self._codes, self._names, strict=True)
        return {
            word: Words(np.array(codes)[order], tuple(names)[1:])
            for word, codes, names in columns
            if len(names) > 1
        }
