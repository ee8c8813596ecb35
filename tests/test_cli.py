"""The command line: what it prints, what it leaves behind, and what it says of a mistake."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import policies.check
from tests.small_experiment import FAULTS, small_file, small_trace
from viisim.cli import main
from viisim.cli.check import CLAUSES


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Viisim = Callable[..., Answer]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def viisim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Viisim:
    """`viisim ARGUMENTS` in a folder that holds `small.yaml` and `faulty.py`."""
    small_file(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["viisim", *map(str, arguments)])
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        assert isinstance(status, int)
        return Answer(status, *capsys.readouterr())

    return call


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m viisim ARGUMENTS`, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "viisim", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


# -- running and verifying ------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_shows_a_table_and_leaves_a_directory(viisim: Viisim, tmp_path: Path) -> None:
    status, out, err = viisim("run", "small.yaml")
    assert (status, err) == (0, "")
    assert "small: 2 seeds" in out
    assert "time to first token" in out
    assert out.endswith("viisim verify runs/small\n")
    assert sorted(f.name for f in (tmp_path / "runs" / "small").iterdir()) == [
        "manifest.json",
        "plots",
        "replicas.parquet",
        "requests.parquet",
        "summary.json",
    ]


def test_the_next_run_gets_a_number(viisim: Viisim, tmp_path: Path) -> None:
    for _ in range(2):
        viisim("run", "small.yaml", "--no-plots")
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == ["small", "small-2"]


def test_json_is_the_summary_and_where_the_run_is(viisim: Viisim, tmp_path: Path) -> None:
    answer = viisim("run", "small.yaml", "--json", "--no-plots", "--out", "here")
    content = json.loads(answer.out)
    assert content.pop("run") == "here"
    assert content.pop("name") == "small"
    assert content == json.loads((tmp_path / "here" / "summary.json").read_text())


@pytest.mark.parametrize(("seeds", "meant"), [("3", [1, 2, 3]), ("7,11", [7, 11]), ("0,", [0])])
def test_seeds_are_a_number_or_a_list(
    viisim: Viisim, tmp_path: Path, seeds: str, meant: list[int]
) -> None:
    viisim("run", "small.yaml", "--no-plots", "--seeds", seeds)
    manifest = json.loads((tmp_path / "runs" / "small" / "manifest.json").read_text())
    assert manifest["seeds"] == manifest["config"]["seeds"] == meant


@pytest.mark.slow
def test_a_run_verifies_to_the_byte(viisim: Viisim) -> None:
    viisim("run", "small.yaml", "--journal")
    answer = viisim("verify", "runs/small")
    assert answer == (0, "equal: 8 files\n", "")


@pytest.mark.slow
def test_a_run_verifies_under_another_hash_seed(viisim: Viisim) -> None:
    viisim("run", "small.yaml", "--no-plots", "--set", "policy.name=power_of_two")
    done = in_a_process("verify", "runs/small", PYTHONHASHSEED="77")
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal: 3 files\n", "")


def test_a_falsified_run_does_not_verify(viisim: Viisim, tmp_path: Path) -> None:
    viisim("run", "small.yaml", "--no-plots")
    path = tmp_path / "runs" / "small" / "summary.json"
    summary = json.loads(path.read_text())
    summary["outcomes"]["finished"] += 1
    path.write_text(json.dumps(summary))
    answer = viisim("verify", "runs/small")
    assert (answer.status, answer.out) == (
        1,
        "summary.json: outcomes.finished: 81 and 80\nnot equal: 1 of 3 files\n",
    )


def test_a_trace_that_moved_is_asked_for(viisim: Viisim, tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    setting = f"workload={{kind: trace, path: {path}}}"
    viisim("run", "small.yaml", "--no-plots", "--set", setting)
    moved = path.rename(tmp_path / "moved.csv")
    answer = viisim("verify", "runs/small")
    assert answer.status == 2
    assert answer.err == "error: trace.csv: no such trace; say with --trace FILE where it is\n"
    assert viisim("verify", "runs/small", "--trace", moved).out == "equal: 3 files\n"


def test_another_trace_is_noticed(viisim: Viisim, tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    viisim("run", "small.yaml", "--set", f"workload={{kind: trace, path: {path.name}}}")
    small_trace(tmp_path, rows=4)
    answer = viisim("verify", "runs/small")
    assert answer.status == 2
    assert "trace.csv: not the trace that was run" in answer.err


def test_a_policys_file_is_found_in_the_folder_given(viisim: Viisim, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    viisim("new", "policy", "mine", "--dir", "sub")
    (tmp_path / "small.yaml").rename(tmp_path / "sub" / "small.yaml")
    viisim("run", "sub/small.yaml", "--no-plots", "--set", "policy={class: mine.py:Mine}")
    missed = viisim("verify", "runs/small")
    assert missed.status == 2
    assert "cannot read mine.py" in missed.err
    assert "--folder DIR" in missed.err
    assert viisim("verify", "runs/small", "--folder", "sub").out == "equal: 3 files\n"


# -- wrong input ----------------------------------------------------------------------------

WRONG = {
    "no such file": (["run", "nope.yaml"], "nope.yaml: No such file"),
    "unknown key": (
        ["run", "small.yaml", "--set", "cluster.scrap_s=1"],
        "small.yaml: cluster: unknown key 'scrap_s'. Did you mean 'scrape_s'?",
    ),
    "unknown policy": (
        ["run", "small.yaml", "--set", "policy.name=least_loadd"],
        "small.yaml: policy.name: unknown policy 'least_loadd'. Did you mean 'least_loaded'?",
    ),
    "negative rate": (
        ["run", "small.yaml", "--set", "workload.rate_per_s=-1"],
        "small.yaml: workload.rate_per_s: must be greater than 0, not -1",
    ),
    "no assignment": (["run", "small.yaml", "--set", "seeds"], "--set seeds: write key.path=value"),
    "seeds in words": (["run", "small.yaml", "--seeds", "x"], "--seeds x: give a number of seeds"),
    "no seeds": (["run", "small.yaml", "--seeds", "0"], "--seeds 0: give a number of seeds"),
    "output below a file": (["run", "small.yaml", "--out", "faulty.py/a"], "faulty.py/a: cannot"),
    "output over a file": (["run", "small.yaml", "--out", "faulty.py"], "faulty.py: is there"),
    "output in use": (["run", "small.yaml", "--out", "."], ".: the folder is not empty"),
    "no run": (["verify", "nope"], "nope/manifest.json: No such file"),
    "no policy": (["check", "nope"], "unknown policy 'nope'. Known: cache_aware,"),
    "no class": (["check", "faulty.py"], "'faulty.py' names no class: write module:Class"),
    "no policy's name": (["new", "policy", "9x"], "'9x' cannot name a policy"),
    "no golden trace": (["conform", "nope"], "nope: no such file or folder"),
    "no trace": (["trace", "info", "nope"], "nope: No such file or directory; give a readable"),
    "no journal": (["replay", "nope"], "nope: cannot read the journal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(viisim: Viisim, tmp_path: Path, case: str) -> None:
    arguments, said = WRONG[case]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = viisim(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: " + said)
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# In another process it is the same fault: one kind is enough there.
@pytest.mark.parametrize(("kind", "jobs"), [*((kind, 1) for kind in FAULTS), ("Raises", 2)])
def test_a_policys_fault_is_one_line_with_its_file(
    viisim: Viisim, tmp_path: Path, kind: str, jobs: int
) -> None:
    setting = f"policy={{class: faulty.py:{kind}}}"
    status, out, err = viisim("run", "small.yaml", "--set", setting, "--jobs", jobs)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: policy {kind} (faulty.py")
    assert FAULTS[kind] in err
    assert err.endswith(f"repair it with the help of `viisim check faulty.py:{kind}`\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_broken_row_is_named_by_file_and_line(viisim: Viisim, tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    path.write_text(path.read_text().replace(",102,", ",many,"))
    answer = viisim("run", "small.yaml", "--set", f"workload={{kind: trace, path: {path}}}")
    assert answer.status == 2
    assert answer.err.startswith(f"error: {path}:4: `ContextTokens` is 'many'; ")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_cut_gz_is_named(viisim: Viisim, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(small_trace(tmp_path).read_bytes())[:-12])
    for arguments in (
        ["run", "small.yaml", "--set", f"workload={{kind: trace, path: {path}}}"],
        ["trace", "info", path],
    ):
        answer = viisim(*arguments)
        assert answer.status == 2
        assert "the gzip data are cut or damaged" in answer.err
        assert answer.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(viisim: Viisim, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    answer = viisim("run", "small.yaml", "--out", "locked/run")
    assert answer.status == 2
    assert "locked/run: cannot write there (Permission denied)" in answer.err


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run"], ["run", "small.yaml", "--jobs=0"]])
def test_wrong_usage_exits_with_2(viisim: Viisim, arguments: list[str]) -> None:
    answer = viisim(*arguments)
    assert answer.status == 2
    assert "Usage:" in answer.err


def test_no_traceback_reaches_the_user() -> None:
    done = in_a_process("run", "nope.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nope.yaml: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_leaves_nothing_behind(
    viisim: Viisim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("viisim.experiment.run_experiment", interrupted)
    assert viisim("run", "small.yaml").status == 130
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    endless = ["--set", "workload.requests=1000000", "--seeds", "2", "--jobs", "2", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "viisim", "run", str(small_file(tmp_path)), *endless],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob(".run.partial-*/run")):
        assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=30) == (None, b"")
    # A shell shows 130 for both. Python ends itself by the signal when it came in the midst of
    # an `exec` (a dataclass being made in a late import), whoever caught the KeyboardInterrupt.
    assert process.returncode in (130, -signal.SIGINT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["faulty.py", "small.yaml"]


def test_an_error_of_ours_is_not_blamed_on_the_user(
    viisim: Viisim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("viisim.experiment.Simulation.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        viisim("run", "small.yaml")


# -- the other commands ---------------------------------------------------------------------


def test_help_teaches_by_example(viisim: Viisim) -> None:
    answer = viisim("--help")
    assert answer.status == 0
    assert "viisim run experiments/least_loaded.yaml" in answer.out
    assert "viisim verify runs/" in viisim("verify", "--help").out


def test_help_needs_no_heavy_library() -> None:
    heavy = ("matplotlib", "numpy", "pandas", "pyarrow", "pydantic", "scipy", "simpy")
    script = f"import sys, viisim.cli; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


def test_the_version_is_shown(viisim: Viisim) -> None:
    assert viisim("--version").out.startswith("viisim 0.")


def test_list_describes_what_there_is(viisim: Viisim) -> None:
    assert "fewest outstanding tokens" in " ".join(viisim("list").out.split())
    listed = json.loads(viisim("list", "--json").out)
    assert "round_robin" in listed["policies"]
    assert "radeon_vii/qwen3-vl-8b-awq" in listed["profiles"]
    assert "azure_conv" in listed["presets"]
    assert all(text for kind in listed.values() for text in kind.values())


def test_the_schema_is_json(viisim: Viisim) -> None:
    assert "policy" in json.loads(viisim("schema").out)["properties"]


def test_check_names_every_clause(viisim: Viisim) -> None:
    answer = viisim("check", "least_loaded")
    assert answer.status == 0
    assert [line.split()[:2] for line in answer.out.splitlines()[:-1]] == [
        ["ok", f"{clause}:"] for clause in CLAUSES
    ]
    assert answer.out.endswith("least_loaded keeps all 8 clauses\n")


def test_check_shows_what_is_broken(viisim: Viisim) -> None:
    answer = viisim("check", "faulty.py:Nonsense")
    assert answer.status == 1
    assert answer.out.startswith("BROKEN  valid_answers: place answered 42")


def test_the_clauses_are_those_of_the_conformance_suite() -> None:
    documented = policies.check.__doc__ or ""
    assert [f"{number}. `{name}`" in documented for number, name in enumerate(CLAUSES, 1)] == [
        True
    ] * len(CLAUSES)


def test_a_new_policy_works_at_once(viisim: Viisim, tmp_path: Path) -> None:
    answer = viisim("new", "policy", "my_policy", "--dir", "mine")
    assert answer.status == 0
    assert sorted(f.name for f in (tmp_path / "mine").iterdir()) == [
        "my_policy.py",
        "test_my_policy.py",
    ]
    assert viisim("check", "mine/my_policy.py:MyPolicy", "--set", "request_tokens=9").status == 0


def test_a_new_policy_overwrites_nothing(viisim: Viisim, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("mine")
    answer = viisim("new", "policy", "mine")
    assert answer.status == 2
    assert answer.err.startswith("error: test_mine.py: exists already")
    assert not (tmp_path / "mine.py").exists()


def golden_file(shared: Path) -> Path:
    return min((shared / "golden" / "dev").glob("*.jsonl*"), key=lambda file: file.stat().st_size)


def test_conform_counts_equal_scenarios(viisim: Viisim, shared: Path) -> None:
    assert viisim("conform", golden_file(shared)) == (0, "1/1 scenarios equal\n", "")


def test_conform_shows_the_first_difference(viisim: Viisim, shared: Path, tmp_path: Path) -> None:
    golden = golden_file(shared)
    opened = gzip.open if golden.suffix == ".gz" else open
    with opened(golden, "rt") as file:
        lines = [json.loads(line) for line in file]
    step = next(line for line in lines if line["kind"] == "step")
    step["free_blocks"] += 1
    (tmp_path / "false.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answer = viisim("conform", golden, "false.jsonl")
    assert answer.status == 1
    first, last = answer.out.splitlines()
    assert f"step {step['step']}: free_blocks: expected {step['free_blocks']}" in first
    assert last == "1/2 scenarios equal"


def test_trace_info_shows_figures(viisim: Viisim, tmp_path: Path) -> None:
    path = small_trace(tmp_path)
    out = viisim("trace", "info", path).out
    assert "azure" in out
    assert "40.0 s" in out
    assert json.loads(viisim("trace", "info", path, "--json").out)["requests"] == 5


def test_a_runs_journal_replays(viisim: Viisim) -> None:
    viisim("run", "small.yaml", "--no-plots", "--journal")
    journal = "runs/small/journals/seed-2.jsonl"
    answer = viisim("replay", journal)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.endswith("replayed with zero differences\n")
    assert json.loads(viisim("replay", journal, "--json").out)["equal"] is True


def test_a_falsified_journal_does_not_replay(viisim: Viisim, tmp_path: Path) -> None:
    viisim("run", "small.yaml", "--no-plots", "--journal")
    journal = tmp_path / "runs" / "small" / "journals" / "seed-1.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if '"Dispatch"' in line)
    lines[number] = lines[number].replace('"replica_id":"r', '"replica_id":"x')
    journal.write_text("".join(lines))
    answer = viisim("replay", journal)
    assert answer.status == 1
    assert f"line {number + 1}: " in answer.out
