"""A profile's step times, as the engine computes with them and as policies see them."""

from __future__ import annotations

from policies.interface import StepCosts
from viisim.engine.step_time import CalibratedRange, DecodePoint, StepTime
from viisim.profile import Profile


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
