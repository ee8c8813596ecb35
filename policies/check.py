"""`check_policy`: whether a policy keeps the promises that simulation and deployment rest on.

Clauses:

1. `deterministic`: same seed, same decisions, twice in one process and in two other processes
   with different string hashes.
2. `own_generator`: randomness comes from `self.rng`, never from a global generator.
3. `no_clock`: time comes from the view and the events, never from a clock.
4. `relative_time`: shifting every instant by a million seconds changes no decision.
5. `valid_answers`: no answer is refused, no question raises, no view is written to.
6. `conservation`: nothing is held for ever on an idle cluster.
7. `outage`: losing all replicas and getting one back raises nothing and loses nothing.
8. `no_kept_view`: no view is used after the call that it was given to.

Causes come before symptoms: a policy that reads a clock is told so, and not also that its
decisions differ from run to run.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import random
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.guard import Guard, KeptView, clock_reads
from policies.interface import Policy, PolicyError
from policies.registry import PolicySpec, make_policy
from policies.rehearsal import END, LAST_ARRIVAL, SECOND, Outcome, Rehearsal

SHIFT_S = 1e6
HASH_SEEDS = ("1", "2")
"""Under these two, sets of the rehearsal's replica ids are walked in different orders."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A clause that a policy breaks, and how to repair it."""

    clause: str
    message: str

    def __str__(self) -> str:
        return f"{self.clause}: {self.message}"


def check_policy(policy: PolicySpec) -> None:
    """Raise PolicyError, a line for each broken clause, unless the policy keeps them all.

    `policy` is a class, or whatever an experiment file may say: a shipped name, `module:Class`,
    `path/to/file.py:Class`, or a mapping with parameters. It takes about a second.
    """
    found = findings(policy)
    if found:
        raise PolicyError("\n".join(map(str, found)))


def findings(policy: PolicySpec) -> list[Finding]:
    """The broken clauses, empty when there are none. Raises PolicySpecError as `make_policy`."""
    make_policy(policy)  # what it imports may read clocks: that is done before anybody looks
    first, found = _watched_run(policy)
    if first is None or found:
        return found
    again, found = _run(policy)
    if again is None:
        return found
    if again != first:
        return [Finding("deterministic", _same_process(first, again))]
    return [*_check_shift(policy, first), *_check_hash_seeds(policy), *_check_outage(policy)]


# -- clauses ---------------------------------------------------------------------------------


def _watched_run(policy: PolicySpec) -> tuple[Outcome | None, list[Finding]]:
    """Clauses 2, 3, 5, 6 and 8, on the first run."""
    before = _global_generators()
    with clock_reads() as reads:
        outcome, found = _run(policy)
    if reads:
        found.append(
            Finding("no_clock", f"{reads[0]}; use view.now_s, or now_s of the event in observe")
        )
    changed = [name for name, state in _global_generators().items() if state != before[name]]
    if changed:
        found.append(
            Finding(
                "own_generator",
                f"the global generator of {' and of '.join(changed)} was used; draw from "
                "self.rng, which each run seeds",
            )
        )
    if outcome is not None and outcome.held:
        found.append(Finding("conservation", _held(outcome)))
    return outcome, found


def _check_shift(policy: PolicySpec, first: Outcome) -> list[Finding]:
    shifted, found = _run(policy, shift_s=SHIFT_S)
    if shifted is None or shifted == first:
        return found
    return [
        Finding(
            "relative_time",
            f"with every instant {SHIFT_S:.0f} s later, {_difference(first, shifted)}; a driver's "
            "clock starts anywhere: use differences of times only",
        )
    ]


def _check_outage(policy: PolicySpec) -> list[Finding]:
    outcome, found = _run(policy, outage=True)
    if outcome is None:
        return [
            Finding(
                "outage",
                f"{finding.message} (while replicas were lost and came back; view.ready(model) "
                "may be empty: answer Hold() then)",
            )
            for finding in found
        ]
    if outcome.held:
        return [Finding("outage", f"after all replicas were lost and returned, {_held(outcome)}")]
    return []


