"""The cards of a machine as `viisim doctor` sees them: chips, power caps, PCIe links, IOMMU.

All of it is read from files below a root, which is `/` outside of tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.cards.readers import CardReading, SysfsCards, read_number, read_text
from runtime.stacks import STACKS, Finding, State, chip_of
from viisim.hardware import GB_PER_S_PER_LANE

GIB = 2**30
SLOW_LINK_SHARE = 0.5
"""A link that carries less than this of what the card's connector could is worth a word: halves
are what boards with two slots give, and cost little."""

# Where the kernel driver does not say: ROCR-Runtime, libhsakmt/src/topology.c, and amdgpu's ids.
_VEGA_20 = ("0x66a0", "0x66a1", "0x66a2", "0x66a3", "0x66a4", "0x66a7", "0x66af")
_CHIPS = {**dict.fromkeys(_VEGA_20, "gfx906"), "0x7550": "gfx1201", "0x7551": "gfx1201"}
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5}
_WIDTHS = (1, 2, 4, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Link:
    """A PCIe link, as wide and as fast as it is or could be."""

    gt_per_s: float
    lanes: int

    @property
    def bytes_per_s(self) -> float:
        """In one direction, after line coding."""
        return GB_PER_S_PER_LANE[_GENERATIONS[self.gt_per_s]] * self.lanes * 1e9

    def __str__(self) -> str:
        return f"gen{_GENERATIONS[self.gt_per_s]} x{self.lanes}"


@dataclass(frozen=True, slots=True)
class SeenCard:
    """One AMD card, and what of it does not change from moment to moment."""

    index: int
    """As HIP counts cards, and `worker.cards` in an experiment."""
    reading: CardReading
    chip: str | None
    """The compiler's name; None: unknown."""
    largest_cap_w: float | None
    full_link: Link | None
    """The widest and fastest that the card is built for."""


def seen_cards(root: Path) -> list[SeenCard]:
    """The AMD cards that the driver shows, in order of PCI address."""
    sysfs = SysfsCards(root / "sys")
    chips = _chips_by_render_node(root)
    return [
        SeenCard(
            index=index,
            reading=sysfs.read(card),
            chip=_chip(card.device, chips),
            largest_cap_w=read_number(card.hwmon() / "power1_cap_max", per=1e6),
            full_link=_full_link(card.device),
        )
        for index, card in enumerate(sysfs.cards)
    ]


def _full_link(device: Path) -> Link | None:
    """What the card could do, whatever it is plugged into."""
    speed = re.match(r"[\d.]+", read_text(device / "max_link_speed") or "")
    return _link(float(speed[0]) if speed else None, read_number(device / "max_link_width"))


def _chip(device: Path, by_render_node: Mapping[str, str]) -> str | None:
    """The compute driver's word for it, else what the PCI id says."""
    for node in device.glob("drm/renderD*"):
        if node.name in by_render_node:
            return by_render_node[node.name]
    return _CHIPS.get(read_text(device / "device") or "")


def chips_to_serve_on(cards: Sequence[SeenCard]) -> list[str]:
    """The chips that software is judged for: those that vLLM is known for, if there are any. A
    processor's own graphics beside them is no worker."""
    chips = sorted({card.chip for card in cards if card.chip})
    return [chip for chip in chips if chip in STACKS] or chips


def card_findings(cards: Sequence[SeenCard]) -> Iterator[Finding]:
    """A line for each card: chip, memory, power cap."""
    if not cards:
        yield Finding("cards", "missing", "the driver shows no AMD card", needed=True)
    for card in cards:
        reading = card.reading
        total_bytes = reading.vram_total_bytes
        memory = f"{total_bytes / GIB:.2f} GiB" if total_bytes else "memory unknown"
        cap = f"cap {reading.power_cap_w:.0f} W" if reading.power_cap_w else "no power cap shown"
        if reading.power_cap_w and card.largest_cap_w:
            cap += f" of at most {card.largest_cap_w:.0f}"
        state: State = "ok" if card.chip else "unknown"
        said = f"{card.chip or 'unknown chip'}, {memory}, {cap}; {reading.card} at {reading.pci}"
        yield Finding(f"card {card.index}", state, said, needed=True)


def link_finding(card: SeenCard) -> Finding:
    """The worst of a card's PCIe links up to the processor, beside what the card could, and its
    cost."""
    reading, full = card.reading, card.full_link
    subject = f"card {card.index} PCIe"
    now = _link(reading.link_gt_per_s, reading.link_width)
    if now is None or full is None:
        return Finding(subject, "unknown", "the driver does not show its link")
    said = f"{now}; the card has {full}"
    if now.bytes_per_s >= SLOW_LINK_SHARE * full.bytes_per_s:
        return Finding(subject, "ok", said)
    if reading.vram_total_bytes:
        said += f": filling its memory takes {reading.vram_total_bytes / now.bytes_per_s:.0f} s"
    if now.lanes >= SLOW_LINK_SHARE * full.lanes:
        hint = "an idle card slows its link down, an old slot is slow for good: look under load"
        return Finding(subject, "unknown", said, hint)
    hint = "fine for a replica on one card; for a tensor-parallel group use a wider slot"
    return Finding(subject, "wrong", said, hint)


def _link(gt_per_s: float | None, lanes: float | None) -> Link | None:
    """None where it is down or not told: then the kernel shows odd numbers, such as 255 lanes."""
    if gt_per_s not in _GENERATIONS or lanes not in _WIDTHS:
        return None
    return Link(gt_per_s, int(lanes))


def iommu(root: Path, card_count: int) -> Finding:
    """Whether the IOMMU is out of the way: above two cards RCCL can hang on it (AMD's install
    FAQ, section "multi-GPU")."""
    words = (read_text(root / "proc/cmdline") or "").split()
    said = next(
        (word for word in words if re.fullmatch(r"iommu=pt|(amd_|intel_)?iommu=off", word)), ""
    )
    if said or card_count <= 2:
        why = said or f"no iommu=pt; not needed for {card_count} cards"
        return Finding("IOMMU", "ok", why)
    if not any((root / "sys/class/iommu").glob("*")):
        return Finding("IOMMU", "ok", "none is active")
    repair = "add iommu=pt to GRUB_CMDLINE_LINUX_DEFAULT, sudo update-grub, reboot"
    said = f"{card_count} cards and no iommu=pt: collectives may hang"
    return Finding("IOMMU", "wrong", said, repair)


def _chips_by_render_node(root: Path) -> dict[str, str]:
    """The chip behind `renderD128` and so on, as the compute driver numbers it."""
    found = {}
    for path in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        lines = (line.split() for line in (read_text(path) or "").splitlines())
        properties = {line[0]: int(line[1]) for line in lines if len(line) == 2}
        version = properties.get("gfx_target_version", 0)
        if version:  # a processor is a node too, with 0
            found[f"renderD{properties.get('drm_render_minor')}"] = chip_of(version)
    return found
