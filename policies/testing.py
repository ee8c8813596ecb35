"""Requests and clusters for three-line tests of policies.

>>> from policies.least_loaded import LeastLoaded
>>> LeastLoaded().place(request(), cluster(r0=300, r1=100)).replica_id
'r1'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.interface import ReplicaChanged, RequestView
from policies.state import IN_FLIGHT, Cluster, Entry, Replica

_REQUEST = RequestView(id="q", model="m", arrived_s=0.0, prompt_tokens=100, max_output_tokens=50)
_IDENTITY = ("state", "model", "devices", "max_num_seqs", "kv_blocks", "block_tokens", "step_costs")


def request(**overrides: Any) -> RequestView:
    """A request `q` for model `m`, with the given fields of `RequestView` replaced."""
    fields = {name: getattr(_REQUEST, name) for name in RequestView.__dataclass_fields__}
    return RequestView(**(fields | overrides))


def cluster(now_s: float = 0.0, **replicas: int | Mapping[str, Any]) -> Cluster:
    """A `ClusterView` of ready replicas of model `m`: `cluster(r0=300, r1=100)`.

    A replica is its outstanding tokens, or a mapping of the fields of `ReplicaView` that
    matter. `unscraped_tokens` becomes one request in flight with a prompt of that length.
    """
    view = Cluster()
    view.now_s = now_s
    for replica_id, given in replicas.items():
        fields = dict(given) if isinstance(given, Mapping) else {"outstanding_tokens": given}
        view.put(_replica(view, replica_id, fields))
    return view


def _replica(view: Cluster, replica_id: str, fields: dict[str, Any]) -> Replica:
    identity: dict[str, Any] = {"state": "ready", "model": "m"}
    identity |= {name: fields.pop(name) for name in _IDENTITY if name in fields}
    replica = Replica(ReplicaChanged(view.now_s, replica_id, **identity), view)
    if "age_s" in fields:
        replica.sampled_s = view.now_s - fields.pop("age_s")
    if "unscraped_tokens" in fields:
        _put_in_flight(replica, fields.pop("unscraped_tokens"), view.now_s)
    for name, value in fields.items():
        setattr(replica, name, value)
    return replica


def _put_in_flight(replica: Replica, prompt_tokens: int, now_s: float) -> None:
    sent = request(id=f"sent-to-{replica.id}", prompt_tokens=prompt_tokens)
    entry = Entry(sent, sent.model, sent.arrived_s, order=0)
    entry.state, entry.replica, entry.dispatched_s = IN_FLIGHT, replica, now_s
    replica.inflight[sent.id] = entry
    replica.inflight_requests = 1
    replica.outstanding_tokens = sent.expected_tokens
