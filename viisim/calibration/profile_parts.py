"""The parts of a profile that follow from runs and their fit: settings, terms, range, sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from viisim.calibration.fit import StepFit, trend
from viisim.calibration.measurements import Floats, Measurement, Setup, StepLog
from viisim.profile import EngineSettings

_DEFAULT_NUM_SEQS = 64
_DEFAULT_BATCHED_TOKENS = 2048
_DEFAULT_BLOCK_TOKENS = 16
_DIGITS = 6


def engine_settings(
    runs: Sequence[Measurement], setup: Setup, given: Mapping[str, int]
) -> tuple[EngineSettings, list[str]]:
    """Settings that the user or the files state, and defaults, each of which is said."""
    stated = {**setup.engine, **given}
    block = int(stated.get("block_tokens", _DEFAULT_BLOCK_TOKENS))
    longest, concurrency = _demand(runs)
    model_len = int(stated.get("max_model_len", -(-(longest + 1) // 1024) * 1024))
    least_blocks = max(model_len, concurrency * longest) // block + 2 + concurrency
    defaults: dict[str, int] = {
        "num_kv_blocks": least_blocks,
        "max_num_seqs": max(_DEFAULT_NUM_SEQS, concurrency),
        "max_num_batched_tokens": max(_DEFAULT_BATCHED_TOKENS, concurrency),
        "max_model_len": model_len,
        "block_tokens": block,
    }
    assumed = [name for name in defaults if name not in stated and name != "block_tokens"]
    warnings = []
    if assumed:
        values = ", ".join(f"{name} {defaults[name]:,}" for name in assumed)
        warnings.append(
            f"the files do not state {', '.join(assumed)}; assumed {values} (num_kv_blocks and "
            f"max_model_len: what the runs needed). State them with --num-kv-blocks and the like"
        )
    modern = _is_modern(setup.build)
    switches = {"async_scheduling": modern, "reserve_full_prompt": modern}
    return EngineSettings.model_validate({**switches, **defaults, **stated}), warnings


def _is_modern(build: str) -> bool:
    """Whether the version is one whose default is to schedule asynchronously (from 0.14 on)."""
    match = re.match(r"v?(\d+)\.(\d+)", build)
    return match is not None and "cpu" not in build and (int(match[1]), int(match[2])) >= (0, 14)


def _demand(runs: Sequence[Measurement]) -> tuple[int, int]:
    """Tokens of the longest sequence, and most sequences at once."""
    longest, concurrency = 1023, 1
    for run in runs:
        if run.requests is not None:
            log = run.requests
            longest = max(longest, int((log.prompt_tokens + log.output_tokens).max()))
            concurrency = max(concurrency, log.concurrency or 1)
        elif run.steps is not None and len(run.steps):
            busy = run.steps.part(run.steps.decodes > 0)
            each = busy.context_tokens / np.maximum(busy.decodes, 1)
            longest = max(longest, int(each.max(initial=0)))
            concurrency = max(concurrency, int(busy.decodes.max(initial=1)))
    return longest, concurrency


def commonest_cap(runs: Sequence[Measurement]) -> float | None:
    """The power cap of most runs; of several equally common, the highest."""
    caps = [run.setup.power_cap_w for run in runs if run.setup.power_cap_w is not None]
    return max(set(caps), key=lambda cap: (caps.count(cap), cap), default=None)


def step_time(fit: StepFit, max_num_seqs: int) -> dict[str, Any]:
    """The engine's form. One entry beyond the sizes seen carries the trend of all of them on, where
    the engine would carry on the last two."""
    sizes, base = fit.sequences, fit.base_s
    least = base[base > 0].min(initial=fit.prefill[0]) if (base > 0).any() else fit.prefill[0]
    base = np.maximum(base, max(0.05 * float(least), 1e-6))
    slope = fit.slope_s
    most = int(sizes[-1])
    if max_num_seqs > most:
        sizes = np.append(sizes, 2 * most)
        base = np.append(base, trend(fit.sequences, base, 2 * most))
        slope = np.append(slope, slope[-1])
    host = min(fit.host_s, 0.5 * float(base.min()))
    decode = [
        {
            "sequences": int(size),
            "base_s": rounded(base_s - host),
            "per_context_token_s": rounded(slope_s),
        }
        for size, base_s, slope_s in zip(sizes, base, slope, strict=True)
    ]
    base_s, token_s, pair_s = fit.prefill
    prefill = {
        "base_s": rounded(max(base_s - host, 0.0)),
        "per_token_s": rounded(token_s),
        "per_token_context_s": rounded(pair_s),
    }
    return {"decode": decode, "prefill": prefill, "host_overhead_s": rounded(host)}


def calibrated_range(
    fit: StepFit, runs: Sequence[Measurement], logs: Sequence[StepLog]
) -> dict[str, list[int]]:
    """What was measured, in the profile's form."""
    contexts: list[float] = []
    prompts: list[int] = []
    for log in logs:
        decodes = log.part(log.decodes > 0)
        contexts += list(_ends(decodes.context_tokens / decodes.decodes))
        if log.prefill_tokens.any():
            prompts += [int(n) for n in _ends(log.prefill_tokens[log.prefill_tokens > 0])]
    for run in runs:
        if run.requests is not None and run.requests.uncached.any():
            requests = run.requests
            prompts += [int(n) for n in _ends(requests.prompt_tokens[requests.uncached])]
            if not logs:
                contexts += list(_ends(requests.prompt_tokens))
                contexts.append(float((requests.prompt_tokens + requests.output_tokens).max()))
    sizes = fit.sequences
    return {
        "decode_sequences": [int(sizes[0]), int(sizes[-1])],
        "context_tokens": [int(min(contexts, default=0)), int(max(contexts, default=0))],
        "prefill_tokens": [min(prompts, default=0), max(prompts, default=0)],
    }


def _ends(values: Any) -> tuple[float, ...]:
    return (float(np.min(values)), float(np.max(values))) if len(values) else ()


def source(run: Measurement) -> dict[str, Any]:
    """One measured run, as the profile names it."""
    log = run.requests
    content: dict[str, Any] = {
        "name": run.name,
        "kind": run.kind,
        "sha256": run.sha256,
        "entries": len(run),
        "recorded": run.recorded,
        "power_cap_w": run.setup.power_cap_w,
    }
    if log is not None:
        content["concurrency"] = log.concurrency
        content["prompt_tokens"] = [int(log.prompt_tokens.min()), int(log.prompt_tokens.max())]
        content["cached_tokens"] = int(np.median(log.cached))
    return content


def version(setup: Setup) -> str:
    """The build as it names itself, and its image."""
    if setup.image and setup.image != setup.build:
        return f"{setup.build or 'unknown'} ({setup.image})"
    return setup.build or "unknown"


def short(model: str) -> str:
    """A file-friendly name: the last part of a repository's, in lower case."""
    return model.rsplit("/", 1)[-1].lower() or "unknown"


def rounded(value: Floats | float) -> Any:
    """To six significant digits, as plain Python numbers: the seventh is noise on any machine."""
    if isinstance(value, np.ndarray):
        return [rounded(each) for each in value]
    return float(f"{float(value):.{_DIGITS}g}")
