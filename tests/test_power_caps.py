"""Power caps: what is written to a card, and what is put back whatever happens."""

import json
import os
import signal
import subprocess
import sys

import pytest

from runtime.cards.power_caps import PowerCaps, restore_leftovers
from runtime.cards.readers import SysfsCards
from tests.sysfs_tree import SysfsTree, sensor
from viisim.errors import InputError


@pytest.fixture
def tree(tmp_path):
    """Two Radeon VII, whose driver counts them from 1."""
    tree = SysfsTree(tmp_path / "sys")
    tree.add_card(1, "0000:03:00.0")
    tree.add_card(2, "0000:06:00.0")
    return tree


@pytest.fixture
def cards(tree):
    return SysfsCards(tree.root).cards


@pytest.fixture
def state_file(tmp_path):
    return tmp_path / "state" / "power_caps"


def caps_w(cards) -> list[float]:
    """The caps in force."""
    return [int(sensor(card, "power1_cap").read_text()) / 1e6 for card in cards]


def put(card, watts: int) -> None:
    sensor(card, "power1_cap").write_text(f"{watts}000000\n")


def leave_behind(state_file, cards, *changes) -> None:
    """What a killed process leaves: caps that are set, and lines that say what was before."""
    state_file.parent.mkdir()
    lines = []
    for index, before_w, after_w in changes:
        put(cards[index], after_w)
        change = (cards[index].pci, before_w * 1_000_000, after_w * 1_000_000)
        lines.append(json.dumps(dict(zip(("pci", "before_uw", "after_uw"), change, strict=True))))
    state_file.write_text("\n".join(lines))


# -- setting -----------------------------------------------------------------------------------


def test_caps_are_set_by_index_in_pci_order(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set_all({1: 150})
        assert caps_w(cards) == [250, 150]


def test_watts_are_whole_as_the_driver_counts_them(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set(cards[0], 149.6)
        assert caps_w(cards) == [150, 250]


@pytest.mark.parametrize("watts", [0, -5, 301, float("nan"), float("inf")])
def test_a_cap_out_of_range_is_refused(cards, state_file, watts):
    with PowerCaps(state_file, cards) as caps:
        with pytest.raises(InputError, match="card1 takes 0 to 300 W, not"):
            caps.set(cards[0], watts)
        assert caps_w(cards) == [250, 250]


def test_an_unknown_index_is_refused_before_anything_is_set(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        with pytest.raises(InputError, match=r"no card 2; there are: 0 \(card1, 0000:03:00.0\), 1"):
            caps.set_all({0: 150, 2: 150})
        assert caps_w(cards) == [250, 250]


def test_a_card_that_shows_no_range_cannot_be_capped(cards, state_file):
    sensor(cards[0], "power1_cap_max").unlink()
    with (
        PowerCaps(state_file, cards) as caps,
        pytest.raises(InputError, match="card1 shows no cap and its range"),
    ):
        caps.set(cards[0], 150)


def test_a_cap_that_may_not_be_set_is_the_users_error(cards, state_file, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied")

    with PowerCaps(state_file, cards) as caps:
        monkeypatch.setattr("runtime.cards.power_caps.os.open", refuse)
        with pytest.raises(InputError, match=r"card1 \(Permission denied\): run as root"):
            caps.set(cards[0], 150)
        monkeypatch.undo()


# -- putting back ------------------------------------------------------------------------------


def test_the_end_puts_back_what_was_there(cards, state_file):
    put(cards[1], 200)
    with PowerCaps(state_file, cards) as caps:
        caps.set_all({0: 150, 1: 150})
    assert caps_w(cards) == [250, 200]


def test_an_error_puts_back_what_was_there(cards, state_file):
    def serve_and_fail() -> None:
        with PowerCaps(state_file, cards) as caps:
            caps.set(cards[0], 150)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        serve_and_fail()
    assert caps_w(cards) == [250, 250]


def test_the_first_value_is_put_back_after_several_changes(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set(cards[0], 200)
        caps.set(cards[0], 150)
    assert caps_w(cards) == [250, 250]


def test_caps_can_be_replaced(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set_all({0: 150})
        caps.restore()
        caps.set_all({1: 180})
        assert caps_w(cards) == [250, 180]


def test_a_cap_that_somebody_changed_since_is_theirs(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set(cards[0], 150)
        put(cards[0], 180)
    assert caps_w(cards) == [180, 250]


def test_the_next_start_puts_back_what_a_killed_process_left(cards, state_file):
    leave_behind(state_file, cards, (0, 250, 150), (1, 200, 160))
    restore_leftovers(state_file, cards)
    assert caps_w(cards) == [250, 200]


def test_a_line_cut_short_hides_no_other(cards, state_file):
    leave_behind(state_file, cards, (0, 250, 150))
    with state_file.open("a") as file:
        file.write('\n{"pci": "0000:06')
    restore_leftovers(state_file, cards)
    assert caps_w(cards) == [250, 250]


def test_a_card_that_is_gone_is_forgotten(cards, state_file):
    leave_behind(state_file, cards, (0, 250, 150), (1, 250, 160))
    restore_leftovers(state_file, cards[:1])
    assert state_file.read_text() == ""


def test_what_cannot_be_put_back_is_kept_for_the_next_start(cards, state_file, tmp_path):
    leave_behind(state_file, cards, (0, 250, 150))
    hidden = cards[0].device.rename(tmp_path / "asleep")
    restore_leftovers(state_file, cards)
    hidden.rename(cards[0].device)
    restore_leftovers(state_file, cards)
    assert caps_w(cards) == [250, 250]


def test_without_leftovers_no_state_file_is_made(cards, state_file):
    restore_leftovers(state_file, cards)
    assert not state_file.exists()


def test_the_caps_of_a_deployment_that_runs_are_not_put_back(cards, state_file):
    with PowerCaps(state_file, cards) as caps:
        caps.set(cards[0], 150)
        with pytest.raises(InputError, match="another process holds"):
            restore_leftovers(state_file, cards)
        assert caps_w(cards) == [150, 250]


def test_a_state_file_that_cannot_be_written_is_the_users_error(cards, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"cannot write the state file .* \(File exists"),
        PowerCaps(tmp_path / "file" / "power_caps", cards),
    ):
        pass


_SETS_A_CAP_AND_IS_KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.cards.power_caps import PowerCaps
from runtime.cards.readers import SysfsCards

cards = SysfsCards(Path(sys.argv[1])).cards
with PowerCaps(Path(sys.argv[2]), cards) as caps:
    caps.set(cards[0], 150)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_cap_and_the_next_start_puts_it_back(tree, cards, state_file):
    command = [sys.executable, "-c", _SETS_A_CAP_AND_IS_KILLED, str(tree.root), str(state_file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
    killed = subprocess.run(command, env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert caps_w(cards) == [150, 250]
    restore_leftovers(state_file, cards)
    assert caps_w(cards) == [250, 250]
