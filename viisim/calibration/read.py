"""Measurement files of every known format, recognised by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from viisim.calibration import bench, llmservingsim, own_records, splitwise
from viisim.calibration.files import parse_json, parse_json_lines, read_text
from viisim.calibration.measurements import Measurement
from viisim.errors import InputError

_FORMATS = (
    "the JSON of `vllm bench serve --save-detailed`, step or request records (JSONL), "
    "LLMServingSim's requests.jsonl, or splitwise-sim's perf_model.csv; plain or gz"
)

_LINES = (
    (own_records.is_steps, own_records.read_steps),
    (own_records.is_requests, own_records.read_requests),
    (llmservingsim.is_requests, llmservingsim.read_requests),
)
"""Formats of one JSON object a line: what tells them, and their reader."""


def read_measurements(paths: Sequence[Path], only: str | None = None) -> list[Measurement]:
    """Everything the files hold, in the order of recording where that is known.

    `only` keeps the runs whose name or setup contains that text. Raises InputError for a file
    that cannot be read or is none of the known formats, or when nothing is left.
    """
    runs = [run for path in paths for run in _read(path)]
    if only is not None:
        kept = [run for run in runs if only in f"{run.name} {run.setup} {run.setup.image}"]
        if not kept:
            setups = sorted({str(run.setup) for run in runs})
            raise InputError(f"--only {only}: no measurement is of it; there are: {setups}")
        runs = kept
    return sorted(runs, key=lambda run: run.recorded)


def _read(path: Path) -> list[Measurement]:
    text, sha256 = read_text(path)
    begin = text.lstrip()[:1]
    first_line = text.lstrip().split("\n", 1)[0]
    if splitwise.is_perf_model(first_line):
        return splitwise.read_perf_model(text, path, sha256)
    if first_line.startswith(llmservingsim.GAUGES_HEADER):
        raise llmservingsim.refuse_gauges(path)
    if begin != "{":
        raise InputError(f"{path}: no measurement; give {_FORMATS}")
    if _is_one_document(text, first_line):
        content = parse_json(text, str(path))
        if bench.is_bench(content):
            return [bench.read_bench(content, path, sha256)]
        raise InputError(f"{path}: no measurement; give {_FORMATS}")
    rows = parse_json_lines(text, path)
    for is_format, read in _LINES:
        if is_format(rows[0]):
            return [read(rows, path, sha256)]
    raise InputError(f"{path}: no measurement; give {_FORMATS}")


def _is_one_document(text: str, first_line: str) -> bool:
    """Whether the file is one JSON document and not one a line: a bench result is a single long
    line, or spread over many."""
    several_lines = "\n{" in text.strip()
    return not several_lines and (
        '"ttfts"' in text or '"mean_ttft_ms"' in text or not first_line.rstrip().endswith("}")
    )


def first_of(run: Measurement, entries: int | None) -> Measurement:
    """The run cut to its first requests or steps; None: all of it."""
    if entries is None:
        return run
    if run.steps is not None:
        return replace(run, steps=run.steps.part(np.s_[:entries]))
    assert run.requests is not None, "a measurement has requests or steps"
    return replace(run, requests=run.requests.first(entries))
