"""What viisim puts into vLLM: a recorder of engine steps, and its scheduler driven by hand.

`step_recorder` and `stat_logger` are loaded by vLLM, in its own environment; `golden` is a script
that the interpreter with vLLM runs, as is `gauge`. They import vllm, the standard library, and
`records`;
viisim's dependencies need not be installed beside vLLM. `stepped` is the other end of `golden`'s
pipes and runs where viisim runs, as does `scenarios`.

    VIISIM_STEP_RECORDS=worker0.steps.jsonl PYTHONPATH=<the folder that holds `runtime`> \\
        vllm serve MODEL --scheduler-cls runtime.vllm_plugin.step_recorder.RecordingScheduler
"""

from __future__ import annotations

import os
from pathlib import Path

TESTED_VLLM = "0.32.0"
"""The version whose scheduler these modules were written against and tried with."""

RECORDS_VARIABLE = "VIISIM_STEP_RECORDS"
"""Environment variable: the file that the records of the (first) engine go to."""

GAUGE_VARIABLE = "VIISIM_MACHINE_GAUGE"
"""Environment variable: the file that the machine's speed goes to, for a worker on the CPU."""

SCHEDULER_CLS = "runtime.vllm_plugin.step_recorder.RecordingScheduler"
"""The argument of `vllm serve --scheduler-cls`."""


def recording_environment(records: Path, gauge: Path | None = None) -> dict[str, str]:
    """What to add to the environment of `vllm serve --scheduler-cls SCHEDULER_CLS`; `gauge` is for
    the speed of the machine's CPU, where that is what computes.

    vLLM then finds this package in the folder that viisim was imported from: a checkout. What the
    caller's PYTHONPATH holds is kept.
    """
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        RECORDS_VARIABLE: str(records.absolute()),
        **({GAUGE_VARIABLE: str(gauge.absolute())} if gauge is not None else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def version_warning(version: str) -> str | None:
    """One line for the user of a vLLM other than the tested one; None for that."""
    if version.split("+")[0] == TESTED_VLLM:
        return None
    return (
        f"viisim: vLLM {version} is not the tested {TESTED_VLLM}; "
        "`viisim conform --record` shows whether its scheduler still does what is modelled"
    )
