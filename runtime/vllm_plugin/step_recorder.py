"""A scheduler for `vllm serve --scheduler-cls` that records every step it makes.

It decides nothing: each call goes to vLLM's own scheduler, with the clock read before and after.
Written against the scheduler of vLLM 0.32.0 (V1).
"""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from runtime.vllm_plugin.gauge import start_gauge
from runtime.vllm_plugin.records import StepRecorder, open_records


class RecordingScheduler(Scheduler):  # type: ignore[misc]  # vllm is untyped from here
    """vLLM's scheduler, or its asynchronous one where the engine schedules ahead, with a record
    of every step in the file that `VIISIM_STEP_RECORDS` names."""

    def __new__(cls, vllm_config: Any, *_: Any, **__: Any) -> RecordingScheduler:
        """The subclass that the engine's configuration asks for.

        vLLM names one class for both cases, and would give up scheduling ahead for a class that
        is not an `AsyncScheduler`; then the steps recorded would not be those of the worker.
        """
        if vllm_config.scheduler_config.async_scheduling:
            cls = RecordingAsyncScheduler
        instance: RecordingScheduler = super().__new__(cls)
        return instance

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        index = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
        file = open_records(index, vllm.__version__)
        self._recorder = None if file is None else StepRecorder(file)
        if index == 0:
            start_gauge()
        self._preempted = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Make the next batch."""
        start_s = time.monotonic()
        self._preempted = 0
        output = super().schedule(*args, **kwargs)
        if self._recorder is not None:
            self._recorder.scheduled(self, output, start_s, self._preempted)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Process what the model made of a batch."""
        received_s = time.monotonic()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        if self._recorder is not None:
            self._recorder.processed(scheduler_output, received_s)
        return outputs

    def shutdown(self) -> None:
        """The engine ends."""
        if self._recorder is not None:
            self._recorder.close()
        super().shutdown()

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        self._preempted += 1
        super()._preempt_request(*args, **kwargs)


class RecordingAsyncScheduler(RecordingScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same for an engine that schedules a step before the output of the last is known."""
