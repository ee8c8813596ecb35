"""Power, heat and cost. All of it is optional and none of it changes a schedule by itself.

A replica's card draws one of three powers: idle, decoding, prefilling. What lies between is a
share of time. Figures come from the catalogue; where it has none, the assumption made is listed
with the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from viisim.errors import InputError
from viisim.hardware import Device

Floats: TypeAlias = NDArray[np.float64]

ASSUMED_IDLE_SHARE = 0.1
"""Of the power cap, for a card whose idle draw nobody measured."""

CAP_EXPONENT = 0.42
"""Prefill time goes with (default cap / cap) to this power: on a gfx906 card, 225 to 150 W took
mean TTFT from 2,138 to 2,534 ms. Two points, one card."""

J_PER_KWH = 3.6e6
HOURS_PER_YEAR = 8766


@dataclass(frozen=True, slots=True)
class PowerDraw:
    """Watts of one card, by what it does."""

    idle_w: float
    decode_w: float
    prefill_w: float
    assumptions: tuple[str, ...] = ()
    """What was not measured, in words for a report."""

    def __mul__(self, cards: int) -> PowerDraw:
        """The draw of several cards that work together."""
        return replace(
            self,
            idle_w=self.idle_w * cards,
            decode_w=self.decode_w * cards,
            prefill_w=self.prefill_w * cards,
        )


def power_draw(
    device: Device, cap_w: float | None = None, idle_w: float | None = None
) -> PowerDraw:
    """The draw of a device, under a cap below its default and with a known idle power if given.

    Raises InputError for a cap that is not above the idle power.
    """
    default_w = device.power_cap_w.value
    limit_w = default_w if cap_w is None else min(cap_w, default_w)
    assumptions = [
        f"{what} {figure.value:g} W is {figure.confidence}: {figure.source}"
        for what, figure in (
            ("decode", device.decode_power_w),
            ("the cap", device.power_cap_w),
        )
        if figure.confidence != "measured"
    ]
    if idle_w is None:
        idle_w = device.idle_power_w.value
    if idle_w is None:
        idle_w = ASSUMED_IDLE_SHARE * default_w
        assumptions.append(f"idle {idle_w:g} W is assumed: {ASSUMED_IDLE_SHARE:.0%} of the cap")
    if limit_w <= idle_w:
        raise InputError(
            f"cap_w: {limit_w:g} W is not above the {idle_w:g} W that {device.name} draws idle; "
            "raise it"
        )
    decode_w = min(device.decode_power_w.value, limit_w)
    return PowerDraw(idle_w, decode_w, limit_w, tuple(assumptions))


def group_draw(
    device: Device, tensor_parallel: int = 1, stages: int = 1, cap_w: float | None = None
) -> PowerDraw:
    """The draw of the devices that share a model. Of a layer split's stages one works at a time.

    Raises InputError as `power_draw` does.
    """
    one = power_draw(device, cap_w)
    working, waiting_w = one * tensor_parallel, one.idle_w * tensor_parallel * (stages - 1)
    return replace(
        working,
        idle_w=working.idle_w + waiting_w,
        decode_w=working.decode_w + waiting_w,
        prefill_w=working.prefill_w + waiting_w,
    )


def prefill_slowdown(device: Device, cap_w: float) -> float:
    """Factor on prefill time under a power cap; 1 at the default and above. Decode is unchanged.

    Raises InputError for a cap of 0 or less.
    """
    if cap_w <= 0:
        raise InputError(f"cap_w: must be above 0, not {cap_w:g}")
    factor: float = (device.power_cap_w.value / cap_w) ** CAP_EXPONENT
    return max(1.0, factor)


# --------------------------------------------------------------------------------------
# Power and energy over time


def mean_power_w(draw: PowerDraw, busy_share: ArrayLike, prefill_share: ArrayLike) -> Floats:
    """Mean watts over spans of time that were busy for one share, and prefilling for another.

    The prefilling share is part of the busy one. Arrays go element by element.
    """
    busy = np.asarray(busy_share, dtype=np.float64)
    prefill = np.asarray(prefill_share, dtype=np.float64)
    idle_w = draw.idle_w * (1 - busy)
    return idle_w + draw.decode_w * (busy - prefill) + draw.prefill_w * prefill


def sampled_power_w(
    draw: PowerDraw, time_s: ArrayLike, busy_s: ArrayLike, prefill_s: ArrayLike
) -> Floats:
    """Mean watts between each two samples of a replica's counters of busy and prefilling time.

    One value fewer than samples: value i holds from `time_s[i]` to `time_s[i + 1]`.
    """
    span_s = np.diff(np.asarray(time_s, dtype=np.float64))
    busy = np.diff(np.asarray(busy_s, dtype=np.float64)) / span_s
    prefill = np.diff(np.asarray(prefill_s, dtype=np.float64)) / span_s
    return mean_power_w(draw, busy, prefill)


def energy_j(draw: PowerDraw, duration_s: float, busy_s: float, prefill_s: float) -> float:
    """Joules over `duration_s`, of which `busy_s` was busy and of that `prefill_s` prefilling."""
    return (
        draw.idle_w * (duration_s - busy_s)
        + draw.decode_w * (busy_s - prefill_s)
        + draw.prefill_w * prefill_s
    )


def replica_power_w(
    samples: Mapping[str, NDArray[np.generic]], draws: Sequence[PowerDraw | None]
) -> NDArray[np.float32]:
    """Mean watts of the sampled replica since its last sample; its idle draw in the first.

    `samples` are columns of `viisim.records.SAMPLE_COLUMNS`, `draws` are by replica's index; what
    is sampled of one whose draw is None gets 0.
    """
    watts = np.zeros(samples["replica"].size, dtype=np.float32)
    for index, draw in enumerate(draws):
        rows = np.flatnonzero(samples["replica"] == index)
        if draw is None or not rows.size:
            continue
        time_s, busy_s, prefill_s = (
            samples[name][rows].astype(np.float64) / 1e9
            for name in ("time_ns", "busy_ns", "prefill_ns")
        )
        watts[rows[0]] = draw.idle_w
        watts[rows[1:]] = sampled_power_w(draw, time_s, busy_s, prefill_s)
    return watts


def work_j(draw: PowerDraw, busy_s: float, prefill_s: float) -> float:
    """Joules that work adds to what the same devices would have drawn idle."""
    return energy_j(draw, busy_s, busy_s, prefill_s) - draw.idle_w * busy_s


def per_million(amount: float, count: float) -> float | None:
    """`amount` for each million of `count`; None where there are none."""
    return amount * 1e6 / count if count else None


# --------------------------------------------------------------------------------------
# Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What a cluster costs, in US dollars."""

    purchase_usd: float
    """Cards and what is around them."""
    lifetime_years: float = 3.0
    """Nothing is worth anything after it."""
    usd_per_kwh: float = 0.15
    overhead: float = 1.0
    """Power from the wall for each watt of the machine: supplies, cooling."""
    host_w: float = 0.0
    """The rest of the machine, drawn all the time."""

    def usd_per_hour(self, cards_w: float) -> float:
        """Purchase spread over the lifetime, and electricity at a mean draw of the cards."""
        purchase = self.purchase_usd / (self.lifetime_years * HOURS_PER_YEAR)
        return purchase + self.wall_w(cards_w) / 1000 * self.usd_per_kwh

    def usd_per_million_tokens(self, cards_w: float, tokens_per_s: float) -> float | None:
        """Dollars for a million tokens at this rate, kept up all the time; None at rate 0."""
        return per_million(self.usd_per_hour(cards_w), tokens_per_s * 3600)

    def electricity_usd(self, cards_j: float, duration_s: float) -> float:
        """Dollars for the energy of a run."""
        joules = (cards_j + self.host_w * duration_s) * self.overhead
        return joules / J_PER_KWH * self.usd_per_kwh

    def wall_w(self, cards_w: float) -> float:
        """Watts from the wall."""
        return (cards_w + self.host_w) * self.overhead


