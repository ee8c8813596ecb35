"""How long an engine step takes, in integer picoseconds.

For a fixed batch composition a step is affine in the total context, to first order; base and
slope are looked up by decode batch size, because real kernels jump (FACTS section 3). All
coefficients are rounded to whole picoseconds once, here, so that the sum over many steps in
closed form equals stepping one by one, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PS_PER_S = 10**12
PS_PER_NS = 1000


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Measured decode step at one batch size: `base_s + per_context_token_s * context`."""

    sequences: int
    base_s: float
    per_context_token_s: float


@dataclass(frozen=True, slots=True)
class CalibratedRange:
    """Where the coefficients were measured; steps outside are counted as extrapolation."""

    max_decode_sequences: int
    max_context_tokens: int
    """Largest total context of a decode batch."""
    max_prefill_tokens: int
    """Most prefill tokens in one step."""


class StepTime:
    """Step times of one (device, model, engine build).

    Between the given batch sizes base and slope are interpolated linearly; beyond the last one
    the base goes on along the last two points and the slope stays.
    """

    def __init__(
        self,
        decode: Sequence[DecodePoint],
        max_num_seqs: int,
        prefill_base_s: float,
        prefill_per_token_s: float,
        prefill_per_pair_s: float = 0.0,
        host_overhead_s: float = 0.0,
        calibrated: CalibratedRange | None = None,
        slowdown: float = 1.0,
    ) -> None:
        """`slowdown`: how many times longer than measured every step takes, as on a card that
        throttles."""
        points = {point.sequences: point for point in decode}
        host_ps = _to_ps(host_overhead_s * slowdown)
        bases = [prefill_base_s, *(_base_s(points, n) for n in range(1, max_num_seqs + 1))]
        slopes = [0.0, *(_slope_s(points, n) for n in range(1, max_num_seqs + 1))]
        self.base_ps = [_to_ps(base * slowdown) + host_ps for base in bases]
        """By number of decoding sequences; index 0: a step of prefill only."""
        self.slope_ps = [_to_ps(slope * slowdown) for slope in slopes]
        """Per context token, by number of decoding sequences."""
        self.prefill_token_ps = _to_ps(prefill_per_token_s * slowdown)
        self.prefill_pair_ps = _to_ps(prefill_per_pair_s * slowdown)
        self.calibrated = calibrated

    def step_ps(self, decodes: int, context_tokens: int, prefill_tokens: int, pairs: int) -> int:
        """Duration of one step; with prefills it starts from the larger of the two bases.

        `pairs` are the (token, attended token) pairs of the prefills: for a chunk of n tokens
        behind c others, n * c + n * (n + 1) / 2.
        """
        base_ps = self.base_ps[decodes]
        if prefill_tokens and base_ps < self.base_ps[0]:
            base_ps = self.base_ps[0]
        return (
            base_ps
            + self.slope_ps[decodes] * context_tokens
            + self.prefill_token_ps * prefill_tokens
            + self.prefill_pair_ps * pairs
        )

    def extrapolated_steps(
        self,
        decodes: NDArray[np.int64],
        context_tokens: NDArray[np.int64],
        prefill_tokens: NDArray[np.int64],
        steps: NDArray[np.int64],
    ) -> int:
        """How many of these steps lie outside the calibrated range. Row i stands for `steps[i]`
        steps whose context grows by one token per decoding sequence each."""
        known = self.calibrated
        if known is None:
            return 0
        room = known.max_context_tokens - context_tokens
        inside = np.clip(room // np.maximum(decodes, 1) + 1, 0, steps)
        inside[decodes == 0] = steps[decodes == 0]
        too_many = decodes > known.max_decode_sequences
        inside[too_many | (prefill_tokens > known.max_prefill_tokens)] = 0
        return int((steps - inside).sum())


def _to_ps(seconds: float) -> int:
    return round(seconds * PS_PER_S)


def _neighbours(points: Mapping[int, DecodePoint], n: int) -> tuple[DecodePoint, DecodePoint]:
    """The points to interpolate between; the last two (or the first two) when n is outside."""
    sizes = sorted(points)
    above = next((i for i, size in enumerate(sizes) if size >= n), len(sizes) - 1)
    above = max(above, min(1, len(sizes) - 1))
    return points[sizes[max(above - 1, 0)]], points[sizes[above]]


def _along(n: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    if low[0] == high[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * (n - low[0]) / (high[0] - low[0])


def _base_s(points: Mapping[int, DecodePoint], n: int) -> float:
    low, high = _neighbours(points, n)
    base = _along(n, (low.sequences, low.base_s), (high.sequences, high.base_s))
    # A falling pair of points must not lead to a negative base beyond them.
    return base if low.sequences <= n <= high.sequences else max(base, min(low.base_s, high.base_s))


def _slope_s(points: Mapping[int, DecodePoint], n: int) -> float:
    low, high = _neighbours(points, n)
    n = min(max(n, low.sequences), high.sequences)
    low_point = (low.sequences, low.per_context_token_s)
    return _along(n, low_point, (high.sequences, high.per_context_token_s))
