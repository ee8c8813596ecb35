"""Everything about the package is in pyproject.toml; this file only compiles.

The hot modules of the core and of the simulator are compiled with mypyc: the same sources, the
same results to the bit, more than twice the speed. Without a C compiler, or with VIISIM_PURE
set, they stay as they are.
"""

import os
import sys

from setuptools import Extension, setup

HOT_MODULES = [
    "policies/core.py",
    "policies/state.py",
    "viisim/engine/sequence.py",
    "viisim/engine/blocks.py",
    "viisim/engine/scheduler.py",
    "viisim/engine/step_time.py",
    "viisim/engine/step_log.py",
    "viisim/engine/engine.py",
    "viisim/engine/replica.py",
    "viisim/flight.py",
    "viisim/transit.py",
    "viisim/simulation.py",
]
BUILDS = {"build_ext", "bdist_wheel", "editable_wheel"}


def extensions() -> list[Extension]:
    if os.environ.get("VIISIM_PURE") or not BUILDS.intersection(sys.argv):
        return []
    from mypyc.build import mypycify

    modules: list[Extension] = mypycify(
        [*HOT_MODULES, "--follow-imports=silent"], group_name="policies.hot"
    )
    for module in modules:
        module.optional = True
    return modules


setup(ext_modules=extensions())
