"""A train of coalesced steps and the single steps it stands for are bit-identical to everybody.

`tests/random_scenarios.py` makes the worlds: prefills, prefix hits, preemptions, withdrawals,
priorities, gauges read mid-run, several replicas, and ties at almost every instant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_scenarios import Heard, World, simulation, worlds
from viisim.faults import Fault
from viisim.records import ReplicaTotals, SeedResult

FUZZ = settings(max_examples=60, derandomize=True, deadline=None)


def same_to_the_bit(left: SeedResult, right: SeedResult) -> None:
    """Every request, every sample, every total; not the events, which coalescing saves."""
    _same_columns(left.requests, right.requests)
    _same_columns(left.samples, right.samples)
    for mine, other in zip(left.replicas, right.replicas, strict=True):
        for field in fields(ReplicaTotals):
            equal = np.array_equal(getattr(mine, field.name), getattr(other, field.name))
            assert equal, field.name
    assert left.ended_ns == right.ended_ns


def _same_columns(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, column in left.items():
        assert column.tolist() == right[name].tolist(), name


def compare(world: World, faults: Sequence[Fault] = ()) -> SeedResult:
    """Run it in trains and step by step: same journal, same result."""
    trains, steps = Heard(), Heard()
    coalesced = simulation(world, True, trains, faults).run()
    stepped = simulation(world, False, steps, faults).run()
    for mine, other in zip_longest(trains.entries, steps.entries):
        assert mine == other
    same_to_the_bit(coalesced, stepped)
    return coalesced


@given(worlds())
@FUZZ
def test_trains_and_steps_leave_the_same_results(world: World) -> None:
    compare(world)


def halts(replicas: int, times: Sequence[tuple[int, int]]) -> Iterator[Fault]:
    """Of the replicas in turns, each a while after the end of the one before, by 50 us."""
    at_s = 0.0
    for number, (pause, length) in enumerate(times):
        at_s += 5e-5 * pause
        yield Fault(at_s, "halt", f"r{number % replicas}", 5e-5 * length)
        at_s += 5e-5 * length


@given(worlds(), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1))
@FUZZ
def test_trains_and_steps_halt_alike(world: World, times: list[tuple[int, int]]) -> None:
    compare(world, list(halts(world.replicas, times)))


@given(worlds(stops_early=True))
@FUZZ
def test_a_run_stopped_within_a_train_counts_the_steps_that_were_over(world: World) -> None:
    compare(world)
