"""Most free KV blocks per request, as in Llumnix."""

from math import ceil

from policies.interface import (
    ClusterView,
    Dispatch,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)
from policies.slots import lightest
from policies.token_load import queued_tokens


class Freeness(Policy):
    """Take the highest freeness: (free - waiting KV blocks) / requests on the replica (Llumnix).

    B. Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI 2024:
    how many blocks each request there can still grow by. What waits demands its blocks already,
    so freeness falls below zero where a queue cannot be admitted. Migration of running requests,
    the paper's other half, needs engines that can do it.

    Free blocks are the gauge's, as old as the last scrape; waiting are the prompts that were
    waiting then and all dispatched since (`policies.token_load.queued_tokens`). The number of
    requests is the scheduler's own count, which is exact. Where a replica's blocks are unknown,
    the fewest outstanding tokens decide.
    """

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties go to fewer outstanding tokens, then the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        if not all(replica.kv_blocks for replica in ready):
            return Dispatch(request.id, lightest(ready).id)
        best = min(ready, key=lambda r: (-_freeness(r, view), r.outstanding_tokens))
        return Dispatch(request.id, best.id)


def _freeness(replica: ReplicaView, view: ClusterView) -> float:
    free_blocks = replica.kv_blocks * (1 - replica.kv_usage)
    waiting_blocks = ceil(queued_tokens(replica, view) / replica.block_tokens)
    return (free_blocks - waiting_blocks) / max(replica.inflight_requests, 1)
