"""Results of `vllm bench serve --save-detailed`.

What such a run does, and its importer must know: before the run it sends the first prompt once as
a test, so the first request finds its prompt in the prefix cache. With a request rate of `inf`
and `max_concurrency` c it is a closed loop: c requests are in flight, in the order of the list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from viisim.calibration.measurements import Counts, Floats, Measurement, RequestLog, Setup
from viisim.errors import InputError

COLUMNS = ("input_lens", "output_lens", "ttfts", "itls")


def is_bench(content: Any) -> bool:
    """Whether a JSON document is such a result, detailed or not."""
    return isinstance(content, dict) and bool({"ttfts", "mean_ttft_ms"} & set(content))


def read_bench(content: Mapping[str, Any], path: Path, sha256: str) -> Measurement:
    """The run. Raises InputError for failed requests, missing details or broken columns."""
    for name in COLUMNS:
        if not isinstance(content.get(name), list):
            raise InputError(
                f"{path}: {name}: missing; run `vllm bench serve` with --save-detailed"
            )
    _refuse_failures(content, path)
    return Measurement(
        name=path.name.removesuffix(".gz").removesuffix(".json"),
        path=path,
        sha256=sha256,
        kind="vllm bench serve",
        setup=_setup(content, path),
        requests=_requests(content, path),
        recorded=str(content.get("date", "")),
    )


def _refuse_failures(content: Mapping[str, Any], path: Path) -> None:
    requests = len(content["input_lens"])
    if requests == 0:
        raise InputError(f"{path}: input_lens: no requests; measure again")
    for name in COLUMNS:
        if len(content[name]) != requests:
            raise InputError(
                f"{path}: {name}: {len(content[name])} entries for {requests} requests; the file "
                f"is incomplete, record it again"
            )
    errors = [error for error in content.get("errors") or () if error]
    completed, asked = content.get("completed", requests), content.get("num_prompts", requests)
    failed = content.get("failed") or max(len(errors), int(asked) - int(completed))
    if failed or min(content["output_lens"], default=1) == 0:
        failed = failed or sum(tokens == 0 for tokens in content["output_lens"])
        raise InputError(
            f"{path}: {failed} of {max(int(asked), requests)} requests failed, so which requests "
            f"ran together is not known; repeat the run without failures"
        )


def _requests(content: Mapping[str, Any], path: Path) -> RequestLog:
    prompt_tokens = _whole(content, "input_lens", path)
    output_tokens = _whole(content, "output_lens", path)
    ttft_s = _seconds(content["ttfts"], "ttfts", path)
    gaps_s = tuple(
        _seconds(gaps, f"itls.{number}", path) for number, gaps in enumerate(content["itls"])
    )
    total_s = ttft_s + np.array([gaps.sum() for gaps in gaps_s])
    arrived_s, concurrency = _arrivals(content, path, len(ttft_s))
    tag = str(content.get("metadata.workload") or "")
    return RequestLog(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft_s=ttft_s,
        e2e_s=total_s,
        gaps_s=gaps_s,
        arrived_s=arrived_s,
        concurrency=concurrency,
        repeats_one_prompt=re.match(r"\s*tg\b", tag) is not None,
    )


def _arrivals(
    content: Mapping[str, Any], path: Path, requests: int
) -> tuple[Floats | None, int | None]:
    """Arrivals where they were recorded or can be known, else the closed loop's concurrency."""
    limit = content.get("max_concurrency")
    started = content.get("start_times")
    if isinstance(started, list) and len(started) == requests:
        times = np.array(started, dtype=float)
        return times - times.min(), None if limit is None else int(limit)
    rate = content.get("request_rate", math.inf)
    if rate in ("inf", None) or float(rate) == math.inf:
        return None, int(limit) if limit else requests
    if limit:
        # Neither a closed loop nor known arrivals: at high rates the limit is what counts.
        return None, int(limit)
    raise InputError(
        f"{path}: start_times: missing, and with request_rate {rate} the arrivals were random; "
        f"measure with a newer vLLM, or with --max-concurrency and an infinite rate"
    )


def _whole(content: Mapping[str, Any], name: str, path: Path) -> Counts:
    column = content[name]
    if not all(isinstance(value, int) and value > 0 for value in column):
        raise InputError(f"{path}: {name}: not all are whole numbers from 1; record it again")
    return np.array(column, dtype=np.int64)


def _seconds(values: Any, name: str, path: Path) -> Floats:
    try:
        column = np.array(values, dtype=float)
    except (TypeError, ValueError):
        column = np.array([[math.nan]])
    if column.ndim != 1 or not np.isfinite(column).all() or (column < 0).any():
        raise InputError(f"{path}: {name}: not all are times in seconds; record the file again")
    return column


# --------------------------------------------------------------------------------------
# What ran


def _setup(content: Mapping[str, Any], path: Path) -> Setup:
    meta = {
        str(key).removeprefix("metadata."): value
        for key, value in content.items()
        if str(key).startswith("metadata.")
    }
    image = str(meta.get("image") or "").rsplit("/", 1)[-1]
    version = str(meta.get("vllm_ver") or meta.get("vllm_version") or "")
    return Setup(
        model=str(content.get("model_id") or "unknown"),
        build=version or image,
        image=image,
        device="gfx906" if "gfx906" in f"{version} {image}" else "",
        power_cap_w=_number(meta.get("power_cap")),
        tensor_parallel=_degree(meta.get("tensor_parallelism") or meta.get("tensor_parallel")),
        engine=_engine_settings(meta),
    )


def _engine_settings(meta: Mapping[str, Any]) -> dict[str, int | bool]:
    """Settings that somebody wrote down with `--metadata KEY=VALUE`, under vLLM's names."""
    known = {
        "num_gpu_blocks": "num_kv_blocks",
        "num_kv_blocks": "num_kv_blocks",
        "block_size": "block_tokens",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_model_len": "max_model_len",
    }
    return {
        ours: int(number)
        for theirs, ours in known.items()
        if (number := _number(meta.get(theirs))) is not None and number >= 1
    }


def _number(value: Any) -> float | None:
    match = re.match(r"\s*(\d+(\.\d+)?)", str(value))
    return float(match[1]) if match and value is not None else None


def _degree(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number else None
