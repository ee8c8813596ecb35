"""The live page and its stream of snapshots."""

import asyncio
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from policies.core import SchedulerCore
from policies.interface import Arrived, Finished, Gauges, ReplicaChanged
from policies.least_loaded import LeastLoaded
from policies.testing import request
from runtime.dashboard import latencies, snapshot
from runtime.watch import Ended, Watch
from tests.test_admin import ADMIN, USER, asked, bearer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


async def first_snapshot(client: TestClient[Any, Any], key: str = "") -> tuple[int, Any]:
    """Status and the first event of the stream."""
    headers = bearer(key) if key else {}
    async with client.get("/dashboard/events", headers=headers) as response:
        if response.status != 200:
            return response.status, None
        event = await response.content.readuntil(b"\n\n")
    return response.status, json.loads(event.removeprefix(b"data: "))


class TestStream:
    def test_a_snapshot_comes_at_once(self):
        async def question(client: TestClient[Any, Any]) -> None:
            _, found = await first_snapshot(client)
            assert [worker["id"] for worker in found["workers"]] == ["r0", "r1"]
            assert found["policy"] == "LeastLoaded"

        asked(question, admin=False)

    @pytest.mark.parametrize(
        ("admin", "keys", "key", "status"),
        [
            (True, True, ADMIN, 200),
            (True, True, USER, 401),
            (True, False, "", 401),
            (False, True, USER, 200),
            (False, True, "", 401),
            (False, False, "", 200),
        ],
    )
    def test_who_may_look(self, admin: bool, keys: bool, key: str, status: int):
        async def question(client: TestClient[Any, Any]) -> None:
            assert (await first_snapshot(client, key))[0] == status

        asked(question, admin=admin, keys=keys)

    def test_viewers_do_not_hold_up_the_shutdown(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.get("/dashboard/events")
            await response.content.readuntil(b"\n\n")
            async with asyncio.timeout(5.0):
                await client.server.close()
                await response.content.read()
            assert response.content.at_eof()

        asked(question, admin=False)


def after(*events: Any) -> Watch:
    """A watch of one worker, after the events."""
    watch = Watch(SchedulerCore(LeastLoaded()))
    for event in (ReplicaChanged(0.0, "r0", "ready", model="m", max_num_seqs=8), *events):
        watch.record(event, watch.core.handle(event))
    return watch


class TestSnapshot:
    def test_gauges_are_shown_with_their_age(self):
        (worker,) = snapshot(after(Gauges(2.0, "r0", 1.5, 3, 1, 0.25)), 4.0)["workers"]
        assert worker["gauges"] == {
            "age_s": 2.5,
            "running": 3,
            "waiting": 1,
            "kv_usage": 0.25,
            "power_w": None,
            "temperature_c": None,
        }

    def test_rates_count_from_the_start_at_first(self):
        watch = after(Arrived(1.0, request()), Finished(10.0, "q", 1, output_tokens=50))
        assert snapshot(watch, 10.0)["tokens_per_s"] == 5.0

    def test_rates_forget_what_is_long_past(self):
        watch = after(Arrived(1.0, request()), Finished(10.0, "q", 1, output_tokens=50))
        assert snapshot(watch, 50.0)["tokens_per_s"] == 0.0

    def test_a_lane_is_shown_with_its_head(self):
        drained = ReplicaChanged(0.5, "r0", "draining")
        watch = after(drained, Arrived(1.0, request(id="a", arrived_s=1.0)))
        (lane,) = snapshot(watch, 3.0)["lanes"]
        assert lane == {"key": "m", "length": 1, "head": "a", "head_waits_s": 2.0}

    def test_the_latest_decision_comes_first(self):
        watch = after(*(Arrived(float(i), request(id=f"q{i}")) for i in range(1, 30)))
        decisions = snapshot(watch, 30.0)["decisions"]
        assert [d["request_id"] for d in decisions] == [f"q{i}" for i in range(29, 9, -1)]

    def test_it_is_plain_json(self):
        json.dumps(snapshot(after(Arrived(1.0, request())), 2.0), allow_nan=False)

    def test_percentiles_are_values_that_were_measured(self):
        ended = [Ended(0.0, "r0", 5, float(i), None, 1.0) for i in range(1, 101)]
        rows = latencies(ended)
        assert rows["ttft"] == {"count": 100, "p50": 50.0, "p90": 90.0, "p99": 99.0}
        assert rows["tpot"] == {"count": 0, "p50": None, "p90": None, "p99": None}


class Links(HTMLParser):
    """Collects what a page would load, and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        for name, value in attrs:
            if name in ("src", "href") and value != "data:,":
                self.loaded.append(f"{tag} {value}")
            if name == "id" and value:
                self.ids.add(value)


class TestPage:
    page = (Path(__file__).parents[1] / "runtime/static/dashboard.html").read_text("utf-8")

    def test_it_loads_nothing_from_anywhere(self):
        assert Links(self.page).loaded == []
        assert "@import" not in self.page
        assert "url(" not in self.page

    def test_every_element_that_the_script_names_is_there(self):
        named = set(re.findall(r'\bat\("([^"]+)"\)', self.page))
        named |= set(re.findall(r'\bfill\("([^"]+)"', self.page))
        assert named - Links(self.page).ids == set()

    def test_nothing_is_set_as_markup(self):
        assert "innerHTML" not in self.page

    def test_it_is_served_without_a_key_and_may_load_nothing(self):
        async def question(client: TestClient[Any, Any]) -> None:
            response = await client.get("/dashboard")
            assert await response.text() == self.page
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]

        asked(question, keys=True)

    @pytest.mark.slow
    @pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
    def test_a_browser_shows_the_workers(self):
        row = re.compile(r'<td>r1</td><td class="state ready">ready</td>')

        async def question(client: TestClient[Any, Any]) -> None:
            url = str(client.make_url("/dashboard"))
            # The browser dumps the page after so long; on a busy machine it may need longer.
            for limit_ms in (1500, 5000, 15000):
                page = await asyncio.to_thread(shown, url, limit_ms)
                if row.search(page):
                    break
            assert row.search(page)

        asked(question, admin=False)


def shown(url: str, limit_ms: int) -> str:
    """The page's elements after a while in a browser."""
    assert CHROMIUM is not None, "skipped otherwise"
    # Virtual time stands still while the stream is open, so the page is dumped at the limit and
    # not as soon as it has loaded.
    waiting = ["--virtual-time-budget=100000", f"--timeout={limit_ms}"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *waiting]
    done = subprocess.run(
        [*command, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout
