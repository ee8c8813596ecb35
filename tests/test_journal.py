"""Journals: the codec, checkpoints, rotation, damage, and replay to the first difference."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.core import SchedulerCore
from policies.interface import (
    Action,
    Arrived,
    ConfigChanged,
    Dispatch,
    Event,
    Finished,
    Limits,
    Policy,
    PolicyError,
    ReplicaChanged,
)
from policies.journal import (
    Handled,
    JournalError,
    Segment,
    checkpoint,
    decode_action,
    decode_event,
    encode_action,
    encode_event,
    handled_line,
    parse_line,
    restore,
    segment_line,
)
from policies.least_loaded import LeastLoaded
from policies.registry import make_policy, policy_names
from policies.testing import request
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.errors import InputError
from viisim.journal import JournalReader, JournalWriter, replay_journal
from viisim.simulation import ReplicaSpec, Simulation
from viisim.workload.request import Request

HEAD = Segment({"name": "power_of_two"}, seed=7)


SPECS = st.none() | st.fixed_dictionaries({"name": st.text()}, optional={"threshold": st.floats()})
"""Policies as an experiment names them."""


def any_of(kind: type) -> st.SearchStrategy[Any]:
    """Instances of a dataclass with every field drawn, those with defaults too."""
    hints = get_type_hints(kind)

    def drawn(name: str) -> st.SearchStrategy[Any]:
        if name == "policy":
            return SPECS
        return any_of(hints[name]) if is_dataclass(hints[name]) else st.from_type(hints[name])

    return st.builds(kind, **{field.name: drawn(field.name) for field in fields(kind)})


any_event = st.one_of(*map(any_of, get_args(Event)))
any_action = st.one_of(*map(any_of, get_args(Action)))


def events() -> Iterator[Event]:
    """Forty requests over three replicas, each finished two arrivals later."""
    for name in ("r0", "r1", "r2"):
        yield ReplicaChanged(0.0, name, "ready", model="m")
    for index in range(40):
        now_s = 0.1 * (index + 1)
        yield Arrived(now_s, request(id=f"q{index}", arrived_s=now_s, prompt_tokens=10 * index))
        if index >= 2:
            yield Finished(now_s, f"q{index - 2}", 1, output_tokens=5)


def write(
    path: Path,
    segment_events: int | None = None,
    head: Segment = HEAD,
    story: Iterable[Event] | None = None,
) -> Path:
    """Journal one run of the events above, or of a story."""
    core = head.make_core()
    rotated = core if segment_events else None
    with JournalWriter(path, head, core=rotated, segment_events=segment_events) as journal:
        for event in story or events():
            journal.record(event, core.handle(event))
    return path


def edit(path: Path, number: int, change: Callable[[str], str]) -> None:
    """Change one line, counted from 1."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    path.write_text("".join(lines))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return write(tmp_path / "journal.jsonl")


class TestCodec:
    # repr also tells tuples from lists, 1 from 1.0, and finds nan equal to itself.
    @given(any_event)
    def test_events_survive_json_exactly(self, event: Event):
        restored = decode_event(json.loads(json.dumps(encode_event(event))))
        assert repr(restored) == repr(event)

    @given(any_action)
    def test_actions_survive_json_exactly(self, action: Action):
        restored = decode_action(json.loads(json.dumps(encode_action(action))))
        assert repr(restored) == repr(action)

    @given(any_event, st.lists(any_action, max_size=3))
    def test_a_line_says_what_was_handled(self, event: Event, actions: list[Action]):
        assert repr(parse_line(handled_line(event, actions))) == repr(
            Handled(event, tuple(actions))
        )

    def test_numpy_numbers_become_plain_ones(self):
        line = handled_line(Finished(1.0, "q", 1, np.int64(5)), [Dispatch("q", "r", np.int32(2))])
        assert parse_line(line) == Handled(Finished(1.0, "q", 1, 5), (Dispatch("q", "r", 2),))

    def test_a_segment_line_survives(self):
        segment = Segment({"name": "random"}, 3, Limits(max_queued=5))
        assert parse_line(segment_line(segment)) == segment

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ("[]", "neither a segment nor an event"),
            ('{"event": {"event": "Arived"}, "actions": []}', "unknown event 'Arived'"),
            ('{"event": {"event": "Tick"}, "actions": []}', "not a Tick"),
            ('{"event": {"event": "Tick", "now_s": 1, "x": 2}, "actions": []}', "not a Tick"),
            ('{"event": {"event": "Tick", "now_s": 1}, "actions": [3]}', "not an action: 3"),
            ('{"segment": {"version": 99}}', "journal format 99"),
            ('{"segment": {"version": 1, "seed": 1}}', "needs policy, seed, limits"),
        ],
    )
    def test_a_line_it_cannot_read_is_one_clear_error(self, line: str, message: str):
        with pytest.raises(JournalError, match=message):
            parse_line(line)


