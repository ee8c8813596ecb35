"""The plug-in for vLLM: step records, and golden traces from an installed vLLM.

Most tests put plain objects where vLLM's would be. Those with a real vLLM need an interpreter that
has it, named by VIISIM_VLLM_PYTHON.
"""

import gzip
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from runtime.vllm_plugin import (
    RECORDS_VARIABLE,
    TESTED_VLLM,
    golden,
    recording_environment,
    stepped,
    version_warning,
)
from runtime.vllm_plugin.records import (
    RecordFile,
    StepRecorder,
    StepTimes,
    batch_columns,
    open_records,
    records_path,
    scheduled_chunks,
)
from runtime.vllm_plugin.scenarios import standard_scenarios
from runtime.vllm_plugin.stepped import SteppedVllm, VllmProcess, record_golden
from viisim.calibration.read import read_measurements
from viisim.cli.conform import conform
from viisim.conform import check_scenario, recorded
from viisim.engine.stepwise import SteppedScheduler
from viisim.errors import InputError
from viisim.golden import Scenario, load_scenario, write_scenario

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = os.environ.get("VIISIM_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="VIISIM_VLLM_PYTHON does not name an interpreter with vLLM"
)


# --------------------------------------------------------------------------------------
# What a step computes


def test_a_prefill_chunk_attends_what_is_before_it_and_itself() -> None:
    columns = batch_columns([(100, 50, 200)])
    assert columns["prefill_pairs"] == 50 * 100 + 50 * 51 // 2


def test_a_decode_attends_its_context_with_itself() -> None:
    columns = batch_columns([(512, 1, 512)])
    assert (columns["decode_seqs"], columns["decode_context_tokens"]) == (1, 513)


def test_kinds_of_a_mixed_batch_are_counted_apart() -> None:
    columns = batch_columns([(40, 1, 40), (0, 30, 100), (70, 1, 60), (64, 5, 69)])
    assert columns == {
        "prefill_tokens": 35,
        "prefill_seqs": 2,
        "prefill_pairs": 30 * 31 // 2 + 5 * 64 + 15,
        "decode_seqs": 2,
        "decode_context_tokens": 41 + 71,
    }


def request(prompt: int, outputs: int, computed: int) -> SimpleNamespace:
    """A vLLM request as `schedule()` leaves it."""
    return SimpleNamespace(
        num_prompt_tokens=prompt, num_tokens=prompt + outputs, num_computed_tokens=computed
    )


def scheduler(**requests: SimpleNamespace) -> SimpleNamespace:
    """What the recorder reads of a vLLM scheduler."""
    pool = SimpleNamespace(get_num_free_blocks=lambda: 7)
    return SimpleNamespace(
        requests=requests,
        get_request_counts=lambda: (len(requests), 2),
        kv_cache_manager=SimpleNamespace(block_pool=pool),
    )


def output(**tokens: int) -> SimpleNamespace:
    """A vLLM `SchedulerOutput`."""
    return SimpleNamespace(num_scheduled_tokens=tokens)


@pytest.mark.parametrize(
    ("seen", "tokens", "decodes"),
    [
        pytest.param(request(100, 0, 100), 60, 0, id="last chunk of a prompt"),
        pytest.param(request(100, 0, 100), 1, 0, id="prompt found in the cache but for its last"),
        pytest.param(request(100, 1, 101), 1, 1, id="first decode"),
        pytest.param(request(100, 0, 101), 1, 1, id="first decode, scheduled ahead of its token"),
        pytest.param(request(100, 30, 129), 9, 0, id="outputs recomputed after a preemption"),
    ],
)
def test_a_sequence_decodes_when_only_its_last_token_is_missing(
    seen: SimpleNamespace, tokens: int, decodes: int
) -> None:
    columns = batch_columns(scheduled_chunks(scheduler(q=seen), output(q=tokens)))
    assert columns["decode_seqs"] == decodes


# --------------------------------------------------------------------------------------
# How long it takes

DECODE = batch_columns([(10, 1, 10)]) | {"preempted": 0}
NOTHING = batch_columns([]) | {"preempted": 0}


