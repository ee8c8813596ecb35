"""What a builder asks: which cards, how split, for how many users, at what power and cost.

For every candidate (a device, a quantisation, a tensor-parallel degree, a number of replicas)
the highest load is searched at which at least 95 % of the requests meet the objectives and the
queue does not keep growing. Each trial is a short simulation behind `least_loaded`. All trials of
all candidates see the same requests, only closer together or further apart: differences come from
the configuration, not from the draw. Where no profile was measured, the roofline's takes its
place, and its rows say "uncalibrated".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from policies.registry import make_policy
from viisim.config import Slo
from viisim.errors import InputError
from viisim.hardware import Device, load_device
from viisim.memory import find_quantisation, tensor_parallel_sizes
from viisim.metrics import latencies, seed_metrics
from viisim.models import load_model, split_model_name
from viisim.placement import LEAST_CONTEXT_TOKENS, placement
from viisim.power import CostModel, mean_power_w, power_draw, purchase_usd
from viisim.profile import Profile, load_profile, profile_names
from viisim.records import REFUSED, SeedResult
from viisim.roofline import is_uncalibrated, roofline_profile
from viisim.simulation import ReplicaSpec, Simulation
from viisim.step_costs import api_server_of, step_costs_of, step_time_of
from viisim.workload.config import MixedWorkload, WorkloadConfig, build_workload, scaled
from viisim.workload.request import Request

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many candidates are done, of how many."""

ATTAINMENT = 0.95
"""Share of the requests that must meet every objective."""
QUANTISATIONS = ("fp16", "fp8", "w4a16")
"""What vLLM serves; a device takes part with those it computes in."""

_WARMUP = 0.1
_RESOLUTION = 1.03
"""Ratio of the lowest load that fails to the highest that holds, at the end of a search."""
_LIGHT = 0.02
"""Of capacity: where even this fails, no load holds."""
_AT_ONCE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What turns cards and watts into dollars."""

    lifetime_years: float = 3.0
    usd_per_kwh: float = 0.15
    host_usd: float = 0.0
    host_w: float = 0.0

    def cost(self, purchase: float) -> CostModel:
        """The cost model for cards and host bought at this price."""
        return CostModel(
            purchase_usd=purchase,
            lifetime_years=self.lifetime_years,
            usd_per_kwh=self.usd_per_kwh,
            host_w=self.host_w,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Equal replicas of one model on one kind of device."""

    device: Device
    quantisation: str
    profile: Profile
    replicas: int

    @property
    def cards(self) -> int:
        """Devices in all."""
        return self.replicas * self.profile.tensor_parallel

    @property
    def label(self) -> str:
        """`calibrated` or `uncalibrated`, for every output."""
        return "uncalibrated" if is_uncalibrated(self.profile) else "calibrated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of every candidate: a workload's shape, and objectives."""

    workload: WorkloadConfig
    slo: Slo
    requests_per_card: int = 200
    """Of a trial: a larger cluster has more in flight, and must be watched for longer."""
    seeds: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A candidate at the highest load that it sustains; all 0 where there is none."""

    candidate: Candidate
    load_per_s: float
    users: float
    """Requests in the system, on average."""
    tokens_per_s: float
    """Generated."""
    power_w: float
    """Mean of the cards, without the host."""
    purchase_usd: float | None
    """None where nobody knows the card's price."""
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    limit: str
    """Why no load is sustained; empty where one is."""

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        candidate = self.candidate
        own = {name: getattr(self, name) for name in self.__slots__ if name != "candidate"}
        return {
            "device": candidate.device.name,
            "quantisation": candidate.quantisation,
            "tensor_parallel": candidate.profile.tensor_parallel,
            "replicas": candidate.replicas,
            "cards": candidate.cards,
            "profile": candidate.label,
        } | own


# --------------------------------------------------------------------------------------
# Candidates


