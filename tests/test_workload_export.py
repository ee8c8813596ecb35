"""Traces written for other tools: what comes back, and what is said to be lost."""

import gzip
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from tests.small_experiment import small_file
from viisim.cli import app
from viisim.errors import InputError
from viisim.workload.export import EXPORTERS, export_trace
from viisim.workload.trace import earliest, next_turns, words_of
from viisim.workload.trace_file import TraceColumns, Words, read_trace

ALL = slice(None)
MS = 1_000_000


def columns(arrived_ns: list[int], prompts: list[int], **changes: Any) -> TraceColumns:
    """A trace as an importer would give it, without anything but arrivals and lengths."""
    rows = len(arrived_ns)
    nothing = np.zeros(rows, dtype=np.int64)
    plain: dict[str, Any] = {
        "format": "made here",
        "arrived_ns": np.array(arrived_ns),
        "prompt_tokens": np.array(prompts),
        "output_tokens": np.arange(rows),
        "block_tokens": 0,
        "first_block": nothing,
        "block_count": nothing,
        "block_ids": np.array([], dtype=np.int64),
        "piece_tokens": None,
        "think_ns": np.full(rows, -1),
        "priority": nothing,
        "words": {},
        "skipped_rows": 0,
        "first_bad": "",
    }
    return TraceColumns(**plain | changes)


def with_blocks(prompts: list[int], block_tokens: int, ids: list[list[int]]) -> TraceColumns:
    counts = [len(row) for row in ids]
    return columns(
        [0] * len(prompts),
        prompts,
        block_tokens=block_tokens,
        first_block=np.array([0, *accumulate(counts)][:-1]),
        block_count=np.array(counts),
        block_ids=np.array([block for row in ids for block in row], dtype=np.int64),
    )


def sessions(*codes: int) -> dict[str, Words]:
    return {"session": Words(np.array(codes), ("ann", "bob"))}


def converted(trace: TraceColumns, target: str, folder: Path) -> tuple[TraceColumns, list[str]]:
    """The trace read again after it was written, and what was said to be lost."""
    file = folder / "converted"
    losses = export_trace(trace, target, file)
    return read_trace(file), losses


