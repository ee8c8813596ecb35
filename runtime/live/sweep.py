"""The requests that show how long an engine's steps take: a designed sweep, and mixed traffic.

Pure functions of the engine's settings. The sweep covers the batches that the engine can make:
decode at every power of two of sequences with short and long contexts, prompts alone from a few
tokens to many steps, and prompts beside decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.errors import InputError
from viisim.profile import EngineSettings

SHORT_TOKENS = 16
_DECODE_STEPS = 32
"""Steps of a decode phase after all its prompts are in: enough for a mean, few enough that the
context hardly grows meanwhile."""
_MOST_STEPS = 16
"""Full steps that the prompts of one phase may take: with long contexts, they are its cost."""
_GROWTH = 1.5
"""Ratio of one prompt length to the next."""
_STEPS_BETWEEN = 4
"""Steps of the others, at most, while an answer travels to the client and the next prompt back."""
_TRAFFIC_REQUESTS, _FEWEST_TURNS, _MOST_CHAINS = 48, 4, 32
_TRAFFIC_OUTPUTS = (8, 96)
_MOST_PAUSE_S = 0.1
"""Several steps of most engines: a request may then come at any moment of a step."""

Chain: TypeAlias = tuple["Ask", ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt_tokens: int
    output_tokens: int
    pause_s: float = 0.0
    """From the answer before it in its chain until it is sent."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Chains of requests that begin together; in a chain, each follows the answer to the last.
    The worker is idle before and after."""

    name: str
    chains: tuple[Chain, ...]


def sweep(engine: EngineSettings) -> list[Phase]:
    """One pass, which fits the engine's limits: no sequence of it waits for blocks.

    Raises InputError for an engine that cannot hold one short request.
    """
    if not decode_sizes(engine):
        raise InputError(
            f"num_kv_blocks: {engine.num_kv_blocks} blocks of {engine.block_tokens} tokens, and "
            f"sequences up to {engine.max_model_len}, are too few to calibrate; raise them"
        )
    decodes = [phase for size in decode_sizes(engine) for phase in _decodes(engine, size)]
    beside = {max(1, engine.max_num_seqs // share) for share in (8, 2)}
    mixed = [phase for size in sorted(beside) for phase in _mixed(engine, size)]
    return [*decodes, alone(engine), *mixed]


def decode_sizes(engine: EngineSettings) -> list[int]:
    """Powers of two up to `max_num_seqs`, and that: those whose short contexts fit the blocks."""
    most = engine.max_num_seqs
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [size for size in (*sizes, most) if _longest(engine, size) >= SHORT_TOKENS]


def alone(engine: EngineSettings) -> Phase:
    """Prompts one after the other: prefill, and what a client sees of a request that waits for
    nothing."""
    longest = min(engine.max_model_len - 2, _MOST_STEPS * engine.max_num_batched_tokens)
    longest = min(longest, _sequence_room(engine, 1) - 2)
    return Phase("alone", (tuple(Ask(n, 2) for n in _lengths(longest)),))


def traffic(engine: EngineSettings) -> list[Phase]:
    """Mixed lengths in ragged batches, with up to a quarter of the places taken and then up to
    all, and pauses between; the same whenever it is called."""
    most = min(engine.max_num_seqs, _MOST_CHAINS)
    few = min(max(2, most // 4), most)
    return [_traffic(engine, chains) for chains in sorted({few, most})]


def _traffic(engine: EngineSettings, chains: int) -> Phase:
    least, most = _TRAFFIC_OUTPUTS
    longest = min(engine.max_model_len // 2, _sequence_room(engine, chains)) - most
    rng = np.random.default_rng(chains)
    shape = (chains, max(_FEWEST_TURNS, _TRAFFIC_REQUESTS // chains))
    prompts = _log_uniform(rng, SHORT_TOKENS, max(SHORT_TOKENS, longest), shape).astype(int)
    outputs = _log_uniform(rng, least, most, shape).astype(int)
    pauses_s = rng.uniform(0.0, _MOST_PAUSE_S, shape)
    each = zip(prompts.tolist(), outputs.tolist(), pauses_s.tolist(), strict=True)
    turns = (tuple(Ask(*ask) for ask in zip(*chain, strict=True)) for chain in each)
    return Phase(f"traffic {chains}", tuple(turns))


def _log_uniform(
    rng: np.random.Generator, least: int, most: int, shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Numbers in between, their logarithms uniform."""
    return np.exp(rng.uniform(np.log(least), np.log(most), shape))


def _decodes(engine: EngineSettings, size: int) -> Iterator[Phase]:
    """So many sequences decoding at once, at short contexts and at longer ones, up to the longest
    that fit."""
    longest = _longest(engine, size)
    lengths = (SHORT_TOKENS, longest) if longest >= 2 * SHORT_TOKENS else (SHORT_TOKENS,)
    for prompt in lengths:
        # The first prompt's sequence must still decode when the last prompt has been computed.
        ramp = -(-size * prompt // _beside(engine, size))
        asks = (Ask(own, _DECODE_STEPS + ramp) for own in _ragged(prompt, size))
        yield Phase(f"decode {size} x {prompt}", tuple((ask,) for ask in asks))


def _ragged(longest: int, size: int) -> list[int]:
    """So many prompts, from the longest down to a third of it: in traffic no two are alike."""
    least = max(SHORT_TOKENS, longest // 3)
    return [longest - (longest - least) * index // max(1, size - 1) for index in range(size)]


def _mixed(engine: EngineSettings, size: int) -> Iterator[Phase]:
    """Prompts one after the other while so many sequences decode; none where they do not fit."""
    step = _beside(engine, size)
    lengths = _lengths(min(2 * step, engine.max_model_len - 1))
    while lengths:
        outputs = sum(-(-prompt // step) + _STEPS_BETWEEN for prompt in lengths)
        blocks = size * _blocks(engine, SHORT_TOKENS + outputs) + _blocks(engine, lengths[-1] + 1)
        if blocks <= _usable(engine) and SHORT_TOKENS + outputs <= engine.max_model_len:
            prompts = tuple(Ask(prompt, 1) for prompt in lengths)
            decodes: tuple[Chain, ...] = ((Ask(SHORT_TOKENS, outputs),),) * size
            # One sequence less where the prompt would be one too many.
            yield Phase(f"mixed {size}", (*decodes[: engine.max_num_seqs - 1], prompts))
            return
        lengths = lengths[:-1]


def _lengths(longest: int) -> list[int]:
    """Prompt lengths in geometric steps, the longest among them."""
    lengths, length = [], float(SHORT_TOKENS)
    while length < longest:
        lengths.append(int(length))
        length *= _GROWTH
    return [*lengths, longest]


def _longest(engine: EngineSettings, size: int) -> int:
    """Longest prompt of which so many fit, with their outputs, and cost no more than they may."""
    step = _beside(engine, size)
    room = _sequence_room(engine, size) - _DECODE_STEPS - 1
    return min(room * step // (step + size), _MOST_STEPS * step // size)


def _beside(engine: EngineSettings, size: int) -> int:
    """Prompt tokens that fit a step beside so many decodes."""
    return max(1, engine.max_num_batched_tokens - size)


def _sequence_room(engine: EngineSettings, size: int) -> int:
    """Tokens that each of so many sequences may have."""
    return min(_usable(engine) // size * engine.block_tokens, engine.max_model_len)


def _usable(engine: EngineSettings) -> int:
    return int((engine.num_kv_blocks - 1) * (1 - engine.watermark))


def _blocks(engine: EngineSettings, tokens: int) -> int:
    return -(-tokens // engine.block_tokens)
