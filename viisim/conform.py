"""Conformance: drive an engine through golden traces and compare every step.

`replay` gives an engine the requests and aborts of a trace (`viisim.golden`) and yields what it
did, in the form of the recorded lines; `first_difference` tells whether and where the two part.
Nothing here knows how an engine works inside: anything with the methods of `StepEngine` can be
examined.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from viisim.golden import (
    GoldenConfig,
    GoldenRequest,
    Line,
    Scenario,
    scenarios,
)

_UNCOMPARED = frozenset({"freeq"})
"""The free queue's order by block number; an engine need not number its blocks."""


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


def recorded(scenario: Scenario, engine: StepEngine) -> Scenario:
    """The scenario with the steps that this engine makes of it. Raises EngineFailed."""
    return replace(scenario, steps=tuple(replay(scenario, engine)))


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
