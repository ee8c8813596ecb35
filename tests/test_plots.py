"""Figures: readable without the code, and the same bytes whatever the user's settings."""

from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from tests.result_builders import NS, Objectives, queue
from viisim.metrics import summarise
from viisim.plots import FIGURES, save
from viisim.results import LoadedRun, load_run, make_manifest, write_run

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """Two seeds on three replicas; some requests are held, and one replica preempts."""
    results = [queue(0.9, 3000, seed, servers=3) for seed in SEEDS]
    for result in results:
        columns = result.requests
        columns["dispatched_ns"] = columns["started_ns"]
        result.replicas[1].preemptions = 12
    manifest = make_manifest({"name": "three"}, SEEDS, {})
    summary = summarise(results, Objectives(ttft_s=2.0), 0.1)
    folder = tmp_path_factory.mktemp("plots") / "run"
    return load_run(write_run(folder, manifest, results, summary, make_plots=False))


@pytest.fixture(scope="module")
def figures(run: LoadedRun) -> dict[str, Figure]:
    return {name: draw(run) for name, draw in FIGURES.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_bytes_under_other_settings(
    run: LoadedRun, tmp_path: Path, name: str
) -> None:
    save(FIGURES[name](run), tmp_path / "ours.png")
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30}):
        save(FIGURES[name](run), tmp_path / "theirs.png")
        assert mpl.rcParams["font.size"] == 20
    content = (tmp_path / "ours.png").read_bytes()
    assert content == (tmp_path / "theirs.png").read_bytes()
    assert not [chunk for chunk in (b"tEXt", b"iTXt", b"tIME") if chunk in content]


@pytest.mark.parametrize("name", FIGURES)
def test_the_title_names_experiment_and_seeds(figures: dict[str, Figure], name: str) -> None:
    title = figures[name].get_suptitle()
    assert title.startswith("three: ")
    assert "seed" in title


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("latency_cdf", ["share of requests (%)", "share of gaps (%)", "(µs, ms or s as written"]),
        ("occupancy", ["KV blocks in use (%)", "in the engine (count)", "simulated time (s)"]),
        ("timeline", ["sequences (count)", "simulated time (s)"]),
    ],
)
def test_every_axis_has_its_unit(figures: dict[str, Figure], name: str, units: list[str]) -> None:
    figure = figures[name]
    words = [figure.get_supylabel()]
    for axes in figure.axes:
        words += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")]
    assert [unit for unit in units if not any(unit in word for word in words)] == []


def test_the_slo_is_a_line_in_the_latency_it_bounds(figures: dict[str, Figure]) -> None:
    panels = figures["latency_cdf"].axes
    bounded = [
        axes.get_title("left")
        for axes in panels
        if any(line.get_label() == "SLO" for line in axes.get_lines())
    ]
    assert bounded == ["Time to first token (TTFT)"]


def test_each_seed_and_all_together_have_a_curve(figures: dict[str, Figure]) -> None:
    for axes in figures["latency_cdf"].axes:
        labels = [line.get_label() for line in axes.get_lines()]
        assert (labels.count("one seed"), labels.count("all seeds")) == (2, 1)


def test_requests_held_centrally_have_a_lane_of_their_own(figures: dict[str, Figure]) -> None:
    lanes = [axes.get_ylabel() for axes in figures["timeline"].axes]
    assert lanes == ["central\nqueue", "r0", "r1", "r2"]


def test_preemptions_are_told_beside_the_replica(figures: dict[str, Figure]) -> None:
    texts = {
        axes.get_ylabel(): [t.get_text() for t in axes.texts] for axes in figures["timeline"].axes
    }
    assert texts["r1"] == ["12 preemptions"]
    assert texts["r0"] == [""]


def test_long_runs_are_told_in_hours(tmp_path: Path) -> None:
    result = queue(0.8, 300)
    for columns in (result.requests, result.samples):
        for name in columns:
            if name.endswith("_ns"):
                columns[name] *= 1000
    result.ended_ns *= 1000
    summary = summarise([result], Objectives(), 0.0)
    folder = write_run(
        tmp_path / "run",
        make_manifest({"name": "long"}, [1], {}),
        [result],
        summary,
        make_plots=False,
    )
    assert result.ended_ns > 4 * 3600 * NS
    assert FIGURES["occupancy"](load_run(folder)).axes[-1].get_xlabel() == "simulated time (h)"
