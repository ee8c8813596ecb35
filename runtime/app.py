"""The proxy's application: routes, limits, and what runs beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from importlib import metadata
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from policies.core import SchedulerCore
from policies.interface import Limits as CoreLimits
from policies.interface import Policy
from runtime.access import Client, Keys
from runtime.admin import Admin, Operators
from runtime.dashboard import Dashboard
from runtime.driver import Driver
from runtime.errors import openai_errors
from runtime.http_worker import HttpWorker
from runtime.proxy import GENERATING, Limits, Proxy
from runtime.proxy_metrics import ProxyMetrics
from runtime.tokens import TokenCount
from runtime.watch import Watch, WatchedDriver, asked_model
from runtime.worker import Journal, Launcher

DRIVER = web.AppKey("DRIVER", Driver)

KEYS = web.AppKey("KEYS", Keys)

CLIENT_GONE = 499
"""Counted for a client that left before its answer had ended; nginx's word for it."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    policy: Policy | SchedulerCore,
    workers: Sequence[HttpWorker],
    *,
    seed: int = 0,
    core_limits: CoreLimits | None = None,
    limits: Limits | None = None,
    clients: Sequence[Client] = (),
    admin_sha256: str | None = None,
    scrape_s: float | None = 1.0,
    journal: Journal | None = None,
    launcher: Launcher | None = None,
    on_fault: Callable[[str], None] = lambda worker_id: None,
    collectors: Sequence[Collector] = (),
    token_count: TokenCount | None = None,
    passed_on: Sequence[str] = ("/tokenize", "/detokenize"),
) -> web.Application:
    """The proxy in front of `workers` that serve; `app[DRIVER].add` brings others.

    In place of a policy, a core may be given that has handled nothing yet; `seed` and
    `core_limits` are its own then. `admin_sha256` is the digest of the key for `/admin/*`,
    `collectors` give more figures for `/metrics`.
    """
    limits = limits or Limits()
    core = policy
    if isinstance(core, Policy):
        core = SchedulerCore(core, seed, core_limits)
    watch = Watch(core, journal)
    driver = WatchedDriver(
        core, workers, watch, scrape_s=scrape_s, launcher=launcher, on_fault=on_fault
    )
    keys = Keys(clients)
    app = web.Application(
        client_max_size=limits.max_body_bytes,
        middlewares=[_counting(watch, frozenset(passed_on)), openai_errors],
    )
    app[DRIVER] = driver
    app[KEYS] = keys

    async def serving(_: web.Application) -> AsyncIterator[None]:
        async with driver:
            yield
        for worker in http_workers.values():
            worker.close()

    app.cleanup_ctx.append(serving)
    # Whatever is added to this driver later is an HttpWorker too.
    http_workers = cast(Mapping[str, HttpWorker], driver.workers)
    _route_api(app, Proxy(driver, http_workers, keys, limits, token_count), passed_on)
    operators = Operators(keys, admin_sha256)
    _route_metrics(app, operators, (ProxyMetrics(watch), *collectors))
    _route_rest(app, driver, watch, operators, admin_sha256 is not None)
    return app


def _route_api(app: web.Application, proxy: Proxy, passed_on: Sequence[str]) -> None:
    for path in GENERATING:
        app.router.add_post(path, proxy.generate)
    for path in passed_on:
        app.router.add_post(path, proxy.pass_on)
    app.router.add_get("/v1/models", proxy.models)


def _route_metrics(
    app: web.Application, operators: Operators, collectors: Sequence[Collector]
) -> None:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)

    async def metrics(request: web.Request) -> web.Response:
        operators.require_scraper(request.headers)
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(registry), headers=headers)

    app.router.add_get("/metrics", metrics)


def _route_rest(
    app: web.Application, driver: Driver, watch: Watch, operators: Operators, has_admin: bool
) -> None:
    """What operators, load balancers and monitoring ask."""

    async def ready(request: web.Request) -> web.Response:
        return web.Response(status=200 if watch.is_ready() else 503)

    app.router.add_get("/health", _health)
    app.router.add_get("/version", _version)
    app.router.add_get("/ready", ready)
    dashboard = Dashboard(driver, watch, operators)
    app.on_shutdown.append(dashboard.close)
    app.router.add_get("/dashboard", dashboard.page)
    app.router.add_get("/dashboard/events", dashboard.events)
    if has_admin:
        admin = Admin(driver, watch, operators)
        app.router.add_get("/admin/state", admin.state)
        app.router.add_post("/admin/drain/{worker}", admin.drain)
        app.router.add_post("/admin/undrain/{worker}", admin.undrain)
        app.router.add_post("/admin/policy", admin.policy)


def _counting(watch: Watch, passed_on: frozenset[str]) -> Middleware:
    """A middleware that counts the API's answers by status and model."""

    @web.middleware
    async def counting(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not (request.path.startswith("/v1/") or request.path in passed_on):
            return await handler(request)
        models: list[str] = []
        token = asked_model.set(models)
        status = CLIENT_GONE
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            asked_model.reset(token)
            watch.answered(models[0] if models else "", status)

    return counting


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": f"viisim-{metadata.version('viisim')}"})
