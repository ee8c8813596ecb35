"""The live page: one static file, and a snapshot a second for it as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any

from aiohttp import web

from runtime.admin import Operators, lane_state, worker_state
from runtime.driver import Driver
from runtime.watch import Ended, Watch

PERIOD_S = 1.0
LATENCY_WINDOW_S = 300.0
RATE_WINDOW_S = 30.0
PERCENTILES = (50, 90, 99)

_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""The page loads nothing from anywhere and is shown in no frame."""


class Dashboard:
    """Handlers of `/dashboard` and `/dashboard/events`."""

    def __init__(self, driver: Driver, watch: Watch, operators: Operators) -> None:
        self._driver = driver
        self._watch = watch
        self._operators = operators
        self._closing = asyncio.Event()
        self._made_s = float("-inf")
        self._made = b""

    async def page(self, request: web.Request) -> web.Response:
        """The page itself: it holds nothing secret, and asks for the key when one is needed."""
        return web.Response(text=_page(), content_type="text/html", headers=_PAGE_HEADERS)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """A snapshot a second, until the viewer leaves or the proxy closes."""
        self._operators.require_viewer(request.headers)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        with suppress(ConnectionError):
            while not self._closing.is_set():
                await response.write(self._event())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), PERIOD_S)
        return response

    async def close(self, _: web.Application) -> None:
        """Let the viewers go: a stream without an end would hold up the shutdown."""
        self._closing.set()

    def _event(self) -> bytes:
        """The current snapshot, made once for all viewers of the same second."""
        now_s = self._driver.now_s()
        if now_s - self._made_s >= 0.9 * PERIOD_S:
            content = json.dumps(snapshot(self._watch, now_s), separators=(",", ":"))
            self._made = f"data: {content}\n\n".encode()
            self._made_s = now_s
        return self._made


def snapshot(watch: Watch, now_s: float) -> dict[str, Any]:
    """Everything the page shows, for JSON."""
    core = watch.core
    recent = [end for end in watch.ended if end.now_s > now_s - LATENCY_WINDOW_S]
    latest = [end for end in recent if end.now_s > now_s - RATE_WINDOW_S]
    open_s = now_s - (now_s if watch.opened_s is None else watch.opened_s)
    over_s = min(RATE_WINDOW_S, max(1.0, open_s))
    tokens: Counter[str] = Counter()
    for end in latest:
        tokens[end.worker] += end.output_tokens
    workers = [
        worker_state(replica, now_s) | {"tokens_per_s": tokens[replica.id] / over_s}
        for replica in watch.replicas
    ]
    statuses: Counter[str] = Counter()
    for (_, status), number in watch.totals.answers.items():
        statuses[str(status)] += number
    handle_s = watch.handle_s.median_bound()
    return {
        "policy": type(core.policy).__name__,
        "queued": core.queued_requests,
        "inflight": core.inflight_requests,
        "requests_per_s": len(latest) / over_s,
        "tokens_per_s": tokens.total() / over_s,
        "handle_us": None if handle_s is None else round(handle_s * 1e6),
        "statuses": dict(sorted(statuses.items())),
        "retries": watch.totals.retries,
        "ejections": watch.totals.ejections.total(),
        "latency_window_s": LATENCY_WINDOW_S,
        "latency_s": latencies(recent),
        "workers": workers,
        "lanes": [lane_state(lane, now_s) for lane in watch.lanes],
        "decisions": [
            {
                "age_s": now_s - decision.now_s,
                "kind": decision.kind,
                "request_id": decision.request_id,
                "worker": decision.worker,
                "reason": decision.reason,
                "candidates": decision.candidates,
            }
            for decision in reversed(watch.decisions)
        ],
    }


def latencies(ended: Iterable[Ended]) -> dict[str, dict[str, float | None]]:
    """Percentiles (nearest rank) and count of each latency."""
    found: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2e": []}
    for end in ended:
        for name, value in (("ttft", end.ttft_s), ("tpot", end.tpot_s), ("e2e", end.e2e_s)):
            if value is not None:
                found[name].append(value)
    return {name: _percentiles(sorted(values)) for name, values in found.items()}


def _percentiles(rising: list[float]) -> dict[str, float | None]:
    count = len(rising)
    row: dict[str, float | None] = {"count": count}
    for percent in PERCENTILES:
        rank = -(-percent * count // 100)
        row[f"p{percent}"] = rising[rank - 1] if count else None
    return row


@cache
def _page() -> str:
    return resources.files("runtime").joinpath("static/dashboard.html").read_text("utf-8")
