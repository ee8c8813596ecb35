"""Benchmarks of LLMServingSim 2: a vLLM engine's own stamps of each request.

`requests.jsonl` has the instants at which each request was queued, scheduled, and gave its first
and last token. `meta.json` beside it says what ran. `timeseries.csv` holds gauges once a second,
which say nothing of single steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from viisim.calibration.files import numbers, parse_json, read_text
from viisim.calibration.measurements import Measurement, RequestLog, Setup
from viisim.errors import InputError

GAUGES_HEADER = "t,prompt_throughput,gen_throughput,running"


def is_requests(row: Mapping[str, Any]) -> bool:
    """Whether a line is a request of such a benchmark."""
    return {"input_toks", "output_toks", "queued_ts", "first_token_ts"} <= set(row)


def read_requests(rows: Sequence[dict[str, Any]], path: Path, sha256: str) -> Measurement:
    """The run; what ran, from `meta.json` beside the file if it is there. Raises InputError."""
    stamps = {
        name: numbers(rows, name, path)
        for name in ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    }
    order = np.argsort(stamps["queued_ts"], kind="stable")
    queued, scheduled, first, last = (stamp[order] for stamp in stamps.values())
    if (first < queued).any() or (last < first).any():
        raise InputError(f"{path}: first_token_ts: tokens come before their request; record again")
    log = RequestLog(
        prompt_tokens=numbers(rows, "input_toks", path).astype(np.int64)[order],
        output_tokens=numbers(rows, "output_toks", path).astype(np.int64)[order],
        ttft_s=first - queued,
        e2e_s=last - queued,
        arrived_s=queued - queued[0],
        started_s=scheduled - queued[0],
        cached_tokens=np.zeros(len(rows), dtype=np.int64),
    )
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    folder = path.resolve().parent.name
    return Measurement(
        f"{folder}/{name}", path, sha256, "LLMServingSim requests", _setup(path), log
    )


def _setup(path: Path) -> Setup:
    beside = path.parent / "meta.json"
    if not beside.exists():
        return Setup(model="unknown", build="")
    meta = parse_json(read_text(beside)[0], str(beside))
    kwargs, cache = meta.get("engine_kwargs", {}), meta.get("kv_cache", {})
    known = {
        "num_kv_blocks": cache.get("num_gpu_blocks"),
        "block_tokens": cache.get("block_size"),
        "max_num_seqs": kwargs.get("max_num_seqs"),
        "max_num_batched_tokens": kwargs.get("max_num_batched_tokens"),
        "max_model_len": kwargs.get("max_model_len"),
        "enable_prefix_caching": cache.get("enable_prefix_caching"),
    }
    settings = {name: value for name, value in known.items() if isinstance(value, int)}
    return Setup(
        model=str(meta.get("model", "unknown")),
        build=str(meta.get("vllm_version", "")),
        device=str(meta.get("hardware", {}).get("device_name", "")),
        tensor_parallel=kwargs.get("tensor_parallel_size"),
        engine=settings,
    )


def refuse_gauges(path: Path) -> InputError:
    """What to say of a `timeseries.csv`."""
    return InputError(
        f"{path}: gauges once a second say nothing of single steps; give requests.jsonl, which "
        f"lies beside it"
    )
