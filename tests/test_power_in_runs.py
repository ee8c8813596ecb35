"""Time spent computing, watts and joules in the results of a run, and the label of a roofline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from viisim.config import experiment_from
from viisim.experiment import Run, run_experiment
from viisim.hardware import load_device
from viisim.power import group_draw, power_draw
from viisim.report import summary_report
from viisim.results import compare_bytes, load_run

VII = power_draw(load_device("radeon_vii"))


def small(**replica: Any) -> Run:
    content = {
        "name": "warm",
        "policy": {"name": "least_loaded"},
        "cluster": {
            "replicas": [{"device": "radeon_vii", "model": "qwen3-vl-8b-awq", **replica}],
            "spare": {"count": 1, "device": "radeon_vii"},
        },
        "workload": {"kind": "synthetic", "preset": "azure_conv", "rate_per_s": 0.2, "requests": 9},
        "seeds": [1],
    }
    return run_experiment(experiment_from(content, "warm.yaml"))


@pytest.fixture(scope="module")
def run() -> Run:
    return small()


@pytest.fixture(scope="module")
def rooflined() -> Run:
    return small(model="llama-2-13b", stages=2)


def printed(run: Run) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_report(run.summary, "warm"))
    return capture.get()


def test_sampled_time_only_grows_and_prefill_is_part_of_it(run: Run) -> None:
    samples: Any = run.results[0].samples
    busy_ns, prefill_ns = samples["busy_ns"], samples["prefill_ns"]
    assert (np.diff(busy_ns) >= 0).all()
    assert (np.diff(busy_ns) <= np.diff(samples["time_ns"])).all()
    assert (prefill_ns <= busy_ns).all()
    assert 0 < prefill_ns[-1] < busy_ns[-1]


def test_the_last_sample_is_near_the_totals(run: Run) -> None:
    (result,) = run.results
    (totals,) = result.replicas
    left_ns = result.ended_ns - result.samples["time_ns"][-1]
    assert abs(totals.busy_ns - result.samples["busy_ns"][-1]) <= max(left_ns, 10**9)
    assert totals.prefill_ns <= totals.busy_ns


def test_stepping_one_by_one_samples_the_same_times(run: Run) -> None:
    stepped = small(engine={"coalesce": False})
    assert run.samples.equals(stepped.samples)


def test_a_samples_power_lies_between_idle_and_prefill(run: Run) -> None:
    watts = run.results[0].samples["power_w"]
    assert watts[0] == VII.idle_w
    assert watts.min() >= VII.idle_w
    assert VII.decode_w < watts.max() <= VII.prefill_w


def test_a_runs_energy_is_that_of_its_parts_and_of_the_spare_card(run: Run) -> None:
    (result,) = run.results
    (totals,) = result.replicas
    busy_s, prefill_s = totals.busy_ns / 1e9, totals.prefill_ns / 1e9
    idle_s = result.ended_ns / 1e9 * 2 - busy_s
    expected_j = VII.idle_w * idle_s + VII.decode_w * (busy_s - prefill_s)
    assert result.energy_j == pytest.approx(expected_j + VII.prefill_w * prefill_s)


def test_the_summary_gives_energy_per_token_and_what_it_assumes(run: Run) -> None:
    values = run.summary["values"]
    tokens = int(run.results[0].requests["output_tokens"].sum())
    per_token_j = (values["energy_j"]["mean"] or 0) / tokens
    assert values["energy_j_per_million_tokens"]["mean"] == pytest.approx(per_token_j * 1e6)
    assert any("idle 25 W is assumed" in line for line in run.summary["power_assumptions"])
    assert "power_assumptions" in run.summary["definitions"]["energy_j"]


def test_an_unknown_device_has_no_power_and_no_energy() -> None:
    unknown = small(device="bench", model="a100_like")
    assert (unknown.results[0].samples["power_w"] == 0).all()
    assert unknown.summary["values"]["energy_j"]["mean"] is None
    assert unknown.summary["power_assumptions"] == []


def test_of_a_layer_split_one_stage_works_at_a_time() -> None:
    two = group_draw(load_device("radeon_vii"), stages=2)
    assert two.decode_w == VII.decode_w + VII.idle_w
    assert two.idle_w == 2 * VII.idle_w


# -- uncalibrated --


def test_a_rooflines_results_are_labelled(rooflined: Run) -> None:
    assert rooflined.summary["uncalibrated"] == ["radeon_vii/llama-2-13b"]
    assert "UNCALIBRATED: nobody measured radeon_vii/llama-2-13b" in printed(rooflined)


def test_a_measured_profiles_results_are_not(run: Run) -> None:
    assert run.summary["uncalibrated"] == []
    assert "UNCALIBRATED" not in printed(run)


def test_a_rooflines_run_can_be_verified_from_its_manifest(rooflined: Run, tmp_path: Path) -> None:
    first = rooflined.save(tmp_path / "first", plots=False)
    again = experiment_from(load_run(first).manifest["config"], "manifest.json")
    second = run_experiment(again).save(tmp_path / "second", plots=False)
    assert compare_bytes(first, second) == []
