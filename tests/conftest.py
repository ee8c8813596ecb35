"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real traces and golden step traces: `$VIISIM_SHARED`, else `../shared`."""
    folder = Path(os.environ.get("VIISIM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set VIISIM_SHARED")
    return folder
