"""Comparisons: paired, plain in what they show, and taken up where they were left."""

import csv
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.comparison_builders import SEEDS, cell, cell_run, compared, in_classes
from tests.result_builders import Objectives, queue
from tests.small_experiment import small_file
from viisim.capacity import capacity_cell, capacity_per_s
from viisim.cells import policy_label, policy_spec, settings_of
from viisim.cli import main
from viisim.cli.compare import load_list
from viisim.comparison import METRICS, Comparison, compare_runs
from viisim.comparison_tables import blocks, latex, markdown
from viisim.errors import InputError
from viisim.metrics import seed_metrics
from viisim.statistics import NO_DIFFERENCE, UNKNOWN, holm, paired_difference, verdict

# -- statistics --


def test_a_difference_is_estimated_within_seeds() -> None:
    # Gaps 1, 2, 3: mean 2, standard deviation 1, t = 2 * sqrt(3), p = 0.0742 with 2 degrees.
    difference = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert difference == {
        "mean": 2.0,
        "half_width": pytest.approx(2.484138),
        "seeds": 3,
        "p_value": pytest.approx(0.07418, abs=1e-5),
    }


def test_a_seed_without_one_of_the_figures_is_left_out_of_the_pairs() -> None:
    assert paired_difference([1.0, None, 3.0], [1.0, 5.0, None])["seeds"] == 1


