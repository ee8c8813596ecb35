"""viisim: simulate, calibrate and compare LLM-serving schedulers, then deploy them unchanged.

from viisim import simulate

run = simulate("experiments/least_loaded.yaml", workload__rate_per_s=0.5)
run.requests.to_pandas()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import policies  # noqa: F401 - decides whether compiled modules are used, before any is imported

if TYPE_CHECKING:
    from viisim.experiment import Run, simulate

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "simulate"]


def __getattr__(name: str) -> Any:
    """`simulate` and `Run`, imported when first asked for: `import viisim` alone stays light,
    and the runtime, which reads a version here, never drags in the simulator."""
    if name in ("Run", "simulate"):
        from viisim import experiment

        return getattr(experiment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
