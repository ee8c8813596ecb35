"""The fast engine, fuzzed against the plain model: every field of every step, and the free queue.

Golden traces compare how many blocks are free; here the contents of the free queue are compared
too, block by block, because a wrong order shows in the other fields only much later or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plain_engine import Key, PlainEngine
from tests.random_scenarios import scenarios
from viisim.conform import (
    Difference,
    GoldenConfig,
    GoldenRequest,
    Line,
    Scenario,
    StepEngine,
    first_difference,
    replay,
)
from viisim.engine.blocks import BlockKey, BlockPool, Run
from viisim.engine.stepwise import SteppedScheduler

#: The content of one free block: None without a key, PRIVATE where nobody can look it up.
Content = Key | str | None

PRIVATE = "private"
#: Output segments from here on appear in no prompt.
PRIVATE_SEGMENTS = 1_000
#: Far more than any scenario here needs; an engine that hangs fails instead.
MOST_STEPS = 4_000

FUZZ = settings(max_examples=100, derandomize=True, deadline=None)


# --------------------------------------------------------------------------------------
# The free queue, block by block


def free_contents(pool: BlockPool) -> list[Content]:
    """Content of the free blocks, front to back."""
    contents: list[Content] = [None] * pool.blank_blocks
    blank = pool.free_blocks - sum(run.blocks for run in pool.free_queue())
    assert blank == pool.blank_blocks
    for run in pool.free_queue():
        contents += reversed(_run_contents(run, pool.block_tokens))
    return contents


def _run_contents(run: Run, block_tokens: int) -> list[Content]:
    """Content of the blocks of a run, shallow first."""
    if run.node is None:
        return [PRIVATE] * run.blocks
    path = [run.node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    key: Key = ()
    contents: list[Content] = []
    for node in reversed(path):
        contents = []
        for slices in _block_slices(node.key, node.blocks, block_tokens):
            key = _joined(key, slices)
            contents.append(key)
    assert len(contents) == run.node.blocks
    contents = [PRIVATE if _is_private(content) else content for content in contents[: run.blocks]]
    return contents + [PRIVATE] * (run.blocks - len(contents))


def _block_slices(key: BlockKey, blocks: int, block_tokens: int) -> Iterator[tuple[Any, ...]]:
    """The (segment, first token, tokens) slices of each block of a node."""
    if not blocks:
        return
    if isinstance(key[0], tuple):
        assert blocks == 1, "a block across pieces is a node of its own"
        yield key
        return
    segment, first = key
    assert isinstance(first, int)
    for block in range(blocks):
        yield ((segment, first + block * block_tokens, block_tokens),)


def _joined(key: Key, slices: tuple[Any, ...]) -> Key:
    runs = list(key)
    for segment, first, tokens in slices:
        if runs and runs[-1][0] == segment and runs[-1][1] + runs[-1][2] == first:
            runs[-1] = (segment, runs[-1][1], runs[-1][2] + tokens)
        else:
            runs.append((segment, first, tokens))
    return tuple(runs)


def _is_private(content: Content) -> bool:
    """Whether it has tokens of an output segment that no prompt can name."""
    if content is None or isinstance(content, str):
        return False
    return any(
        not isinstance(segment, int) or segment >= PRIVATE_SEGMENTS for segment, _, _ in content
    )


# --------------------------------------------------------------------------------------
# Driving both


class SecretOutputs(SteppedScheduler):
    """The engine, told that nobody's outputs can appear in a prompt."""

    def add(self, request: GoldenRequest) -> None:
        super().add(replace(request, out_seg=None))  # type: ignore[arg-type]


def eager(config: GoldenConfig) -> SteppedScheduler:
    return SteppedScheduler(config)


def lazy(config: GoldenConfig) -> SteppedScheduler:
    return SteppedScheduler(config, lazy=True)


def secret(config: GoldenConfig) -> SteppedScheduler:
    return SecretOutputs(config, lazy=True)


def _watched(
    scenario: Scenario, engine: StepEngine, contents: Callable[[], list[Content]]
) -> Iterator[Line]:
    """The engine's lines, each with the free queue at the end of its step."""
    for line in replay(scenario, engine):
        yield line | {"free_queue": contents()}


def plain_lines(scenario: Scenario) -> list[Line]:
    """What the plain engine does."""
    engine = PlainEngine(scenario.config)

    def contents() -> list[Content]:
        return [PRIVATE if _is_private(key) else key for key in engine.free_queue()]

    lines = list(islice(_watched(scenario, engine, contents), MOST_STEPS))
    assert len(lines) < MOST_STEPS, "the scenario itself never ends"
    return lines


def difference(
    scenario: Scenario, make: Callable[[GoldenConfig], SteppedScheduler], expected: list[Line]
) -> Difference | None:
    """Where a fresh engine first leaves the plain one; a lazy one counts contents too late."""
    engine = make(scenario.config)
    actual = _watched(scenario, engine, lambda: free_contents(engine.scheduler.pool))
    ignored = {"freeq"} if make is eager else {"freeq", "hashes"}
    return first_difference(expected, islice(actual, MOST_STEPS), frozenset(ignored))


def compared(scenario: Scenario) -> list[Line]:
    """The plain engine's lines, after finding the fast one equal in every mode."""
    expected = plain_lines(scenario)
    for make in (eager, lazy):
        found = difference(scenario, make, expected)
        assert found is None, f"{make.__name__}: {found}"
    return expected


# --------------------------------------------------------------------------------------
# Random scenarios


@given(scenarios())
@FUZZ
def test_a_synchronous_engine_does_what_the_plain_one_does(scenario: Scenario) -> None:
    compared(scenario)


@given(scenarios(is_async=True))
@FUZZ
def test_an_asynchronous_engine_does_what_the_plain_one_does(scenario: Scenario) -> None:
    compared(scenario)


@given(st.booleans().flatmap(scenarios))
@FUZZ
def test_outputs_that_nobody_can_name_need_no_place_in_the_tree(scenario: Scenario) -> None:
    unnamed = tuple(
        replace(request, out_seg=PRIVATE_SEGMENTS + number)
        for number, request in enumerate(scenario.requests)
    )
    scenario = replace(scenario, requests=unnamed)
    found = difference(scenario, secret, plain_lines(scenario))
    assert found is None, str(found)
