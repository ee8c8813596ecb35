"""The report of a validation: what it says of profiles that are right, wrong, and of too little."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from viisim.config import Experiment
from viisim.experiment import replica_specs
from viisim.simulation import Simulation
from viisim.validation.accuracy import (
    Capacity,
    Cpu,
    LoadRun,
    compare,
)
from viisim.validation.answers import Answers, Figure, simulated_answers
from viisim.validation.figures import draw
from viisim.validation.limits import QUICK
from viisim.validation.parity import Parity
from viisim.validation.ranking import Ranking, rank
from viisim.validation.report import Report, Setup, Stated, Worker
from viisim.validation.steps import StepTimes, step_errors

EXPERIMENT = {
    "name": "small",
    "policy": {"name": "least_loaded"},
    "cluster": {"replicas": [{"count": 2, "device": "bench", "model": "a100_like"}]},
    "workload": {
        "kind": "synthetic",
        "preset": "azure_conv",
        "rate_per_s": 4.0,
        "requests": 150,
    },
    "seeds": [1],
}


@cache
def served(decode: float) -> Answers:
    """A small workload, with decode steps so many times as long as the profile says."""
    experiment = Experiment.model_validate(EXPERIMENT)
    specs = replica_specs(experiment)
    for spec in specs:
        time = spec.step_time
        time.base_ps = [time.base_ps[0], *(round(decode * base) for base in time.base_ps[1:])]
        time.slope_ps = [round(decode * slope) for slope in time.slope_ps]
    requests = experiment.build_workload().requests(1)
    return simulated_answers(Simulation(specs, experiment.policy.make(), requests).run())


@cache
def ranking(*simulated: float, measured: tuple[float, ...] = (1.0, 1.2, 1.5, 2.0)) -> Ranking:
    """Policies a, b, c, d by factors of their latency."""
    policies = dict(zip("abcd", measured, strict=True))
    predicted = dict(zip("abcd", simulated or measured, strict=True))
    return rank(
        Figure("e2e_s", "mean"),
        {name: [asked(factor, seed) for seed in (1, 2)] for name, factor in policies.items()},
        {name: [asked(factor, seed) for seed in (3, 4)] for name, factor in predicted.items()},
    )


def asked(factor: float, seed: int) -> Answers:
    """A request a second."""
    size = 60
    e2e_s = factor * np.random.default_rng(seed).uniform(0.99, 1.01, size)
    return Answers(
        ids=tuple(f"q{number}" for number in range(size)),
        traffic_class=("",) * size,
        due_s=np.arange(float(size)),
        ttft_s=e2e_s / 2,
        tpot_s=e2e_s / 20,
        e2e_s=e2e_s,
        output_tokens=np.full(size, 11),
        preemptions=0,
        prefix_hit_tokens=0,
        prompt_tokens=100 * size,
    )


def load_run(decode: float, load: float = 0.7) -> LoadRun:
    return LoadRun(load, 4.0, (served(1.0), served(1.0)), (served(decode),), cpu=Cpu(0.01, 0.02))


def step_times(decode: float, worker: str = "w1") -> StepTimes:
    rng = np.random.default_rng(1)
    prefill = rng.random(400) < 0.3
    measured_s = np.where(prefill, 0.2, 0.03) * rng.lognormal(0, 0.3, 400)
    predicted_s = measured_s * rng.normal(1, 0.03, 400) * np.where(prefill, 1.0, decode)
    return StepTimes(
        worker=worker,
        start_s=np.cumsum(measured_s),
        decodes=np.ones(400, dtype=np.int64),
        measured_s=measured_s,
        calibrated_s=predicted_s,
        refitted_s=measured_s,
        with_prefill=prefill,
        slowdown=np.ones(400),
        run=np.repeat([0, 1], 200),
    )


def report(decode: float = 1.0, **other: Any) -> Report:
    """Of two workers whose profile has decode steps so many times too long."""
    worker = Worker("w0", "profiles/w0.yaml", "1", {"step_mape": 0.08})
    whole: dict[str, Any] = {
        "name": "two_workers",
        "command": "viisim validate --live experiments/validation/two_workers.yaml",
        "setup": Setup("vLLM 0.1", "m", "two cores", (worker, replace(worker, id="w1"))),
        "calibration": (Stated("host overhead", 7.5, "ms"),),
        "capacities": (Capacity("the cluster", "requests/s", (5.0, 5.2), (5.1,)),),
        "loads": (compare(load_run(decode)),),
        "steps": (step_errors(step_times(decode)),),
        "rankings": {"chat": ranking()},
        "parity": Parity(journals=4, events=1000, actions=900),
        "cpu": {"chat": Cpu(0.01, 0.03)},
        "wall_s": {"calibration": 90.0, "runs": 600.0},
        "files": {"accuracy": "report.json", "requests": "accuracy/*.parquet"},
    }
    return Report(**(whole | other))


# -- verdicts --------------------------------------------------------------------------------


def test_a_simulator_that_is_right_passes() -> None:
    made = report()
    assert (made.verdict, made.exit_status, made.failed) == ("PASSED", 0, ())
    assert (
        "\n\n**PASSED**: all 11 checks hold (claimed limits; none of them only by leniency for "
        "noise); policies are ranked as measured" in made.markdown()
    )


def test_a_profile_whose_decode_is_30_percent_slow_fails_by_name() -> None:
    made = report(1.3)
    assert (made.verdict, made.exit_status) == ("FAILED", 1)
    names = {"mean E2E", "mean TPOT", "total step time on w1"}
    assert names <= {name.partition(": ")[2] for name in made.failed}
    headline = made.markdown().split("\n\n")[1]
    assert headline.startswith("**FAILED**: ")
    assert all(name in headline for name in names)


def test_wrong_profiles_fail_loose_limits_too() -> None:
    assert report(limits=QUICK, rankings={}).verdict == "PASSED"
    assert report(1.3, limits=QUICK, rankings={}).verdict == "FAILED"


def test_a_policy_unlike_the_simulated_one_fails_parity_and_is_told() -> None:
    said = "least_loaded: deployed with slack_tokens 64, simulated with 0"
    made = report(parity=Parity(4, 1000, 900, policy_differences=(said,)))
    assert made.failed == ("parity: policies unlike the simulated",)
    assert f"\n- {said}\n" in made.markdown()


def test_a_journal_that_replays_otherwise_fails_parity_and_is_told() -> None:
    said = "run.jsonl: line 7: Arrived: recorded Dispatch to r0; replayed Dispatch to r1"
    made = report(parity=Parity(4, 1000, 900, differences=(said,)))
    assert made.verdict == "FAILED"
    assert f"\n- {said}\n" in made.markdown()


def test_a_wrong_ranking_fails() -> None:
    made = report(rankings={"chat": ranking(2.0, 1.5, 1.2, 1.0)})
    assert made.failed == ("ranking of the policies",)
    assert "policies are ranked otherwise than measured (Kendall's tau -1.00" in made.markdown()


def test_policies_that_hardly_differ_are_inconclusive() -> None:
    made = report(rankings={"chat": ranking(measured=(1.0, 1.0, 1.0, 1.0))})
    assert (made.verdict, made.exit_status) == ("INCONCLUSIVE", 1)
    assert "differ significantly, of at least 6 that a ranking needs" in made.markdown()


@pytest.mark.parametrize(
    ("part", "nothing"),
    [
        ("capacity", {"capacities": ()}),
        ("accuracy", {"loads": ()}),
        ("steps", {"steps": ()}),
        ("ranking", {"rankings": {}}),
        ("parity", {"parity": None}),
        ("parity", {"parity": Parity(1, 0, 0)}),
    ],
    ids=["capacity", "accuracy", "steps", "ranking", "parity", "empty journals"],
)
def test_a_part_that_nobody_measured_is_inconclusive(part: str, nothing: dict[str, Any]) -> None:
    made = report(**nothing)
    assert (made.verdict, made.missing) == ("INCONCLUSIVE", (part,))
    assert f"not measured: {part}" in made.markdown()


# -- the files -------------------------------------------------------------------------------


def test_the_same_facts_write_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        report().write(tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]
    assert list(written[0]) == ["report.json", "report.md"]


def test_the_json_holds_every_row_with_its_repetitions(tmp_path: Path) -> None:
    report(1.3).write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["verdict"] == "FAILED"
    [e2e] = [
        row
        for row in content["loads"][0]["rows"]
        if (row["metric"], row["statistic"]) == ("e2e_s", "mean")
    ]
    assert e2e["error"] == pytest.approx(e2e["predicted"] / np.mean(e2e["repetitions"]) - 1)


def test_the_page_has_the_error_beside_the_noise() -> None:
    page = report(1.3).markdown()
    row = compare(load_run(1.3)).row("e2e_s", "mean")
    assert row is not None
    assert f" {row.error:+.1%} (0.0%) |" in page


def test_client_and_proxy_above_their_share_are_pointed_at() -> None:
    made = report(cpu={"chat": Cpu(0.02, 0.04)})
    assert "at most 6.0% of the machine's CPU time, **not less** than the 5%" in made.markdown()


# -- figures ---------------------------------------------------------------------------------


def drawn(folder: Path) -> dict[str, bytes]:
    run = load_run(1.3)
    pictures = draw("small", [run], [compare(run)], [step_times(1.3)], folder)
    return {file: (folder / file).read_bytes() for file, _ in pictures}


@pytest.mark.slow
def test_figures_are_the_same_bytes_under_other_settings(tmp_path: Path) -> None:
    ours = drawn(tmp_path / "ours")
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30}):
        assert drawn(tmp_path / "theirs") == ours
    assert list(ours) == ["latency_cdfs.png", "latency_against_load.png", "step_residuals.png"]


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    pictures = draw("small", [], [], [step_times(1.0)], tmp_path)
    assert [file for file, _ in pictures] == ["step_residuals.png"]


def test_the_page_shows_its_figures() -> None:
    page = report(pictures=(("a.png", "What it shows."),)).markdown("images")
    assert "![What it shows.](images/a.png)" in page
