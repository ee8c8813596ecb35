"""Launching replicas on free devices, and giving devices back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.interface import Launch
from viisim.config import LoadConfig, experiment_from
from viisim.experiment import Run, run_experiment, simulated_devices
from viisim.experiment import _spec as make_spec
from viisim.hardware import load_device
from viisim.journal import replay_journal
from viisim.launch import Launcher, load_time_s
from viisim.records import FINISHED
from viisim.roofline import total_weights_bytes

POLICIES = """\
from policies.interface import Dispatch, Hold, Launch, LaunchFailed, Policy, Retire

MODEL = "qwen3-vl-8b-awq"


class Elastic(Policy):
    \"\"\"Launches on free devices while requests wait, retires what it launched when idle.\"\"\"

    tick_s = 5.0

    def place(self, request, view):
        free = [r for r in view.ready(request.model) if r.inflight_requests < 2]
        if not free:
            return Hold()
        return Dispatch(request.id, min(free, key=lambda r: r.inflight_requests).id)

    def plan(self, queue, view):
        used = {device for replica in view.replicas for device in replica.devices}
        free = [f"gpu{n}" for n in range(3) if f"gpu{n}" not in used]
        if view.queued_requests > 3 and free:
            yield Launch(MODEL, (free[0],))
        idle = [r for r in view.replicas if r.state == "ready" and not r.inflight_requests]
        if not view.queued_requests and len(idle) > 1:
            yield Retire(idle[0].id)


class Changing(Elastic):
    \"\"\"Launches and changes its mind at once, twice over.\"\"\"

    def plan(self, queue, view):
        if len(view.replicas) == 1:
            yield Launch(MODEL, ("gpu1",))
            launched = next(r.id for r in view.replicas if r.state == "starting")
            yield Retire(launched)
            yield Retire(launched)


class Greedy(Elastic):
    \"\"\"Wants what there is not.\"\"\"

    failed = ()

    def plan(self, queue, view):
        if not self.failed:
            yield Launch(MODEL, ("gpu9",))

    def observe(self, event, view):
        if isinstance(event, LaunchFailed):
            self.failed += (event.reason,)
