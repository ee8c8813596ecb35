"""Reading HTTP/1.1 answers of workers, without I/O: bytes in, events out.

The proxy passes bodies through as they are framed on the wire, so chunked framing is followed,
not taken apart: `ChunkedBody.feed` gives back what may be passed on, in the usual case the very
bytes that came. A chunk of a stream costs one search for a line end.

What is passed on is always whole chunks. A token is of no use before its chunk is complete, so
nobody waits longer for that, and between two chunks an event of our own can be put at any time:
a stream whose worker dies ends in a readable error, wherever the connection was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_BYTES = 64 * 1024
"""A worker that sends a longer head is broken."""
MAX_SIZE_LINE_BYTES = 1024
MAX_HELD_BYTES = 64 * 1024
"""A chunk that is longer is passed on in several."""

LINE_FEED = 10

_HEX_DIGITS = b"0123456789abcdefABCDEF"
_STRAY = b"\r\n\0"
_USUAL_SIZES = {b"%x" % size: size for size in range(1, 1024)}
"""Those of nearly every token: looking them up saves 0.4 us a chunk."""


class ProtocolError(Exception):
    """The worker does not speak HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer. Names of headers are in lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    version: bytes = b"HTTP/1.1"

    def get(self, name: bytes) -> bytes | None:
        """The first header of that name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks. Raises ProtocolError for any other coding."""
        coding = self.get(b"transfer-encoding")
        if coding is None:
            return False
        if coding.lower() != b"chunked" or self.get(b"content-length") is not None:
            raise ProtocolError(f"transfer-encoding {coding[:40]!r}, or a content-length with it")
        return True

    @property
    def content_length(self) -> int | None:
        """Length of a body that is not chunked; None: it ends with the connection."""
        length = None
        for key, value in self.headers:
            if key == b"content-length":
                if length not in (None, value) or not value.isdigit() or len(value) > 18:
                    raise ProtocolError(f"content-length {value[:40]!r}")
                length = value
        return None if length is None else int(length)

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on the connection, if the body has an end of its
        own."""
        connection = self.get(b"connection")
        if connection is None:
            return self.version != b"HTTP/1.0"
        options = connection.lower()
        return b"keep-alive" in options if self.version == b"HTTP/1.0" else b"close" not in options


def parse_head(data: bytes) -> tuple[Head, bytes] | None:
    """The head and what follows it; None while it is incomplete. Raises ProtocolError."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > MAX_HEAD_BYTES:
            raise ProtocolError("the head of the answer is too long")
        return None
    status_line, *lines = data[:end].split(b"\r\n")
    version, _, rest = status_line.partition(b" ")
    status = rest.partition(b" ")[0]
    if not version.startswith(b"HTTP/1.") or len(status) != 3 or not status.isdigit():
        raise ProtocolError(f"not an HTTP/1.1 answer: {status_line[:60]!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        # A name with white space is a continued line or a smuggled header (RFC 9112, 5.1 and
        # 5.2); a stray line end would become a header of its own at a laxer reader.
        if not colon or not name or name.strip() != name or line.translate(None, _STRAY) != line:
            raise ProtocolError(f"not a header: {line[:60]!r}")
        headers.append((name.lower(), value.strip(b" \t")))
    return Head(int(status), tuple(headers), version), data[end + 4 :]


class ChunkedBody:
    """Follows the framing of a chunked body."""

    __slots__ = ("_held", "ended", "surplus")

    def __init__(self) -> None:
        self._held = b""
        """The beginning of a chunk that is not there whole, or of the trailers."""
        self.ended = False
        self.surplus = False
        """Bytes came behind the end."""

    def feed(self, data: bytes) -> bytes:
        """What may be passed on: every chunk that is there whole, but for the last one. Trailers
        are dropped. Raises ProtocolError."""
        if self._held:
            data, self._held = self._held + data, b""
        position, size = 0, len(data)
        while position < size:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                if size - position > MAX_SIZE_LINE_BYTES:
                    raise ProtocolError("a chunk without a size")
                break
            line = data[position:line_end]
            length = _USUAL_SIZES.get(line) or _chunk_size(line)
            if not length:
                self._read_trailers(data, position, line_end)
                return data[:position]
            following = line_end + length + 4
            if following > size:
                return data[:position] + self._hold(data, position, line_end + 2, length)
            if data[following - 1] != LINE_FEED:
                raise ProtocolError("a chunk is longer than its size")
            position = following
        else:
            return data
        self._held = data[position:]
        return data[:position]

    def _hold(self, data: bytes, position: int, start: int, length: int) -> bytes:
        """Keep an incomplete chunk; of one too large to keep, give back what is there as a chunk
        and go on as if the rest had come as another."""
        there = len(data) - start
        if there <= MAX_HELD_BYTES or there >= length:
            self._held = data[position:]
            return b""
        self._held = b"%x\r\n" % (length - there)
        return chunk(data[start:])

    def _read_trailers(self, data: bytes, position: int, line_end: int) -> None:
        """The last chunk has begun at `position`; the body ends with the next empty line."""
        end = data.find(b"\r\n\r\n", line_end)
        if end >= 0:
            self.ended = True
            self.surplus = end + 4 < len(data)
        elif len(data) - position > MAX_HEAD_BYTES:
            raise ProtocolError("the trailers are too long")
        else:
            self._held = data[position:]


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t")
    # `int` alone would take signs, underscores and 0x as well.
    if not digits or len(digits) > 15 or digits.translate(None, _HEX_DIGITS):
        raise ProtocolError(f"not the size of a chunk: {line[:20]!r}")
    return int(digits, 16)


def chunk(content: bytes) -> bytes:
    """The content, which is not empty, as one chunk."""
    return b"%x\r\n%s\r\n" % (len(content), content)


def payload(framed: bytes) -> bytes:
    """The content of whole chunks, framing taken off."""
    content: list[bytes] = []
    position = 0
    while True:
        line_end = framed.find(b"\r\n", position)
        if line_end < 0:
            return b"".join(content)
        start = line_end + 2
        length = _chunk_size(framed[position:line_end])
        content.append(framed[start : start + length])
        position = start + length + 2
