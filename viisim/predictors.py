"""Length predictors that know the truth, for simulation: a perfect one, and one as good as told."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

from policies.interface import RequestView

_NORMAL = NormalDist()


class Oracle:
    """Predicts the true length."""

    def predict(self, request: RequestView, output_tokens: int | None = None) -> RequestView:
        """See `policies.predictor.LengthPredictor.predict`."""
        return replace(request, predicted_output_tokens=output_tokens)

    def observe(self, request: RequestView, output_tokens: int) -> None:
        """Nothing is left to learn."""


class Noisy:
    """Predicts lengths of the right distribution with a stated rank correlation to the truth.

    Truth and guess are joined by a Gaussian copula (Kruskal 1958: Pearson's correlation of the
    normal scores is 2 sin(pi rho / 6) for Spearman's rho). A guess depends on the seed and the
    request's id alone, so policies under comparison get the same guesses.
    """

    def __init__(self, rank_correlation: float, lengths: Sequence[int], seed: int) -> None:
        """`lengths` are answers of the same workload, of which there must be one at least."""
        self._gaussian = 2 * math.sin(math.pi * rank_correlation / 6)
        self._own = math.sqrt(max(0.0, 1 - self._gaussian**2))
        self._lengths = sorted(lengths)
        self._seed = seed

    def predict(self, request: RequestView, output_tokens: int | None = None) -> RequestView:
        """See `policies.predictor.LengthPredictor.predict`."""
        assert output_tokens is not None, "a simulation knows the truth"
        noise = _NORMAL.inv_cdf(self._uniform(request.id, "noise"))
        score = self._gaussian * self._score(request.id, output_tokens) + self._own * noise
        position = _NORMAL.cdf(score) * len(self._lengths)
        guess = self._lengths[min(int(position), len(self._lengths) - 1)]
        return replace(request, predicted_output_tokens=guess)

    def observe(self, request: RequestView, output_tokens: int) -> None:
        """What is known does not change."""

    def _score(self, request_id: str, output_tokens: int) -> float:
        """The normal score of a length; equal lengths share their range of ranks evenly."""
        low = bisect_left(self._lengths, output_tokens)
        high = max(bisect_right(self._lengths, output_tokens), low + 1)
        rank = low + (high - low) * self._uniform(request_id, "rank")
        return _NORMAL.inv_cdf(min(max(rank / len(self._lengths), 1e-6), 1 - 1e-6))

    def _uniform(self, request_id: str, what: str) -> float:
        return (zlib.crc32(f"{self._seed}:{what}:{request_id}".encode()) + 0.5) / 2**32
