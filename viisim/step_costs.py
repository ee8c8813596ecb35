"""A profile's times as a simulation computes with them, and as policies see them."""

from __future__ import annotations

from dataclasses import dataclass

from policies.interface import StepCosts
from viisim.engine.step_time import CalibratedRange, DecodePoint, StepTime
from viisim.profile import Profile


@dataclass(frozen=True, slots=True)
class ApiServer:
    """What lies between clients and an engine, as far as it takes time."""

    request_ns: int = 0
    """From the dispatch of a request until the engine's scheduler has it, and"""
    request_per_prompt_token_ps: int = 0
    """what each of its prompt tokens adds."""
    answer_ns: int = 0
    """From the end of a step until clients have the tokens that it made."""

    def reads_ns(self, prompt_tokens: int) -> int:
        """How long after its dispatch the engine has a request of so many tokens."""
        return self.request_ns + self.request_per_prompt_token_ps * prompt_tokens // 1000


def api_server_of(profile: Profile) -> ApiServer | None:
    """The profile's API server; None where the profile does not tell of it."""
    api = profile.api
    if api is None:
        return None
    return ApiServer(
        round(api.request_s * 1e9),
        round(api.request_per_prompt_token_s * 1e12),
        round(api.answer_s * 1e9),
    )


def step_costs_of(profile: Profile, max_batched_tokens: int) -> StepCosts:
    """The profile's step times as policies see them."""
    times = profile.step_time
    return StepCosts(
        tuple(point.sequences for point in times.decode),
        tuple(point.base_s for point in times.decode),
        tuple(point.per_context_token_s for point in times.decode),
        times.prefill.base_s,
        times.prefill.per_token_s,
        times.prefill.per_token_context_s,
        times.host_overhead_s,
        max_batched_tokens,
    )


def step_time_of(profile: Profile, max_num_seqs: int, slowdown: float = 1.0) -> StepTime:
    """The profile's step times for batches of up to `max_num_seqs` sequences, each multiplied
    by `slowdown`.

    A profile states the longest measured context of one sequence; a batch is within the
    calibrated range as long as all its sequences could be.
    """
    times, measured = profile.step_time, profile.range
    most_sequences = measured.decode_sequences[1]
    return StepTime(
        [DecodePoint(p.sequences, p.base_s, p.per_context_token_s) for p in times.decode],
        max_num_seqs,
        prefill_base_s=times.prefill.base_s,
        prefill_per_token_s=times.prefill.per_token_s,
        prefill_per_pair_s=times.prefill.per_token_context_s,
        host_overhead_s=times.host_overhead_s,
        calibrated=CalibratedRange(
            max_decode_sequences=most_sequences,
            max_context_tokens=most_sequences * measured.context_tokens[1],
            max_prefill_tokens=measured.prefill_tokens[1],
        ),
        slowdown=slowdown,
    )
