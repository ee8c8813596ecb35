"""Pages: whole by themselves, well-formed, and safe against what files may contain."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.comparison_builders import cell, cell_run, compared, in_classes
from tests.result_builders import queue
from viisim.cli import main
from viisim.compare import write_json
from viisim.comparison import compare_runs
from viisim.comparison_plots import draw_comparison
from viisim.errors import InputError
from viisim.report_page import page_of

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: that every tag is closed in turn, and what is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison directory of three variants with classes and tenants."""
    folder = tmp_path_factory.mktemp("page") / "compared"
    pairs = compared(folder)
    (folder / "plots").mkdir()
    content = compare_runs(pairs)
    write_json(folder / "comparison.json", content)
    draw_comparison(content, pairs, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory without plots."""
    of = cell("a")
    folder = tmp_path_factory.mktemp("page")
    return cell_run(folder, of, [in_classes(queue(0.8, 300, seed)) for seed in (1, 2)])[1].path


def test_a_page_fetches_nothing(comparison: Path, run: Path) -> None:
    for folder in (comparison, run):
        text = page_of(folder)
        links = Page(text).links
        assert links
        assert all(link.startswith("data:image/png;base64,") for link in links)
        assert "@import" not in text
        assert "http" not in text.replace("https", "http").partition("<body>")[0]


def test_a_comparisons_page_has_every_figure_with_its_caption(comparison: Path) -> None:
    page = Page(page_of(comparison))
    assert page.tags.count("img") == page.tags.count("figcaption") == 3
    assert "Cumulative distributions of latency" in page.text


def test_a_comparisons_page_says_what_is_shown(comparison: Path) -> None:
    text = Page(page_of(comparison)).text
    assert "same, fast against base." in text
    assert "fast better : TTFT mean" in text
    assert "same no difference shown :" in text


def test_a_comparisons_page_says_how_to_repeat_each_cell(comparison: Path) -> None:
    assert "viisim verify compared/cells/mm1.fast.None" in page_of(comparison)


def test_a_runs_page_has_tables_figures_and_how_to_repeat_it(run: Path) -> None:
    page = Page(page_of(run))
    for words in ("time to first token", "traffic class", "tenant", "viisim verify", "numpy"):
        assert words in page.text
    assert page.tags.count("img") == 3


def test_a_page_is_the_same_twice(run: Path) -> None:
    assert page_of(run) == page_of(run)


def test_text_of_files_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    _, loaded = cell_run(tmp_path, cell("a"), [queue(0.8, 300)])
    path = loaded.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["description"] = "<script>alert(1)</script> & more"
    manifest["config"]["name"] = "<b>"
    path.write_text(json.dumps(manifest))
    page = Page(page_of(loaded.path))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & more" in page.text


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`viisim run` or `viisim compare`"):
        page_of(tmp_path)


def test_the_page_goes_beside_the_folder_or_where_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["-o", "own.html"]):
        monkeypatch.setattr(sys, "argv", ["viisim", "report", str(run), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    beside = run.with_name(f"{run.name}.html")
    assert beside.read_bytes() == (tmp_path / "own.html").read_bytes()
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{beside}: ")
