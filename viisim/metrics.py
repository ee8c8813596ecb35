"""What a run is judged by: per-seed metrics, and their summary over seeds.

Definitions; each is also written into the summary, see `viisim.definitions`:

- Measured requests are those left after the warm-up cut, the first share of requests by order
  of arrival. Latencies are taken over the measured requests that finished; the others are
  counted in `outcomes` and never dropped.
- TTFT, TPOT and ITL are what a client of a stream sees. A plain (not streamed) answer shows
  nothing before its end, so TTFT and TPOT are taken over streamed requests only; TPOT is
  undefined for one token.
- The measurement window opens with the first measured arrival and closes with the last finish
  (or arrival) of a measured request, as `vllm bench serve` does; throughput and goodput count
  what finished inside it, whenever it arrived.
- Inter-token latencies and the engine's counters cover the whole run: they are kept as sums.
- A traffic class is measured as the whole is, over its own requests and against its own SLO where
  it has one, in the same window. How tenants are compared, `viisim.fairness` says.

Lengths of time are seconds here, floats, computed from the integer nanoseconds of the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from viisim.definitions import DEFINITIONS
from viisim.fairness import demand_and_service, fair_shares, fairness
from viisim.invariants import check_invariants
from viisim.records import FINISHED, ITL_EDGES_S, OUTCOMES, FaultCounts, SeedResult
from viisim.saturation import is_saturated
from viisim.statistics import Estimate, estimate

Columns: TypeAlias = Mapping[str, NDArray[Any]]

FAULT_DEFINITIONS = {
    "faults": "faults that befell a replica, per run",
    "lost_requests": "requests that got no whole answer, without having been refused",
    "retried_attempts": "attempts after one that had failed",
    "duplicated_requests": "requests tried again after their client had seen a byte; must be 0",
}
"""In a summary only where there are faults."""

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}


class Slo(Protocol):
    """Service-level objectives in seconds; None where none is set.

    It may have `classes`, a mapping of traffic classes to objectives of the same shape, each in
    the place of these for its class.
    """

    @property
    def ttft_s(self) -> float | None: ...
    @property
    def tpot_s(self) -> float | None: ...
    @property
    def e2e_s(self) -> float | None: ...


class Distribution(TypedDict):
    """One kind of latency of one seed; None where nothing was observed."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Histogram(TypedDict):
    """Counts of consecutive bins of `ITL_EDGES_S`; the first of them is number `first_bin`."""

    first_bin: int
    counts: list[int]


class GroupMetrics(TypedDict):
    """Some requests of one seed: all of them, or those of a traffic class."""

    requests: int
    measured_requests: int
    outcomes: dict[str, int]
    latencies: dict[str, Distribution]
    values: dict[str, float | None]


class TenantMetrics(TypedDict):
    """One tenant in one seed; tokens are weighted."""

    outcomes: dict[str, int]
    demand_tokens: float
    service_tokens: float
    fair_tokens: float
    ttft_s: Distribution


class SeedMetrics(GroupMetrics):
    """One seed. `values` holds the rates, shares and engine counters by name."""

    seed: int
    tpot_undefined_requests: int
    saturated: bool
    window_s: float
    classes: dict[str, GroupMetrics]
    tenants: dict[str, TenantMetrics]
    itl_histogram: Histogram
    replicas: list[dict[str, Any]]


class GroupSummary(TypedDict):
    """Some requests over all seeds, and the objectives they were judged by."""

    slo: dict[str, float | None]
    outcomes: dict[str, int]
    latencies: dict[str, dict[str, Estimate]]
    values: dict[str, Estimate]


class TenantSummary(TypedDict):
    """One tenant over all seeds; tokens are weighted."""

    outcomes: dict[str, int]
    demand_tokens: Estimate
    service_tokens: Estimate
    fair_tokens: Estimate
    ttft_s: dict[str, Estimate]


