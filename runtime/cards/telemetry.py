"""The cards' last readings, each with its age.

Reading a card asks its system management unit, and a busy one blocks the reader for seconds.
`Telemetry` therefore reads each card in a thread of its own, and hands out the last readings with
their age.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import inf
from threading import Thread

from runtime.cards.readers import Card, CardReading, Cards


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
