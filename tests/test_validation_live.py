"""`viisim validate --live`: its file, the requests it sends, and a whole run against a stub."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from viisim.cli.app import app
from viisim.config import experiment_from, load_experiment
from viisim.errors import InputError
from viisim.validation.config import load_validation
from viisim.validation.judge import policy_differences
from viisim.validation.predict import closed_loop, closed_loop_per_s, requests_at, simulated

ROOT = Path(__file__).parents[1]
STUB = [sys.executable, str(ROOT / "tests/stub_recording_vllm.py")]


def experiment(**changes: Any) -> dict[str, Any]:
    """Two equal stub workers."""
    engine = {
        "num_kv_blocks": 99,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    worker = {"kind": "vllm", "cards": [], "weights": "tiny", "command": STUB}
    replica = {
        "count": 2,
        "model": "qwen3-vl-8b-awq",
        "device": "radeon_vii",
        "engine": engine,
        "worker": worker,
    }
    workload = {
        "kind": "synthetic",
        "prompt_tokens": 20,
        "output_tokens": 10,
        "rate_per_s": 5.0,
        "requests": 20_000,
    }
    return {
        "name": "stubs",
        "policy": {"name": "least_loaded"},
        "cluster": {"replicas": [replica]},
        "workload": workload,
        "predictor": {"kind": "oracle"},
        "seeds": [1],
        **changes,
    }


def validation(**changes: Any) -> dict[str, Any]:
    workload = {**experiment()["workload"], "output_tokens": 5}
    ranked = {
        "name": "short",
        "load": 0.05,
        "judged_by": {"metric": "e2e_s"},
        "workload": workload,
    }
    return {
        "name": "stubs",
        "accuracy": {
            "experiment": "experiment.yaml",
            "loads": [0.05],
            "repetitions": 2,
            "run_s": 0.5,
        },
        "ranking": {
            "experiment": "experiment.yaml",
            "policies": [{"name": "round_robin"}, {"name": "least_loaded"}],
            "repetitions": 2,
            "run_s": 0.5,
            "workloads": [ranked],
        },
        "quick": ["accuracy.run_s=0.25"],
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    """A validation's file, with its experiment's beside it."""
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment()), encoding="utf-8")
    file = folder / "validation.yaml"
    file.write_text(yaml.safe_dump(validation(**changes)), encoding="utf-8")
    return file


def viisim(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


class TestFile:
    def test_quick_changes_what_it_lists(self, tmp_path: Path) -> None:
        assert load_validation(written(tmp_path), quick=True).accuracy.run_s == 0.25

    def test_quick_without_a_list_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="quick: says nothing"):
            load_validation(written(tmp_path, quick=[]), quick=True)

    def test_a_policy_by_its_class_is_an_error(self, tmp_path: Path) -> None:
        content = validation()
        content["ranking"]["policies"].append({"class": f"{ROOT}/policies/random.py:Random"})
        with pytest.raises(InputError, match=r"ranking\.policies: give policies by name"):
            load_validation(written(tmp_path, ranking=content["ranking"]))

    def test_a_policy_that_comes_twice_is_an_error(self, tmp_path: Path) -> None:
        content = validation()
        content["ranking"]["policies"].append({"name": "round_robin"})
        with pytest.raises(InputError, match="round_robin comes twice"):
            load_validation(written(tmp_path, ranking=content["ranking"]))

    @pytest.mark.parametrize("name", ["vllm_cpu"])
    def test_what_ships_is_valid_both_ways(self, name: str) -> None:
        file = ROOT / f"experiments/validation/{name}.yaml"
        for quick in (False, True):
            config = load_validation(file, quick=quick)
            load_experiment(config.accuracy.located(config.accuracy.experiment))

    def test_a_worker_that_is_not_started_here_is_an_error(self, tmp_path: Path) -> None:
        file = written(tmp_path)
        content = experiment()
        content["cluster"]["replicas"][0]["worker"] = {"kind": "simulated"}
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        done = viisim("validate", "--live", file, "--out", tmp_path / "out")
        assert isinstance(done.exception, InputError)
        assert "give kind vllm" in str(done.exception)

    def test_a_folder_that_holds_something_is_left_alone(self, tmp_path: Path) -> None:
        done = viisim("validate", "--live", written(tmp_path), "--out", tmp_path)
        assert isinstance(done.exception, InputError)
        assert "holds something already" in str(done.exception)

    def test_again_without_measurements_is_an_error(self, tmp_path: Path) -> None:
        done = viisim("validate", "--live", written(tmp_path), "--again", "--out", tmp_path / "no")
        assert isinstance(done.exception, InputError)
        assert "measure first" in str(done.exception)


class TestRequests:
    CHANGED = experiment_from(experiment(), "stubs.yaml", ROOT)

    def test_at_another_rate_they_are_the_same_ones(self) -> None:
        slow = requests_at(self.CHANGED, 2.0, 10.0, seed=3)
        fast = requests_at(self.CHANGED, 4.0, 5.0, seed=3)
        assert [r.view.id for r in slow] == [r.view.id for r in fast]

    def test_none_arrives_after_the_run(self) -> None:
        requests = requests_at(self.CHANGED, 20.0, 3.0, seed=1)
        assert max(request.arrived_ns for request in requests) < 3e9

    def test_too_few_of_them_are_an_error(self) -> None:
        with pytest.raises(InputError, match=r"workload\.requests: 20000 do not fill"):
            requests_at(self.CHANGED, 1e4, 100.0, seed=1)

    def test_a_closed_loop_asks_every_request_once(self) -> None:
        loop = closed_loop(self.CHANGED, users=7, requests=40, seed=1)
        result = simulated(self.CHANGED, loop, seed=1)
        assert len(result.requests["request"]) == 40

    def test_a_closed_loop_never_has_more_users_than_it_says(self) -> None:
        result = simulated(self.CHANGED, closed_loop(self.CHANGED, 5, 40, 1), seed=1)
        columns = result.requests
        for now in columns["arrived_ns"]:
            present = (columns["arrived_ns"] <= now) & (columns["finished_ns"] > now)
            assert present.sum() <= 5

    def test_a_slower_cluster_has_a_smaller_capacity(self) -> None:
        content = experiment()
        content["cluster"]["replicas"][0]["slowdown"] = 2.0
        slow = experiment_from(content, "stubs.yaml", ROOT)
        whole, half = (closed_loop_per_s(one, 200, 1) for one in (self.CHANGED, slow))
        assert half == pytest.approx(whole / 2, rel=0.01)


class TestPolicies:
    PLANNED = ({"name": "a"}, {"name": "a"}, {"name": "b"})

    def test_that_changed_as_planned_do_not_differ(self) -> None:
        assert list(policy_differences([{"name": "a"}, {"name": "b"}], self.PLANNED)) == []

    def test_another_parameter_is_a_difference(self) -> None:
        found = list(policy_differences([{"name": "a", "x": 1}, {"name": "b"}], self.PLANNED))
        assert found == ["policy 1: deployed {'name': 'a', 'x': 1}, simulated {'name': 'a'}"]

    def test_one_that_was_never_deployed_is_a_difference(self) -> None:
        (found,) = policy_differences([{"name": "a"}], self.PLANNED)
        assert found == "1 policies were deployed in turn, 2 were to be"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a whole run against stubs."""
    folder = tmp_path_factory.mktemp("validation")
    done = viisim("validate", "--live", written(folder), "--out", folder / "out", "--json")
    assert done.exit_code in (0, 1), done.output  # stubs take what time they like
    return folder, json.loads(done.stdout)


