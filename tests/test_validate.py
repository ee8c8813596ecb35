"""`viisim validate`: measured runs replayed, and the report of both sides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.closed_loop import BASE_S, PER_CONTEXT_S, bench_result
from viisim.calibration.bench import read_bench
from viisim.calibration.calibrate import Options, calibrate
from viisim.calibration.measurements import Measurement, RequestLog
from viisim.calibration.read import read_measurements
from viisim.calibration.replay import replay
from viisim.calibration.validate import overall, validate
from viisim.cli.validate import validate as command
from viisim.errors import InputError
from viisim.profile import Profile, load_profile

PROMPTS, OUTPUTS = [300, 900, 500, 700, 400, 800], [20, 40, 30, 10, 50, 25]


def run_of(content: dict[str, Any], name: str = "r") -> Measurement:
    return read_bench(content, Path(f"{name}.json"), "0" * 64)


def exact_profile() -> Profile:
    """A profile that states the made-up server's own times."""
    decode = [
        {"sequences": n, "base_s": base_s, "per_context_token_s": PER_CONTEXT_S}
        for n, base_s in BASE_S.items()
    ]
    prefill = {"base_s": 0.060, "per_token_s": 1e-3, "per_token_context_s": 1.5e-7}
    return Profile.model_validate(
        {
            "device": "d",
            "model": "m",
            "engine": {"name": "vllm", "version": "0", "num_kv_blocks": 4000},
            "step_time": {"decode": decode, "prefill": prefill},
            "range": {
                "decode_sequences": [1, 4],
                "context_tokens": [0, 4000],
                "prefill_tokens": [1, 3000],
            },
            "source": "tests",
        }
    )


# -- replay ----------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_the_exact_profile_repeats_a_closed_loop(concurrency: int) -> None:
    log = run_of(bench_result(PROMPTS * 5, OUTPUTS * 5, concurrency)).requests
    assert log is not None
    again = replay(log, exact_profile())
    assert again.e2e_s.mean() == pytest.approx(log.e2e_s.mean(), rel=0.02)
    # The made-up server takes up all requests of the first instant together, the engine one.
    assert again.ttft_s.mean() == pytest.approx(log.ttft_s.mean(), rel=0.08)


def test_one_request_at_a_time_repeats_to_the_nanosecond() -> None:
    content = bench_result([500], [30], 1)
    log = run_of(content).requests
    assert log is not None
    again = replay(log, exact_profile())
    assert again.ttft_s[0] == pytest.approx(content["ttfts"][0], abs=2e-9)
    assert again.e2e_s[0] == pytest.approx(log.e2e_s[0], abs=2e-9)


def test_cached_prompts_are_cached_in_the_replay() -> None:
    log = run_of(bench_result([1600] * 4, [5] * 4, 1)).requests
    assert log is not None
    cached = np.array([1584, 0, 800, 0])
    told = RequestLog(
        log.prompt_tokens,
        log.output_tokens,
        log.ttft_s,
        log.e2e_s,
        concurrency=1,
        cached_tokens=cached,
    )
    ttft_s = replay(told, exact_profile()).ttft_s
    assert ttft_s[0] < 0.2 < ttft_s[2] < ttft_s[1]
    assert ttft_s[1] == ttft_s[3]


def test_a_slower_cap_slows_prefill_and_not_decode() -> None:
    log = run_of(bench_result([1000] * 3, [50] * 3, 1)).requests
    assert log is not None
    usual, slow = (replay(log, exact_profile(), factor) for factor in (1.0, 1.5))
    assert slow.ttft_s[0] > 1.4 * usual.ttft_s[0]
    assert (slow.e2e_s - slow.ttft_s)[0] == (usual.e2e_s - usual.ttft_s)[0]


def test_open_arrivals_are_kept() -> None:
    content = bench_result(PROMPTS, OUTPUTS, 1)
    content |= {"start_times": [0.0, 9.0, 18.0, 27.0, 36.0, 45.0], "max_concurrency": None}
    content |= {"request_rate": 0.1}
    log = run_of(content).requests
    assert log is not None
    assert replay(log, exact_profile()).begun_s.tolist() == [0.0, 9.0, 18.0, 27.0, 36.0, 45.0]


def test_a_prompt_longer_than_the_profiles_engine_is_served_as_it_was_measured() -> None:
    log = run_of(bench_result([20_000], [2], 1)).requests
    assert log is not None
    assert len(replay(log, exact_profile()).ttft_s) == 1


# -- reports ---------------------------------------------------------------------------------


def test_a_report_sets_measured_beside_predicted() -> None:
    run = run_of(bench_result(PROMPTS * 5, OUTPUTS * 5, 2))
    (report,) = validate([run], exact_profile()).runs
    assert set(report.metrics) >= {"ttft_s", "itl_s", "tpot_s", "e2e_s", "output_tokens_per_s"}
    assert set(report.metrics["itl_s"]) == {"mean", "p50", "p90", "p99"}
    mean = report.metrics["ttft_s"]["mean"]
    assert mean["error_pct"] == pytest.approx(100 * (mean["predicted"] / mean["measured"] - 1))


