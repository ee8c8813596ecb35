"""Run directories: whole or not at all, equal to the byte, and free of the machine's traces."""

import io
import json
import socket
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests import result_builders
from tests.result_builders import Objectives, queue, row
from viisim.errors import InputError
from viisim.metrics import Summary, summarise
from viisim.records import REQUEST_COLUMNS, SAMPLE_COLUMNS, SeedResult
from viisim.report import number, summary_report
from viisim.results import (
    compare_bytes,
    compare_manifests,
    load_run,
    make_manifest,
    open_run,
    write_run,
)

WORDS = ("traffic_class", "tenant")
SEEDS = (1, 2)


def write(
    folder: Path, results: list[SeedResult] | None = None, plots: bool = False, name: str = "mm1"
) -> Path:
    """A run directory of two short queues."""
    results = [queue(0.8, 300, seed) for seed in SEEDS] if results is None else results
    manifest = make_manifest({"name": name}, SEEDS, {"trace": "0" * 64})
    return write_run(folder, manifest, results, summarise(results, Objectives(), 0.1), plots)


def files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its plots."""
    return write(tmp_path_factory.mktemp("drawn") / "run", plots=True)


def test_a_run_directory_holds_tables_summary_manifest_and_plots(drawn: Path) -> None:
    assert files(drawn) == [
        "manifest.json",
        "plots/latency_cdf.png",
        "plots/occupancy.png",
        "plots/timeline.png",
        "replicas.parquet",
        "requests.parquet",
        "summary.json",
    ]


def test_two_writes_are_equal_to_the_byte(drawn: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "elsewhere", plots=True)
    assert [(drawn / name).read_bytes() for name in files(drawn)] == [
        (again / name).read_bytes() for name in files(again)
    ]
    assert compare_bytes(drawn, again) == []


def test_no_file_names_a_folder_a_host_or_the_day(drawn: Path) -> None:
    content = b"".join((drawn / name).read_bytes() for name in files(drawn)).lower()
    day = datetime.now(tz=UTC).strftime("%Y-%m-%d")
    traces = [str(drawn.parent), str(Path.cwd()), str(Path.home()), day]
    # A host may be called `x` or `run`; only a telling name can be looked for.
    traces += [name for name in [socket.gethostname()] if len(name) > 5]
    assert [trace for trace in traces if trace.lower().encode() in content] == []


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    results = [queue(0.8, 300, seed, servers=2) for seed in SEEDS]
    run = load_run(write(tmp_path / "run", results))
    for result in results:
        requests, samples = run.requests(result.seed), run.samples(result.seed)
        assert requests.column_names == ["seed", *REQUEST_COLUMNS]
        assert samples.column_names == ["seed", *SAMPLE_COLUMNS]
        for name, dtype in REQUEST_COLUMNS.items():
            if name in WORDS:
                continue
            column = requests[name].to_numpy()
            assert column.dtype == dtype
            assert np.array_equal(column, result.requests[name])
        for name in SAMPLE_COLUMNS:
            assert np.array_equal(samples[name].to_numpy(), result.samples[name])


def test_traffic_classes_and_tenants_are_stored_as_words(tmp_path: Path) -> None:
    rows = [row(0, traffic_class=1, tenant=0), row(1, traffic_class=0, tenant=1)]
    run = write(
        tmp_path / "run",
        [result_builders.result(*rows, traffic_classes=("batch", "chat"), tenants=("a", "b"))],
    )
    table = load_run(run).requests()
    assert [table[name].to_pylist() for name in WORDS] == [["chat", "batch"], ["a", "b"]]


def test_the_summary_comes_back_as_it_was(tmp_path: Path) -> None:
    results = [queue(0.8, 300, seed) for seed in SEEDS]
    run = load_run(write(tmp_path / "run", results))
    assert run.summary == summarise(results, Objectives(), 0.1)


def test_a_table_says_what_its_outcomes_mean(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    metadata = pq.read_schema(run / "requests.parquet").metadata
    assert json.loads(metadata[b"outcomes"])[0] == "finished"


def test_a_run_without_requests_can_be_stored(tmp_path: Path) -> None:
    empty = queue(0.8, 1)
    empty.requests = {name: column[:0] for name, column in empty.requests.items()}
    run = load_run(write(tmp_path / "run", [empty], plots=True))
    assert run.requests().num_rows == 0


# -- whole or not at all --


def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_run(tmp_path / "runs" / "new") as run:
            run.write({"seeds": []}, [], summarise([queue(0.8, 9)], Objectives(), 0), False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_run_that_could_not_be_written(tmp_path: Path) -> None:
    results = [queue(0.8, 9)]
    summary = summarise(results, Objectives(), 0.0)
    manifest = {"config": {"load": float("nan")}, "seeds": [1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_run(tmp_path / "run", manifest, results, summary)
    assert list(tmp_path.iterdir()) == []


def test_a_run_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert not run.path.exists()
        run.write(
            {"config": {}, "seeds": []}, [], summarise([queue(0.8, 9)], Objectives(), 0), False
        )
        assert not run.path.exists()
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty; .* another with --out"):
        write(tmp_path)
    assert files(tmp_path) == ["notes.txt"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert load_run(write(tmp_path / "run")).name == "mm1"


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out$"):
        write(tmp_path / name)


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        with open_run(tmp_path / "mm1", numbered=True) as run:
            pass
        names.append(run.path.name)
    assert names == ["mm1", "mm1-2", "mm1-3"]


def test_two_runs_at_once_do_not_take_the_same_name(tmp_path: Path) -> None:
    with open_run(tmp_path / "mm1", numbered=True) as slow:
        (slow._aside / "slow").touch()
        with open_run(tmp_path / "mm1", numbered=True) as quick:
            (quick._aside / "quick").touch()
    assert files(tmp_path) == ["mm1-2/slow", "mm1/quick"]


# -- comparing --


def test_a_difference_in_a_table_is_named_by_column_and_row(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    results = [queue(0.8, 300, seed) for seed in SEEDS]
    results[1].requests["prompt_tokens"][[4, 9]] = 5000
    (difference,) = (
        line for line in compare_bytes(one, write(tmp_path / "two", results)) if "parquet" in line
    )
    assert difference.startswith(
        "requests.parquet: column prompt_tokens differs in 2 of 600 rows (row 304: "
    )
    assert difference.endswith(" and 5000)")


def test_a_difference_in_the_summary_is_named_by_key(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    summary = json.loads((two / "summary.json").read_text())
    summary["outcomes"]["shed"] = 3
    (two / "summary.json").write_text(json.dumps(summary))
    assert compare_bytes(one, two) == ["summary.json: outcomes.shed: 0 and 3"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    (two / "requests.parquet").unlink()
    assert compare_bytes(one, two) == ["requests.parquet: only in the first run"]


def test_what_was_run_is_compared_apart_from_what_came_out(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", name="other")
    assert compare_bytes(one, two) == []
    assert compare_manifests(one, two) == ['config.name: "mm1" and "other"']


# -- reading --


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: No such file .*`viisim run`"):
        load_run(tmp_path)


def test_a_run_of_another_format_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="format 99, this viisim reads 1"):
        load_run(run)


# -- the table for people --


def printed(summary: Summary) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(summary_report(summary, "mm1"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_80_columns() -> None:
    results = [queue(0.9, 500, seed) for seed in SEEDS]
    for result in results:
        result.requests["prompt_tokens"] *= 100
    table = printed(summarise(results, Objectives(ttft_s=1.0, tpot_s=0.1, e2e_s=9.0), 0.1))
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table


def test_the_table_gives_means_with_their_interval() -> None:
    summary = summarise([queue(0.8, 300, seed) for seed in SEEDS], Objectives(), 0.1)
    summary["latencies"]["e2e_s"]["mean"] = {"mean": 2.0, "half_width": 0.25, "seeds": 2}
    summary["latencies"]["e2e_s"]["p90"]["mean"] = 4.0
    (line,) = [line for line in printed(summary).splitlines() if "end to end" in line]
    assert line.split("end to end")[1].split()[:3] == ["2.00", "±", "0.25"]


def test_the_table_warns_of_what_would_mislead() -> None:
    summary = summarise([queue(2.0, 2000)], Objectives(ttft_s=1.0), 0.1)
    summary["outcomes"] |= {"refused": 7, "unfinished": 3}
    summary["seeds"][0]["values"] |= {"engine_steps": 200, "extrapolated_steps": 5}
    text = " ".join(printed(summary).split())
    assert "SATURATED in 1 of 1 seeds" in text
    assert "7 of 2,010 requests refused (prompt too long for the model)" in text
    assert "3 of 2,010 requests unfinished" in text
    assert "5 of 200 engine steps (2.5 %)" in text
    assert "SLO: TTFT 1 s." in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.000123, "0.000123"), (1.5, "1.50"), (99.96, "100"), (1234.5, "1,234")],
)
def test_numbers_have_three_significant_digits(value: float, shown: str) -> None:
    assert number(value) == shown
