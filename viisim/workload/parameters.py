"""Checks of a workload's parameters: each returns the value or raises InputError naming it."""

from __future__ import annotations

import math

from viisim.errors import InputError

MAX_TOKENS = 2**31 - 1
"""No length may exceed this; it keeps sums over a workload within 64 bits."""


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}: {value!r} is not possible; use a finite number above 0")
    return value


def whole(name: str, value: int, most: int | None = None) -> int:
    """A whole number from 1, up to `most`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < 1 or (most is not None and value > most):
        limit = "" if most is None else f" to {most:,}"
        raise InputError(f"{name}: {value!r} is not possible; use a whole number from 1{limit}")
    return value


def share(name: str, value: float) -> float:
    """A share between 0 and 1, both included."""
    if not 0 <= value <= 1:
        raise InputError(f"{name}: {value!r} is not a share; use a number from 0 to 1")
    return value


def correlation(name: str, value: float) -> float:
    """A correlation between -1 and 1, both included."""
    if not -1 <= value <= 1:
        raise InputError(f"{name}: {value!r} is not a correlation; use a number from -1 to 1")
    return value
