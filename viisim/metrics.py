"""What a run is judged by: per-seed metrics, and their summary over seeds.

Definitions, each also written into the summary (`DEFINITIONS`):

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

Lengths of time are seconds here, floats, computed from the integer nanoseconds of the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from viisim.records import FINISHED, ITL_EDGES_S, OUTCOMES, REFUSED, SHED, SeedResult

Columns: TypeAlias = Mapping[str, NDArray[Any]]

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}

DEFINITIONS = {
    "busy_share": "share of the run that replicas spent computing, mean over replicas",
    "e2e_s": "finished - arrived; finished requests",
    "engine_steps": "engine steps that computed something, whole run",
    "extrapolated_steps": "engine steps outside the profile's calibrated range, whole run",
    "goodput_requests_per_s": "requests per second of the window that met every SLO given; a plain "
    "request meets TTFT and TPOT if it ends when a stream that just meets both would have ended",
    "hold_s": "dispatched - arrived, the wait in the central queue; finished requests",
    "interval": "half width of the 95 % Student t interval of the mean over seeds",
    "itl_s": "gaps between consecutive tokens of a sequence, whole run, read from bins of equal "
    "ratio (2.3 % wide)",
    "kv_use_max": "as kv_use_mean, the largest sample",
    "kv_use_mean": "share of a replica's KV blocks in use; samples of all replicas in the window",
    "percentiles": "numpy 'linear'",
    "preemptions": "sequences that lost their blocks and were recomputed, whole run",
    "prefix_hit_rate": "share of the prompt tokens looked up that were cached, whole run",
    "queue_s": "started - dispatched, the wait inside the engine; finished requests",
    "saturated": "over the arrival window: mean number in system in the last quarter above 1.5 x "
    "that of the second, never back at the latter, and grown by over 5 % of the arrivals between",
    "slo_attainment": "share of measured requests that met every SLO; shed, refused and "
    "unfinished ones missed it",
    "throughput_output_tokens_per_s": "output tokens of what finished in the window",
    "throughput_requests_per_s": "requests finished in the window",
    "throughput_total_tokens_per_s": "prompt and output tokens of what finished in the window",
    "tpot_s": "(finished - first token) / (output tokens - 1); streamed finished requests of more "
    "than one token",
    "ttft_s": "first token - arrived, holding included; streamed finished requests",
    "warmup": "the first `warmup_fraction` of requests by order of arrival are not measured",
    "window": "from the first measured arrival to the last finish or arrival of a measured request",
}
"""What each figure means, for whoever reads a `summary.json` without this file."""


class Slo(Protocol):
    """Service-level objectives in seconds; None where none is set."""

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


class SeedMetrics(TypedDict):
    """One seed. `values` holds the rates, shares and engine counters by name."""

    seed: int
    requests: int
    measured_requests: int
    outcomes: dict[str, int]
    tpot_undefined_requests: int
    saturated: bool
    window_s: float
    latencies: dict[str, Distribution]
    values: dict[str, float | None]
    itl_histogram: Histogram
    replicas: list[dict[str, Any]]


class Estimate(TypedDict):
    """Mean over the `seeds` seeds where the figure is defined, and its 95 % half width.

    None where undefined: the mean without any seed, the half width with fewer than two.
    """

    mean: float | None
    half_width: float | None
    seeds: int


class Summary(TypedDict):
    """All seeds of one experiment: the content of `summary.json`."""

    definitions: dict[str, str]
    warmup_fraction: float
    slo: dict[str, float | None]
    outcomes: dict[str, int]
    saturated_seeds: list[int]
    latencies: dict[str, dict[str, Estimate]]
    values: dict[str, Estimate]
    seeds: list[SeedMetrics]


class InvariantError(AssertionError):
    """The simulator broke one of its own rules; the message names the invariant and a row."""


# --------------------------------------------------------------------------------------
# Over seeds


def summarise(results: Sequence[SeedResult], slo: Slo, warmup_fraction: float) -> Summary:
    """Check and measure every seed, then combine them."""
    for result in results:
        check_invariants(result)
    return combine([seed_metrics(r, slo, warmup_fraction) for r in results], slo, warmup_fraction)


def combine(seeds: Sequence[SeedMetrics], slo: Slo, warmup_fraction: float) -> Summary:
    """The summary of seeds measured one by one (in other processes, for instance)."""
    if not seeds:
        raise ValueError("a summary needs at least one seed")

    def latency(name: str) -> dict[str, Estimate]:
        each = [cast("dict[str, float | None]", seed["latencies"][name]) for seed in seeds]
        return {
            statistic: estimate([of_seed[statistic] for of_seed in each])
            for statistic in ("mean", *PERCENTILES)
        }

    return {
        "definitions": DEFINITIONS,
        "warmup_fraction": warmup_fraction,
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_s": slo.e2e_s},
        "outcomes": {name: sum(s["outcomes"][name] for s in seeds) for name in OUTCOMES},
        "saturated_seeds": [s["seed"] for s in seeds if s["saturated"]],
        "latencies": {name: latency(name) for name in seeds[0]["latencies"]},
        "values": {
            name: estimate([s["values"][name] for s in seeds]) for name in seeds[0]["values"]
        },
        "seeds": list(seeds),
    }


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and 95 % Student t half width of independent values, one a seed."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    n = known.size
    half_width = None
    if n > 1:
        # Six decimals of t, as printed tables have: the same figure whatever the C library.
        t = round(float(stats.t.ppf(0.975, n - 1)), 6)
        half_width = t * float(known.std(ddof=1)) / n**0.5
    return {"mean": float(known.mean()) if n else None, "half_width": half_width, "seeds": n}


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
    met = meets_slo(requests, slo)
    judged = (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None)
    itl_counts = np.array([replica.itl_counts for replica in result.replicas]).sum(axis=0)
    outcomes = np.bincount(requests["outcome"], minlength=len(OUTCOMES))
    return {
        "seed": result.seed,
        "requests": total,
        "measured_requests": total - cut,
        "outcomes": dict(zip(OUTCOMES, outcomes.tolist(), strict=True)),
        "tpot_undefined_requests": int(np.count_nonzero(_streams(measured) & _single(measured))),
        "saturated": is_saturated(requests),
        "window_s": (window_ns[1] - window_ns[0]) / 1e9,
        "latencies": {name: distribution(values) for name, values in latencies(measured).items()}
        | {"itl_s": binned_distribution(itl_counts)},
        "values": _rates(requests, met if judged else None, window_ns)
        | {"slo_attainment": _share(int(met[cut:].sum()), total - cut) if judged else None}
        | _engine_values(result, window_ns),
        "itl_histogram": _histogram(itl_counts),
        "replicas": _replica_totals(result),
    }


def warmup_requests(total: int, warmup_fraction: float) -> int:
    """How many of `total` requests, the first to arrive, are not measured."""
    return int(warmup_fraction * total)


def meets_slo(requests: Columns, slo: Slo) -> NDArray[np.bool_]:
    """Which requests finished and met every SLO given.

    A stream of one token has no TPOT to miss. A plain request has no visible first token: TTFT
    and TPOT together bound its end, at the instant where a stream that just meets both ends.
    """
    inf = float("inf")
    ttft_s, tpot_s, e2e_s = (inf if s is None else s for s in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    gaps = np.maximum(requests["output_tokens"] - 1, 0)
    first_s = (requests["first_token_ns"] - requests["arrived_ns"]) / 1e9
    whole_s = (requests["finished_ns"] - requests["arrived_ns"]) / 1e9
    mean_gap_s = (requests["finished_ns"] - requests["first_token_ns"]) / np.maximum(gaps, 1) / 1e9
    stream = (first_s <= ttft_s) & ((mean_gap_s <= tpot_s) | (gaps == 0))
    plain = whole_s <= (ttft_s + tpot_s * gaps if tpot_s < inf else inf)
    met = np.where(requests["streamed"], stream, plain) & (whole_s <= e2e_s)
    return np.asarray(met & (requests["outcome"] == FINISHED))


def is_saturated(requests: Columns) -> bool:
    """Whether the queue was still growing when the last request arrived.

    Compares the number of requests in the system in the last quarter of the arrival window
    with its mean `before` in the second quarter. Saturated means all of: the mean is more than
    1.5 times as high; at no instant of the last quarter was it back at `before`, as a stable
    queue would be after any passing rush; and it rose by more than 5 % of the requests that
    arrived from the middle of one quarter to that of the other, which growing traffic on a
    cluster that keeps up does not do. Measured on M/M/1 queues of 2,000 requests: load 0.9 is
    flagged in 0, 0.95 in 1, 1.1 in 83 and 1.2 in 99 of 100 runs. A run shorter than a few times
    its own latency is all start-up and may be flagged: it is too short to tell.
    """
    entered = (requests["outcome"] != SHED) & (requests["outcome"] != REFUSED)
    arrived = requests["arrived_ns"][entered]
    if arrived.size < 8 or arrived[-1] == arrived[0]:
        return False
    quarters = np.linspace(arrived[0], arrived[-1], 5)
    finished = requests["finished_ns"][entered]
    left = np.where(finished < 0, arrived[-1], finished)
    before = _mean_in_system(arrived, left, quarters[1], quarters[2])
    after = _mean_in_system(arrived, left, quarters[3], quarters[4])
    middles = np.searchsorted(arrived, [quarters[1:3].mean(), quarters[3:5].mean()])
    return bool(
        after > 1.5 * before
        and after - before > 0.05 * (middles[1] - middles[0])
        and _fewest_in_system(arrived, left, quarters[3], quarters[4]) > before
    )


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
    """The observations in seconds of every kind of latency but ITL, as `DEFINITIONS` has them."""
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
        "busy_share": _share(sum(r.busy_ns for r in replicas), len(replicas) * result.ended_ns),
        "engine_steps": sum(r.steps for r in replicas),
        "extrapolated_steps": sum(r.extrapolated_steps for r in replicas),
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


def _mean_in_system(
    arrived: NDArray[np.int64], left: NDArray[np.int64], start: float, end: float
) -> float:
    stay = np.minimum(left, end) - np.maximum(arrived, start)
    return float(stay[stay > 0].sum()) / (end - start)


def _fewest_in_system(
    arrived: NDArray[np.int64], left: NDArray[np.int64], start: float, end: float
) -> int:
    """The minimum is reached at the start or just after a departure."""
    departures = np.sort(left)
    gone = departures[np.searchsorted(departures, start) : np.searchsorted(departures, end)]
    instants = np.concatenate(([start], gone))
    present = np.searchsorted(arrived, instants, "right")
    return int((present - np.searchsorted(departures, instants, "right")).min())


# --------------------------------------------------------------------------------------
# Invariants


INSTANTS = ("arrived_ns", "dispatched_ns", "started_ns", "first_token_ns", "finished_ns")


def check_invariants(result: SeedResult) -> None:
    """Raise InvariantError unless the result obeys I1 to I4, as far as its columns can tell."""
    requests = result.requests
    _check_conservation(requests)
    _check_causality(requests)
    last_ns = max((int(requests[name].max(initial=0)) for name in INSTANTS), default=0)
    if last_ns > result.ended_ns:
        raise InvariantError(f"I3 clock: something happened at {last_ns} ns, after the end")
    usable = np.array([replica.usable_kv_blocks for replica in result.replicas], dtype=np.int64)
    used = result.samples["kv_blocks_used"]
    _require((used >= 0) & (used <= usable[result.samples["replica"]]), "I4 KV blocks", "sample")  # type: ignore[operator]


def _check_conservation(requests: Columns) -> None:
    """Each request is there once, has one fate, and the instants that belong to that fate."""
    outcome = requests["outcome"]
    finished = outcome == FINISHED
    if len({column.size for column in requests.values()}) != 1:
        raise InvariantError("I1 conservation: columns of requests differ in length")
    if np.unique(requests["request"]).size != outcome.size:
        raise InvariantError("I1 conservation: a request is recorded twice")
    name = "I1 conservation"
    _require((outcome >= 0) & (outcome < len(OUTCOMES)), f"{name}: no known outcome", "request")
    ended = requests["finished_ns"] >= 0
    _require(finished == ended, f"{name}: outcome and finished_ns disagree", "request")
    _require(~finished | (requests["replica"] >= 0), f"{name}: finished nowhere", "request")
    for instant in INSTANTS:
        _require(~finished | (requests[instant] >= 0), f"{name}: finished, no {instant}", "request")


def _check_causality(requests: Columns) -> None:
    """Arrivals are in order, and so are the instants of a request, as far as they came."""
    arrived = requests["arrived_ns"]
    _require(np.diff(arrived, prepend=0) >= 0, "I3 clock: arrivals out of order", "request")
    latest, named = arrived, INSTANTS[0]
    for instant in INSTANTS[1:]:
        came = requests[instant] >= 0
        _require(
            ~came | (requests[instant] >= latest), f"I2 causality: {instant} < {named}", "request"
        )
        latest, named = np.where(came, requests[instant], latest), instant


def _require(holds: NDArray[np.bool_], broken: str, what: str) -> None:
    if not holds.all():
        raise InvariantError(f"{broken} ({what} {int(np.argmin(holds))})")