def purchase_usd(device: Device, cards: int, host_usd: float = 0.0) -> float | None:
    """Second-hand price of the cards and a host; None where nobody knows the card's."""
    price = device.used_price_usd.value
    return None if price is None else price * cards + host_usd


# --------------------------------------------------------------------------------------
# Heat


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """One thermal mass that cools towards the air, and a limit that lowers the clock.

    The limit, the clocks and the minute it takes are those of a passively cooled MI50, 1,725 to
    930 MHz at 100 C. Resistance and time constant are not known apart: they are chosen so that
    250 W from cold reach the limit in about 60 s.
    """

    air_c: float = 30.0
    c_per_w: float = 0.45
    time_constant_s: float = 62.0
    limit_c: float = 100.0
    resume_c: float = 90.0
    throttled_clock: float = 930 / 1725


@dataclass(frozen=True, slots=True)
class ThermalState:
    """A card's temperature, and whether it has throttled."""

    cooling: Cooling = field(default_factory=Cooling)
    junction_c: float = 30.0
    throttled: bool = False

    @property
    def clock(self) -> float:
        """Factor on the clock: prefill takes 1 / clock as long."""
        return self.cooling.throttled_clock if self.throttled else 1.0

    def after(self, power_w: float, duration_s: float) -> ThermalState:
        """The state after `duration_s` at this power.

        It throttles at the limit and recovers only below the resume temperature; a change inside
        the span shows at its end, so spans should be short beside the time constant.
        """
        cooling = self.cooling
        settled_c = cooling.air_c + cooling.c_per_w * power_w
        decay = exp(-duration_s / cooling.time_constant_s)
        junction_c = settled_c + (self.junction_c - settled_c) * decay
        threshold_c = cooling.resume_c if self.throttled else cooling.limit_c
        return ThermalState(cooling, junction_c, junction_c >= threshold_c)
