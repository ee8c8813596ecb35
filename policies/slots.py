"""How much a replica may have in flight before requests wait centrally.

Order in the central queue matters only while there is one: a policy that sorts requests sends no
more than the engines can run at once and holds the rest, whose turn can still change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.interface import ReplicaView, RequestView


def with_slot(
    request: RequestView, ready: Sequence[ReplicaView], max_inflight: int | None
) -> list[ReplicaView]:
    """Those that can take the request now.

    With `max_inflight`, that many requests a replica, whatever their length. None: as many as it
    has seats and as its KV cache holds to their expected end (the output limit, without
    a length predictor); of a replica that states neither, any number. A replica with nothing in
    flight takes anything.
    """
    return [replica for replica in ready if _has_slot(request, replica, max_inflight)]


def lightest(replicas: Sequence[ReplicaView]) -> ReplicaView:
    """Fewest outstanding tokens; ties go to the smaller id."""
    return min(replicas, key=lambda replica: replica.outstanding_tokens)


def checked_max_inflight(value: Any) -> int | None:
    """The parameter as given. Raises ValueError unless it is None or a count from 1 up."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(
        f"max_inflight is {value!r}: give a whole number of requests a replica from 1 up, or "
        "leave it out for as many as seats and KV allow"
    )


def _has_slot(request: RequestView, replica: ReplicaView, max_inflight: int | None) -> bool:
    inflight = replica.inflight_requests
    if not inflight:
        return True
    if max_inflight is not None:
        return inflight < max_inflight
    if 0 < replica.max_num_seqs <= inflight:
        return False
    kv_tokens = replica.kv_blocks * replica.block_tokens
    return not kv_tokens or replica.outstanding_tokens + request.expected_tokens <= kv_tokens
