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
from tests.random_scenarios import Pieces, length_of, scenarios
from viisim.conform import Difference, StepEngine, first_difference, replay
from viisim.engine.blocks import BlockKey, BlockPool, Run
from viisim.engine.stepwise import SteppedScheduler
from viisim.golden import GoldenAbort, GoldenConfig, GoldenRequest, Line, Scenario

#: The content of one free block: None without a key, PRIVATE where nobody can look it up.
Content = Key | str | None

PRIVATE = "private"
#: Output segments from here on appear in no prompt.
PRIVATE_SEGMENTS = 1_000
#: Two sequences may preempt each other for ever, in vLLM too; what comes later is not compared.
MOST_STEPS = 4_000

FUZZ = settings(max_examples=60, derandomize=True, deadline=None)


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
        super().add(replace(request, out_seg=None))  # type: ignore[arg-type]  # None: nobody's


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
    """What the plain engine does, as far as anybody wants to know."""
    engine = PlainEngine(scenario.config)

    def contents() -> list[Content]:
        return [PRIVATE if _is_private(key) else key for key in engine.free_queue()]

    return list(islice(_watched(scenario, engine, contents), MOST_STEPS))


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


# --------------------------------------------------------------------------------------
# Rare situations, made by hand


def config(**changes: Any) -> GoldenConfig:
    """Blocks of 4 tokens, 20 usable ones, and nothing in short supply."""
    values: dict[str, Any] = {
        "name": "by hand",
        "num_blocks": 21,
        "block_size": 4,
        "max_num_active_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "policy": "fcfs",
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "scheduler_reserve_full_isl": True,
        "watermark_blocks": 0,
    }
    return GoldenConfig(**values | changes)


def run(
    config: GoldenConfig, *requests: tuple[Any, ...], aborts: tuple[GoldenAbort, ...] = ()
) -> list[Line]:
    """Requests (arrival step, prompt, outputs[, segment[, priority]]) through all engines."""
    golden = tuple(_by_hand(number, *request) for number, request in enumerate(requests))
    return compared(Scenario("by hand", config, golden, aborts, ()))


def _by_hand(
    number: int,
    step: int,
    prompt: Pieces,
    outputs: int,
    segment: int | None = None,
    priority: int = 0,
) -> GoldenRequest:
    return GoldenRequest(
        id=f"r{number}",
        arrival_step=step,
        arrival_time=step,
        prompt_tokens=length_of(prompt),
        output_tokens=outputs,
        priority=priority,
        prompt=prompt,
        out_seg=100 + number if segment is None else segment,
    )


def hits(lines: list[Line]) -> dict[str, list[int]]:
    """Hit tokens of each request, admission by admission."""
    found: dict[str, list[int]] = {}
    for line in lines:
        for request_id, tokens in line.get("cached", []):
            found.setdefault(request_id, []).append(tokens)
    return found


@pytest.mark.parametrize("is_async", [False, True])
def test_equal_prompts_of_whole_blocks_hit_all_but_the_last_block(is_async: bool) -> None:
    """R11: the last token is computed, hence its block, a duplicate that is registered (R13)."""
    same = ((1, 12),)
    lines = run(config(async_scheduling=is_async), (0, same, 3), (0, same, 3), (9, same, 1))
    assert hits(lines) == {"r0": [0], "r1": [8], "r2": [8]}
    assert lines[0]["hashes"] == 3
    assert lines[0]["free_blocks"] == 20 - 4


def test_a_duplicate_outlives_the_eviction_of_the_holder_registered_first() -> None:
    """R13: the content stays found while either holder has it.

    Both run [1]*12 (r1's third block is a duplicate); r0 ends and is evicted by r2 while r1 still
    runs; r3 then hits what r1 holds.
    """
    same = ((1, 13),)
    lines = run(
        config(num_blocks=13),
        (0, ((1, 12),), 1),
        (0, ((1, 12),), 30),
        (2, ((2, 28),), 1),
        (4, same, 1),
    )
    assert hits(lines) == {"r0": [0], "r1": [8], "r2": [0], "r3": [12]}


def test_a_prefix_that_ends_within_a_held_stretch_splits_it() -> None:
    """r0 runs with ten blocks of content; r1 shares four, r2 six, r3 all but the last."""
    lines = run(
        config(num_blocks=60),
        (0, ((1, 41),), 20),
        (2, ((1, 16), (2, 9)), 12),
        (3, ((1, 27), (3, 5)), 12),
        (4, ((1, 40),), 12),
        (30, ((1, 33),), 2),
    )
    assert hits(lines) == {"r0": [0], "r1": [16], "r2": [24], "r3": [36], "r4": [32]}


def test_prompts_that_branch_within_a_block_share_what_comes_before_it() -> None:
    lines = run(
        config(),
        (0, ((1, 10), (2, 6)), 2),
        (1, ((1, 10), (3, 6)), 2),
        (2, ((1, 10), (2, 6), (4, 1)), 2),
        (3, ((1, 11), (2, 6)), 2),
    )
    assert hits(lines) == {"r0": [0], "r1": [8], "r2": [16], "r3": [8]}


def test_the_shallow_part_of_an_evicted_prompt_is_hit_and_the_rest_registered_again() -> None:
    """R10: of one release the deepest blocks go first.

    r0 leaves ten keyed blocks; r1 takes the ten that were never used and the three deepest of
    r0's; r2 has r0's prompt and finds seven.
    """
    lines = run(
        config(),
        (0, ((1, 40),), 1),
        (1, ((2, 52),), 1),
        (2, ((1, 41),), 1),
        (3, ((1, 41),), 1),
    )
    assert hits(lines) == {"r0": [0], "r1": [0], "r2": [28], "r3": [40]}