@pytest.mark.parametrize(("gap", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_seeds_that_all_say_the_same_leave_no_doubt(gap: float, p: float) -> None:
    assert paired_difference([1.0 + gap, 2.0 + gap], [1.0, 2.0])["p_value"] == p


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == [0.03, 0.06, 0.06, None]


@pytest.mark.parametrize(
    ("change", "p", "better", "said"),
    [
        (-1.0, 0.01, "lower", "better"),
        (1.0, 0.01, "lower", "worse"),
        (1.0, 0.01, "higher", "better"),
        (1.0, 0.01, "neither", "higher"),
        (1.0, 0.05, "higher", NO_DIFFERENCE),
        (1.0, None, "higher", UNKNOWN),
    ],
)
def test_a_verdict_is_plain(change: float, p: float | None, better: Any, said: str) -> None:
    difference = {"mean": change, "half_width": 0.1, "seeds": 3}
    assert verdict(difference, p, better) == said


@pytest.mark.slow
def test_equal_policies_show_no_difference_in_nine_of_ten_seed_sets() -> None:
    # Not paired at all: other requests for each, so the test is harder than the real one. With
    # 5 % of false verdicts expected, more than 10 of 100 come in 1 % of such trials.
    slo = Objectives(ttft_s=0.5)
    seeds = [seed_metrics(queue(0.7, 400, seed, 2), slo, 0.1) for seed in range(1000)]
    shown = dict.fromkeys((metric.key for metric in METRICS), 0)
    for first in range(0, 1000, 10):
        one, other = seeds[first : first + 5], seeds[first + 5 : first + 10]
        for metric in METRICS:
            gap = paired_difference([metric.of(s) for s in one], [metric.of(s) for s in other])
            said = verdict(gap, gap["p_value"], metric.better)
            shown[metric.key] += said not in (NO_DIFFERENCE, UNKNOWN)
    assert {key: count for key, count in shown.items() if count > 10} == {}


# -- what is compared --


@pytest.mark.parametrize(
    ("text", "spec", "label"),
    [
        ("round_robin", {"name": "round_robin"}, "round_robin"),
        ("a/x=0.5/y=[1]", {"name": "a", "x": 0.5, "y": [1]}, "a x=0.5 y=[1]"),
        ("some.module:Mine/x=yes", {"class": "some.module:Mine", "x": True}, "Mine x=True"),
    ],
)
def test_policies_are_named_with_their_parameters(
    text: str, spec: dict[str, Any], label: str
) -> None:
    assert policy_spec(text) == spec
    assert policy_label(spec) == label


def test_a_policys_file_is_looked_up_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert policy_spec("own/mine.py:Mine") == {"class": f"{tmp_path}/own/mine.py:Mine"}


def test_the_same_policy_twice_is_told_apart(tmp_path: Path) -> None:
    (setting,) = settings_of([small_file(tmp_path)], ["random", "random"], [])
    assert list(setting.variants) == ["random", "random #2"]


def test_experiments_of_one_name_are_refused(tmp_path: Path) -> None:
    file = small_file(tmp_path)
    with pytest.raises(InputError, match="two of the files are named 'small'"):
        settings_of([file, file], [], [])


def test_experiments_with_other_seeds_are_refused(tmp_path: Path) -> None:
    file = small_file(tmp_path)
    other = tmp_path / "other.yaml"
    text = file.read_text().replace("name: small", "name: other")
    other.write_text(text.replace("seeds: [1, 2]", "seeds: [1, 3]"))
    with pytest.raises(InputError, match="other has other seeds than small; give --seeds"):
        settings_of([file, other], [], [])


@pytest.mark.parametrize("text", ["", "0", "0.5,x", "-1", "nan"])
def test_a_load_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--load"):
        load_list(text)


def test_loads_are_sorted_and_once_each() -> None:
    assert load_list("0.9,0.5,0.9") == [0.5, 0.9]


# -- figures and differences --


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A queue, the same again, and a faster one, in two classes with two tenants."""
    return compare_runs(compared(tmp_path_factory.mktemp("compared")))


def said(comparison: Comparison, variant: str, metric: str, part: str | None = None) -> str:
    (found,) = (
        d["verdict"]
        for d in comparison["differences"]
        if (d["variant"], d["metric"], d["traffic_class"]) == (variant, metric, part)
    )
    return found


def test_the_same_again_shows_no_difference_in_any_figure(comparison: Comparison) -> None:
    verdicts = {d["verdict"] for d in comparison["differences"] if d["variant"] == "same"}
    assert verdicts == {NO_DIFFERENCE}


@pytest.mark.parametrize("part", [None, "interactive", "batch"])
def test_faster_is_better_as_a_whole_and_in_each_class(
    comparison: Comparison, part: str | None
) -> None:
    assert said(comparison, "fast", "e2e_s.mean", part) == "better"


def test_verdicts_are_corrected_for_the_number_of_policies(comparison: Comparison) -> None:
    for difference in comparison["differences"]:
        if difference["variant"] == "fast" and difference["p_value"]:
            assert difference["holm_p_value"] == pytest.approx(
                min(1, 2 * difference["p_value"]), rel=1e-5
            )


def test_a_saturated_cell_is_flagged_and_so_is_every_difference_from_it(tmp_path: Path) -> None:
    loads = {"calm": 0.5, "swamped": 3.0}
    pairs = [
        cell_run(tmp_path, cell(name), [queue(load, 1000, seed) for seed in SEEDS])
        for name, load in loads.items()
    ]
    flagged = compare_runs(pairs)
    assert [c["saturated_seeds"] for c in flagged["cells"]] == [[], list(SEEDS)]
    assert all(difference["saturated"] for difference in flagged["differences"])
    assert "swamped*" in markdown(next(blocks(flagged)))


def test_settings_and_loads_are_compared_by_themselves(tmp_path: Path) -> None:
    pairs = [
        cell_run(tmp_path, cell(variant, load), [in_classes(queue(load, 300, 1))])
        for load in (0.5, 0.7)
        for variant in ("one", "other")
    ]
    loaded = compare_runs(pairs)
    assert loaded["loads"] == [0.5, 0.7]
    assert {(d["load"], d["variant"]) for d in loaded["differences"]} == {
        (0.5, "other"),
        (0.7, "other"),
    }


def test_tables_are_a_rectangle_of_figures_with_the_signs_of_what_is_shown(
    comparison: Comparison,
) -> None:
    (block, *classes) = blocks(comparison)
    assert [part.traffic_class for part in classes] == ["batch", "interactive"]
    figures = markdown(block).split("\n\n")[2].splitlines()
    assert len({line.count("|") for line in figures}) == 1
    (line,) = [line for line in figures if line.startswith("| E2E mean (s)")]
    base, same, fast = line.split("|")[2:5]
    assert ("+" in base, "+" in same, "+" in fast) == (False, False, True)


def test_latex_escapes_what_it_must(tmp_path: Path) -> None:
    pairs = [cell_run(tmp_path, cell("a_b"), [queue(0.5, 200)])]
    text = latex(next(blocks(compare_runs(pairs))))
    assert r"a\_b" in text
    assert re.search(r"(?<!\\)[%_#&](?! )", text.replace("& ", "")) is None


def test_capacity_is_the_rate_between_the_first_and_the_last_fifth_of_the_work(
    tmp_path: Path,
) -> None:
    result = queue(0.5, 100)
    columns = result.requests
    columns["prompt_tokens"][:] = columns["output_tokens"][:] = 100
    # One a second between the first fifth and the last, which are far slower.
    gaps_s = np.where((np.arange(100) >= 20) & (np.arange(100) <= 80), 1.0, 50.0)
    ends_ns = (np.cumsum(gaps_s) * 1e9).astype(np.int64)
    columns["arrived_ns"][:] = columns["dispatched_ns"][:] = columns["started_ns"][:] = 0
    columns["first_token_ns"], columns["finished_ns"] = ends_ns.copy(), ends_ns
    result.ended_ns = int(ends_ns[-1])
    _, run = cell_run(tmp_path, cell("a"), [result])
    assert capacity_per_s(run) == 1.0


MIXED = """{kind: mixed, parts: [
    {kind: synthetic, preset: azure_conv, rate_per_s: 2.0, requests: 20},
    {kind: sessions, preset: agentic_coding, rate_per_s: 0.1, requests: 30}]}"""


def test_capacity_is_measured_with_everything_at_once_and_enough_of_it(tmp_path: Path) -> None:
    (setting,) = settings_of([small_file(tmp_path)], [], [f"workload={MIXED}", "seeds=[7, 8]"])
    measured = capacity_cell(setting).experiment
    parts = measured.workload.parts
    # Two replicas of 16 places, ten times: seven times the 50 requests.
    assert [part.requests for part in parts] == [140, 210]
    assert [part.rate_per_s for part in parts] == [2e6, 1e5]
    assert measured.seeds == (7,)


def test_a_capacity_that_cannot_be_measured_is_the_users_to_repair(tmp_path: Path) -> None:
    _, run = cell_run(tmp_path, cell("a"), [queue(0.5, 9)])
    with pytest.raises(InputError, match="9 requests finished, too few to measure the capacity"):
        capacity_per_s(run)


# -- on the command line --

Viisim = Callable[..., tuple[int, str, str]]


@pytest.fixture
def viisim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Viisim:
    """`viisim ARGUMENTS` in a folder that holds `small.yaml`."""
    small_file(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["viisim", *arguments])
        status: Any = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else; where figures do not matter, none are drawn."""
    monkeypatch.setattr("viisim.compare.draw_comparison", lambda *_: None)


POLICIES = ("compare", "small.yaml", "--policies", "round_robin,least_loaded", "--out", "here")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_comparison_leaves_tables_plots_captions_and_cells(
    viisim: Viisim, tmp_path: Path
) -> None:
    status, out, err = viisim(*POLICIES)
    assert (status, err) == (0, "")
    assert "least_loaded against round_robin" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    names = {name.partition("/")[0] for name in contents(tmp_path / "here")}
    assert names == {"captions.md", "cells", "comparison.json", "plots", "tables"}
    with (tmp_path / "here/tables/differences.csv").open() as file:
        assert {row["variant"] for row in csv.DictReader(file)} == {"least_loaded"}


@pytest.mark.slow
def test_no_file_names_a_folder_or_the_day(viisim: Viisim, tmp_path: Path) -> None:
    viisim(*POLICIES)
    everything = b"".join(contents(tmp_path / "here").values())
    day = datetime.now(tz=UTC).strftime("%Y-%m-%d")
    traces = (str(tmp_path), str(Path.cwd()), str(Path.home()), day)
    assert [trace for trace in traces if trace.encode() in everything] == []


@pytest.mark.slow
def test_what_is_complete_is_not_run_again(
    viisim: Viisim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viisim(*POLICIES)
    before = contents(tmp_path / "here")
    monkeypatch.setattr("viisim.cells.run_seed", None)
    _, out, _ = viisim(*POLICIES)
    assert "2 of 2 cells taken over" in out
    assert contents(tmp_path / "here") == before


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_another_experiment_is_run_again(viisim: Viisim, tmp_path: Path) -> None:
    viisim(*POLICIES)
    _, out, _ = viisim(*POLICIES, "--set", "workload.requests=30")
    assert "taken over" not in out
    assert json.loads((tmp_path / "here/comparison.json").read_text())["cells"][0]["requests"] == 60


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_broken_cell_is_run_again_and_so_is_everything_with_fresh(
    viisim: Viisim, tmp_path: Path
) -> None:
    viisim(*POLICIES)
    before = contents(tmp_path / "here")
    (tmp_path / "here/cells/small.least_loaded/requests.parquet").unlink()
    assert "1 of 2 cells taken over" in viisim(*POLICIES)[1]
    assert "taken over" not in viisim(*POLICIES, "--fresh")[1]
    assert contents(tmp_path / "here") == before


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_the_number_of_processes_changes_no_byte(viisim: Viisim, tmp_path: Path) -> None:
    viisim(*POLICIES)
    viisim(*POLICIES[:-1], "there", "--jobs", "2")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_policy_against_itself_shows_no_difference(viisim: Viisim) -> None:
    status, out, _ = viisim("compare", "small.yaml", "--policies", "random,random", "--json")
    assert status == 0
    assert {d["verdict"] for d in json.loads(out)["differences"]} == {NO_DIFFERENCE}


@pytest.mark.slow
def test_loads_are_fractions_of_the_measured_capacity(viisim: Viisim, tmp_path: Path) -> None:
    _, out, _ = viisim("compare", "small.yaml", "--load", "0.5,1", "--seeds", "3", "--json")
    content: Comparison = json.loads(out)
    capacity = content["capacity_requests_per_s"]["small"]
    for compared_cell in content["cells"]:
        load, offered = compared_cell["load"], compared_cell["offered_requests_per_s"]
        assert offered == pytest.approx(load * capacity, rel=0.05)
    plots = {path.name for path in (tmp_path / "runs/small-comparison/plots").iterdir()}
    assert "latency_load.small.pdf" in plots


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_files_are_compared_with_each_other(viisim: Viisim, tmp_path: Path) -> None:
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "other.yaml").write_text(
        text.replace("name: small", "name: other").replace("least_loaded", "random")
    )
    _, out, _ = viisim("compare", "small.yaml", "other.yaml", "--json")
    content = json.loads(out)
    assert (content["baseline"], content["variants"]) == ("small", ["small", "other"])


def test_a_folder_of_something_else_is_refused(viisim: Viisim, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/notes.txt").write_text("mine")
    status, _, err = viisim(*POLICIES)
    assert status == 2
    assert (
        err == "error: here: not empty, and no comparison; remove it or give another with --out\n"
    )
    assert contents(tmp_path / "here") == {"notes.txt": b"mine"}


def test_an_unknown_policy_is_the_users_mistake(viisim: Viisim) -> None:
    status, _, err = viisim("compare", "small.yaml", "--policies", "round_robin,least_lodaed")
    assert status == 2
    assert "unknown policy 'least_lodaed'. Did you mean 'least_loaded'?" in err
