"""The performance model of splitwise-sim: times of batches of equal requests, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from viisim.calibration.files import numbers
from viisim.calibration.measurements import Measurement, Setup, StepLog
from viisim.errors import InputError

HEADER = {"model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time"}
_MS_PER_S = 1e3


def is_perf_model(first_line: str) -> bool:
    """Whether a CSV header is that of such a table."""
    return {name.strip() for name in first_line.split(",")} >= HEADER


def read_perf_model(text: str, path: Path, sha256: str) -> list[Measurement]:
    """One measurement for each model, hardware and tensor-parallel degree. Raises InputError."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise InputError(f"{path}: no rows below the header; give the whole table")
    groups: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for number, row in enumerate(rows, 2):
        try:
            key = (row["model"], row["hardware"], row["tensor_parallel"])
            figures = {
                name: float(row[name])
                for name in ("prompt_size", "batch_size", "token_size", "prompt_time", "token_time")
            }
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: line {number}: not a row of the header's columns; correct or remove it"
            ) from None
        groups.setdefault(key, []).append(figures)
    return [
        Measurement(
            name=f"{path.name.removesuffix('.gz')}: {model} on {hardware}, TP{degree}",
            path=path,
            sha256=sha256,
            kind="splitwise performance model",
            setup=Setup(model=model, build="", device=hardware, tensor_parallel=int(float(degree))),
            steps=_steps(figures, path),
        )
        for (model, hardware, degree), figures in groups.items()
    ]


def _steps(rows: Sequence[Mapping[str, float]], path: Path) -> StepLog:
    """A row is one prefill step of the whole batch, and its mean decode step.

    Decode attends to the prompt and, on average, half of the answer.
    """
    prompt = numbers(rows, "prompt_size", path)
    batch = numbers(rows, "batch_size", path)
    answer = numbers(rows, "token_size", path)
    none = np.zeros(len(rows))
    prefills = StepLog(
        duration_s=numbers(rows, "prompt_time", path) / _MS_PER_S,
        decodes=none.astype(np.int64),
        context_tokens=none.astype(np.int64),
        steps=np.ones(len(rows), dtype=np.int64),
        prefill_tokens=(batch * prompt).astype(np.int64),
        prefill_pairs=(batch * prompt * (prompt + 1) / 2).astype(np.int64),
        host_s=none,
    )
    decodes = StepLog(
        duration_s=numbers(rows, "token_time", path) / _MS_PER_S,
        decodes=batch.astype(np.int64),
        context_tokens=(batch * (prompt + answer / 2)).astype(np.int64),
        steps=np.ones(len(rows), dtype=np.int64),
        prefill_tokens=none.astype(np.int64),
        prefill_pairs=none.astype(np.int64),
        host_s=none,
    )
    # One prefill and one decode after the other, so that either half of the table has both.
    both = StepLog.joined([prefills, decodes])
    kept = both.part(np.arange(2 * len(rows)).reshape(2, -1).T.ravel())
    return kept.part(kept.duration_s > 0)
