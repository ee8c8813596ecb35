"""The state of the machine's AMD cards: memory, power, heat, clocks, PCIe link.

Theory of operation. The kernel shows every card under `class/drm` of sysfs; that is the list of
cards, and what is read of each. Where the amdsmi library loads, what it tells comes first and
sysfs fills in what it does not. Whatever cannot be read is None: a file that is missing, that
vanishes with its card, or that answers EINVAL or EIO while the card is reset or asleep.

Cards are ordered by PCI address, as HIP numbers its devices unless told otherwise, so that the
position among them is the index that `HIP_VISIBLE_DEVICES` wants. The kernel's own numbers
(`card1`) begin with whatever screen it found first.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

SYSFS = Path("/sys")
AMD = "0x1002"
_CARD = re.compile(r"card\d+")
"""Connectors are called `card0-DP-1`."""
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_LEVEL = re.compile(r"^\d+:\s*(\d+)mhz\s*(\*?)", re.IGNORECASE | re.MULTILINE)

BUSY = 0.5
NEAR_CRITICAL_C = 10.0
"""A passive MI50 throttled at 100 C (FACTS section 3), some way below a critical junction."""
LOWERED_CLOCK = 0.9
"""Of the top level. That MI50 went to 930 of 1,725 MHz; boost alone wanders by a few percent."""

_NO_NUMBERS = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
"""How amdsmi writes "not available", where it does not say "N/A"."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card of this machine."""

    name: str
    """The kernel's, such as `card1`; it may change from boot to boot."""
    pci: str
    """Address such as `0000:03:00.0`: the same as long as the card stays in its slot."""
    device: Path
    """Its folder in sysfs."""

    def hwmon(self) -> Path:
        """The folder of its sensors, whose number changes when the driver is loaded again.

        A path that does not exist when the card has none.
        """
        with suppress(OSError):
            folders = sorted(self.device.glob("hwmon/hwmon*"))
            named = [folder for folder in folders if read_text(folder / "name") == "amdgpu"]
            if found := named or folders:
                return found[0]
        return self.device / "hwmon" / "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReading:
    """What a card showed at one moment. None: it does not show it, or could not be asked."""

    card: str
    pci: str
    age_s: float = 0.0
    """Time since it was sampled; infinite when it never was."""
    unique_id: str | None = None
    """Of the chip, in hexadecimal; it stays with the card in another slot."""
    vram_total_bytes: int | None = None
    vram_used_bytes: int | None = None
    busy: float | None = None
    """Share of time with work on the compute units, 0 to 1."""
    power_w: float | None = None
    power_cap_w: float | None = None
    edge_c: float | None = None
    junction_c: float | None = None
    """The hottest spot of the chip; it decides about throttling."""
    memory_c: float | None = None
    sclk_hz: int | None = None
    """Clock of the compute units."""
    mclk_hz: int | None = None
    throttled: bool | None = None
    """Held below its top clock. amdsmi reports any limit, power and current among them; read
    from sysfs it means heat (see `is_throttled`)."""
    link_gt_per_s: float | None = None
    """Transfers per lane of the slowest PCIe link up to the processor; idle cards slow theirs."""
    link_width: int | None = None
    """Lanes of the narrowest link."""
    fan_rpm: int | None = None

    @property
    def temperature_c(self) -> float | None:
        """Junction, or edge where the card shows no junction."""
        return self.edge_c if self.junction_c is None else self.junction_c


class Cards(Protocol):
    """The cards of a machine, and how they are read."""

    @property
    def cards(self) -> tuple[Card, ...]:
        """In order of PCI address: the position is the HIP index."""

    def read(self, card: Card) -> CardReading:
        """Read one card now. Raises nothing; may block while the card is busy."""


def open_cards(root: Path = SYSFS) -> Cards:
    """The cards under `root`, read through amdsmi where it loads and through sysfs otherwise."""
    sysfs = SysfsCards(root)
    library = _load_amdsmi() if sysfs.cards else None
    return sysfs if library is None else AmdSmiCards(library, sysfs)


# -- sysfs -----------------------------------------------------------------------------------


