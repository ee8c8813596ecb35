"""The parser of workers' answers: bytes in any segments, the same bytes out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.http1 import (
    MAX_HEAD_BYTES,
    MAX_HELD_BYTES,
    ChunkedBody,
    Head,
    ProtocolError,
    chunk,
    parse_head,
    payload,
)

contents = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=8)
quickly = settings(deadline=None, max_examples=80)
trailers = st.sampled_from([b"", b"x-took: 3\r\n", b"a: 1\r\nb: 2\r\n"])


@st.composite
def segmented(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """The chunks of an answer, and the answer cut into segments anywhere."""
    chunks = [chunk(content) for content in draw(contents)]
    wire = b"".join(chunks) + b"0\r\n" + draw(trailers) + b"\r\n"
    cuts = sorted(draw(st.sets(st.integers(1, len(wire) - 1), max_size=30)))
    return chunks, [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


def fed(*segments: bytes) -> tuple[ChunkedBody, list[bytes]]:
    """A body that has got the segments, and what it gave back."""
    body = ChunkedBody()
    return body, [body.feed(segment) for segment in segments]


class TestChunkedBody:
    @quickly
    @given(segmented())
    def test_any_split_passes_on_the_same_bytes(self, answer: tuple[list[bytes], list[bytes]]):
        chunks, segments = answer
        _, passed = fed(*segments)
        assert b"".join(passed) == b"".join(chunks)

    @quickly
    @given(segmented())
    def test_only_whole_chunks_are_passed_on(self, answer: tuple[list[bytes], list[bytes]]):
        chunks, segments = answer
        _, passed = fed(*segments)
        content = [payload(piece) for piece in passed]
        assert b"".join(content) == b"".join(map(payload, chunks))

    @quickly
    @given(segmented())
    def test_the_end_is_seen_with_the_last_byte(self, answer: tuple[list[bytes], list[bytes]]):
        _, segments = answer
        body, _ = fed(*segments[:-1], segments[-1][:-1])
        early = body.ended
        body.feed(segments[-1][-1:])
        assert (early, body.ended, body.surplus) == (False, True, False)

    @quickly
    @given(st.integers(1, 3 * MAX_HELD_BYTES), st.integers(1_000, 100_000))
    def test_a_large_chunk_is_passed_on_in_parts(self, size: int, each: int):
        wire = chunk(b"x" * size) + b"0\r\n\r\n"
        body, passed = fed(*(wire[at : at + each] for at in range(0, len(wire), each)))
        assert body.ended
        assert b"".join(map(payload, passed)) == b"x" * size

    def test_a_large_chunk_is_not_held_back(self):
        _, passed = fed(b"fffffff\r\n" + b"x" * (2 * MAX_HELD_BYTES))
        assert payload(passed[0]) == b"x" * (2 * MAX_HELD_BYTES)

    def test_an_extension_of_a_size_is_passed_on(self):
        _, passed = fed(b"1;name=value\r\na\r\n")
        assert passed == [b"1;name=value\r\na\r\n"]

    def test_bytes_behind_the_end_are_noticed(self):
        body, passed = fed(b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200 OK")
        assert (passed, body.surplus) == ([chunk(b"a")], True)

    @pytest.mark.parametrize(
        "size", [b"", b"-1", b"+1", b"0x1", b"1_0", b"g", b"1 1", b"f" * 16, b" 1"]
    )
    def test_a_size_that_is_none_is_refused(self, size: bytes):
        with pytest.raises(ProtocolError, match="not the size of a chunk"):
            fed(size + b"\r\nabc\r\n")

    def test_a_chunk_longer_than_its_size_is_refused(self):
        with pytest.raises(ProtocolError, match="longer than its size"):
            fed(b"2\r\nabc\r\n")

    def test_a_size_line_without_end_is_refused(self):
        with pytest.raises(ProtocolError, match="without a size"):
            fed(b"1;" + b"x" * 2000)

    def test_trailers_without_end_are_refused(self):
        with pytest.raises(ProtocolError, match="trailers"):
            fed(b"0\r\n", b"x: y" * MAX_HEAD_BYTES)


class TestHead:
    def test_status_and_headers_are_read_and_the_rest_is_left(self):
        data = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-A:  b \r\n\r\nabc"
        headers = ((b"content-length", b"3"), (b"x-a", b"b"))
        assert parse_head(data) == (Head(200, headers), b"abc")

    @quickly
    @given(st.integers(0, 48))
    def test_a_head_that_is_not_there_whole_is_none(self, size: int):
        data = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nx: yyyyyy\r\n\r\n"
        assert parse_head(data[:size]) is None

    def test_a_head_that_does_not_end_is_refused(self):
        with pytest.raises(ProtocolError, match="too long"):
            parse_head(b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_HEAD_BYTES)

    @pytest.mark.parametrize(
        "line",
        [
            b"no colon",
            b": nameless",
            b" folded: x",
            b"space : x",
            b"x: a\nb: c",
            b"x: a\rb: c",
            b"x: \0",
        ],
    )
    def test_what_is_no_header_is_refused(self, line: bytes):
        with pytest.raises(ProtocolError, match="not a header"):
            parse_head(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n")

    @pytest.mark.parametrize("line", [b"", b"HTTP/2 200", b"HTTP/1.1 20", b"HTTP/1.1 abc", b"SSH"])
    def test_what_is_no_status_line_is_refused(self, line: bytes):
        with pytest.raises(ProtocolError, match=r"not an HTTP/1\.1 answer"):
            parse_head(line + b"\r\n\r\n")

    @pytest.mark.parametrize("value", [b"-1", b"1, 1", b"x", b"", b"9" * 19])
    def test_a_length_that_is_none_is_refused(self, value: bytes):
        with pytest.raises(ProtocolError, match="content-length"):
            _ = Head(200, ((b"content-length", value),)).content_length

    def test_two_different_lengths_are_refused(self):
        with pytest.raises(ProtocolError, match="content-length"):
            _ = Head(200, ((b"content-length", b"1"), (b"content-length", b"2"))).content_length

    def test_chunks_and_a_length_are_refused(self):
        both = ((b"transfer-encoding", b"chunked"), (b"content-length", b"2"))
        with pytest.raises(ProtocolError, match="transfer-encoding"):
            _ = Head(200, both).is_chunked

    def test_another_transfer_coding_is_refused(self):
        with pytest.raises(ProtocolError, match="transfer-encoding"):
            _ = Head(200, ((b"transfer-encoding", b"gzip, chunked"),)).is_chunked

    @pytest.mark.parametrize(
        ("version", "connection", "stays"),
        [
            (b"HTTP/1.1", b"", True),
            (b"HTTP/1.1", b"Close", False),
            (b"HTTP/1.0", b"", False),
            (b"HTTP/1.0", b"Keep-Alive", True),
        ],
        ids=["1.1", "1.1 close", "1.0", "1.0 keep-alive"],
    )
    def test_whether_the_connection_stays(self, version: bytes, connection: bytes, stays: bool):
        headers = ((b"connection", connection), (b"content-length", b"0"))
        assert Head(200, headers, version).keeps_alive is stays


@quickly
@given(contents)
def test_payload_takes_the_framing_off(parts: list[bytes]):
    assert payload(b"".join(map(chunk, parts))) == b"".join(parts)
