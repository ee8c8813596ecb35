"""The journal of a proxy, which runs for months: a folder of files of bounded size and number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from policies.core import SchedulerCore
from policies.interface import Action, ConfigChanged, Event
from policies.journal import Segment, checkpoint
from viisim.errors import InputError
from viisim.journal import JournalWriter

log = logging.getLogger(__name__)

_EVENTS_PER_LOOK = 256


class RollingJournal:
    """The journal of a proxy: a folder of files that each replay alone, the oldest thrown away.

    Files are numbered on from what the folder holds. Every line is handed to the system at once,
    so that a killed proxy loses none. A file that cannot be written, on a full disk say, ends
    the journal and not the service: it is logged, and what was written stays replayable.

    Raises InputError when the folder cannot be written, PolicyError when the policy cannot be
    pickled for a checkpoint.
    """

    def __init__(
        self, folder: Path, head: Segment, core: SchedulerCore, file_bytes: int, files: int
    ) -> None:
        self._folder = folder
        self._head = head
        self._core = core
        self._file_bytes = file_bytes
        self._files = files
        self._events = 0
        checkpoint(core)  # not hours later, when the first file is full
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--journal {folder}: {error.strerror}; give a folder") from error
        numbers = (int(path.stem.rpartition("-")[2]) for path in self.paths())
        self._number = max(numbers, default=0)
        self._writer: JournalWriter | None = self._next_file(head)

    def paths(self) -> list[Path]:
        """The journal's files, oldest first."""
        return sorted(self._folder.glob("journal-[0-9][0-9][0-9][0-9][0-9][0-9].jsonl"))

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """See `runtime.worker.Journal`."""
        if self._writer is None:
            return
        try:
            self._writer.record(event, actions)
            if isinstance(event, ConfigChanged) and event.policy is not None:
                self._head = replace(self._head, policy=event.policy)
            self._events += 1
            # The size is looked up now and then only: it costs a system call.
            if self._events % _EVENTS_PER_LOOK == 0 and self._is_full(self._writer):
                self._roll(self._writer)
        except (InputError, OSError) as error:
            log.error("the journal ends here: %s", error)
            with suppress(InputError):
                self.close()

    def close(self) -> None:
        """Record no more."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _is_full(self, writer: JournalWriter) -> bool:
        return writer.path.stat().st_size >= self._file_bytes

    def _roll(self, writer: JournalWriter) -> None:
        writer.close()
        state = checkpoint(self._core)
        self._writer = self._next_file(
            replace(self._head, limits=self._core.limits, checkpoint=state)
        )

    def _next_file(self, head: Segment) -> JournalWriter:
        self._number += 1
        path = self._folder / f"journal-{self._number:06d}.jsonl"
        writer = JournalWriter(path, head, buffered=False)
        for old in self.paths()[: -self._files]:
            old.unlink(missing_ok=True)
        return writer
