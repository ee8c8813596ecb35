"""Length predictors: what a scheduler may guess of an answer before it is given.

A predictor fills `RequestView.predicted_output_tokens` before the request reaches the core, in
either driver; policies read `expected_tokens` and need not know which one it was. Those that
need the truth, and so exist in simulation only, are in `viisim.predictors`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from policies.interface import RequestView


class LengthPredictor(Protocol):
    """Guesses how long an answer will be."""

    def predict(self, request: RequestView, output_tokens: int | None = None) -> RequestView:
        """The request with the guess filled in. `output_tokens` is the truth, which only a
        simulation knows."""

    def observe(self, request: RequestView, output_tokens: int) -> None:
        """An answer of so many tokens was given."""


class History:
    """The mean of the answers so far, among requests of the same tenant and traffic class.

    Without any, the request stays without a guess.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], tuple[int, int]] = {}

    def predict(self, request: RequestView, output_tokens: int | None = None) -> RequestView:
        """See `LengthPredictor.predict`."""
        count, tokens = self._seen.get(_kind(request), (0, 0))
        if not count:
            return request
        guess = min(max(round(tokens / count), 1), request.max_output_tokens)
        return replace(request, predicted_output_tokens=guess)

    def observe(self, request: RequestView, output_tokens: int) -> None:
        """See `LengthPredictor.observe`."""
        count, tokens = self._seen.get(_kind(request), (0, 0))
        self._seen[_kind(request)] = (count + 1, tokens + output_tokens)


def _kind(request: RequestView) -> tuple[str, str, str]:
    return request.model, request.tenant, request.traffic_class
