"""Consistent hashing of the prompt's beginning, with bounded loads."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import unpack

from policies.interface import (
    ClusterView,
    Dispatch,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)

VIRTUAL_NODES = 160
"""Points of each replica on the ring."""
_POINTS_PER_DIGEST = 8


class PrefixHash(Policy):
    """Hash the prompt's beginning onto a ring of replicas; leave an overloaded one (smg).

    The rule of smg, SGLang's model gateway: consistent hashing, so that losing a replica moves
    only its own share of the prefixes, with bounded loads (Mirrokni, Thorup and Zadimoghaddam
    2018). No state is kept. Load is requests in flight.

    `prefix_tokens`: prompts that agree in so many first tokens, in whole blocks, go together.
    `load_factor`: with more than this many times the mean load, this request counted in the
    mean, the replica is passed over for the least loaded one. A prompt without block ids goes
    to the least loaded one at once.
    """

    def __init__(self, *, prefix_tokens: int = 256, load_factor: float = 1.25) -> None:
        if not (isinstance(prefix_tokens, int) and prefix_tokens > 0):
            raise ValueError(f"prefix_tokens is {prefix_tokens!r}: give a whole number above 0")
        if not (isinstance(load_factor, (int, float)) and load_factor >= 1):
            raise ValueError(f"load_factor is {load_factor!r}: give a factor of 1 or more")
        self.prefix_tokens = prefix_tokens
        self.load_factor = load_factor

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties of the least loaded go to fewer outstanding tokens, then to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        chosen = self._on_ring(request, ready)
        if chosen is None or self._is_overloaded(chosen, ready):
            chosen = min(ready, key=lambda r: (r.inflight_requests, r.outstanding_tokens))
        return Dispatch(request.id, chosen.id)

    def _on_ring(self, request: RequestView, ready: Sequence[ReplicaView]) -> ReplicaView | None:
        blocks = request.prefix_blocks
        if not blocks:
            return None
        covering = -(-self.prefix_tokens // max(request.prefix_block_tokens, 1))
        # Ids are chained: the last block's stands for all before it.
        last = blocks[min(covering, len(blocks)) - 1]
        points, owners = _ring(tuple(replica.id for replica in ready))
        return ready[owners[bisect_left(points, _points(f"block {last}")[0]) % len(points)]]

    def _is_overloaded(self, replica: ReplicaView, ready: Sequence[ReplicaView]) -> bool:
        total = sum(other.inflight_requests for other in ready)
        return replica.inflight_requests > self.load_factor * (total + 1) / len(ready)


@lru_cache(maxsize=64)
def _ring(replica_ids: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The points of all replicas in order, and whose each is, by position among the ids."""
    ring = sorted(
        (point, owner)
        for owner, replica_id in enumerate(replica_ids)
        for digest in range(VIRTUAL_NODES // _POINTS_PER_DIGEST)
        for point in _points(f"replica {replica_id} {digest}")
    )
    return [point for point, _ in ring], [owner for _, owner in ring]


def _points(name: str) -> tuple[int, ...]:
    """Where a name falls on the ring: the same in every process, unlike `hash`."""
    return unpack(f"<{_POINTS_PER_DIGEST}Q", blake2b(name.encode()).digest())
