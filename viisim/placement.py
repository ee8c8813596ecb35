"""What fits where: blocks, the longest context, and the smallest group that holds a model.

A group shares a model by tensor parallelism (every device holds a slice of every layer) or by a
layer split (every device holds some of the layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from viisim.architecture import ModelConfig
from viisim.errors import InputError
from viisim.hardware import Device
from viisim.memory import (
    DEFAULTS,
    GIB,
    MAX_DEVICES,
    QUANTISATIONS,
    MemorySettings,
    MemoryUse,
    find_quantisation,
    memory_use,
    sequence_kv_bytes,
    tensor_parallel_sizes,
)

Split: TypeAlias = Literal["tensor", "layers"]

LEAST_CONTEXT_TOKENS = 1024
"""A placement that cannot hold one sequence of this length is of no use."""

_BY_LOSS = ("fp16", "bf16", "fp8", "q8", "w4a16", "q4", "q3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A group of equal devices that holds a model."""

    device: str
    model: str
    quantisation: str
    tensor_parallel: int
    stages: int
    """Devices one behind the other, of a layer split."""
    memory: MemoryUse
    """Of the fullest device."""
    longest_context_tokens: int
    """Longest single sequence, at most the model's positions."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.tensor_parallel * self.stages

    @property
    def blocks(self) -> int:
        """The pool as vLLM counts it, in blocks that a token takes on every device at once."""
        return self.memory.blocks


def kv_blocks(
    model: ModelConfig,
    device: Device,
    quantisation: str = "fp16",
    tensor_parallel: int = 1,
    stages: int = 1,
    settings: MemorySettings = DEFAULTS,
) -> int:
    """KV blocks of a server, as vLLM's `num_gpu_blocks`.

    Every layer counts as keeping every token, also those with a window. Raises InputError if the
    model does not fit, saying what would.
    """
    use = memory_use(model, device, quantisation, tensor_parallel, stages, settings)
    if use.blocks < 2:  # one is never handed out
        raise does_not_fit(model, device, quantisation, tensor_parallel * stages, use, settings)
    return use.blocks


def blocks_in_log(available_gib: float, bytes_per_token: int, block_tokens: int = 16) -> int:
    """Blocks that a log's `Available KV cache memory` makes; the log prints two decimals, so it
    pins them down to 0.005 GiB either way."""
    return int(round(available_gib, 2) * GIB // (bytes_per_token * block_tokens))


def longest_context_tokens(
    model: ModelConfig,
    use: MemoryUse,
    tensor_parallel: int = 1,
    stages: int = 1,
    settings: MemorySettings = DEFAULTS,
) -> int:
    """Longest sequence that the cache holds alone, at most the model's positions; 0 if none.

    Layers with a window keep no more than the window.
    """
    share = -(-model.layers // stages) / model.layers
    room_bytes = max(0, use.kv_bytes - use.bytes_per_block)

    def fits(tokens: int) -> bool:
        needed = sequence_kv_bytes(model, tokens, settings.kv_dtype, tensor_parallel)
        return needed * share <= room_bytes

    blocks = _last_that(lambda n: fits(n * settings.block_tokens), model.max_positions)
    return min(blocks * settings.block_tokens, model.max_positions)


def _last_that(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that `holds`, which holds below some bound; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def placement(
    model: ModelConfig,
    device: Device,
    quantisation: str = "fp16",
    split: Split = "tensor",
    max_devices: int = MAX_DEVICES,
    context_tokens: int = LEAST_CONTEXT_TOKENS,
    settings: MemorySettings = DEFAULTS,
) -> Placement:
    """The smallest group that holds the model and one sequence of `context_tokens`.

    Raises InputError if none of up to `max_devices` does, saying what would.
    """
    needed = min(context_tokens, model.max_positions)
    for found in _placements(model, device, quantisation, split, max_devices, settings):
        if found.longest_context_tokens >= needed:
            return found
    use = memory_use(model, device, quantisation, settings=settings)
    raise does_not_fit(model, device, quantisation, max_devices, use, settings, needed)


def _placements(
    model: ModelConfig,
    device: Device,
    quantisation: str,
    split: Split,
    max_devices: int,
    settings: MemorySettings,
) -> Iterator[Placement]:
    if split == "tensor":
        groups = [(size, 1) for size in tensor_parallel_sizes(model, max_devices)]
    else:
        groups = [(1, stages) for stages in range(1, min(max_devices, model.layers) + 1)]
    for tensor_parallel, stages in groups:
        use = memory_use(model, device, quantisation, tensor_parallel, stages, settings)
        yield Placement(
            device=device.name,
            model=model.name,
            quantisation=find_quantisation(quantisation).name,
            tensor_parallel=tensor_parallel,
            stages=stages,
            memory=use,
            longest_context_tokens=longest_context_tokens(
                model, use, tensor_parallel, stages, settings
            ),
        )


# --------------------------------------------------------------------------------------
# What would fit


def does_not_fit(
    model: ModelConfig,
    device: Device,
    quantisation: str,
    devices: int,
    use: MemoryUse,
    settings: MemorySettings = DEFAULTS,
    context_tokens: int = LEAST_CONTEXT_TOKENS,
) -> InputError:
    """The error for a model that `devices` devices do not hold, with what would."""
    repairs = _repairs(model, device, quantisation, devices, settings, context_tokens)
    advice = f"it fits {' or '.join(repairs)}" if repairs else "take a larger card"
    return InputError(
        f"{model.name} as {quantisation} does not fit {devices} x {device.name}: "
        f"{use.weights_bytes / GIB:.2f} GiB of weights in a budget of "
        f"{use.budget_bytes / GIB:.2f} GiB a card; {advice}"
    )


def _repairs(
    model: ModelConfig,
    device: Device,
    quantisation: str,
    devices: int,
    settings: MemorySettings,
    context_tokens: int,
) -> list[str]:
    needed = min(context_tokens, model.max_positions)
    search = partial(_smallest, model, device, settings, needed)
    repairs = []
    if (size := search(quantisation, "tensor", MAX_DEVICES)) is not None:
        repairs.append(f"with tensor_parallel {size}")
    elif (size := search(quantisation, "layers", MAX_DEVICES)) is not None:
        repairs.append(f"split by layers over {size}")
    smaller = _smaller(quantisation, device)
    whole = (name for name in smaller if search(name, "tensor", devices) is not None)
    # Where none does on these devices, the one most used on more of them.
    fitting = next(whole, "w4a16" if "w4a16" in smaller else None)
    if fitting and (size := search(fitting, "tensor", MAX_DEVICES)) is not None:
        repairs.append(f"as {fitting}" + (f" with tensor_parallel {size}" if size > 1 else ""))
    return repairs


def _smallest(
    model: ModelConfig,
    device: Device,
    settings: MemorySettings,
    needed: int,
    quantisation: str,
    split: Split,
    most: int,
) -> int | None:
    groups = _placements(model, device, quantisation, split, most, settings)
    return next((g.devices for g in groups if g.longest_context_tokens >= needed), None)


def _smaller(quantisation: str, device: Device) -> list[str]:
    """Quantisations that take less, those that lose least first, as far as the device has them."""
    bits = find_quantisation(quantisation).linear
    return [
        name
        for name in _BY_LOSS
        if QUANTISATIONS[name].linear < bits
        and QUANTISATIONS[name].computes_in in device.dtypes.value
    ]