class Summary(GroupSummary):
    """All seeds of one experiment: the content of `summary.json`."""

    definitions: dict[str, str]
    warmup_fraction: float
    predictor: dict[str, Any] | None
    """How answer lengths were predicted, as the experiment has it; None: not stated."""
    saturated_seeds: list[int]
    uncalibrated: list[str]
    """`device/model` of every replica whose step times nobody measured."""
    power_assumptions: list[str]
    """What stands behind the energy without having been measured; empty where there is none."""
    classes: dict[str, GroupSummary]
    """Empty unless there are several traffic classes, or a named one."""
    tenants: dict[str, TenantSummary]
    """Empty unless there are several tenants, or a named one."""
    seeds: list[SeedMetrics]


# --------------------------------------------------------------------------------------
# Over seeds


def summarise(
    results: Sequence[SeedResult],
    slo: Slo,
    warmup_fraction: float,
    predictor: Mapping[str, Any] | None = None,
) -> Summary:
    """Check and measure every seed, then combine them."""
    for result in results:
        check_invariants(result)
    seeds = [seed_metrics(r, slo, warmup_fraction) for r in results]
    return combine(seeds, slo, warmup_fraction, predictor)


def combine(
    seeds: Sequence[SeedMetrics],
    slo: Slo,
    warmup_fraction: float,
    predictor: Mapping[str, Any] | None = None,
) -> Summary:
    """The summary of seeds measured one by one (in other processes, for instance)."""
    if not seeds:
        raise ValueError("a summary needs at least one seed")
    classes = sorted({name for seed in seeds for name in seed["classes"]})
    tenants = sorted({name for seed in seeds for name in seed["tenants"]})
    faulty = "faults" in seeds[0]["values"]
    return {
        "definitions": DEFINITIONS | FAULT_DEFINITIONS if faulty else DEFINITIONS,
        "warmup_fraction": warmup_fraction,
        "predictor": None if predictor is None else dict(predictor),
        "saturated_seeds": [s["seed"] for s in seeds if s["saturated"]],
        "uncalibrated": [],
        "power_assumptions": [],
        **_combined(seeds, slo),
        "classes": {
            name: _combined(
                [seed["classes"][name] for seed in seeds if name in seed["classes"]],
                objectives_of(slo, name),
            )
            for name in classes
        },
        "tenants": {
            name: _combined_tenant(
                [seed["tenants"][name] for seed in seeds if name in seed["tenants"]]
            )
            for name in tenants
        },
        "seeds": list(seeds),
    }


def _combined(seeds: Sequence[GroupMetrics], slo: Slo) -> GroupSummary:
    return {
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_s": slo.e2e_s},
        "outcomes": _summed(seed["outcomes"] for seed in seeds),
        "latencies": {
            name: _estimates([seed["latencies"][name] for seed in seeds])
            for name in seeds[0]["latencies"]
        },
        "values": {
            name: estimate([seed["values"][name] for seed in seeds]) for name in seeds[0]["values"]
        },
    }


def _combined_tenant(seeds: Sequence[TenantMetrics]) -> TenantSummary:
    return {
        "outcomes": _summed(seed["outcomes"] for seed in seeds),
        "demand_tokens": estimate([seed["demand_tokens"] for seed in seeds]),
        "service_tokens": estimate([seed["service_tokens"] for seed in seeds]),
        "fair_tokens": estimate([seed["fair_tokens"] for seed in seeds]),
        "ttft_s": _estimates([seed["ttft_s"] for seed in seeds]),
    }


def _estimates(seeds: Sequence[Distribution]) -> dict[str, Estimate]:
    each = cast("Sequence[dict[str, float | None]]", seeds)
    return {
        statistic: estimate([of_seed[statistic] for of_seed in each])
        for statistic in ("mean", *PERCENTILES)
    }


def _summed(seeds: Iterable[dict[str, int]]) -> dict[str, int]:
    each = list(seeds)
    return {name: sum(outcomes[name] for outcomes in each) for name in OUTCOMES}


# --------------------------------------------------------------------------------------
# One seed


