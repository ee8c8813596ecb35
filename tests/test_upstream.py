"""Connections to a worker, over real sockets."""

import asyncio
import socket

import pytest

from runtime.http1 import Head
from runtime.upstream import Connection, Pool, UpstreamError
from tests.stub_server import END, STREAM_HEAD, Received, StubServer, Wire, chunk, plain, run, says

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection
        self.status = 0
        self.data = b""
        self.was_cut = False
        self.began = asyncio.Event()

    def head(self, head: Head) -> None:
        """Status and headers came."""
        self.status = head.status
        self.began.set()

    def body(self, data: bytes) -> None:
        """More of the body came."""
        self.data += data

    def cut(self) -> None:
        """The connection broke."""
        self.was_cut = True


def pool(stub: StubServer, **options: float) -> Pool:
    """The connections to a stub."""
    return Pool("127.0.0.1", stub.port, **options)


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class TestReuse:
    def test_a_connection_serves_one_request_after_the_other(self):
        async def scenario() -> None:
            async with StubServer([says(plain(200, {}))]).listening() as stub:
                subject = pool(stub)
                for _ in range(3):
                    await subject.ask(GET, Heard)
                assert (stub.connections, subject.idle_connections) == (1, 1)
                subject.close()

        run(scenario)

    def test_a_chunked_answer_that_ends_byte_by_byte_leaves_the_connection_clean(self):
        async def scenario() -> None:
            answer = STREAM_HEAD + chunk(b"abc") + b"0\r\nx: y\r\n\r\n"
            async with StubServer([says(answer, each=1)]).listening() as stub:
                subject = pool(stub)
                heard = [await subject.ask(GET, Heard) for _ in range(3)]
                assert [one.data for one in heard] == [chunk(b"abc")] * 3
                assert stub.connections == 1
                subject.close()

        run(scenario)

    @pytest.mark.parametrize(
        "answer",
        [
            plain(200, {}, "connection: close"),
            b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
            plain(200, {}) + b"surplus",
            STREAM_HEAD + END + b"surplus",
        ],
        ids=["close", "HTTP/1.0", "behind a length", "behind chunks"],
    )
    def test_a_connection_that_cannot_carry_another_is_not_kept(self, answer: bytes):
        async def scenario() -> None:
            async with StubServer([says(answer)]).listening() as stub:
                subject = pool(stub)
                await subject.ask(GET, Heard)
                assert subject.idle_connections == 0

        run(scenario)

    def test_bytes_behind_a_length_are_nobodys(self):
        async def scenario() -> None:
            async with StubServer([says(plain(200, b"abc") + b"surplus")]).listening() as stub:
                assert (await pool(stub).ask(GET, Heard)).data == b"abc"

        run(scenario)

    def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(self):
        async def scenario() -> None:
            ok = says(plain(200, {}))
            async with StubServer([ok, says(then="cut"), ok]).listening() as stub:
                subject = pool(stub)
                await subject.ask(GET, Heard)
                assert (await subject.ask(GET, Heard)).status == 200
                assert (stub.connections, len(stub.requests)) == (2, 3)
                subject.close()

        run(scenario)

    def test_a_new_connection_that_breaks_is_not_tried_again(self):
        async def scenario() -> None:
            async with StubServer([says(then="cut")]).listening() as stub:
                with pytest.raises(UpstreamError, match="closed the connection"):
                    await pool(stub).ask(GET, Heard)
                assert len(stub.requests) == 1

        run(scenario)

    def test_a_request_that_was_being_worked_on_is_not_sent_there_again(self, monkeypatch):
        async def scenario() -> None:
            ok = says(plain(200, {}))
            async with StubServer([ok, says(then="cut"), ok]).listening() as stub:
                subject = pool(stub)
                await subject.ask(GET, Heard)
                monkeypatch.setattr("runtime.upstream.STALE_S", 0.0)
                with pytest.raises(UpstreamError, match="closed the connection"):
                    await subject.ask(GET, Heard)

        run(scenario)

    def test_an_idle_connection_that_speaks_is_dropped(self):
        async def scenario() -> None:
            async with StubServer([says(plain(200, {}))]).listening() as stub:
                subject = pool(stub)
                await subject.ask(GET, Heard)
                await stub.wires[0].send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
                while subject.idle_connections:  # noqa: ASYNC110 - the loop's next read
                    await asyncio.sleep(0.001)
                assert (await subject.ask(GET, Heard)).status == 200
                assert stub.connections == 2
                subject.close()

        run(scenario)

    def test_a_closed_pool_keeps_nothing(self):
        async def scenario() -> None:
            async with StubServer([says(plain(200, {}))]).listening() as stub:
                subject = pool(stub)
                subject.close()
                await subject.ask(GET, Heard)
                assert subject.idle_connections == 0

        run(scenario)


