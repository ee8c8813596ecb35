"""What an operator asks and orders: the scheduler's state, draining, and the key for both."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from aiohttp import web

from policies.interface import PolicyError
from policies.registry import PolicySpecError
from policies.state import Lane, Replica
from runtime.access import Keys, NoAccess
from runtime.driver import Driver
from runtime.errors import ApiError
from runtime.watch import Watch

BY_ADMIN = "admin"
"""Why a worker is drained: one that is too hot stays drained when an operator takes it back."""


class Operators:
    """Who may look at the proxy's state, and who may change it.

    Changing takes the admin key, and without one configured nobody can. Looking takes it too
    where there is one; else any API key, and where there are none, none.
    """

    def __init__(self, keys: Keys, admin_sha256: str | None) -> None:
        self._keys = keys
        self._admin_sha256 = admin_sha256

    def require_admin(self, headers: Mapping[str, str]) -> None:
        """Raises NoAccess unless the admin key is given."""
        if not self._is_admin(headers):
            raise NoAccess(401, "give the admin key: Authorization: Bearer KEY")

    def require_viewer(self, headers: Mapping[str, str]) -> None:
        """Raises NoAccess unless what clients ask, and whose it is, may be shown."""
        if self._admin_sha256 is not None:
            self.require_admin(headers)
        else:
            self._keys.client(headers)

    def require_scraper(self, headers: Mapping[str, str]) -> None:
        """Raises NoAccess unless totals may be shown: any key will do, the admin's too."""
        if not self._is_admin(headers):
            self._keys.client(headers)

    def _is_admin(self, headers: Mapping[str, str]) -> bool:
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        if self._admin_sha256 is None or scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).hexdigest()
        return hmac.compare_digest(digest, self._admin_sha256)


class Admin:
    """Handlers of `/admin/*`.

    What they change goes through `Driver.report`: it is journaled and replays.
    """

    def __init__(self, driver: Driver, watch: Watch, operators: Operators) -> None:
        self._driver = driver
        self._watch = watch
        self._operators = operators

    async def state(self, request: web.Request) -> web.Response:
        """`GET /admin/state`: workers, lanes, limits and counts."""
        self._operators.require_admin(request.headers)
        core, now_s = self._watch.core, self._driver.now_s()
        found = {
            "policy": type(core.policy).__name__,
            "limits": asdict(core.limits),
            "counts": core.counts,
            "queued_requests": core.queued_requests,
            "inflight_requests": core.inflight_requests,
            "workers": [worker_state(replica, now_s) for replica in self._watch.replicas],
            "lanes": [lane_state(lane, now_s) for lane in self._watch.lanes],
        }
        return web.json_response(found)

    async def drain(self, request: web.Request) -> web.Response:
        """`POST /admin/drain/{worker}`: it finishes what it has and takes no more."""
        worker_id = self._worker(request)
        self._driver.drain(worker_id, BY_ADMIN)
        return self._shown(worker_id)

    async def undrain(self, request: web.Request) -> web.Response:
        """`POST /admin/undrain/{worker}`: it takes requests again."""
        worker_id = self._worker(request)
        self._driver.undrain(worker_id, BY_ADMIN)
        return self._shown(worker_id)

    async def policy(self, request: web.Request) -> web.Response:
        """`POST /admin/policy`: the body is the `policy` block of an experiment, as JSON. Requests
        go on, those that are queued in the new policy's order."""
        self._operators.require_admin(request.headers)
        try:
            spec = json.loads(await request.text())
            if not isinstance(spec, dict) or "class" in spec:
                # Code comes from the operator's file only, never over the network.
                raise PolicySpecError('the body is not {"name": POLICY, PARAMETER: VALUE, ...}')
            self._driver.change(self._watch.core.limits, spec)
        except (ValueError, LookupError, PolicyError) as error:  # LookupError: of no such charset
            raise ApiError(400, f"policy: {error}") from None
        return web.json_response({"policy": type(self._watch.core.policy).__name__})

    def _worker(self, request: web.Request) -> str:
        self._operators.require_admin(request.headers)
        worker_id = request.match_info["worker"]
        if worker_id not in self._driver.workers:
            known = ", ".join(self._driver.workers)
            raise ApiError(404, f"no worker {worker_id!r}; there are: {known}")
        return worker_id

    def _shown(self, worker_id: str) -> web.Response:
        replica = self._watch.core.view.replica(worker_id)
        return web.json_response(worker_state(replica, self._driver.now_s()))


def worker_state(replica: Replica, now_s: float) -> dict[str, Any]:
    """One worker as JSON says it; figures of a gauge never read, and its age, are null."""
    age_s = now_s - replica.sampled_s
    known = isfinite(age_s)
    return {
        "id": replica.id,
        "model": replica.model,
        "state": _condition(replica, now_s),
        "inflight_requests": replica.inflight_requests,
        "outstanding_tokens": replica.outstanding_tokens,
        "max_num_seqs": replica.max_num_seqs,
        "gauges": {
            "age_s": age_s if known else None,
            "running": replica.running if known else None,
            "waiting": replica.waiting if known else None,
            "kv_usage": replica.kv_usage if known else None,
            "power_w": replica.power_w,
            "temperature_c": replica.temperature_c,
        },
    }


def _condition(replica: Replica, now_s: float) -> str:
    """The replica's state, or what keeps a ready one from taking requests."""
    if replica.state != "ready":
        return replica.state
    if now_s < replica.ejected_until_s:
        return "ejected"
    return "probing" if replica.probing else "ready"


def lane_state(lane: Lane, now_s: float) -> dict[str, Any]:
    """One lane of the central queue as JSON says it."""
    head = lane.head
    return {
        "key": str(lane.key),
        "length": len(lane),
        "head": head.id,
        "head_waits_s": max(0.0, now_s - head.arrived_s),
    }