def test_a_step_alone_is_divided_into_execution_and_the_hosts_work() -> None:
    times = StepTimes()
    times.scheduled("a", 10.0, 10.25, DECODE)
    record = times.processed("a", 12.0, 12.5)
    assert record is not None
    assert (record["start_s"], record["exec_s"], record["host_s"]) == (10.0, 1.75, 0.75)


def test_the_gap_reaches_back_to_the_end_of_the_step_before() -> None:
    times = StepTimes()
    times.scheduled("a", 10.0, 10.25, DECODE)
    first = times.processed("a", 12.0, 12.5)
    times.scheduled("b", 14.0, 14.25, DECODE)
    second = times.processed("b", 15.0, 15.5)
    assert [record and record["gap_s"] for record in (first, second)] == [None, 1.5]


def test_with_two_batches_in_flight_no_instant_counts_twice() -> None:
    times = StepTimes()
    records = []
    times.scheduled(0, 0.0, 1.0, DECODE)
    for step in range(4):
        now = 10.0 * step
        times.scheduled(step + 1, now + 2.0, now + 3.0, DECODE)
        records.append(times.processed(step, now + 10.0, now + 11.0))
    records.append(times.processed(4, 50.0, 51.0))
    seconds = [r["exec_s"] + r["host_s"] + (r["gap_s"] or 0.0) for r in records if r is not None]
    assert seconds == [10.0, 10.0, 10.0, 10.0, 11.0]


def test_a_batch_of_nothing_is_no_step() -> None:
    times = StepTimes()
    times.scheduled("a", 1.0, 2.0, NOTHING)
    assert times.processed("a", 3.0, 4.0) is None


def test_an_empty_step_that_preempted_is_one() -> None:
    times = StepTimes()
    times.scheduled("a", 1.0, 2.0, NOTHING | {"preempted": 1})
    assert times.processed("a", 3.0, 4.0) is not None


def test_a_batch_without_output_is_forgotten() -> None:
    times = StepTimes()
    times.scheduled("lost", 1.0, 2.0, DECODE)
    times.scheduled("b", 3.0, 4.0, DECODE)
    record = times.processed("b", 5.0, 6.0)
    assert record is not None
    assert record["step"] == 2


# --------------------------------------------------------------------------------------
# Where it goes


def recorded_steps(path: Path, steps: int) -> None:
    """A file of this many decode steps, a second each."""
    clock = iter(float(tick) for tick in range(10 * steps))
    recorder = StepRecorder(RecordFile(path), clock_s=lambda: next(clock))
    for step in range(steps):
        batch = output(q=1)
        engine = scheduler(q=request(100, step + 1, 101 + step))
        recorder.scheduled(engine, batch, next(clock), preempted=0)
        recorder.processed(batch, next(clock))
    recorder.close()


def test_calibration_reads_what_the_recorder_writes(tmp_path: Path) -> None:
    recorded_steps(tmp_path / "worker0.steps.jsonl", steps=5)
    (run,) = read_measurements([tmp_path / "worker0.steps.jsonl"])
    assert run.steps is not None
    assert run.steps.context_tokens.tolist() == [101, 102, 103, 104, 105]


def test_a_restarted_engine_adds_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    recorded_steps(path, steps=2)
    recorded_steps(path, steps=1)
    assert [json.loads(line)["gap_s"] for line in path.read_text().splitlines()] == [None, 1, None]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"VIISIM_STEP_RECORDS: .*no/steps.jsonl: cannot be"):
        RecordFile(tmp_path / "no" / "steps.jsonl")


def test_a_full_disk_ends_the_recording_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = RecordFile(Path("/dev/full"))
    for _ in range(3):
        file.write({"step": "1" * (2 << 20)})
    file.close()
    assert capsys.readouterr().err == (
        "viisim: /dev/full: No space left on device; step records are lost\n"
    )


def test_a_scheduler_without_an_attribute_ends_the_recording_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = StepRecorder(RecordFile(tmp_path / "steps.jsonl"))
    for _ in range(3):
        recorder.scheduled(SimpleNamespace(), output(q=1), 0.0, preempted=0)
        recorder.processed(output(q=1), 0.0)
    assert capsys.readouterr().err == (
        "viisim: step records end here: AttributeError: "
        "'types.SimpleNamespace' object has no attribute 'requests'\n"
    )