class TestAnswers:
    def test_an_interim_answer_is_skipped(self):
        async def scenario() -> None:
            interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
            async with StubServer([says(interim + plain(200, b"abc"), each=7)]).listening() as stub:
                heard = await pool(stub).ask(GET, Heard)
                assert (heard.status, heard.data) == (200, b"abc")

        run(scenario)

    def test_an_answer_without_length_ends_with_the_connection(self):
        async def scenario() -> None:
            answer = b"HTTP/1.1 200 OK\r\n\r\nabc"
            async with StubServer([says(answer, b"def", then="close")]).listening() as stub:
                assert (await pool(stub).ask(GET, Heard)).data == b"abcdef"

        run(scenario)

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
            STREAM_HEAD + b"5\r\nabc",
            STREAM_HEAD + chunk(b"abc"),
        ],
        ids=["length", "inside a chunk", "between chunks"],
    )
    def test_an_answer_that_breaks_off_is_cut(self, answer: bytes):
        async def scenario() -> None:
            async with StubServer([says(answer, then="close")]).listening() as stub:
                heard = Heard()
                with pytest.raises(UpstreamError, match="closed the connection"):
                    await pool(stub).ask(GET, lambda _: heard)
                assert heard.was_cut

        run(scenario)

    @pytest.mark.parametrize(
        "answer",
        [b"220 mail ready\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", STREAM_HEAD + b"-1\r\n"],
        ids=["another protocol", "a switch", "a size below zero"],
    )
    def test_what_is_no_http_is_an_error(self, answer: bytes):
        async def scenario() -> None:
            async with StubServer([says(answer)]).listening() as stub:
                with pytest.raises(UpstreamError):
                    await pool(stub).ask(GET, Heard)

        run(scenario)

    def test_a_port_where_nobody_listens_is_an_error_without_the_address(self):
        async def scenario() -> None:
            port = closed_port()
            with pytest.raises(UpstreamError, match="cannot be reached") as caught:
                await Pool("127.0.0.1", port).ask(GET, Heard)
            assert str(port) not in str(caught.value)

        run(scenario)


class TestTime:
    def test_a_worker_that_stays_silent_is_given_up(self):
        async def scenario() -> None:
            async with StubServer([says(then="hang")]).listening() as stub:
                with pytest.raises(UpstreamError, match="silent"):
                    await pool(stub, silence_s=0.02).ask(GET, Heard)
                assert (await stub.aborted.get()).line.startswith("GET")

        run(scenario)

    def test_a_worker_that_speaks_now_and_then_is_not(self):
        async def slowly(received: Received, wire: Wire) -> None:
            await wire.send(STREAM_HEAD)
            for _ in range(8):
                await asyncio.sleep(0.02)
                await wire.send(chunk(b"a"))
            await wire.send(END)

        async def scenario() -> None:
            async with StubServer([slowly]).listening() as stub:
                heard = await pool(stub, silence_s=0.05).ask(GET, Heard)
                assert heard.data == chunk(b"a") * 8

        run(scenario)

    def test_silence_is_not_held_against_a_worker_that_is_not_read(self):
        async def scenario() -> None:
            heard: list[Heard] = []

            def listen(connection: Connection) -> Heard:
                heard.append(Heard(connection))
                return heard[0]

            stub = StubServer([says(STREAM_HEAD, chunk(b"a") + END)])
            async with stub.listening():
                asked = asyncio.ensure_future(pool(stub, silence_s=0.01).ask(GET, listen))
                await stub.taken.get()
                await heard[0].began.wait()
                connection = heard[0].connection
                assert connection is not None
                connection.pause(heard[0])
                await asyncio.sleep(0.04)
                connection.resume(heard[0])
                assert (await asked).data == chunk(b"a")

        run(scenario)

    def test_a_cancelled_request_closes_the_connection(self):
        async def scenario() -> None:
            async with StubServer([says(STREAM_HEAD, then="hang")]).listening() as stub:
                asked = asyncio.ensure_future(pool(stub).ask(GET, Heard))
                await stub.taken.get()
                asked.cancel()
                assert (await stub.aborted.get()).line.startswith("GET")

        run(scenario)


def test_a_paused_connection_is_read_again_by_the_next_request():
    class Pauses(Heard):
        """Asks for a pause with the last piece."""

        def body(self, data: bytes) -> None:
            """Pause."""
            assert self.connection is not None
            self.connection.pause(self)

    async def scenario() -> None:
        async with StubServer([says(plain(200, b"abc"))]).listening() as stub:
            subject = pool(stub)
            await subject.ask(GET, Pauses)
            assert (await subject.ask(GET, Heard)).data == b"abc"
            assert stub.connections == 1
            subject.close()

    run(scenario)
