"""Step times fitted to engine steps: robust, weighted, non-negative least squares.

A decode step of n sequences that attend to c tokens takes base[n] + slope[n] * c. Steps of one run
are averaged in cells of equal n and similar context first, since thousands of steps in the same
place say no more of the model's truth than a few hundred do, and kernels climb and fall with the
context within a run. Where data are thin, neighbouring batch sizes pull at each other:

* bases by their second difference, loosely: real kernels jump between batch sizes;
* slopes by their ratio, firmly: reading the cache of more sequences at once overlaps better, so
  the slope falls slowly with n. Runs at one context length say little of it; a weak prior on the
  slope over the base decides there.

Prefill terms come from steps that prefill, less what decode explains. Prompts of one length cannot
tell the three terms apart; weak priors, stated below, choose among what fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from viisim.calibration.measurements import Floats, StepLog

_MODEL_ERROR = 0.02
"""Relative standard error of the model itself: more steps in a cell tell no more than this."""
_ENOUGH_STEPS = 200
_FEWEST_STEPS = 8
"""Fewer steps of a run at one batch size are the run's edges, not its truth."""
_CONTEXT_BINS_PER_E = 2
"""Cells of context per factor e."""

_BASE_JUMP = 0.25
"""Prior standard deviation of a base from the line between its neighbours, relative."""
_SLOPE_STEP = 0.15
"""Prior standard deviation of a slope from its neighbour's, relative to the slope."""
_SLOPE_POWER = -0.3
"""A slope falls with this power of the batch size: Qwen3-VL-8B on gfx906 loses 29 % from 1 to 4."""

_SLOPE_A_BASE = 5e-5
"""Prior: slope over base of the smallest batch, per token (gfx906: 3e-5 to 9e-5). It decides only
where all contexts are alike; what a step gains within one run is the kernel's saw-tooth."""
_SLOPE_A_BASE_SD = 1.0

_PREFILL_ERROR = 0.03
_PREFILL_ROWS = 30
"""Steps of one run beyond this number add no weight."""
_BASES_A_PREFILL = 3.0
"""Prior: a step that prefills begins with so many bases of a single decode (gfx906: 3 to 6)."""
_TOKENS_A_BASE = 16.0
"""Prior: prefill tokens computed in the base of a single decode (gfx906: 13 to 28)."""
_PAIRS_A_TOKEN = 1.5e-4
"""Prior: time of a pair over that of a token (gfx906: 0.7e-4 to 2.5e-4)."""
_PRIOR_SD = 1.0
"""Relative standard deviation of the three."""


@dataclass(frozen=True, slots=True)
class StepFit:
    """Fitted coefficients, by seconds and tokens."""

    sequences: NDArray[np.int64]
    """Decode batch sizes that were seen."""
    base_s: Floats
    slope_s: Floats
    """Per context token."""
    decode_covariance: Floats
    """For each size: variance of the base, covariance, variance of the slope."""
    prefill: Floats
    """Base of a step, time of a token, time of a pair."""
    prefill_covariance: Floats
    host_s: float
    """Part of every step that is the host's; contained in the bases here."""
    decode_noise: float
    """Relative standard deviation of single decode steps, robust."""
    prefill_noise: float
    prefill_cost: float
    """What is left of the robust cost; comparable between explanations of the same steps."""

    def predict(self, log: StepLog) -> Floats:
        """Duration of each entry of the log."""
        return decode_s(self, log) + _prefill_s(self.prefill, self, log)


def fit_steps(logs: Sequence[StepLog]) -> StepFit:
    """The step times of the runs; there must be at least one entry that decodes or prefills."""
    logs = [log for log in logs if len(log)]
    fit = _fit_decode([log.part((log.prefill_tokens == 0) & (log.decodes > 0)) for log in logs])
    return _fit_prefill(fit, [log.part(log.prefill_tokens > 0) for log in logs])


def decode_s(fit: StepFit, log: StepLog) -> Floats:
    """What decode takes of each entry; 0 in those without decodes."""
    base = trend(fit.sequences, fit.base_s, log.decodes)
    slope = np.interp(log.decodes, fit.sequences, fit.slope_s)
    return np.where(log.decodes > 0, base + slope * log.context_tokens, 0.0)


def trend(sequences: NDArray[np.int64], base_s: Floats, at: Any) -> Floats:
    """Bases between the sizes seen, and beyond the last on a line that rises with all of them."""
    most = int(sequences[-1])
    inside = np.interp(at, sequences, base_s)
    return np.asarray(inside + np.maximum(np.asarray(at) - most, 0) * rise(sequences, base_s))


def rise(sequences: NDArray[np.int64], base_s: Floats) -> float:
    """Mean growth of the base per sequence, 0 at least."""
    if len(sequences) == 1:
        return 0.0
    return max(0.0, float(np.polyfit(sequences, base_s, 1)[0]))


# --------------------------------------------------------------------------------------
# Decode


@dataclass(frozen=True, slots=True)
class _Cells:
    """Means of steps that are alike."""

    sequences: NDArray[np.int64]
    context: Floats
    duration_s: Floats
    sd: Floats
    """Relative standard error."""


