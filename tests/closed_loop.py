"""A made-up server behind a closed loop of clients, as `vllm bench serve` would record it.

One token budget, prompts first come first served, step times by a formula that tests know.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

BASE_S = {1: 0.020, 2: 0.024, 3: 0.026, 4: 0.027}
PER_CONTEXT_S = 1e-6
PREFILL_BASE_S, PER_TOKEN_S, PER_PAIR_S = 0.060, 1e-3, 1.5e-7
LATENCY_S = 0.001
"""Between the end of a request and the arrival of the client's next one at the server."""


@dataclass
class _Served:
    prompt: int
    outputs: int
    sent_s: float
    computed: int = 0
    tokens_s: tuple[float, ...] = ()


def bench_result(
    prompts: list[int],
    outputs: list[int],
    concurrency: int,
    budget: int = 2048,
    **more: Any,
) -> dict[str, Any]:
    """The JSON of a run in which nothing is cached and every step takes its exact time."""
    served = _serve(prompts, outputs, concurrency, budget)
    return {
        "date": "20250101-120000",
        "model_id": "maker/Model-8B",
        "num_prompts": len(prompts),
        "completed": len(prompts),
        "request_rate": "inf",
        "max_concurrency": concurrency,
        "input_lens": prompts,
        "output_lens": outputs,
        "ttfts": [request.tokens_s[0] - request.sent_s for request in served],
        "itls": [_gaps(request.tokens_s) for request in served],
        "errors": [],
        "metadata.vllm_ver": "0.11.0+gfx906",
        "metadata.power_cap": "225",
        **more,
    }


def _gaps(times: tuple[float, ...]) -> list[float]:
    return [later - sooner for sooner, later in pairwise(times)]


def _serve(prompts: list[int], outputs: list[int], concurrency: int, budget: int) -> list[_Served]:
    todo = deque(_Served(*lengths, 0.0) for lengths in zip(prompts, outputs, strict=True))
    everything = list(todo)
    arriving = [todo.popleft() for _ in range(min(concurrency, len(todo)))]
    waiting: list[_Served] = []
    decoding: list[_Served] = []
    now_s = 0.0
    while arriving or waiting or decoding:
        if not waiting and not decoding:
            now_s = max(now_s, min(_at_server_s(request) for request in arriving))
        waiting += [request for request in arriving if _at_server_s(request) <= now_s]
        arriving = [request for request in arriving if _at_server_s(request) > now_s]
        now_s, ended = _step(now_s, waiting, decoding, budget)
        for request in ended:
            if todo:
                following = todo.popleft()
                following.sent_s = now_s
                arriving.append(following)
            decoding.remove(request)
    return everything


def _at_server_s(request: _Served) -> float:
    return request.sent_s + (LATENCY_S if request.sent_s else 0.0)


def _step(
    now_s: float, waiting: list[_Served], decoding: list[_Served], budget: int
) -> tuple[float, list[_Served]]:
    """One engine step; returns its end and who ended with it."""
    before = list(decoding)
    room = budget - len(before)
    tokens = pairs = 0
    firsts = []
    for request in list(waiting):
        chunk = min(request.prompt - request.computed, room)
        if not chunk:
            break
        tokens += chunk
        pairs += chunk * request.computed + chunk * (chunk + 1) // 2
        request.computed += chunk
        room -= chunk
        if request.computed == request.prompt:
            waiting.remove(request)
            firsts.append(request)
    context = sum(request.prompt + len(request.tokens_s) for request in before)
    base_s = BASE_S.get(len(before), 0.0)
    if tokens:
        base_s = max(base_s, PREFILL_BASE_S)
    end_s = now_s + base_s + PER_CONTEXT_S * context + PER_TOKEN_S * tokens + PER_PAIR_S * pairs
    for request in (*before, *firsts):
        request.tokens_s += (end_s,)
    decoding += firsts
    return end_s, [request for request in decoding if len(request.tokens_s) == request.outputs]