def test_decodes_beyond_the_budget_starve_in_their_place() -> None:
    """R1: the budget is used up in running order; r2 decodes only when r0 has ended."""
    lines = run(
        config(max_num_batched_tokens=2),
        (0, ((1, 1),), 6),
        (0, ((2, 1),), 6),
        (0, ((3, 1),), 6),
    )
    assert [dict(line["scheduled"]) for line in lines[:6]] == [{"r0": 1, "r1": 1}] * 6
    assert lines[5]["finished"] == ["r0", "r1"]
    assert lines[6]["scheduled"] == [["r2", 1]]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_decode_starves_when_one_before_it_preempts_itself(is_async: bool) -> None:
    """R3, R4: six blocks; r1 needs another one, is the least urgent, and ends the phase with
    that: r2 behind it gets nothing though it runs, and goes on in the next step."""
    lines = run(
        config(num_blocks=7, policy="priority", async_scheduling=is_async),
        (0, ((1, 3),), 8, None, 0),
        (0, ((2, 4),), 8, None, 1),
        (1, ((3, 3),), 8, None, 0),
    )
    starving = next(line for line in lines if line["preempted"])
    assert starving["preempted"] == ["r1"]
    assert starving["running"] == ["r0", "r2"]
    assert starving["scheduled"] == [["r0", 1]]


def test_a_decode_that_missed_a_step_asynchronously_is_keyed_up_to_its_last_token() -> None:
    """Section 5: its output has arrived when it is scheduled again, so nothing of it is on the
    way, and a block that this token fills is keyed at once."""
    settings = config(
        num_blocks=9,
        block_size=3,
        max_num_active_seqs=5,
        max_num_batched_tokens=12,
        max_model_len=10,
        policy="priority",
        long_prefill_token_threshold=1,
        long_prefill_token_threshold_adaptive=True,
        scheduler_reserve_full_isl=False,
        async_scheduling=True,
    )
    same = ((1, 6), (1, 2))
    lines = run(
        settings,
        (0, same, 1, 90),
        (0, same, 1, 90),
        (0, ((1, 1), (1, 3), (1, 3)), 1, 90, 1),
        (0, same, 1, 90),
        (1, same, 2, 90),
    )
    assert any(line["preempted"] for line in lines)


def test_a_blocked_head_is_admitted_once_a_running_sequence_has_its_content() -> None:
    """R8, R11, R12: r1's prompt is r0's prompt, 16 of its outputs and 4 more: 6 of 6 blocks.

    In steps 2 and 3 r0 holds two blocks of which one is keyed, so r1 lacks one. In step 4 r0's
    second block is full and keyed: r1 hits both, and nothing but decoding has let it in.
    """
    prompt = ((1, 4), (100, 16), (2, 4))
    lines = run(config(num_blocks=7), (0, ((1, 4),), 12), (2, prompt, 1))
    admitted = next(line for line in lines if "r1" in line["new"])
    assert (admitted["step"], admitted["cached"]) == (4, [["r1", 8]])
    assert admitted["running"] == ["r0", "r1"]


def test_a_head_too_long_for_the_rest_of_the_budget_enters_with_the_next_step() -> None:
    """R7 with chunked prefill off: nothing but the step's end is needed."""
    lines = run(
        config(enable_chunked_prefill=False, max_num_batched_tokens=40),
        (0, ((1, 30),), 3),
        (0, ((2, 30),), 3),
    )
    assert lines[0]["new"] == ["r0"]
    assert lines[1]["new"] == ["r1"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_preempted_sequence_finds_its_own_prompt_and_outputs_again(is_async: bool) -> None:
    """R5, R11: two sequences outgrow seven blocks; the later one resumes on its own blocks."""
    lines = run(
        config(num_blocks=8, async_scheduling=is_async),
        (0, ((1, 9),), 12),
        (0, ((2, 9),), 12),
    )
    preempted = [line["preempted"] for line in lines if line["preempted"]]
    assert preempted == [["r1"]]
    assert hits(lines)["r1"][1] >= 8


@pytest.mark.parametrize("is_async", [False, True])
def test_equal_requests_go_on_being_equal_in_their_outputs(is_async: bool) -> None:
    """Shared output segments: both holders key the same decode blocks, step by step (R13)."""
    same = ((1, 6),)
    lines = run(
        config(async_scheduling=is_async),
        (0, same, 14, 90),
        (0, same, 14, 90),
        (5, same, 14, 90),
        (30, ((1, 6), (90, 12), (2, 2)), 2),
    )
    assert hits(lines)["r3"] == [16]


@pytest.mark.parametrize("phase", ["before", "after"])
def test_blocks_of_an_aborted_prefill_stay_in_the_cache(phase: str) -> None:
    """R16 and FORMAT 3.1: keyed when scheduled, whether or not computed."""
    abort = GoldenAbort("r0", 1, "after" if phase == "after" else "before")
    lines = run(
        config(max_num_batched_tokens=8),
        (0, ((1, 24),), 3),
        (3, ((1, 24),), 3),
        aborts=(abort,),
    )
    assert hits(lines)["r1"] == [16 if phase == "after" else 8]
