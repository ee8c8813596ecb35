"""How much a cluster can serve, and experiments that offer it a fraction of that.

Capacity is a rate of requests, measured with the setting's first policy and first seed. Everything
is offered at once (arrivals a million times as fast, without the operator's limits on the queue),
so nothing ever waits for a request to arrive. What counts is the work (prompt tokens computed
+ 2 x output tokens) that is finished per second after the first and before the last fifth of it,
when the cluster neither fills up nor runs dry, over the mean work of a request: so it does not
matter that the later turns of sessions are served after all that came at once. A workload that is
drawn is lengthened until every place in the cluster is taken ten times.

It is the capacity for this workload's mix of lengths and prefixes under a backlog. Batches are
as large as they get, so a cluster may keep up with little more than that, or with less where
shorter queues hit the prefix cache less often. Users of closed-loop sessions still take their time
to think: where the sessions are few, they ask for less than the cluster could serve, and the figure
is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from viisim.cells import Cell, Setting
from viisim.config import Experiment
from viisim.errors import InputError
from viisim.fairness import weighted_tokens
from viisim.records import FINISHED
from viisim.results import LoadedRun
from viisim.workload.config import (
    MixedWorkload,
    ServeGenWorkload,
    SessionsWorkload,
    SyntheticWorkload,
    WorkloadConfig,
    scaled,
)

_AT_ONCE = 1e6
_ROUNDS = 10
_FEWEST = 10
_DIGITS = 4
"""Of a measured rate: what one seed can tell, and legible in a file."""


def capacity_cell(setting: Setting) -> Cell:
    """The run that measures the setting's capacity."""
    name = f"{setting.name}.capacity"
    experiment = backlogged(setting.first).model_copy(update={"name": name})
    return Cell(name, setting.name, None, next(iter(setting.variants)), experiment)


def backlogged(experiment: Experiment) -> Experiment:
    """The experiment with everything offered at once, and enough of it."""
    places = sum(replica.settings.max_num_seqs for replica in experiment.simulated_replicas())
    total = max(1, experiment.build_workload().total_requests)
    workload = _lengthened(experiment.workload, max(1, -(-_ROUNDS * places // total)))
    limits = experiment.limits.model_copy(update={"max_queued": None, "queue_timeout_s": None})
    changes = {
        "workload": _at_once(workload),
        "seeds": experiment.seeds[:1],
        "limits": limits,
        "warmup_fraction": 0.0,
    }
    return experiment.model_copy(update=changes)


def _lengthened(workload: WorkloadConfig, times: int) -> WorkloadConfig:
    """So many times the requests; unchanged where they are not drawn, or not all of them."""
    match workload:
        case SyntheticWorkload() | SessionsWorkload():
            return workload.model_copy(update={"requests": times * workload.requests})
        case ServeGenWorkload():
            return workload.model_copy(update={"duration_s": times * workload.duration_s})
        case MixedWorkload():
            parts = tuple(_lengthened(part, times) for part in workload.parts)
            changed = all(a != b for a, b in zip(parts, workload.parts, strict=True))
            return workload.model_copy(update={"parts": parts}) if changed else workload
    return workload


def _at_once(workload: WorkloadConfig) -> WorkloadConfig:
    """The same requests, all at the very beginning."""
    match workload:
        case MixedWorkload():
            parts = tuple(_at_once(part) for part in workload.parts)
            return workload.model_copy(update={"parts": parts})
        case ServeGenWorkload():
            # Its requests are as many as its rate and its time allow.
            brief = {"duration_s": workload.duration_s / _AT_ONCE}
            return scaled(workload, _AT_ONCE).model_copy(update=brief)
    return scaled(workload, _AT_ONCE)


def capacity_per_s(run: LoadedRun) -> float:
    """Requests per second that the run of a `capacity_cell` finished.

    Raises InputError where too few finished, or all at the same instant.
    """
    names = ["outcome", "finished_ns", "prompt_tokens", "cached_tokens", "output_tokens"]
    table = run.requests(columns=names)
    return work_rate_per_s({name: table[name].to_numpy() for name in names}, run.name)


def work_rate_per_s(columns: Mapping[str, NDArray[Any]], name: str) -> float:
    """Requests per second that a backlog's records say were finished: see the top of this file.

    Raises InputError, naming the run, where too few finished, or all at the same instant.
    """
    finished = np.flatnonzero(columns["outcome"] == FINISHED)
    order = finished[np.argsort(columns["finished_ns"][finished], kind="stable")]
    work = np.cumsum((weighted_tokens(columns) - columns["cached_tokens"])[order])
    if order.size < _FEWEST:
        raise _too_few(name, order.size)
    first, last = np.searchsorted(work, [0.2 * work[-1], 0.8 * work[-1]])
    first_ns, last_ns = columns["finished_ns"][order[[first, last]]]
    if first_ns == last_ns:
        raise _too_few(name, order.size)
    share = float(work[last] - work[first]) / float(work[-1])
    return _rounded(order.size * share / float(last_ns - first_ns) * 1e9)


def _too_few(name: str, finished: int) -> InputError:
    return InputError(
        f"{name}: {finished} requests finished, too few to measure the capacity that --load is "
        "a fraction of; give a longer workload"
    )


def offered_per_s(experiment: Experiment) -> float:
    """Requests per second that the workload offers, mean over the experiment's seeds.

    A closed-loop session's later turns count with the time of its first: how fast they come
    depends on how fast they are answered. Raises InputError where all come at one instant.
    """
    workload = experiment.build_workload()
    spans_s = [
        max(request.arrived_ns for request in workload.requests(seed)) / 1e9
        for seed in experiment.seeds
    ]
    if min(spans_s) <= 0:
        raise InputError(f"{experiment.name}: all requests arrive at once; --load needs a rate")
    return float(np.mean([workload.total_requests / span_s for span_s in spans_s]))


def at_loads(
    setting: Setting, loads: Sequence[float], capacity: float
) -> Mapping[float, Mapping[str, Experiment]]:
    """The setting's experiments, by load and variant, offered that fraction of capacity."""
    first = offered_per_s(setting.first)
    offered = {
        name: first if each.workload == setting.first.workload else offered_per_s(each)
        for name, each in setting.variants.items()
    }
    return {
        load: {
            name: _faster(each, load * capacity / offered[name])
            for name, each in setting.variants.items()
        }
        for load in loads
    }


def _faster(experiment: Experiment, factor: float) -> Experiment:
    workload = scaled(experiment.workload, _rounded(factor))
    return experiment.model_copy(update={"workload": workload})


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
