"""Devices: what a card has, what of it can be had, what it draws and what it costs.

Every figure of the catalogue carries its source and how far it can be trusted; a figure that
nobody knows is null there, and stays None here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from viisim.documents import Strict, check, inside, nearest, read_yaml
from viisim.errors import InputError

_CATALOGUE = Path(__file__).parent / "catalogue" / "devices.yaml"

MIB = 2**20
GB_PER_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938}
"""PCIe after line coding, by generation, in one direction."""

Dtype: TypeAlias = Literal["fp16", "bf16", "fp8", "fp32", "int8"]
Confidence: TypeAlias = Literal[
    "measured", "datasheet", "reported", "derived", "assumed", "unknown"
]
"""measured: on this chip; datasheet: its maker's; reported: seen by others; derived: computed
from a measurement, as the source says; assumed: a guess with a reason; unknown: null."""


class Figure(Strict):
    """A number, where it comes from, and how far to trust it."""

    value: Annotated[float, Field(gt=0)] | None
    confidence: Confidence
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _unknown_is_null(self) -> Self:
        if (self.value is None) != (self.confidence == "unknown"):
            raise inside("confidence: 'unknown' goes with value: null, and only with it")
        return self


class KnownFigure(Figure):
    """A figure that nothing can be computed without."""

    value: Annotated[float, Field(gt=0)]


class Share(KnownFigure):
    """What software reaches of a limit of the hardware."""

    value: Annotated[float, Field(gt=0, le=1)]


class Pcie(Strict):
    """The slot connector, as built; a riser or a narrow slot takes its place."""

    generation: Annotated[int, Field(ge=1, le=5)]
    lanes: Literal[1, 2, 4, 8, 16] = 16
    confidence: Confidence
    source: str = Field(min_length=1)

    @property
    def bytes_per_s(self) -> float:
        """In one direction, after line coding."""
        return GB_PER_S_PER_LANE[self.generation] * self.lanes * 1e9


class Dtypes(Strict):
    """The number formats that the card computes in."""

    value: tuple[Dtype, ...] = Field(min_length=1, strict=False)
    confidence: Confidence
    source: str = Field(min_length=1)


class Device(Strict):
    """One GPU, or one half of a card that shows as two."""

    name: str
    """Its key in the catalogue."""
    title: str
    architecture: str
    """The compiler's name for it."""
    memory_mib: KnownFigure
    """What the driver shows, which is less than the label says."""
    bandwidth_gb_s: KnownFigure
    """Nominal."""
    measured_bandwidth_gb_s: Figure
    fp16_tflops: KnownFigure
    """Nominal and dense; matrix cores where it has them."""
    measured_fp16_tflops: Figure
    dtypes: Dtypes
    power_cap_w: KnownFigure
    """The default board power limit; prefill reaches it."""
    decode_power_w: KnownFigure
    idle_power_w: Figure
    pcie: Pcie
    link_gb_s: KnownFigure
    """Between two cards of one host, in one direction, as an all-reduce gets it."""
    link_latency_us: KnownFigure
    """Of one all-reduce of a few kilobytes."""
    used_price_usd: Figure
    weights_efficiency: Share
    """Of the memory bandwidth, when a decode step reads weights."""
    attention_efficiency: Share
    """Of bandwidth when decode reads keys and values, of TFLOPS when prefill attends."""
    compute_efficiency: Share
    """Of TFLOPS, in the matrix products of prefill."""

    @property
    def memory_bytes(self) -> int:
        """What the driver shows."""
        return round(self.memory_mib.value * MIB)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Measured, else nominal."""
        return (self.measured_bandwidth_gb_s.value or self.bandwidth_gb_s.value) * 1e9

    @property
    def flops_per_s(self) -> float:
        """fp16, measured, else nominal."""
        return (self.measured_fp16_tflops.value or self.fp16_tflops.value) * 1e12


def device_names() -> list[str]:
    """The catalogue's devices, in alphabetical order."""
    return sorted(_devices())


def load_device(name: str) -> Device:
    """A device of the catalogue. Raises InputError for an unknown name."""
    devices = _devices()
    if name not in devices:
        raise InputError(f"unknown device {name!r}. {nearest(name, devices)}")
    return devices[name]


@cache
def _devices() -> dict[str, Device]:
    content: dict[str, Any] = read_yaml(_CATALOGUE)
    folder = _CATALOGUE.parent
    return {
        name: check(Device, {"name": name, **entry}, f"catalogue: {name}", folder)
        for name, entry in content.items()
        if not name.startswith("_")
    }
