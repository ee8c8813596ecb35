"""Gauges out of a vLLM server's `/metrics`."""

from __future__ import annotations

import re

from runtime.driver import Reading, WorkerError

_LINE = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc)"
    rb"(?:\{[^}]*\})?\s+(\S+)",
    re.MULTILINE,
)


def read_gauges(text: bytes) -> Reading:
    """Running, waiting and KV use, summed (KV use: the highest) over a server's engines.

    Raises WorkerError when they are missing. `gpu_cache_usage_perc` is the name before vLLM 0.10.
    """
    values: dict[bytes, list[float]] = {}
    for name, value in _LINE.findall(text):
        values.setdefault(name, []).append(float(value))
    usage = values.get(b"kv_cache_usage_perc") or values.get(b"gpu_cache_usage_perc")
    running, waiting = values.get(b"num_requests_running"), values.get(b"num_requests_waiting")
    if not (usage and running and waiting):
        raise WorkerError("no vLLM gauges in /metrics")
    return Reading(round(sum(running)), round(sum(waiting)), max(usage))
