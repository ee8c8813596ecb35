"""The conformance harness, and the plain engine that the golden traces prove right."""

import gzip
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.plain_engine import PlainEngine
from viisim.conform import Difference, check_scenario, conform, first_difference, replay
from viisim.errors import InputError
from viisim.golden import (
    STEP_FIELDS,
    GoldenAbort,
    GoldenConfig,
    GoldenRequest,
    Line,
    Scenario,
    golden_files,
    load_scenario,
    scenarios,
)

NOTHING: frozenset[str] = frozenset()


def golden_folder() -> Path:
    """Traces beside this file, else those of the shared data."""
    own = Path(__file__).parent / "golden"
    if own.is_dir():
        return own
    shared = os.environ.get("VIISIM_SHARED", Path(__file__).parents[2] / "shared")
    return Path(shared) / "golden"


def golden_params() -> list[Any]:
    """One parameter a trace; empty, so that pytest skips, where there are none."""
    folder = golden_folder()
    return [
        pytest.param(
            path,
            id=path.name.removesuffix(".jsonl.gz"),
            marks=[pytest.mark.slow] if path.name.startswith("long_") else [],
        )
        for path in (golden_files([folder]) if folder.is_dir() else [])
    ]


@pytest.mark.parametrize("path", golden_params())
def test_plain_engine_reproduces_every_field_of_a_golden_trace(path: Path) -> None:
    outcome = check_scenario(load_scenario(path), PlainEngine, ignored=NOTHING)
    assert outcome.steps > 0
    assert outcome.difference is None, str(outcome)


# --------------------------------------------------------------------------------------
# A small scenario of our own: pressure, prefix hits, aborts in both phases, an idle step


def config(**changes: Any) -> GoldenConfig:
    values: dict[str, Any] = {
        "name": "small",
        "num_blocks": 8,
        "block_size": 4,
        "max_num_active_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "policy": "fcfs",
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "scheduler_reserve_full_isl": True,
        "watermark_blocks": 0,
    }
    return GoldenConfig(**values | changes)


def request(number: int, step: int, prompt_tokens: int, output_tokens: int) -> GoldenRequest:
    """Request `r<number>`; all prompts begin alike."""
    return GoldenRequest(
        id=f"r{number}",
        arrival_step=step,
        arrival_time=number,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        priority=0,
        prompt=((1, prompt_tokens),),
        out_seg=10 + number,
    )


def recorded(scenario: Scenario) -> Scenario:
    """The scenario with the steps that the plain engine does."""
    return replace(scenario, steps=tuple(replay(scenario, PlainEngine(scenario.config))))


def small_scenario() -> Scenario:
    """Every field of a step has a value somewhere; the last line is an idle one."""
    return recorded(
        Scenario(
            name="small",
            config=config(),
            requests=(
                request(0, 0, prompt_tokens=9, output_tokens=12),
                request(1, 0, prompt_tokens=13, output_tokens=12),
                request(2, 2, prompt_tokens=8, output_tokens=2),
                request(3, 4, prompt_tokens=6, output_tokens=30),
                request(4, 5, prompt_tokens=6, output_tokens=30),
                request(5, 25, prompt_tokens=6, output_tokens=30),
            ),
            aborts=(
                GoldenAbort("r4", 6, "before"),
                GoldenAbort("r3", 20, "after"),
                GoldenAbort("r5", 28, "before"),
            ),
            steps=(),
        )
    )


def lines_of(scenario: Scenario) -> list[Line]:
    """The lines of its trace file."""
    return [
        {"kind": "config", **asdict(scenario.config)},
        *({"kind": "request", **asdict(request)} for request in scenario.requests),
        *({"kind": "abort", **asdict(abort)} for abort in scenario.aborts),
        *scenario.steps,
        {"kind": "end"},
    ]


