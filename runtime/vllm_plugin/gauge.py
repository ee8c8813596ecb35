"""How fast the machine is while a worker computes on its CPU: a small work, always the same, timed
ten times a second.

Machines are shared: what they give to one of their tenants may change by a third within seconds,
and step times with it. The gauge runs on the worker's own cores, as whatever a process starts does,
but knows nothing of the worker. It measures CPU time, so that waiting for the core does not count,
and takes some 2 % of it. The work is half a worker's: a product with a matrix that fits no cache of
a core, which memory limits, and some plain Python.

`python -m runtime.vllm_plugin.gauge FILE` adds `{"at_s": ..., "cpu_s": ...}` to the file, by the
clock of the step records, until the process that started it has ended. Imports the standard library
and numpy, which vLLM brings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.vllm_plugin import GAUGE_VARIABLE

_EVERY_S = 0.1
_MATRIX = (1024, 2048)
"""Of float32: 8 MiB."""
_VECTORS = 8
_NUMBERS = list(range(500))
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def start_gauge() -> None:
    """Start it beside this process, on the same cores, if `VIISIM_MACHINE_GAUGE` names a file."""
    file = os.environ.get(GAUGE_VARIABLE)
    if file:
        subprocess.Popen(
            [sys.executable, "-m", __name__, file],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1")},
        )


def run(path: Path) -> None:
    """Time the work, until nobody is there who started this."""
    import numpy as np

    parent = os.getppid()
    draw = np.random.default_rng(0)
    matrix = draw.random(_MATRIX, dtype=np.float32)
    vectors = draw.random((_MATRIX[1], _VECTORS), dtype=np.float32)
    with path.open("a", encoding="utf-8", buffering=1) as file:
        while os.getppid() == parent:
            at_s, begun_s = time.monotonic(), time.thread_time()
            matrix @ vectors
            json.dumps(_NUMBERS)
            cpu_s = time.thread_time() - begun_s
            file.write(json.dumps({"at_s": round(at_s, 6), "cpu_s": round(cpu_s, 7)}) + "\n")
            time.sleep(_EVERY_S)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
