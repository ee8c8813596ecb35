"""Which modules run compiled, and that none of them hides a newer source.

Where there is a C compiler, `pip install` compiles the hot modules (setup.py). Once the source
of one is edited, all are imported from their sources again: slower, never outdated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Literal

_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("policies", "viisim", "viisim/engine")


def status(root: Path = _ROOT) -> Literal["no", "yes", "stale"]:
    """`stale`: a source is newer than what was compiled from it, so that all sources are used."""
    modules = _compiled_modules(root)
    if not modules:
        return "no"
    return "stale" if any(map(_is_outdated, modules.values())) else "yes"


def prefer_newer_sources() -> None:
    """Import from sources if any is newer than what was compiled from it. All of them: compiled
    classes cannot be mixed with others of their own module."""
    if status() == "stale":
        sys.meta_path.insert(0, _Sources(_compiled_modules(_ROOT)))


def _compiled_modules(root: Path) -> dict[str, Path]:
    """The source of each module that is there in compiled form too, by the module's name."""
    return {
        f"{folder}/{source.stem}".replace("/", "."): source
        for folder in _FOLDERS
        for source in sorted((root / folder).glob("*.py"))
        if source.with_suffix(EXTENSION_SUFFIXES[0]).exists()
    }


def _is_outdated(source: Path) -> bool:
    compiled = source.with_suffix(EXTENSION_SUFFIXES[0])
    return source.stat().st_mtime > compiled.stat().st_mtime


class _Sources(MetaPathFinder):
    def __init__(self, modules: dict[str, Path]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self._modules.get(name)
        return None if source is None else spec_from_file_location(name, source)
