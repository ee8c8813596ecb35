"""Scenarios to record golden traces of where none are at hand: a few of each group of rules."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from viisim.golden import GoldenAbort, GoldenConfig, GoldenRequest, Scenario

Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One scenario: what differs from plain traffic on an ample pool."""

    name: str
    config: dict[str, Any]
    shared: float = 0.0
    """Share of prompts that begin like an earlier one, or go on from its output."""
    aborts: int = 0
    priorities: int = 1
    requests: int = 60
    most_prompt_tokens: int = 300


_AMPLE = GoldenConfig(
    name="ample",
    kind_of_scenario="standard",
    num_blocks=1000,
    block_size=16,
    max_num_active_seqs=32,
    max_num_batched_tokens=512,
    max_model_len=1000,
    enable_prefix_caching=True,
    enable_chunked_prefill=True,
    policy="fcfs",
    long_prefill_token_threshold=0,
    long_prefill_token_threshold_adaptive=False,
    scheduler_reserve_full_isl=True,
    watermark_blocks=0,
)
_TIGHT = {"num_blocks": 65}
"""About four of the requests fit: preemption is frequent."""
_PRIORITY = {"policy": "priority"}

_KINDS = (
    _Kind("plain", {}),
    _Kind("small_budget", {"max_num_batched_tokens": 64}),
    _Kind("seats", {"max_num_active_seqs": 3}),
    _Kind("large_blocks", {"block_size": 32, "num_blocks": 33}),
    _Kind("pressure", _TIGHT),
    _Kind("pressure_without_cache", _TIGHT | {"enable_prefix_caching": False}),
    _Kind("pressure_without_reserve", _TIGHT | {"scheduler_reserve_full_isl": False}),
    _Kind("watermark", _TIGHT | {"watermark_blocks": 12}),
    _Kind("prefixes", {}, shared=0.7),
    _Kind("prefixes_under_pressure", _TIGHT, shared=0.7),
    _Kind("priorities", _PRIORITY | {"max_num_active_seqs": 4}, priorities=3),
    _Kind("priorities_under_pressure", _TIGHT | _PRIORITY, shared=0.3, priorities=2),
    _Kind("unchunked", {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}),
    _Kind("long_prefill_cap", {"long_prefill_token_threshold": 48}, most_prompt_tokens=600),
    _Kind(
        "adaptive_prefill_cap",
        {"long_prefill_token_threshold": 48, "long_prefill_token_threshold_adaptive": True},
        most_prompt_tokens=600,
    ),
    _Kind("aborts", _TIGHT, shared=0.3, aborts=20),
    _Kind("ahead", {"async_scheduling": True}),
    _Kind("ahead_under_pressure", _TIGHT | {"async_scheduling": True}, shared=0.5, aborts=10),
)


def standard_scenarios() -> list[Scenario]:
    """The same ones every time, their steps not recorded yet."""
    return [_scenario(kind, seed) for seed, kind in enumerate(_KINDS)]


def _scenario(kind: _Kind, seed: int) -> Scenario:
    rng = random.Random(seed)
    config = replace(_AMPLE, name=kind.name, **kind.config)
    requests: list[GoldenRequest] = []
    step = 0
    for number in range(kind.requests):
        step += int(rng.expovariate(0.3))
        prompt = _prompt(rng, kind, requests)
        requests.append(
            GoldenRequest(
                id=f"r{number}",
                arrival_step=step,
                arrival_time=float(step),
                prompt_tokens=sum(tokens for _, tokens in prompt),
                output_tokens=rng.randint(1, 120),
                priority=rng.randrange(kind.priorities),
                prompt=prompt,
                out_seg=2 * number + 1,
            )
        )
    return Scenario(kind.name, config, tuple(requests), _aborts(rng, kind, requests), ())


def _prompt(rng: random.Random, kind: _Kind, earlier: list[GoldenRequest]) -> Pieces:
    """New, or the beginning of an earlier prompt, or that with its output, and new."""
    own = (2 * len(earlier) + 2, rng.randint(1, kind.most_prompt_tokens))
    if not earlier or rng.random() >= kind.shared:
        return (own,)
    other = rng.choice(earlier[-8:])
    begin: Pieces = ((other.prompt[0][0], rng.randint(1, other.prompt[0][1])),)
    if rng.random() < 0.5 and other.prompt_tokens < kind.most_prompt_tokens:
        begin = (*other.prompt, (other.out_seg, rng.randint(1, other.output_tokens)))
    return (*begin, own)


def _aborts(
    rng: random.Random, kind: _Kind, requests: list[GoldenRequest]
) -> tuple[GoldenAbort, ...]:
    """Clients that leave while they wait or run, at both points of a step."""
    leaving = sorted(rng.sample(range(len(requests)), kind.aborts))
    return tuple(
        GoldenAbort(
            requests[number].id,
            requests[number].arrival_step + rng.randint(0, 60),
            "after" if rng.random() < 0.5 else "before",
        )
        for number in leaving
    )
