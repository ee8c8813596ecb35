"""The fast engine, fuzzed against the plain model: every field of every step, and the free queue.

Golden traces compare how many blocks are free; here the contents of the free queue are compared
too, block by block, because a wrong order shows in the other fields only much later or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plain_engine import Key, PlainEngine
from viisim.conform import (
    Difference,
    GoldenAbort,
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

Pieces = tuple[tuple[int, int], ...]
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


def cut(pieces: Pieces, tokens: int) -> Pieces:
    """The first `tokens` tokens."""
    kept = []
    for segment, length in pieces:
        if tokens > 0:
            kept.append((segment, min(length, tokens)))
        tokens -= length
    return tuple(kept)


def length_of(pieces: Pieces) -> int:
    return sum(length for _, length in pieces)


@st.composite
def configs(draw: st.DrawFn, is_async: bool) -> GoldenConfig:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 4, 8, 16]))
    usable_blocks = draw(st.one_of(st.integers(8, 20), st.integers(8, 60)))
    most_tokens = usable_blocks * block_size
    chunked = draw(st.booleans())
    budget = draw(st.one_of(st.integers(1, 24), st.integers(16, 128)))
    return GoldenConfig(
        name="random",
        num_blocks=usable_blocks + 1,
        block_size=block_size,
        max_num_active_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=budget if chunked else budget + most_tokens,
        max_model_len=draw(st.integers(min(8, most_tokens), most_tokens)),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        enable_chunked_prefill=chunked,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5, 16])),
        long_prefill_token_threshold_adaptive=draw(st.booleans()),
        scheduler_reserve_full_isl=draw(st.booleans()),
        watermark_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        async_scheduling=is_async,
    )


@st.composite
def prompts(draw: st.DrawFn, config: GoldenConfig, earlier: list[GoldenRequest]) -> Pieces:
    """Made of few segments and of earlier prompts, with or without their outputs."""
    size = config.block_size
    lengths = st.one_of(st.sampled_from([size, 2 * size, 4 * size]), st.integers(1, 3 * size + 2))
    pieces: Pieces = ()
    if earlier:
        other = draw(st.sampled_from(earlier))
        match draw(st.sampled_from(["new", "equal", "branch", "continued"])):
            case "equal":
                return other.prompt
            case "branch":
                pieces = cut(other.prompt, draw(st.integers(1, other.prompt_tokens)))
            case "continued":
                outputs = draw(st.integers(1, other.output_tokens))
                pieces = (*other.prompt, (other.out_seg, outputs))
    if not pieces or draw(st.booleans()):
        pieces += tuple(
            draw(st.lists(st.tuples(st.integers(1, 3), lengths), min_size=1, max_size=2))
        )
    return cut(pieces, config.max_model_len - 1)


@st.composite
def scenarios(draw: st.DrawFn, is_async: bool = False) -> Scenario:
    """Small pools under pressure, shared prefixes, ties, aborts."""
    config = draw(configs(is_async))
    requests: list[GoldenRequest] = []
    step = 0
    for number in range(draw(st.integers(2, 12))):
        prompt = draw(prompts(config, requests))
        step += draw(st.sampled_from([0, 0, 0, 1, 2, 7]))
        requests.append(
            GoldenRequest(
                id=f"r{number}",
                arrival_step=step,
                arrival_time=draw(st.integers(0, 3)),
                prompt_tokens=length_of(prompt),
                output_tokens=draw(st.integers(1, 6 * config.block_size)),
                priority=draw(st.integers(0, 2)),
                prompt=prompt,
                out_seg=draw(st.sampled_from([90, 91, 100 + number])),
            )
        )
    ids = st.sampled_from([request.id for request in requests])
    aborts = draw(
        st.lists(
            st.builds(GoldenAbort, ids, st.integers(0, 60), st.sampled_from(["before", "after"])),
            max_size=4,
        )
    )
    return Scenario("random", config, tuple(requests), tuple(aborts), ())


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
