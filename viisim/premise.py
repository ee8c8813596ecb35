"""What the project's premise claims, asked of the model: a few users, a bound, a record's peak.

The page that is made of it is `experiments/premise/make.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from policies.interface import RequestView
from viisim.config import Experiment
from viisim.engine.step_time import PS_PER_S, StepTime
from viisim.engine.stepwise import SteppedScheduler
from viisim.experiment import run_seed
from viisim.golden import GoldenConfig, GoldenRequest
from viisim.hardware import load_device
from viisim.metrics import latencies
from viisim.models import load_model
from viisim.plan import Candidate, cluster_power_w, measured_profile, simulate_candidate
from viisim.profile import EngineSettings
from viisim.records import FINISHED, SeedResult
from viisim.roofline import Roofline, roofline_profile
from viisim.step_costs import step_time_of
from viisim.workload.request import Request

ROUNDS = 4
"""Questions that a user asks, one after the other's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Some users, each always with one request in the system."""

    tokens_per_s: float
    """Generated, all users together."""
    tpot_s: float
    ttft_s: float
    power_w: float
    """Of all cards."""


def configuration(
    model: str,
    device: str,
    quantisation: str = "fp16",
    tensor_parallel: int = 1,
    replicas: int = 1,
) -> Candidate:
    """A configuration as the premise names it. Raises InputError if the model does not fit."""
    profile = measured_profile(model, device, quantisation, tensor_parallel) or roofline_profile(
        device, model, quantisation, tensor_parallel
    )
    return Candidate(
        device=load_device(device), quantisation=quantisation, profile=profile, replicas=replicas
    )


def serve(candidate: Candidate, users: int, prompt_tokens: int, output_tokens: int) -> Served:
    """So many users at once, who all ask at the same moment and then whenever answered.

    Raises AssertionError if the configuration cannot take such a request.
    """
    result = simulate_candidate(candidate, _questions(users, prompt_tokens, output_tokens))
    assert (result.requests["outcome"] == FINISHED).all(), "every request fits"
    times_s = latencies(result.requests)
    tokens = float(result.requests["output_tokens"].astype(np.int64).sum())
    return Served(
        tokens_per_s=tokens / (float(result.requests["finished_ns"].max()) / 1e9),
        tpot_s=float(times_s["tpot_s"].mean()),
        ttft_s=float(times_s["ttft_s"].mean()),
        power_w=cluster_power_w(candidate, result),
    )


def _questions(users: int, prompt_tokens: int, output_tokens: int) -> Iterator[Request]:
    def ask(user: int, turn: int, now_ns: int) -> Request:
        view = RequestView(
            f"u{user}-{turn}", "model", now_ns / 1e9, prompt_tokens, output_tokens, True
        )
        own = -1 - (user * ROUNDS + turn)
        request = Request(view, now_ns, ((own, prompt_tokens),), output_tokens)
        if turn + 1 < ROUNDS:
            request.next_turn = partial(ask, user, turn + 1)
        return request

    for user in range(users):
        yield ask(user, 0, 0)


def bound_tokens_per_s(
    model: str,
    device: str,
    quantisation: str = "fp16",
    tensor_parallel: int = 1,
    sequences: int = 1,
    measured: bool = False,
) -> float:
    """Tokens per second if a decode step took no longer than reading its weights once, at the
    nominal bandwidth, or the measured one where there is one."""
    card = load_device(device)
    read = Roofline(card, load_model(model), quantisation, tensor_parallel).read_bytes(sequences)
    nominal = card.bandwidth_gb_s.value * 1e9
    return sequences * (card.bandwidth_bytes_per_s if measured else nominal) / read


# --------------------------------------------------------------------------------------
# A record of one server


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a benchmark of one server prints."""

    tokens_per_s: float
    peak_tokens_per_s: float
    """Most tokens in one second of the clock."""
    tpot_s: float
    ttft_s: float
    active: float
    """Requests that were generating, on average, by Little's law: throughput x TPOT."""
    most_waiting: int


