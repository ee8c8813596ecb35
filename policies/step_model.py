"""How long an engine step takes, from the figures that a policy sees (`StepCosts`).

The same arithmetic as `viisim.engine.step_time`, in floats and without its rounding to
picoseconds; a test holds the two together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from policies.interface import StepCosts


class StepModel:
    """Step times of one replica, in seconds. `costs` must name at least one batch size."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._decode: list[tuple[float, float]] = []
        """Base and slope by batch size, as far as anybody has asked."""

    def step_s(
        self, decodes: int, context_tokens: float, prefill_tokens: float = 0.0, pairs: float = 0.0
    ) -> float:
        """Duration of one step; with prefills it starts from the larger of the two bases.

        `pairs` are the (token, attended token) pairs of the prefills, see `pairs_of`.
        """
        costs = self.costs
        base_s, slope_s = self.decode_terms(decodes)
        if prefill_tokens:
            base_s = max(base_s, costs.prefill_base_s)
        return (
            base_s
            + slope_s * context_tokens
            + costs.prefill_per_token_s * prefill_tokens
            + costs.prefill_per_pair_s * pairs
            + costs.host_overhead_s
        )

    def prefill_s(
        self, tokens: float, computed_tokens: float, decodes: int = 0, context_tokens: float = 0.0
    ) -> float:
        """Time to compute a prompt's last `tokens` tokens behind `computed_tokens` of it, while
        `decodes` sequences go on in the same steps."""
        costs = self.costs
        base_s, slope_s = self.decode_terms(decodes)
        step_s = max(base_s, costs.prefill_base_s) + slope_s * context_tokens
        return (
            self.prefill_steps(tokens, decodes) * (step_s + costs.host_overhead_s)
            + costs.prefill_per_token_s * tokens
            + costs.prefill_per_pair_s * pairs_of(tokens, computed_tokens)
        )

    def prefill_steps(self, tokens: float, decodes: int) -> float:
        """How many steps the tokens fill: one at least, and not rounded up, since the last one
        leaves room for the next prompt."""
        room_tokens = self.costs.max_batched_tokens - decodes
        return max(1.0, tokens / room_tokens) if room_tokens > 0 else 1.0

    def decode_terms(self, decodes: int) -> tuple[float, float]:
        """Base and slope per context token of a batch of `decodes`; of none, prefill's base."""
        known = self._decode
        if not known:
            known.append((self.costs.prefill_base_s, 0.0))
        while len(known) <= decodes:
            known.append(self._interpolated(len(known)))
        return known[decodes]

    def _interpolated(self, n: int) -> tuple[float, float]:
        """Linear between the measured sizes; beyond them the base goes on along the last two
        points, not below the lower of them, and the slope stays."""
        sizes = self.costs.decode_sequences
        high = min(max(bisect_left(sizes, n), 1), len(sizes) - 1)
        low = max(high - 1, 0)
        inside = min(max(n, sizes[low]), sizes[high])
        bases, slopes = self.costs.decode_base_s, self.costs.decode_per_context_token_s
        base_s = _along(n, sizes, bases, low, high)
        if n != inside:
            base_s = max(base_s, min(bases[low], bases[high]))
        return base_s, _along(inside, sizes, slopes, low, high)


def pairs_of(tokens: float, computed_tokens: float) -> float:
    """(token, attended token) pairs of a prefill of `tokens` tokens behind `computed_tokens`."""
    return tokens * computed_tokens + tokens * (tokens + 1) / 2


def _along(n: int, sizes: Sequence[int], values: Sequence[float], low: int, high: int) -> float:
    if low == high:
        return values[low]
    share = (n - sizes[low]) / (sizes[high] - sizes[low])
    return values[low] + (values[high] - values[low]) * share