@pytest.mark.parametrize(
    ("index", "name"), [(0, "worker0.steps.jsonl"), (1, "worker0.1.steps.jsonl")]
)
def test_each_engine_of_a_worker_has_its_own_file(
    index: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RECORDS_VARIABLE, "run/worker0.steps.jsonl")
    assert records_path(index) == Path("run") / name


def test_nothing_is_recorded_where_no_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(RECORDS_VARIABLE, raising=False)
    assert open_records(0, TESTED_VLLM) is None
    assert (
        capsys.readouterr().err == "viisim: VIISIM_STEP_RECORDS is not set: no step is recorded\n"
    )


def test_the_tested_version_is_no_reason_to_warn_in_any_build() -> None:
    assert [version_warning(v) for v in (TESTED_VLLM, f"{TESTED_VLLM}+cpu")] == [None, None]


def test_another_version_gives_one_line_that_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "steps.jsonl"))
    file = open_records(0, "0.99.0")
    assert file is not None
    file.close()
    assert capsys.readouterr().err.startswith(
        f"viisim: vLLM 0.99.0 is not the tested {TESTED_VLLM}; "
    )


# --------------------------------------------------------------------------------------
# The two classes that vLLM loads, over stand-ins for its own


class StubScheduler:
    """As much of vLLM's scheduler as a recorder needs: one request, decoding."""

    def __init__(self, vllm_config: Any, **_: Any) -> None:
        state = scheduler(q=request(9, 1, 10))
        self.requests = state.requests
        self.get_request_counts = state.get_request_counts
        self.kv_cache_manager = state.kv_cache_manager

    def schedule(self, throttle_prefills: bool = False) -> SimpleNamespace:
        """One decode; a request that was preempted for it."""
        self._preempt_request("other", 0.0)
        return output(q=1)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        """What the engine would get."""
        return "outputs"

    def shutdown(self) -> None:
        """Nothing to end."""

    def _preempt_request(self, request: object, timestamp: float) -> None:
        pass


class StubAsyncScheduler(StubScheduler):
    """The one that schedules ahead."""


Loaded = Callable[[str], ModuleType]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Imports a module of the plug-in over a vLLM of stand-ins."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": TESTED_VLLM},
        "vllm.v1": {},
        "vllm.v1.core": {},
        "vllm.v1.core.sched": {},
        "vllm.v1.core.sched.scheduler": {"Scheduler": StubScheduler},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": StubAsyncScheduler},
        "vllm.v1.metrics": {},
        "vllm.v1.metrics.loggers": {"StatLoggerBase": object},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def load(name: str) -> ModuleType:
        name = f"runtime.vllm_plugin.{name}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)  # so that it is taken out again
        return module

    return load


def vllm_config(is_async: bool = False, details: bool = True, cls: str | None = None) -> Any:
    """What the plug-in reads of a `VllmConfig`."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=is_async, scheduler_cls=cls),
        parallel_config=SimpleNamespace(data_parallel_index=0),
        cache_config=SimpleNamespace(num_gpu_blocks=101, block_size=16),
        observability_config=SimpleNamespace(enable_logging_iteration_details=details),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the environment names."""
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(RECORDS_VARIABLE, str(path))
    return path


def test_the_recording_scheduler_records_a_step_with_its_preemptions(
    loaded: Loaded, records: Path
) -> None:
    engine = loaded("step_recorder").RecordingScheduler(vllm_config=vllm_config())
    assert engine.update_from_output(engine.schedule(False), None) == "outputs"
    engine.shutdown()
    (line,) = lines(records)
    assert {key: line[key] for key in ("decode_seqs", "free_blocks", "preempted")} == {
        "decode_seqs": 1,
        "free_blocks": 7,
        "preempted": 1,
    }


@pytest.mark.parametrize("is_async", [False, True], ids=["in turn", "ahead"])
def test_an_engine_that_schedules_ahead_goes_on_doing_so(
    is_async: bool, loaded: Loaded, records: Path
) -> None:
    engine = loaded("step_recorder").RecordingScheduler(vllm_config=vllm_config(is_async))
    engine.shutdown()
    assert isinstance(engine, StubAsyncScheduler) == is_async


