"""The state of the machine's AMD cards: memory, power, heat, clocks, PCIe link.

Theory of operation. The kernel shows every card under `class/drm` of sysfs; that is the list of
cards, and what is read of each. Where the amdsmi library loads, what it tells comes first and
sysfs fills in what it does not. Whatever cannot be read is None: a file that is missing, that
vanishes with its card, or that answers EINVAL or EIO while the card is reset or asleep.

Reading a card asks its system management unit, and a busy one blocks the reader for seconds.
`Telemetry` therefore reads each card in a thread of its own, and hands out the last readings with
their age.

Cards are ordered by PCI address, as HIP numbers its devices unless told otherwise, so that the
position among them is the index that `HIP_VISIBLE_DEVICES` wants. The kernel's own numbers
(`card1`) begin with whatever screen it found first.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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


# -- readings with age -----------------------------------------------------------------------


class Telemetry:
    """The last reading of every card, each with its age.

    `limit_s`: how long a `refresh` waits for the cards. `clock` gives monotonic seconds.
    """

    def __init__(
        self, cards: Cards, *, limit_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cards = cards
        self._limit_s = limit_s
        self._clock = clock
        self._last: dict[Card, tuple[CardReading, float]] = {}
        self._being_read: set[Card] = set()

    def read(self) -> tuple[CardReading, ...]:
        """What is known now, in order of PCI address (the HIP index); blocks for nothing."""
        now_s = self._clock()
        return tuple(self._aged(card, now_s) for card in self._cards.cards)

    async def refresh(self) -> tuple[CardReading, ...]:
        """Read all cards at once and return what `read` does.

        A card that has not answered within the limit keeps its last reading, which grows old. It
        is not asked again before it has answered, so no threads pile up behind it.
        """
        asked = [card for card in self._cards.cards if card not in self._being_read]
        answers = [self._start_reading(card) for card in asked]
        if answers:
            await asyncio.wait(answers, timeout=self._limit_s)
        return self.read()

    def _aged(self, card: Card, now_s: float) -> CardReading:
        if card not in self._last:
            return CardReading(card=card.name, pci=card.pci, age_s=inf)
        reading, sampled_s = self._last[card]
        return replace(reading, age_s=now_s - sampled_s)

    def _start_reading(self, card: Card) -> asyncio.Future[None]:
        # Not the loop's own pool: a program waits at its end for every thread there, and one
        # that the kernel holds never comes back.
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._being_read.add(card)
        Thread(
            target=self._read, args=(card, loop, done), name=f"read-{card.name}", daemon=True
        ).start()
        return done

    def _read(
        self, card: Card, loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]
    ) -> None:
        """In the card's thread. The early end of the reading is its honest time."""
        sampled_s = self._clock()
        try:
            self._last[card] = self._cards.read(card), sampled_s
        finally:
            self._being_read.discard(card)
            with suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(_settle, done)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():  # not cancelled with its refresh
        done.set_result(None)


class CardMetrics(Collector):
    """The last readings as Prometheus gauges. What is not known has no sample."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        readings = self._telemetry.read()
        for name, text, attribute in _GAUGES:
            yield _gauge(name, text, readings, "", {"": attribute})
        yield _gauge("temperature_celsius", "temperature", readings, "sensor", _TEMPERATURES)
        yield _gauge("clock_hertz", "clock", readings, "clock", _CLOCKS)


def _gauge(
    name: str,
    text: str,
    readings: Sequence[CardReading],
    label: str,
    attributes: Mapping[str, str],
) -> Metric:
    """One gauge of all cards, with `attributes` by value of the additional label, if any."""
    labels = ("card", "pci", label) if label else ("card", "pci")
    family = GaugeMetricFamily(f"viisim_card_{name}", text, labels=labels)
    for reading in readings:
        for which, attribute in attributes.items():
            value = getattr(reading, attribute)
            if value is not None:
                key = (reading.card, reading.pci, which) if label else (reading.card, reading.pci)
                family.add_metric(key, float(value))
    return family


_GAUGES = (
    ("vram_total_bytes", "memory of the card", "vram_total_bytes"),
    ("vram_used_bytes", "memory in use", "vram_used_bytes"),
    ("busy_ratio", "share of time with work on the compute units", "busy"),
    ("power_watts", "power drawn", "power_w"),
    ("power_cap_watts", "power cap in force", "power_cap_w"),
    ("throttled", "whether the clock is held down", "throttled"),
    ("link_gigatransfers_per_second", "of the slowest PCIe link, a lane", "link_gt_per_s"),
    ("link_lanes", "of the narrowest PCIe link", "link_width"),
    ("fan_rpm", "revolutions of the fan in a minute", "fan_rpm"),
    ("reading_age_seconds", "time since the card was read", "age_s"),
)
_TEMPERATURES = {"edge": "edge_c", "junction": "junction_c", "memory": "memory_c"}
_CLOCKS = {"sclk": "sclk_hz", "mclk": "mclk_hz"}
