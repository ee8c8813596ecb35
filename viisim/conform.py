"""Conformance: drive an engine through golden step traces and compare every step.

A golden trace is one run of vLLM's own scheduler: its configuration, the requests and aborts it
was given, and what it did in every step. `replay` gives the same requests and aborts to another
engine and yields what that one did, in the form of the recorded lines; `first_difference` tells
whether and where the two part. Nothing here knows how an engine works inside: anything with the
methods of `StepEngine` can be examined.

The names of configuration values and step fields are those of the trace files (and of vLLM).
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeAlias, TypeVar, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from viisim.errors import InputError

Line: TypeAlias = dict[str, Any]
"""A recorded or replayed step: the JSON object of one line."""

STEP_FIELDS = (
    "aborted",
    "scheduled",
    "new",
    "resumed",
    "preempted",
    "cached",
    "running",
    "computed",
    "waiting",
    "free_blocks",
    "hashes",
    "aborted_after",
    "finished",
    "free_blocks_end",
)
"""The fields of a step that are compared, in the order in which they happen."""
IDLE_FIELDS = ("aborted", "free_blocks")
"""The same for a step in which an abort left nothing to schedule."""

_UNCOMPARED = frozenset({"freeq"})
"""The free queue's order by block number; an engine need not number its blocks."""


# --------------------------------------------------------------------------------------
# What a trace file holds


@dataclass(frozen=True, slots=True)
class GoldenConfig:
    """The scheduler's configuration, as far as its rules read it."""

    name: str
    num_blocks: int
    """Size of the pool, counting block 0, which is never handed out."""
    block_size: int
    """Tokens per block."""
    max_num_active_seqs: int
    """Sequences that may run at once."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    max_model_len: int
    """Tokens of prompt and output at which a request ends."""
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    policy: Literal["fcfs", "priority"]
    long_prefill_token_threshold: int
    """Most tokens of one request in a step that has others; 0: no such cap."""
    long_prefill_token_threshold_adaptive: bool
    """Raise that cap to an equal share of the budget."""
    scheduler_reserve_full_isl: bool
    """Admit a request only when its whole prompt would fit."""
    watermark_blocks: int
    """Blocks an admission must leave free when something is running."""
    async_scheduling: bool = False
    """Schedule a step before the output of the last one is known."""
    kind_of_scenario: str = ""
    """What the scenario is about."""
    max_num_seqs: int | None = None
    """Batch slots of the model runner; no rule reads them. None: `max_num_active_seqs`."""
    watermark: float | None = None
    """The share of `num_blocks` that `watermark_blocks` comes from; None: not known."""

    @property
    def usable_blocks(self) -> int:
        """Blocks that can hold tokens."""
        return self.num_blocks - 1

    @property
    def max_batches_in_flight(self) -> int:
        """Batches that may be scheduled before the oldest one's output is processed."""
        return 2 if self.async_scheduling else 1


@dataclass(frozen=True, slots=True)
class GoldenRequest:
    """A request of a trace."""

    id: str
    arrival_step: int
    arrival_time: float
    """An abstract number; orders requests of equal priority."""
    prompt_tokens: int
    output_tokens: int
    priority: int
    """Smaller is more urgent."""
    prompt: tuple[tuple[int, int], ...]
    """Pieces (segment, tokens). Token k of a piece is (segment, k): the same token wherever
    both numbers agree."""
    out_seg: int
    """The segment that the output forms: output token j is (out_seg, j)."""


