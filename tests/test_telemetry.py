"""What is read of AMD cards, from a sysfs made for the purpose and from a stand-in of amdsmi."""

import asyncio
import sys
from math import inf
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from runtime.cards.metrics import CardMetrics
from runtime.cards.readers import AmdSmiCards, Card, CardReading, SysfsCards, open_cards
from runtime.cards.telemetry import Telemetry
from tests.sysfs_tree import HOT, SysfsTree, cards_with, sensor

PCI = "0000:03:00.0"


@pytest.fixture
def tree(tmp_path):
    return SysfsTree(tmp_path / "sys")


def reading_with(root: Path, files) -> CardReading:
    """What is read of a card with these files replaced."""
    cards, card = cards_with(root / "sys", files)
    return cards.read(card)


class TestFinding:
    def test_cards_are_found_whatever_their_numbers(self, tree):
        tree.add_card(1, "0000:03:00.0")
        tree.add_card(2, "0000:06:00.0")
        assert [card.name for card in SysfsCards(tree.root).cards] == ["card1", "card2"]

    def test_the_order_is_that_of_pci_addresses(self, tree):
        tree.add_card(1, "0000:43:00.0")
        tree.add_card(2, "0001:03:00.0")
        tree.add_card(10, "0000:0a:00.0")
        assert [card.name for card in SysfsCards(tree.root).cards] == ["card10", "card1", "card2"]

    def test_cards_of_others_are_left_out(self, tree):
        tree.add_card(0, "0000:01:00.0", files={"vendor": "0x10de"})
        tree.add_card(1, "0000:03:00.0")
        assert [card.pci for card in SysfsCards(tree.root).cards] == ["0000:03:00.0"]

    def test_a_machine_without_graphics_has_no_cards(self, tmp_path):
        assert SysfsCards(tmp_path).cards == ()


class TestReading:
    def test_an_idle_radeon_vii(self, tree):
        tree.add_card(1, PCI)
        cards = SysfsCards(tree.root)
        assert cards.read(cards.cards[0]) == CardReading(
            card="card1",
            pci=PCI,
            unique_id="2c8a4b5e00f1d2c3",
            vram_total_bytes=17163091968,
            vram_used_bytes=1073741824,
            busy=0.0,
            power_w=21.0,
            power_cap_w=250.0,
            edge_c=31.0,
            junction_c=33.0,
            memory_c=34.0,
            sclk_hz=701_000_000,
            mclk_hz=350_000_000,
            throttled=False,
            link_gt_per_s=8.0,
            link_width=16,
            fan_rpm=1200,
        )

    @pytest.mark.parametrize("number", [0, 4, 11])
    def test_sensors_are_found_whatever_their_number(self, tree, number):
        tree.add_card(1, PCI, hwmon=number)
        cards = SysfsCards(tree.root)
        assert cards.read(cards.cards[0]).junction_c == 33.0

    def test_sensors_are_known_by_their_labels(self, tmp_path):
        swapped = {"temp1_label": "junction", "temp2_label": "edge"}
        assert reading_with(tmp_path, swapped).junction_c == 31.0

    @pytest.mark.parametrize(
        ("file", "field"),
        [
            ("unique_id", "unique_id"),
            ("mem_info_vram_used", "vram_used_bytes"),
            ("gpu_busy_percent", "busy"),
            ("power1_average", "power_w"),
            ("temp2_input", "junction_c"),
            ("current_link_speed", "link_gt_per_s"),
            ("current_link_width", "link_width"),
            ("fan1_input", "fan_rpm"),
        ],
    )
    def test_what_has_no_file_is_unknown(self, tmp_path, file, field):
        assert getattr(reading_with(tmp_path, {file: None}), field) is None

    def test_a_clock_without_a_sensor_is_the_level_that_is_marked(self, tmp_path):
        assert reading_with(tmp_path, {"freq2_input": None}).mclk_hz == 350_000_000

    def test_0_w_is_unknown(self, tmp_path):
        assert reading_with(tmp_path, {"power1_average": "0"}).power_w is None

    @pytest.mark.parametrize("text", ["", "N/A", "unknown"])
    def test_a_file_without_a_number_is_unknown(self, tmp_path, text):
        assert reading_with(tmp_path, {"temp2_input": text}).junction_c is None

    def test_a_file_that_answers_with_an_input_error_is_unknown(self, tmp_path):
        cards, card = cards_with(tmp_path / "sys", {})
        file = sensor(card, "power1_average")
        file.unlink()
        file.symlink_to("/proc/self/mem")  # its first page is mapped by nobody: EIO
        with pytest.raises(OSError, match="Input/output error"):
            file.read_text()
        assert cards.read(card).power_w is None

    def test_a_card_that_vanishes_shows_nothing(self, tmp_path):
        cards, card = cards_with(tmp_path / "sys", {})
        card.device.rename(tmp_path / "gone")
        assert cards.read(card) == CardReading(card="card1", pci=PCI)

    def test_the_narrowest_link_on_the_way_counts(self, tree):
        """A card behind its own switch always sees 16 lanes, also on a riser with one."""
        tree.add_card(1, PCI, behind="0000:01:00.0")
        port = tree.root / "devices" / "pci0000:00" / "0000:01:00.0"
        (port / "current_link_width").write_text("1\n")
        (port / "current_link_speed").write_text("2.5 GT/s PCIe\n")
        cards = SysfsCards(tree.root)
        reading = cards.read(cards.cards[0])
        assert (reading.link_width, reading.link_gt_per_s) == (1, 2.5)

    def test_the_temperature_is_the_edge_where_no_junction_shows(self, tmp_path):
        assert reading_with(tmp_path, {"temp2_input": None}).temperature_c == 31.0


