"""Most room in the KV cache, judged by stale gauges and the scheduler's own dispatches."""

from collections.abc import Sequence
from math import ceil, isinf

from policies.interface import (
    ClusterView,
    Dispatch,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)


class LeastKv(Policy):
    """Send each request to the ready replica with the smallest estimated share of KV in use.

    The estimate is what the last gauges showed plus the blocks of every prompt dispatched since
    they were sampled. It reads `kv_usage`, which is as old as `age_s`.

    `hold_above`: hold a request centrally while on every ready replica its prompt would raise
    the estimated share above this (0 to 1), so that engines need not preempt. A replica with
    nothing in flight takes any prompt: it will never have more room. None: never hold.
    """

    def __init__(self, *, hold_above: float | None = None) -> None:
        if hold_above is not None and not (
            isinstance(hold_above, (int, float)) and 0 < hold_above <= 1
        ):
            raise ValueError(f"hold_above is {hold_above!r}: give a share above 0, up to 1")
        self.hold_above = hold_above

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The roomiest ready replica; ties go to fewer outstanding tokens, then the smaller id.

        While any ready replica has an unknown number of KV blocks, shares cannot be compared
        and outstanding tokens alone decide.
        """
        ready = view.ready(request.model)
        if not all(replica.kv_blocks for replica in ready):
            best = min(ready, key=lambda replica: replica.outstanding_tokens)
            return Dispatch(request.id, best.id)
        candidates = self._with_room(request, ready)
        if not candidates:
            return Hold()
        best = min(candidates, key=lambda replica: (kv_share(replica), replica.outstanding_tokens))
        return Dispatch(request.id, best.id)

    def _with_room(
        self, request: RequestView, ready: Sequence[ReplicaView]
    ) -> Sequence[ReplicaView]:
        limit = self.hold_above
        if limit is None:
            return ready
        return [
            replica
            for replica in ready
            if not replica.inflight_requests or kv_share(replica, request.prompt_tokens) <= limit
        ]


def kv_share(replica: ReplicaView, prompt_tokens: int = 0) -> float:
    """Estimated share of the KV blocks in use, were `prompt_tokens` more dispatched now.

    Before the first gauges it counts outstanding tokens as if all of them were cached already.
    """
    if isinf(replica.age_s):
        used_blocks, unseen_tokens = 0.0, replica.outstanding_tokens
    else:
        used_blocks = replica.kv_usage * replica.kv_blocks
        unseen_tokens = replica.unscraped_tokens
    unseen_blocks = ceil((unseen_tokens + prompt_tokens) / replica.block_tokens)
    return (used_blocks + unseen_blocks) / replica.kv_blocks
