"""A worker's answer to one job: judged, and passed on while it comes.

What counts as an answer. A stream is held until its first event has come whole: an error there,
or any other failure before, can be tried elsewhere. From then on pieces go straight to the
client, and those are kept that say more than a token and that it goes on. `[DONE]` alone is no
success: vLLM sends it after an engine's death as well (FACTS section 6). So the piece with
`[DONE]` is looked at before it is passed on, with the last few that were kept, and where no
choice has a finish_reason the client gets an error event in its place. A stream that ends without
`[DONE]`, or breaks, ends in such an event too.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque

from runtime.adapters import error_of
from runtime.driver import Job
from runtime.exchange import Busy, Exchange, error_event
from runtime.http1 import Head, ProtocolError, chunk, payload
from runtime.upstream import Connection
from runtime.worker import WorkerBusy, WorkerError, WorkerRefused

BUFFER_BYTES = 256 * 1024
"""What may wait in a client's socket before the worker is asked to pause."""
CLIENT_CHECK_S = 0.02
"""How often a client that reads slowly is looked at."""
CLIENT_STALL_S = 60.0
"""A client that takes nothing for so long has left."""
TAIL_PIECES = 6
"""How much of a stream's end is looked at: the last token, usage and [DONE], each in a piece
of its own, and some room for several choices."""
DONE_BYTES = 24
"""Where the last piece has its [DONE]: at the end, before a few line ends."""
MAX_FIRST_EVENT_BYTES = 1 << 20
MAX_WHOLE_BYTES = 1 << 28
"""Of an answer that is not a stream, which is held until it is whole."""
WORKER_FAULTS = (408, 424)
"""Statuses below 500 that are no refusal: 424 is TGI's for a generation that failed. 501 is one:
llama.cpp's and vLLM's for what was not switched on."""
BROKE_OFF = "the worker's answer broke off"

_GOES_ON = b'"finish_reason":null'
_STOPS = b'"finish_reason":"'
_FINISHED = re.compile(
    rb'"finish_reason"\s*:\s*"(?!error"|")'  # empty while TGI goes on
    rb'|"stop_reason"\s*:\s*"|response\.(?:completed|incomplete)"'
)
_USAGE = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_EVENT = re.compile(rb"(?ms)^(?:data:(?!\s*\[DONE\])|event:).*?\n\r?\n")
_ERROR_EVENT = re.compile(
    rb'^event:\s*error|^data:\s*(\{\s*(?:"error"\s*:|"object"\s*:\s*"error").*)', re.MULTILINE
)


