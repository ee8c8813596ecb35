"""Experiments carried out: the same results however, and the real traces whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from policies.interface import PolicyError
from policies.registry import policy_names
from policies.scaffold import scaffold
from tests.small_experiment import FAULTS, SMALL, small_file, small_trace
from viisim import Run, simulate
from viisim.config import Experiment, experiment_from, load_experiment
from viisim.errors import InputError
from viisim.experiment import input_hashes, replica_specs, run_experiment, run_seed
from viisim.journal import replay_journal
from viisim.profile import load_profile
from viisim.records import REFUSED, REQUEST_COLUMNS, SAMPLE_COLUMNS
from viisim.results import compare_bytes, load_run
from viisim.step_costs import step_time_of

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


def small(*overrides: str) -> Experiment:
    """The small experiment, changed."""
    return experiment_from(yaml.safe_load(SMALL), "small", overrides=overrides)


@pytest.fixture(scope="module")
def run() -> Run:
    """The small experiment in this process."""
    return run_experiment(small())


def equal(one: Run, other: Run) -> bool:
    """Whether everything recorded and summed up is the same."""
    return (
        one.requests.equals(other.requests)
        and one.samples.equals(other.samples)
        and one.summary == other.summary
        and [seed.events for seed in one.results] == [seed.events for seed in other.results]
    )


# -- the same results however ---------------------------------------------------------------


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(run: Run) -> None:
    assert equal(run, run_experiment(small(), jobs=2))


def test_a_seeds_result_does_not_depend_on_the_other_seeds(run: Run) -> None:
    alone = run_seed(small(), 2)
    for name, column in alone.requests.items():
        assert np.array_equal(column, run.results[1].requests[name])


def test_another_seed_draws_other_requests(run: Run) -> None:
    first, second = (result.requests["prompt_tokens"] for result in run.results)
    assert not np.array_equal(first, second)


def test_policies_under_comparison_see_the_same_requests(run: Run) -> None:
    other = run_experiment(small("policy.name=random"))
    for name in ("arrived_ns", "prompt_tokens", "streamed"):
        assert np.array_equal(run.requests[name].to_numpy(), other.requests[name].to_numpy())


def test_stepping_one_by_one_gives_the_same(run: Run) -> None:
    stepped = run_experiment(small("cluster.replicas.0.engine.coalesce=false"))
    assert run.requests.equals(stepped.requests)
    assert run.samples.equals(stepped.samples)
    assert run.summary == stepped.summary


def test_progress_ends_with_every_request() -> None:
    told: dict[int, tuple[int, int]] = {}

    def note(seed: int, arrived: int, total: int) -> None:
        told[seed] = (arrived, total)

    run_experiment(small(), on_progress=note)
    assert told == {1: (40, 40), 2: (40, 40)}


@pytest.mark.parametrize("name", policy_names())
def test_a_runs_journals_replay_with_zero_differences(name: str, tmp_path: Path) -> None:
    run_experiment(small(f"policy={{name: {name}}}"), journals=tmp_path)
    reports = [replay_journal(tmp_path / f"seed-{seed}.jsonl") for seed in (1, 2)]
    assert [str(report.difference) for report in reports] == ["None", "None"]
    assert [report.actions for report in reports] == [40, 40]


# -- simulate, for notebooks ----------------------------------------------------------------


def test_simulate_takes_a_mapping_and_overrides() -> None:
    content = yaml.safe_load(SMALL)
    run = simulate(content, seeds=[7], workload__requests=5, cluster__replicas__0__count=1)
    assert [result.seed for result in run.results] == [7]
    assert run.requests.num_rows == 5
    assert run.results[0].replica_ids == ("r0",)


def test_simulate_takes_a_file(tmp_path: Path, run: Run) -> None:
    assert equal(simulate(small_file(tmp_path)), run)


def test_simulate_names_the_key_that_is_wrong() -> None:
    with pytest.raises(InputError, match=r"workload\.rate_per_s: must be greater than 0, not -2"):
        simulate(yaml.safe_load(SMALL), workload__rate_per_s=-2)


def test_the_tables_have_a_seed_and_every_column(run: Run) -> None:
    assert run.requests.column_names == ["seed", *REQUEST_COLUMNS]
    assert run.samples.column_names == ["seed", *SAMPLE_COLUMNS]
    assert run.requests["seed"].to_pylist() == [1] * 40 + [2] * 40


def test_a_saved_run_is_what_the_command_line_writes(run: Run, tmp_path: Path) -> None:
    again = run_experiment(small()).save(tmp_path / "again", plots=False)
    saved = run.save(tmp_path / "run", plots=False)
    assert compare_bytes(saved, again) == []
    assert load_run(saved).summary == run.summary


def test_importing_viisim_imports_nothing_else() -> None:
    script = "import sys, viisim; print([n for n in ('numpy', 'simpy') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


# -- what is simulated ----------------------------------------------------------------------


def test_every_replica_has_devices_of_its_own() -> None:
    devices = [device for spec in replica_specs(small()) for device in spec.devices]
    assert devices == ["gpu0", "gpu1"]


def test_settings_come_from_the_profile_unless_the_experiment_differs() -> None:
    settings = replica_specs(small())[0].settings
    assert (settings.max_num_seqs, settings.num_kv_blocks) == (16, 3056)


def test_a_step_takes_what_the_profile_says() -> None:
    step_time = step_time_of(load_profile("bench/a100_like"), 128)
    # 12 ms, 10 sequences of 120 us, 5,000 context tokens of 200 ns, 300 prefill tokens of 50 us.
    expected_ps = round((12e-3 + 10 * 120e-6 + 5000 * 200e-9 + 300 * 50e-6) * 1e12)
    assert step_time.step_ps(10, 5000, 300, 0) == expected_ps


def test_a_batch_that_cannot_have_been_measured_is_extrapolation() -> None:
    calibrated = step_time_of(load_profile("radeon_vii/qwen3-vl-8b-awq"), 64).calibrated
    assert calibrated is not None
    assert (calibrated.max_decode_sequences, calibrated.max_context_tokens) == (4, 4 * 8448)


def test_a_prompt_too_long_is_refused_and_counted(tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    path.write_text(path.read_text().replace(",102,", ",16384,"))
    run = simulate(
        yaml.safe_load(SMALL), workload={"kind": "trace", "path": str(path)}, warmup_fraction=0.0
    )
    assert run.summary["outcomes"] == {"finished": 8, "shed": 0, "refused": 2, "unfinished": 0}
    refused = [row for row in run.requests.to_pylist() if row["outcome"] == REFUSED]
    assert [(row["seed"], row["request"]) for row in refused] == [(1, 2), (2, 2)]


def test_a_run_stops_at_the_simulated_time_given() -> None:
    run = simulate(yaml.safe_load(SMALL), max_sim_s=20.0)
    assert all(result.ended_ns <= 20 * 10**9 for result in run.results)


# -- faults of a policy ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_a_policys_fault_is_its_authors_error(kind: str, tmp_path: Path) -> None:
    file = small_file(tmp_path)
    with pytest.raises(PolicyError) as caught:
        simulate(file, policy={"class": f"faulty.py:{kind}"})
    assert str(caught.value).startswith(f"policy {kind} ({tmp_path / 'faulty.py'}")
    assert FAULTS[kind] in str(caught.value)


def test_an_exception_is_shown_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"faulty\.py, line 13, in place\): ValueError"):
        simulate(small_file(tmp_path), policy={"class": "faulty.py:Raises"})


def test_a_fault_of_ours_is_not_the_policys(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("viisim.simulation.Simulation._scrape", broken)
    with pytest.raises(TypeError, match="a bug"):
        run_seed(small(), 1)


# -- what a run is made of ------------------------------------------------------------------


def test_everything_that_is_read_is_hashed(tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    experiment = small(f"workload={json.dumps({'kind': 'trace', 'path': str(path)})}")
    assert sorted(input_hashes(experiment)) == [
        "cluster.replicas.0.profile",
        "policy",
        "workload.path",
    ]


def test_a_manifest_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(scaffold("mine")["mine.py"])
    workload = {"kind": "trace", "path": str(small_trace(tmp_path))}
    policy = {"class": f"{tmp_path / 'mine.py'}:Mine"}
    run = simulate(yaml.safe_load(SMALL), workload=workload, policy=policy)
    manifest = json.dumps(run.manifest)
    assert str(tmp_path) not in manifest
    assert run.manifest["config"]["policy"] == {"class": "mine.py:Mine"}


# -- the experiments that ship --------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_opens_with_its_claim(path: Path) -> None:
    assert path.read_text().startswith("# Claim: ")
    assert load_experiment(path).name == path.stem


@pytest.mark.slow
def test_the_default_experiment_does_not_saturate() -> None:
    run = simulate(ROOT / "experiments" / "least_loaded.yaml")
    assert run.summary["saturated_seeds"] == []
    assert run.summary["outcomes"]["finished"] == 5000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "requests"), [("azure_conv", 19_366), ("mooncake_prefix", 12_031)]
)
def test_a_real_trace_runs_whole_without_saturating(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, requests: int
) -> None:
    monkeypatch.setenv("VIISIM_SHARED", str(shared))
    run = simulate(ROOT / "experiments" / f"{name}.yaml")
    assert run.summary["outcomes"]["finished"] == requests
    assert run.summary["saturated_seeds"] == []
