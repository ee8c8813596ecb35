"""What devices that share a model pay to talk, by hand and beside what others measured."""

from pathlib import Path

import pytest

from viisim.config import experiment_from
from viisim.errors import InputError
from viisim.hardware import load_device
from viisim.interconnect import (
    Interconnect,
    InterconnectConfig,
    interconnect_of,
    pcie_bytes_per_s,
)
from viisim.models import load_model
from viisim.roofline import Roofline, roofline_profile

VII = load_device("radeon_vii")
RISER = interconnect_of(VII, InterconnectConfig(link="gen1x1"))


def test_tensor_parallelism_pays_two_all_reduces_a_layer() -> None:
    cost = Interconnect(bytes_per_s=1e9, latency_s=1e-4).tensor_parallel(40, 5120, devices=4)
    assert cost.step_s == pytest.approx(80 * 1e-4)
    assert cost.token_s == pytest.approx(80 * (2 * 3 / 4) * 5120 * 2 / 1e9)


def test_a_layer_split_pays_at_each_border() -> None:
    cost = Interconnect(1e9, 1e-4, border_latency_s=2e-3).layer_split(5120, stages=4)
    assert cost.step_s == pytest.approx(3 * 2e-3)
    assert cost.token_s == pytest.approx(3 * 5120 * 2 / 1e9)


def test_a_device_alone_pays_nothing() -> None:
    link = Interconnect(1e9, 1e-4)
    alone = link.tensor_parallel(40, 5120, 1) + link.layer_split(5120, 1)
    assert (alone.step_s, alone.token_s) == (0, 0)


def test_without_p2p_bytes_cross_the_bus_twice() -> None:
    assert pcie_bytes_per_s("gen3x16", p2p=True) == pytest.approx(14.25e9)
    assert pcie_bytes_per_s("gen3x16") == pytest.approx(7.125e9)


def test_the_catalogues_link_is_that_of_its_slot() -> None:
    assert interconnect_of(VII).bytes_per_s == pytest.approx(pcie_bytes_per_s("gen3x16"), rel=0.01)


def test_an_all_gather_measured_on_x4_and_x8_slots_lies_between_the_two() -> None:
    assert pcie_bytes_per_s("gen3x4") < 2.1e9 < pcie_bytes_per_s("gen3x8")


@pytest.mark.parametrize("model", ["llama-2-13b", "qwen3-14b", "gemma-3-27b", "qwen3.6-27b"])
@pytest.mark.parametrize(("stages", "least", "most"), [(2, 0.02, 0.13), (4, 0.07, 0.20)])
def test_a_layer_split_over_risers_costs_what_viiwork_measured(
    model: str, stages: int, least: float, most: float
) -> None:
    config = load_model(model)
    one = Roofline(VII, config, "q4").decode_base_s(1)
    split = Roofline(VII, config, "q4", stages=stages, interconnect=RISER).decode_base_s(1)
    assert least <= 1 - one / split <= most


def test_a_layer_split_adds_memory_and_no_speed() -> None:
    one, two = (roofline_profile("radeon_vii", "llama-2-7b-awq", stages=n) for n in (1, 2))
    assert two.engine.num_kv_blocks > 2 * one.engine.num_kv_blocks
    assert two.step_time.decode[0].base_s > one.step_time.decode[0].base_s
    assert two.step_time.prefill.per_token_s > one.step_time.prefill.per_token_s


def test_a_split_says_what_it_costs() -> None:
    profile = roofline_profile("radeon_vii", "llama-2-13b", tensor_parallel=2)
    assert "2 devices a layer, 1 stages" in profile.notes
    assert "adds 8 ms a step" in profile.notes


# -- in an experiment --


def _experiment(**replica: object) -> dict[str, object]:
    return {
        "name": "shared",
        "policy": {"name": "least_loaded"},
        "cluster": {"replicas": [{"device": "radeon_vii", "model": "llama-2-13b", **replica}]},
        "workload": {"kind": "synthetic", "preset": "azure_conv", "rate_per_s": 1, "requests": 5},
        "seeds": [1],
    }


def _first_base_s(**replica: object) -> float:
    (simulated,) = experiment_from(_experiment(**replica), "f.yaml").simulated_replicas()
    return simulated.profile.step_time.decode[0].base_s


def test_a_riser_makes_tensor_parallelism_slower_than_a_slot() -> None:
    slot = _first_base_s(tensor_parallel=2, interconnect={"link": "gen3x16"})
    riser = _first_base_s(tensor_parallel=2, interconnect={"link": "gen1x1"})
    assert slot == pytest.approx(_first_base_s(tensor_parallel=2), rel=0.001)
    assert riser > slot + 0.006


def test_a_layer_split_takes_its_devices() -> None:
    (replica,) = experiment_from(_experiment(stages=2), "f.yaml").simulated_replicas()
    assert (replica.devices, replica.tensor_parallel) == (2, 1)


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        ({"tensor_parallel": 2, "interconnect": {"link": "gen6x3"}}, r"interconnect\.link: .*gen"),
        (
            {"model": "qwen3-vl-8b-awq", "stages": 2},
            "stages: profile 'radeon_vii/qwen3-vl-8b-awq' was measured and contains its own",
        ),
        (
            {"model": "qwen3-vl-8b-awq", "interconnect": {"link": "gen1x1"}},
            "interconnect: profile 'radeon_vii/qwen3-vl-8b-awq' was measured",
        ),
    ],
)
def test_a_connection_that_cannot_be_is_one_clear_line(
    replica: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        experiment_from(_experiment(**replica), "f.yaml", Path())
    assert "\n" not in str(error.value)
