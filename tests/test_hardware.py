"""Devices: that every figure has a source, and what follows from the figures."""

import pytest

from viisim.errors import InputError
from viisim.hardware import Device, Pcie, device_names, load_device

WANTED = {
    "a100_40gb",
    "a100_80gb",
    "h100",
    "mi250x_gcd",
    "mi300x",
    "mi50",
    "mi50_32gb",
    "mi60",
    "radeon_vii",
    "rtx_3090",
    "rtx_4090",
    "rx_9070_xt",
}
FIGURES = [name for name in Device.model_fields if name not in ("name", "title", "architecture")]


def test_the_catalogue_has_these_devices() -> None:
    assert set(device_names()) == WANTED


@pytest.mark.parametrize("name", device_names())
def test_every_figure_of_a_device_says_where_it_comes_from(name: str) -> None:
    device = load_device(name)
    assert all(getattr(device, figure).source for figure in FIGURES)


@pytest.mark.parametrize("name", device_names())
def test_what_is_measured_does_not_exceed_what_is_printed(name: str) -> None:
    device = load_device(name)
    assert device.bandwidth_bytes_per_s <= device.bandwidth_gb_s.value * 1e9
    assert device.flops_per_s <= device.fp16_tflops.value * 1e12 * 1.01


@pytest.mark.parametrize("name", device_names())
def test_decoding_draws_no_more_than_the_cap(name: str) -> None:
    device = load_device(name)
    assert device.decode_power_w.value <= device.power_cap_w.value


def test_a_radeon_vii_is_taken_at_its_measured_speed() -> None:
    device = load_device("radeon_vii")
    assert (device.bandwidth_bytes_per_s, device.flops_per_s) == (840e9, 26.7e12)
    assert device.memory_bytes == 17_163_091_968


@pytest.mark.parametrize("name", ["radeon_vii", "mi50", "mi50_32gb", "mi60"])
def test_gfx906_has_neither_bf16_nor_fp8(name: str) -> None:
    assert not {"bf16", "fp8"} & set(load_device(name).dtypes.value)


def test_nobody_knows_what_a_radeon_vii_draws_idle() -> None:
    idle = load_device("radeon_vii").idle_power_w
    assert (idle.value, idle.confidence) == (None, "unknown")


def test_an_unknown_device_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'radeon_vii'"):
        load_device("radeon_7")


def test_a_riser_is_a_sixty_fourth_of_a_gen3_slot() -> None:
    riser = Pcie(generation=1, lanes=1, confidence="reported", source="viiwork")
    slot = load_device("radeon_vii").pcie
    assert slot.bytes_per_s / riser.bytes_per_s == pytest.approx(63, abs=0.1)  # line codings differ
