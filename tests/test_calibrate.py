"""`viisim calibrate`: profiles from runs, their held-out error, and the real measurements."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.closed_loop import BASE_S, bench_result
from viisim.calibration.calibrate import Calibration, Options, calibrate
from viisim.calibration.measurements import Measurement
from viisim.calibration.profile_file import profile_text, write_profile
from viisim.calibration.read import first_of, read_measurements
from viisim.calibration.validate import RunReport, validate
from viisim.cli.calibrate import calibrate as command
from viisim.documents import parse_yaml, read_yaml
from viisim.errors import InputError
from viisim.profile import load_profile


def mixed(concurrency: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(concurrency)
    prompts = rng.integers(200, 3000, 40).tolist()
    outputs = rng.integers(2, 120, 40).tolist()
    return bench_result(prompts, outputs, concurrency, **more)


def write(folder: Path, *contents: dict[str, Any]) -> list[Path]:
    paths = [folder / f"run{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return paths


def calibrated(folder: Path, *contents: dict[str, Any], **options: Any) -> Calibration:
    return calibrate(read_measurements(write(folder, *contents)), Options(**options))


# -- profiles --------------------------------------------------------------------------------


def test_a_profile_carries_names_range_noise_and_sources(tmp_path: Path) -> None:
    profile = calibrated(tmp_path, mixed(1), mixed(2), device="mi50", model="mine").profile
    assert (profile.device, profile.model, profile.power_cap_w) == ("mi50", "mine", 225.0)
    assert profile.range.decode_sequences == (1, 2)
    assert profile.noise is not None
    assert [source.name for source in profile.sources] == ["run0", "run1"]


def test_several_runs_are_cross_validated_by_run(tmp_path: Path) -> None:
    done = calibrated(tmp_path, mixed(1), mixed(2), mixed(3))
    assert done.profile.cross_validation == "runs"
    assert [error["run"] for error in done.held_out] == ["run0", "run1", "run2"]


def test_one_run_is_cross_validated_by_halves(tmp_path: Path) -> None:
    done = calibrated(tmp_path, mixed(2))
    assert done.profile.cross_validation == "halves"
    assert done.profile.held_out_error is not None
    assert done.profile.held_out_error["mean_itl_p90"] < 0.05


def test_an_entry_beyond_the_last_batch_carries_the_trend(tmp_path: Path) -> None:
    decode = calibrated(tmp_path, mixed(1), mixed(2), mixed(4)).profile.step_time.decode
    assert [entry.sequences for entry in decode] == [1, 2, 3, 4, 8]
    assert decode[-1].base_s > decode[-2].base_s


def test_a_power_cap_is_a_factor_on_prefill_alone(tmp_path: Path) -> None:
    slower = mixed(1, **{"metadata.power_cap": "150"})
    slower["ttfts"] = [1.2 * ttft for ttft in slower["ttfts"]]
    profile = calibrated(tmp_path, mixed(1), mixed(2), slower).profile
    assert profile.power_cap_w == 225.0
    assert profile.prefill_factor_by_power_cap_w == {150: pytest.approx(1.2, rel=0.02)}
    assert profile.step_time.decode[0].base_s == pytest.approx(BASE_S[1], rel=0.05)


def test_stated_settings_go_before_files_and_defaults(tmp_path: Path) -> None:
    settings = {"num_kv_blocks": 5000}
    stated = mixed(1, **{"metadata.max_num_seqs": "8", "metadata.num_gpu_blocks": "777"})
    profile = calibrated(tmp_path, stated, settings=settings).profile
    assert (profile.engine.num_kv_blocks, profile.engine.max_num_seqs) == (5000, 8)


def test_assumed_settings_are_warned_of(tmp_path: Path) -> None:
    (warning,) = calibrated(tmp_path, mixed(1)).warnings
    assert warning.startswith("the files do not state num_kv_blocks, max_num_seqs")


def test_a_run_without_decode_still_calibrates(tmp_path: Path) -> None:
    done = calibrated(tmp_path, bench_result([4096] * 6, [1] * 6, 1))
    assert "no decode step was measured: its base is a guess from prefill" in done.warnings


def test_a_written_profile_reads_back_the_same(tmp_path: Path) -> None:
    profile = calibrated(tmp_path, mixed(1), mixed(2)).profile
    write_profile(profile, tmp_path / "p.yaml", ["Made by hand."])
    assert load_profile("p.yaml", tmp_path) == profile


def test_the_folder_of_a_profile_is_made(tmp_path: Path) -> None:
    write_profile(calibrated(tmp_path, mixed(1)).profile, tmp_path / "mine/p.yaml")
    assert (tmp_path / "mine/p.yaml").exists()


def test_the_file_begins_with_its_comments(tmp_path: Path) -> None:
    text = profile_text(calibrated(tmp_path, mixed(1)).profile, ["Made by:", " a command"])
    assert text.splitlines()[:2] == ["# Made by:", "#  a command"]
    assert parse_yaml(text, "p")["tensor_parallel"] == 1


# -- the command -----------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*arguments])


def test_the_command_writes_a_profile_and_prints_its_error(tmp_path: Path) -> None:
    paths = write(tmp_path, mixed(1), mixed(2))
    out = tmp_path / "p.yaml"
    done = invoke(*map(str, paths), "-o", str(out), "--json", "--device", "mi50")
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert content["held_out_error"] == read_yaml(out)["held_out_error"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"metadata.vllm_ver": "0.12"}, "2 builds are mixed"),
        ({"model_id": "other"}, "2 models are mixed"),
        ({"errors": ["boom"]}, "requests failed"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    paths = write(tmp_path, mixed(1), mixed(2) | second)
    done = invoke(*map(str, paths), "-o", str(tmp_path / "p.yaml"))
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run0.json", "run1.json"]


def test_a_profile_must_be_a_yaml_file(tmp_path: Path) -> None:
    (path,) = write(tmp_path, mixed(1))
    done = invoke(str(path), "-o", str(tmp_path / "p.txt"))
    assert "a profile is a .yaml file" in str(done.exception)


def test_the_head_of_the_file_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    (path,) = write(tmp_path, mixed(1))
    out = tmp_path / "p.yaml"
    assert invoke(str(path), "-o", str(out)).exit_code == 0
    assert str(tmp_path) not in out.read_text()


# -- real measurements -----------------------------------------------------------------------


@cache
def gfx906(shared: Path) -> tuple[tuple[Measurement, ...], ...]:
    """Runs of the gfx906 measurements, by setup."""
    paths = sorted((shared / "data" / "calibration" / "gfx906_vllm_bench").glob("*.json.gz"))
    groups: dict[str, list[Measurement]] = {}
    for run in read_measurements(paths):
        groups.setdefault(str(run.setup), []).append(run)
    return tuple(tuple(group) for group in groups.values())


def held_out(group: Sequence[Measurement], first: int) -> list[tuple[RunReport, set[int]]]:
    """Every fourth run, replayed under a profile of the others; with the batch sizes seen."""
    test = list(group[first::4])
    train = [run for run in group if run not in test]
    profile = calibrate(train, Options()).profile
    sizes = {entry.sequences for entry in profile.step_time.decode[:-1]}
    return [(report, sizes) for report in validate(test, profile).runs]


@pytest.mark.slow
def test_held_out_runs_of_gfx906_are_within_the_goal(shared: Path) -> None:
    reports = [found for group in gfx906(shared) for found in held_out(group, 1)]
    itl = [
        abs(report.metrics["itl_s"]["mean"]["error_pct"])
        for report, sizes in reports
        if "itl_s" in report.metrics and report.concurrency in sizes
    ]
    ttft = [
        abs(report.metrics["ttft_s"]["mean"]["error_pct"])
        for report, _ in reports
        if report.in_range and not report.repeats_one_prompt
    ]
    assert (len(itl), len(ttft)) >= (8, 6)
    assert np.quantile(itl, 0.5) <= 5
    assert np.quantile(itl, 0.9) <= 15
    assert np.quantile(ttft, 0.5) <= 10
    assert np.quantile(ttft, 0.9) <= 25


def test_prompts_of_growing_length_are_recognised_in_real_runs(shared: Path) -> None:
    (group,) = (
        g for g in gfx906(shared) if "30B" in str(g[0].setup) and "ga1db" in g[0].setup.build
    )
    profile = calibrate(group, Options()).profile
    cached = {s.prompt_tokens: s.cached_tokens for s in profile.sources if s.entries == 10}
    assert cached[(24576, 24576)] == 16384
    assert cached[(8192, 8192)] == 0


def test_later_steps_of_a_cpu_worker_follow_from_the_earlier(shared: Path) -> None:
    path = shared / "data" / "calibration" / "vllm_cpu_steps" / "worker0.steps.jsonl.gz"
    (run,) = read_measurements([path])
    half = len(run) // 2
    settings = {"num_kv_blocks": 224, "block_tokens": 32, "max_model_len": 1024}
    profile = calibrate([first_of(run, half)], Options(settings=settings)).profile
    (report,) = validate([run], profile, skip=half).runs
    assert report.metrics["step_s"]["each"]["mean_abs_error_pct"] <= 12
    assert abs(report.metrics["step_s"]["total"]["error_pct"]) <= 5


def test_the_second_half_of_an_overloaded_run_follows_from_the_first(shared: Path) -> None:
    folder = shared / "data" / "calibration" / "llmservingsim_vllm" / "RTX4090_Llama-3.1-8B"
    (run,) = read_measurements([folder / "requests.jsonl.gz"])
    profile = calibrate([first_of(run, 150)], Options()).profile
    (report,) = validate([run], profile, skip=150).runs
    assert abs(report.metrics["tpot_s"]["mean"]["error_pct"]) <= 5
    assert abs(report.metrics["ttft_s"]["mean"]["error_pct"]) <= 10
