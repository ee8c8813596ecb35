"""Our own records: engine steps (`*.steps.jsonl`) and a client's requests (`*.requests.jsonl`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from viisim.calibration.files import numbers
from viisim.calibration.measurements import Measurement, RequestLog, Setup, StepLog
from viisim.errors import InputError

_UNKNOWN = Setup(model="unknown", build="")
"""Neither file says what ran."""

_MOST_GAP_S = 0.01
"""A longer pause between two steps is an idle engine, not the host's work."""


def is_steps(row: Mapping[str, Any]) -> bool:
    """Whether a line is a step record."""
    return {"exec_s", "decode_seqs", "prefill_tokens"} <= set(row)


def is_requests(row: Mapping[str, Any]) -> bool:
    """Whether a line is a request record."""
    return {"sent_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s"} <= set(row)


def read_steps(rows: Sequence[dict[str, Any]], path: Path, sha256: str) -> Measurement:
    """The steps that had anything to compute, in their order. Raises InputError for a missing
    column."""
    steps = step_log(rows, path)
    busy = (steps.decodes > 0) | (steps.prefill_tokens > 0)
    return _measurement(path, sha256, "step records", steps=steps.part(busy))


def step_log(rows: Sequence[Mapping[str, Any]], path: Path) -> StepLog:
    """A step for each of the rows of the file. Raises InputError for a missing column.

    A step takes its execution, the host's work, and the short gap to the step before; where the
    row says how many times as long as usual that took (`slowdown`), it is taken out.
    """
    column = {
        name: numbers(rows, name, path)
        for name in (
            "exec_s",
            "host_s",
            "decode_seqs",
            "decode_context_tokens",
            "prefill_tokens",
            "prefill_pairs",
        )
    }
    gap_s = np.array([float(row.get("gap_s") or 0.0) for row in rows])
    slowdown = np.array([float(row.get("slowdown") or 1.0) for row in rows])
    host_s = column["host_s"] + np.where((gap_s > 0) & (gap_s < _MOST_GAP_S), gap_s, 0.0)
    return StepLog(
        duration_s=column["exec_s"] + host_s,
        decodes=column["decode_seqs"].astype(np.int64),
        context_tokens=column["decode_context_tokens"].astype(np.int64),
        steps=np.ones(len(rows), dtype=np.int64),
        prefill_tokens=column["prefill_tokens"].astype(np.int64),
        prefill_pairs=column["prefill_pairs"].astype(np.int64),
        host_s=host_s,
    ).divided(slowdown)


def read_requests(rows: Sequence[dict[str, Any]], path: Path, sha256: str) -> Measurement:
    """The requests, in the order of their arrival. Raises InputError for a missing column."""
    ordered = sorted(rows, key=lambda row: float(row.get("sent_s") or 0.0))
    tokens_s = [row.get("token_s") for row in ordered]
    finished = [
        isinstance(times, list) and len(times) >= 1 if times is not None else True
        for times in tokens_s
    ]
    kept = [row for row, whole in zip(ordered, finished, strict=True) if whole]
    if not kept:
        raise InputError(f"{path}: token_s: no request has any token; record the file again")
    sent_s = np.array([float(row["sent_s"]) for row in kept])
    have_times = all(row.get("token_s") for row in kept)
    log = RequestLog(
        prompt_tokens=numbers(kept, "prompt_tokens", path).astype(np.int64),
        output_tokens=np.maximum(numbers(kept, "output_tokens", path).astype(np.int64), 1),
        ttft_s=numbers(kept, "ttft_s", path),
        e2e_s=numbers(kept, "e2e_s", path),
        gaps_s=tuple(np.diff(np.array(row["token_s"], dtype=float)) for row in kept)
        if have_times
        else None,
        arrived_s=sent_s - sent_s[0],
        cached_tokens=np.array([int(row.get("cached_tokens") or 0) for row in kept]),
    )
    return _measurement(path, sha256, "request records", requests=log)


def _measurement(
    path: Path,
    sha256: str,
    kind: str,
    requests: RequestLog | None = None,
    steps: StepLog | None = None,
) -> Measurement:
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Measurement(name, path, sha256, kind, _UNKNOWN, requests, steps)
