"""`viisim validate --live`: its file, the requests it sends, and a whole run against a stub."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from runtime.live.validation import deployed
from runtime.processes import Home
from viisim.cli.app import app
from viisim.cli.validate_live import Workers
from viisim.config import experiment_from, load_experiment
from viisim.errors import InputError
from viisim.validation import measure
from viisim.validation.config import load_validation
from viisim.validation.measured import MeasuredRun, Part, PlannedRun, measured_answers, rows_of
from viisim.validation.parity import policy_differences
from viisim.validation.predict import (
    Speed,
    closed_loop,
    closed_loop_per_s,
    requests_at,
    simulated,
    slowed,
    stretched,
)

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


def written(folder: Path, deployed: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A validation's file, with its experiment's beside it."""
    text = yaml.safe_dump(deployed or experiment())
    (folder / "experiment.yaml").write_text(text, encoding="utf-8")
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
            assert all(load_experiment(p.file, p.overrides) for p in config.parts.values())

    def test_a_worker_that_is_not_started_here_is_an_error(self, tmp_path: Path) -> None:
        content = experiment()
        content["cluster"]["replicas"][0]["worker"] = {"kind": "simulated"}
        file = written(tmp_path, content)
        done = viisim("validate", "--live", file, "--out", tmp_path / "out")
        assert isinstance(done.exception, InputError)
        assert "give kind vllm" in str(done.exception)

    def test_a_folder_that_holds_something_is_left_alone(self, tmp_path: Path) -> None:
        done = viisim("validate", "--live", written(tmp_path), "--out", tmp_path)
        assert isinstance(done.exception, InputError)
        assert "is not empty" in str(done.exception)

    @pytest.mark.parametrize("option", ["--plots=d", "--profile=p", "--skip=1"])
    def test_an_option_for_files_is_an_error(self, tmp_path: Path, option: str) -> None:
        done = viisim("validate", "--live", written(tmp_path), option)
        assert isinstance(done.exception, InputError)
        assert str(done.exception).startswith(f"{option.partition('=')[0]}: not with --live")

    @pytest.mark.parametrize("option", ["--quick", "--again", "--out=d", "--page=p.md"])
    def test_its_options_are_errors_without_live(self, tmp_path: Path, option: str) -> None:
        done = viisim("validate", tmp_path / "a.json", "--profile", "p", option)
        assert isinstance(done.exception, InputError)
        assert str(done.exception) == f"{option.partition('=')[0]}: only with --live"

    def test_again_without_measurements_is_an_error(self, tmp_path: Path) -> None:
        done = viisim("validate", "--live", written(tmp_path), "--again", "--out", tmp_path / "no")
        assert isinstance(done.exception, InputError)
        assert "measure first" in str(done.exception)


class TestWorkers:
    @staticmethod
    def labels(folder: Path, *changes: dict[str, Any]) -> list[str]:
        """Of replicas that differ by these changes of their engine."""
        (entry,) = experiment()["cluster"]["replicas"]
        entry["worker"]["weights"] = "models/tiny-1b-awq"
        entries = [{**entry, "engine": {**entry["engine"], **change}} for change in changes]
        file = written(folder, experiment(cluster={"replicas": entries}))
        return list(Workers(load_validation(file), folder / "profiles").labels)

    def test_equal_ones_share_a_profile(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, {}, {}) == ["tiny-1b-awq"]

    def test_other_settings_have_a_profile_of_their_own(self, tmp_path: Path) -> None:
        changes = ({}, {"max_num_seqs": 2}, {"max_num_seqs": 3})
        expected = ["tiny-1b-awq", "tiny-1b-awq-2", "tiny-1b-awq-3"]
        assert self.labels(tmp_path, *changes) == expected

    def test_equal_ones_beside_others_have_a_profile_of_their_own(self, tmp_path: Path) -> None:
        shipped = load_validation(ROOT / "experiments/validation/vllm_cpu.yaml")
        workers = Workers(shipped, tmp_path / "profiles")
        assert workers.labels == ["m", "m3", "m-2"]
        first, second = (workers.overrides(part) for part in shipped.parts.values())
        assert [Path(json.loads(one.split("=")[1])).stem for one in second] == ["m3", "m-2"]
        assert Path(json.loads(first[-1].split("=")[1])).stem == "m"

    def test_those_of_one_deployment_are_calibrated_at_once(self, tmp_path: Path) -> None:
        (entry,) = experiment()["cluster"]["replicas"]
        one = {**entry, "count": 1}
        other = {**one, "worker": {**one["worker"], "weights": "models/large"}}
        unequal = experiment(cluster={"replicas": [one, other]})
        (tmp_path / "unequal.yaml").write_text(yaml.safe_dump(unequal), encoding="utf-8")
        ranking = {**validation()["ranking"], "experiment": "unequal.yaml"}
        equal = experiment(cluster={"replicas": [one, one]})
        file = written(tmp_path, equal, ranking=ranking)
        workers = Workers(load_validation(file), tmp_path / "profiles")
        expected = [{"tiny-2": "r0", "large": "r1"}, {"tiny": "r0"}]
        assert [own for _, own in workers.calibrations()] == expected


