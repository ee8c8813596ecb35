"""Whether the hot modules run compiled (setup.py), and from the present source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

#: Those of the compiled modules that are edited most.
_MODULES = (
    "viisim.simulation",
    "viisim.engine.engine",
    "viisim.engine.scheduler",
    "viisim.engine.blocks",
)


def status() -> Literal["no", "yes", "stale"]:
    """`stale`: a compiled module is older than the source beside it, and hides its edits."""
    found: Literal["no", "yes"] = "no"
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.suffix == ".py":
            continue
        found = "yes"
        source = origin.with_name(origin.name.split(".")[0] + ".py")
        if source.exists() and source.stat().st_mtime > origin.stat().st_mtime:
            return "stale"
    return found