class SysfsCards:
    """AMD cards as the amdgpu driver shows them in sysfs.

    Files and units are those of the kernel's documentation, "GPU Power/Thermal Controls and
    Monitoring". The list is made once: a card that is taken out stays in it, and shows nothing.
    """

    def __init__(self, root: Path = SYSFS) -> None:
        self.cards = tuple(sorted(_find_cards(root), key=lambda card: _pci_order(card.pci)))

    def read(self, card: Card) -> CardReading:
        """See `Cards.read`."""
        device, hwmon = card.device, card.hwmon()
        busy = read_number(device / "gpu_busy_percent", per=100)
        junction_c = _temperature_c(hwmon, "junction")
        critical_c = _temperature_c(hwmon, "junction", "crit")
        sclk_hz, top_hz = _clock(hwmon / "freq1_input", device / "pp_dpm_sclk")
        speed, width = _narrowest_link(device)
        return CardReading(
            card=card.name,
            pci=card.pci,
            unique_id=read_text(device / "unique_id") or None,
            vram_total_bytes=_integer(device / "mem_info_vram_total"),
            vram_used_bytes=_integer(device / "mem_info_vram_used"),
            busy=busy,
            power_w=_power_w(hwmon),
            power_cap_w=read_number(hwmon / "power1_cap", per=1e6),
            edge_c=_temperature_c(hwmon, "edge"),
            junction_c=junction_c,
            memory_c=_temperature_c(hwmon, "mem"),
            sclk_hz=sclk_hz,
            mclk_hz=_clock(hwmon / "freq2_input", device / "pp_dpm_mclk")[0],
            throttled=is_throttled(busy, junction_c, critical_c, sclk_hz, top_hz),
            link_gt_per_s=speed,
            link_width=width,
            fan_rpm=_integer(hwmon / "fan1_input"),
        )


def is_throttled(
    busy: float | None,
    junction_c: float | None,
    critical_c: float | None,
    sclk_hz: int | None,
    top_hz: int | None,
) -> bool | None:
    """Whether heat holds a card's clock down; None where one of the figures is unknown.

    Our rule, as sysfs has no such file: it is busy, its junction is within 10 C of critical,
    and its clock is below 90 % of the top level. Any one alone has other causes: idle cards
    lower their clocks, and so does a power cap on a cool one.
    """
    if busy is None or junction_c is None or critical_c is None:
        return None
    if sclk_hz is None or top_hz is None:
        return None
    is_hot = junction_c >= critical_c - NEAR_CRITICAL_C
    return busy >= BUSY and is_hot and sclk_hz < LOWERED_CLOCK * top_hz


