"""Journals on disk: written by either driver, read back, replayed.

A journal is JSONL in the language of `policies.journal`. The same run writes the same bytes: no
clock, no host, no path. Every file stands alone: when a journal is rotated, the next file opens
with a checkpoint of the core, so that old files can be thrown away.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from policies.core import SchedulerCore
from policies.interface import Action, Event
from policies.journal import (
    Difference,
    JournalError,
    Line,
    Replay,
    Segment,
    checkpoint,
    encode_action,
    encode_event,
    handled_line,
    parse_line,
    segment_line,
)
from policies.registry import PolicySpecError
from viisim.errors import InputError

# -- writing --


class JournalWriter:
    """Writes what a driver's core handled; use it as a context manager.

    `head` says what the core was made from; `head.make_core()` makes one that fits. With `core`,
    the journal is rotated after every `segment_events` events: the next file opens with a
    checkpoint of the core, and the files are called `journal.jsonl`, `journal.1.jsonl`,
    `journal.2.jsonl`, and so on. `buffered` False hands every line to the system at once, so
    that a crash of the process loses none.

    Raises InputError when a file exists already or cannot be written, PolicyError when the
    policy cannot be pickled for a checkpoint.
    """

    def __init__(
        self,
        path: Path | str,
        head: Segment,
        *,
        core: SchedulerCore | None = None,
        segment_events: int | None = None,
        buffered: bool = True,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix == ".gz":
            raise InputError(f"{path}: journals are written plain: drop .gz, compress afterwards")
        if (core is None) != (segment_events is None):
            raise TypeError("rotation needs both the core and segment_events")
        self._head = head
        self._core = core
        self._segment_events = segment_events
        self._buffered = buffered
        self._segments = 0
        self._events = 0
        self._open_segment(head)

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one event that the core has just handled, and the actions it returned."""
        self._write(handled_line(event, actions))
        self._events += 1
        if self._core is not None and self._events == self._segment_events:
            state = checkpoint(self._core)
            self.close()
            self._open_segment(replace(self._head, limits=self._core.limits, checkpoint=state))

    def close(self) -> None:
        """Write out what is buffered. Closing twice is harmless."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_segment(self, head: Segment) -> None:
        number = f".{self._segments}" if self._segments else ""
        self._current = self.path.with_name(f"{self.path.stem}{number}{self.path.suffix}")
        self._segments += 1
        self._events = 0
        try:
            self._file = self._current.open(
                "x", encoding="ascii", newline="\n", buffering=-1 if self._buffered else 1
            )
        except FileExistsError as error:
            raise InputError(
                f"{self._current}: exists already; name another journal or move this one away"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        self._write(segment_line(head))

    def _write(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self._current}: cannot write the journal ({error.strerror}); "
            "name a file in a writable folder with room"
        )


# -- reading --


class JournalReader:
    """The lines of a journal file with their numbers; `.gz` is read transparently.

    A last line cut short by a crash is left out, and `truncated` is True afterwards. Any other
    broken line raises InputError naming file and line.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.truncated = False

    def __iter__(self) -> Iterator[tuple[int, Line]]:
        number = 0
        for number, text in self._numbered():
            try:
                yield number, parse_line(text)
            except JournalError as error:
                # The writer ends every line with a line feed: without one it was cut off.
                if text.endswith(b"\n"):
                    raise self.fault(number, error) from error
                self.truncated = True
        if number == 0:
            raise InputError(f"{self.path}: holds no whole line; a journal opens with a segment")

    def fault(self, number: int, error: Exception) -> InputError:
        """An error of line `number`, as the user is told."""
        return InputError(
            f"{self.path}: line {number}: {error}; restore the file, or replay a copy of the "
            "lines before this one"
        )

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self._open() as file:
                yield from enumerate(file, start=1)
        except EOFError:  # the compressed stream ends early
            self.truncated = True
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.path}: cannot read the journal ({reason}); check the path and the file"
            ) from error

    def _open(self) -> IO[bytes] | gzip.GzipFile:
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rb")
        return self.path.open("rb")


# -- replaying --


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found."""

    journal: str
    """The file's name, without its folder."""
    segments: int
    events: int
    actions: int
    """Actions that came out as recorded, or differently in the last event."""
    truncated: bool
    """The last line was cut short by a crash and left out."""
    line: int | None = None
    """The line of the first difference."""
    difference: Difference | None = None

    @property
    def equal(self) -> bool:
        """Whether every event caused the recorded actions."""
        return self.difference is None

    def to_dict(self) -> dict[str, Any]:
        """The report for programs (`--json`)."""
        return {
            "journal": self.journal,
            "equal": self.equal,
            "segments": self.segments,
            "events": self.events,
            "actions": self.actions,
            "truncated": self.truncated,
            "difference": self._difference(),
        }

    def __str__(self) -> str:
        """The report for people."""
        counts = f"{self.events:,} events, {self.actions:,} actions, segments: {self.segments}"
        cut = "; the last line is cut short and was left out" if self.truncated else ""
        if self.difference is None:
            return f"{self.journal}: {counts}: replayed with zero differences{cut}"
        return f"{self.journal}: line {self.line}: {self.difference}\n(after {counts}{cut})"

    def _difference(self) -> dict[str, Any] | None:
        if self.difference is None:
            return None
        return {
            "line": self.line,
            "event": encode_event(self.difference.event),
            "recorded": [encode_action(action) for action in self.difference.recorded],
            "replayed": [encode_action(action) for action in self.difference.replayed],
            "error": self.difference.error,
        }


def replay_journal(
    path: Path | str, *, trust: bool = False, folder: Path | None = None
) -> ReplayReport:
    """Feed a journal's events to fresh cores and stop at the first difference.

    `trust` allows checkpoints, with which rotated files open: loading one can run code.
    `folder` is where relative policy files are looked up (default: the current one). Raises
    InputError when the journal, or the policy it names, cannot be used.
    """
    reader = JournalReader(path)
    replay = Replay(folder)
    for number, line in reader:
        if isinstance(line, Segment) and line.checkpoint is not None and not trust:
            raise InputError(
                f"{path}: line {number}: the segment opens with a checkpoint, and loading one can "
                "run code; if you trust where the journal comes from, pass --trust"
            )
        try:
            difference = replay.take(line)
        except (JournalError, PolicySpecError) as error:
            raise reader.fault(number, error) from error
        if difference is not None:
            return _report(reader, replay, number, difference)
    return _report(reader, replay)


def _report(
    reader: JournalReader,
    replay: Replay,
    line: int | None = None,
    difference: Difference | None = None,
) -> ReplayReport:
    return ReplayReport(
        reader.path.name,
        replay.segments,
        replay.events,
        replay.actions,
        reader.truncated,
        line,
        difference,
    )