def test_the_recording_scheduler_only_schedules_where_no_file_is_named(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(RECORDS_VARIABLE, raising=False)
    engine = loaded("step_recorder").RecordingScheduler(vllm_config=vllm_config())
    assert engine.update_from_output(engine.schedule(), None) == "outputs"
    assert "is not set" in capsys.readouterr().err


def scheduler_stats(**details: Any) -> SimpleNamespace:
    """What vLLM reports after a step of 2 prefill chunks and 6 decodes."""
    values: dict[str, Any] = {
        "iteration_index": 4,
        "num_ctx_requests": 2,
        "num_ctx_tokens": 40,
        "num_generation_requests": 6,
        "num_generation_tokens": 6,
        "elapsed_ms": 12.5,
        "is_dummy": False,
    }
    return SimpleNamespace(
        iteration_details=SimpleNamespace(**values | details),
        kv_cache_usage=0.24,
        num_running_reqs=8,
        num_waiting_reqs=1,
    )


def close(logger: Any) -> None:
    """What the end of the API server's process does."""
    logger._file.close()


def test_the_stat_logger_estimates_contexts_from_the_blocks_in_use(
    loaded: Loaded, records: Path
) -> None:
    logger = loaded("stat_logger").StepStatLogger(vllm_config())
    logger.record(scheduler_stats(), SimpleNamespace(num_preempted_reqs=0))
    close(logger)
    (line,) = lines(records)
    # 24 of 100 blocks, the last of 8 sequences half full; six of eight decode.
    assert line["decode_context_tokens"] == (24 - 4) * 16 * 6 // 8


def test_calibration_reads_what_the_stat_logger_writes(loaded: Loaded, records: Path) -> None:
    logger = loaded("stat_logger").StepStatLogger(vllm_config())
    logger.record(scheduler_stats(), None)
    close(logger)
    (run,) = read_measurements([records])
    assert run.steps is not None
    assert run.steps.duration_s.tolist() == [0.0125]


def test_a_stat_logger_that_lacks_an_attribute_ends_with_one_warning(
    loaded: Loaded, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = loaded("stat_logger").StepStatLogger(vllm_config())
    for _ in range(2):
        logger.record(SimpleNamespace(iteration_details=SimpleNamespace(is_dummy=False)), None)
    assert capsys.readouterr().err.count("viisim: step records end here: AttributeError") == 1


@pytest.mark.parametrize(
    "stats",
    [None, SimpleNamespace(iteration_details=None), scheduler_stats(is_dummy=True)],
    ids=["no stats", "no details", "dummy step"],
)
def test_the_stat_logger_records_nothing_but_steps(
    stats: Any, loaded: Loaded, records: Path
) -> None:
    logger = loaded("stat_logger").StepStatLogger(vllm_config())
    logger.record(stats, None)
    close(logger)
    assert lines(records) == []


def test_the_stat_logger_leaves_the_file_to_the_recording_scheduler(
    loaded: Loaded, records: Path
) -> None:
    config = vllm_config(cls="runtime.vllm_plugin.step_recorder.RecordingScheduler")
    loaded("stat_logger").StepStatLogger(config).record(scheduler_stats(), None)
    assert not records.exists()


def test_the_stat_logger_says_which_option_it_needs(
    loaded: Loaded, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded("stat_logger").StepStatLogger(vllm_config(details=False))
    assert capsys.readouterr().err == (
        "viisim: no step is recorded without --enable-logging-iteration-details\n"
    )


# --------------------------------------------------------------------------------------
# Beside vLLM there is nothing of viisim's dependencies


@pytest.mark.parametrize("module", ["records", "golden"])
def test_what_vllm_loads_needs_the_standard_library_alone(module: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runtime.vllm_plugin.{module}"
    without_site_packages = [sys.executable, "-S", "-c", code]
    subprocess.run(without_site_packages, check=True, timeout=60)


def test_the_recording_environment_keeps_the_callers_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert recording_environment(Path("/run/w.jsonl")) == {
        "VIISIM_STEP_RECORDS": "/run/w.jsonl",
        "PYTHONPATH": f"{ROOT}{os.pathsep}mine",
    }


# --------------------------------------------------------------------------------------
# Golden traces


class SimulatedVllm:
    """Answers as an interpreter with vLLM would, out of the simulated engine."""

    version = "0.99.0"
    warning = "not the tested one"

    def __init__(self, python: Path | None = None) -> None:
        self.engine: Any = None

    def __enter__(self) -> "SimulatedVllm":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, argument: Any = None) -> dict[str, Any]:
        """One call and its answer."""
        result: Any = None
        match method:
            case "new":
                self.config = argument
                config = SimpleNamespace(**argument)
                self.engine = SteppedScheduler(config)  # type: ignore[arg-type]  # as read from JSON
            case "configuration":
                result = self.config
            case "add":
                self.engine.add(SimpleNamespace(**argument))
            case "freeq_crc":
                result = 0
            case "schedule":
                seen = self.engine.schedule()
                result = {name: getattr(seen, name) for name in seen.__slots__}
            case _:
                result = getattr(self.engine, method)(*[argument] * (argument is not None))
        state = ("has_requests", "batches_in_flight", "free_blocks")
        return {"result": result, "state": {name: getattr(self.engine, name) for name in state}}


def scenario(name: str) -> Scenario:
    """One of the standard ones."""
    return next(each for each in standard_scenarios() if each.name == name)


def test_a_recorded_trace_is_that_of_the_engine_behind_the_pipes(tmp_path: Path) -> None:
    path = tmp_path / "aborts.jsonl.gz"
    process: Any = SimulatedVllm()
    record_golden(process, scenario("aborts"), path)
    trace = load_scenario(path)
    assert check_scenario(trace, SteppedScheduler).difference is None
    assert len(trace.steps) > 100


def test_recording_tells_where_vllm_has_left_the_given_trace(tmp_path: Path) -> None:
    given = scenario("plain")
    given = recorded(given, SteppedScheduler(replace(given.config, max_num_active_seqs=1)))
    process: Any = SimulatedVllm()
    difference = record_golden(process, given, tmp_path / "plain.jsonl.gz")
    assert difference is not None
    assert difference.field == "scheduled"


def test_a_share_for_the_watermark_makes_its_blocks() -> None:
    process: Any = SimulatedVllm()
    SteppedVllm(process, scenario("watermark").config)
    assert int(process.config["watermark"] * process.config["num_blocks"]) == 12


def test_a_trace_that_was_written_reads_as_it_was(tmp_path: Path) -> None:
    given = scenario("priorities")
    given = recorded(given, SteppedScheduler(given.config))
    write_scenario(tmp_path / "p.jsonl.gz", given)
    assert load_scenario(tmp_path / "p.jsonl.gz").requests == given.requests


def test_equal_traces_make_equal_files(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_scenario(tmp_path / name, scenario("plain"))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_the_end_line_counts_what_happened(tmp_path: Path) -> None:
    given = scenario("pressure")
    given = recorded(given, SteppedScheduler(given.config))
    write_scenario(tmp_path / "p.jsonl.gz", given)
    end = json.loads(gzip.decompress((tmp_path / "p.jsonl.gz").read_bytes()).splitlines()[-1])
    assert (end["steps"], end["finished"], end["preemptions"] > 0) == (len(given.steps), 60, True)


def test_standard_scenarios_are_the_same_every_time() -> None:
    assert standard_scenarios() == standard_scenarios()


def test_standard_scenarios_fit_the_models_length() -> None:
    longest = max(
        (request.prompt_tokens + request.output_tokens) / each.config.max_model_len
        for each in standard_scenarios()
        for request in each.requests
    )
    assert longest <= 1


def test_serving_answers_an_exception_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, config: object) -> None:
            pass

        def state(self) -> dict[str, Any]:
            return {}

        def add(self, number: int) -> float:
            return 1 / number

    monkeypatch.setattr(golden, "GoldenEngine", Engine)
    answers = io.StringIO()
    golden.serve(io.StringIO('["new",{}]\n["add",0]\n["add",2]\n'), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()][1:] == [
        {"error": "ZeroDivisionError: division by zero"},
        {"result": 0.5, "state": {}},
    ]


def test_an_interpreter_without_vllm_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(
        InputError, match=r"--python .*: has ended, saying: .*No module named 'vllm'"
    ):
        VllmProcess(python).__enter__()


def test_a_program_that_is_no_interpreter_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho welcome\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=r"--python .*/python: says 'welcome', which"):
        VllmProcess(python).__enter__()


def test_an_interpreter_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"--python nowhere/python: cannot be started"):
        VllmProcess(Path("nowhere/python"))


# --------------------------------------------------------------------------------------
# The command


def test_conform_records_before_it_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stepped, "VllmProcess", SimulatedVllm)
    given = scenario("plain")
    write_scenario(tmp_path / "plain.jsonl", recorded(given, SteppedScheduler(given.config)))
    conform([tmp_path / "plain.jsonl"], record=tmp_path / "new", python=Path("python"))
    said = capsys.readouterr()
    assert said.out == "1/1 traces recorded as they were given\n1/1 scenarios equal\n"
    assert said.err == "vLLM 0.99.0: 1 scenarios\nnot the tested one\n"


