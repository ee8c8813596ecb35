"""A sysfs with Radeon VII cards, as far as it is read: files with the kernel's names and units.

Values are those of an idle card; the critical temperatures are typical of AMD's cards, those of
the Radeon VII are not known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime.cards.readers import Card, SysfsCards

DEVICE = {
    "vendor": "0x1002",
    "device": "0x66af",
    "unique_id": "2c8a4b5e00f1d2c3",
    "mem_info_vram_total": "17163091968",
    "mem_info_vram_used": "1073741824",
    "gpu_busy_percent": "0",
    "mem_busy_percent": "0",
    "pp_dpm_sclk": "0: 701Mhz *\n1: 1373Mhz\n2: 1801Mhz",
    "pp_dpm_mclk": "0: 350Mhz *\n1: 800Mhz\n2: 1000Mhz",
    "current_link_speed": "8.0 GT/s PCIe",
    "current_link_width": "16",
}
SENSORS = {
    "name": "amdgpu",
    "temp1_input": "31000",
    "temp1_label": "edge",
    "temp1_crit": "100000",
    "temp2_input": "33000",
    "temp2_label": "junction",
    "temp2_crit": "110000",
    "temp3_input": "34000",
    "temp3_label": "mem",
    "temp3_crit": "94000",
    "power1_average": "21000000",
    "power1_cap": "250000000",
    "power1_cap_min": "0",
    "power1_cap_max": "300000000",
    "freq1_input": "701000000",
    "freq2_input": "350000000",
    "fan1_input": "1200",
}
HOT = {
    "gpu_busy_percent": "99",
    "temp2_input": "105000",
    "freq1_input": "930000000",
}
"""Files of a card that heat holds down."""


class SysfsTree:
    """A sysfs under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "class" / "drm").mkdir(parents=True)

    def add_card(
        self,
        number: int,
        pci: str,
        *,
        behind: str = "",
        hwmon: int = 4,
        files: Mapping[str, str | None] | None = None,
    ) -> Path:
        """A card `card{number}` at a PCI address, behind a port's address if given.

        `files` replaces contents of its files, None leaves one out. Returns its device folder.
        """
        changed = files or {}
        bus = self.root / "devices" / "pci0000:00"
        device = (bus / behind if behind else bus) / pci
        sensors = device / "hwmon" / f"hwmon{hwmon}"
        _write(device, {name: changed.get(name, text) for name, text in DEVICE.items()})
        _write(sensors, {name: changed.get(name, text) for name, text in SENSORS.items()})
        self._link(f"card{number}", device)
        self._link(f"renderD{128 + number}", device)
        (self.root / "class" / "drm" / f"card{number}-DP-1").mkdir()
        return device

    def _link(self, name: str, device: Path) -> None:
        entry = self.root / "class" / "drm" / name
        entry.mkdir()
        (entry / "device").symlink_to(device)


def cards_with(root: Path, files: Mapping[str, str | None]) -> tuple[SysfsCards, Card]:
    """The cards of a new sysfs with one card, `card1`, and that card."""
    SysfsTree(root).add_card(1, "0000:03:00.0", files=files)
    cards = SysfsCards(root)
    return cards, cards.cards[0]


def sensor(card: Card, name: str) -> Path:
    """A file of the card's sensors."""
    return card.hwmon() / name


def _write(folder: Path, files: Mapping[str, str | None]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        if text is not None:
            (folder / name).write_text(text + "\n")
