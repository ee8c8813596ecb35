"""Least time to work off the queued tokens, plus a penalty for a full KV cache."""

from itertools import islice

from policies.interface import (
    ClusterView,
    Dispatch,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)

KV_WEIGHT_S = 0.15
FULLEST = 0.999


class TokenLoad(Policy):
    """Take the shortest queue in seconds of prefill, plus 0.15 k / (1 - k) for KV usage k (smg).

    `least_load` of the SGLang model gateway: queued tokens, with those dispatched since the last
    poll, divided by the replica's throughput; KV usage counts up to 0.999. Queue and KV are
    gauges, as old as the last scrape.

    No gauge tells queued tokens: as many of the newest prompts in flight count as the engine
    reported waiting. The throughput is the prefill rate of the replica's step costs, and
    `tokens_per_s` where these are unknown.
    """

    def __init__(self, *, tokens_per_s: float = 1000.0) -> None:
        if not (isinstance(tokens_per_s, (int, float)) and tokens_per_s > 0):
            raise ValueError(f"tokens_per_s is {tokens_per_s!r}: give a number above 0")
        self._tokens_per_s = tokens_per_s

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The smallest load; ties go to fewer outstanding tokens, then the smaller id."""
        best = min(
            view.ready(request.model),
            key=lambda replica: (self._load_s(replica, view), replica.outstanding_tokens),
            default=None,
        )
        return Dispatch(request.id, best.id) if best else Hold()

    def _load_s(self, replica: ReplicaView, view: ClusterView) -> float:
        usage = min(replica.kv_usage, FULLEST)
        token_s = replica.step_costs.prefill_per_token_s or 1 / self._tokens_per_s
        return queued_tokens(replica, view) * token_s + KV_WEIGHT_S * usage / (1 - usage)


def queued_tokens(replica: ReplicaView, view: ClusterView) -> int:
    """Prompt tokens that wait in the engine, as far as a scheduler can tell.

    Those dispatched since the gauges were sampled, and of those before as many prompts as were
    waiting then: the newest, as engines serve in order of arrival.
    """
    unscraped_tokens = replica.unscraped_tokens
    if not replica.waiting:
        return unscraped_tokens
    newest_first = reversed([request.prompt_tokens for request in view.inflight(replica.id)])
    seen_tokens = 0
    while seen_tokens < unscraped_tokens:
        seen_tokens += next(newest_first)
    return unscraped_tokens + sum(islice(newest_first, replica.waiting))