def _fit_decode(logs: Sequence[StepLog]) -> StepFit:
    cells = _cells([log for log in logs if len(log)])
    sizes = np.unique(cells.sequences)
    if not len(sizes):
        return _without_decode()
    design = np.zeros((len(cells.context), 2 * len(sizes)))
    row, column = np.arange(len(cells.context)), np.searchsorted(sizes, cells.sequences)
    design[row, column] = 1.0
    design[row, len(sizes) + column] = cells.context
    solution, inverse = _solve(design, cells, sizes)
    count = len(sizes)
    covariance = np.array(
        [
            [inverse[i, i], inverse[i, count + i], inverse[count + i, count + i]]
            for i in range(count)
        ]
    )
    fit = replace(
        _without_decode(),
        sequences=sizes,
        base_s=solution[:count],
        slope_s=solution[count:],
        decode_covariance=covariance,
    )
    steps = StepLog.joined(logs)
    residual = steps.duration_s / decode_s(fit, steps) - 1
    return replace(fit, host_s=float(np.median(steps.host_s)), decode_noise=_spread(residual))


def _without_decode() -> StepFit:
    """What is known where no step decoded: nothing but that a step takes time."""
    return StepFit(
        sequences=np.array([1]),
        base_s=np.array([0.0]),
        slope_s=np.array([0.0]),
        decode_covariance=np.zeros((1, 3)),
        prefill=np.zeros(3),
        prefill_covariance=np.zeros((3, 3)),
        host_s=0.0,
        decode_noise=0.0,
        prefill_noise=0.0,
        prefill_cost=0.0,
    )


def _cells(logs: Sequence[StepLog]) -> _Cells:
    found: list[tuple[float, ...]] = []
    for log in logs:
        for size in np.unique(log.decodes):
            found += _cells_of(log.part(log.decodes == size), int(size))
    table = np.array(found, dtype=float).reshape(-1, 4)
    return _Cells(table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3])


def _cells_of(log: StepLog, size: int) -> list[tuple[float, ...]]:
    """(sequences, context, duration, relative error) of one run at one batch size."""
    middle = np.median(log.duration_s)
    log = log.part((log.duration_s < 4 * middle) & (log.duration_s > middle / 4))
    if len(log) < _FEWEST_STEPS:
        return []
    each = np.maximum(log.context_tokens / size, 1.0)
    bins = np.floor(np.log(each) * _CONTEXT_BINS_PER_E).astype(int)
    used = np.unique(bins)
    rows: list[tuple[float, ...]] = []
    for number in used:
        inside = bins == number
        steps = int(inside.sum())
        # However its contexts spread, one run at one batch size weighs the same.
        sd = _MODEL_ERROR * np.sqrt((1 + _ENOUGH_STEPS / len(log)) * len(log) / steps)
        context, duration = log.context_tokens[inside], log.duration_s[inside]
        rows.append((float(size), float(context.mean()), float(duration.mean()), float(sd)))
    return rows


