"""Step records: how one is made of what vLLM's scheduler shows, and the file they go to.

One JSON object a step that had anything to compute. Standard library only, and nothing of vLLM:
schedulers and requests are read by their attributes.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from runtime.vllm_plugin import RECORDS_VARIABLE, version_warning

Record: TypeAlias = dict[str, Any]
Chunk: TypeAlias = tuple[int, int, int]
"""(computed, tokens, known): a sequence's tokens computed before this step and scheduled in it,
and how many had to be known before it could decode, all but the last."""

_FLUSH_S = 0.5
"""A reader sees a step at most this much later, whether or not the engine goes on."""


def warn(line: str) -> None:
    """One line on the worker's stderr, where its own log goes."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# --------------------------------------------------------------------------------------
# What a step computes


def batch_columns(chunks: Iterable[Chunk]) -> Record:
    """Tokens of a batch by kind. A prefill chunk of n tokens behind s computed ones attends
    n*s + n*(n+1)/2 token pairs; a decode attends its context, itself included."""
    prefill_tokens = prefill_seqs = prefill_pairs = decode_seqs = decode_context_tokens = 0
    for computed, tokens, known in chunks:
        if computed < known:
            prefill_seqs += 1
            prefill_tokens += tokens
            prefill_pairs += tokens * computed + tokens * (tokens + 1) // 2
        else:
            decode_seqs += 1
            decode_context_tokens += computed + tokens
    return {
        "prefill_tokens": prefill_tokens,
        "prefill_seqs": prefill_seqs,
        "prefill_pairs": prefill_pairs,
        "decode_seqs": decode_seqs,
        "decode_context_tokens": decode_context_tokens,
    }


def scheduled_chunks(scheduler: Any, output: Any) -> Iterable[Chunk]:
    """The chunks of a vLLM `SchedulerOutput`, right after `schedule()`, which has by then counted
    them as computed.

    What a preempted sequence recomputes, outputs among it, is prefill until only its last token
    is left.
    """
    for request_id, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[request_id]
        known = max(request.num_prompt_tokens, request.num_tokens - 1)
        yield request.num_computed_tokens - tokens, tokens, known


def gauges(scheduler: Any) -> Record:
    """The scheduler's state after `schedule()`."""
    running, waiting = scheduler.get_request_counts()
    return {
        "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "running": running,
        "waiting": waiting,
    }


# --------------------------------------------------------------------------------------
# How long it takes


@dataclass(frozen=True, slots=True)
class _OpenStep:
    """A batch whose output is not processed yet."""

    number: int
    batch: object
    start_s: float
    returned_s: float
    overlapped: bool
    """Scheduled while an earlier batch was executing."""
    columns: Record


class StepTimes:
    """Divides an engine's wall time among its steps, of which two or more may be in flight.

    A step executes from the return of `schedule()`, or from the output of the step before when
    that came later, until its own output is there. The host's work counts where no other step
    executes meanwhile. So no instant is counted twice, and execution, host and gap of successive
    steps add up to the time that passed.
    """

    def __init__(self) -> None:
        self._open: deque[_OpenStep] = deque()
        self._number = 0
        self._received_s = float("-inf")
        self._ended_s: float | None = None

    def scheduled(self, batch: object, start_s: float, returned_s: float, columns: Record) -> None:
        """`schedule()` ran from `start_s` to `returned_s` (monotonic) and made this batch."""
        self._number += 1
        step = _OpenStep(self._number, batch, start_s, returned_s, bool(self._open), columns)
        self._open.append(step)

    def processed(self, batch: object, received_s: float, ended_s: float) -> Record | None:
        """Its output arrived and was processed by `ended_s`: the record. None for a batch that
        computed nothing and preempted nobody.

        Outputs come in the order of the batches; one that got none is forgotten.
        """
        while self._open:
            step = self._open.popleft()
            if step.batch is batch:
                return self._record(step, received_s, ended_s)
        return None

    def _record(self, step: _OpenStep, received_s: float, ended_s: float) -> Record | None:
        columns = step.columns
        if not (columns["prefill_seqs"] or columns["decode_seqs"] or columns["preempted"]):
            return None
        host_s = 0.0 if step.overlapped else step.returned_s - step.start_s
        host_s += 0.0 if self._open else ended_s - received_s
        gap_s = None
        if self._ended_s is not None:
            gap_s = 0.0 if step.overlapped else round(step.start_s - self._ended_s, 7)
        exec_s = received_s - max(step.returned_s, self._received_s)
        self._received_s, self._ended_s = received_s, ended_s
        return {
            "step": step.number,
            "start_s": round(step.start_s, 7),
            "exec_s": round(exec_s, 7),
            "host_s": round(host_s, 7),
            "gap_s": gap_s,
            **columns,
        }