def read_text(path: Path) -> str | None:
    """A file's text without the white space around it; None when it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_number(path: Path, per: float = 1) -> float | None:
    """The number in a file, of which `per` make one unit; None when there is none."""
    try:
        return float(read_text(path) or "") / per
    except ValueError:
        return None


def _integer(path: Path) -> int | None:
    number = read_number(path)
    return None if number is None else round(number)


def _find_cards(root: Path) -> Iterator[Card]:
    for entry in root.glob("class/drm/card*"):
        device = (entry / "device").resolve()
        if (
            _CARD.fullmatch(entry.name)
            and _PCI_ADDRESS.fullmatch(device.name)
            and read_text(device / "vendor") == AMD
        ):
            yield Card(entry.name, device.name, device)


def _pci_order(address: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in re.split("[:.]", address))


def _temperature_c(hwmon: Path, label: str, what: str = "input") -> float | None:
    """`input` or `crit` of the sensor called `label`; drivers before Vega label nothing."""
    for number, usual in enumerate(("edge", "junction", "mem"), 1):
        if (read_text(hwmon / f"temp{number}_label") or usual) == label:
            return read_number(hwmon / f"temp{number}_{what}", per=1000)
    return None


def _power_w(hwmon: Path) -> float | None:
    """Chips since MI300 show `power1_input` alone. No powered card draws 0 W: that is missing."""
    average_w = read_number(hwmon / "power1_average", per=1e6)
    return average_w or read_number(hwmon / "power1_input", per=1e6) or None


def _clock(sensor: Path, levels: Path) -> tuple[int | None, int | None]:
    """The clock now and at its top level. The sensor is exact; the list of levels marks one."""
    found = [(int(mhz) * 1_000_000, bool(now)) for mhz, now in _LEVEL.findall(_or_empty(levels))]
    marked_hz = next((hz for hz, is_now in found if is_now), None)
    clock_hz = _integer(sensor)
    top_hz = max((hz for hz, _ in found), default=None)
    return (marked_hz if clock_hz is None else clock_hz), top_hz


def _or_empty(path: Path) -> str:
    return read_text(path) or ""


def _narrowest_link(device: Path) -> tuple[float | None, int | None]:
    """Speed and lanes of the worst link from the card up to the processor.

    Vega cards carry a PCIe switch of their own, behind which they see 16 lanes whatever the
    riser has: what the slot gives shows at the ports above.
    """
    speeds: list[float] = []
    widths: list[int] = []
    for port in (device, *device.parents):
        if not _PCI_ADDRESS.fullmatch(port.name):
            break
        speed = _or_empty(port / "current_link_speed").partition(" ")[0]
        with suppress(ValueError):
            speeds.append(float(speed))
        if width := _integer(port / "current_link_width"):
            widths.append(width)
    return min(speeds, default=None), min(widths, default=None)


# -- amdsmi ----------------------------------------------------------------------------------


class AmdSmiCards:
    """The cards of `sysfs`, read through `library`, the amdsmi package, as far as it knows them.

    It adds the throttle status of the card's own metrics, and reads what a newer driver shows
    elsewhere. Power reads 0 W on Radeon VII and MI50, which counts as missing; the cap, the link
    and the fan are exact in sysfs and are taken from there.
    """

    def __init__(self, library: Any, sysfs: SysfsCards) -> None:
        self.cards = sysfs.cards
        self._smi = library
        self._sysfs = sysfs
        self._handles = {
            str(library.amdsmi_get_gpu_device_bdf(handle)).lower(): handle
            for handle in library.amdsmi_get_processor_handles()
        }

    def read(self, card: Card) -> CardReading:
        """See `Cards.read`."""
        reading = self._sysfs.read(card)
        handle = self._handles.get(card.pci)
        if handle is None:
            return reading
        told = {name: value for name, value in self._ask(handle).items() if value is not None}
        return replace(reading, **told)

    def _ask(self, handle: Any) -> dict[str, Any]:
        smi, vram = self._smi, self._smi.AmdSmiMemoryType.VRAM
        metrics = _answer(lambda: smi.amdsmi_get_gpu_metrics_info(handle)) or {}
        activity = _answer(lambda: smi.amdsmi_get_gpu_activity(handle)) or {}
        busy_percent = _number(activity.get("gfx_activity"))
        throttled = metrics.get("throttle_status")
        return {
            "vram_total_bytes": _number(
                _answer(lambda: smi.amdsmi_get_gpu_memory_total(handle, vram))
            ),
            "vram_used_bytes": _number(
                _answer(lambda: smi.amdsmi_get_gpu_memory_usage(handle, vram))
            ),
            "busy": None if busy_percent is None else busy_percent / 100,
            "power_w": self._power_w(handle),
            "edge_c": self._temperature_c(handle, "EDGE"),
            "junction_c": self._temperature_c(handle, "JUNCTION"),
            "memory_c": self._temperature_c(handle, "VRAM"),
            "sclk_hz": self._clock_hz(handle, "GFX"),
            "mclk_hz": self._clock_hz(handle, "MEM"),
            "throttled": bool(throttled) if isinstance(throttled, int) else None,
        }

    def _power_w(self, handle: Any) -> float | None:
        """Under the first of the keys that says anything: they changed from ROCm 6 to 7."""
        info = _answer(lambda: self._smi.amdsmi_get_power_info(handle)) or {}
        keys = ("socket_power", "current_socket_power", "average_socket_power")
        return next((float(watts) for key in keys if (watts := _number(info.get(key)))), None)

    def _temperature_c(self, handle: Any, sensor: str) -> float | None:
        smi = self._smi
        now = smi.AmdSmiTemperatureMetric.CURRENT
        kind = getattr(smi.AmdSmiTemperatureType, sensor)
        return _number(_answer(lambda: smi.amdsmi_get_temp_metric(handle, kind, now)))

    def _clock_hz(self, handle: Any, clock: str) -> int | None:
        smi = self._smi
        kind = getattr(smi.AmdSmiClkType, clock)
        mhz = _number((_answer(lambda: smi.amdsmi_get_clock_info(handle, kind)) or {}).get("clk"))
        return None if mhz is None else round(mhz * 1e6)


def _load_amdsmi() -> Any | None:
    """The amdsmi package, ready for calls; None where it is of no use.

    Without its shared library, importing it prints to standard output and raises KeyError; with
    a library of another ROCm, calls may raise anything.
    """
    with redirect_stdout(io.StringIO()), suppress(Exception):
        library = importlib.import_module("amdsmi")
        library.amdsmi_init()
        library.amdsmi_get_processor_handles()
        return library
    return None


def _answer(call: Callable[[], Any]) -> Any | None:
    """What a library call returns; None when it fails, whatever with."""
    with suppress(Exception):
        return call()
    return None


def _number(value: Any) -> Any | None:
    """A number that amdsmi told, without what stands for "not available"."""
    is_number = isinstance(value, (int, float)) and value not in _NO_NUMBERS
    return value if is_number else None