class Reply:
    """The answer of one worker to one job, passed on while it comes."""

    __slots__ = (
        "_broken",
        "_buffered_bytes",
        "_connection",
        "_ending",
        "_events",
        "_exchange",
        "_head",
        "_held",
        "_held_bytes",
        "_is_stream",
        "_job",
        "_loop",
        "_stalled",
        "_tail",
        "_write",
    )

    def __init__(self, job: Job, exchange: Exchange, connection: Connection) -> None:
        self._job = job
        self._exchange = exchange
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._write = exchange.transport.write
        self._buffered_bytes = exchange.transport.get_write_buffer_size
        self._head = Head(0, ())
        self._is_stream = False
        self._held: list[bytes] | None = []
        """What has come while it is not yet decided whether it counts; None once it does."""
        self._held_bytes = 0
        self._tail: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._events = 0
        self._ending: bytes | None = None
        """The last pieces of a stream, once [DONE] has come."""
        self._broken = False
        """The client has been told that the stream is no whole answer."""
        self._stalled = (0, 0.0)
        """What waits for a slow client, and since when it has been so much."""

    # -- from the connection --

    def head(self, head: Head) -> None:
        """See `Listener`."""
        self._head = head
        kind = head.get(b"content-type") or b""
        self._is_stream = (
            self._exchange.streams
            and head.status == 200
            and head.is_chunked
            and kind.startswith(b"text/event-stream")
        )

    def body(self, data: bytes) -> None:
        """See `Listener`."""
        if self._held is not None:
            self._hold(self._held, data)
            return
        events = data.count(b"data: ")
        self._events += events
        # A token like any other is not kept: of 800 streams, that is memory which no cache holds.
        if data.count(_GOES_ON) != events or _STOPS in data:
            self._tail.append(data)
            if b"[DONE]" in data[-DONE_BYTES:]:
                data = self._checked(data)
        self._write(data)
        if self._buffered_bytes() > BUFFER_BYTES:
            self._wait_for_client()

    def cut(self) -> None:
        """See `Listener`: a client that has seen some of the stream is told so."""
        if self._held is None:
            self._break_off()

    def _hold(self, held: list[bytes], data: bytes) -> None:
        held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_WHOLE_BYTES:
            raise ProtocolError("the answer is too long")
        if self._is_stream:
            self._begin(b"".join(held))

    def _begin(self, held: bytes) -> None:
        """Pass the stream on once its first event is there and is no error."""
        content = payload(held)
        if not _EVENT.search(content):
            if len(held) > MAX_FIRST_EVENT_BYTES:
                raise ProtocolError("the first event does not end")
            return
        if b"error" in content and _ERROR_EVENT.search(content):
            return  # judged at the end, when all of it is there
        if not self._job.begin():
            self._connection.close()
            return
        self._held = None
        self._events = held.count(b"data: ")
        self._tail.append(held)
        self._exchange.open_stream(
            self._head, self._checked(held) if b"[DONE]" in held[-DONE_BYTES:] else held
        )

    def _checked(self, piece: bytes) -> bytes:
        """The piece with `[DONE]`, the last of the tail; with an error event instead of it unless
        the stream is a whole answer."""
        self._ending = payload(b"".join(self._tail))
        if _FINISHED.search(self._ending) or _ERROR_EVENT.search(self._ending):
            return piece
        content = payload(piece)
        done = _DONE.search(content)
        if done is None:
            return piece  # a model that writes about [DONE]
        self._broken = True
        before = content[: done.start()]
        return (chunk(before) if before else b"") + chunk(error_event(BROKE_OFF))

    # -- a slow client --

    def _wait_for_client(self) -> None:
        self._connection.pause(self)
        self._stalled = (self._buffered_bytes(), self._loop.time())
        self._loop.call_later(CLIENT_CHECK_S, self._look_at_client)

    def _look_at_client(self) -> None:
        transport, waiting = self._exchange.transport, self._buffered_bytes()
        if transport.is_closing() or waiting <= BUFFER_BYTES // 2:
            self._connection.resume(self)
            return
        before, since_s = self._stalled
        now_s = self._loop.time()
        if waiting != before:
            self._stalled = (waiting, now_s)
        elif now_s > since_s + CLIENT_STALL_S:
            transport.abort()
            return
        self._loop.call_later(CLIENT_CHECK_S, self._look_at_client)

    # -- at the end --

    def result(self) -> int:
        """Tokens of the answer. Raises WorkerError unless it is a whole one."""
        if self._held is None:
            return self._stream_result()
        whole = b"".join(self._held)
        content = payload(whole) if self._head.is_chunked else whole
        if self._is_stream:
            raise self._stream_failure(content)
        if not 200 <= self._head.status < 300:
            raise self._failure(self._head.status, content)
        self._exchange.take_plain(self._head.status, self._head, content)
        return self._usage(content) or 0

    def _stream_result(self) -> int:
        ending = payload(b"".join(self._tail)) if self._ending is None else self._ending
        if self._broken:
            raise WorkerError("the stream ended without a finish_reason")
        if b"error" in ending and _ERROR_EVENT.search(ending):
            raise WorkerError("the stream ended in an error of the worker")
        if not _FINISHED.search(ending):
            self._break_off()
            raise WorkerError("the stream ended without a finish_reason")
        # Without usage, events are the tokens, but for [DONE].
        return self._usage(ending) or max(1, self._events - 1)

    def _break_off(self) -> None:
        if not self._broken:
            self._broken = True
            self._exchange.end_in_error(BROKE_OFF)

    def _stream_failure(self, content: bytes) -> WorkerError:
        """What a stream without a first event that counts says."""
        found = _ERROR_EVENT.search(content)
        if not found:
            return WorkerError("the stream ended before its first event")
        said = found[1] or content
        return self._failure(error_of(said)[0] or 500, said)

    def _failure(self, status: int, content: bytes) -> WorkerError:
        """The error of an answer that is none."""
        message = f"the worker answered {status}: {error_of(content)[1]}"
        if status in (429, 503):
            given = self._head.get(b"retry-after") or b""
            seconds = given.decode() if given.isdigit() and len(given) < 5 else "2"
            self._exchange.busy = Busy(status, seconds)
            return WorkerBusy(message)
        if status == 501 or (400 <= status < 500 and status not in WORKER_FAULTS):
            head = self._head
            if self._is_stream:
                head = Head(status, ((b"content-type", b"application/json"),))
            self._exchange.take_plain(status, head, content)
            return WorkerRefused(message)
        return WorkerError(message)

    def _usage(self, content: bytes) -> int | None:
        """Output tokens as the worker counted them at last; notes those of the prompt."""
        prompt, output = _PROMPT.findall(content), _USAGE.findall(content)
        if prompt:
            self._exchange.prompt_tokens = int(prompt[-1])
        return int(output[-1]) if output else None