# --------------------------------------------------------------------------------------
# Where it goes


class RecordFile:
    """A file that lines are added to. They are formatted at once, which takes microseconds; a
    thread of its own writes them, so that the last ones of a busy period do not stay behind.

    A disk that takes no more ends the recording with one warning; the engine goes on.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, keeping what it holds. Raises RuntimeError when that fails."""
        try:
            self._file = path.open("ab", buffering=1 << 20)
        except OSError as error:
            raise RuntimeError(
                f"{RECORDS_VARIABLE}: {path}: cannot be written ({error.strerror})"
            ) from error
        self._closing = threading.Event()
        threading.Thread(target=self._flush_regularly, name="step-records", daemon=True).start()
        atexit.register(self.close)

    def write(self, record: Record) -> None:
        """Add one line; nothing once the file is closed."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._closed_on_error():
            self._file.write(line)

    def close(self) -> None:
        """Write what is left. May be called again."""
        self._closing.set()
        with self._closed_on_error():
            self._file.close()
        atexit.unregister(self.close)

    def _flush_regularly(self) -> None:
        while not self._closing.wait(_FLUSH_S):
            with self._closed_on_error():
                self._file.flush()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._closing.set()
            warn(f"viisim: {self._file.name}: {error.strerror}; step records are lost")
            with suppress(OSError):  # what is left in its buffer
                self._file.close()
        except ValueError:  # it is closed
            self._closing.set()


def records_path(engine_index: int) -> Path | None:
    """The file of an engine: what the variable names, and for the further engines of a
    data-parallel worker `NAME.1.steps.jsonl` and so on. None when it is not set."""
    named = os.environ.get(RECORDS_VARIABLE)
    if not named:
        return None
    path = Path(named)
    if engine_index == 0:
        return path
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}.{engine_index}{dot}{suffixes}")


def open_records(engine_index: int, version: str) -> RecordFile | None:
    """The file to write to, after a warning where vLLM's version is not the tested one. None,
    with a warning, when the variable is not set."""
    path = records_path(engine_index)
    if path is None:
        warn(f"viisim: {RECORDS_VARIABLE} is not set: no step is recorded")
        return None
    warning = version_warning(version)
    if warning is not None:
        warn(warning)
    return RecordFile(path)


class StepRecorder:
    """Records the steps of one scheduler; its two methods are called by that.

    Whatever goes wrong in here (another vLLM lacks an attribute) ends the recording with one
    warning; the engine goes on.
    """

    def __init__(self, file: RecordFile, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._file: RecordFile | None = file
        self._clock_s = clock_s
        self._times = StepTimes()

    def scheduled(self, scheduler: Any, output: Any, start_s: float, preempted: int) -> None:
        """`schedule()`, called at `start_s`, has made `output`."""
        if self._file is None:
            return
        try:
            columns = batch_columns(scheduled_chunks(scheduler, output)) | gauges(scheduler)
        except Exception as error:
            self._give_up(error)
            return
        columns["preempted"] = preempted
        self._times.scheduled(output, start_s, self._clock_s(), columns)

    def processed(self, output: Any, received_s: float) -> None:
        """The output of this batch, there since `received_s`, has been processed."""
        if self._file is None:
            return
        record = self._times.processed(output, received_s, self._clock_s())
        if record is None:
            return
        try:
            self._file.write(record)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left; record nothing further."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _give_up(self, error: Exception) -> None:
        warn(f"viisim: step records end here: {type(error).__name__}: {error}")
        self.close()
