"""The cards as Prometheus sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.cards.readers import CardReading
from runtime.cards.telemetry import Telemetry


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
