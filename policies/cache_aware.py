"""Prefix affinity while the load is even, as in SGLang's gateway."""

from collections.abc import Sequence

from policies.interface import (
    ClusterView,
    Dispatch,
    Event,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)
from policies.prefix import PrefixIndex


class CacheAware(Policy):
    """Follow the longest believed prefix, unless it is short or the load uneven (SGLang).

    The rule of the gateway of SGLang and of vllm-router. Load is requests in flight.

    `balance_abs_threshold`, `balance_rel_threshold`: the load is uneven when the heaviest
    replica has more than so many requests more than the lightest, and more than so many times
    as many. Then the lightest is taken. The defaults are SGLang's; small clusters never reach
    a difference of 64 requests, and can collapse onto the replica that knows the prefix.
    `cache_threshold`: a match counts when it covers more than this share of the prompt's blocks
    (0 to 1); otherwise the lightest is taken too.
    """

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: float = 64,
        balance_rel_threshold: float = 1.5,
    ) -> None:
        if not (isinstance(cache_threshold, (int, float)) and 0 <= cache_threshold <= 1):
            raise ValueError(f"cache_threshold is {cache_threshold!r}: give a share from 0 to 1")
        if not (isinstance(balance_abs_threshold, (int, float)) and balance_abs_threshold >= 0):
            raise ValueError(
                f"balance_abs_threshold is {balance_abs_threshold!r}: give a number of requests, "
                "0 or more"
            )
        if not (isinstance(balance_rel_threshold, (int, float)) and balance_rel_threshold >= 1):
            raise ValueError(
                f"balance_rel_threshold is {balance_rel_threshold!r}: give a ratio of 1 or more"
            )
        self.cache_threshold = cache_threshold
        self.balance_abs_threshold = balance_abs_threshold
        self.balance_rel_threshold = balance_rel_threshold
        self._index = PrefixIndex()

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties go to fewer outstanding tokens, then to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        chosen = self._choose(request, ready)
        self._index.dispatched(request, chosen)
        return Dispatch(request.id, chosen.id)

    def _choose(self, request: RequestView, ready: Sequence[ReplicaView]) -> ReplicaView:
        lightest = min(ready, key=_load)
        if not self._is_uneven(ready, lightest):
            known, matched = self._index.best(ready, request.prefix_blocks)
            if known is not None and matched > self.cache_threshold * len(request.prefix_blocks):
                return known
        return lightest

    def _is_uneven(self, ready: Sequence[ReplicaView], lightest: ReplicaView) -> bool:
        least = lightest.inflight_requests
        most = max(replica.inflight_requests for replica in ready)
        return (
            most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least
        )

    def observe(self, event: Event, view: ClusterView) -> None:
        """A replica that is gone has lost its cache."""
        self._index.observe(event)


def _load(replica: ReplicaView) -> tuple[int, int]:
    return replica.inflight_requests, replica.outstanding_tokens