class TestThrottling:
    def test_a_busy_hot_card_with_a_low_clock_is_throttled(self, tmp_path):
        assert reading_with(tmp_path, HOT).throttled is True

    @pytest.mark.parametrize(
        "spared",
        [
            {"gpu_busy_percent": "3"},
            {"temp2_input": "80000"},
            {"freq1_input": "1750000000"},
        ],
        ids=["idle", "cool", "fast"],
    )
    def test_any_one_alone_is_no_throttling(self, tmp_path, spared):
        assert reading_with(tmp_path, HOT | spared).throttled is False

    @pytest.mark.parametrize("file", ["gpu_busy_percent", "temp2_input", "temp2_crit"])
    def test_it_is_unknown_when_a_figure_is(self, tmp_path, file):
        assert reading_with(tmp_path, HOT | {file: None}).throttled is None


# -- amdsmi ------------------------------------------------------------------------------------


class FakeAmdSmi:
    """The calls that are made of the amdsmi package, for one card, with answers by name.

    A call without an answer fails as one does that the driver does not support.
    """

    AmdSmiMemoryType = SimpleNamespace(VRAM="VRAM")
    AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="CURRENT")
    AmdSmiTemperatureType = SimpleNamespace(EDGE="EDGE", JUNCTION="JUNCTION", VRAM="VRAM")
    AmdSmiClkType = SimpleNamespace(GFX="GFX", MEM="MEM")

    def __init__(self, bdf: str = PCI, **answers):
        self._bdf = bdf
        self._answers = answers

    def amdsmi_get_processor_handles(self):
        return ["handle"]

    def amdsmi_get_gpu_device_bdf(self, handle):
        return self._bdf

    def __getattr__(self, name):
        def call(handle, kind=None, metric=None):
            answer = self._answers[name.removeprefix("amdsmi_get_")]
            return answer[kind] if kind else answer

        return call


def told_by_amdsmi(root: Path, files=None, **answers) -> CardReading:
    """What is read of a card with these files where amdsmi gives these answers."""
    sysfs, card = cards_with(root / "sys", files or {})
    return AmdSmiCards(FakeAmdSmi(**answers), sysfs).read(card)


class TestAmdSmi:
    def test_without_its_library_cards_are_read_from_sysfs(
        self, tree, tmp_path, monkeypatch, capsys
    ):
        """The package prints, and then raises a KeyError, when it is imported."""
        package = "print('Unable to find libamd_smi.so')\nraise KeyError('libamd_smi.so')\n"
        (tmp_path / "amdsmi.py").write_text(package)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
        tree.add_card(1, PCI)
        assert isinstance(open_cards(tree.root), SysfsCards)
        assert capsys.readouterr().out == ""

    def test_what_it_tells_comes_first(self, tmp_path):
        reading = told_by_amdsmi(
            tmp_path,
            power_info={"socket_power": 143, "average_socket_power": "N/A"},
            temp_metric={"EDGE": 60, "JUNCTION": 82, "VRAM": 70},
            clock_info={"GFX": {"clk": 1725}, "MEM": {"clk": 1000}},
            gpu_activity={"gfx_activity": 97},
            gpu_memory_usage={"VRAM": 2**33},
        )
        assert (reading.power_w, reading.junction_c, reading.busy) == (143.0, 82, 0.97)
        assert (reading.sclk_hz, reading.mclk_hz) == (1_725_000_000, 1_000_000_000)
        assert reading.vram_used_bytes == 2**33

    def test_what_it_does_not_tell_comes_from_sysfs(self, tmp_path):
        sysfs, card = cards_with(tmp_path / "sys", {})
        assert AmdSmiCards(FakeAmdSmi(), sysfs).read(card) == sysfs.read(card)

    def test_0_w_is_taken_from_the_sensor(self, tmp_path):
        assert told_by_amdsmi(tmp_path, power_info={"socket_power": 0}).power_w == 21.0

    @pytest.mark.parametrize("value", ["N/A", 0xFFFF, 0xFFFFFFFF])
    def test_what_stands_for_nothing_is_taken_from_sysfs(self, tmp_path, value):
        assert told_by_amdsmi(tmp_path, gpu_activity={"gfx_activity": value}).busy == 0.0

    @pytest.mark.parametrize(("status", "throttled"), [(True, True), (0, False), ("N/A", False)])
    def test_throttling_is_what_the_card_says_if_it_does(self, tmp_path, status, throttled):
        metrics = {"throttle_status": status}
        assert told_by_amdsmi(tmp_path, gpu_metrics_info=metrics).throttled is throttled

    def test_a_card_that_it_does_not_know_is_read_from_sysfs(self, tmp_path):
        power = {"socket_power": 143}
        assert told_by_amdsmi(tmp_path, bdf="0000:99:00.0", power_info=power).power_w == 21.0


