"""Step times from requests of which only the ends are known: first token and last.

Between its first and last token a request takes part in as many steps as it has gaps. What those
steps computed follows from the others: how many tokens each of them generated meanwhile (its own
tokens spread evenly over its own span), and whose prompts were computed. That makes the length of
the span linear in the coefficients, and a few hundred requests more than enough.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import lsq_linear

from viisim.calibration.fit import StepFit
from viisim.calibration.measurements import Counts, Floats, RequestLog
from viisim.errors import InputError

_FEWEST = 20
_SPAN_ERROR = 0.03
_SHARES = np.array([0.5, 0.1, 0.2, 0.2, 0.0])
_SHARES_SD = 0.05
"""Prior shares of a span that go to steps as such, sequences, contexts, prompts and pairs. A full
cache makes them proportional to each other; then this decides what data cannot."""


def fit_spans(log: RequestLog, where: str) -> StepFit:
    """Step times: an affine base over the batch sizes seen, one slope for all, and prefill.

    Raises InputError when too few requests are usable.
    """
    assert log.arrived_s is not None, "spans lie on a common clock"
    first = log.arrived_s + log.ttft_s
    last = log.arrived_s + log.e2e_s
    gaps = log.output_tokens - 1
    # Beyond the last start of a request that is known, unknown ones may have joined.
    starts = log.started_s if log.started_s is not None else first
    horizon = starts.max() if log.goes_on else np.inf
    usable = np.flatnonzero((gaps > 0) & (last <= horizon))
    if len(usable) < _FEWEST:
        raise InputError(
            f"{where}: only {len(usable)} requests end before the last one starts; record more "
            f"requests, or the times of all tokens"
        )
    design = np.array([_work(log, first, last, gaps, request) for request in usable.tolist()])
    spans = last[usable] - first[usable]
    return _fit(design, spans, gaps[usable], log)


def _work(
    log: RequestLog, first: Floats, last: Floats, gaps: Counts, request: int
) -> tuple[float, ...]:
    """What the steps of one request's span computed: (steps, sum of batch sizes, sum of
    contexts, prefill tokens, pairs)."""
    begin, end = first[request], last[request]
    length = np.maximum(last - first, 1e-9)
    low = np.clip((begin - first) / length, 0, 1)
    high = np.clip((end - first) / length, 0, 1)
    tokens = gaps * (high - low)
    context = tokens * (log.prompt_tokens + 1 + gaps * (low + high) / 2)
    prefilled = (first > begin) & (first <= end)
    new = (log.prompt_tokens - log.cached)[prefilled]
    pairs = new * log.cached[prefilled] + new * (new + 1) / 2
    return (
        float(gaps[request]),
        float(tokens.sum()),
        float(context.sum()),
        float(new.sum()),
        float(pairs.sum()),
    )


def _fit(design: Floats, spans: Floats, gaps: Counts, log: RequestLog) -> StepFit:
    scale = design.mean(axis=0)
    scale = np.where(scale > 0, spans.mean() / scale, 1.0)
    weight = robust = 1 / (_SPAN_ERROR * spans)
    for _ in range(10):
        stacked = np.vstack([design * scale * robust[:, None], np.eye(5) / _SHARES_SD])
        wanted = np.append(spans * robust, _SHARES / _SHARES_SD)
        relative = lsq_linear(stacked, wanted, bounds=(0, np.inf)).x
        errors = (design @ (relative * scale) - spans) * weight
        robust = weight / (1 + errors**2) ** 0.25
    step_s, sequence_s, context_s, token_s, pair_s = relative * scale
    inverse = np.linalg.pinv(stacked.T @ stacked, hermitian=True) * np.outer(scale, scale)
    sizes = np.unique([1, max(2, round(float((design[:, 1] / design[:, 0]).max())))])
    lift = np.stack([np.ones(len(sizes)), sizes])
    base_covariance = np.einsum("in,ij,jn->n", lift, inverse[:2, :2], lift)
    cross = lift.T @ inverse[:2, 2]
    slope_variance = np.full(len(sizes), inverse[2, 2])
    relative_error = float(np.std(errors) * _SPAN_ERROR)
    base_s = step_s + sequence_s * sizes
    prefill_covariance = np.zeros((3, 3))
    prefill_covariance[1:, 1:] = inverse[3:, 3:]
    return StepFit(
        sequences=sizes,
        base_s=base_s,
        slope_s=np.full(len(sizes), context_s),
        decode_covariance=np.stack([base_covariance, cross, slope_variance], axis=1),
        prefill=np.array([base_s[0], token_s, pair_s]),
        prefill_covariance=prefill_covariance,
        host_s=0.0,
        decode_noise=relative_error,
        prefill_noise=relative_error,
        prefill_cost=float(np.sum(errors**2)),
    )
