"""Profiles: those that ship, and what is said of a mistake in one."""

import gzip
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from viisim.documents import override, read_yaml
from viisim.errors import InputError
from viisim.profile import Profile, load_profile, profile_hash, profile_names

SHIPPED = Path(__file__).parents[1] / "viisim" / "profiles"
A100_LIKE = SHIPPED / "bench" / "a100_like.yaml"


def changed(tmp_path: Path, *assignments: str) -> str:
    """A profile file with these changes, as a name to load."""
    content = read_yaml(A100_LIKE)
    for assignment in assignments:
        override(content, assignment)
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


def mistake(tmp_path: Path, *assignments: str) -> str:
    """What is said of the changed profile, less the file's name in front."""
    path = changed(tmp_path, *assignments)
    with pytest.raises(InputError) as caught:
        load_profile(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_names_are_paths_below_the_shipped_folder() -> None:
    names = profile_names()
    assert names == sorted(names)
    assert {"bench/a100_like", "radeon_vii/qwen3-vl-8b-awq", "mi50/qwen3-vl-8b-awq"} <= set(names)


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_stands_where_device_and_model_say(name: str) -> None:
    profile = load_profile(name)
    assert f"{profile.device}/{profile.model}" == name


def test_the_benchmark_profile_takes_the_stated_times() -> None:
    times = load_profile("bench/a100_like").step_time
    for entry in times.decode:
        assert entry.base_s == pytest.approx(12e-3 + 120e-6 * entry.sequences, rel=1e-12)
        assert entry.per_context_token_s == 200e-9
    assert (times.prefill.base_s, times.prefill.per_token_s) == (12e-3, 50e-6)
    assert (times.prefill.per_token_context_s, times.host_overhead_s) == (0, 0)


def test_the_scheduler_gets_the_profiles_settings() -> None:
    settings = load_profile("bench/a100_like").engine.scheduler_settings()
    assert (settings.num_kv_blocks, settings.block_tokens) == (7500, 16)
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (128, 2048)


def test_the_watermark_is_a_share_of_the_pool_rounded_down(tmp_path: Path) -> None:
    profile = load_profile(changed(tmp_path, "engine.watermark=0.001"))
    assert profile.engine.scheduler_settings().watermark_blocks == 7


def test_a_file_is_found_relative_to_a_folder(tmp_path: Path) -> None:
    changed(tmp_path)
    assert load_profile("p.yaml", tmp_path) == load_profile("bench/a100_like")


def test_the_hash_is_of_the_content_not_of_its_layout(tmp_path: Path) -> None:
    same = load_profile(changed(tmp_path))
    assert profile_hash(same) == profile_hash(load_profile("bench/a100_like"))
    other = load_profile(changed(tmp_path, "step_time.prefill.base_s=0.013"))
    assert profile_hash(other) != profile_hash(same)


# -- mistakes --------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'bench/a100_like'"):
        load_profile("bench/a100like")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("step_tme=1", "unknown key 'step_tme'. Did you mean 'step_time'?"),
        (
            "step_time.decode.1.sequences=1",
            "step_time.decode: sequences [1, 1] must increase; sort the entries",
        ),
        ("step_time.decode=[]", "step_time.decode: must have at least one entry"),
        (
            "step_time.decode.0.base_s=0",
            "step_time.decode.0.base_s: a step takes time; give more than 0",
        ),
        (
            "step_time.prefill.per_token_s=-1.0",
            "step_time.prefill.per_token_s: must be greater than or equal to 0, not -1.0",
        ),
        (
            "prefill_factor_by_power_cap_w={150: 0}",
            "prefill_factor_by_power_cap_w.150: must be greater than 0, not 0",
        ),
        (
            "cross_validation=folds",
            "cross_validation: must be 'runs' or 'halves', not 'folds'",
        ),
        (
            "covariance={decode: [[1.0, 2.0]], prefill: [[0, 0, 0], [0, 0, 0], [0, 0, 0]]}",
            "covariance.decode.0.2: required, but missing",
        ),
        (
            "range.context_tokens=[5, 4]",
            "range.context_tokens: [5, 4] is empty; write [least, most]",
        ),
        (
            "engine.max_num_batched_tokens=64",
            "engine.max_num_batched_tokens: 64 is less than max_num_seqs (128); raise it",
        ),
        (
            "engine.enable_chunked_prefill=false",
            "engine.max_num_batched_tokens: 2048 is less than max_model_len (16384) without "
            "chunked prefill; raise it",
        ),
    ],
)
def test_a_mistake_is_one_line_with_key_and_repair(
    tmp_path: Path, assignment: str, said: str
) -> None:
    assert mistake(tmp_path, assignment) == said


# -- the Radeon VII profile against its sources ----------------------------------------------


def measured(shared: Path, run: str) -> dict[str, Any]:
    """One result file of the gfx906 measurements."""
    folder = shared / "data" / "calibration" / "gfx906_vllm_bench"
    (path,) = folder.glob(f"*-{run}.json.gz")
    with gzip.open(path, "rt") as lines:
        content: dict[str, Any] = json.load(lines)
    return content


def radeon_vii() -> Profile:
    return load_profile("radeon_vii/qwen3-vl-8b-awq")


# The profile states fits within 1.6 % of the mean of every prompt length.
@pytest.mark.parametrize(
    ("run", "entry"),
    [
        ("20251107-134531", 0),
        ("20251107-134813", 0),
        ("20251107-135413", 0),
        ("20251107-134639", 2),
        ("20251107-134959", 2),
        ("20251107-135636", 2),
    ],
)
def test_decode_steps_take_the_measured_time(shared: Path, run: str, entry: int) -> None:
    content = measured(shared, run)
    decode = radeon_vii().step_time.decode[entry]
    # The last two of the 30 requests at concurrency 4 ran as a pair.
    gaps_s = [gap for itls in content["itls"][:28] for gap in itls[8:247]]
    context_tokens = decode.sequences * (content["input_lens"][0] + 128)
    step_s = decode.base_s + decode.per_context_token_s * context_tokens
    assert step_s == pytest.approx(median(gaps_s), rel=0.02)


def test_prefill_of_8192_tokens_takes_the_measured_time(shared: Path) -> None:
    ttft_s = median(measured(shared, "20251107-135917")["ttfts"])
    prefill = radeon_vii().step_time.prefill
    pairs = 8192 * 8193 / 2
    steps = 8192 / radeon_vii().engine.max_num_batched_tokens
    prefill_s = (
        steps * prefill.base_s + 8192 * prefill.per_token_s + pairs * prefill.per_token_context_s
    )
    assert prefill_s == pytest.approx(ttft_s, rel=0.005)
