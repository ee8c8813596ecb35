"""A trace that is not one: a single line with file, line and repair."""

import gzip
import random
from pathlib import Path

import pytest

from viisim.errors import InputError
from viisim.workload.trace_file import read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD_AZURE = "2023-11-16 18:15:46.6805900,374,44\n"
GOOD_MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'


def complaint(folder: Path, content: bytes) -> str:
    """The error of reading `content`, without the folder."""
    path = folder / "trace"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_trace(path)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("2023-11-16 18:15:46,374", "2 cells under 3 columns; complete or delete the row"),
        ("2023-11-16 18:15:46,374,44,1", "4 cells under 3 columns"),
        ("2023-11-16 18:15:46,many,44", "`ContextTokens` is 'many'; it must be a whole number"),
        ("2023-11-16 18:15:46,3.5,44", "`ContextTokens` is '3.5'"),
        ("2023-11-16 18:15:46,,44", "`ContextTokens` is ''"),
        ("2023-11-16 18:15:46,0,44", "`ContextTokens` is 0; it must be a whole number from 1"),
        ("2023-11-16 18:15:46,374,-44", "`GeneratedTokens` is '-44'; it must be a whole number"),
        ("2023-11-16 18:15:46,374,99999999999", "`GeneratedTokens` is 99999999999"),
        (f"2023-11-16 18:15:46,374,{'9' * 5000}", "`GeneratedTokens` is '999"),
        ("yesterday,374,44", "`TIMESTAMP` is 'yesterday'; write it as YYYY-MM-DD HH:MM:SS.fffffff"),
        ("2023-13-16 18:15:46,374,44", "`TIMESTAMP` is '2023-13-16 18:15:46'"),
        ("9999-01-01 00:00:00,374,44", "`TIMESTAMP` is '9999-01-01 00:00:00'"),
        ("2023-11-16 18:15:46+99:00,374,44", "`TIMESTAMP` is '2023-11-16 18:15:46+99:00'"),
        (f'"{"x" * 200_000}",374,44', "field larger than field limit"),
    ],
)
def test_a_broken_azure_row_is_named_by_its_line(tmp_path: Path, row: str, expected: str):
    text = HEADER + GOOD_AZURE + row + "\n" + GOOD_AZURE
    assert complaint(tmp_path, text.encode()).startswith(f"trace:3: {expected}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "not a JSON object; correct or delete the row"),
        ("[1, 2]", "not a JSON object"),
        ("7", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (GOOD_MOONCAKE.replace("output_length", "out"), "`output_length` missing; a Mooncake row"),
        (GOOD_MOONCAKE.replace("600", '"600"'), "`input_length` is '600'; it must be"),
        (GOOD_MOONCAKE.replace("600", "true"), "`input_length` is True"),
        (
            GOOD_MOONCAKE.replace("600", "0"),
            "`input_length` is 0; it must be a whole number from 1",
        ),
        (GOOD_MOONCAKE.replace("5,", "-5,"), "`output_length` is -5"),
        (GOOD_MOONCAKE.replace("5,", "null,"), "`output_length` is None"),
        (GOOD_MOONCAKE.replace(" 0,", " -1,"), "`timestamp` is -1; it must be milliseconds from 0"),
        (GOOD_MOONCAKE.replace(" 0,", " NaN,"), "`timestamp` is nan"),
        (GOOD_MOONCAKE.replace(" 0,", ' "0",'), "`timestamp` is '0'"),
        (GOOD_MOONCAKE.replace(" 0,", f" {10**30},"), "`timestamp` is 1000"),
        (GOOD_MOONCAKE.replace("[1, 2]", "[1]"), "`hash_ids` must be a list of 2, one for each"),
        (GOOD_MOONCAKE.replace("[1, 2]", "12"), "`hash_ids` must be a list of 2"),
        (GOOD_MOONCAKE.replace("[1, 2]", '[1, "b"]'), "`hash_ids` holds 'b'; use whole numbers"),
        (GOOD_MOONCAKE.replace("[1, 2]", "[1, -2]"), "`hash_ids` holds -2"),
        (GOOD_MOONCAKE.replace("[1, 2]", f"[1, {2**63}]"), "`hash_ids` holds 92233"),
    ],
)
def test_a_broken_mooncake_row_is_named_by_its_line(tmp_path: Path, row: str, expected: str):
    text = GOOD_MOONCAKE + GOOD_MOONCAKE + row.strip() + "\n" + GOOD_MOONCAKE
    assert complaint(tmp_path, text.encode()).startswith(f"trace:3: {expected}")


