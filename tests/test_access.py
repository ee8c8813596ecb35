"""Who may ask, as whom, and how much at once; and that no key is ever written down."""

import hashlib
import logging
from typing import Any

import pytest

from policies.interface import Arrived
from runtime.access import Client, Keys, NoAccess
from tests.stub_server import (
    WHOLE,
    Answer,
    StubServer,
    ask,
    asking,
    plain,
    post,
    proxy,
    run,
    says,
)

KEY, OTHER = "sk-one-secret", "sk-two-secret"


def digest(key: str) -> str:
    """As it stands in the file."""
    return hashlib.sha256(key.encode()).hexdigest()


ONE = Client(digest(KEY), "acme", "interactive", default_priority=2, best_priority=-1)
TWO = Client(digest(OTHER), "beta", "batch", default_priority=10, best_priority=5)


def given(value: str) -> dict[str, str]:
    """The headers of a request with such an Authorization."""
    return {"Authorization": value}


class TestKeys:
    def test_without_keys_everybody_is_served(self):
        assert Keys().client({}).tenant == ""

    @pytest.mark.parametrize(
        ("key", "tenant"), [(KEY, "acme"), (OTHER, "beta")], ids=["first", "second"]
    )
    def test_a_key_names_its_holder(self, key: str, tenant: str):
        assert Keys([ONE, TWO]).client(given(f"Bearer {key}")).tenant == tenant

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            "Bearer wrong",
            f"Bearer {KEY}x",
            "Bearer \udcff",
        ],
        ids=["none", "scheme", "empty", "basic", "wrong", "longer", "no UTF-8"],
    )
    def test_any_other_is_refused(self, value: str):
        with pytest.raises(NoAccess) as caught:
            Keys([ONE]).client(given(value))
        assert (caught.value.status, caught.value.headers) == (401, {"WWW-Authenticate": "Bearer"})

    def test_every_key_is_compared_whichever_it_is(self, monkeypatch):
        compared: list[str] = []

        def compare(a: str, b: str) -> bool:
            compared.append(a)
            return a == b

        monkeypatch.setattr("runtime.access.hmac.compare_digest", compare)
        Keys([ONE, TWO]).client(given(f"Bearer {KEY}"))
        assert compared == [ONE.sha256, TWO.sha256]

    @pytest.mark.parametrize(("asked", "granted"), [(None, 2), (7, 7), (-1, -1), (-9, -1)], ids=str)
    def test_no_priority_is_above_the_ceiling(self, asked: int | None, granted: int):
        assert ONE.priority(asked) == granted

    def test_a_request_too_many_is_refused(self):
        client = Client(digest(KEY), max_requests=1)
        keys = Keys([client])
        with (
            keys.admitted(client),
            pytest.raises(NoAccess, match="too many"),
            keys.admitted(client),
        ):
            pass
        assert keys.inside == 0

    def test_a_request_that_fails_is_counted_out(self):
        client = Client(digest(KEY), max_requests=1)
        keys = Keys([client])
        with pytest.raises(KeyError), keys.admitted(client):
            raise KeyError
        assert keys.inside == 0


def answered(request: bytes) -> tuple[Answer, StubServer, list[Any]]:
    """One request through a proxy with keys: the answer, the server, what arrived."""
    answers: list[tuple[Answer, list[Any]]] = []
    stub = StubServer([says(plain(200, WHOLE))])

    async def scenario() -> None:
        async with stub.listening(), proxy(stub, clients=[ONE, TWO]) as served:
            answer = await ask(served.port, request)
            answers.append((answer, [event.request for event in served.of(Arrived)]))

    run(scenario)
    answer, arrived = answers[0]
    return answer, stub, arrived


def keyed(key: str, *headers: str, **fields: Any) -> bytes:
    """A request with a key."""
    return post(asking(**fields), headers=[f"authorization: Bearer {key}", *headers])


class TestRequests:
    @pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
    def test_without_a_key_it_is_401(self, path: str):
        answer, stub, _ = answered(post(asking(), path))
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert (answer.headers["www-authenticate"], stub.requests) == ("Bearer", [])

    def test_the_body_of_a_stranger_is_not_read(self):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
        assert answered(head)[0].status == 401

    def test_tenant_and_class_reach_the_scheduler(self):
        _, _, (view,) = answered(keyed(OTHER))
        assert (view.tenant, view.traffic_class, view.priority) == ("beta", "batch", 10)

    @pytest.mark.parametrize(
        ("headers", "fields", "granted"),
        [
            ([], {"priority": -50}, -1),
            (["x-priority: -50"], {}, -1),
            (["x-priority: 4"], {}, 4),
            (["x-priority: 4"], {"priority": 3}, 3),
        ],
        ids=["body", "header", "allowed", "both"],
    )
    def test_a_priority_never_passes_the_ceiling(
        self, headers: list[str], fields: dict[str, int], granted: int
    ):
        _, _, (view,) = answered(keyed(KEY, *headers, **fields))
        assert view.priority == granted

    def test_a_key_goes_no_further(self):
        _, stub, _ = answered(keyed(KEY))
        assert KEY not in str(stub.requests)


class TestRate:
    def test_a_burst_passes_and_then_the_rate_holds(self):
        now_s = 0.0
        keys = Keys([], clock=lambda: now_s)
        client = Client(digest(KEY), rate_per_s=2.0, burst=3)
        passed = []
        for step in range(9):  # four requests a second
            now_s = step / 4
            try:
                with keys.admitted(client):
                    passed.append(now_s)
            except NoAccess:
                continue
        assert passed == [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]

    def test_a_refused_request_learns_when_to_come_again(self):
        keys = Keys([], clock=lambda: 0.0)
        client = Client(digest(KEY), rate_per_s=0.2, burst=1)
        with keys.admitted(client):
            pass
        with pytest.raises(NoAccess, match="rate") as refused, keys.admitted(client):
            pass
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "5"})

    def test_a_refused_request_counts_for_nothing(self):
        now_s = 0.0
        keys = Keys([], clock=lambda: now_s)
        client = Client(digest(KEY), rate_per_s=1.0, burst=1)
        with keys.admitted(client):
            pass
        for _ in range(5):
            with pytest.raises(NoAccess), keys.admitted(client):
                pass
        now_s = 1.0
        with keys.admitted(client):
            assert keys.inside == 0


class TestLogs:
    @pytest.mark.parametrize(
        "request_",
        [
            keyed(KEY),
            keyed(KEY, "content-length : 5"),
            keyed(KEY, "x: " + "y" * 65_536),
            keyed(KEY).replace(b"Bearer", b"Bearer\n"),
            keyed(KEY, model=KEY),
            post(b"{", headers=[f"authorization: Bearer {KEY}"]),
        ],
        ids=["good", "ambiguous", "long", "bare LF", "in the body", "bad body"],
    )
    def test_no_key_is_written(self, request_: bytes, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.DEBUG)
        answer, _, _ = answered(request_)
        assert (KEY in caplog.text, answer.status < 500) == (False, True)

    def test_an_error_of_ours_is_logged_without_the_key(self, caplog, monkeypatch):
        monkeypatch.setattr("runtime.proxy.read_prompt", lambda path, fields: 1 / 0)
        answer, _, _ = answered(keyed(KEY).replace(b"completions ", b"completions?key=secret "))
        assert answer.status == 500
        assert "ZeroDivisionError" in caplog.text
        assert "secret" not in caplog.text
