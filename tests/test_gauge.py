"""The machine's gauge: what it writes, and what is read of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.vllm_plugin import GAUGE_VARIABLE, recording_environment
from viisim.calibration.gauge import Gauge, Response, fit_response, read_gauge
from viisim.calibration.measurements import StepLog
from viisim.calibration.own_records import step_log
from viisim.errors import InputError

STEP = {
    "exec_s": 0.3,
    "host_s": 0.1,
    "gap_s": 0.002,
    "decode_seqs": 1,
    "decode_context_tokens": 5,
    "prefill_tokens": 0,
    "prefill_pairs": 0,
}
STARTED = f"""
import os, time
from pathlib import Path
from runtime.vllm_plugin.gauge import start_gauge

start_gauge()
file = Path(os.environ["{GAUGE_VARIABLE}"])
while not file.exists() or file.read_text().count("\\n") < 3:
    time.sleep(0.01)
"""
"""A worker that ends once the machine was gauged three times."""


def test_it_is_timed_beside_the_process_that_starts_it(tmp_path: Path) -> None:
    file = tmp_path / "r0.gauge.jsonl"
    environment = {**os.environ, **recording_environment(tmp_path / "r0.steps.jsonl", file)}
    subprocess.run([sys.executable, "-c", STARTED], env=environment, check=True, timeout=60)
    ticks = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(tick["cpu_s"] > 0 for tick in ticks)
    assert [tick["at_s"] for tick in ticks] == sorted(tick["at_s"] for tick in ticks)


def test_without_a_file_to_write_to_there_is_none(tmp_path: Path) -> None:
    assert GAUGE_VARIABLE not in recording_environment(tmp_path / "r0.steps.jsonl")


def test_the_cost_is_the_mean_of_the_ticks_within_a_second() -> None:
    gauge = Gauge([0.0, 1.0, 1.5, 4.0], [1.0, 2.0, 4.0, 9.0])
    assert gauge.cost_s([1.2, 4.5]).tolist() == [3.0, 9.0]


def test_where_nothing_was_gauged_the_last_tick_counts() -> None:
    gauge = Gauge([10.0, 11.0], [1.0, 2.0])
    assert gauge.cost_s([0.0, 100.0]).tolist() == [1.0, 2.0]


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=30).map(sorted), st.floats(-10, 110))
def test_a_cost_lies_between_the_least_and_the_most(at_s: list[float], moment_s: float) -> None:
    cpu_s = 1e-3 * (1 + np.arange(len(at_s)) % 7)
    (cost_s,) = Gauge(at_s, cpu_s).cost_s([moment_s])
    assert cpu_s.min() - 1e-12 <= cost_s <= cpu_s.max() + 1e-12


def test_a_mean_gives_every_span_the_same_weight() -> None:
    at_s = [0.5, 1.0, 1.5, 3.0]  # three ticks in the first span, one in the second
    assert Gauge(at_s, [1.0, 1.0, 1.0, 2.0]).mean_s(0.0, 4.0) == 1.5


def test_where_it_did_not_halt_a_machine_moves_all_the_time() -> None:
    gauge = Gauge([0.0], [1.0], [(5.0, 2.0)])
    assert gauge.moving(np.array([0.0, 7.0]), np.array([5.0, 9.0])).tolist() == [1.0, 1.0]


def test_a_halt_takes_of_each_time_what_falls_into_it() -> None:
    gauge = Gauge([0.0], [1.0], [(1.0, 1.0), (3.0, 0.5)])
    moving = gauge.moving(np.array([0.0, 1.5, 0.0]), np.array([4.0, 2.5, 1.25]))
    assert moving.tolist() == pytest.approx([1 - 1.5 / 4, 0.5, 0.8])


def test_halts_are_told_from_the_beginning_of_a_run() -> None:
    gauge = Gauge([0.0], [1.0], [(1.0, 1.0), (3.0, 0.5), (9.0, 1.0)])
    assert gauge.halts_s(2.0, 8.0) == [(1.0, 0.5)]


def test_even_while_it_halts_a_machine_moves_a_little() -> None:
    moving = Gauge([0.0], [1.0], [(1.0, 3.0)]).moving(np.array([1.0]), np.array([2.0]))
    assert 0 < moving[0] < 0.1


def test_no_file_and_an_empty_one_gauge_nothing(tmp_path: Path) -> None:
    file = tmp_path / "r0.gauge.jsonl"
    assert read_gauge(file) is None
    file.touch()
    assert read_gauge(file) is None


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "r0.gauge.jsonl"
    file.write_text('{"at_s": 1.0, "cpu_s": 0.5}\n{"at_s": 2.0, "cp')
    gauge = read_gauge(file)
    assert gauge is not None
    assert gauge.cost_s([2.0]).tolist() == [0.5]


def test_halts_are_told_from_ticks(tmp_path: Path) -> None:
    file = tmp_path / "r0.gauge.jsonl"
    file.write_text("""{"at_s": 1.0, "cpu_s": 0.5}\n{"at_s": 2.0, "halted_s": 3.0}\n""")
    gauge = read_gauge(file)
    assert gauge is not None
    assert gauge.cost_s([2.0]).tolist() == [0.5]
    assert gauge.moving(np.array([1.0]), np.array([7.0])).tolist() == [0.5]


def test_another_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "r0.gauge.jsonl"
    file.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="not what the gauge of a machine wrote"):
        read_gauge(file)


def recorded(decode: float, prefill: float, swing: float) -> tuple[StepLog, Any, Gauge]:
    """Three minutes of steps, every other one with a prefill, on a machine whose speed swings by
    so much in a minute; the powers by which the two follow it."""
    count = 1800
    start_s = 0.1 * np.arange(count)
    machine = np.exp(swing * np.sin(2 * np.pi * start_s / 60))
    decodes = 1 + np.arange(count) % 3
    tokens = np.where(np.arange(count) % 2, 100, 0)
    scatter = np.random.default_rng(5).normal(1, 0.02, count)
    usual_decode_s, usual_prefill_s = 0.01 + 0.001 * decodes, 0.0003 * tokens
    log = StepLog(
        duration_s=scatter
        * (machine**decode * usual_decode_s + machine**prefill * usual_prefill_s),
        decodes=decodes,
        context_tokens=100 * decodes,
        steps=np.ones(count, dtype=np.int64),
        prefill_tokens=tokens,
        prefill_pairs=tokens * 60,
        host_s=np.zeros(count),
    )
    return log, start_s, Gauge(start_s, 0.002 * machine)


def slowdown_by_another_gauge(factor: float) -> Any:
    """Of decode, by a gauge whose ticks all take so many times as long as in the calibration."""
    cpu_s = np.linspace(0.0016, 0.0024, 200)
    response = Response(0.002, Gauge(range(200), cpu_s).quickest_s, 0.8, 1.75)
    gauge = Gauge(range(200), factor * cpu_s)
    return response.to(gauge).slowdowns(np.array([factor * 0.002]))[0][0]


def test_a_gauge_that_is_slow_even_at_its_quickest_says_nothing_of_the_machine() -> None:
    assert slowdown_by_another_gauge(1.2) == pytest.approx(1.0)


def test_a_gauge_that_is_a_little_slower_at_its_quickest_shows_a_machine_that_is() -> None:
    assert slowdown_by_another_gauge(1.02) == pytest.approx(1.02**0.8)


@pytest.mark.parametrize(("decode", "prefill"), [(1.0, 1.0), (0.7, 1.5), (1.4, 0.8)])
def test_the_powers_by_which_steps_follow_the_machine_are_found(
    decode: float, prefill: float
) -> None:
    log, start_s, gauge = recorded(decode, prefill, 0.5)
    response, slowdown = fit_response(log, start_s, gauge, 0.002)
    assert (response.decode, response.prefill) == pytest.approx((decode, prefill), abs=0.08)
    usual = log.divided(slowdown).duration_s[log.prefill_tokens == 0]
    assert usual.std() / usual.mean() < 0.1  # batches of three sizes, and 2 % of scatter


def test_on_a_steady_machine_steps_are_taken_to_follow_it_as_on_others() -> None:
    response, _ = fit_response(*recorded(1.0, 1.0, 0.001), 0.002)
    assert (response.decode, response.prefill) == pytest.approx((0.8, 1.75), abs=0.1)


def test_halts_do_not_change_how_steps_follow_the_machine() -> None:
    log, start_s, steady = recorded(0.7, 1.5, 0.2)
    expected, slowdown = fit_response(log, start_s, steady, 0.002)
    hit = np.arange(len(log)) % 50 == 7
    halted = log.divided(np.where(hit, log.duration_s / (log.duration_s + 0.03), 1.0))
    halts_s = [(begin_s + 0.001, 0.03) for begin_s in start_s[hit]]
    gauge = Gauge(start_s, steady.cost_s(start_s), halts_s)
    response, whole = fit_response(halted, start_s, gauge, 0.002)
    assert response.decode == pytest.approx(expected.decode, abs=0.03)
    assert response.prefill == pytest.approx(expected.prefill, abs=0.03)
    usual = halted.divided(whole).duration_s
    assert usual == pytest.approx(log.divided(slowdown).duration_s, rel=0.02)


def test_a_step_beside_a_slow_machine_is_read_as_on_the_usual_one() -> None:
    slow = {**STEP, "slowdown": 2.0}
    (usual, read) = (step_log([row], Path()) for row in (STEP, slow))
    assert usual.duration_s.tolist() == pytest.approx([0.402])
    assert read.duration_s.tolist() == pytest.approx([0.201])
    assert read.host_s == pytest.approx(usual.host_s / 2)