class TestCheckpoint:
    def test_a_restored_core_goes_on_as_the_original(self):
        original = HEAD.make_core()
        story = list(events())
        for event in story[:20]:
            original.handle(event)
        restored = restore(checkpoint(original))
        assert [restored.handle(e) for e in story[20:]] == [original.handle(e) for e in story[20:]]

    def test_a_policy_that_cannot_be_pickled_is_its_authors_error(self):
        policy = LeastLoaded()
        policy.key = lambda replica: replica.id  # type: ignore[attr-defined]
        with pytest.raises(PolicyError, match="LeastLoaded cannot be checkpointed"):
            checkpoint(SchedulerCore(policy))

    def test_a_damaged_checkpoint_is_an_error(self):
        with pytest.raises(JournalError, match="cannot be loaded"):
            restore("AAAA")


class TestReplay:
    def test_a_journal_replays_with_zero_differences(self, journal: Path):
        report = replay_journal(journal)
        assert (report.equal, report.segments, report.events, report.actions) == (True, 1, 81, 40)

    def test_the_report_reads_as_a_sentence(self, journal: Path):
        assert str(replay_journal(journal)) == (
            "journal.jsonl: 81 events, 40 actions, segments: 1: replayed with zero differences"
        )

    def test_a_falsified_action_is_found_with_its_line(self, journal: Path):
        def falsify(line: str) -> str:
            handled = parse_line(line)
            assert isinstance(handled, Handled)
            (dispatch,) = handled.actions
            return handled_line(handled.event, [replace(dispatch, replica_id="r9")]) + "\n"

        edit(journal, 7, falsify)
        report = replay_journal(journal)
        assert (report.line, report.equal) == (7, False)
        assert report.to_dict()["difference"]["recorded"][0]["replica_id"] == "r9"

    def test_a_falsified_event_that_the_core_refuses_is_a_difference(self, journal: Path):
        edit(journal, 20, lambda line: line.replace('"now_s":', '"now_s":-', 1))
        report = replay_journal(journal)
        assert report.line == 20
        assert "time went back" in str(report)

    def test_another_seed_is_noticed(self, journal: Path):
        edit(journal, 1, lambda line: line.replace('"seed":7', '"seed":8'))
        assert not replay_journal(journal).equal

    def test_changed_limits_are_part_of_the_record(self, tmp_path: Path):
        story = [ConfigChanged(0.0, Limits(max_queued=0)), Arrived(1.0, request())]
        head = Segment(LeastLoaded)
        report = replay_journal(write(tmp_path / "journal.jsonl", head=head, story=story))
        assert (report.equal, report.actions) == (True, 1)

    def test_a_gz_journal_is_read_transparently(self, journal: Path):
        packed = journal.with_suffix(".jsonl.gz")
        packed.write_bytes(gzip.compress(journal.read_bytes()))
        assert replay_journal(packed).equal


@pytest.mark.parametrize("name", policy_names())
def test_a_simulated_runs_journal_replays_with_zero_differences(name: str, tmp_path: Path):
    head = Segment(name, seed=3, limits=Limits(queue_timeout_s=5.0))
    with JournalWriter(tmp_path / "journal.jsonl", head) as journal:
        simulate(head, journal)
    report = replay_journal(tmp_path / "journal.jsonl")
    assert str(report.difference) == "None"
    assert report.actions >= 200


def simulate(head: Segment, journal: JournalWriter) -> None:
    """Two hundred requests over three small simulated replicas."""
    settings = SchedulerSettings(num_kv_blocks=300, max_num_seqs=8)
    step_time = StepTime([DecodePoint(1, 0.01, 0.0)], 8, 0.01, 5e-5)
    replicas = [ReplicaSpec(f"r{i}", "m", (f"gpu{i}",), settings, step_time) for i in range(3)]
    arrivals = (
        Request(
            request(
                id=f"q{i}", arrived_s=i / 8, prompt_tokens=50 * (i % 20 + 1), streamed=i % 2 > 0
            ),
            arrived_ns=i * 125_000_000,
            prompt=((i, 50 * (i % 20 + 1)),),
            output_tokens=1 + i % 50,
        )
        for i in range(200)
    )
    policy = make_policy(head.policy)
    Simulation(
        replicas, policy, arrivals, seed=head.seed, limits=head.limits, journal=journal
    ).run()


