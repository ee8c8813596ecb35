"""Figures of a comparison: legible without the code, and the same bytes whatever the settings."""

from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from tests.comparison_builders import SEEDS, cell, cell_run, compared
from tests.result_builders import queue
from viisim.comparison import compare_runs
from viisim.comparison_plots import Drawn, _front, draw_comparison, figures, looks

VARIANTS = ["base", "same", "fast"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    """The figures of three variants in two classes with two tenants, at two loads, of which the
    higher swamps all but one."""
    folder = tmp_path_factory.mktemp("drawn")
    pairs = [*compared(folder, 0.5), *compared(folder, 1.6)]
    return {one.name: one for one in figures(compare_runs(pairs, {"mm1": 10.0}), pairs)}


def labels(figure: Figure) -> list[str]:
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_kind_of_figure_is_drawn(drawn: dict[str, Drawn]) -> None:
    loads = ("load-0.5", "load-1.6")
    kinds = [
        f"{kind}.mm1.{load}" for kind in ("latency_cdf", "classes", "pareto") for load in loads
    ]
    assert sorted(drawn) == sorted([*kinds, "latency_load.mm1"])


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("latency_cdf.mm1.load-0.5", ["share of requests (%)", "TTFT (s, log scale)"]),
        ("latency_load.mm1", ["offered load (% of capacity)", "TPOT mean (ms), log scale"]),
        ("classes.mm1.load-0.5", ["TTFT p99 (s)", "E2E p99 (s)", "goodput (requests/s)"]),
        ("pareto.mm1.load-0.5", ["fairness (Jain)", "goodput (requests/s)"]),
    ],
)
def test_axes_have_their_units(drawn: dict[str, Drawn], name: str, units: list[str]) -> None:
    assert [unit for unit in units if unit not in labels(drawn[name].figure)] == []


@pytest.mark.parametrize("name", ["latency_cdf.mm1.load-0.5", "latency_load.mm1"])
def test_every_variant_is_in_the_legend(drawn: dict[str, Drawn], name: str) -> None:
    assert legend(drawn[name].figure) == VARIANTS


def test_each_variant_has_a_line_in_a_band(drawn: dict[str, Drawn]) -> None:
    for axes in drawn["latency_cdf.mm1.load-0.5"].figure.axes:
        assert (len(axes.get_lines()), len(axes.collections)) == (3, 3)


def test_saturated_points_are_hollow(drawn: dict[str, Drawn]) -> None:
    axes = drawn["latency_load.mm1"].figure.axes[0]
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    hollow = [point.get_markerfacecolor() == "white" for point in points]
    # Each variant at 50 % and at 160 %: only the faster keeps up with the latter.
    assert hollow == [False, True, False, True, False, False]


def test_bars_are_grouped_by_class(drawn: dict[str, Drawn]) -> None:
    axes = drawn["classes.mm1.load-0.5"].figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["batch", "interactive"]
    assert len(axes.patches) == 6


def test_without_tenants_goodput_is_set_against_the_urgent_class(tmp_path: Path) -> None:
    pairs = compared(tmp_path, tenants=False)
    (pareto,) = (d for d in figures(compare_runs(pairs), pairs) if d.name.startswith("pareto"))
    assert "interactive: TTFT p99 (s)" in labels(pareto.figure)


def test_captions_give_sizes_and_warn_of_saturation(drawn: dict[str, Drawn]) -> None:
    caption = drawn["latency_cdf.mm1.load-1.6"].caption
    assert "2,000 requests in all seeds together" in caption
    assert "Saturated in some seed: base, same." in caption


def test_the_caption_file_gives_seeds_warm_up_and_versions(tmp_path: Path) -> None:
    pairs = [cell_run(tmp_path, cell("only"), [queue(0.5, 300, seed) for seed in SEEDS])]
    (tmp_path / "plots").mkdir()
    draw_comparison(compare_runs(pairs), pairs, tmp_path)
    text = (tmp_path / "captions.md").read_text()
    for words in ("Seeds 1, 2, 3,", "first 10 %", "Length predictor: none", "numpy", "viisim"):
        assert words in text
    for name in (p.stem for p in (tmp_path / "plots").glob("*.pdf")):
        assert f"## {name}\n" in text


def test_figures_are_the_same_bytes_under_other_settings(tmp_path: Path) -> None:
    pairs = compared(tmp_path)
    for name, settings in (
        ("ours", {}),
        ("theirs", {"font.size": 20, "savefig.dpi": 30, "pdf.fonttype": 3}),
    ):
        (tmp_path / name / "plots").mkdir(parents=True)
        with mpl.rc_context(settings):
            draw_comparison(compare_runs(pairs), pairs, tmp_path / name)
    files = sorted((tmp_path / "ours" / "plots").iterdir())
    assert len(files) == 6
    for file in files:
        content = file.read_bytes()
        assert content == (tmp_path / "theirs" / "plots" / file.name).read_bytes()
        assert not [tag for tag in (b"CreationDate", b"/Producer", b"tEXt") if tag in content]


def test_looks_differ_in_more_than_colour() -> None:
    each = looks([f"p{number}" for number in range(24)]).values()
    assert len({(look.color, look.marker) for look in each}) == 24
    assert len({(look.marker, str(look.line)) for look in list(each)[:8]}) == 8


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 6.0), (4.0, 1.0)]
    assert _front(points, more_is_better=True) == ([3.0, 4.0], [6.0, 1.0])
    assert _front(points, more_is_better=False) == ([1.0, 3.0], [5.0, 6.0])
