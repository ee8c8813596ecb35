"""The simulator's own rules, checked on every result: conservation, causality, clock, blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.records import FINISHED, OUTCOMES, SeedResult

Columns: TypeAlias = Mapping[str, NDArray[Any]]


class InvariantError(AssertionError):
    """The simulator broke one of its own rules; the message names the invariant and a row."""


INSTANTS = ("arrived_ns", "dispatched_ns", "started_ns", "first_token_ns", "finished_ns")


def check_invariants(result: SeedResult) -> None:
    """Raise InvariantError unless the result obeys I1 to I4, as far as its columns can tell."""
    requests = result.requests
    _check_conservation(requests)
    _check_causality(requests)
    last_ns = max((int(requests[name].max(initial=0)) for name in INSTANTS), default=0)
    if last_ns > result.ended_ns:
        raise InvariantError(f"I3 clock: something happened at {last_ns} ns, after the end")
    usable = np.array([replica.usable_kv_blocks for replica in result.replicas], dtype=np.int64)
    used = result.samples["kv_blocks_used"]
    _require((used >= 0) & (used <= usable[result.samples["replica"]]), "I4 KV blocks", "sample")  # type: ignore[operator]


def _check_conservation(requests: Columns) -> None:
    """Each request is there once, has one fate, and the instants that belong to that fate."""
    outcome = requests["outcome"]
    finished = outcome == FINISHED
    if len({column.size for column in requests.values()}) != 1:
        raise InvariantError("I1 conservation: columns of requests differ in length")
    if np.unique(requests["request"]).size != outcome.size:
        raise InvariantError("I1 conservation: a request is recorded twice")
    name = "I1 conservation"
    _require((outcome >= 0) & (outcome < len(OUTCOMES)), f"{name}: no known outcome", "request")
    ended = requests["finished_ns"] >= 0
    _require(finished == ended, f"{name}: outcome and finished_ns disagree", "request")
    _require(~finished | (requests["replica"] >= 0), f"{name}: finished nowhere", "request")
    for instant in INSTANTS:
        _require(~finished | (requests[instant] >= 0), f"{name}: finished, no {instant}", "request")


def _check_causality(requests: Columns) -> None:
    """Arrivals are in order, and so are the instants of a request, as far as they came."""
    arrived = requests["arrived_ns"]
    _require(np.diff(arrived, prepend=0) >= 0, "I3 clock: arrivals out of order", "request")
    latest, named = arrived, INSTANTS[0]
    for instant in INSTANTS[1:]:
        came = requests[instant] >= 0
        _require(
            ~came | (requests[instant] >= latest), f"I2 causality: {instant} < {named}", "request"
        )
        latest, named = np.where(came, requests[instant], latest), instant


def _require(holds: NDArray[np.bool_], broken: str, what: str) -> None:
    if not holds.all():
        raise InvariantError(f"{broken} ({what} {int(np.argmin(holds))})")
