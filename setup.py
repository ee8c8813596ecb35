"""Everything about the package is in pyproject.toml; this file only compiles, if asked to.

    pip install -e '.[fast]'
    python setup.py build_ext --inplace

compiles the simulator's hot modules with mypyc: the same sources, the same results to the bit,
about twice the speed. It needs a C compiler. After an edit of these modules compile again, or
delete the `*.so` files: Python prefers a compiled module to its source.
"""

import sys

from setuptools import setup

HOT_MODULES = [
    "viisim/engine/sequence.py",
    "viisim/engine/blocks.py",
    "viisim/engine/scheduler.py",
    "viisim/engine/step_time.py",
    "viisim/engine/step_log.py",
    "viisim/engine/engine.py",
    "viisim/engine/replica.py",
    "viisim/simulation.py",
]

if "build_ext" in sys.argv:
    from mypyc.build import mypycify

    setup(ext_modules=mypycify([*HOT_MODULES, "--follow-imports=silent"], group_name="viisim.hot"))
else:
    setup()
