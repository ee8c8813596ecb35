"""The cards under a deployment: capped, read every second, and their workers drained while hot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.cards.power_caps import PowerCaps, restore_leftovers
from runtime.cards.readers import Card, CardReading, Cards
from runtime.cards.telemetry import Telemetry
from runtime.cards.thermal_guard import GuardAnswer, ThermalGuard
from runtime.driver import Driver

log = logging.getLogger(__name__)

READ_EVERY_S = 1.0
STALE_S = 10.0
"""An older reading says nothing."""
COOLED_BY_C = 10.0
"""So far below the limit a hot card is taken back."""
HOT = "hot"
"""Why the driver drains a worker."""


class NoCards:
    """Of a deployment that starts no workers on any."""

    cards: tuple[Card, ...] = ()

    def read(self, card: Card) -> CardReading:
        """See `runtime.cards.readers.Cards`: there is none to be read."""
        raise KeyError(card)


class CardWatch:
    """Reads the cards and acts on what they say. `taken_by` gives the ids of the workers on a
    card, by its HIP index."""

    def __init__(self, cards: Cards, taken_by: Callable[[int], Sequence[str]]) -> None:
        self.telemetry = Telemetry(cards)
        self._taken_by = taken_by

    async def watch(self, driver: Driver, limit_c: float | None) -> None:
        """Read the cards for ever, and drain the driver's workers on those above the limit."""
        guard = None if limit_c is None else ThermalGuard(limit_c, limit_c - COOLED_BY_C)
        while True:
            readings = await self.telemetry.refresh()
            if guard is not None:
                self._act(driver, guard.observe(readings), readings)
            await asyncio.sleep(READ_EVERY_S)

    def _act(self, driver: Driver, answer: GuardAnswer, readings: Sequence[CardReading]) -> None:
        for index, reading in enumerate(readings):
            for worker_id in self._taken_by(index):
                if reading.card in answer.drain:
                    log.warning("%s is hot: %s gets no more requests", reading.card, worker_id)
                    driver.drain(worker_id, f"{HOT} {reading.card}")
                elif reading.card in answer.resume:
                    log.info("%s has cooled: %s gets requests again", reading.card, worker_id)
                    driver.undrain(worker_id, f"{HOT} {reading.card}")

    def shown(self, indices: Sequence[int]) -> tuple[float | None, float | None]:
        """Watts of these cards together and the temperature of the hottest, None where unknown."""
        readings = self.telemetry.read()
        fresh = [readings[i] for i in indices if i < len(readings) and readings[i].age_s < STALE_S]
        watts = [one.power_w for one in fresh if one.power_w is not None]
        degrees = [one.temperature_c for one in fresh if one.temperature_c is not None]
        complete = bool(indices) and len(watts) == len(indices)
        return sum(watts) if complete else None, max(degrees, default=None)


@contextmanager
def capped(cards: Cards, caps_w: Mapping[int, float], state_file: Path) -> Iterator[None]:
    """Cards capped to so many watts while inside, by their HIP index. What a killed process left
    capped is restored in any case. Raises InputError for a cap that a card does not take."""
    if not caps_w:
        # Who sees no cards leaves the note of their caps to a start that does.
        if cards.cards:
            restore_leftovers(state_file, cards.cards)
        yield
        return
    with PowerCaps(state_file, cards.cards) as caps:
        caps.set_all(caps_w)
        yield
