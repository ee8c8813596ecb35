"""`viisim calibrate --live`: what the sweep covers, what is learned, and a whole run.

The whole run is against a stub that batches and records as vLLM does; against vLLM itself where
$VIISIM_VLLM names the folder that experiments/vllm_cpu/install.sh filled.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from runtime.cluster import planned
from runtime.commands import command_of
from runtime.live.measured import noise_floor_of
from runtime.live.sweep import Phase, alone, decode_sizes, sweep, traffic
from runtime.live.worker import recording_command, steps_path
from runtime.load import Record
from runtime.vllm_plugin import RECORDS_VARIABLE, SCHEDULER_CLS
from tests import stub_recording_vllm as stub
from viisim.calibration.calibrate import Options
from viisim.cli.app import app
from viisim.cli.calibrate_live import Wanted, calibrated_live
from viisim.config import experiment_from
from viisim.errors import InputError
from viisim.profile import EngineSettings, load_profile

ROOT = Path(__file__).parents[1]
VLLM = os.environ.get("VIISIM_VLLM", "")

SMALL = EngineSettings(
    num_kv_blocks=224,
    block_tokens=32,
    max_num_seqs=32,
    max_num_batched_tokens=256,
    max_model_len=1024,
)
LARGE = EngineSettings(
    num_kv_blocks=30_000, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=32_768
)
ODD = EngineSettings(
    num_kv_blocks=40, max_num_seqs=5, max_num_batched_tokens=64, max_model_len=500, watermark=0.05
)
ENGINES = pytest.mark.parametrize("engine", [SMALL, LARGE, ODD], ids=["small", "large", "odd"])


def phases(engine: EngineSettings) -> list[Phase]:
    return [*sweep(engine), *traffic(engine)]


def decodes(engine: EngineSettings) -> Iterator[tuple[int, int, int]]:
    """(sequences, prompt, outputs) of the phases that only decode at length."""
    for phase in sweep(engine):
        if phase.name.startswith("decode"):
            ask = phase.chains[0][0]
            yield len(phase.chains), ask.prompt_tokens, ask.output_tokens


def lengths(phases: Iterable[Phase]) -> set[int]:
    return {ask.prompt_tokens for phase in phases for chain in phase.chains for ask in chain}


# -- the sweep --


def test_decode_sizes_double_up_to_the_largest_batch() -> None:
    assert decode_sizes(SMALL) == [1, 2, 4, 8, 16, 32]


def test_a_largest_batch_that_is_no_power_of_two_is_in_the_sweep() -> None:
    assert decode_sizes(ODD) == [1, 2, 4, 5]


@ENGINES
def test_each_size_decodes_at_a_short_and_a_long_context(engine: EngineSettings) -> None:
    prompts: dict[int, list[int]] = {}
    for size, prompt, _ in decodes(engine):
        prompts.setdefault(size, []).append(prompt)
    assert all(len(own) == 2 and own[1] >= 2 * own[0] for own in prompts.values())


@ENGINES
def test_sequences_that_decode_together_at_length_are_not_alike(engine: EngineSettings) -> None:
    for phase in sweep(engine):
        prompts = [chain[0].prompt_tokens for chain in phase.chains]
        if phase.name.startswith("decode") and prompts[0] > 48 and len(prompts) > 1:
            assert prompts[0] >= 2 * prompts[-1]


@ENGINES
def test_all_sequences_of_a_size_decode_together_for_many_steps(engine: EngineSettings) -> None:
    for size, prompt, outputs in decodes(engine):
        ramp = size * prompt / (engine.max_num_batched_tokens - size)
        assert outputs - ramp >= 31


@ENGINES
def test_no_request_is_longer_than_the_model_allows(engine: EngineSettings) -> None:
    for phase in phases(engine):
        for chain in phase.chains:
            longest = max(ask.prompt_tokens + ask.output_tokens for ask in chain)
            assert longest <= engine.max_model_len


@ENGINES
def test_what_runs_together_fits_the_blocks_and_the_batch(engine: EngineSettings) -> None:
    for phase in phases(engine):
        blocks = sum(
            max(-(-(ask.prompt_tokens + ask.output_tokens) // engine.block_tokens) for ask in chain)
            for chain in phase.chains
        )
        assert blocks < engine.num_kv_blocks
        assert len(phase.chains) <= engine.max_num_seqs


@ENGINES
def test_prompts_alone_go_from_a_few_tokens_to_beyond_one_step(engine: EngineSettings) -> None:
    prompts = lengths([alone(engine)])
    assert min(prompts) == 16
    assert max(prompts) > engine.max_num_batched_tokens
    assert sum(16 <= prompt <= engine.max_num_batched_tokens for prompt in prompts) >= 4


@ENGINES
def test_prompts_are_computed_beside_few_and_many_decodes(engine: EngineSettings) -> None:
    mixed = [phase for phase in sweep(engine) if phase.name.startswith("mixed")]
    sizes = [len(phase.chains) - 1 for phase in mixed]
    assert sizes == sorted({max(1, engine.max_num_seqs // 8), engine.max_num_seqs // 2})


@ENGINES
def test_decodes_outlast_the_prompts_beside_them(engine: EngineSettings) -> None:
    for phase in sweep(engine):
        if phase.name.startswith("mixed"):
            *beside, prompts = phase.chains
            step = engine.max_num_batched_tokens - len(beside)
            needed = sum(-(-ask.prompt_tokens // step) for ask in prompts)
            assert beside[0][0].output_tokens > needed


def test_a_pass_over_a_large_engine_computes_fewer_than_five_hundred_full_steps() -> None:
    tokens = sum(
        ask.prompt_tokens for phase in sweep(LARGE) for chain in phase.chains for ask in chain
    )
    assert tokens < 500 * LARGE.max_num_batched_tokens


def test_the_traffic_is_the_same_each_time() -> None:
    assert traffic(SMALL) == traffic(SMALL)


@ENGINES
def test_the_traffic_takes_some_places_and_then_all(engine: EngineSettings) -> None:
    few, most = (len(phase.chains) for phase in traffic(engine))
    assert few < most == min(engine.max_num_seqs, 32)


def test_a_request_of_the_traffic_may_come_at_any_moment_of_a_step() -> None:
    for phase in traffic(SMALL):
        pauses_s = sorted(ask.pause_s for chain in phase.chains for ask in chain)
        between = [b - a for a, b in itertools.pairwise([0.0, *pauses_s, 0.1])]
        assert max(between) < 0.02


def test_an_engine_without_room_for_a_request_is_refused() -> None:
    tiny = EngineSettings(num_kv_blocks=4, max_model_len=32, max_num_seqs=1)
    with pytest.raises(InputError, match="too few to calibrate"):
        sweep(tiny)


# -- what is learned --


def record(ttft_s: float, e2e_s: float, outputs: int) -> Record:
    return Record("0", 0.0, output_tokens=outputs, ttft_from_sent_s=ttft_s, e2e_from_sent_s=e2e_s)


def test_the_noise_floor_is_the_difference_of_means() -> None:
    first, second = [record(0.1, 1.1, 11)], [record(0.2, 2.4, 11)]
    expected = {"ttft": 1.0, "tpot": 1.2, "e2e": pytest.approx(2.4 / 1.1 - 1)}
    assert noise_floor_of(first, second) == pytest.approx(expected)


# -- the worker --


def experiment(**worker: Any) -> dict[str, Any]:
    engine = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
    return {
        "name": "live",
        "policy": {"name": "round_robin"},
        "cluster": {
            "replicas": [
                {
                    "model": "qwen3-vl-8b-awq",
                    "device": "radeon_vii",
                    "engine": engine,
                    "worker": {"cards": [], **worker} if worker.get("kind") == "vllm" else worker,
                }
            ]
        },
        "workload": {
            "kind": "synthetic",
            "prompt_tokens": 8,
            "output_tokens": 8,
            "rate_per_s": 1.0,
            "requests": 1,
        },
        "seeds": [1],
    }


def replica(folder: Path, **worker: Any) -> Any:
    return planned(experiment_from(experiment(**worker), "live.yaml", folder))[0]


def test_the_worker_is_started_with_the_recorder(tmp_path: Path) -> None:
    command = command_of(replica(tmp_path, kind="vllm"), (), "mark")
    recorded = recording_command(command, tmp_path / "r0.steps.jsonl")
    assert recorded.argv == (*command.argv, "--scheduler-cls", SCHEDULER_CLS)
    assert recorded.env[RECORDS_VARIABLE] == str(tmp_path / "r0.steps.jsonl")


def test_a_simulated_replica_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="simulated cannot be calibrated"):
        steps_path(replica(tmp_path, kind="simulated"), tmp_path, None)


def test_a_running_server_needs_the_file_it_records_to(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --steps FILE"):
        steps_path(replica(tmp_path, kind="url", url="http://127.0.0.1:9"), tmp_path, None)


# -- the command --


def calibrate(*words: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *words])


def test_files_and_a_live_worker_together_are_refused(tmp_path: Path) -> None:
    done = calibrate("a.jsonl", "--live", "b.yaml", "-o", str(tmp_path / "p.yaml"))
    assert isinstance(done.exception, InputError)


@pytest.mark.parametrize("option", ["--only=a", "--num-kv-blocks=500"])
def test_an_option_for_files_is_refused_for_a_live_worker(tmp_path: Path, option: str) -> None:
    done = calibrate("--live", "b.yaml", "-o", str(tmp_path / "p.yaml"), option)
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith(f"{option.partition('=')[0]}: not with --live")


def test_an_option_for_a_live_worker_is_refused_for_files(tmp_path: Path) -> None:
    done = calibrate("a.jsonl", "-o", str(tmp_path / "p.yaml"), "--as-deployed")
    assert isinstance(done.exception, InputError)
    assert str(done.exception) == "--as-deployed: only with --live"


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary of a calibration of the stub."""
    folder = tmp_path_factory.mktemp("live")
    command = [sys.executable, str(ROOT / "tests/stub_recording_vllm.py")]
    content = experiment(kind="vllm", command=command)
    (folder / "live.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = calibrate("--live", str(folder / "live.yaml"), "-o", str(folder / "p.yaml"), "--json")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


class TestAgainstAStub:
    def test_the_profile_has_the_times_that_the_steps_took(self, stubbed: Any) -> None:
        times = load_profile("p.yaml", stubbed[0]).step_time
        for entry in times.decode:
            assert entry.base_s + times.host_overhead_s == pytest.approx(
                stub.DECODE_BASE_S + stub.HOST_S + stub.GAP_S, rel=0.1
            )
        assert times.prefill.per_token_s == pytest.approx(stub.PREFILL_TOKEN_S, rel=0.1)

    def test_the_profile_covers_every_batch(self, stubbed: Any) -> None:
        assert load_profile("p.yaml", stubbed[0]).range.decode_sequences == (1, 4)

    def test_the_profile_names_the_version_and_the_blocks_of_the_server(self, stubbed: Any) -> None:
        engine = load_profile("p.yaml", stubbed[0]).engine
        assert (engine.version, engine.num_kv_blocks) == ("0.0.stub", 99)

    def test_the_error_is_of_traffic_that_was_not_fitted(self, stubbed: Any) -> None:
        folder, summary = stubbed
        files = (folder / "p_live").glob("traffic-*.steps.jsonl")
        worked = [
            row
            for file in files
            for row in rows(file)
            if row["decode_seqs"] or row["prefill_tokens"]
        ]
        assert summary["unseen_traffic"]["steps"] == len(worked)
        assert summary["unseen_traffic"]["step_time_mape"] < 0.05

    def test_the_client_waits_longer_than_the_engine(self, stubbed: Any) -> None:
        assert stubbed[1]["host_overhead"]["p50_s"] > 0

    def test_the_profile_has_the_way_to_the_engine_and_back(self, stubbed: Any) -> None:
        api = load_profile("p.yaml", stubbed[0]).api
        assert api is not None
        # The stub waits at least so long; the machine adds to it.
        assert api.request_s + 254 * api.request_per_prompt_token_s > stub.REQUEST_S / 2
        assert api.answer_s > stub.ANSWER_S / 2

    def test_the_summary_lies_beside_the_measurements(self, stubbed: Any) -> None:
        folder, summary = stubbed
        assert json.loads((folder / "p_live/summary.json").read_text()) == summary

    def test_every_request_is_kept_with_its_phase(self, stubbed: Any) -> None:
        lines = (stubbed[0] / "p_live/requests.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["part"] for row in rows} >= {"sweep-1", "sweep-2", "traffic-1", "traffic-2"}


def test_as_deployed_a_worker_is_behind_a_proxy_and_beside_the_others(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/stub_recording_vllm.py")]
    content = experiment(kind="vllm", command=command)
    content["cluster"]["replicas"][0]["count"] = 2
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    out = tmp_path / "p.yaml"
    done = calibrate("--live", str(tmp_path / "live.yaml"), "-o", str(out), "--as-deployed")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "p_live"
    sent = len((folder / "requests.jsonl").read_text().splitlines())
    (journal,) = (folder / "r0.front.journal").glob("*.jsonl")
    assert journal.read_text().count('"event":"Finished"') == sent
    assert (folder / "r1.beside.steps.jsonl").stat().st_size


def test_workers_are_measured_while_the_others_are(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/stub_recording_vllm.py")]
    content = experiment(kind="vllm", command=command)
    (entry,) = content["cluster"]["replicas"]
    small = {**entry, "engine": {**entry["engine"], "max_num_seqs": 2}}
    content["cluster"]["replicas"] = [entry, small]
    wanted = [Wanted(name, tmp_path / name, Options(model=name)) for name in ("r0", "r1")]
    for one in wanted:
        one.folder.mkdir()
    found = calibrated_live(
        experiment_from(content, "live.yaml", tmp_path), wanted, print, as_deployed=True
    )
    profiles = [done.profile for done, _ in found]
    assert [p.engine.max_num_seqs for p in profiles] == [4, 2]
    (first_s, *_, end_s), (other_first_s, *_, other_end_s) = (
        [row["start_s"] for part in PARTS for row in rows(one.folder / f"{part}.steps.jsonl")]
        for one in wanted
    )
    assert max(first_s, other_first_s) < min(end_s, other_end_s)
    done = wanted[0] if end_s < other_end_s else wanted[1]
    assert rows(done.folder / "worker.steps.jsonl")[-1]["start_s"] > min(end_s, other_end_s)


PARTS = "warm-up", "sweep-1", "traffic-1", "sweep-2", "traffic-2", "sweep-3"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(not VLLM, reason="$VIISIM_VLLM names no folder with vLLM in it")
def test_a_real_worker_is_calibrated(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "experiments/deploy/vllm_cpu.yaml").read_text())
    (entry,) = content["cluster"]["replicas"]
    entry |= {"profile": str(ROOT / "experiments/vllm_cpu/s_profile.yaml"), "model": "tiny"}
    entry["engine"] |= {"max_num_seqs": 4, "max_model_len": 512}
    entry["worker"]["weights"] = f"{VLLM}/models/tiny"
    entry["worker"]["command"] = ["taskset", "-c", "{index}", f"{VLLM}/venv/bin/vllm", "serve"]
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = calibrate(
        "--live", str(tmp_path / "live.yaml"), "-o", str(tmp_path / "p.yaml"), "--json"
    )
    assert done.exit_code == 0, done.output
    assert abs(json.loads(done.stdout)["unseen_traffic"]["total_step_time"]) < 0.5