def test_blank_lines_count_when_a_line_is_named(tmp_path: Path):
    text = "\n" + GOOD_MOONCAKE + "\n{}\n"
    assert complaint(tmp_path, text.encode()).startswith("trace:4: ")


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("time,in,out", "known are azure, burstgpt, guidellm, "),
        ("TIMESTAMP,ContextTokens", "azure needs GeneratedTokens too"),
        ("Timestamp,Model,Request tokens", "burstgpt needs Response tokens too"),
        ("hello", "known are azure"),
        ("[]", "known are azure"),
        ('{"chat": 1}', "known are azure"),
        ('{"sent_s": 1, "prompt_tokens": 3}', "viisim_requests needs output_tokens too"),
    ],
)
def test_a_file_of_another_kind_says_what_is_closest(tmp_path: Path, header: str, hint: str):
    message = complaint(tmp_path, f"\n{header}\n1,2,3\n".encode())
    assert message.startswith("trace:2: no known trace has the ")
    assert hint in message


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes):
    assert "the file is empty; give a trace as CSV or JSON lines" in complaint(tmp_path, content)


def test_a_header_without_rows_is_named(tmp_path: Path):
    message = complaint(tmp_path, HEADER.encode())
    assert message == "trace:1: there are no requests; give a trace with at least one row"


def azure_gz(rows: int = 5000) -> bytes:
    draw = random.Random(1)
    lines = [f"2023-11-16 18:15:46.{draw.randrange(10**7):07},37,44\n" for _ in range(rows)]
    return gzip.compress((HEADER + "".join(lines)).encode())


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_cut_gz_is_named_with_the_line_it_breaks_at(tmp_path: Path, kept: float):
    whole = azure_gz()
    message = complaint(tmp_path, whole[: int(len(whole) * kept)])
    name, line, rest = message.split(":", 2)
    assert (name, rest) == ("trace", " the gzip data are cut or damaged; fetch it again")
    assert 1 <= int(line) <= 5002


def test_a_damaged_gz_is_named(tmp_path: Path):
    damaged = bytearray(azure_gz())
    damaged[len(damaged) // 2] ^= 0xFF
    damaged[-6] ^= 0xFF
    assert complaint(tmp_path, bytes(damaged)).startswith("trace:")


def test_what_is_not_text_is_named(tmp_path: Path):
    message = complaint(tmp_path, bytes(range(128, 256)) * 4)
    assert message == "trace:1: not UTF-8 text; give a trace as CSV or JSON lines"


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"/none: No such file or directory; give a readable"):
        read_trace(tmp_path / "none")


def test_a_folder_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"Is a directory; give a readable trace file or run"):
        read_trace(tmp_path)


def test_skipped_rows_are_counted_and_the_first_is_kept(tmp_path: Path):
    path = tmp_path / "trace"
    broken = GOOD_AZURE.replace("374", "many")
    path.write_text(HEADER + broken + GOOD_AZURE + "1,2\n" + "\n" + GOOD_AZURE)
    trace = read_trace(path, skip_bad=True)
    assert (len(trace), trace.skipped_rows) == (2, 2)
    assert trace.first_bad.startswith("2: `ContextTokens` is 'many'; it must be")


def test_broken_rows_at_the_beginning_can_be_skipped(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text("{\n" + "[1]\n" + GOOD_MOONCAKE)
    trace = read_trace(path, skip_bad=True)
    assert (trace.format, len(trace), trace.skipped_rows) == ("mooncake", 1, 2)


def test_what_the_csv_reader_refuses_can_be_skipped(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(HEADER + f'"{"x" * 200_000}",374,44\n' + GOOD_AZURE)
    trace = read_trace(path, skip_bad=True)
    assert (len(trace), trace.skipped_rows) == (1, 1)
    assert trace.first_bad.startswith("2: field larger than field limit")


def test_a_trace_whose_rows_are_all_skipped_is_an_error(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(HEADER + GOOD_AZURE.replace("374", "0"))
    with pytest.raises(InputError, match=r"none of 1 requests can be used; line 2: `ContextTok"):
        read_trace(path, skip_bad=True)


def test_a_whole_trace_skips_nothing(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(HEADER + GOOD_AZURE)
    trace = read_trace(path, skip_bad=True)
    assert (trace.skipped_rows, trace.first_bad) == (0, "")


def test_a_servegen_pool_is_named_with_the_way_to_use_it(tmp_path: Path):
    message = complaint(tmp_path, b'{"pool": "language/m-small", "clients": []}')
    assert "generate a workload from it with `kind: servegen`" in message