def test_a_folder_with_other_traces_is_not_recorded_into(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        conform(record=tmp_path, python=Path("python"))


def test_two_traces_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_scenario(tmp_path / folder / "plain.jsonl", scenario("plain"))
    with pytest.raises(InputError, match="two traces are named 'plain'"):
        conform([tmp_path], record=tmp_path / "new", python=Path("python"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": Path("new")}, "--record needs --python FILE"),
        ({"python": Path("python")}, "--python names the interpreter of --record DIR"),
        ({}, "no golden traces given"),
    ],
    ids=["record alone", "python alone", "nothing"],
)
def test_conform_says_which_argument_is_missing(options: dict[str, Path], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conform(**options)  # type: ignore[arg-type]  # each option has its own type


# --------------------------------------------------------------------------------------
# With a real vLLM

DRIVE = """
import sys
from runtime.vllm_plugin import golden
from runtime.vllm_plugin.step_recorder import RecordingScheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
import json

config = json.loads(sys.argv[1])
golden.new_scheduler = lambda config, _: RecordingScheduler(**golden.scheduler_arguments(config))
engine = golden.GoldenEngine(config)
assert isinstance(engine._scheduler, AsyncScheduler) == config["async_scheduling"]
for name in "ab":
    engine.add({"id": name, "prompt": [[1, 40]], "out_seg": 2, "output_tokens": 5,
                "arrival_time": 0.0, "priority": 0})
ahead = 2 if config["async_scheduling"] else 1
while engine.state()["has_requests"]:
    seen = engine.schedule(None)
    if engine._in_flight and not (seen["scheduled"] and len(engine._in_flight) < ahead):
        engine.update(None)
engine._scheduler.shutdown()
"""


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True], ids=["in turn", "ahead"])
def test_the_recording_scheduler_counts_every_token_of_a_real_vllm(
    is_async: bool, tmp_path: Path
) -> None:
    assert VLLM_PYTHON is not None
    config = replace(scenario("plain").config, async_scheduling=is_async, max_num_seqs=32)
    values = {name: getattr(config, name) for name in config.__slots__} | {"watermark": 0.0}
    path = tmp_path / "steps.jsonl"
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run(
        [VLLM_PYTHON, "-c", DRIVE, json.dumps(values)],
        env=os.environ | recording_environment(path) | offline,
        check=True,
        timeout=200,
    )
    steps = lines(path)
    # The second request finds the first two blocks of the first one's prompt.
    assert sum(step["prefill_tokens"] for step in steps) == 40 + 40 - 32
    assert sum(step["decode_seqs"] for step in steps) == 4 + 4


@needs_vllm
@pytest.mark.slow
def test_the_model_conforms_to_the_installed_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert VLLM_PYTHON is not None
    conform(record=tmp_path / "new", python=Path(VLLM_PYTHON))
    total = len(standard_scenarios())
    assert capsys.readouterr().out == f"{total}/{total} scenarios equal\n"