def seed_metrics(result: SeedResult, slo: Slo, warmup_fraction: float) -> SeedMetrics:
    """Everything that is reported of one seed."""
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be in [0, 1), not {warmup_fraction}")
    requests = result.requests
    total = requests["outcome"].size
    cut = warmup_requests(total, warmup_fraction)
    measured = {name: column[cut:] for name, column in requests.items()}
    window_ns = _window_ns(measured)
    met = meets_slo(requests, slo, result.traffic_classes)
    judged = _is_judged(slo, *(objectives_of(slo, name) for name in result.traffic_classes))
    whole = _group(requests, met if judged else None, cut, window_ns)
    tenants, fair = _tenants(result, cut)
    itl_counts = np.array([replica.itl_counts for replica in result.replicas]).sum(axis=0)
    unsent: dict[str, float | None] = {"unsent_requests": result.unsent_requests}
    if result.faults is not None:
        unsent |= _fault_values(result.faults)
    return {
        **whole,
        "seed": result.seed,
        "tpot_undefined_requests": int(np.count_nonzero(_streams(measured) & _single(measured))),
        "saturated": is_saturated(requests),
        "window_s": (window_ns[1] - window_ns[0]) / 1e9,
        "latencies": whole["latencies"] | {"itl_s": binned_distribution(itl_counts)},
        "values": whole["values"] | _engine_values(result, window_ns) | fair | unsent,
        "classes": _classes(result, slo, met, cut, window_ns),
        "tenants": tenants,
        "itl_histogram": _histogram(itl_counts),
        "replicas": _replica_totals(result),
    }


def _fault_values(counts: FaultCounts) -> dict[str, float | None]:
    return {
        "faults": counts.injected,
        "lost_requests": counts.lost,
        "retried_attempts": counts.retried,
        "duplicated_requests": counts.duplicated,
    }


def _group(
    requests: Columns, met: NDArray[np.bool_] | None, cut: int, window_ns: tuple[int, int]
) -> GroupMetrics:
    """Figures of some requests, the first `cut` of which are not measured; `met` says which met
    their SLO, None that there was none to meet."""
    total = requests["outcome"].size
    measured = {name: column[cut:] for name, column in requests.items()}
    attained = None if met is None else _share(int(met[cut:].sum()), total - cut)
    return {
        "requests": total,
        "measured_requests": total - cut,
        "outcomes": _outcomes(requests),
        "latencies": {name: distribution(values) for name, values in latencies(measured).items()},
        "values": _rates(requests, met, window_ns) | {"slo_attainment": attained},
    }


def _classes(
    result: SeedResult, slo: Slo, met: NDArray[np.bool_], cut: int, window_ns: tuple[int, int]
) -> dict[str, GroupMetrics]:
    """Each traffic class by itself."""
    groups = {}
    for code, name in _named(result.traffic_classes):
        own = result.requests["traffic_class"] == code
        requests = {key: column[own] for key, column in result.requests.items()}
        own_met = met[own] if _is_judged(objectives_of(slo, name)) else None
        groups[name] = _group(requests, own_met, int(np.count_nonzero(own[:cut])), window_ns)
    return groups


def _tenants(
    result: SeedResult, cut: int
) -> tuple[dict[str, TenantMetrics], dict[str, float | None]]:
    """Each tenant by itself, and how evenly they were served."""
    requests, names = result.requests, result.tenants
    demand, service = demand_and_service(requests, len(names), cut)
    shares = fair_shares(demand, float(service.sum()))
    tenants: dict[str, TenantMetrics] = {}
    for code, name in _named(names):
        rows = np.flatnonzero(requests["tenant"] == code)
        own = {key: column[rows] for key, column in requests.items()}
        measured = {key: column[rows >= cut] for key, column in own.items()}
        tenants[name] = {
            "outcomes": _outcomes(own),
            "demand_tokens": float(demand[code]),
            "service_tokens": float(service[code]),
            "fair_tokens": float(shares[code]),
            "ttft_s": distribution(latencies(measured)["ttft_s"]),
        }
    return tenants, fairness(demand, service)


def _named(names: Sequence[str]) -> list[tuple[int, str]]:
    """Codes and names; none where all requests are nameless."""
    return [] if set(names) <= {""} else list(enumerate(names))


def _outcomes(requests: Columns) -> dict[str, int]:
    counts = np.bincount(requests["outcome"], minlength=len(OUTCOMES))
    return dict(zip(OUTCOMES, counts.tolist(), strict=True))