def candidates(
    model: str,
    devices: Sequence[str],
    max_cards: int = 8,
    quantisations: Sequence[str] = QUANTISATIONS,
) -> list[Candidate]:
    """Everything to try: replicas doubled up to `max_cards`, on groups that hold the model.

    Raises InputError for unknown names, and where nothing fits, saying what would.
    """
    found = [
        Candidate(device=device, quantisation=bits, profile=profile, replicas=replicas)
        for device in map(load_device, devices)
        for bits in quantisations
        if find_quantisation(bits).computes_in in device.dtypes.value
        for profile in _profiles(model, device, bits, max_cards)
        for replicas in _doubled(max_cards // profile.tensor_parallel)
    ]
    if not found:
        _raise_unfit(model, devices, quantisations, max_cards)
    return found


def _profiles(model: str, device: Device, bits: str, max_cards: int) -> Iterator[Profile]:
    config = load_model(model)
    for size in tensor_parallel_sizes(config, max_cards):
        if size & (size - 1):
            continue
        profile = measured_profile(model, device.name, bits, size)
        if profile is None:
            try:
                profile = roofline_profile(device.name, model, bits, size)
            except InputError:
                continue  # does not fit; the next size may
        if profile.engine.max_model_len >= min(LEAST_CONTEXT_TOKENS, config.max_positions):
            yield profile


def measured_profile(model: str, device: str, bits: str, size: int) -> Profile | None:
    """The shipped profile of this very combination, if there is one."""
    for name in profile_names():
        profile = load_profile(name)
        served, stored = split_model_name(profile.model)
        if (profile.device, served, profile.tensor_parallel) == (device, model, size) and (
            stored is not None and find_quantisation(stored) == find_quantisation(bits)
        ):
            return profile
    return None


def _doubled(most: int) -> list[int]:
    return sorted({*(2**i for i in range(most.bit_length())), most} - {0})


def _raise_unfit(model: str, devices: Sequence[str], bits: Sequence[str], most: int) -> None:
    config = load_model(model)
    for device in map(load_device, devices):
        usable = [q for q in bits if find_quantisation(q).computes_in in device.dtypes.value]
        for name in reversed(usable):  # the smallest weights last in the list
            placement(config, device, name, max_devices=most)
    raise InputError(
        f"nothing to try: none of {', '.join(devices)} computes in {', '.join(bits)}; give "
        "another --quantisation"
    )


# --------------------------------------------------------------------------------------
# Trials


def shortened(workload: WorkloadConfig, requests: int) -> WorkloadConfig:
    """The same workload with about so many requests, for whatever model is planned."""
    if isinstance(workload, MixedWorkload):
        share = max(1, requests // len(workload.parts))
        parts = tuple(shortened(part, share) for part in workload.parts)
        return workload.model_copy(update={"parts": parts, "model": None})
    length = "requests" if "requests" in type(workload).model_fields else "limit"
    return workload.model_copy(update={length: requests, "model": None})


def simulate_candidate(
    candidate: Candidate, requests: Iterator[Request], seed: int = 1
) -> SeedResult:
    """One simulation of the candidate behind `least_loaded`."""
    profile = candidate.profile
    settings = profile.engine
    spec = partial(
        ReplicaSpec,
        model="model",
        settings=settings.scheduler_settings(),
        step_time=step_time_of(profile, settings.max_num_seqs),
        step_costs=step_costs_of(profile, settings.max_num_batched_tokens),
        api=api_server_of(profile),
    )
    size = profile.tensor_parallel
    replicas = [
        spec(f"r{n:02}", devices=tuple(f"gpu{n * size + i}" for i in range(size)))
        for n in range(candidate.replicas)
    ]
    return Simulation(replicas, make_policy({"name": "least_loaded"}), requests, seed=seed).run()


def _rate_per_s(requests: Iterator[Request]) -> float:
    arrived_ns = [request.arrived_ns for request in requests]
    if not arrived_ns or arrived_ns[-1] == 0:
        raise InputError("--workload: all requests arrive at once; plan needs a rate")
    return len(arrived_ns) / arrived_ns[-1] * 1e9


class _Trials:
    """Trials of one candidate, one a load."""

    def __init__(self, candidate: Candidate, demand: Demand) -> None:
        self._candidate, self._demand = candidate, demand
        self._workload = shortened(demand.workload, demand.requests_per_card * candidate.cards)
        self._base_per_s = float(np.mean([_rate_per_s(self._draw(1.0, s)) for s in demand.seeds]))
        self.results: dict[float, list[SeedResult]] = {}

    def _draw(self, factor: float, seed: int) -> Iterator[Request]:
        """One seed's requests at `factor` times the workload's rate."""
        return build_workload(scaled(self._workload, factor), "model").requests(seed)

    def run(self, load_per_s: float) -> list[SeedResult]:
        """One result a seed."""
        factor = load_per_s / self._base_per_s
        self.results[load_per_s] = [
            simulate_candidate(self._candidate, self._draw(factor, seed), seed)
            for seed in self._demand.seeds
        ]
        return self.results[load_per_s]

    def holds(self, load_per_s: float) -> bool:
        """Whether the objectives are attained and no queue keeps growing."""
        metrics = [seed_metrics(r, self._demand.slo, _WARMUP) for r in self.run(load_per_s)]
        attained = np.mean([seed["values"]["slo_attainment"] or 0.0 for seed in metrics])
        return bool(attained >= ATTAINMENT) and not any(seed["saturated"] for seed in metrics)

    def backlog_per_s(self) -> float:
        """Requests per second that are finished when all have arrived."""
        rates = [
            seed_metrics(r, self._demand.slo, 0.0)["values"]["throughput_requests_per_s"]
            for r in self.run(_AT_ONCE * self._base_per_s)
        ]
        return float(np.mean([rate or 0.0 for rate in rates]))


def highest_load(holds: Callable[[float], bool], capacity_per_s: float) -> float | None:
    """The highest load that `holds`, by bisection on a logarithmic scale; None if none does.

    Above twice the capacity nothing can hold for long, so that is where the search begins.
    """
    low, high = _LIGHT * capacity_per_s, 2 * capacity_per_s
    if capacity_per_s <= 0 or not holds(low):
        return None
    while high / low > _RESOLUTION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# --------------------------------------------------------------------------------------
# Plans


def plan_one(candidate: Candidate, demand: Demand, prices: Prices) -> Planned:
    """The candidate at the highest load that it sustains."""
    trials = _Trials(candidate, demand)
    capacity = trials.backlog_per_s()
    load = highest_load(trials.holds, capacity)
    purchase = purchase_usd(candidate.device, candidate.cards, prices.host_usd)
    if load is None:
        limit = _limit(trials.results.get(_LIGHT * capacity, []), candidate, demand.slo)
        return _planned(candidate, purchase, limit=limit)
    results = trials.results[load]
    seeds = [seed_metrics(r, demand.slo, _WARMUP) for r in results]
    rates = [seed["values"]["throughput_output_tokens_per_s"] or 0.0 for seed in seeds]
    stays_s = [seed["latencies"]["e2e_s"]["mean"] or 0.0 for seed in seeds]
    power_w = float(np.mean([cluster_power_w(candidate, result) for result in results]))
    cost = None if purchase is None else prices.cost(purchase)
    tokens_per_s = float(np.mean(rates))
    return _planned(
        candidate,
        purchase,
        load_per_s=load,
        users=load * float(np.mean(stays_s)),  # Little's law
        tokens_per_s=tokens_per_s,
        power_w=power_w,
        usd_per_hour=cost and cost.usd_per_hour(power_w),
        usd_per_million_tokens=cost and cost.usd_per_million_tokens(power_w, tokens_per_s),
    )


def _planned(candidate: Candidate, purchase: float | None, **figures: Any) -> Planned:
    none: dict[str, Any] = {
        **dict.fromkeys(("load_per_s", "users", "tokens_per_s", "power_w"), 0.0),
        **dict.fromkeys(("usd_per_hour", "usd_per_million_tokens")),
        "limit": "",
    }
    return Planned(candidate=candidate, purchase_usd=purchase, **(none | figures))


def cluster_power_w(candidate: Candidate, result: SeedResult) -> float:
    """Mean watts of all cards over a run; a step that prefills draws as prefill does."""
    draw = power_draw(candidate.device, candidate.profile.power_cap_w)
    draw *= candidate.profile.tensor_parallel
    run_ns = max(result.ended_ns, 1)
    busy = np.array([replica.busy_ns / run_ns for replica in result.replicas])
    prefill = np.array([replica.prefill_ns / run_ns for replica in result.replicas])
    return float(mean_power_w(draw, np.minimum(busy, 1.0), prefill).sum())


def _limit(results: Sequence[SeedResult], candidate: Candidate, slo: Slo) -> str:
    """What a lightly loaded candidate misses."""
    room = candidate.profile.engine.max_model_len
    if not results:
        return f"no prompt fits its {room:,} tokens"
    outcomes = np.concatenate([result.requests["outcome"] for result in results])
    refused = float(np.mean(outcomes == REFUSED))
    if refused > 1 - ATTAINMENT:
        return f"{refused:.0%} of prompts exceed its {room:,} tokens"
    for name, limit_s in (("ttft_s", slo.ttft_s), ("tpot_s", slo.tpot_s), ("e2e_s", slo.e2e_s)):
        times_s = np.concatenate([latencies(result.requests)[name] for result in results])
        reached_s = float(np.percentile(times_s, 100 * ATTAINMENT)) if times_s.size else 0.0
        if limit_s is not None and reached_s > limit_s:
            return f"{name[:-2].upper()} p95 {reached_s:.3g} s when nearly idle"
    return "objectives together are missed when nearly idle"


def plan(
    tried: Sequence[Candidate],
    demand: Demand,
    prices: Prices | None = None,
    on_progress: Progress | None = None,
) -> list[Planned]:
    """Every candidate at its highest load, in the order given."""
    rows = []
    for number, candidate in enumerate(tried, 1):
        rows.append(plan_one(candidate, demand, prices or Prices()))
        if on_progress is not None:
            on_progress(number, len(tried))
    return rows


def affordable(
    tried: Sequence[Candidate], budget_usd: float | None, prices: Prices
) -> list[Candidate]:
    """Those within the budget; one whose price nobody knows is not. Raises InputError if none."""
    if budget_usd is None:
        return list(tried)
    within = [
        candidate
        for candidate in tried
        if (usd := purchase_usd(candidate.device, candidate.cards, prices.host_usd)) is not None
        and usd <= budget_usd
    ]
    if not within:
        raise InputError(
            f"--budget {budget_usd:g}: no configuration that fits is known to cost so little"
        )
    return within


def cheapest(
    rows: Sequence[Planned], load_per_s: float | None = None, users: float | None = None
) -> Planned | None:
    """The least dear per hour among those that sustain the goal; without one, per token."""
    meeting = [
        row
        for row in rows
        if row.load_per_s >= (load_per_s or 0.0)
        and row.users >= (users or 0.0)
        and row.usd_per_million_tokens is not None
    ]
    by = "usd_per_million_tokens" if load_per_s is None and users is None else "usd_per_hour"
    return min(meeting, key=lambda row: float(getattr(row, by)), default=None)