@pytest.mark.slow
class TestAgainstStubs:
    def test_every_request_is_answered_at_its_length(self, live: Any) -> None:
        counts = [check for check in live[1]["checks"] if check["kind"] == "count"]
        assert counts
        assert all(check["passed"] for check in counts)

    def test_the_other_worker_had_traffic_during_the_calibration(self, live: Any) -> None:
        beside = live[0] / "out/profiles/tiny/r1.beside.jsonl"
        assert len(beside.read_text(encoding="utf-8").splitlines()) > 100

    def test_the_journals_replay(self, live: Any) -> None:
        parity = live[1]["parity"]
        assert parity["events"] > 0
        assert (parity["differences"], parity["policy_differences"]) == ([], [])

    def test_the_capacity_is_both_measured_and_predicted(self, live: Any) -> None:
        (capacity,) = live[1]["capacities"]
        assert capacity["measured"] > 0
        assert capacity["predicted"] > 0

    def test_steps_of_both_workers_are_compared(self, live: Any) -> None:
        assert [one["worker"] for one in live[1]["steps"]] == ["r0", "r1"]

    def test_policies_are_ranked(self, live: Any) -> None:
        rows = live[1]["rankings"]["short"]["rows"]
        assert [row["policy"] for row in rows] == ["round_robin", "least_loaded"]

    def test_the_report_and_its_figures_are_there(self, live: Any) -> None:
        out = live[0] / "out"
        page = (out / "report.md").read_text(encoding="utf-8")
        assert all((out / "plots" / name).exists() for name in live[1]["pictures"])
        assert live[1]["verdict"] in page

    def test_judging_again_gives_the_same_bytes(self, live: Any) -> None:
        file, out = live[0] / "validation.yaml", live[0] / "out"
        before = (out / "report.json").read_bytes()
        viisim("validate", "--live", file, "--out", out, "--again")
        assert (out / "report.json").read_bytes() == before

    def test_the_page_finds_its_figures(self, live: Any, tmp_path: Path) -> None:
        file, out, page = live[0] / "validation.yaml", live[0] / "out", tmp_path / "page.md"
        viisim("validate", "--live", file, "--out", out, "--again", "--page", page)
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert len(shown) == 3
        assert all((tmp_path / name).exists() for name in shown)

    def test_a_policy_unlike_the_simulated_is_reported(self, live: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(live[0] / "out", out)
        runs = out / "accuracy/runs.jsonl"
        runs.write_text(runs.read_text().replace("least_loaded", "round_robin"))
        done = viisim("validate", "--live", live[0] / "validation.yaml", "--out", out, "--again")
        assert done.exit_code == 1
        failed = json.loads((out / "report.json").read_text())["failed"]
        assert any("policies unlike the simulated" in name for name in failed)