def _check_hash_seeds(policy: PolicySpec) -> list[Finding]:
    """Rehearse in other processes and compare what was decided there."""
    try:
        order = pickle.dumps(_portable(policy))
    except (PolicyError, TypeError, AttributeError, pickle.PicklingError) as error:
        return [Finding("deterministic", f"cannot be tried in another process: {error}")]
    processes = [_start_process(seed) for seed in HASH_SEEDS]
    answers = [process.communicate(order) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            last = errors.decode().strip().splitlines()[-1:]
            return [Finding("deterministic", f"failed in another process: {''.join(last)}")]
    if answers[0][0] != answers[1][0]:
        return [
            Finding(
                "deterministic",
                "decisions depend on PYTHONHASHSEED, probably by walking through a set or by "
                "hash(): sort first, or use a dict, which keeps its order",
            )
        ]
    return []


# -- runs ------------------------------------------------------------------------------------


def _run(policy: PolicySpec, **script: Any) -> tuple[Outcome | None, list[Finding]]:
    """One rehearsal with a new policy: its outcome, or why there is none."""
    guard = Guard()
    made = make_policy(policy)
    try:
        rehearsal = Rehearsal(made, guard=guard, **script)
        outcome = rehearsal.run()
    except Exception as error:
        breach = guard.breaches[0] if guard.breaches else error
        return None, [_blame(breach, made)]
    if guard.breaches:
        return None, [_blame(guard.breaches[0], made)]
    return outcome, []


def _blame(error: Exception, policy: Policy) -> Finding:
    if isinstance(error, KeptView):
        return Finding("no_kept_view", str(error))
    if isinstance(error, PolicyError):
        return Finding("valid_answers", str(error))
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == inspect.getsourcefile(type(policy)):
            where = f" in {frame.name}, line {frame.lineno} of {Path(frame.filename).name}"
    return Finding("valid_answers", f"{type(error).__name__}: {error}{where}")


def _global_generators() -> dict[str, str]:
    """A fingerprint of each global generator."""
    legacy = np.random.get_state()  # noqa: NPY002 - looked at, to see whether the policy used it
    return {"random": repr(random.getstate()), "numpy.random": pickle.dumps(legacy).hex()}


# -- another process -------------------------------------------------------------------------


def _portable(policy: PolicySpec) -> PolicySpec:
    """The same spec in words that another process understands: no class objects."""
    if isinstance(policy, Mapping):
        kind = policy.get("class")
        return {**policy, "class": _portable(kind)} if isinstance(kind, type) else dict(policy)
    if isinstance(policy, str):
        return policy
    file = inspect.getsourcefile(policy)
    if file is None or "." in policy.__qualname__:
        raise PolicyError(f"define {policy.__qualname__} at the top level of a file")
    if (Path(file).parent / "__init__.py").exists():
        return f"{policy.__module__}:{policy.__qualname__}"
    return f"{file}:{policy.__qualname__}"


def _start_process(hash_seed: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-c", "from policies.check import _answer; _answer()"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _answer() -> None:
    """The other process: read a spec, rehearse, write a digest of what was decided."""
    outcome = Rehearsal(make_policy(pickle.load(sys.stdin.buffer))).run()
    sys.stdout.write(hashlib.sha256(repr(outcome).encode()).hexdigest())


# -- messages --------------------------------------------------------------------------------


def _same_process(first: Outcome, again: Outcome) -> str:
    return (
        f"run twice with the same seed, {_difference(first, again)}; draw from self.rng, and "
        "keep state in the object, not in the class or the module"
    )


def _difference(first: Outcome, second: Outcome) -> str:
    pairs = zip(first.decisions, second.decisions, strict=False)
    for number, ((event, actions), (other, others)) in enumerate(pairs, 1):
        if (event, actions) != (other, others):
            now = "" if other == event else f" (now {other})"
            return f"event {number} ({event}) led to {_list(actions)}, then{now} to {_list(others)}"
    return f"there were {len(first.decisions)} events and then {len(second.decisions)}"


def _list(actions: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, actions)) or "nothing"


def _held(outcome: Outcome) -> str:
    return (
        f"{outcome.held} requests were still held {(END - LAST_ARRIVAL) // SECOND} s after the "
        "last arrival, on an idle cluster: answer Dispatch or Shed in the end"
    )