def lengths_of(trace: TraceColumns) -> list[tuple[int, int]]:
    return list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def sessions_of(trace: TraceColumns) -> list[str]:
    named = zip(range(len(trace)), words_of(trace, "session", ALL), strict=False)
    return [session for _, session in named]


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For properties, which write the same file again and again."""
    return tmp_path_factory.mktemp("exported")


# What comes back

WEEK_MS = 7 * 24 * 3600 * 1000


@st.composite
def plain_traces(draw: st.DrawFn) -> TraceColumns:
    """Arrivals and lengths, at times that every format can hold."""
    gaps = draw(st.lists(st.integers(0, WEEK_MS // 20), max_size=20))
    arrived_ns = [ms * MS for ms in accumulate([0, *gaps])]
    prompt = st.integers(1, 3000)
    prompts = draw(st.lists(prompt, min_size=len(arrived_ns), max_size=len(arrived_ns)))
    return columns(arrived_ns, prompts)


@pytest.mark.parametrize("target", EXPORTERS)
@given(trace=plain_traces())
def test_arrivals_and_lengths_come_back_from_every_format(
    target: str, trace: TraceColumns, folder: Path
) -> None:
    again, losses = converted(trace, target, folder)
    assert again.format == target
    assert again.arrived_ns.tolist() == trace.arrived_ns.tolist()
    assert lengths_of(again) == lengths_of(trace)
    assert losses == []


@st.composite
def session_traces(draw: st.DrawFn) -> TraceColumns:
    """Turns of two sessions and of none, with pauses where a session has a turn before."""
    trace = draw(plain_traces())
    rows = len(trace)
    codes = draw(st.lists(st.integers(-1, 1), min_size=rows, max_size=rows))
    pauses = draw(st.lists(st.integers(-1, 9), min_size=rows, max_size=rows))
    think_ns = [
        pause * MS if pause >= 0 and code >= 0 and code in codes[:row] else -1
        for row, (code, pause) in enumerate(zip(codes, pauses, strict=True))
    ]
    priority = draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows))
    changes = {"words": sessions(*codes), "think_ns": np.array(think_ns)}
    return columns(
        trace.arrived_ns.tolist(),
        trace.prompt_tokens.tolist(),
        priority=np.array(priority),
        **changes,
    )


@given(trace=session_traces())
def test_sessions_pauses_and_priorities_come_back_from_mooncake(
    trace: TraceColumns, folder: Path
) -> None:
    again, _ = converted(trace, "mooncake", folder)
    assert again.arrived_ns.tolist() == trace.arrived_ns.tolist()
    assert sessions_of(again) == sessions_of(trace)
    assert again.think_ns.tolist() == trace.think_ns.tolist()
    assert again.priority.tolist() == trace.priority.tolist()


def chains_of(trace: TraceColumns) -> list[list[tuple[int, int, int]]]:
    """Turns that wait for one another, as (prompt, output, pause); in no order."""
    following = next_turns(trace).tolist()
    rows = [
        (prompt, output, pause)
        for (prompt, output), pause in zip(lengths_of(trace), trace.think_ns.tolist(), strict=True)
    ]
    chains = []
    for first in set(range(len(trace))) - set(following):
        chain, turn = [], first
        while turn >= 0:
            chain.append(rows[turn])
            turn = following[turn]
        chains.append(chain)
    return sorted(chains)


@given(trace=session_traces())
def test_chains_of_turns_come_back_from_llmservingsim(trace: TraceColumns, folder: Path) -> None:
    again, _ = converted(trace, "llmservingsim", folder)
    assert chains_of(again) == chains_of(trace)


@st.composite
def block_traces(draw: st.DrawFn) -> TraceColumns:
    """Prompts of few kinds of content, in blocks of some size, partial tails with an id or not."""
    block_tokens = draw(st.sampled_from([16, 64, 256, 512]))
    has_tails = draw(st.booleans())
    contents = st.text("ab", min_size=1, max_size=8)
    numbers: dict[str, int] = {}
    prompts, ids = [], []
    for content in draw(st.lists(contents, min_size=1, max_size=6)):
        tail_tokens = draw(st.sampled_from([0, 5]))
        known = [content[: end + 1] for end in range(len(content))]
        if has_tails and tail_tokens:
            known.append(content + "+")
        prompts.append(len(content) * block_tokens + tail_tokens)
        ids.append([numbers.setdefault(prefix, len(numbers)) for prefix in known])
    return with_blocks(prompts, block_tokens, ids)


@given(trace=block_traces())
def test_whole_blocks_of_512_are_shared_as_before(trace: TraceColumns, folder: Path) -> None:
    again, _ = converted(trace, "mooncake", folder)
    for one in range(len(trace)):
        for other in range(one):
            before = shared_tokens(trace, one, other)
            after = shared_tokens(again, one, other)
            same = before == trace.prompt_tokens[one] == trace.prompt_tokens[other]
            assert after == (before if same else before // 512 * 512)


def shared_tokens(trace: TraceColumns, one: int, other: int) -> int:
    shared = 0
    for piece, same in zip(trace.pieces(one), trace.pieces(other), strict=False):
        if piece != same:
            break
        shared += piece[1]
    return shared


def test_blocks_of_512_keep_their_ids(tmp_path: Path) -> None:
    trace = with_blocks([1100, 512], 512, [[40, 7, 9], [40]])
    again, losses = converted(trace, "mooncake", tmp_path)
    assert [again.blocks(row) for row in range(2)] == [[40, 7, 9], [40]]
    assert losses == []


def test_pieces_with_lengths_of_their_own_become_blocks(tmp_path: Path) -> None:
    """Two documents in the same order share their blocks up to the end of the second."""
    ids = [[1, 2, 3], [1, 2, 4]]
    trace = with_blocks([1700, 1700], 0, ids)
    pieces = {"piece_tokens": np.array([300, 1000, 400] * 2)}
    trace = columns([0, 0], [1700, 1700], **fields_of_blocks(trace) | pieces)
    again, losses = converted(trace, "mooncake", tmp_path)
    assert shared_tokens(again, 0, 1) == 1024
    assert losses == [
        "shared prefixes: pieces become blocks of 512; what is shared for less than a whole one "
        "is lost"
    ]


def fields_of_blocks(trace: TraceColumns) -> dict[str, Any]:
    return {
        name: getattr(trace, name)
        for name in ("first_block", "block_count", "block_ids", "block_tokens")
    }


# Units and forms


def test_a_mooncake_row_has_milliseconds_and_started_blocks(tmp_path: Path) -> None:
    trace = columns(
        [0, 1500 * MS], [10, 513], words=sessions(0, 0), think_ns=np.array([-1, 7 * MS])
    )
    export_trace(trace, "mooncake", tmp_path / "t")
    first, second = json_rows(tmp_path / "t")
    assert first == {
        "timestamp": 0,
        "input_length": 10,
        "output_length": 0,
        "hash_ids": [0],
        "session_id": "ann",
    }
    assert (second["timestamp"], second["delay"], second["hash_ids"]) == (1500, 7, [1, 2])


def test_a_pause_belongs_to_the_turn_before_it_in_llmservingsim(tmp_path: Path) -> None:
    trace = columns([0, 5, 9], [1, 2, 3], words=sessions(1, -1, 1), think_ns=np.array([-1, -1, 40]))
    export_trace(trace, "llmservingsim", tmp_path / "t")
    assert list(json_rows(tmp_path / "t")) == [
        {
            "session_id": "bob",
            "arrival_time_ns": 0,
            "sub_requests": [
                {"input_toks": 1, "output_toks": 0, "tool_duration_ns": 40},
                {"input_toks": 3, "output_toks": 2, "tool_duration_ns": 0},
            ],
        },
        {"arrival_time_ns": 5, "input_toks": 2, "output_toks": 1},
    ]


@pytest.mark.parametrize(
    ("target", "row"),
    [
        ("vidur", "86401.000000100,7,1"),
        ("azure", "2000-01-02 00:00:01.0000001,7,1"),
        ("splitwise", "1,2,0,86401.000000100,1,7,1"),
    ],
)
def test_a_csv_row_keeps_every_digit(target: str, row: str, tmp_path: Path) -> None:
    export_trace(columns([0, 86_401_000_000_100], [5, 7]), target, tmp_path / "t")
    assert (tmp_path / "t").read_text().splitlines()[2] == row


# What is lost

RICH = columns(
    [0, 1_000_050, 3_000_000],
    [20, 20, 20],
    block_tokens=16,
    first_block=np.array([0, 1, 2]),
    block_count=np.array([1, 1, 1]),
    block_ids=np.array([1, 1, 1]),
    think_ns=np.array([-1, 1_500, -1]),
    priority=np.array([0, 0, 2]),
    words=sessions(0, 0, 0)
    | {
        "tenant": Words(np.array([-1, 0, 0]), ("t",)),
        "traffic_class": Words(np.array([0, -1, -1]), ("c",)),
        "model": Words(np.array([0, 0, 0]), ("m",)),
    },
)

_UNSAID = {
    "prefixes": "shared prefixes: left out of {} (3 of 3 requests)",
    "pauses": "pauses before next turns: left out of {} (1 of 3 requests)",
    "priorities": "priorities: left out of {} (1 of 3 requests)",
    "sessions": "sessions: left out of {} (3 of 3 requests)",
    "tenants": "tenants: left out of {} (2 of 3 requests)",
    "classes": "traffic classes: left out of {} (1 of 3 requests)",
    "models": "models: left out of {} (3 of 3 requests)",
}


@pytest.mark.parametrize(
    ("target", "title"), [("vidur", "vidur CSV"), ("splitwise", "splitwise-sim CSV")]
)
def test_a_csv_says_everything_that_it_leaves_out(target: str, title: str, tmp_path: Path) -> None:
    losses = export_trace(RICH, target, tmp_path / "t")
    assert losses == [line.format(title) for line in _UNSAID.values()]


def test_azure_rounds_to_its_seventh_digit_and_says_so(tmp_path: Path) -> None:
    again, losses = converted(RICH, "azure", tmp_path)
    assert again.arrived_ns.tolist() == [0, 1_000_100, 3_000_000]
    assert losses[0] == "arrivals: rounded to 100 ns (1 of 3 requests)"


def test_mooncake_says_what_milliseconds_and_its_blocks_lose(tmp_path: Path) -> None:
    assert export_trace(RICH, "mooncake", tmp_path / "t") == [
        "arrivals: rounded to 1,000,000 ns (1 of 3 requests)",
        *(_UNSAID[fact].format("Mooncake JSONL") for fact in ("tenants", "classes", "models")),
        "shared prefixes: blocks of 16 tokens become blocks of 512; what is shared for less than a "
        "whole one is lost",
        "sessions: later turns keep their times, but Dynamo lets them wait for the answer before "
        "(1 of 3 requests)",
        "pauses before next turns: rounded to 1,000,000 ns (1 of 3 requests)",
    ]


def test_llmservingsim_says_which_arrivals_and_names_it_loses(tmp_path: Path) -> None:
    trace = columns(
        [0, 1, 2, 2],
        [1, 2, 3, 4],
        words=sessions(0, 0, 0, 0),
        think_ns=np.array([-1, 9, -1, 9]),
    )
    again, losses = converted(trace, "llmservingsim", tmp_path)
    assert losses == [
        "arrivals: later turns keep only their pauses (1 of 4 requests)",
        "sessions: 1 that begin again become NAME#2 and so on",
    ]
    assert sessions_of(again) == ["ann", "ann", "ann#2", "ann#2"]


# Files


def test_a_name_in_gz_is_packed_and_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv.gz", tmp_path / "other.csv.gz"
    for file in (one, other):
        export_trace(RICH, "vidur", file)
    assert one.read_bytes() == other.read_bytes()
    assert gzip.decompress(one.read_bytes()).startswith(b"arrived_at,")


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "is_a_folder"
    target.mkdir()
    with pytest.raises(InputError, match=r"is_a_folder: .*; give a path that can be written"):
        export_trace(RICH, "vidur", target)
    assert list(tmp_path.iterdir()) == [target]


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'vidurr'\. Did you mean 'vidur'"):
        export_trace(RICH, "vidurr", tmp_path / "t")


# The command


def viisim(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n"


def test_convert_says_what_was_written_and_lost(tmp_path: Path) -> None:
    export_trace(RICH, "mooncake", tmp_path / "from")
    answer = viisim("convert", tmp_path / "from", tmp_path / "to", "--to", "vidur", "--limit", 2)
    assert answer.exit_code == 0
    assert answer.output.splitlines() == [
        f"written: 2 requests to {tmp_path / 'to'}",
        "lost: shared prefixes: left out of vidur CSV (2 of 2 requests)",
        "lost: pauses before next turns: left out of vidur CSV (1 of 2 requests)",
        "lost: sessions: left out of vidur CSV (2 of 2 requests)",
    ]
    assert len(read_trace(tmp_path / "to")) == 2


def test_convert_counts_the_rows_that_it_skips(tmp_path: Path) -> None:
    (tmp_path / "from").write_text(AZURE + "2023-11-16 18:15:47,many,4\n")
    answer = viisim("convert", tmp_path / "from", tmp_path / "to", "--to", "vidur", "--skip-bad")
    written, left_out = answer.output.splitlines()
    assert written == f"written: 1 requests to {tmp_path / 'to'}"
    assert left_out.startswith("left out: 1 rows, the first at 3: `ContextTokens` is 'many'")


def test_convert_replaces_nothing_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "from").write_text(AZURE)
    (tmp_path / "to").write_text("precious")
    arguments = ("convert", tmp_path / "from", tmp_path / "to", "--to", "vidur")
    refused = viisim(*arguments)
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception).endswith(
        "to: is there already; give another name, or --force to replace it"
    )
    assert (tmp_path / "to").read_text() == "precious"
    assert viisim(*arguments, "--force").exit_code == 0
    assert (tmp_path / "to").read_text().startswith("arrived_at,")


def test_a_limit_below_1_is_refused(tmp_path: Path) -> None:
    (tmp_path / "from").write_text(AZURE)
    answer = viisim("convert", tmp_path / "from", tmp_path / "to", "--to", "vidur", "--limit", 0)
    assert "--limit: 0 is not possible" in str(answer.exception)


def test_info_counts_the_rows_that_it_skips(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(AZURE + "2023-11-16 18:15:47,many,4\n")
    assert "ContextTokens" in str(viisim("info", tmp_path / "trace").exception)
    answer = viisim("info", tmp_path / "trace", "--skip-bad")
    assert re.search(r"left out +1 rows, the first at 3: `ContextTokens`", answer.output)
    figures = json.loads(viisim("info", tmp_path / "trace", "--skip-bad", "--json").output)
    assert (figures["requests"], figures["skipped_rows"]) == (1, 1)


def test_info_shows_sessions_and_turns_that_wait(tmp_path: Path) -> None:
    export_trace(RICH, "mooncake", tmp_path / "trace")
    out = viisim("info", tmp_path / "trace").output
    assert re.search(r"sessions +1, of several turns 1 ", out)
    assert re.search(r"turns +1 wait for the answer before ", out)


def test_a_run_and_its_journal_are_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_file(tmp_path)
    CliRunner().invoke(app, ["run", "small.yaml", "--no-plots", "--journal"])
    for source in ("runs/small", "runs/small/journals/seed-1.jsonl"):
        answer = viisim("convert", source, "again.csv", "--to", "vidur", "--force")
        assert answer.output.startswith("written: 40 requests to again.csv\n")


# The real files

AZURE_FILE = "data/traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
MOONCAKE_FILE = "data/traces/mooncake_fast25/conversation_trace.jsonl.gz"


@pytest.mark.parametrize("target", ["vidur", "azure", "splitwise", "llmservingsim"])
def test_the_azure_trace_passes_through_other_formats(
    target: str, shared: Path, tmp_path: Path
) -> None:
    trace = earliest(read_trace(shared / AZURE_FILE), 2000)
    again, losses = converted(trace, target, tmp_path)
    assert again.arrived_ns.tolist() == trace.arrived_ns.tolist()
    assert lengths_of(again) == lengths_of(trace)
    assert losses == []


def test_the_mooncake_trace_comes_back_whole(shared: Path, tmp_path: Path) -> None:
    trace = earliest(read_trace(shared / MOONCAKE_FILE), 2000)
    again, losses = converted(trace, "mooncake", tmp_path)
    assert again.arrived_ns.tolist() == trace.arrived_ns.tolist()
    assert lengths_of(again) == lengths_of(trace)
    assert all(again.blocks(row) == trace.blocks(row) for row in range(2000))
    assert losses == []
