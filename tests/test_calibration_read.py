"""Measurement files: what each format becomes, and what is said of a broken one."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.closed_loop import bench_result
from viisim.calibration.measurements import Measurement, RequestLog, StepLog, one_setup
from viisim.calibration.read import first_of, read_measurements
from viisim.errors import InputError

STEP = {
    "step": 1,
    "start_s": 0.0,
    "exec_s": 0.02,
    "host_s": 0.001,
    "gap_s": None,
    "prefill_tokens": 0,
    "prefill_seqs": 0,
    "prefill_pairs": 0,
    "decode_seqs": 2,
    "decode_context_tokens": 300,
    "free_blocks": 1,
    "running": 2,
    "waiting": 0,
    "preempted": 0,
}


def read(path: Path, content: Any) -> Measurement:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    (run,) = read_measurements([path])
    return run


def requests_of(run: Measurement) -> RequestLog:
    assert run.requests is not None
    return run.requests


def steps_of(run: Measurement) -> StepLog:
    assert run.steps is not None
    return run.steps


def mistake(path: Path, content: Any) -> str:
    """What is said of the file, less its path in front."""
    with pytest.raises(InputError) as caught:
        read(path, content)
    return str(caught.value).removeprefix(f"{path}: ")


def small_run(**more: Any) -> dict[str, Any]:
    return bench_result([100, 200, 300], [3, 4, 5], 2, **more)


# -- vllm bench serve ------------------------------------------------------------------------


def test_a_bench_result_states_what_ran(tmp_path: Path) -> None:
    image = {"metadata.image": "host/user/vllm:tag", "metadata.tensor_parallelism": "2"}
    setup = read(tmp_path / "r.json", small_run(**image)).setup
    assert (setup.model, setup.build, setup.image) == (
        "maker/Model-8B",
        "0.11.0+gfx906",
        "vllm:tag",
    )
    assert (setup.power_cap_w, setup.tensor_parallel, setup.device) == (225.0, 2, "gfx906")


def test_a_bench_result_without_metadata_is_read(tmp_path: Path) -> None:
    content = {
        name: value for name, value in small_run().items() if not name.startswith("metadata")
    }
    setup = read(tmp_path / "r.json", content).setup
    assert (setup.build, setup.power_cap_w, setup.tensor_parallel) == ("", None, None)


def test_end_to_end_time_is_first_token_and_all_gaps(tmp_path: Path) -> None:
    content = small_run()
    log = requests_of(read(tmp_path / "r.json", content))
    assert log.e2e_s[2] == pytest.approx(content["ttfts"][2] + sum(content["itls"][2]))


def test_an_infinite_rate_is_a_closed_loop(tmp_path: Path) -> None:
    log = requests_of(read(tmp_path / "r.json", small_run()))
    assert (log.concurrency, log.arrived_s) == (2, None)


def test_recorded_start_times_are_arrivals(tmp_path: Path) -> None:
    content = small_run(start_times=[5.0, 5.5, 7.0], max_concurrency=None, request_rate=1.0)
    log = requests_of(read(tmp_path / "r.json", content))
    assert log.arrived_s is not None
    assert log.arrived_s.tolist() == [0.0, 0.5, 2.0]


def test_a_gzipped_result_reads_the_same(tmp_path: Path) -> None:
    plain, packed = tmp_path / "r.json", tmp_path / "r.json.gz"
    plain.write_text(json.dumps(small_run()))
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    one, two = read_measurements([plain, packed])
    assert one.name == two.name == "r"
    assert requests_of(one).ttft_s.tolist() == requests_of(two).ttft_s.tolist()


def test_the_tag_of_repeated_prompts_is_known(tmp_path: Path) -> None:
    tagged = small_run(**{"metadata.workload": "tg; ctx=16;"})
    assert requests_of(read(tmp_path / "r.json", tagged)).repeats_one_prompt


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"itls": None}, "itls: missing; run `vllm bench serve` with --save-detailed"),
        ({"failed": 1}, "1 of 3 requests failed, so which requests ran together is not known"),
        ({"errors": ["", "boom", ""]}, "1 of 3 requests failed"),
        ({"completed": 2}, "1 of 3 requests failed"),
        ({"output_lens": [3, 0, 5]}, "1 of 3 requests failed"),
        ({"ttfts": [0.1, 0.2]}, "ttfts: 2 entries for 3 requests; the file is incomplete"),
        ({"ttfts": [0.1, "x", 0.2]}, "ttfts: not all are times in seconds"),
        ({"input_lens": [1, 2, -3]}, "input_lens: not all are whole numbers from 1"),
        (
            {"request_rate": 2.0, "max_concurrency": None},
            "start_times: missing, and with request_rate 2.0 the arrivals were random",
        ),
    ],
)
def test_a_broken_bench_result_is_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert mistake(tmp_path / "r.json", small_run() | changes).startswith(said)


def test_truncated_json_is_named_so(tmp_path: Path) -> None:
    text = json.dumps(small_run(), indent=1)
    said = mistake(tmp_path / "r.json", text[: len(text) // 2])
    assert "copy or record the file again" in said


def test_a_truncated_gzip_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "r.json.gz"
    path.write_bytes(gzip.compress(json.dumps(small_run()).encode(), mtime=0)[:-20])
    with pytest.raises(InputError, match="gzip file is cut off"):
        read_measurements([path])


def test_anything_else_is_no_measurement(tmp_path: Path) -> None:
    assert mistake(tmp_path / "x.csv", "a,b\n1,2\n").startswith("no measurement; give the JSON of")


# -- the other formats -----------------------------------------------------------------------


def test_a_step_takes_execution_host_and_a_short_gap(tmp_path: Path) -> None:
    rows = [STEP, STEP | {"gap_s": 0.002}, STEP | {"gap_s": 3.0}]
    steps = steps_of(read(tmp_path / "s.jsonl", "\n".join(map(json.dumps, rows))))
    assert steps.duration_s.tolist() == pytest.approx([0.021, 0.023, 0.021])


def test_steps_that_compute_nothing_are_left_out(tmp_path: Path) -> None:
    idle = STEP | {"decode_seqs": 0, "decode_context_tokens": 0}
    steps = steps_of(read(tmp_path / "s.jsonl", "\n".join(map(json.dumps, [STEP, idle]))))
    assert len(steps) == 1


def test_a_missing_column_is_named_with_its_row(tmp_path: Path) -> None:
    broken = {name: value for name, value in STEP.items() if name != "host_s"}
    said = mistake(tmp_path / "s.jsonl", "\n".join(map(json.dumps, [STEP, broken])))
    assert said == "row 2: host_s: missing; it must be a number from 0"


def test_client_records_keep_arrivals_gaps_and_cached_tokens(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(number),
            "sent_s": 10.0 + number,
            "prompt_tokens": 64,
            "output_tokens": 3,
            "cached_tokens": 32,
            "ttft_s": 0.5,
            "e2e_s": 0.8,
            "token_s": [10.5 + number, 10.6 + number, 10.8 + number],
        }
        for number in (1, 0)
    ]
    log = requests_of(read(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows))))
    assert log.arrived_s is not None
    assert log.gaps_s is not None
    assert log.arrived_s.tolist() == [0.0, 1.0]
    assert log.gaps_s[0].tolist() == pytest.approx([0.1, 0.2])
    assert log.cached.tolist() == [32, 32]


def test_llmservingsim_requests_know_their_engine(shared: Path) -> None:
    folder = shared / "data" / "calibration" / "llmservingsim_vllm" / "RTX4090_Llama-3.1-8B"
    (run,) = read_measurements([folder / "requests.jsonl.gz"])
    assert run.setup.engine["num_kv_blocks"] == 2588
    assert (run.setup.build, run.setup.tensor_parallel) == ("0.19.0", 1)
    assert len(requests_of(run)) == 300


def test_llmservingsim_gauges_are_refused_with_the_file_to_give(shared: Path) -> None:
    folder = shared / "data" / "calibration" / "llmservingsim_vllm" / "RTX4090_Llama-3.1-8B"
    with pytest.raises(InputError, match=r"give requests.jsonl"):
        read_measurements([folder / "timeseries.csv"])


def test_splitwise_rows_are_a_prefill_and_a_decode_step(tmp_path: Path) -> None:
    table = (
        "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,"
        "token_time,e2e_time,tensor_parallel\nm,h,512,4,128,1,1,200.0,50.0,7000.0,2\n"
    )
    run = read(tmp_path / "p.csv", table)
    steps = steps_of(run)
    assert steps.duration_s.tolist() == [0.2, 0.05]
    assert steps.prefill_tokens.tolist() == [2048, 0]
    assert steps.context_tokens.tolist() == [0, 4 * (512 + 64)]
    assert run.setup.tensor_parallel == 2


# -- several ---------------------------------------------------------------------------------


def test_mixed_builds_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, version in zip(paths, ("0.11", "0.12"), strict=True):
        path.write_text(json.dumps(small_run(**{"metadata.vllm_ver": version})))
    with pytest.raises(InputError, match=r"a and b: .* 2 builds are mixed \(0.11, 0.12\)"):
        one_setup(read_measurements(paths))


def test_only_picks_by_setup(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, version in zip(paths, ("0.11", "0.12"), strict=True):
        path.write_text(json.dumps(small_run(**{"metadata.vllm_ver": version})))
    (run,) = read_measurements(paths, only="build 0.12")
    assert run.name == "b"


def test_a_cut_list_remembers_that_it_goes_on(tmp_path: Path) -> None:
    run = read(tmp_path / "r.json", small_run())
    assert requests_of(first_of(run, 2)).goes_on
    assert not requests_of(first_of(run, 3)).goes_on
    assert np.array_equal(requests_of(first_of(run, 2)).prompt_tokens, [100, 200])
