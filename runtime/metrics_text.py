"""Gauges out of a server's `/metrics`, whatever the server calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

from runtime.worker import Reading, WorkerError


@dataclass(frozen=True, slots=True)
class GaugeNames:
    """What a server calls the parts of a `Reading`: none where it does not tell, several where
    versions differ, the newest first."""

    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    kv_usage: tuple[str, ...] = ()
    appear_late: bool = False
    """A gauge is on the page only once it has been set: one that is not there is 0."""


VLLM_GAUGES = GaugeNames(
    running=("vllm:num_requests_running",),
    waiting=("vllm:num_requests_waiting",),
    kv_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
)
"""vLLM, docs/usage/metrics.md; `gpu_cache_usage_perc` is the name before vLLM 0.10."""


def read_gauges(text: bytes, names: GaugeNames = VLLM_GAUGES) -> Reading:
    """Running, waiting and KV use, summed (KV use: the highest) over a server's engines; 0 for
    what the server does not tell.

    Raises WorkerError when a gauge is missing that it should tell, or is no number.
    """
    found: dict[str, list[float]] = {}
    try:
        for name, value in _pattern(names).findall(text):
            found.setdefault(name.decode(), []).append(_number(value))
        running, waiting, kv_usage = (
            _newest(found, kind, names.appear_late)
            for kind in (names.running, names.waiting, names.kv_usage)
        )
        return Reading(round(sum(running)), round(sum(waiting)), max(kv_usage))
    except ValueError:
        raise WorkerError("a gauge in /metrics is no number") from None


def _number(text: bytes) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


@lru_cache
def _pattern(names: GaugeNames) -> re.Pattern[bytes]:
    """Samples of these gauges only: of a page with thousands, the others are not looked at."""
    known = "|".join(map(re.escape, names.running + names.waiting + names.kv_usage))
    return re.compile(rb"^(%s)(?:\{[^}]*\})?\s+(\S+)" % known.encode(), re.MULTILINE)


def _newest(found: dict[str, list[float]], kind: tuple[str, ...], appear_late: bool) -> list[float]:
    for name in kind:
        if name in found:
            return found[name]
    if kind and not appear_late:
        raise WorkerError(f"no {kind[0]} in /metrics")
    return [0.0]
