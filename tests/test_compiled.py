"""The state of optional compilation, as the command line and the benchmark report it."""

import importlib.machinery
import os
from pathlib import Path

import pytest

from viisim import compiled


def _pretend(monkeypatch: pytest.MonkeyPatch, module: Path) -> None:
    spec = importlib.machinery.ModuleSpec("m", None, origin=str(module))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)


def test_plain_sources_are_not_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pretend(monkeypatch, tmp_path / "blocks.py")
    assert compiled.status() == "no"


@pytest.mark.parametrize(("source_age_s", "status"), [(10, "yes"), (-10, "stale")])
def test_a_compiled_module_is_stale_once_its_source_is_newer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source_age_s: int, status: str
) -> None:
    source, module = tmp_path / "blocks.py", tmp_path / "blocks.cpython-311.so"
    for file, age_s in ((source, source_age_s), (module, 0)):
        file.touch()
        os.utime(file, (1_000_000 - age_s, 1_000_000 - age_s))
    _pretend(monkeypatch, module)
    assert compiled.status() == status
