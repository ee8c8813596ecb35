"""How fast the machine is while a worker computes on its CPU: a small work, always the same, timed
ten times a second.

Machines are shared: what they give to one of their tenants may change by a third within seconds,
and step times with it. The gauge runs on the worker's own cores, as whatever a process starts does,
but knows nothing of the worker. It measures CPU time, so that waiting for the core does not count,
and takes some 2 % of it. The work is half a worker's: a product with a matrix that fits no cache of
a core, which memory limits, and some plain Python.

A shared machine may also halt for a while, and whoever computes does not see that but by the clock.
The gauge sees it, too: it sleeps for a hundredth of a second at a time, and wakes up much too late.

`python -m runtime.vllm_plugin.gauge FILE` adds to the file, by the clock of the step records,
`{"at_s": ..., "cpu_s": ...}` for each time that it worked and `{"at_s": ..., "halted_s": ...}` for
each halt, until the process that started it has ended. Imports the standard library and numpy,
which vLLM brings.
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
_SLEEP_S = 0.01
_HALT_S = 0.02
"""Who is so late was not just waiting for its core: of 47,000 sleeps beside busy workers, on a
machine in a quiet hour, none was (`viisim validate --live --quick`)."""
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

        def write(at_s: float, **what: float) -> None:
            rounded = {name: round(value, 7) for name, value in what.items()}
            file.write(json.dumps({"at_s": round(at_s, 6), **rounded}) + "\n")

        while os.getppid() == parent:
            at_s, begun_s = time.monotonic(), time.thread_time()
            matrix @ vectors
            json.dumps(_NUMBERS)
            cpu_s = time.thread_time() - begun_s
            now_s = time.monotonic()
            if now_s - at_s < _HALT_S:
                write(at_s, cpu_s=cpu_s)
            else:  # a halt may count as CPU time: how fast the machine is, this does not tell
                write(at_s, halted_s=now_s - at_s)
            next_s = now_s + _EVERY_S
            while now_s < next_s:
                time.sleep(_SLEEP_S)
                due_s, now_s = now_s + _SLEEP_S, time.monotonic()
                if now_s - due_s >= _HALT_S:
                    write(due_s, halted_s=now_s - due_s)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