class TestWriter:
    def test_the_same_run_writes_the_same_bytes(self, tmp_path: Path):
        first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
        assert first.read_bytes() == second.read_bytes()

    def test_every_rotated_file_replays_alone(self, tmp_path: Path):
        write(tmp_path / "journal.jsonl", segment_events=30)
        reports = [replay_journal(path, trust=True) for path in sorted(tmp_path.iterdir())]
        assert [report.equal for report in reports] == [True] * 3
        assert sum(report.events for report in reports) == 81

    def test_rotated_files_in_a_row_are_one_journal(self, tmp_path: Path):
        path = write(tmp_path / "journal.jsonl", segment_events=30)
        parts = [path, tmp_path / "journal.1.jsonl", tmp_path / "journal.2.jsonl"]
        whole = tmp_path / "whole.jsonl"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        report = replay_journal(whole, trust=True)
        assert (report.equal, report.segments, report.events) == (True, 3, 81)

    def test_a_checkpoint_is_loaded_only_when_trusted(self, tmp_path: Path):
        write(tmp_path / "journal.jsonl", segment_events=30)
        with pytest.raises(InputError, match=r"line 1: .*--trust"):
            replay_journal(tmp_path / "journal.1.jsonl")

    def test_an_unbuffered_line_is_on_disk_at_once(self, tmp_path: Path):
        path = tmp_path / "journal.jsonl"
        with JournalWriter(path, Segment("least_loaded"), buffered=False) as journal:
            journal.record(ReplicaChanged(0.0, "r0", "ready", model="m"), [])
            assert replay_journal(path).events == 1

    def test_a_rotated_journal_opens_with_the_limits_of_the_moment(self, tmp_path: Path):
        story = [ConfigChanged(0.0, Limits(max_queued=1)), Arrived(1.0, request())]
        write(tmp_path / "journal.jsonl", segment_events=1, story=story)
        opening = (tmp_path / "journal.1.jsonl").read_text().splitlines()[0]
        assert parse_line(opening).limits == Limits(max_queued=1)

    def test_an_existing_file_is_not_overwritten(self, journal: Path):
        with pytest.raises(InputError, match=r"journal\.jsonl: exists already"):
            write(journal)

    def test_a_missing_folder_is_a_clear_error(self, tmp_path: Path):
        with pytest.raises(InputError, match="cannot write the journal"):
            write(tmp_path / "missing" / "journal.jsonl")

    def test_a_compressed_name_is_refused(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"drop \.gz"):
            write(tmp_path / "journal.jsonl.gz")


class TestDamage:
    def test_a_line_cut_short_by_a_crash_is_left_out(self, journal: Path):
        journal.write_bytes(journal.read_bytes()[:-9])
        report = replay_journal(journal)
        assert (report.equal, report.truncated, report.events) == (True, True, 80)

    def test_a_cut_gz_is_read_as_far_as_it_goes(self, journal: Path):
        packed = journal.with_suffix(".jsonl.gz")
        packed.write_bytes(gzip.compress(journal.read_bytes())[:-40])
        report = replay_journal(packed)
        assert (report.equal, report.truncated) == (True, True)
        assert report.events > 0

    def test_a_broken_line_in_the_middle_names_file_and_line(self, journal: Path):
        edit(journal, 12, lambda line: line[:20] + "\n")
        with pytest.raises(InputError, match=r"journal\.jsonl: line 12: not JSON"):
            replay_journal(journal)

    def test_an_event_before_any_segment_is_an_error(self, journal: Path):
        edit(journal, 1, lambda line: "")
        with pytest.raises(InputError, match="line 1: an event before the first segment"):
            replay_journal(journal)

    def test_an_unknown_policy_is_an_error_with_its_line(self, journal: Path):
        edit(journal, 1, lambda line: line.replace("power_of_two", "power_of_tow"))
        with pytest.raises(InputError, match=r"line 1: unknown policy .* Did you mean"):
            replay_journal(journal)

    def test_an_empty_file_is_an_error(self, tmp_path: Path):
        path = tmp_path / "empty.jsonl"
        path.touch()
        with pytest.raises(InputError, match="no whole line"):
            replay_journal(path)

    @pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz"])
    def test_a_missing_file_is_an_error(self, tmp_path: Path, name: str):
        with pytest.raises(InputError, match="cannot read the journal"):
            replay_journal(tmp_path / name)

    def test_a_gz_that_is_none_is_an_error(self, journal: Path):
        with pytest.raises(InputError, match="cannot read the journal"):
            list(JournalReader(journal.rename(journal.with_suffix(".gz"))))


class Unshipped(Policy):
    """A policy of the user's own."""

    def place(self, request: Any, view: Any) -> Dispatch:
        """Anywhere."""
        return Dispatch(request.id, view.ready(request.model)[0].id)


def test_a_policy_given_as_a_class_is_written_as_module_and_name():
    line = segment_line(Segment(Unshipped))
    assert json.loads(line)["segment"]["policy"] == f"{Unshipped.__module__}:Unshipped"
