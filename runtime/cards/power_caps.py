"""Power caps of cards, set for as long as a deployment runs.

Theory of operation. Before a cap is written, what was there goes to a state file, one line a cap,
and to the disk. So whatever ends the process, the next start finds what to put back. The file is
locked while its owner lives, and the kernel frees the lock of a process that was killed: nobody
undoes the caps of a deployment that is running.

A cap is put back only where the card still has the one that was set. If it has another, somebody
changed it since (or the machine was booted, which resets caps), and it is theirs.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TextIO

from runtime.cards.readers import Card, read_number
from viisim.errors import InputError

log = logging.getLogger(__name__)

UW_PER_W = 1_000_000


@dataclass(frozen=True, slots=True)
class _Change:
    """One line of the state file: microwatts of the card at `pci`, before and after."""

    pci: str
    before_uw: int
    after_uw: int


class PowerCaps:
    """Sets caps, and puts back what was there; use it as a context manager.

    `cards` are those of the machine by HIP index (`runtime.cards.readers.Cards.cards`). Entering
    creates and locks `state_file` and puts back what a killed process left behind. It raises
    InputError when another process holds the file, or when it cannot be written.
    """

    def __init__(self, state_file: Path, cards: Sequence[Card]) -> None:
        self._path = state_file
        self._cards = tuple(cards)
        self._state: TextIO | None = None

    def __enter__(self) -> PowerCaps:
        self._state = _open_locked(self._path)
        self.restore()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()
        self._file.close()
        self._state = None

    def set_all(self, caps_w: Mapping[int, float]) -> None:
        """Set caps by HIP index. For other caps later, `restore` first.

        Raises InputError: for an unknown index before anything is written; caps that were set
        before another was refused remain until `restore`.
        """
        unknown = [index for index in caps_w if not 0 <= index < len(self._cards)]
        if unknown:
            known = ", ".join(
                f"{i} ({card.name}, {card.pci})" for i, card in enumerate(self._cards)
            )
            raise InputError(
                f"power cap: there is no card {unknown[0]}; there are: {known or 'none'}"
            )
        for index, watts in caps_w.items():
            self.set(self._cards[index], watts)

    def set(self, card: Card, watts: float) -> None:
        """Cap a card's power, in whole watts as the driver counts. Raises InputError when the
        card takes no such cap, or this process may not set it."""
        before_uw = _checked_cap_uw(card, watts)
        after_uw = round(watts) * UW_PER_W
        if after_uw == before_uw:
            return
        self._remember(_Change(card.pci, before_uw, after_uw))
        try:
            _write_cap(card, after_uw)
        except OSError as error:
            raise InputError(
                f"power cap: cannot set that of {card.name} ({error.strerror}): run as root, or "
                f"give this user the right to write {_cap_file(card)}"
            ) from error

    def restore(self) -> None:
        """Put back what was there, the last change first. Those that fail are logged, and stay
        in the state file for the next start."""
        self._file.seek(0)
        changes = _read_changes(self._file)
        cards = {card.pci: card for card in self._cards}
        undone = [_undo(change, cards.get(change.pci)) for change in reversed(changes)]
        if all(undone):
            self._file.truncate(0)

    @property
    def _file(self) -> TextIO:
        assert self._state is not None, "entered before it is used"
        return self._state

    def _remember(self, change: _Change) -> None:
        """Append: a write that is cut short leaves the other lines whole, if each begins anew."""
        self._file.write("\n" + json.dumps(asdict(change)))
        self._file.flush()
        os.fsync(self._file.fileno())


def restore_leftovers(state_file: Path, cards: Sequence[Card]) -> None:
    """Put back what a killed process left, at a start that sets no caps itself.

    Raises InputError as entering `PowerCaps` does; without a state file there is nothing to do.
    """
    if state_file.exists():
        with PowerCaps(state_file, cards):
            pass


# -- one card ---------------------------------------------------------------------------------


def _cap_file(card: Card) -> Path:
    return card.hwmon() / "power1_cap"


def _cap_uw(card: Card) -> int | None:
    microwatts = read_number(_cap_file(card))
    return None if microwatts is None else round(microwatts)


def _write_cap(card: Card, microwatts: int) -> None:
    # In one write, as the driver wants it, and never creating the file.
    descriptor = os.open(_cap_file(card), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, str(microwatts).encode())
    finally:
        os.close(descriptor)


def _checked_cap_uw(card: Card, watts: float) -> int:
    """The cap in force, if the card can have one of `watts` instead. Raises InputError."""
    hwmon, now_uw = card.hwmon(), _cap_uw(card)
    least_uw, most_uw = (read_number(hwmon / f"power1_cap_{end}") for end in ("min", "max"))
    if now_uw is None or least_uw is None or most_uw is None:
        raise InputError(f"power cap: {card.name} shows no cap and its range: it cannot be capped")
    # Some cards give 0 W as their least, and read a cap of 0 as "the default".
    if not (isfinite(watts) and max(least_uw, 1) <= round(watts) * UW_PER_W <= most_uw):
        raise InputError(
            f"power cap: {card.name} takes {least_uw / UW_PER_W:g} to {most_uw / UW_PER_W:g} W, "
            f"not {watts:g} W"
        )
    return now_uw


def _undo(change: _Change, card: Card | None) -> bool:
    """Whether the change is dealt with: undone, or no longer ours."""
    if card is None:
        log.warning("power cap: the card at %s is gone; its cap is left", change.pci)
        return True
    if _cap_uw(card) not in (change.after_uw, None):
        return True
    try:
        _write_cap(card, change.before_uw)
    except OSError as error:
        watts = change.before_uw / UW_PER_W
        log.error("power cap: cannot put %s back to %g W: %s", card.name, watts, error.strerror)
        return False
    return True


# -- the state file ---------------------------------------------------------------------------


def _open_locked(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by its owner
    except OSError as error:
        raise InputError(
            f"power cap: cannot write the state file {path} ({error.strerror}): without it, a "
            "crash would leave the cards capped"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"power cap: another process holds {path}: stop it, or give this deployment a state "
            "file of its own"
        ) from error
    return file


def _read_changes(file: TextIO) -> list[_Change]:
    """The changes noted, without lines cut short: their caps were not written yet."""
    changes = []
    for line in file:
        with suppress(ValueError, TypeError):
            changes.append(_Change(**json.loads(line)))
    return changes