"""


def experiment(folder: Path, name: str, **other: Any) -> Any:
    (folder / "elastic.py").write_text(POLICIES)
    cluster = {
        "replicas": [{"device": "radeon_vii", "model": "qwen3-vl-8b-awq"}],
        "spare": {"count": 2, "device": "radeon_vii"},
    }
    content = {
        "name": "elastic",
        "policy": {"class": f"elastic.py:{name}"},
        "cluster": cluster | other.pop("cluster", {}),
        "workload": {
            "kind": "synthetic",
            "preset": "azure_conv",
            "rate_per_s": 0.5,
            "requests": 60,
            "arrivals": {"kind": "gamma", "cv": 3.0},
        },
        "seeds": [1],
    }
    return experiment_from(content | other, "elastic.yaml", folder)


@pytest.fixture(scope="module")
def journaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("elastic")
    return run_experiment(experiment(folder, "Elastic"), journals=folder), folder


def test_a_policy_launches_under_load_and_the_launched_serve(
    journaled: tuple[Run, Path],
) -> None:
    (result,) = journaled[0].results
    assert (result.requests["outcome"] == FINISHED).all()
    launched = [i for i, name in enumerate(result.replica_ids) if name != "r0"]
    assert launched
    assert np.isin(result.requests["replica"], launched).any()


def test_a_launched_replica_is_ready_after_its_load_time(journaled: tuple[Run, Path]) -> None:
    (result,) = journaled[0].results
    device = load_device("radeon_vii")
    load_ns = round(load_time_s(LoadConfig(), device, "qwen3-vl-8b-awq", 1) * 1e9)
    ready_ns = result.replicas[1].ready_ns
    ticks = (ready_ns - load_ns - result.requests["arrived_ns"][0]) / 5e9  # since the first arrival
    assert ticks == pytest.approx(round(ticks), abs=1e-6)
    first = result.requests["dispatched_ns"][result.requests["replica"] == 1].min()
    assert first >= ready_ns


def test_an_idle_replica_is_retired_and_its_device_used_again(
    journaled: tuple[Run, Path],
) -> None:
    (result,) = journaled[0].results
    assert len(result.replicas) > 3  # of three devices
    index = next(i for i, totals in enumerate(result.replicas) if totals.retired_ns)
    samples: Any = result.samples
    late = samples["time_ns"] > result.replicas[index].retired_ns
    assert late.any()
    assert index not in samples["replica"][late]


def test_a_journal_of_launches_replays(journaled: tuple[Run, Path]) -> None:
    report = replay_journal(journaled[1] / "seed-1.jsonl", folder=journaled[1])
    assert str(report.difference) == "None"


def test_a_replica_retired_while_it_loads_never_comes(tmp_path: Path) -> None:
    (result,) = run_experiment(experiment(tmp_path, "Changing")).results
    assert result.replica_ids == ("r0",)
    assert (result.requests["outcome"] == FINISHED).all()


def test_a_failed_launch_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    (result,) = run_experiment(experiment(tmp_path, "Greedy")).results
    assert result.replica_ids == ("r0",)
    assert (result.requests["outcome"] == FINISHED).all()


def test_coalescing_changes_nothing_about_launches(tmp_path: Path) -> None:
    runs = [
        run_experiment(
            experiment(
                tmp_path,
                "Elastic",
                cluster={
                    "replicas": [
                        {
                            "device": "radeon_vii",
                            "model": "qwen3-vl-8b-awq",
                            "engine": {"coalesce": coalesce},
                        }
                    ]
                },
            )
        )
        for coalesce in (True, False)
    ]
    assert runs[0].requests.equals(runs[1].requests)
    assert runs[0].samples.equals(runs[1].samples)


# -- what a launch comes to --


def launcher(folder: Path, **cluster: Any) -> Launcher:
    config = experiment(folder, "Elastic", cluster=cluster)
    return Launcher(config.cluster, simulated_devices(config), make_spec)


def test_a_launch_makes_a_replica_of_its_devices(tmp_path: Path) -> None:
    launch = Launch("llama-2-13b", ("gpu1", "gpu2"), "x")
    made = launcher(tmp_path)(launch)
    assert not isinstance(made, str)
    spec, load_ns = made
    assert (spec.id, spec.model, spec.devices) == ("x", "llama-2-13b", launch.devices)
    weights = total_weights_bytes("llama-2-13b")
    assert load_ns == pytest.approx(1e9 * (weights / 2e9 + weights / 2 / 15.76e9), rel=1e-6)


def test_the_files_own_engine_settings_hold_for_launched_replicas(tmp_path: Path) -> None:
    entry = {"device": "radeon_vii", "model": "qwen3-vl-8b-awq", "engine": {"max_num_seqs": 7}}
    made = launcher(tmp_path, replicas=[entry])(Launch("qwen3-vl-8b-awq", ("gpu1",), "x"))
    assert not isinstance(made, str)
    assert made[0].settings.max_num_seqs == 7


@pytest.mark.parametrize(
    ("model", "devices", "reason"),
    [
        ("llama-2-70b", ["gpu1"], "does not fit 1 x radeon_vii"),
        ("llama-9", ["gpu1"], "unknown model 'llama-9'"),
        ("llama-2-7b", ["gpu7"], "unknown device 'gpu7'"),
        ("llama-2-7b", ["gpu0", "gpu1"], "devices of several kinds: mi50, radeon_vii"),
        ("qwen3-vl-8b-awq", ["gpu1", "gpu2"], "is for 1 devices, not 2"),
    ],
)
def test_a_launch_that_cannot_be_says_why(
    tmp_path: Path, model: str, devices: list[str], reason: str
) -> None:
    own = {"device": "mi50", "model": "qwen3-vl-8b-awq"}
    names = tuple(devices)
    answer = launcher(tmp_path, replicas=[own])(Launch(model, names, "x"))
    assert isinstance(answer, str)
    assert reason in answer


def test_loading_takes_disk_then_pcie_then_the_start() -> None:
    load = LoadConfig(disk_bytes_per_s=1e9, pcie_bytes_per_s=5e8, engine_start_s=30)
    weights = total_weights_bytes("gemma-3-27b-awq")
    expected_s = weights / 1e9 + weights / 2 / 5e8 + 30
    seconds = load_time_s(load, load_device("mi50"), "gemma-3-27b-awq-tp2", 2)
    assert seconds == pytest.approx(expected_s)