# -- readings with age -------------------------------------------------------------------------


class FakeCards:
    """Cards with figures by name; those in `wedged` answer once it is set."""

    def __init__(self, wedged: str = "", **power_w: float):
        self.cards = tuple(Card(name, f"0000:0{i}:00.0", Path()) for i, name in enumerate(power_w))
        self.wedged = wedged
        self.released = Event()
        self.asked: list[str] = []
        self._power_w = power_w

    def read(self, card):
        self.asked.append(card.name)
        if card.name == self.wedged:
            self.released.wait()
        return CardReading(card=card.name, pci=card.pci, power_w=self._power_w[card.name])


def ages(readings) -> list[float]:
    return [reading.age_s for reading in readings]


class TestTelemetry:
    def test_before_the_first_reading_nothing_is_known(self):
        (reading,) = Telemetry(FakeCards(card1=20.0)).read()
        assert (reading.card, reading.power_w, reading.age_s) == ("card1", None, inf)

    def test_readings_come_in_the_order_of_the_cards(self):
        telemetry = Telemetry(FakeCards(card2=20.0, card1=30.0))
        readings = asyncio.run(telemetry.refresh())
        assert [(r.card, r.power_w) for r in readings] == [("card2", 20.0), ("card1", 30.0)]

    def test_readings_grow_old(self):
        now_s = [100.0]
        telemetry = Telemetry(FakeCards(card1=20.0), clock=lambda: now_s[0])
        asyncio.run(telemetry.refresh())
        now_s[0] = 107.0
        assert ages(telemetry.read()) == [7.0]

    def test_a_card_that_does_not_answer_delays_no_other(self):
        cards = FakeCards(wedged="card1", card1=20.0, card2=30.0)
        readings = asyncio.run(Telemetry(cards, limit_s=0.05).refresh())
        cards.released.set()
        assert [r.power_w for r in readings] == [None, 30.0]

    def test_a_card_that_does_not_answer_is_not_asked_again(self):
        async def twice() -> None:
            telemetry = Telemetry(cards, limit_s=0.05)
            await telemetry.refresh()
            await telemetry.refresh()

        cards = FakeCards(wedged="card1", card1=20.0, card2=30.0)
        asyncio.run(twice())
        cards.released.set()
        assert sorted(cards.asked) == ["card1", "card2", "card2"]

    def test_without_cards_there_are_no_readings(self):
        assert asyncio.run(Telemetry(FakeCards()).refresh()) == ()


class TestMetrics:
    def scraped(self, telemetry: Telemetry) -> dict[str, float]:
        registry = CollectorRegistry()
        registry.register(CardMetrics(telemetry))
        lines = generate_latest(registry).decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def test_figures_are_in_base_units(self, tree):
        tree.add_card(1, PCI, files=HOT)
        telemetry = Telemetry(SysfsCards(tree.root), clock=lambda: 5.0)
        asyncio.run(telemetry.refresh())
        card, pci = 'card="card1"', f'pci="{PCI}"'
        assert self.scraped(telemetry) == {
            f"viisim_card_vram_total_bytes{{{card},{pci}}}": 17163091968,
            f"viisim_card_vram_used_bytes{{{card},{pci}}}": 1073741824,
            f"viisim_card_busy_ratio{{{card},{pci}}}": 0.99,
            f"viisim_card_power_watts{{{card},{pci}}}": 21,
            f"viisim_card_power_cap_watts{{{card},{pci}}}": 250,
            f'viisim_card_temperature_celsius{{{card},{pci},sensor="edge"}}': 31,
            f'viisim_card_temperature_celsius{{{card},{pci},sensor="junction"}}': 105,
            f'viisim_card_temperature_celsius{{{card},{pci},sensor="memory"}}': 34,
            f'viisim_card_clock_hertz{{{card},clock="sclk",{pci}}}': 930e6,
            f'viisim_card_clock_hertz{{{card},clock="mclk",{pci}}}': 350e6,
            f"viisim_card_throttled{{{card},{pci}}}": 1,
            f"viisim_card_link_gigatransfers_per_second{{{card},{pci}}}": 8,
            f"viisim_card_link_lanes{{{card},{pci}}}": 16,
            f"viisim_card_fan_rpm{{{card},{pci}}}": 1200,
            f"viisim_card_reading_age_seconds{{{card},{pci}}}": 0,
        }

    def test_what_is_unknown_has_no_sample(self):
        samples = self.scraped(Telemetry(FakeCards(card1=20.0)))
        assert [name.partition("{")[0] for name in samples] == ["viisim_card_reading_age_seconds"]