def warmup_requests(total: int, warmup_fraction: float) -> int:
    """How many of `total` requests, the first to arrive, are not measured."""
    return int(warmup_fraction * total)


def objectives_of(slo: Slo, traffic_class: str) -> Slo:
    """What requests of a class must meet: the class's own objectives, or the general ones."""
    classes: Mapping[str, Slo] = getattr(slo, "classes", {})
    return classes.get(traffic_class, slo)


def _is_judged(*objectives: Slo) -> bool:
    return any((o.ttft_s, o.tpot_s, o.e2e_s) != (None, None, None) for o in objectives)


def meets_slo(
    requests: Columns, slo: Slo, traffic_classes: Sequence[str] = ("",)
) -> NDArray[np.bool_]:
    """Which requests finished and met every SLO given for their class.

    A stream of one token has no TPOT to miss. A plain request has no visible first token: TTFT
    and TPOT together bound its end, at the instant where a stream that just meets both ends.
    """
    each = [objectives_of(slo, name) for name in traffic_classes]
    codes = requests["traffic_class"]
    ttft_s = _limits_s([one.ttft_s for one in each])[codes]
    tpot_s = _limits_s([one.tpot_s for one in each])[codes]
    e2e_s = _limits_s([one.e2e_s for one in each])[codes]
    gaps = np.maximum(requests["output_tokens"] - 1, 0)
    first_s = (requests["first_token_ns"] - requests["arrived_ns"]) / 1e9
    whole_s = (requests["finished_ns"] - requests["arrived_ns"]) / 1e9
    mean_gap_s = (requests["finished_ns"] - requests["first_token_ns"]) / np.maximum(gaps, 1) / 1e9
    stream = (first_s <= ttft_s) & ((mean_gap_s <= tpot_s) | (gaps == 0))
    bounded = np.isfinite(tpot_s)
    plain = ~bounded | (whole_s <= ttft_s + np.where(bounded, tpot_s, 0.0) * gaps)
    met = np.where(requests["streamed"], stream, plain) & (whole_s <= e2e_s)
    return np.asarray(met & (requests["outcome"] == FINISHED))


def _limits_s(limits_s: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.inf if limit_s is None else limit_s for limit_s in limits_s])


def binned_distribution(counts: NDArray[np.int64]) -> Distribution:
    """Mean and percentiles of inter-token latencies counted in bins of `ITL_EDGES_S`.

    Values are taken as evenly spread within their bin. Six significant digits: bins are 2.3 %
    wide, and what follows is the C library's.
    """
    total = int(counts.sum())
    if not total:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    centres_s = (ITL_EDGES_S[:-1] + ITL_EDGES_S[1:]) / 2
    ranks = np.array([total * percent / 100 for percent in PERCENTILES.values()])
    at_most = np.cumsum(counts)
    bins = np.searchsorted(at_most, ranks)
    within = 1 - (at_most[bins] - ranks) / counts[bins]
    values_s = ITL_EDGES_S[bins] + within * np.diff(ITL_EDGES_S)[bins]
    mean, p50, p90, p99 = (
        float(f"{value:.6g}") for value in (float(counts @ centres_s) / total, *values_s.tolist())
    )
    return {"count": total, "mean": mean, "p50": p50, "p90": p90, "p99": p99}


