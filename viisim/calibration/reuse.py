"""Which measured prompts were not computed, because their content was in the prefix cache.

A client's file does not say so, and taking a cached prompt for a computed one spoils every prefill
term. Three cases occur in practice, and each shows in the times:

* a run that repeats one prompt: tagged `tg`, or first tokens that come impossibly early;
* single requests whose prompt was sent before, in a test request or an aborted run;
* runs of growing prompt length whose generator extends the same prompts: the later run finds the
  earlier one's in the cache, and its times grow as if each computed only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from viisim.calibration.batches import SHORT_TOKENS, steps_of
from viisim.calibration.fit import fit_steps
from viisim.calibration.measurements import Counts, Measurement, RequestLog, StepLog

_IMPOSSIBLE_TOKENS = 400
"""Prompt tokens per time of a decode step that no engine here computes (gfx906: 13 to 28)."""
_EARLY = 0.4
"""A first token that comes in this share of the usual time per prompt token was cached."""
_FEWEST = 5
_LONG_TOKENS = 1024
"""Steps of a series of prompt lengths are at least so long."""
_BETTER = 5.0
"""Fall of the robust cost (twice a log-likelihood) that makes a series believed."""


def with_cached_prompts(run: Measurement, block_tokens: int) -> Measurement:
    """The run with `cached_tokens` filled in from its own times, where they were not recorded."""
    log = run.requests
    if log is None or log.cached_tokens is not None:
        return run
    # The look-up finds whole blocks only, and never the last token.
    whole = (log.prompt_tokens - 1) // block_tokens * block_tokens
    if log.repeats_one_prompt or _repeats(log):
        found = replace(log, repeats_one_prompt=True, cached_tokens=whole)
    else:
        found = replace(log, cached_tokens=np.where(_early(log), whole, 0))
    return replace(run, requests=found)


def _repeats(log: RequestLog) -> bool:
    """Whether all prompts are equally long and come back faster than anything computes them."""
    if len(np.unique(log.prompt_tokens)) > 1 or log.gaps_s is None:
        return False
    gaps = np.concatenate(log.gaps_s)
    if not len(gaps) or log.prompt_tokens[0] < SHORT_TOKENS:
        return False
    steps = np.quantile(log.ttft_s, 0.1) / np.median(gaps)
    return bool(log.prompt_tokens[0] / steps > _IMPOSSIBLE_TOKENS)


def _early(log: RequestLog) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Requests whose first token came far earlier than those of others, by prompt length."""
    if len(log) < _FEWEST:
        return np.zeros(len(log), dtype=bool)
    per_token_s = log.ttft_s / log.prompt_tokens
    # Queueing only ever adds: the faster requests show what a prompt takes by itself.
    usual_s = np.quantile(per_token_s, 0.4)
    return np.asarray((per_token_s < _EARLY * usual_s) & (log.prompt_tokens >= SHORT_TOKENS))


# --------------------------------------------------------------------------------------
# Series of prompt lengths


@dataclass(frozen=True, slots=True)
class Series:
    """Runs whose prompts extend those of the run before, by `step_tokens` each."""

    step_tokens: int

    @staticmethod
    def could_be(step_tokens: int) -> bool:
        """Whether lengths that differ by so much are a series, and not just equal prompts."""
        return step_tokens >= _LONG_TOKENS

    def cached_tokens(self, log: RequestLog) -> Counts:
        """What each prompt of a run finds in the cache, if the run belongs to the series."""
        length = uniform_length(log)
        if length is None or length % self.step_tokens or length <= self.step_tokens:
            return log.cached
        reused = np.full(len(log), length - self.step_tokens)
        return np.asarray(np.maximum(log.cached, reused))

    def apply(self, run: Measurement) -> Measurement:
        """The run with what it finds in the cache."""
        if run.requests is None:
            return run
        cached = self.cached_tokens(run.requests)
        return replace(run, requests=replace(run.requests, cached_tokens=cached))


def find_series(runs: Sequence[Measurement], max_batched_tokens: int) -> Series | None:
    """The series that the runs form, if that explains their times far better than not."""
    lengths = {
        length
        for run in runs
        if run.requests is not None and (length := uniform_length(run.requests)) is not None
    }
    step = gcd(*lengths)
    if len(lengths) < 2 or not Series.could_be(step):
        return None
    series = Series(step)
    apart = fit_steps(step_logs(runs, max_batched_tokens))
    chained = fit_steps(step_logs([series.apply(run) for run in runs], max_batched_tokens))
    return series if chained.prefill_cost < apart.prefill_cost - _BETTER else None


def step_logs(runs: Sequence[Measurement], max_batched_tokens: int) -> list[StepLog]:
    """The steps of each run. Prefills of runs that repeat one prompt, too short or cached, count
    only where no other prefill was measured."""
    logs = [_steps(run, max_batched_tokens) for run in runs]
    telling = [
        log.part(log.prefill_tokens == 0) if repeats_prompt(run) else log
        for run, log in zip(runs, logs, strict=True)
    ]
    return telling if any(log.prefill_tokens.any() for log in telling) else logs


def repeats_prompt(run: Measurement) -> bool:
    """Whether the run sends one prompt again and again."""
    return run.requests is not None and run.requests.repeats_one_prompt


def _steps(run: Measurement, max_batched_tokens: int) -> StepLog:
    if run.steps is not None:
        return run.steps
    assert run.requests is not None, "a measurement has requests or steps"
    return steps_of(run.requests, max_batched_tokens)


def uniform_length(log: RequestLog) -> int | None:
    """The common length of long prompts that are all different; None for any other run."""
    length = int(log.prompt_tokens[0])
    uniform = bool((log.prompt_tokens == length).all())
    return length if uniform and length >= _LONG_TOKENS and not log.repeats_one_prompt else None
