"""The gentler recorder: a stat logger, told by the engine what each step was.

It runs in the API server, touches no scheduler, and is found by vLLM as an entry point of
viisim in the group `vllm.stat_logger_plugins`. Needed besides `VIISIM_STEP_RECORDS`:
`vllm serve --enable-logging-iteration-details`. Prefer `step_recorder` where it may be used:
vLLM 0.32.0 does not tell a stat logger

- contexts: `decode_context_tokens` is estimated from the blocks in use, and `prefill_pairs` is as
  if every chunk began its prompt, hence too small for later chunks and after prefix hits;
- recomputation: what a preempted sequence does again counts as decoding, which makes
  `decode_seqs` right and its tokens too few;
- times other than the execution: `host_s` is 0, `gap_s` null, and `start_s` late by the way from
  the engine to the API server;
- the state after `schedule()`: `free_blocks`, `running` and `waiting` are those after the output.

Each line says so: `"source": "stat_logger"`.
"""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm.v1.metrics.loggers import StatLoggerBase

from runtime.vllm_plugin.records import Record, RecordFile, open_records, records_path, warn


class StepStatLogger(StatLoggerBase):  # type: ignore[misc]  # vllm is untyped from here
    """Writes a step record for every iteration that one engine reports.

    Does nothing where `VIISIM_STEP_RECORDS` is not set, or `RecordingScheduler` writes it.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._cache = vllm_config.cache_config
        self._file: RecordFile | None = None
        recorded = "RecordingScheduler" in str(vllm_config.scheduler_config.scheduler_cls)
        if recorded or records_path(engine_index) is None:
            return
        if not vllm_config.observability_config.enable_logging_iteration_details:
            warn("viisim: no step is recorded without --enable-logging-iteration-details")
            return
        self._file = open_records(engine_index, vllm.__version__)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """The engine reports a step, or something else."""
        details = getattr(scheduler_stats, "iteration_details", None)
        if self._file is None or details is None or details.is_dummy:
            return
        preempted = getattr(iteration_stats, "num_preempted_reqs", 0)
        try:
            record = estimated_record(
                scheduler_stats,
                preempted,
                usable_blocks=(self._cache.num_gpu_blocks or 1) - 1,
                block_tokens=self._cache.block_size,
                received_s=time.monotonic(),
            )
        except Exception as error:  # another vLLM lacks an attribute; the server goes on
            warn(f"viisim: step records end here: {type(error).__name__}: {error}")
            self._file.close()
            self._file = None
        else:
            self._file.write(record)

    def log_engine_initialized(self) -> None:
        """Nothing to say: each engine's file tells for itself."""


def estimated_record(
    stats: Any, preempted: int, usable_blocks: int, block_tokens: int, received_s: float
) -> Record:
    """The step record of one iteration, as far as a `SchedulerStats` tells it."""
    details = stats.iteration_details
    exec_s = details.elapsed_ms / 1000
    prefills, prefill_tokens = details.num_ctx_requests, details.num_ctx_tokens
    decodes = details.num_generation_requests
    chunk_tokens = prefill_tokens / prefills if prefills else 0.0
    used_blocks = round(stats.kv_cache_usage * usable_blocks)
    # A sequence's last block is half full on average.
    held_tokens = max(used_blocks - 0.5 * (decodes + prefills), 0.0) * block_tokens
    return {
        "step": details.iteration_index,
        "start_s": round(received_s - exec_s, 7),
        "exec_s": round(exec_s, 7),
        "host_s": 0.0,
        "gap_s": None,
        "prefill_tokens": prefill_tokens,
        "prefill_seqs": prefills,
        "prefill_pairs": round(prefill_tokens * (chunk_tokens + 1) / 2),
        "decode_seqs": decodes,
        "decode_context_tokens": round(held_tokens * decodes / max(decodes + prefills, 1)),
        "free_blocks": usable_blocks - used_blocks,
        "running": stats.num_running_reqs,
        "waiting": stats.num_waiting_reqs,
        "preempted": preempted,
        "source": "stat_logger",
    }
