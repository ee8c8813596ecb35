"""The roofline: hand-computed times, its labels, and measured cards it must not be far from."""

import csv
import gzip
from pathlib import Path
from statistics import median

import pytest

from viisim.errors import InputError
from viisim.hardware import device_names, load_device
from viisim.models import load_model
from viisim.profile import load_profile
from viisim.roofline import Roofline, is_uncalibrated, roofline_profile

VII = load_device("radeon_vii")


def test_a_decode_step_reads_the_weights_and_computes_them() -> None:
    times = Roofline(VII, load_model("llama-2-7b"))
    layers, head = 6_738_415_616 - 2 * 131_072_000, 131_072_000
    reading = 2 * (layers + head) / (840e9 * 0.50)
    computing = 2 * layers / (26.7e12 * 0.51)
    assert times.decode_base_s(1) == pytest.approx(reading + computing)
    assert times.decode_base_s(9) == pytest.approx(reading + 9 * computing)


def test_context_costs_its_bytes() -> None:
    times = Roofline(VII, load_model("llama-2-7b"))
    assert times.per_context_token_s == pytest.approx(524_288 / (840e9 * 0.20))


def test_a_window_bounds_what_context_costs() -> None:
    times = Roofline(VII, load_model("gpt-oss-120b"), "mxfp4")
    a_layer = 2 * 8 * 64 * 2
    mean_bytes = 18 * a_layer * (1 + 128 / 4096)
    assert times.per_context_token_s == pytest.approx(mean_bytes / (840e9 * 0.20))


def test_prefill_attends_to_all_before_it() -> None:
    times = Roofline(VII, load_model("llama-2-7b"))
    assert times.prefill_pair_s == pytest.approx(4 * 32 * 128 * 32 / (26.7e12 * 0.20))


def test_one_token_meets_its_own_experts_and_many_meet_all() -> None:
    model = load_model("mixtral-8x7b")
    times, count = Roofline(load_device("mi300x"), model), model.parameters()
    others = 2 * (count.linear + count.head)
    assert times.read_bytes(1) == pytest.approx(others + 2 * count.experts / 4)
    assert times.read_bytes(1000) == pytest.approx(others + 2 * count.experts)


def test_two_cards_pay_two_all_reduces_a_layer() -> None:
    model = load_model("llama-2-13b")
    one, two = (Roofline(VII, model, "w4a16", size) for size in (1, 2))
    sent = 80 * (2 * 1 / 2) * 5120 * 2 / 7.1e9
    halved = two.read_bytes(1) / (840e9 * 0.5) + two.token_s
    assert two.decode_base_s(1) == pytest.approx(halved + 80 * 100e-6 + sent)
    assert two.read_bytes(1) == pytest.approx(one.read_bytes(1) / 2, rel=1e-3)


def test_the_profile_says_that_nobody_measured_it() -> None:
    profile = roofline_profile("radeon_vii", "llama-2-7b-awq")
    assert is_uncalibrated(profile)
    assert profile.source == (
        "uncalibrated: roofline of AMD Radeon VII 16 GB and llama-2-7b-awq as awq"
    )
    assert "weights 0.50 (derived: " in profile.notes
    assert (profile.range.decode_sequences, profile.range.prefill_tokens) == ((0, 0), (0, 0))


def test_a_measured_profile_is_not_labelled_so() -> None:
    assert not is_uncalibrated(load_profile("radeon_vii/qwen3-vl-8b-awq"))


def test_the_engine_gets_what_memory_leaves() -> None:
    engine = roofline_profile("radeon_vii", "llama-2-7b").engine
    assert (engine.num_kv_blocks, engine.max_model_len) == (151, 2400)


def test_a_context_beyond_the_cache_is_refused() -> None:
    with pytest.raises(InputError, match=r"max_model_len: 4096 tokens do not fit .* holds 2400"):
        roofline_profile("radeon_vii", "llama-2-7b", max_model_len=4096)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit 1 x radeon_vii"):
        roofline_profile("radeon_vii", "llama-2-13b")


@pytest.mark.parametrize("device", device_names())
def test_every_device_has_a_profile_of_a_small_model(device: str) -> None:
    profile = roofline_profile(device, "llama-2-7b-awq")
    bases = [entry.base_s for entry in profile.step_time.decode]
    assert bases == sorted(bases)


def test_the_measured_radeon_vii_profile_is_near() -> None:
    # The efficiencies come from these runs, so this checks the formula, not the prediction.
    measured = load_profile("radeon_vii/qwen3-vl-8b-awq")
    roofline = roofline_profile("radeon_vii", "qwen3-vl-8b-awq")
    for entry in measured.step_time.decode:
        base_s = next(e.base_s for e in roofline.step_time.decode if e.sequences == entry.sequences)
        assert base_s == pytest.approx(entry.base_s, rel=0.17)
    assert roofline.step_time.prefill.per_token_s == pytest.approx(1.02e-3, rel=0.01)
    assert roofline.engine.num_kv_blocks == pytest.approx(measured.engine.num_kv_blocks, abs=3)


@pytest.mark.parametrize(
    ("hardware", "device"), [("a100-80gb", "a100_80gb"), ("h100-80gb", "h100")]
)
def test_a_batch_of_sixteen_is_predicted_from_a_batch_of_one(
    shared: Path, hardware: str, device: str
) -> None:
    times = Roofline(load_device(device), load_model("llama-2-70b"), tensor_parallel=2)
    with gzip.open(shared / "data/calibration/splitwise_perf_model.csv.gz", "rt") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["hardware"], row["tensor_parallel"])
            == ("llama2-70b", hardware, "2")
            and (row["prompt_size"], row["batch_size"], row["token_size"]) == ("512", "16", "128")
        ]
    measured_s = median(float(row["token_time"]) for row in rows) / 1000
    context_tokens = 16 * (512 + 64)
    predicted_s = times.decode_base_s(16) + context_tokens * times.per_context_token_s
    assert predicted_s == pytest.approx(measured_s, rel=0.08)