def record_of(experiment: Experiment) -> Record:
    """The experiment's first seed, as a benchmark would print it. For one replica."""
    seed = experiment.seeds[0]
    result = run_seed(experiment, seed)
    times_s = latencies(result.requests)
    finished_s = float(np.max(result.requests["finished_ns"])) / 1e9
    rate = float(np.sum(result.requests["output_tokens"], dtype=np.float64)) / finished_s
    tpot_s = float(times_s["tpot_s"].mean())
    return Record(
        tokens_per_s=rate,
        peak_tokens_per_s=float(_tokens_by_second(experiment, seed).max()),
        tpot_s=tpot_s,
        ttft_s=float(times_s["ttft_s"].mean()),
        active=rate * tpot_s,
        most_waiting=_most_waiting(result),
    )


def _most_waiting(result: SeedResult) -> int:
    return int(np.max(result.samples["waiting"]))


def _tokens_by_second(experiment: Experiment, seed: int) -> NDArray[np.int64]:
    """Tokens generated in each second. Runs do not keep the time of every token, so the very
    scheduler of a run is driven once more, step by step, under a clock of its own."""
    replica = experiment.simulated_replicas()[0]
    engine = SteppedScheduler(_stepped(replica.settings))
    step_time = step_time_of(replica.profile, replica.settings.max_num_seqs)
    coming = [_arrival(request) for request in experiment.build_workload().requests(seed)][::-1]
    prompts = {request.id: request.prompt_tokens for request in coming}
    now_ps, ends_ps, tokens = 0, [0], [0]
    while coming or engine.has_requests:
        if not engine.has_requests:
            now_ps = max(now_ps, round(coming[-1].arrival_time * PS_PER_S))
        while coming and coming[-1].arrival_time * PS_PER_S <= now_ps:
            engine.add(coming.pop())
        duration_ps, emitted = _step(engine, step_time, prompts)
        now_ps += duration_ps
        ends_ps.append(now_ps)
        tokens.append(emitted)
    return np.bincount(np.array(ends_ps) // PS_PER_S, weights=tokens).astype(np.int64)


def _step(
    engine: SteppedScheduler, step_time: StepTime, prompts: dict[str, int]
) -> tuple[int, int]:
    """One step's duration in picoseconds, and the tokens it generates."""
    seen = engine.schedule()
    computed = dict(zip(seen.running, seen.computed, strict=True))
    decodes = context = prefills = pairs = emitted = 0
    for name, count in seen.scheduled:
        after = computed[name]
        if after > prompts[name]:
            decodes, context = decodes + 1, context + after
        else:
            prefills += count
            pairs += count * (after - count) + count * (count + 1) // 2
        emitted += after >= prompts[name]
    engine.update()
    return step_time.step_ps(decodes, context, prefills, pairs), emitted


def _stepped(settings: EngineSettings) -> GoldenConfig:
    known = settings.scheduler_settings()
    return GoldenConfig(
        name="record",
        num_blocks=known.num_kv_blocks,
        block_size=known.block_tokens,
        max_num_active_seqs=known.max_num_seqs,
        max_num_batched_tokens=known.max_num_batched_tokens,
        max_model_len=known.max_model_len,
        enable_prefix_caching=known.prefix_caching,
        enable_chunked_prefill=known.chunked_prefill,
        policy="fcfs",
        long_prefill_token_threshold=known.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=known.adaptive_long_prefill,
        scheduler_reserve_full_isl=known.reserve_full_prompt,
        watermark_blocks=known.watermark_blocks,
    )


def _arrival(request: Request) -> GoldenRequest:
    view = request.view
    number = int(view.id[1:])
    return GoldenRequest(
        id=view.id,
        arrival_step=0,
        arrival_time=view.arrived_s,
        prompt_tokens=view.prompt_tokens,
        output_tokens=request.output_tokens,
        priority=0,
        prompt=((number, view.prompt_tokens),),
        out_seg=-1 - number,
    )