def write(path: Path, lines: list[Line]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def scenario() -> Scenario:
    return small_scenario()


# --------------------------------------------------------------------------------------
# What is reported


def falsified(value: Any) -> Any:
    """The same with one number or id changed."""
    match value:
        case int():
            return value + 1
        case str():
            return value + "x"
        case [*before, last]:
            return [*before, falsified(last)]
    raise AssertionError(f"nothing to falsify in {value!r}")


@pytest.mark.parametrize("field", STEP_FIELDS)
def test_one_falsified_value_is_reported_with_its_field_and_step(
    field: str, scenario: Scenario, tmp_path: Path
) -> None:
    lines = lines_of(scenario)
    line = next(line for line in lines if line["kind"] == "step" and line[field])
    true, line[field] = line[field], falsified(line[field])
    path = write(tmp_path / "small.jsonl.gz", lines)

    report = conform([path], PlainEngine)

    difference = report.outcomes[0].difference
    assert difference is not None
    assert (difference.step, difference.field) == (line["step"], field)
    assert (difference.expected, difference.got) == (line[field], true)
    assert report.summary == "0/1 scenarios equal"


@pytest.mark.parametrize("field", ["aborted", "free_blocks"])
def test_a_falsified_idle_step_is_reported(field: str, scenario: Scenario) -> None:
    *steps, idle = scenario.steps
    false = replace(scenario, steps=(*steps, idle | {field: falsified(idle[field])}))
    difference = check_scenario(false, PlainEngine).difference
    assert difference is not None
    assert (difference.step, difference.field) == (idle["step"], field)


def test_the_order_of_the_free_queue_is_compared_only_on_request(scenario: Scenario) -> None:
    first, *rest = scenario.steps
    false = replace(scenario, steps=(first | {"freeq": 0}, *rest))
    assert check_scenario(false, PlainEngine).difference is None
    difference = check_scenario(false, PlainEngine, ignored=NOTHING).difference
    assert difference is not None
    assert difference.field == "freeq"


def test_a_step_that_only_the_engine_has_is_reported(scenario: Scenario) -> None:
    short = replace(scenario, steps=scenario.steps[:-1])
    step = scenario.steps[-1]["step"]
    assert check_scenario(short, PlainEngine).difference == Difference(step, "step", None, step)


def test_a_step_that_only_the_trace_has_is_reported(scenario: Scenario) -> None:
    long = replace(scenario, steps=(*scenario.steps, {"kind": "idle", "step": 99}))
    assert check_scenario(long, PlainEngine).difference == Difference(99, "step", 99, None)


class Restless(PlainEngine):
    """Never says that it is done."""

    @property
    def has_requests(self) -> bool:
        return True


def test_an_engine_that_never_ends_is_stopped_at_the_first_superfluous_step() -> None:
    lone = recorded(
        Scenario("lone", config(), (request(0, 0, prompt_tokens=4, output_tokens=2),), (), ())
    )
    assert check_scenario(lone, Restless).difference == Difference(2, "step", None, 2)


class Stumbling(PlainEngine):
    """Fails when it is to process its third batch."""

    updates = 0

    def update(self) -> list[str]:
        self.updates += 1
        if self.updates == 3:
            raise KeyError("r0")
        return super().update()


def test_an_exception_inside_the_engine_is_a_difference(scenario: Scenario) -> None:
    difference = check_scenario(scenario, Stumbling).difference
    assert difference == Difference(2, "exception", None, "KeyError: 'r0'")


def test_an_engine_that_refuses_the_configuration_is_a_difference(scenario: Scenario) -> None:
    def refuse(config: GoldenConfig) -> PlainEngine:
        raise NotImplementedError(f"{config.policy} scheduling")

    difference = check_scenario(scenario, refuse).difference
    assert difference == Difference(0, "exception", None, "NotImplementedError: fcfs scheduling")


def test_the_summary_counts_equal_scenarios(scenario: Scenario, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines_of(scenario))
    write(tmp_path / "b.jsonl.gz", lines_of(replace(scenario, steps=scenario.steps[1:])))
    report = conform([tmp_path], PlainEngine)
    assert report.summary == "1/2 scenarios equal"
    assert [str(outcome) for outcome in report.unequal] == [
        "small: step 1: step: expected 1, got 0"
    ]


def test_a_difference_shows_a_long_list_from_where_it_parts() -> None:
    difference = Difference(7, "computed", [*range(20)], [*range(10), 0])
    assert str(difference) == (
        "step 7: computed from item 10: expected [10, 11, 12, 13, 14, 15, ... 4 more], got [0]"
    )


def test_a_field_that_the_engine_lacks_is_reported() -> None:
    difference = first_difference([{"step": 0, "hashes": 1}], [{"step": 0}])
    assert difference == Difference(0, "hashes", 1, None)


# --------------------------------------------------------------------------------------
# The step loop


def test_an_abort_that_leaves_nothing_to_schedule_is_an_idle_step(scenario: Scenario) -> None:
    assert scenario.steps[-1] == {"kind": "idle", "step": 28, "aborted": ["r5"], "free_blocks": 7}


def test_steps_in_which_the_engine_idles_are_counted_but_not_yielded() -> None:
    requests = (request(0, 3, 4, output_tokens=1), request(1, 9, 4, output_tokens=1))
    steps = recorded(Scenario("gaps", config(), requests, (), ())).steps
    assert [line["step"] for line in steps] == [3, 9]


def test_an_abort_before_arrival_or_after_the_end_does_nothing() -> None:
    aborts = (GoldenAbort("r0", 0, "before"), GoldenAbort("r0", 3, "before"))
    requests = (request(0, 1, 4, output_tokens=1), request(1, 3, 4, output_tokens=1))
    steps = recorded(Scenario("late", config(), requests, aborts, ())).steps
    assert [(line["step"], line["aborted"]) for line in steps] == [(1, []), (3, [])]


def test_asynchronous_output_is_seen_one_step_later() -> None:
    requests = (request(0, 0, prompt_tokens=4, output_tokens=2),)
    steps = recorded(Scenario("as", config(async_scheduling=True), requests, (), ())).steps
    assert [(line["scheduled"], line["finished"]) for line in steps] == [
        ([["r0", 4]], []),
        ([["r0", 1]], []),
        ([], ["r0"]),
    ]


def test_asynchronous_output_of_an_aborted_request_is_dropped() -> None:
    requests = (request(0, 0, 4, output_tokens=9), request(1, 2, 4, output_tokens=1))
    aborts = (GoldenAbort("r0", 1, "after"),)
    steps = recorded(Scenario("as", config(async_scheduling=True), requests, aborts, ())).steps
    assert [(line["step"], line["finished"]) for line in steps] == [
        (0, []),
        (1, []),
        (2, []),
        (3, ["r1"]),
    ]


def test_the_plain_engine_keys_equal_tokens_alike_however_a_prompt_is_cut() -> None:
    def free_queue(*prompt: tuple[int, int]) -> list[Any]:
        engine = PlainEngine(config())
        engine.add(replace(request(0, 0, prompt_tokens=10, output_tokens=1), prompt=prompt))
        engine.schedule()
        engine.update()
        return engine.free_queue()

    keys = [((1, 0, 2), (5, 0, 6)), ((1, 0, 2), (5, 0, 2))]
    assert free_queue((1, 2), (5, 8)) == [None] * 5 + keys
    assert free_queue((1, 2), (5, 7), (6, 1)) == [None] * 5 + keys


# --------------------------------------------------------------------------------------
# Files


def test_a_plain_and_a_compressed_file_read_alike(scenario: Scenario, tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", lines_of(scenario))
    packed = write(tmp_path / "a.jsonl.gz", lines_of(scenario))
    assert load_scenario(plain) == load_scenario(packed) == scenario


def test_a_folder_stands_for_its_traces_and_each_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "b" / "c.jsonl.gz"]
    for path in paths:
        write(path, [])
    (tmp_path / "notes.md").touch()
    assert golden_files([tmp_path, paths[1]]) == paths


def test_a_folder_without_traces_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no golden traces"):
        scenarios([tmp_path])


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such file or folder"):
        scenarios([tmp_path / "absent"])


def test_no_paths_at_all_are_an_error() -> None:
    with pytest.raises(InputError, match="no golden traces given"):
        scenarios([])


def test_a_cut_gz_is_an_error_with_its_file_and_line(scenario: Scenario, tmp_path: Path) -> None:
    path = write(tmp_path / "cut.jsonl.gz", lines_of(scenario))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz:\d+: cannot be decoded"):
        load_scenario(path)


def test_a_plain_file_without_its_last_line_is_an_error(scenario: Scenario, tmp_path: Path) -> None:
    path = write(tmp_path / "cut.jsonl", lines_of(scenario)[:-1])
    with pytest.raises(InputError, match=r"cut\.jsonl: is cut, it has no end line"):
        load_scenario(path)


def test_bad_json_is_an_error_with_its_line(scenario: Scenario, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", lines_of(scenario))
    path.write_text(path.read_text().replace('"kind": "abort"', '"kind": abort', 1))
    with pytest.raises(InputError, match=r"bad\.jsonl:8: is not valid JSON"):
        load_scenario(path)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {"policy": "lifo"}, "config key 'policy': Input should be 'fcfs' or 'priority'"),
        (1, {"kind": "header"}, "kind 'header' is unknown"),
        (2, {"prompt": [[1, "many"]]}, r"request key 'prompt\.0\.1'"),
        (
            2,
            {"prompt": [[1, 8]]},
            "request key 'prompt': its pieces have 8 tokens, 'prompt_tokens' says 9",
        ),
        (8, {"phase": "during"}, "abort key 'phase'"),
    ],
)
def test_a_wrong_value_is_an_error_with_its_line_and_key(
    number: int, change: Line, message: str, scenario: Scenario, tmp_path: Path
) -> None:
    lines = lines_of(scenario)
    lines[number - 1] |= change
    path = write(tmp_path / "wrong.jsonl", lines)
    with pytest.raises(InputError, match=rf"wrong\.jsonl:{number}: {message}"):
        load_scenario(path)


def test_a_step_without_one_of_its_fields_is_an_error(scenario: Scenario, tmp_path: Path) -> None:
    lines = lines_of(scenario)
    del lines[10]["running"]
    path = write(tmp_path / "wrong.jsonl", lines)
    with pytest.raises(InputError, match=r"wrong\.jsonl:11: step key 'running' is missing"):
        load_scenario(path)


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", [])
    with pytest.raises(InputError, match="has no config line; is this a golden trace"):
        load_scenario(path)
