"""State, draining and readiness over HTTP, and who may ask for them."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from policies.interface import ConfigChanged, ReplicaChanged
from policies.least_loaded import LeastLoaded
from runtime.access import Client
from runtime.app import make_app
from runtime.http_worker import HttpWorker

ADMIN, USER = "admin-key", "user-key"
LIMIT_S = 60.0


def digest(key: str) -> str:
    """As an experiment file holds it."""
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    """The header that a key goes into."""
    return {"Authorization": f"Bearer {key}"}


class Journal:
    """What the driver journaled."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def record(self, event: Any, actions: Any) -> None:
        """Note an event."""
        self.events.append(event)


def asked(
    question: Callable[[TestClient[Any, Any]], Awaitable[None]],
    *,
    admin: bool = True,
    keys: bool = False,
    journal: Journal | None = None,
) -> None:
    """Ask a proxy over two workers that nobody needs to reach."""

    async def scenario() -> None:
        workers = [HttpWorker(name, "m", "http://127.0.0.1:9") for name in ("r0", "r1")]
        app = make_app(
            LeastLoaded(),
            workers,
            clients=[Client(digest(USER))] if keys else [],
            admin_sha256=digest(ADMIN) if admin else None,
            scrape_s=None,
            journal=journal,
        )
        async with asyncio.timeout(LIMIT_S), TestClient(TestServer(app)) as client:
            await question(client)

    asyncio.run(scenario())


async def error_of(response: ClientResponse) -> tuple[int, str]:
    """Status and message of an error in OpenAI's form."""
    return response.status, (await response.json())["error"]["message"]


class TestState:
    def test_workers_and_lanes_are_told(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.get("/admin/state", headers=bearer(ADMIN))
            found = await response.json()
            assert found["policy"] == "LeastLoaded"
            assert [(w["id"], w["state"]) for w in found["workers"]] == [
                ("r0", "ready"),
                ("r1", "ready"),
            ]
            assert found["workers"][0]["gauges"]["age_s"] is None
            assert found["lanes"] == []

        asked(question)


class TestDraining:
    def test_the_policy_is_changed_under_way(self):
        async def question(client: TestClient[Any, Any]) -> None:
            asked = {"name": "power_of_two"}
            response = await client.post("/admin/policy", json=asked, headers=bearer(ADMIN))
            assert await response.json() == {"policy": "PowerOfTwo"}
            state = await (await client.get("/admin/state", headers=bearer(ADMIN))).json()
            assert state["policy"] == "PowerOfTwo"

        asked(question)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"name": "power_of_tow"}, "Did you mean"),
            ({"class": "os:system"}, "the body is not"),
            ([1], "the body is not"),
        ],
        ids=["misspelt", "code", "a list"],
    )
    def test_a_policy_that_cannot_be_had_changes_nothing(self, spec: Any, message: str):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.post("/admin/policy", json=spec, headers=bearer(ADMIN))
            status, said = await error_of(response)
            assert (status, message in said) == (400, True)

        journal = Journal()
        asked(question, journal=journal)
        assert ConfigChanged not in map(type, journal.events)

    def test_a_drained_worker_takes_nothing_until_it_is_undrained(self):
        async def question(client: TestClient[Any, Any]) -> None:
            for order, state in (("drain", "draining"), ("undrain", "ready")):
                response = await client.post(f"/admin/{order}/r0", headers=bearer(ADMIN))
                assert (await response.json())["state"] == state

        asked(question)

    def test_it_is_journaled(self):
        journal = Journal()

        async def question(client: TestClient[Any, Any]) -> None:
            await client.post("/admin/drain/r1", headers=bearer(ADMIN))

        asked(question, journal=journal)
        last = journal.events[-1]
        assert (type(last), last.replica_id, last.state) == (ReplicaChanged, "r1", "draining")

    def test_the_proxy_is_ready_while_some_worker_is(self):
        async def question(client: TestClient[Any, Any]) -> None:
            statuses = []
            for name in ("r0", "r1"):
                await client.post(f"/admin/drain/{name}", headers=bearer(ADMIN))
                statuses.append((await client.get("/ready")).status)
            assert statuses == [200, 503]
            assert (await client.get("/health")).status == 200

        asked(question)

    def test_an_unknown_worker_is_answered_with_those_there_are(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.post("/admin/drain/r7", headers=bearer(ADMIN))
            assert await error_of(response) == (404, "no worker 'r7'; there are: r0, r1")

        asked(question)


class TestAccess:
    @pytest.mark.parametrize("key", ["", USER, "wrong", "wr\u00f6ng"])
    def test_only_the_admin_key_opens(self, key: str):
        async def question(client: TestClient[Any, Any]) -> None:
            headers = bearer(key) if key else {}
            assert (await client.get("/admin/state", headers=headers)).status == 401
            assert (await client.post("/admin/drain/r0", headers=headers)).status == 401

        asked(question, keys=True)

    def test_without_an_admin_key_there_are_no_such_routes(self):
        async def question(client: TestClient[Any, Any]) -> None:
            assert (await client.get("/admin/state")).status == 404

        asked(question, admin=False)

    def test_the_admin_key_buys_no_tokens(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.get("/v1/models", headers=bearer(ADMIN))
            assert response.status == 401

        asked(question, keys=True)

    @pytest.mark.parametrize(("key", "status"), [(ADMIN, 200), (USER, 200), ("wrong", 401)])
    def test_totals_are_for_any_key(self, key: str, status: int):
        async def question(client: TestClient[Any, Any]) -> None:
            assert (await client.get("/metrics", headers=bearer(key))).status == status

        asked(question, keys=True)

    def test_without_keys_totals_are_open(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.get("/metrics")
            assert response.status == 200
            assert 'viisim_worker_ready{model="m",worker="r1"} 1.0' in await response.text()

        asked(question)

    def test_answers_are_counted_by_status(self):
        async def question(client: TestClient[Any, Any]) -> None:
            await client.post("/v1/completions", json={"model": "other", "prompt": "x"})
            text = await (await client.get("/metrics")).text()
            assert 'viisim_requests_total{model="",status="404"} 1.0' in text

        asked(question)
