"""Which cards are too hot to take work.

A guard decides and does nothing: it is told readings and answers with names, and whoever runs it
drains the replicas on those cards. Drained cards go on with what they have; if that keeps them
hot, lowering power caps is the stronger means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.cards.readers import CardReading
from viisim.errors import InputError


@dataclass(frozen=True, slots=True)
class GuardAnswer:
    """What has changed, in the order of the readings; cards by name."""

    drain: tuple[str, ...] = ()
    """Cards to send no more requests to."""
    resume: tuple[str, ...] = ()
    """Cards, drained before, that may take requests again."""


class ThermalGuard:
    """Drains a card at `limit_c`, and takes it back at `resume_c` or below.

    In between nothing changes, so that a card at the limit does not go to and fro. The
    temperature is the junction's (`CardReading.temperature_c`). A card that shows none, or only
    one older than `stale_s`, stays as it is: a silent sensor is no reason to drain a card, and no
    proof that a drained one has cooled.

    Raises InputError unless `resume_c` is below `limit_c`.
    """

    def __init__(self, limit_c: float, resume_c: float, *, stale_s: float = 10.0) -> None:
        if not resume_c < limit_c:
            raise InputError(
                f"thermal guard: resume_c is {resume_c:g}: give less than limit_c, {limit_c:g}"
            )
        self._limit_c = limit_c
        self._resume_c = resume_c
        self._stale_s = stale_s
        self._hot: dict[str, None] = {}

    @property
    def hot(self) -> tuple[str, ...]:
        """The cards that are drained now, the longest first."""
        return tuple(self._hot)

    def observe(self, readings: Iterable[CardReading]) -> GuardAnswer:
        """What to do after these readings; each change is answered once."""
        drain, resume = [], []
        for reading in readings:
            temperature_c = reading.temperature_c
            if temperature_c is None or reading.age_s > self._stale_s:
                continue
            if reading.card not in self._hot and temperature_c >= self._limit_c:
                self._hot[reading.card] = None
                drain.append(reading.card)
            elif reading.card in self._hot and temperature_c <= self._resume_c:
                del self._hot[reading.card]
                resume.append(reading.card)
        return GuardAnswer(tuple(drain), tuple(resume))
