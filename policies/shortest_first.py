"""Shortest expected work first, with aging."""

from typing import Any

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict
from policies.slots import checked_max_inflight, lightest, with_slot

TYPICAL_TOKENS = 1000
"""A request of so many expected tokens yields for half of `aging_s`."""


class ShortestFirst(Policy):
    """Hold requests while replicas are full; the least expected work goes first, up to an age.

    Shortest job first minimises the mean wait on one server (Smith 1956); on guessed lengths it
    is what Fu et al., "Efficient LLM Scheduling by Learning to Rank" (NeurIPS 2024) do. Work is
    `expected_tokens`: prompt plus predicted output, or plus the output limit without a length
    predictor, so that prompts alone decide where limits are equal.

    A request counts as if it had arrived later by a share of `aging_s` that rises with its work
    w: w / (w + 1000 tokens). So none is overtaken by one that arrives `aging_s` after it, and
    long ones never starve. It goes to the replica with the fewest outstanding tokens of those
    with a free slot; `max_inflight` as in `policies.slots.with_slot`.
    """

    def __init__(self, *, aging_s: float = 60.0, max_inflight: int | None = None) -> None:
        if not (isinstance(aging_s, (int, float)) and aging_s > 0):
            raise ValueError(f"aging_s is {aging_s!r}: give a number of seconds above 0")
        self._aging_s = aging_s
        self._max_inflight = checked_max_inflight(max_inflight)

    def rank(self, request: RequestView) -> Any:
        """Arrival, put off by the work."""
        work_tokens = request.expected_tokens
        return request.arrived_s + self._aging_s * work_tokens / (work_tokens + TYPICAL_TOKENS)

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The lightest replica with a free slot."""
        free = with_slot(request, view.ready(request.model), self._max_inflight)
        return Dispatch(request.id, lightest(free).id) if free else Hold()
