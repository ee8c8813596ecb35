"""What a trace looks like in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from viisim.workload.trace_file import Column, TraceColumns, read_trace


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Token counts of all requests; quantiles interpolate linearly (numpy's default)."""

    mean: float
    min: int
    p50: float
    p90: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """Figures of one trace. What the trace cannot tell is None."""

    format: str
    requests: int
    skipped_rows: int
    """Broken rows, and requests without an answer, that were left out."""
    first_bad: str | None
    """The first of them, as "line: what is wrong with it"."""
    span_s: float
    """From the first to the last arrival."""
    rate_per_s: float | None
    """Requests over span; None for a span of 0."""
    interarrival_cv: float | None
    """Standard deviation of the inter-arrival times over their mean; 1 for a Poisson process."""
    dispersion_1s: float
    """Variance over mean of the arrivals in windows of 1 s; 1 for a Poisson process."""
    peak_60s_per_s: float
    """The highest rate in a minute, minutes counted from the first arrival."""
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary
    zero_outputs: int
    """Requests recorded with an answer of 0 tokens."""
    prefix_share: float | None
    """Share of all prompt tokens that an earlier request has brought as its own beginning: the
    hits of an unbounded prefix cache."""
    unique_blocks: int | None
    """Different blocks, or pieces of a prompt, each with all that stands before it."""
    block_tokens: int | None
    """None also where pieces have lengths of their own."""
    sessions: int | None
    multi_turn_sessions: int | None
    closed_loop_turns: int
    """Requests that wait for the answer to the turn before them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as here, for JSON."""
        return asdict(self)


def trace_info(path: str | Path, *, skip_bad: bool = False) -> TraceInfo:
    """The figures of the trace in `path`. Raises InputError as `read_trace` does."""
    trace = read_trace(path, skip_bad=skip_bad)
    span_ns = int(trace.arrived_ns[-1])
    span_s = span_ns / 1e9
    seconds = _window_counts(trace.arrived_ns, 1)
    prefix_share, unique_blocks = _prefix_reuse(trace)
    sessions, multi_turn_sessions = _sessions(trace)
    return TraceInfo(
        format=trace.format,
        requests=len(trace),
        skipped_rows=trace.skipped_rows,
        first_bad=trace.first_bad or None,
        span_s=span_s,
        rate_per_s=len(trace) / span_s if span_s else None,
        interarrival_cv=_interarrival_cv(trace.arrived_ns),
        dispersion_1s=_dispersion(seconds, windows=span_ns // 10**9 + 1),
        peak_60s_per_s=int(_window_counts(trace.arrived_ns, 60).max()) / 60,
        prompt_tokens=_summary(trace.prompt_tokens),
        output_tokens=_summary(trace.output_tokens),
        zero_outputs=int(np.count_nonzero(trace.output_tokens == 0)),
        prefix_share=prefix_share,
        unique_blocks=unique_blocks,
        block_tokens=trace.block_tokens or None,
        sessions=sessions,
        multi_turn_sessions=multi_turn_sessions,
        closed_loop_turns=int(np.count_nonzero(trace.think_ns >= 0)),
    )


def _summary(tokens: Column) -> LengthSummary:
    p50, p90, p95, p99 = np.quantile(tokens, (0.50, 0.90, 0.95, 0.99)).tolist()
    return LengthSummary(
        float(tokens.mean()), int(tokens.min()), p50, p90, p95, p99, int(tokens.max())
    )


def _interarrival_cv(arrived_ns: Column) -> float | None:
    gaps_ns = np.diff(arrived_ns)
    if not gaps_ns.any():
        return None
    return float(gaps_ns.std() / gaps_ns.mean())


def _window_counts(arrived_ns: Column, window_s: int) -> Column:
    """Arrivals in each window that has any: the empty ones of a long quiet trace cost nothing."""
    _, counts = np.unique(arrived_ns // (window_s * 10**9), return_counts=True)
    return counts.astype(np.int64)


def _dispersion(counts: Column, windows: int) -> float:
    """Variance over mean of the counts, the windows without arrivals included."""
    mean = float(counts.sum()) / windows
    return float((counts**2).sum()) / windows / mean - mean


def _prefix_reuse(trace: TraceColumns) -> tuple[float | None, int | None]:
    """The share of prompt tokens in pieces seen before, and the number of different pieces."""
    if not len(trace.block_ids):
        return None, None
    seen: set[int] = set()
    hit_tokens = 0
    for request in range(len(trace)):
        pieces = trace.pieces(request)
        for hits, (piece, tokens) in enumerate(pieces):
            if piece not in seen:
                seen.update(piece for piece, _ in pieces[hits:])
                break
            hit_tokens += tokens
    return hit_tokens / int(trace.prompt_tokens.sum()), len(seen)


def _sessions(trace: TraceColumns) -> tuple[int | None, int | None]:
    """How many sessions there are, and how many of them have several turns."""
    words = trace.words.get("session")
    if words is None:
        return None, None
    turns = np.bincount(words.codes[words.codes >= 0])
    return int(np.count_nonzero(turns)), int(np.count_nonzero(turns > 1))
