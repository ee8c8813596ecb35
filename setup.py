"""Everything about the package is in pyproject.toml; this file only compiles, if asked to.

    VIISIM_COMPILE=1 pip install -e .

compiles the simulator's hot modules with mypyc: the same sources, the same results to the bit,
about twice the speed. It needs a C compiler. After an edit of these modules, install again (or
delete the `*.so` files beside them): Python prefers the compiled module to the source.
"""

import os

from setuptools import setup

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
    "viisim/simulation.py",
]

if os.environ.get("VIISIM_COMPILE"):
    try:
        from mypyc.build import mypycify
    except ImportError:  # setuptools asks for the requirements before it has them
        setup(setup_requires=["mypy>=1.13", "numpy", "simpy"])
    else:
        setup(ext_modules=mypycify([*HOT_MODULES, "--ignore-missing-imports"]))
else:
    setup()
