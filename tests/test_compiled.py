"""Compiled modules are used until a source is newer."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import policies
from policies import compiled

ROOT = Path(policies.__file__).parent.parent


def _module(root: Path, source_is_newer_by_s: int) -> None:
    folder = root / "policies"
    folder.mkdir()
    (folder / "core.py").touch()
    os.utime(folder / "core.py", (10_000, 10_000 + source_is_newer_by_s))
    module = folder / f"core{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.touch()
    os.utime(module, (10_000, 10_000))


def test_sources_alone_are_not_compiled(tmp_path: Path) -> None:
    assert compiled.status(tmp_path) == "no"


@pytest.mark.parametrize(("newer_by_s", "status"), [(-10, "yes"), (10, "stale")])
def test_what_was_compiled_is_stale_once_its_source_is_newer(
    tmp_path: Path, newer_by_s: int, status: str
) -> None:
    _module(tmp_path, newer_by_s)
    assert compiled.status(tmp_path) == status


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages in which one source is newer than what was compiled from it."""
    if compiled.status() != "yes":
        pytest.skip("nothing is compiled here")
    root = tmp_path_factory.mktemp("edited")
    for name in ("policies", "viisim"):
        shutil.copytree(ROOT / name, root / name)  # with the times of the files
    os.utime(root / "viisim" / "engine" / "blocks.py")
    return root


def run_in(root: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edited_source_is_what_runs(edited: Path) -> None:
    files = run_in(
        edited,
        "import policies.core, viisim.simulation as s; print(policies.core.__file__, s.__file__)",
    )
    assert [Path(file).suffix for file in files.split()] == [".py", ".py"]


SAVE = """
from policies.core import SchedulerCore
from policies.interface import Arrived, ReplicaChanged
from policies.journal import checkpoint
from policies.least_loaded import LeastLoaded
from policies.testing import request

core = SchedulerCore(LeastLoaded())
core.handle(ReplicaChanged(0.0, "r0", "ready", "m"))
core.handle(Arrived(1.0, request(id="a")))
core.handle(Arrived(1.0, request(id="b", model="other")))
print(checkpoint(core))
"""
LOAD = """
from policies.interface import Finished
from policies.journal import restore

core = restore({text!r})
core.handle(Finished(2.0, "a", 1, 1))
print(core.counts["finished"], core.queued_requests, core.inflight_requests)
"""


@pytest.mark.parametrize("saved_by", ["compiled", "sources"])
def test_a_checkpoint_loads_in_either_build(edited: Path, saved_by: str) -> None:
    here_and_there = (ROOT, edited) if saved_by == "compiled" else (edited, ROOT)
    text = run_in(here_and_there[0], SAVE)
    assert run_in(here_and_there[1], LOAD.format(text=text)) == "1 1 0"