class TestFolder:
    RUN = MeasuredRun("one", "0.3", {"name": "a"}, 1, 2.0, 10.0, 100.0, 110.0, 0.1, 0.1)
    ROW: ClassVar = {
        "id": "q",
        "traffic_class": "",
        "due_s": 1.0,
        "error": "",
        "ttft_s": 0.5,
        "e2e_s": 1.5,
        "prompt_tokens": 20,
        "cached_tokens": 4,
        "output_tokens": 11,
    }

    def part(self, folder: Path, steps: list[dict[str, Any]], *rows: dict[str, Any]) -> Part:
        part = Part(folder)
        part.steps_file("r0").parent.mkdir(parents=True)
        for file, lines in ((part.steps_file("r0"), steps), (part.requests_file("one"), rows)):
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return part

    def test_the_steps_of_a_run_are_those_that_began_in_it(self, tmp_path: Path) -> None:
        steps = [{"start_s": at_s} for at_s in (99.9, 100.0, 109.9, 110.0)]
        found = self.part(tmp_path, steps).steps("r0", [self.RUN])
        assert [row["start_s"] for row in found] == [100.0, 109.9]

    def test_a_failed_request_has_neither_latency_nor_tokens(self, tmp_path: Path) -> None:
        broken = {**self.ROW, "due_s": 2.0, "error": "broke off", "output_tokens": 3}
        steps = [{"start_s": 105.0, "preempted": 2}]
        answers = measured_answers(self.part(tmp_path, steps, broken, self.ROW), self.RUN, ["r0"])
        assert answers.e2e_s.tolist()[0] == 1.5
        assert answers.tpot_s.tolist()[0] == pytest.approx(0.1)
        assert answers.output_tokens.tolist() == [11, 0]
        assert (answers.failed, answers.preemptions) == (1, 2)


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

    def test_slower_workers_have_a_smaller_capacity(self) -> None:
        whole = closed_loop_per_s(self.CHANGED, 200, 1)
        slow = {name: Speed([2.0], [2.0]) for name in ("r0", "r1")}
        half = closed_loop_per_s(self.CHANGED, 200, 1, slow)
        assert half == pytest.approx(whole / 2, rel=0.01)

    def test_a_speed_lasts_two_seconds_and_the_last_one_goes_on(self) -> None:
        requests = requests_at(self.CHANGED, 2.0, 20.0, seed=3)

        def e2e_s(*factors: float) -> Any:
            speeds = {name: Speed(factors, factors) for name in ("r0", "r1")}
            columns = simulated(self.CHANGED, requests, 3, speeds).requests
            return (columns["finished_ns"] - columns["arrived_ns"]) / 1e9

        arrived_s = np.array([request.view.arrived_s for request in requests])
        early, changed = arrived_s < 3.0, e2e_s(1.0, 1.0, 2.0)
        assert changed[early] == pytest.approx(e2e_s(1.0)[early])
        assert changed[arrived_s > 4.0] == pytest.approx(e2e_s(2.0)[arrived_s > 4.0])

    def test_a_longer_run_has_its_speeds_for_longer(self) -> None:
        before = Speed([1.0, 2.0], [3.0, 4.0], [(1.0, 0.5)])
        after = Speed([1.0, 1.0, 2.0], [3.0, 3.0, 4.0], [(1.5, 0.75)])
        assert stretched({"r0": before}, 1.5) == {"r0": after}

    def test_a_machine_that_halts_half_of_the_time_has_half_the_capacity(self) -> None:
        whole = closed_loop_per_s(self.CHANGED, 200, 1)
        halts_s = [(0.1 * number, 0.05) for number in range(2000)]
        speeds = {name: Speed([1.0], [1.0], halts_s) for name in ("r0", "r1")}
        assert closed_loop_per_s(self.CHANGED, 200, 1, speeds) == pytest.approx(whole / 2, rel=0.02)

    def test_decode_and_prefill_are_slow_each_by_its_own(self) -> None:
        times = self.CHANGED.simulated_replicas()[0].profile.step_time
        slow = slowed(times, 2.0, 3.0)
        assert slow.decode[0].base_s == 2 * times.decode[0].base_s
        assert slow.prefill.per_token_s == 3 * times.prefill.per_token_s