def distribution(values_s: NDArray[np.float64]) -> Distribution:
    """Mean and percentiles of observations."""
    if not values_s.size:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(values_s, list(PERCENTILES.values()), method="linear").tolist()
    return {
        "count": values_s.size,
        "mean": float(values_s.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
    }


def _streams(requests: Columns) -> NDArray[np.bool_]:
    return np.asarray(requests["streamed"] & (requests["outcome"] == FINISHED))


def _single(requests: Columns) -> NDArray[np.bool_]:
    return np.asarray(requests["output_tokens"] <= 1)


def latencies(requests: Columns) -> dict[str, NDArray[np.float64]]:
    """The observations in seconds of every kind of latency but ITL; see `viisim.definitions`."""
    finished = requests["outcome"] == FINISHED
    streams = _streams(requests)
    several = streams & ~_single(requests)

    def seconds(start: str, end: str, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        spans_ns = requests[f"{end}_ns"][chosen] - requests[f"{start}_ns"][chosen]
        return np.asarray(spans_ns / 1e9)

    decode_s = seconds("first_token", "finished", several)
    return {
        "ttft_s": seconds("arrived", "first_token", streams),
        "tpot_s": decode_s / (requests["output_tokens"][several] - 1),
        "e2e_s": seconds("arrived", "finished", finished),
        "hold_s": seconds("arrived", "dispatched", finished),
        "queue_s": seconds("dispatched", "started", finished),
    }


def _window_ns(measured: Columns) -> tuple[int, int]:
    arrived = measured["arrived_ns"]
    if not arrived.size:
        return 0, 0
    return int(arrived[0]), max(int(arrived[-1]), int(measured["finished_ns"].max()))


def _rates(
    requests: Columns, met: NDArray[np.bool_] | None, window_ns: tuple[int, int]
) -> dict[str, float | None]:
    finished_ns = requests["finished_ns"]
    inside = requests["outcome"] == FINISHED
    inside &= (finished_ns >= window_ns[0]) & (finished_ns <= window_ns[1])
    output_tokens = int(requests["output_tokens"][inside].sum())
    prompt_tokens = int(requests["prompt_tokens"][inside].sum())
    window_s = (window_ns[1] - window_ns[0]) / 1e9
    return {
        "throughput_requests_per_s": _share(int(inside.sum()), window_s),
        "throughput_output_tokens_per_s": _share(output_tokens, window_s),
        "throughput_total_tokens_per_s": _share(prompt_tokens + output_tokens, window_s),
        "goodput_requests_per_s": None
        if met is None
        else _share(int((met & inside).sum()), window_s),
    }


def _engine_values(result: SeedResult, window_ns: tuple[int, int]) -> dict[str, float | None]:
    """Counters of all replicas over the whole run; KV use over the window."""
    replicas = result.replicas
    kv_use = _kv_use(result, window_ns)
    return {
        "kv_use_mean": float(kv_use.mean()) if kv_use.size else None,
        "kv_use_max": float(kv_use.max()) if kv_use.size else None,
        "prefix_hit_rate": _share(
            sum(r.prefix_hit_tokens for r in replicas),
            sum(r.prefix_queried_tokens for r in replicas),
        ),
        "preemptions": sum(r.preemptions for r in replicas),
        "busy_share": _share(
            sum(r.busy_ns for r in replicas),
            sum((r.retired_ns or result.ended_ns) - r.ready_ns for r in replicas),
        ),
        "engine_steps": sum(r.steps for r in replicas),
        "extrapolated_steps": sum(r.extrapolated_steps for r in replicas),
        **_energy(result),
    }


def _energy(result: SeedResult) -> dict[str, float | None]:
    energy_j, requests = result.energy_j, result.requests
    tokens = int(requests["output_tokens"][requests["outcome"] == FINISHED].sum())
    per_token_j = None if energy_j is None else _share(energy_j, tokens)
    return {
        "energy_j": energy_j,
        "energy_j_per_million_tokens": None if per_token_j is None else per_token_j * 1e6,
    }


def _kv_use(result: SeedResult, window_ns: tuple[int, int]) -> NDArray[np.float64]:
    samples = result.samples
    inside = (samples["time_ns"] >= window_ns[0]) & (samples["time_ns"] <= window_ns[1])  # type: ignore[operator]
    usable = np.array([replica.usable_kv_blocks for replica in result.replicas])
    return np.asarray(samples["kv_blocks_used"][inside] / usable[samples["replica"][inside]])


def _replica_totals(result: SeedResult) -> list[dict[str, Any]]:
    return [
        {"id": name}
        | {field: getattr(totals, field) for field in totals.__slots__ if field != "itl_counts"}
        for name, totals in zip(result.replica_ids, result.replicas, strict=True)
    ]


def _histogram(counts: NDArray[np.int64]) -> Histogram:
    used = np.flatnonzero(counts)
    if not used.size:
        return {"first_bin": 0, "counts": []}
    return {"first_bin": int(used[0]), "counts": counts[used[0] : used[-1] + 1].tolist()}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
