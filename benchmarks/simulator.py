"""How fast the simulator is, as JSON.

    python benchmarks/simulator.py
    python benchmarks/simulator.py --blocks 1500 --shared --requests 1000000

5,000 requests with the lengths of the Azure conversation trace, Poisson 12/s, 4 replicas of
7,500 blocks of 16 tokens, 128 sequences, 2,048 batched tokens, chunked prefill and prefix cache
on, full metrics, step time `bench/a100_like`. `requests_per_s` counts everything from the first
request generated to the columns of the result. `speedup_over_stepping` compares with
`engine.coalesce: false` in the same process. Machines are noisy: compare ratios within a run.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from policies.core import Policy
from policies.registry import make_policy
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.step_time import DecodePoint, StepTime
from viisim.records import SeedResult
from viisim.simulation import ReplicaSpec, Simulation
from viisim.workload.synthetic import Prefixes, Synthetic
from viisim.workload.trace import TraceReplay

MODEL = "bench"
