"""What devices that share a model spend on talking to each other, as additions to a step's time.

Tensor parallelism pays two all-reduces a layer, each a latency and the bytes of the step's
activations over the bandwidth. A layer split pays one hand-over at each border between stages: a
latency, and the same bytes once. Its stages work one after the other, so that it adds memory and
no speed: while one computes, the others idle (llama.cpp's layer split; vLLM's pipeline would fill
the gaps with other requests, which is not modelled).

Without peer-to-peer transfers, as on consumer cards, bytes are staged through host memory and
cross the bus twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from viisim.documents import Strict
from viisim.hardware import GB_PER_S_PER_LANE, Device
from viisim.profile import Positive

PCIE_EFFICIENCY = 14.25 / (16 * GB_PER_S_PER_LANE[3])
"""Of the rate after line coding: 14.25 GB/s to the host were measured on gen3 x16."""

STAGED_CROSSINGS = 2
"""Once down to host memory, once up again."""

BORDER_LATENCY_US = 1000.0
"""Assumed, of one hand-over between stages: chosen so that dense models of 13 to 27 billion weights
at 4 bits lose 2-13 % of their decode rate on two cards and 7-20 % on four, on gen1 x1 risers, as
VIIWork measured of models it does not name."""

ACTIVATION_BYTES = 2
"""fp16."""


class InterconnectConfig(Strict):
    """How the devices of a group are connected, where it is not as the catalogue says."""

    link: Annotated[str, Field(pattern="^gen[1-5]x(1|2|4|8|16)$")]
    """The narrowest slot of the group: `gen1x1` for a riser, `gen3x16`, ..."""
    p2p: bool = False
    """Devices write to each other's memory; else everything goes through the host's."""
    latency_us: Positive | None = None
    """Of one small all-reduce; None: the device's in the catalogue."""
    border_latency_us: Positive = BORDER_LATENCY_US
    """Of one hand-over between two stages of a layer split."""


@dataclass(frozen=True, slots=True)
class Communication:
    """What talking adds to an engine step."""

    step_s: float = 0.0
    """However many tokens it computes."""
    token_s: float = 0.0
    """For each token it computes."""

    def __add__(self, other: Communication) -> Communication:
        """Both, one after the other."""
        return Communication(self.step_s + other.step_s, self.token_s + other.token_s)


@dataclass(frozen=True, slots=True)
class Interconnect:
    """The connection between any two devices of one host."""

    bytes_per_s: float
    """In one direction, as an all-reduce gets it."""
    latency_s: float
    """Of one all-reduce of a few kilobytes."""
    border_latency_s: float = BORDER_LATENCY_US * 1e-6
    """Of one hand-over between two stages."""

    def tensor_parallel(self, layers: int, hidden: int, devices: int) -> Communication:
        """Two all-reduces a layer over a ring of `devices`."""
        if devices == 1:
            return Communication()
        reductions = 2 * layers
        rounds = 2 * (devices - 1) / devices
        sent_bytes = reductions * rounds * hidden * ACTIVATION_BYTES
        return Communication(reductions * self.latency_s, sent_bytes / self.bytes_per_s)

    def layer_split(self, hidden: int, stages: int) -> Communication:
        """The activations at each border between `stages`."""
        borders = stages - 1
        sent_bytes = borders * hidden * ACTIVATION_BYTES
        return Communication(borders * self.border_latency_s, sent_bytes / self.bytes_per_s)


def pcie_bytes_per_s(link: str, p2p: bool = False) -> float:
    """Between two devices on a link such as `gen3x16`, in one direction."""
    generation, lanes = link.removeprefix("gen").split("x")
    raw = GB_PER_S_PER_LANE[int(generation)] * int(lanes) * 1e9
    return raw * PCIE_EFFICIENCY / (1 if p2p else STAGED_CROSSINGS)


def interconnect_of(device: Device, config: InterconnectConfig | None = None) -> Interconnect:
    """The connection between devices of this kind: as given, else the catalogue's."""
    catalogued_s = device.link_latency_us.value * 1e-6
    if config is None:
        return Interconnect(device.link_gb_s.value * 1e9, catalogued_s)
    return Interconnect(
        pcie_bytes_per_s(config.link, config.p2p),
        catalogued_s if config.latency_us is None else config.latency_us * 1e-6,
        config.border_latency_us * 1e-6,
    )