@dataclass(frozen=True, slots=True)
class GoldenAbort:
    """A client that leaves: before `schedule()` of step `at_step`, or between that and the
    processing of its output."""

    id: str
    at_step: int
    phase: Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One trace: what the scheduler was given and what it did."""

    name: str
    config: GoldenConfig
    requests: tuple[GoldenRequest, ...]
    aborts: tuple[GoldenAbort, ...]
    steps: tuple[Line, ...]
    """The recorded `step` and `idle` lines."""


# --------------------------------------------------------------------------------------
# Reading trace files

_Record = TypeVar("_Record", GoldenConfig, GoldenRequest, GoldenAbort)

_FORMS: dict[type[Any], TypeAdapter[Any]] = {
    form: TypeAdapter(form) for form in (GoldenConfig, GoldenRequest, GoldenAbort)
}


def golden_files(paths: Iterable[Path]) -> list[Path]:
    """The trace files among `paths`; of a folder, all `.jsonl` and `.jsonl.gz` files in and
    below it, sorted.

    Raises InputError for a path that does not exist or a folder without traces.
    """
    files: dict[Path, None] = {}
    for path in paths:
        files.update(dict.fromkeys(_files_at(path)))
    if not files:
        raise InputError("no golden traces given; name .jsonl or .jsonl.gz files or their folder")
    return list(files)


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; name a golden trace or its folder")
    found = sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
    if not found:
        raise InputError(f"{path}: no golden traces (.jsonl, .jsonl.gz) in this folder")
    return found


def scenarios(paths: Iterable[Path]) -> Iterator[Scenario]:
    """The scenarios of these files and folders, each read when its turn comes.

    Raises InputError at once when there are none, and on reaching a broken file.
    """
    return map(load_scenario, golden_files(paths))


def load_scenario(path: Path) -> Scenario:
    """Read one trace, plain or (by its name, `.gz`) compressed.

    Raises InputError, naming file and line, when it is broken or cut.
    """
    config: GoldenConfig | None = None
    requests: list[GoldenRequest] = []
    aborts: list[GoldenAbort] = []
    steps: list[Line] = []
    ended = False
    for number, line in _numbered_lines(path):
        at = f"{path}:{number}"
        match line.get("kind"):
            case "config":
                config = _record(GoldenConfig, line, at)
            case "request":
                requests.append(_request(line, at))
            case "abort":
                aborts.append(_record(GoldenAbort, line, at))
            case "step":
                steps.append(_with_fields(STEP_FIELDS, line, at))
            case "idle":
                steps.append(_with_fields(IDLE_FIELDS, line, at))
            case "end":
                ended = True
            case kind:
                raise InputError(f"{at}: kind {kind!r} is unknown; is this a golden trace?")
    if config is None:
        raise InputError(f"{path}: has no config line; is this a golden trace?")
    if not ended:
        raise InputError(f"{path}: is cut, it has no end line; record or copy it again")
    return Scenario(config.name, config, tuple(requests), tuple(aborts), tuple(steps))


def _numbered_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Every line's number, from 1, and JSON object."""
    number = 0
    try:
        with _open_text(path) as file:
            for number, text in enumerate(file, start=1):
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise InputError(f"{path}:{number}: is not a JSON object")
                yield number, line
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: is not valid JSON ({error}); repair it") from error
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}:{number + 1}: cannot be decoded ({error}); record or copy it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _record(form: type[_Record], line: Line, at: str) -> _Record:
    try:
        record: _Record = _FORMS[form].validate_python(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{at}: {line['kind']} key {key!r}: {first['msg']}; repair it") from error
    return record


def _request(line: Line, at: str) -> GoldenRequest:
    request = _record(GoldenRequest, line, at)
    tokens = sum(length for _, length in request.prompt)
    if tokens != request.prompt_tokens:
        raise InputError(
            f"{at}: request key 'prompt': its pieces have {tokens} tokens, "
            f"'prompt_tokens' says {request.prompt_tokens}; repair one of them"
        )
    return request


def _with_fields(fields: Sequence[str], line: Line, at: str) -> Line:
    """`line`, which has every field: one that is missing would go uncompared."""
    missing = [field for field in ("step", *fields) if field not in line]
    if missing:
        raise InputError(f"{at}: {line['kind']} key {missing[0]!r} is missing; record it again")
    return line


# --------------------------------------------------------------------------------------
# Driving an engine


@dataclass(frozen=True, slots=True)
class Observation:
    """What one `schedule()` did and left. Ids are request ids; the fields are a step line's."""

    scheduled: list[tuple[str, int]]
    """(id, tokens), in the scheduler's order."""
    new: list[str]
    """Admitted for the first time, in the order of admission."""
    resumed: list[str]
    """Admitted after a preemption."""
    preempted: list[str]
    cached: list[tuple[str, int]]
    """(id, prefix-cache hit tokens) of every request admitted."""
    running: list[str]
    computed: list[int]
    """Computed tokens of `running`, this step's included."""
    waiting: list[str]
    free_blocks: int
    hashes: int
    """Distinct block contents in the prefix cache."""


class StepEngine(Protocol):
    """An engine that can be driven step by step.

    A non-empty batch is in flight from `schedule()` until `update()` has processed its output;
    an empty one never is, as there is no output to wait for.
    """

    @property
    def has_requests(self) -> bool:
        """Whether any request is running or waiting."""

    @property
    def batches_in_flight(self) -> int:
        """Batches scheduled whose output is not processed yet."""

    @property
    def free_blocks(self) -> int:
        """Blocks that no request uses, cached ones included."""

    def add(self, request: GoldenRequest) -> None:
        """A request arrives."""

    def abort(self, request_id: str) -> None:
        """End a request that is running or waiting; it gets no further output."""

    def schedule(self) -> Observation:
        """Form the next batch."""

    def update(self) -> list[str]:
        """Process the output of the oldest batch in flight; ids it ended, in order."""


@runtime_checkable
class NumbersBlocks(Protocol):
    """An engine that numbers its blocks as vLLM does, and can so tell the free queue's order."""

    def freeq_crc(self) -> int:
        """CRC-32 of the free queue's block numbers, front to back, joined by commas."""


class EngineFailed(Exception):  # noqa: N818 - says what happened
    """The engine raised while it was driven; its own exception is the cause."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the engine failed in step {step}")
        self.step = step


def replay(scenario: Scenario, engine: StepEngine) -> Iterator[Line]:
    """Give a scenario's requests and aborts to an engine; yield its `step` and `idle` lines.

    Steps in which the engine has nothing to do are counted but not yielded. An engine that never
    gets done yields for ever. Raises EngineFailed.
    """
    run = _Replay(scenario, engine)
    for step in itertools.count():
        try:
            if run.is_over(step):
                return
            line = run.line(step)
        except Exception as error:
            raise EngineFailed(step) from error
        if line is not None:
            yield line


class _Replay:
    """The step loop around one engine."""

    def __init__(self, scenario: Scenario, engine: StepEngine) -> None:
        self._engine = engine
        self._max_in_flight = scenario.config.max_batches_in_flight
        self._last_arrival = max((r.arrival_step for r in scenario.requests), default=-1)
        self._live: set[str] = set()
        """Ids that have arrived and not ended; an abort of any other does nothing."""
        self._arrivals: defaultdict[int, list[GoldenRequest]] = defaultdict(list)
        for request in scenario.requests:
            self._arrivals[request.arrival_step].append(request)
        self._aborts: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
        for abort in scenario.aborts:
            self._aborts[abort.at_step, abort.phase].append(abort.id)

    def is_over(self, step: int) -> bool:
        return step > self._last_arrival and not self._engine.has_requests

    def line(self, step: int) -> Line | None:
        """Do one step. None when there was nothing to do."""
        for request in self._arrivals[step]:
            self._engine.add(request)
            self._live.add(request.id)
        aborted = self._abort(step, "before")
        if self._engine.has_requests:
            return self._busy_line(step, aborted)
        self._drain()
        if aborted:
            return self._line("idle", step, aborted) | {"free_blocks": self._engine.free_blocks}
        return None

    def _busy_line(self, step: int, aborted: list[str]) -> Line:
        seen = self._engine.schedule()
        line = self._line("step", step, aborted) | {
            "scheduled": [list(pair) for pair in seen.scheduled],
            "new": seen.new,
            "resumed": seen.resumed,
            "preempted": seen.preempted,
            "cached": [list(pair) for pair in seen.cached],
            "running": seen.running,
            "computed": seen.computed,
            "waiting": seen.waiting,
            "free_blocks": seen.free_blocks,
            "hashes": seen.hashes,
            "aborted_after": self._abort(step, "after"),
            "finished": self._output(seen),
            "free_blocks_end": self._engine.free_blocks,
        }
        if isinstance(self._engine, NumbersBlocks):
            line["freeq"] = self._engine.freeq_crc()
        return line

    @staticmethod
    def _line(kind: str, step: int, aborted: list[str]) -> Line:
        return {"kind": kind, "step": step, "aborted": aborted}

    def _abort(self, step: int, phase: str) -> list[str]:
        """The ids aborted now, in the order of the file."""
        aborted = []
        for request_id in self._aborts[step, phase]:
            if request_id in self._live:
                self._engine.abort(request_id)
                self._live.remove(request_id)
                aborted.append(request_id)
        return aborted

    def _output(self, seen: Observation) -> list[str]:
        """Process the oldest batch, unless there is room to schedule another one first."""
        in_flight = self._engine.batches_in_flight
        if not in_flight or (seen.scheduled and in_flight < self._max_in_flight):
            return []
        finished = self._engine.update()
        self._live.difference_update(finished)
        return finished

    def _drain(self) -> None:
        """Process batches whose requests have all ended: nobody sees their output."""
        while self._engine.batches_in_flight:
            self._engine.update()


# --------------------------------------------------------------------------------------
# Recording


def recorded(scenario: Scenario, engine: StepEngine) -> Scenario:
    """The scenario with the steps that this engine makes of it. Raises EngineFailed."""
    return replace(scenario, steps=tuple(replay(scenario, engine)))


def write_scenario(path: Path, scenario: Scenario, configuration: Line | None = None) -> None:
    """Write a trace, compressed if the name says so (`.gz`); the inverse of `load_scenario`.

    `configuration` is what the recorded scheduler says of itself, in place of what it was asked
    for. Equal traces make equal files.
    """
    text = "".join(
        json.dumps(line, separators=(",", ":")) + "\n"
        for line in _trace_lines(scenario, configuration or asdict(scenario.config))
    )
    content = text.encode()
    try:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _trace_lines(scenario: Scenario, configuration: Line) -> Iterator[Line]:
    names = {"name": scenario.name, "kind_of_scenario": scenario.config.kind_of_scenario}
    yield {"kind": "config", "format": 1} | names | configuration
    for request in scenario.requests:
        line = {"kind": "request"} | asdict(request)
        if request.arrival_time == int(request.arrival_time):
            line["arrival_time"] = int(request.arrival_time)
        yield line
    for abort in scenario.aborts:
        yield {"kind": "abort"} | asdict(abort)
    yield from scenario.steps
    yield {"kind": "end"} | _totals([line for line in scenario.steps if line["kind"] == "step"])


def _totals(steps: Sequence[Line]) -> Line:
    """What the last line says of the steps."""
    return {
        "steps": len(steps),
        "preemptions": sum(len(line["preempted"]) for line in steps),
        "resumed": sum(len(line["resumed"]) for line in steps),
        "hit_tokens": sum(tokens for line in steps for _, tokens in line["cached"]),
        "aborted": sum(len(line["aborted"]) + len(line["aborted_after"]) for line in steps),
        "empty_steps": sum(not line["scheduled"] for line in steps),
        "self_preempt_only": sum(
            bool(line["preempted"]) and len(line["scheduled"]) < len(line["running"])
            for line in steps
        ),
        "max_running": max((len(line["running"]) for line in steps), default=0),
        "finished": sum(len(line["finished"]) for line in steps),
    }


# --------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an engine first left the trace. `str()` shows long lists from there on."""

    step: int
    field: str
    """A field of a step line; `step` when one side has a step that the other lacks (None);
    `exception` when the engine raised."""
    expected: object
    got: object

    def __str__(self) -> str:
        expected, got, position = self.expected, self.got, ""
        if isinstance(expected, list) and isinstance(got, list):
            start = _common_prefix_length(expected, got)
            position = f" from item {start}" if start else ""
            expected, got = _excerpt(expected, start), _excerpt(got, start)
        return f"step {self.step}: {self.field}{position}: expected {expected}, got {got}"


def _common_prefix_length(left: list[Any], right: list[Any]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in pairs)


def _excerpt(items: list[Any], start: int, most: int = 6) -> str:
    shown = [repr(item) for item in items[start : start + most]]
    more = len(items) - start - len(shown)
    return "[" + ", ".join(shown + [f"... {more} more"] * (more > 0)) + "]"


def first_difference(
    expected: Iterable[Line], actual: Iterable[Line], ignored: frozenset[str] = _UNCOMPARED
) -> Difference | None:
    """Compare line by line, every field of `expected` but the `ignored` ones; None if equal.

    `actual` is read no further than the first difference.
    """
    for want, got in itertools.zip_longest(expected, actual):
        if want is None:
            return Difference(got["step"], "step", None, got["step"])
        if got is None:
            return Difference(want["step"], "step", want["step"], None)
        for field, value in want.items():
            if field not in ignored and (field not in got or got[field] != value):
                return Difference(want["step"], field, value, got.get(field))
    return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an engine did in one scenario."""

    scenario: str
    steps: int
    """Recorded lines."""
    difference: Difference | None
    """The first one; None when every step is equal."""

    def __str__(self) -> str:
        return f"{self.scenario}: {self.difference or f'{self.steps} steps equal'}"


@dataclass(frozen=True, slots=True)
class Report:
    """How an engine did in all scenarios."""

    outcomes: tuple[Outcome, ...]

    @property
    def unequal(self) -> list[Outcome]:
        """The outcomes with a difference."""
        return [outcome for outcome in self.outcomes if outcome.difference is not None]

    @property
    def summary(self) -> str:
        """For example `96/96 scenarios equal`."""
        total = len(self.outcomes)
        return f"{total - len(self.unequal)}/{total} scenarios equal"


def check_scenario(
    scenario: Scenario,
    make_engine: Callable[[GoldenConfig], StepEngine],
    ignored: frozenset[str] = _UNCOMPARED,
) -> Outcome:
    """Compare a fresh engine with one trace. An exception inside the engine is a difference."""
    difference: Difference | None
    try:
        engine = make_engine(scenario.config)
        difference = first_difference(scenario.steps, replay(scenario, engine), ignored)
    except EngineFailed as failure:
        difference = _raised(failure.step, failure.__cause__)
    except Exception as error:
        difference = _raised(0, error)
    return Outcome(scenario.name, len(scenario.steps), difference)


def _raised(step: int, error: BaseException | None) -> Difference:
    return Difference(step, "exception", None, f"{type(error).__name__}: {error}")


def conform(
    paths: Iterable[Path],
    make_engine: Callable[[GoldenConfig], StepEngine],
    ignored: frozenset[str] = _UNCOMPARED,
) -> Report:
    """Examine engines made by `make_engine` on all traces of these files and folders.

    Raises InputError when there is no trace or one cannot be read.
    """
    return Report(
        tuple(check_scenario(scenario, make_engine, ignored) for scenario in scenarios(paths))
    )
