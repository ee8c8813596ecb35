"""A row of a trace, and the readers that make rows of the records of a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

from viisim.workload.formats.values import BadRowError, Fields, json_object

Record = TypeVar("Record")


class Row(NamedTuple):
    """One request, in the units of `TraceColumns`."""

    arrived_ns: int
    """On whatever clock the file has."""
    prompt_tokens: int
    output_tokens: int
    ids: Sequence[int] = ()
    """Chained."""
    piece_tokens: Sequence[int] = ()
    """Tokens of each id, where a reader has `own_lengths`."""
    think_ns: int = -1
    priority: int = 0
    words: tuple[str, ...] = ()
    """In the order of the reader's `words`."""


# -- readers --


class Reader(ABC, Generic[Record]):
    """Makes rows of the records of one file; made anew for every file."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """The fields or columns by which the format is known."""
    words: ClassVar[tuple[str, ...]] = ()
    """Which of "session", "tenant", "traffic_class" and "model" a row has."""
    block_tokens: int = 0
    own_lengths: bool = False

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """Whether a file whose rows have these fields or columns is of this format."""
        return all(field in names for field in cls.fields)

    @abstractmethod
    def rows(self, record: Record) -> Sequence[Row]:
        """The requests of one record. Raises BadRowError; then none of them counts."""

    def unfinished(self) -> Iterable[str]:
        """At the end of the file: the requests that were begun but never became rows."""
        return ()


class CsvReader(Reader[list[str]]):
    """Reads cells by the names of their columns; a column that is not there has empty cells."""

    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, header: Sequence[str]) -> None:
        names = [name.strip() for name in header]
        self._width = len(names)
        columns = (*self.fields, *self.optional)
        self.missing = {name for name in columns if name not in names}
        # An empty cell is put behind the last one; index -1 reads it.
        self._pick = itemgetter(*(names.index(c) if c in names else -1 for c in columns))

    def rows(self, record: list[str]) -> Sequence[Row]:
        if not record:
            return ()
        if len(record) != self._width:
            raise BadRowError(
                f"{len(record)} cells under {self._width} columns; complete or delete the row"
            )
        return (self.row(*self._pick([*record, ""])),)

    @abstractmethod
    def row(self, *cells: str) -> Row:
        """The request of the cells under `fields` and `optional`."""


class JsonReader(Reader[str]):
    """Reads one JSON object a line."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is where the file lies: a format may keep more files beside it."""

    def rows(self, record: str) -> Sequence[Row]:
        return self.of(json_object(record)) if not record.isspace() else ()

    @abstractmethod
    def of(self, fields: Fields) -> Sequence[Row]:
        """The requests of one object."""
