"""A measured run once more, in the simulator: same lengths, same concurrency or arrivals.

What the measured run found in its prefix cache is put there first, by requests that end long
before the run begins and leave no trace in its figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.interface import RequestView
from policies.registry import make_policy
from viisim.calibration.measurements import Counts, Floats, RequestLog
from viisim.engine.step_time import StepTime
from viisim.errors import InputError
from viisim.profile import EngineSettings, Profile
from viisim.records import FINISHED, ITL_EDGES_S
from viisim.simulation import ReplicaSpec, Simulation
from viisim.step_costs import api_server_of, step_time_of
from viisim.workload.request import Request

_NS_PER_S = 10**9
_BEGIN_NS = 10**7 * _NS_PER_S
"""When the run begins; warm-ups are over long before."""
_NEVER_S = 1e6
"""Time between samples that nobody reads."""
_SHARED = 0
"""The segment of the one prompt that a repeating run sends; others count down from -1."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What the simulated run showed, request by request."""

    ttft_s: Floats
    e2e_s: Floats
    gaps: Counts
    """Gaps between tokens, of each request."""
    begun_s: Floats
    """When each request was sent, from the start of the run."""
    itl_counts: Counts
    """Gaps of the whole run, in the bins of `viisim.records.ITL_EDGES_S`."""
    extrapolated_steps: int
    steps: int

    def itl_quantile_s(self, share: float) -> float:
        """A quantile of all gaps, interpolated in its bin (2.3 % wide)."""
        at_most = np.concatenate(([0], np.cumsum(self.itl_counts)))
        used = np.flatnonzero(self.itl_counts)
        inner = slice(used[0], used[-1] + 2)
        return float(np.interp(share * at_most[-1], at_most[inner], ITL_EDGES_S[inner]))


def replay(log: RequestLog, profile: Profile, prefill_factor: float = 1.0) -> Replay:
    """Simulate the run under the profile; `prefill_factor` slows prefill, as a power cap does.

    Raises InputError when the profile's engine cannot serve it.
    """
    settings = replay_settings(log, profile)
    step_time = step_time_of(profile, settings.max_num_seqs)
    _slow_prefill(step_time, prefill_factor)
    spec = ReplicaSpec(
        "r0",
        profile.model,
        ("gpu0",),
        settings.scheduler_settings(),
        step_time,
        api=api_server_of(profile),
    )
    workload = _Workload(log, profile.model)
    result = Simulation(
        [spec],
        make_policy({"name": "round_robin"}),
        workload.requests(),
        scrape_s=_NEVER_S,
    ).run()
    rows: dict[str, Any] = dict(result.requests)
    measured = rows["arrived_ns"] >= _BEGIN_NS
    order = np.array(workload.arrived, dtype=np.int64)
    if (rows["outcome"][measured] != FINISHED).any() or measured.sum() != len(log):
        raise InputError(
            f"{profile.model}: the profile's engine cannot serve the run to its end; give it "
            f"larger num_kv_blocks or max_model_len"
        )
    columns = {name: rows[name][measured] for name in ("arrived_ns", "first_token_ns")}
    columns["finished_ns"] = rows["finished_ns"][measured]
    back = np.argsort(order, kind="stable")
    arrived, first, finished = (columns[name][back] for name in columns)
    return Replay(
        ttft_s=(first - arrived) / _NS_PER_S,
        e2e_s=(finished - arrived) / _NS_PER_S,
        gaps=np.asarray(rows["output_tokens"][measured][back].astype(np.int64) - 1),
        begun_s=(arrived - _BEGIN_NS) / _NS_PER_S,
        itl_counts=result.replicas[0].itl_counts,
        extrapolated_steps=result.replicas[0].extrapolated_steps,
        steps=result.replicas[0].steps,
    )


def replay_settings(log: RequestLog, profile: Profile) -> EngineSettings:
    """The profile's engine, with the memory that the measured run proves it had: room for its
    longest request, and for what it found cached."""
    engine = profile.engine
    longest = int((log.prompt_tokens + log.output_tokens).max())
    max_model_len = max(engine.max_model_len, longest + 1)
    blocks = max(engine.num_kv_blocks, max_model_len // engine.block_tokens + 2)
    if log.cached.any():
        # What is computed meanwhile must not evict what the run still finds: room for all of it.
        tokens = log.prompt_tokens + log.output_tokens + engine.block_tokens
        blocks = max(blocks, int(tokens.sum()) // engine.block_tokens)
    known = {name: getattr(engine, name) for name in EngineSettings.model_fields}
    return EngineSettings(**{**known, "max_model_len": max_model_len, "num_kv_blocks": blocks})


def _slow_prefill(step_time: StepTime, factor: float) -> None:
    step_time.prefill_token_ps = round(step_time.prefill_token_ps * factor)
    step_time.prefill_pair_ps = round(step_time.prefill_pair_ps * factor)


class _Workload:
    """The requests of a log: first those that fill the cache, then the run itself."""

    def __init__(self, log: RequestLog, model: str) -> None:
        self._log = log
        self._model = model
        self._next = 0
        self.arrived: list[int] = []
        """Numbers of the run's requests in the order in which they were sent."""

    def requests(self) -> Iterator[Request]:
        """Warm-ups, and what is sent without waiting for an answer."""
        yield from self._warm_ups()
        log = self._log
        if log.concurrency is None:
            assert log.arrived_s is not None, "an open loop has arrivals"
            for arrived_s in log.arrived_s:
                yield self._take(_BEGIN_NS + round(arrived_s * _NS_PER_S))
            return
        for _ in range(min(log.concurrency, len(log))):
            yield self._take(_BEGIN_NS)

    def _warm_ups(self) -> Iterator[Request]:
        cached = self._log.cached
        numbers = np.flatnonzero(cached)
        if self._log.repeats_one_prompt:
            numbers = numbers[:1]
        for place, number in enumerate(numbers.tolist()):
            tokens = int(cached[number]) + 1
            prompt = ((self._segment(number), tokens),)
            yield self._request(f"w{place}", 0, prompt, tokens, 1)

    def _take(self, now_ns: int) -> Request:
        """The next request of the list, sent now."""
        number = self._next
        self._next += 1
        self.arrived.append(number)
        tokens = int(self._log.prompt_tokens[number])
        prompt = ((self._segment(number), tokens),)
        outputs = int(self._log.output_tokens[number])
        request = self._request(f"r{number}", now_ns, prompt, tokens, outputs)
        ahead = len(self._log) - number
        if self._log.concurrency is not None and ahead > self._log.concurrency:
            request.next_turn = self._take
        return request

    def _segment(self, number: int) -> int:
        return _SHARED if self._log.repeats_one_prompt else -1 - number

    def _request(
        self,
        name: str,
        now_ns: int,
        prompt: tuple[tuple[int, int], ...],
        prompt_tokens: int,
        output_tokens: int,
    ) -> Request:
        view = RequestView(name, self._model, now_ns / 1e9, prompt_tokens, output_tokens, True)
        return Request(view, now_ns, prompt, output_tokens)
