"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a check that fails by chance tells nothing of a change. To search
# further, `--hypothesis-profile=search --hypothesis-seed=N`.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real traces and golden step traces: `$VIISIM_SHARED`, else `../shared`."""
    folder = Path(os.environ.get("VIISIM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set VIISIM_SHARED")
    return folder