def test_mean_gap_is_over_all_gaps() -> None:
    content = bench_result(PROMPTS * 5, OUTPUTS * 5, 2)
    (report,) = validate([run_of(content)], exact_profile()).runs
    gaps = [gap for gaps in content["itls"] for gap in gaps]
    assert report.metrics["itl_s"]["mean"]["measured"] == pytest.approx(np.mean(gaps))


def test_larger_batches_than_calibrated_are_summed_up_apart() -> None:
    runs = [run_of(bench_result(PROMPTS * 5, OUTPUTS * 5, c), f"c{c}") for c in (2, 6)]
    content = validate(runs, exact_profile()).to_dict()
    assert [run["in_calibrated_range"] for run in content["runs"]] == [True, False]
    assert content["overall"]["itl_s"]["mean_abs_error_pct"]["p90"] < 8
    assert "itl_s" in content["outside_calibrated_range"]


def test_first_tokens_of_repeated_prompts_do_not_count_as_prefill() -> None:
    content = bench_result([16] * 8, [20] * 8, 1)
    run = run_of(content | {"metadata.workload": "tg; ctx=16;"})
    found = overall(validate([run], exact_profile()).runs)
    assert "ttft_s" not in found
    assert "ttft_repeated_s" in found


def test_skipping_compares_what_comes_after() -> None:
    content = bench_result(PROMPTS * 5, OUTPUTS * 5, 2)
    (report,) = validate([run_of(content)], exact_profile(), skip=28).runs
    measured = report.metrics["ttft_s"]["mean"]["measured"]
    assert measured == pytest.approx(np.mean(content["ttfts"][28:]))


def test_skipping_everything_is_an_error() -> None:
    run = run_of(bench_result(PROMPTS, OUTPUTS, 2))
    with pytest.raises(InputError, match="--skip 6 leaves none of its 6 entries"):
        validate([run], exact_profile(), skip=6)


# -- the command -----------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(bench_result(PROMPTS * 5, OUTPUTS * 5, 2)))
    return path


def test_json_has_runs_and_overall(measured: Path) -> None:
    done = invoke(str(measured), "--profile", "radeon_vii/qwen3-vl-8b-awq", "--json")
    content = json.loads(done.stdout)
    assert set(content["runs"][0]["metrics"]["ttft_s"]["mean"]) == {
        "measured",
        "predicted",
        "error_pct",
    }
    assert set(content["overall"]["ttft_s"]["mean_abs_error_pct"]) == {"p50", "p90"}


def test_the_table_names_run_and_error(measured: Path) -> None:
    done = invoke(str(measured), "--profile", "radeon_vii/qwen3-vl-8b-awq")
    assert done.exit_code == 0
    assert "mean TTFT" in done.stdout


def test_plots_are_drawn_into_a_folder(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    done = invoke(str(measured), "--profile", "radeon_vii/qwen3-vl-8b-awq", "--plots", str(folder))
    assert done.exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "predicted_against_measured.png",
        "step_residuals.png",
    ]


def test_an_unknown_profile_is_one_line(measured: Path) -> None:
    done = invoke(str(measured), "--profile", "nope")
    assert isinstance(done.exception, InputError)


# -- shipped profiles ------------------------------------------------------------------------

SHIPPED = {
    "mi50/qwen3-vl-8b-awq": "Qwen3-VL-8B-Instruct-AWQ-4bit, build 0.1.dev1+ga1db3d80a",
    "mi50/qwen3-vl-30b-a3b-awq-tp2": "Qwen3-VL-30B-A3B-Instruct-AWQ, build 0.11.0+gfx906",
    "mi50/gemma-3-27b-awq-tp2": "gemma-3-27b-it-qat-autoawq, build 0.11.0+gfx906",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_what_its_sources_give(shared: Path, name: str) -> None:
    folder = shared / "data" / "calibration" / "gfx906_vllm_bench"
    runs = read_measurements(sorted(folder.glob("*.json.gz")), SHIPPED[name])
    shipped = load_profile(name)
    assert {source.sha256 for source in shipped.sources} == {run.sha256 for run in runs}
    settings = {
        key: getattr(shipped.engine, key)
        for key in ("num_kv_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    }
    parallel = shipped.tensor_parallel
    again = calibrate(runs, Options("mi50", shipped.model, parallel, settings=settings)).profile
    for entry, fresh in zip(shipped.step_time.decode, again.step_time.decode, strict=True):
        assert entry.base_s == pytest.approx(fresh.base_s, rel=1e-4)
    assert shipped.step_time.prefill.per_token_s == pytest.approx(
        again.step_time.prefill.per_token_s, rel=1e-4
    )
