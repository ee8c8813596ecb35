"""From an experiment's file to the commands that start its workers, and where these go."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from runtime.cards.assignment import cards_of, spare_cards
from runtime.cluster import Planned
from runtime.commands import WorkerCommand, command_of, weights_of
from viisim.cli.dry_run import commands_text, print_commands
from viisim.cli.placement import placement_of, print_placement
from viisim.config import Experiment, experiment_from, load_experiment, resolved
from viisim.errors import InputError
from viisim.experiment import run_seed
from viisim.records import FINISHED

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden_commands"
DEPLOYED = [path.stem for path in sorted(GOLDEN.glob("*.txt"))]

PROFILED = {"profile": "bench/a100_like"}
"""A profile of no device in the catalogue, as of a worker on the CPU."""


def experiment(*replicas: dict[str, Any], **cluster: Any) -> Experiment:
    """Of replicas that default to one of Llama 2 7B in 4 bits on a Radeon VII."""
    usual = {"device": "radeon_vii", "model": "llama-2-7b-awq", "worker": {"kind": "vllm"}}
    entries = [usual | replica for replica in replicas]
    workload = {
        "kind": "synthetic",
        "model": entries[0]["model"],
        "rate_per_s": 1,
        "requests": 1,
        "prompt_tokens": 8,
        "output_tokens": 8,
    }
    content = {
        "name": "box",
        "policy": {"name": "round_robin"},
        "cluster": {"replicas": entries, **cluster},
        "workload": workload,
        "seeds": [1],
    }
    return experiment_from(content, "box.yaml")


def replicas_of(found: Experiment) -> list[Planned]:
    """On ports that are the same every time."""
    return [
        Planned(replica_id, entry, entry.worker.url or f"http://127.0.0.1:{port}", replica_id)
        for port, (replica_id, entry) in enumerate(found.numbered_replicas(), 8001)
    ]


def command(worker: dict[str, Any], **entry: Any) -> WorkerCommand:
    """For the first replica with such a worker."""
    found = experiment({"worker": {"kind": "vllm"} | worker, **entry})
    first = replicas_of(found)[0]
    return command_of(first, cards_of(found)[first.id], "box-1")


def value_of(flag: str, found: WorkerCommand) -> str:
    """What follows a flag."""
    return found.argv[found.argv.index(flag) + 1]


# --------------------------------------------------------------------------------------
# The files that ship


def test_every_box_of_the_documentation_has_a_golden_file() -> None:
    assert DEPLOYED == [
        "mi50_box",
        "radeon_vii_2xtp2_13b",
        "radeon_vii_4x7b",
        "radeon_vii_8_mixed",
        "rx_9070_xt",
    ]


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_commands_of_a_file_are_the_golden_ones(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    text = commands_text(found, replicas_of(found), found.name)
    assert text == (GOLDEN / f"{name}.txt").read_text("utf-8")


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_text_is_shell_for_exactly_the_commands(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    commands = [
        command_of(replica, cards_of(found)[replica.id], found.name)
        for replica in replicas_of(found)
    ]
    joined = (GOLDEN / f"{name}.txt").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    assert [shlex.split(line) for line in lines] == [
        ["env", *(f"{key}={value}" for key, value in each.env.items()), *each.argv]
        for each in commands
    ]


@pytest.mark.parametrize("name", DEPLOYED)
def test_every_flag_and_variable_has_a_source(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    for replica in replicas_of(found):
        each = command_of(replica, cards_of(found)[replica.id], found.name)
        flags = {word for word in each.argv if word.startswith("-")} - {"-e"}
        assert flags | set(each.env) <= set(each.why)


@pytest.mark.parametrize("name", DEPLOYED)
def test_every_replica_of_a_file_fits_its_cards(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    assert all(row["fits"] for row in placement_of(found)["replicas"])


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_file_opens_with_its_claim(name: str) -> None:
    text = (ROOT / "experiments" / "deploy" / f"{name}.yaml").read_text("utf-8")
    assert text.startswith("# Claim: ")


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_file_is_simulated_and_answers_every_request(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    result = run_seed(found, 1)
    outcomes = np.asarray(result.requests["outcome"])
    assert len(outcomes) == found.build_workload().total_requests
    assert set(outcomes.tolist()) == {FINISHED}


# --------------------------------------------------------------------------------------
# Commands


def test_gfx906_computes_in_float16_under_its_own_version() -> None:
    found = command({})
    assert value_of("--dtype", found) == "float16"
    assert found.env["HSA_OVERRIDE_GFX_VERSION"] == "9.0.6"


def test_only_gfx906_groups_go_without_custom_all_reduce() -> None:
    assert "--disable-custom-all-reduce" not in command({}).argv
    assert "--disable-custom-all-reduce" in command({}, tensor_parallel=2).argv


def test_another_chip_gets_nothing_of_gfx906() -> None:
    found = command({}, device="rx_9070_xt")
    assert "--dtype" not in found.argv
    assert set(found.env) == {"HIP_VISIBLE_DEVICES", "VIISIM_DEPLOYMENT"}


def test_cards_of_another_maker_are_chosen_by_its_variable() -> None:
    assert "CUDA_VISIBLE_DEVICES" in command({}, device="rtx_3090").env


def test_a_worker_without_cards_has_no_variable_or_flag_of_theirs() -> None:
    found = command({"cards": []}, **PROFILED)
    assert set(found.env) == {"VIISIM_DEPLOYMENT"}
    assert "--gpu-memory-utilization" not in found.argv


def test_stages_become_a_pipeline() -> None:
    found = command({}, model="llama-2-13b-awq", stages=2)
    assert value_of("--pipeline-parallel-size", found) == "2"


def test_engine_settings_become_flags() -> None:
    engine = {"max_num_seqs": 7, "enable_prefix_caching": False, "num_kv_blocks": 500}
    found = command({}, engine=engine)
    assert value_of("--max-num-seqs", found) == "7"
    assert value_of("--num-gpu-blocks-override", found) == "500"
    assert "--no-enable-prefix-caching" in found.argv


def test_blocks_are_vllms_to_measure_unless_the_file_fixes_them() -> None:
    assert "--num-gpu-blocks-override" not in command({}).argv


def test_the_files_own_flags_come_last_and_so_win() -> None:
    own = ("--gpu-memory-utilization", "0.95")
    assert command({"args": list(own)}).argv[-2:] == own


def test_the_files_own_variables_win() -> None:
    assert command({"env": {"HIP_FORCE_DEV_KERNARG": "0"}}).env["HIP_FORCE_DEV_KERNARG"] == "0"


def test_placeholders_are_filled_in_and_other_braces_stay() -> None:
    found = command(
        {
            "command": ["taskset", "-c", "{index}", "vllm", "serve"],
            "args": ["--additional-config", '{"port": 1}', "--log-file", "{replica}-{port}"],
            "env": {"VLLM_CPU_OMP_THREADS_BIND": "{index}"},
        }
    )
    assert found.argv[:3] == ("taskset", "-c", "0")
    assert value_of("--additional-config", found) == '{"port": 1}'
    assert value_of("--log-file", found) == "r0-8001"
    assert found.env["VLLM_CPU_OMP_THREADS_BIND"] == "0"


def test_a_process_is_ended_by_signals_and_a_container_by_a_command() -> None:
    assert command({}).stop_argv is None
    found = command({"kind": "container", "image": "i", "engine": "podman"})
    assert found.stop_argv == ("podman", "stop", "-t", "30", "viisim-box-1-r0")
    assert value_of("--name", found) == "viisim-box-1-r0"


def test_a_container_reaches_the_cards_and_gets_their_variables() -> None:
    found = command({"kind": "container", "image": "i", "mounts": ["/models:/models:ro"]})
    assert {"--device=/dev/kfd", "--device=/dev/dri", "--ipc=host"} < set(found.argv)
    assert "HIP_VISIBLE_DEVICES=0" in found.argv
    assert "/models:/models:ro" in found.argv
    assert found.env == {"VIISIM_DEPLOYMENT": "box-1"}


def test_a_container_without_cards_reaches_none() -> None:
    found = command({"kind": "container", "image": "i", "cards": []}, **PROFILED)
    assert not [word for word in found.argv if word.startswith("--device")]


def test_a_container_for_other_cards_than_rocms_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^r0: worker.kind: containers are for ROCm; for rtx_3090"
    ):
        command({"kind": "container", "image": "i"}, device="rtx_3090")


@pytest.mark.parametrize(
    ("model", "loaded"),
    [
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b-fp16", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b-awq", "llama-2-7b-awq"),  # the hub's is not quantised
        ("qwen3.6-27b-awq", "qwen3.6-27b-awq"),
    ],
)
def test_weights_are_the_catalogues_where_it_knows_the_checkpoint(model: str, loaded: str) -> None:
    found = experiment({"model": model, "device": "mi300x"})
    assert weights_of(found.cluster.replicas[0]) == loaded


def test_what_is_not_started_here_is_named_and_nothing_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = {"kind": "url", "url": "http://10.0.0.2:8000"}
    found = experiment({"worker": url}, {"worker": {"kind": "simulated"}})
    print_commands(found, replicas_of(found))
    assert capsys.readouterr().out.split("\n\n") == [
        "# r0: llama-2-7b-awq, runs at http://10.0.0.2:8000",
        "# r1: llama-2-7b-awq, simulated\n",
    ]


# --------------------------------------------------------------------------------------
# Cards


def test_replicas_take_cards_in_turn() -> None:
    found = experiment({"count": 2}, {"tensor_parallel": 2})
    assert cards_of(found) == {"r0": (0,), "r1": (1,), "r2": (2, 3)}


def test_named_cards_are_shared_out_in_order_and_others_go_around_them() -> None:
    named = {"kind": "vllm", "cards": [3, 1]}
    found = experiment({"count": 2}, {"tensor_parallel": 2, "worker": named})
    assert cards_of(found) == {"r0": (0,), "r1": (2,), "r2": (3, 1)}


def test_replicas_that_are_not_started_here_take_none() -> None:
    assert cards_of(experiment({"worker": {"kind": "simulated"}}, {})) == {"r1": (0,)}


def test_spare_cards_are_the_lowest_that_are_left() -> None:
    spare = {"count": 2, "device": "radeon_vii"}
    found = experiment({"worker": {"kind": "vllm", "cards": [1]}}, spare=spare)
    assert spare_cards(found) == (0, 2)


def test_a_card_given_to_two_replicas_is_refused_with_both_named() -> None:
    worker = {"kind": "vllm", "cards": [0]}
    with pytest.raises(InputError) as caught:
        cards_of(experiment({"worker": worker}, {"worker": worker}))
    assert str(caught.value) == (
        "box: cluster.replicas: card 0 is given to both r0 and r1; give each card to one replica"
    )


def test_too_few_cards_are_refused_with_the_number_that_is_needed() -> None:
    worker = {"kind": "vllm", "cards": [0, 1, 2]}
    with pytest.raises(InputError) as caught:
        cards_of(experiment({"count": 2, "tensor_parallel": 2, "worker": worker}))
    assert str(caught.value) == (
        "box: cluster.replicas.0.worker.cards: 3 for 2 x 2; give 4, or leave the key out"
    )


# --------------------------------------------------------------------------------------
# What may be written

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a key of another kind": (
        {"kind": "simulated", "cards": [0]},
        "cards: a worker of kind 'simulated' has none; write kind: vllm or container",
    ),
    "an url for what is started here": (
        {"url": "http://a"},
        "url: a worker of kind 'vllm' has none; write kind: url",
    ),
    "an image for a process": (
        {"image": "i"},
        "image: a worker of kind 'vllm' has none; write kind: container",
    ),
    "a container of nothing": (
        {"kind": "container"},
        "image: required for kind 'container', but missing",
    ),
    "no command": (
        {"command": []},
        "command: empty; give what starts vLLM, or leave the key out",
    ),
    "a placeholder that nobody fills": (
        {"command": ["vllm", "{indx}"]},
        "command: unknown placeholder {indx}. Did you mean 'index'?",
    ),
    "a flag with a key of its own": (
        {"args": ["--max_num_seqs=3"]},
        "args: --max-num-seqs belongs to a key of the file, engine.max_num_seqs; set that",
    ),
    "its negation": (
        {"args": ["--no-enable-prefix-caching"]},
        "args: --no-enable-prefix-caching belongs to a key of the file, "
        "engine.enable_prefix_caching; set that",
    ),
    "a flag that viisim chooses": (
        {"args": ["--port", "1"]},
        "args: --port is chosen by viisim deploy; leave it out",
    ),
    "cards in the environment": (
        {"env": {"HIP_VISIBLE_DEVICES": "0"}},
        "env: HIP_VISIBLE_DEVICES follows from the cards; give worker.cards",
    ),
    "a card twice": ({"cards": [1, 1]}, "cards: card 1 comes twice; give it once"),
    "an unknown server": (
        {"kind": "url", "url": "http://a", "server": "sglang"},
        "server: must be 'vllm', 'tgi', 'mlc' or 'llama.cpp', not 'sglang'",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_worker_is_refused_in_one_line(what: str) -> None:
    worker, message = MISTAKES[what]
    with pytest.raises(InputError) as caught:
        experiment({"worker": {"kind": "vllm"} | worker})
    assert str(caught.value) == f"box.yaml: cluster.replicas.0.worker.{message}"


def test_a_relative_folder_cannot_be_mounted() -> None:
    worker = {"kind": "container", "image": "i", "mounts": ["./models:/models"]}
    with pytest.raises(InputError, match=r"worker\.mounts\.0: "):
        experiment({"worker": worker})


def test_several_cards_may_take_longer_to_start() -> None:
    worker = experiment({}).cluster.replicas[0].worker
    assert (worker.start_limit(1), worker.start_limit(2)) == (1800, 2700)


def test_a_start_limit_that_is_written_holds() -> None:
    worker = {"kind": "vllm", "start_limit_s": 60.0}
    assert experiment({"worker": worker}).cluster.replicas[0].worker.start_limit(2) == 60


def test_a_simulated_worker_is_recorded_by_its_kind_alone() -> None:
    content = resolved(experiment({"worker": {"kind": "simulated"}}))
    assert content["cluster"]["replicas"][0]["worker"] == {"kind": "simulated"}


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_manifest_says_nothing_of_the_machine_and_can_be_read_again(name: str) -> None:
    found = load_experiment(ROOT / "experiments" / "deploy" / f"{name}.yaml")
    again = experiment_from(yaml.safe_load(yaml.safe_dump(resolved(found))), "manifest")
    assert {entry.worker.kind for entry in again.cluster.replicas} == {"simulated"}


# --------------------------------------------------------------------------------------
# Placement


def only_row(**replica: Any) -> dict[str, Any]:
    """The placement of a cluster of one replica."""
    row: dict[str, Any] = placement_of(experiment(replica))["replicas"][0]
    return row


def test_the_plan_counts_blocks_by_the_memory_model() -> None:
    row = only_row(engine={"max_model_len": 4096})
    assert (row["cards"], row["kv_blocks"], row["fits"]) == ([0], 1285, True)
    assert row["at_once"] == pytest.approx(1284 * 16 / 4096)


def test_more_blocks_than_there_is_room_for_do_not_fit() -> None:
    row = only_row(engine={"num_kv_blocks": 5000})
    assert row["fits"] is False
    assert row["why"] == "engine.num_kv_blocks: 5000, but there is room for 1285; lower it"


def test_larger_steps_can_leave_no_room_for_the_context() -> None:
    engine = {"max_num_batched_tokens": 49152, "max_model_len": 4096}
    row = only_row(model="llama-2-13b-awq", engine=engine)
    assert row["fits"] is False
    assert "max_model_len: 4096 tokens, but the cache holds" in row["why"]


def test_nothing_is_said_of_what_runs_elsewhere() -> None:
    row = only_row(worker={"kind": "url", "url": "http://10.0.0.2:8000"})
    assert (row["fits"], row["why"]) == (None, "runs elsewhere")


def test_a_worker_without_cards_has_the_profiles_blocks() -> None:
    row = only_row(worker={"kind": "vllm", "cards": []}, **PROFILED)
    assert row["fits"] is None
    assert row["kv_blocks"] > 0


def test_spare_cards_say_what_they_could_hold() -> None:
    found = experiment({}, spare={"count": 2, "device": "radeon_vii"})
    assert placement_of(found)["spare"] == {
        "device": "radeon_vii",
        "cards": [1, 2],
        "holds": [
            {"model": "llama-2-7b-awq", "replicas": 2, "tensor_parallel": 1, "why": None},
        ],
    }


def test_the_plan_names_the_reason_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_placement(experiment({"engine": {"num_kv_blocks": 5000}}))
    assert "r0: engine.num_kv_blocks: 5000" in capsys.readouterr().out
