"""Golden traces: what vLLM's own scheduler did, step by step, as files.

A trace is one run of that scheduler: its configuration, the requests and aborts it was given, and
what it did in every step. The names of configuration values and step fields are those of the files
(and of vLLM).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias, TypeVar

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
# Reading them

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
# Writing them


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