class TestPolicies:
    PLANNED = ({"name": "a"}, {"name": "a"}, {"name": "b"})

    def test_that_changed_as_planned_do_not_differ(self) -> None:
        assert list(policy_differences([{"name": "a"}, {"name": "b"}], self.PLANNED)) == []

    def test_another_parameter_is_a_difference(self) -> None:
        found = list(policy_differences([{"name": "a", "x": 1}, {"name": "b"}], self.PLANNED))
        assert found == ["policy 1: deployed {'name': 'a', 'x': 1}, simulated {'name': 'a'}"]

    def test_the_policy_of_a_run_that_was_cut_off_is_none(self) -> None:
        deployed = [{"name": "a"}, {"name": "b"}, {"name": "c"}]
        assert list(policy_differences(deployed, self.PLANNED, one_more=True)) == []
        assert list(policy_differences(deployed, self.PLANNED)) != []

    def test_one_that_was_never_deployed_is_a_difference(self) -> None:
        (found,) = policy_differences([{"name": "a"}], self.PLANNED)
        assert found == "1 policies were deployed in turn, 2 were to be"


class TestMeasuring:
    def test_a_worker_that_refuses_requests_ends_it_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refused(served: object, part: Part, run: PlannedRun, requests: object) -> None:
            line = json.dumps({"due_s": 0.0, "error": "400 Bad Request"})
            part.requests_file(run.name).write_text(line + "\n", encoding="utf-8")

        monkeypatch.setattr("viisim.validation.measure.measure_run", refused)
        asked = experiment_from(experiment(), "stubs.yaml", ROOT)
        nobody: Any = None
        workers = measure._Workers(nobody, Part(tmp_path), asked, print)
        with pytest.raises(InputError, match=r"1 requests failed \(400 Bad Request\); look into"):
            asyncio.run(workers.warm_up())

    @pytest.mark.slow
    def test_workers_of_a_deployment_that_was_killed_are_ended(self, tmp_path: Path) -> None:
        written(tmp_path)
        part, workers = Part(tmp_path / "part"), []

        async def killed(home: Home) -> None:
            async with deployed(tmp_path / "experiment.yaml", [], part, home, print):
                (proxy,) = rows_of(part.folder / "started.jsonl")
                workers.extend(rows_of(part.folder / "state/started.jsonl"))
                os.kill(proxy["session"], signal.SIGKILL)

        with Home(part.folder) as home:
            asyncio.run(killed(home))
        assert len(workers) == 2
        assert not any(psutil.pid_exists(row["session"]) for row in workers)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a whole run against stubs."""
    folder = tmp_path_factory.mktemp("validation")
    done = viisim("validate", "--live", written(folder), "--out", folder / "out", "--json")
    assert done.exit_code in (0, 1), done.output  # stubs take what time they like
    return folder, json.loads(done.stdout)


def slower(times: Any, factor: float) -> Any:
    """A profile's step times, multiplied."""
    if isinstance(times, dict):
        return {k: v if k == "sequences" else slower(v, factor) for k, v in times.items()}
    return [slower(one, factor) for one in times] if isinstance(times, list) else times * factor