def _solve(design: Floats, cells: _Cells, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Coefficients, bases before slopes, and their covariance; re-weighted until settled."""
    count = len(sizes)
    weight = 1.0 / (cells.sd * cells.duration_s)
    mean_s, context = float(cells.duration_s.mean()), max(float(cells.context.mean()), 1.0)
    scale = np.repeat([mean_s, mean_s / context], count)
    solution = np.repeat([mean_s, 0.1 * mean_s / context], count)
    robust = weight
    for _ in range(8):
        priors = _decode_priors(sizes, solution)
        stacked = np.vstack([design * robust[:, None], priors]) * scale
        target = np.append(cells.duration_s * robust, np.zeros(len(priors)))
        solution = lsq_linear(stacked, target, bounds=(0, np.inf)).x * scale
        fitted_s = design @ solution
        # Errors relative to what was measured would trust fast cells most, and fit too fast.
        weight = 1.0 / (cells.sd * np.maximum(fitted_s, cells.duration_s / 2))
        residual = (fitted_s - cells.duration_s) * weight
        robust = weight / (1 + (residual / 2) ** 2) ** 0.25
    inverse = np.linalg.pinv(stacked.T @ stacked, hermitian=True) * np.outer(scale, scale)
    return np.asarray(solution), np.asarray(inverse)


def _decode_priors(sizes: NDArray[np.int64], solution: Floats) -> Floats:
    """Rows whose product with the coefficients should be 0, within 1."""
    count = len(sizes)
    base, slope = float(solution[:count].mean()), max(float(solution[count:].mean()), 1e-12)
    ratio = np.zeros(2 * count)
    ratio[0], ratio[count] = -_SLOPE_A_BASE, 1
    least = max(float(solution[0]), 0.1 * base)
    rows = [ratio / (_SLOPE_A_BASE_SD * _SLOPE_A_BASE * least)]
    for i in range(1, count - 1):
        before, here, after = sizes[i - 1 : i + 2].astype(float)
        share = (here - before) / (after - before)
        row = np.zeros(2 * count)
        row[i - 1 : i + 2] = (share - 1, 1, -share)
        rows.append(row / (_BASE_JUMP * base))
    for i in range(1, count):
        row = np.zeros(2 * count)
        row[count + i] = 1
        row[count + i - 1] = -((sizes[i] / sizes[i - 1]) ** _SLOPE_POWER)
        rows.append(row / (_SLOPE_STEP * slope))
    return np.array(rows).reshape(-1, 2 * count)


# --------------------------------------------------------------------------------------
# Prefill


def _fit_prefill(fit: StepFit, logs: Sequence[StepLog]) -> StepFit:
    logs = [log for log in logs if len(log)]
    single_s = float(fit.base_s[0])
    if not logs and not single_s:
        return fit
    if logs and not single_s:  # nothing decoded: a step's time is all that is known
        steps = StepLog.joined(logs)
        single_s = float(np.min(steps.duration_s / steps.steps)) / _BASES_A_PREFILL
        fit = replace(fit, base_s=np.array([single_s]))
    expected = single_s * np.array([_BASES_A_PREFILL, 1 / _TOKENS_A_BASE, 0.0])
    expected[2] = expected[1] * _PAIRS_A_TOKEN
    if not logs:
        return replace(fit, prefill=expected, prefill_noise=fit.decode_noise)
    steps = StepLog.joined(logs)
    weight = np.concatenate(
        [np.full(len(log), min(1.0, np.sqrt(_PREFILL_ROWS / len(log)))) for log in logs]
    )

    terms, covariance, cost = _solve_prefill(fit, steps, weight, expected)
    fit = replace(fit, prefill=terms, prefill_covariance=covariance, prefill_cost=cost)
    return replace(fit, prefill_noise=_spread(steps.duration_s / fit.predict(steps) - 1))


def _solve_prefill(
    fit: StepFit, steps: StepLog, weight: Floats, expected: Floats
) -> tuple[Floats, Floats, float]:
    """The three terms, their covariance and the robust cost; re-weighted until settled.

    A step takes the larger of two bases, which is linear once it is known which is larger.
    """
    columns = np.column_stack([steps.steps, steps.prefill_tokens, steps.prefill_pairs])
    decode = decode_s(fit, steps)
    base = np.where(steps.decodes > 0, trend(fit.sequences, fit.base_s, steps.decodes), 0.0)
    # Errors are relative to what was fitted: relative to what was measured, they would trust fast
    # steps most, and one far shorter than its tokens take is a mistake.
    usual_s = steps.prefill_tokens * np.median(steps.duration_s / steps.prefill_tokens)
    scale = weight / (_PREFILL_ERROR * np.maximum(steps.duration_s, usual_s / 2))
    relative, robust = np.ones(3), scale
    for _ in range(20):
        own_base = relative[0] * expected[0] * steps.steps > base
        design = columns * np.column_stack([own_base, np.ones((len(base), 2))])
        target = steps.duration_s - decode + np.where(own_base, base, 0.0)
        stacked = np.vstack([design * expected * robust[:, None], _prefill_priors(relative)])
        wanted = np.append(target * robust, [1 / _PRIOR_SD, 1 / _PRIOR_SD, 0.0])
        relative = lsq_linear(stacked, wanted, bounds=(0, np.inf)).x
        excess_s = design @ (relative * expected) - target
        fitted_s = np.maximum(steps.duration_s + excess_s, usual_s / 2)
        scale = weight / (_PREFILL_ERROR * fitted_s)
        errors = excess_s * scale
        robust = scale / (1 + errors**2) ** 0.25
    cost = np.sum(_soft(errors) ** 2) + np.sum((stacked[-3:] @ relative - wanted[-3:]) ** 2)
    inverse = np.linalg.pinv(stacked.T @ stacked, hermitian=True)
    return relative * expected, inverse * np.outer(expected, expected), float(cost)


def _prefill_priors(relative: Floats) -> Floats:
    """Base and token term are as expected, and the pair term in proportion to the token term."""
    token = max(float(relative[1]), 0.01)
    rows = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0 / token, 1.0 / token]])
    return rows / _PRIOR_SD


def _prefill_s(prefill: Floats, fit: StepFit, log: StepLog) -> Floats:
    """What prefill adds to each entry: its tokens and pairs, and its base where that is larger
    than the decodes'."""
    base_s, token_s, pair_s = prefill
    decode_base = np.where(log.decodes > 0, trend(fit.sequences, fit.base_s, log.decodes), 0.0)
    more = np.maximum(base_s * log.steps - decode_base, 0.0)
    prefills = log.prefill_tokens > 0
    terms = more + token_s * log.prefill_tokens + pair_s * log.prefill_pairs
    return np.asarray(np.where(prefills, terms, 0.0))


def _soft(errors: Floats) -> Floats:
    """Errors whose squares grow like the "soft L1" loss: outliers pull with constant force."""
    return np.asarray(np.sqrt(2 * (np.sqrt(1 + errors**2) - 1)))


def _spread(relative: Floats) -> float:
    """Standard deviation of a normal distribution with the same quartiles."""
    low, high = np.quantile(relative, [0.25, 0.75])
    return float(high - low) / 1.349
