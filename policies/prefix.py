"""What a policy believes each replica's prefix cache holds.

Truth and belief are different objects: the engine knows its blocks, a router only what it sent
where. The gap between them is part of what an experiment measures, so nothing here looks into
an engine.

Block ids are chained: an id stands for its block and all before it. So a set of ids per replica
is a prefix tree already, and the longest known prefix is the longest leading run of known ids.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from policies.interface import Event, ReplicaChanged, ReplicaView, RequestView

UNKNOWN_CAPACITY_BLOCKS = 100_000
"""Ids kept of a replica whose KV capacity nobody stated."""


class PrefixIndex:
    """The prefix blocks that each replica is believed to hold, as many as its KV cache can.

    The least recently used are forgotten first, and of one prompt the last block first, as in
    vLLM: whatever block is known, all before it are. Outputs and evictions that the router does
    not see make the belief too optimistic.
    """

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[int, None]] = {}
        """Per replica its ids, least recently used first."""

    def matched(self, replica_id: str, blocks: Sequence[int]) -> int:
        """How many leading blocks the replica is believed to hold.

        Known blocks precede unknown ones, so a binary search finds where they end.
        """
        held = self._held.get(replica_id)
        if not held or not blocks or blocks[0] not in held:
            return 0
        return bisect_left(blocks, True, key=lambda block: block not in held)

    def matched_tokens(self, replica_id: str, request: RequestView) -> int:
        """Prompt tokens that the replica is believed to hold.

        Blocks may be counted in bytes (the proxy does) or cover a part of the prompt only. The
        smaller of the two readings is right in either case.
        """
        matched = self.matched(replica_id, request.prefix_blocks)
        if not matched:
            return 0
        in_proportion = request.prompt_tokens * matched // len(request.prefix_blocks)
        return min(in_proportion, matched * request.prefix_block_tokens)

    def best(
        self, replicas: Iterable[ReplicaView], blocks: Sequence[int]
    ) -> tuple[ReplicaView | None, int]:
        """The replica with the longest match and how many blocks; None without any match.

        Ties go to fewer outstanding tokens, then to the first in order.
        """
        best, longest = None, 0
        for replica in replicas:
            matched = self.matched(replica.id, blocks)
            if matched > longest or (
                best is not None
                and matched == longest
                and replica.outstanding_tokens < best.outstanding_tokens
            ):
                best, longest = replica, matched
        return best, longest

    def insert(
        self, replica_id: str, blocks: Sequence[int], capacity_blocks: int = UNKNOWN_CAPACITY_BLOCKS
    ) -> None:
        """The replica was sent a prompt of these blocks; forget what it has no room for."""
        if not blocks:
            return
        held = self._held.setdefault(replica_id, OrderedDict())
        for block in reversed(blocks[:capacity_blocks]):
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity_blocks:
            held.popitem(last=False)

    def dispatched(self, request: RequestView, replica: ReplicaView) -> None:
        """Believe that the replica holds the request's prompt from now on."""
        self.insert(replica.id, request.prefix_blocks, _capacity_blocks(request, replica))

    def forget(self, replica_id: str) -> None:
        """Nothing of the replica's cache is left."""
        self._held.pop(replica_id, None)

    def observe(self, event: Event) -> None:
        """For `Policy.observe`: forget a replica that is gone, or starts anew."""
        if isinstance(event, ReplicaChanged) and event.state in ("gone", "starting"):
            self.forget(event.replica_id)


def _capacity_blocks(request: RequestView, replica: ReplicaView) -> int:
    """How many of the request's prefix blocks fit the replica's whole KV cache."""
    if not (replica.kv_blocks and request.prefix_block_tokens):
        return UNKNOWN_CAPACITY_BLOCKS
    return max(1, replica.kv_blocks * replica.block_tokens // request.prefix_block_tokens)