def judged_with_slower_profile(folder: Path, out: Path, factor: float) -> Any:
    """The report of the same measurements, copied to `out`."""
    shutil.copytree(folder / "out", out)
    profile = yaml.safe_load((out / "profiles/tiny.yaml").read_text())
    profile["step_time"] = slower(profile["step_time"], factor)
    (out / "profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    viisim("validate", "--live", folder / "validation.yaml", "--out", out, "--again")
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
class TestAgainstStubs:
    def test_every_request_is_answered_at_its_length(self, live: Any) -> None:
        counts = [check for check in live[1]["checks"] if check["kind"] == "count"]
        assert counts
        assert all(check["passed"] for check in counts)

    def test_the_other_worker_had_traffic_during_the_calibration(self, live: Any) -> None:
        beside = live[0] / "out/profiles/tiny/r1.beside.steps.jsonl"
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
        workers = [one["worker"] for one in live[1]["steps"]]
        assert workers == ["accuracy r0", "accuracy r1", "ranking r0", "ranking r1"]

    def test_a_profile_too_slow_by_half_is_right_at_the_workers_own_speed(
        self, live: Any, tmp_path: Path
    ) -> None:
        again = judged_with_slower_profile(live[0], tmp_path / "out", 1.5)
        errors = [one["loads"][0]["at_own_speed"]["e2e_s"] for one in (live[1], again)]
        assert errors[1] == pytest.approx(errors[0], abs=0.01)

    def test_the_gauge_does_not_make_up_for_a_profile_that_is_wrong(
        self, live: Any, tmp_path: Path
    ) -> None:
        again = judged_with_slower_profile(live[0], tmp_path / "out", 1.5)
        before, after = (report["steps"][0] for report in (live[1], again))
        assert after["gauged_by_run"] == pytest.approx(before["gauged_by_run"])
        assert 1 + after["total"] == pytest.approx(1.5 * (1 + before["total"]))

    def test_the_machine_is_gauged_beside_each_worker_in_every_run(self, live: Any) -> None:
        assert all(one["gauge_error"] < 0.02 for one in live[1]["steps"])
        assert all(factor != 1 for one in live[1]["steps"] for factor in one["gauged_by_run"])

    def test_halts_of_the_machine_slow_the_predicted_run_down(
        self, live: Any, tmp_path: Path
    ) -> None:
        out, file = tmp_path / "out", live[0] / "validation.yaml"
        shutil.copytree(live[0] / "out", out)
        for gauge in sorted(out.glob("accuracy/steps/*.gauge.jsonl")):
            ticks = rows_of(gauge)
            first_s, last_s = ticks[0]["at_s"], ticks[-1]["at_s"]
            halts_s = np.arange(first_s - 1, last_s + 1, 0.002).tolist()
            halts = [{"at_s": at_s, "halted_s": 0.001} for at_s in halts_s]
            gauge.write_text("".join(json.dumps(row) + "\n" for row in [*ticks, *halts]))
        viisim("validate", "--live", file, "--out", out, "--again")
        again = json.loads((out / "report.json").read_text())
        workers = [one for one in again["setup"]["workers"] if one["id"].startswith("accuracy")]
        assert [one["halted"] for one in workers] == pytest.approx([0.5, 0.5], abs=0.01)
        before, after = (
            next(row["predicted"] for row in one["loads"][0]["rows"] if row["metric"] == "tpot_s")
            for one in (live[1], again)
        )
        assert after > 1.5 * before

    def test_the_steps_of_the_calibration_say_how_slow_the_machine_was(self, live: Any) -> None:
        profile = live[0] / "out/profiles/tiny"
        rows = rows_of(profile / "sweep-2.steps.jsonl")
        assert all(0.9 < row["slowdown"] < 1.1 for row in rows)

    def test_a_calibration_of_seconds_does_not_change_how_steps_follow_the_machine(
        self, live: Any
    ) -> None:
        summary = json.loads((live[0] / "out/profiles/tiny/summary.json").read_text())
        response = summary["response"]
        assert response["work_s"] == pytest.approx(0.002, rel=0.06)
        assert (response["decode"], response["prefill"]) == pytest.approx((0.8, 1.75), abs=0.1)

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

    def test_without_its_ranking_a_run_can_be_judged(self, live: Any, tmp_path: Path) -> None:
        out, file = tmp_path / "out", live[0] / "validation.yaml"
        shutil.copytree(live[0] / "out", out, ignore=shutil.ignore_patterns("ranking"))
        about = json.loads((out / "measured.json").read_text())
        del about["wall_s"]["ranking"]
        (out / "measured.json").write_text(json.dumps(about))
        viisim("validate", "--live", file, "--out", out, "--again")
        assert json.loads((out / "report.json").read_text())["missing"] == ["ranking"]

    def test_without_its_last_run_it_can_be_judged_and_says_what_is_missing(
        self, live: Any, tmp_path: Path
    ) -> None:
        out, file = tmp_path / "out", live[0] / "validation.yaml"
        shutil.copytree(live[0] / "out", out)
        about = json.loads((out / "measured.json").read_text())
        del about["wall_s"]["ranking"]
        (out / "measured.json").write_text(json.dumps(about))
        runs = (out / "ranking/runs.jsonl").read_text().splitlines(keepends=True)
        (out / "ranking/runs.jsonl").write_text("".join(runs[:-1]))
        viisim("validate", "--live", file, "--out", out, "--again")
        report = json.loads((out / "report.json").read_text())
        assert report["missing"] == ["the end of ranking"]
        assert report["parity"]["policy_differences"] == []
        assert report["rankings"]["short"]["repetitions"] == 1

    def test_without_a_gauge_a_worker_on_the_cpu_is_not_all_measured(
        self, live: Any, tmp_path: Path
    ) -> None:
        out, file = tmp_path / "out", live[0] / "validation.yaml"
        shutil.copytree(live[0] / "out", out)
        gauge = out / "accuracy/steps/r1.gauge.jsonl"
        gauge.write_text("".join(gauge.read_text().splitlines(keepends=True)[:5]))
        viisim("validate", "--live", file, "--out", out, "--again")
        missing = json.loads((out / "report.json").read_text())["missing"]
        assert missing == ["the machine's speed beside accuracy r1"]

    def test_what_was_measured_quickly_is_judged_as_that(self, live: Any, tmp_path: Path) -> None:
        out, file = tmp_path / "out", live[0] / "validation.yaml"
        shutil.copytree(live[0] / "out", out)
        about = json.loads((out / "measured.json").read_text())
        (out / "measured.json").write_text(json.dumps(about | {"quick": True}))
        viisim("validate", "--live", file, "--out", out, "--again")
        report = json.loads((out / "report.json").read_text())
        assert report["limits"]["source"] == "loose"
        assert report["command"].endswith(" --quick")

    def test_a_folder_of_another_version_is_an_error(self, live: Any, tmp_path: Path) -> None:
        about = json.loads((live[0] / "out/measured.json").read_text())
        del about["format"]
        (tmp_path / "measured.json").write_text(json.dumps(about))
        file = live[0] / "validation.yaml"
        done = viisim("validate", "--live", file, "--out", tmp_path, "--again")
        assert isinstance(done.exception, InputError)
        assert "measure again" in str(done.exception)

    def test_another_workload_than_was_sent_is_an_error(self, live: Any, tmp_path: Path) -> None:
        workload = {**experiment()["workload"], "output_tokens": 7}
        file = written(tmp_path, experiment(workload=workload))
        done = viisim("validate", "--live", file, "--out", live[0] / "out", "--again")
        assert isinstance(done.exception, InputError)
        assert "these are not the requests of" in str(done.exception)

    def test_the_page_finds_its_figures(self, live: Any, tmp_path: Path) -> None:
        file, out, page = live[0] / "validation.yaml", live[0] / "out", tmp_path / "page.md"
        viisim("validate", "--live", file, "--out", out, "--again", "--page", page)
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert len(shown) == 3
        assert all((tmp_path / name).exists() for name in shown)

    def test_a_policy_unlike_the_simulated_is_reported(self, live: Any, tmp_path: Path) -> None:
        out, file = tmp_path / "out", written(tmp_path, experiment(policy={"name": "round_robin"}))
        shutil.copytree(live[0] / "out", out)
        done = viisim("validate", "--live", file, "--out", out, "--again")
        assert done.exit_code == 1
        failed = json.loads((out / "report.json").read_text())["failed"]
        assert any("policies unlike the simulated" in name for name in failed)
