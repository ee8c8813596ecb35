"""What a model takes of a device's memory, and what is left for keys and values.

    KV bytes = memory x utilisation - weights - activations - non-torch

as vLLM V1 counts (graph memory on ROCm lies outside). One of the blocks that come out is never
handed out, and a server refuses to start if the rest cannot hold one sequence of the longest
context it promises. Everything is per device of the group that shares the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from viisim.architecture import ModelConfig
from viisim.documents import nearest
from viisim.errors import InputError
from viisim.hardware import Device, Dtype

GIB = 2**30
MAX_DEVICES = 16
"""Largest group that is looked at."""


# --------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Bits per weight, by part of the model, and the arithmetic it needs."""

    name: str
    experts: float
    linear: float
    """All else but the tables and the vision tower; norms too, too few to matter."""
    tables: float
    """Embeddings and output head."""
    computes_in: Dtype


# W4A16: 4 bits and, for every 128 weights, a 16-bit scale and 16 bits of zero point and padding.
# GGUF: bits per weight of whole files, q8_0, q4_K_M and q3_K_M, as llama.cpp reports them.
QUANTISATIONS = {
    entry.name: entry
    for entry in (
        Quantisation("fp16", 16, 16, 16, "fp16"),
        Quantisation("bf16", 16, 16, 16, "bf16"),
        Quantisation("fp8", 8, 8, 16, "fp8"),
        Quantisation("w4a16", 4.25, 4.25, 16, "fp16"),
        Quantisation("mxfp4", 4.25, 16, 16, "fp16"),
        Quantisation("q8", 8.5, 8.5, 8.5, "fp16"),
        Quantisation("q4", 4.85, 4.85, 4.85, "fp16"),
        Quantisation("q3", 3.91, 3.91, 3.91, "fp16"),
    )
}
_ALIASES = {"awq": "w4a16", "gptq": "w4a16", "q8_0": "q8", "q4_k_m": "q4", "q3_k_m": "q3"}

KV_BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "fp8": 1}
"""Bytes of one number in the KV cache."""


def find_quantisation(name: str) -> Quantisation:
    """By name or alias (`awq`, `gptq`). Raises InputError if unknown."""
    found = QUANTISATIONS.get(_ALIASES.get(name, name))
    if found is None:
        known = [*QUANTISATIONS, *_ALIASES]
        raise InputError(f"quantisation: unknown {name!r}. {nearest(name, known)}")
    return found


def weights_bytes(
    model: ModelConfig, quantisation: str = "fp16", tensor_parallel: int = 1, stages: int = 1
) -> int:
    """Weights on the fullest device of a tensor-parallel group, or of a layer split."""
    bits, count = find_quantisation(quantisation), model.parameters(tensor_parallel)
    layers = bits.linear * count.linear + bits.experts * count.experts
    tables = [bits.tables * count.embedding, bits.tables * count.head]
    # Of several stages the first has the embedding, the last the head (the table, if it is one).
    held = sum(tables) if stages == 1 else max(tables)
    share = _layers_of_fullest(model, stages) / model.layers
    return round((layers * share + held + 16 * count.tower) / 8)


def _layers_of_fullest(model: ModelConfig, stages: int) -> int:
    return -(-model.layers // stages)


# --------------------------------------------------------------------------------------
# Keys and values


def kv_bytes_per_token(model: ModelConfig, dtype: str = "fp16", tensor_parallel: int = 1) -> int:
    """What a token adds to the cache of one device while no window is full."""
    return _bytes_of(dtype) * sum(m.layers * m.kv_elements(tensor_parallel) for m in model.mixers)


def sequence_kv_bytes(
    model: ModelConfig, tokens: int, dtype: str = "fp16", tensor_parallel: int = 1
) -> int:
    """What a sequence of `tokens` keeps on one device: windows bounded, recurrent states in it."""
    elements = 0
    for mixer in model.mixers:
        kept = tokens if mixer.window_tokens is None else min(tokens, mixer.window_tokens)
        state = mixer.state_elements // tensor_parallel
        elements += mixer.layers * (kept * mixer.kv_elements(tensor_parallel) + state)
    return _bytes_of(dtype) * elements


def _bytes_of(dtype: str) -> int:
    if dtype not in KV_BYTES:
        raise InputError(f"kv_dtype: unknown {dtype!r}. {nearest(dtype, KV_BYTES)}")
    return KV_BYTES[dtype]


# --------------------------------------------------------------------------------------
# One device


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """What a server is started with, as far as memory depends on it."""

    utilisation: float = 0.9
    block_tokens: int = 16
    kv_dtype: str = "fp16"
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    non_torch_bytes: int = round(0.35 * GIB)
    """Context, communicator and fragments, as a public vLLM log has them."""

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise InputError(f"utilisation: must be above 0 and at most 1, not {self.utilisation}")


DEFAULTS = MemorySettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The budget of one device; `kv_bytes` may be negative."""

    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    bytes_per_block: int

    @property
    def kv_bytes(self) -> int:
        """What is left for keys and values."""
        taken = self.weights_bytes + self.activation_bytes + self.non_torch_bytes
        return self.budget_bytes - taken

    @property
    def blocks(self) -> int:
        """The pool as vLLM counts it; one block is never handed out."""
        return max(0, self.kv_bytes // self.bytes_per_block)


def activation_bytes(
    model: ModelConfig, tensor_parallel: int = 1, settings: MemorySettings = DEFAULTS
) -> int:
    """Peak of a step of `max_num_batched_tokens`, logits of `max_num_seqs` included; at least
    0.3 GiB. An estimate: four fp16 rows of the hidden size, three of the feed-forward width."""
    columns = 4 * model.hidden + 3 * model.widest_step / tensor_parallel
    logits = settings.max_num_seqs * model.vocabulary * 4 * 2
    return round(max(0.3 * GIB, settings.max_num_batched_tokens * columns * 2 + logits))


def memory_use(
    model: ModelConfig,
    device: Device,
    quantisation: str = "fp16",
    tensor_parallel: int = 1,
    stages: int = 1,
    settings: MemorySettings = DEFAULTS,
) -> MemoryUse:
    """The budget of the fullest device, whether or not the model fits.

    Raises InputError for a group that the heads do not divide into, more stages than layers, or
    a format that the device does not compute in.
    """
    _check_split(model, tensor_parallel, stages)
    _check_format(device, find_quantisation(quantisation), settings)
    per_token = kv_bytes_per_token(model, settings.kv_dtype, tensor_parallel)
    share = _layers_of_fullest(model, stages) / model.layers
    return MemoryUse(
        budget_bytes=int(device.memory_bytes * settings.utilisation),
        weights_bytes=weights_bytes(model, quantisation, tensor_parallel, stages),
        activation_bytes=activation_bytes(model, tensor_parallel, settings),
        non_torch_bytes=settings.non_torch_bytes,
        bytes_per_block=round(per_token * share * settings.block_tokens),
    )


def _check_split(model: ModelConfig, tensor_parallel: int, stages: int) -> None:
    if not model.divides(tensor_parallel):
        sizes = ", ".join(str(size) for size in tensor_parallel_sizes(model))
        raise InputError(
            f"tensor_parallel: {tensor_parallel} does not divide the heads and widths of "
            f"{model.name}; use one of {sizes}"
        )
    if not 1 <= stages <= model.layers:
        raise InputError(f"stages: {stages} for {model.layers} layers of {model.name}; use fewer")


def _check_format(device: Device, quantisation: Quantisation, settings: MemorySettings) -> None:
    known = device.dtypes.value
    if quantisation.computes_in not in known:
        usable = [q.name for q in QUANTISATIONS.values() if q.computes_in in known]
        raise InputError(
            f"quantisation: {device.name} does not compute in {quantisation.computes_in}; "
            f"use one of {', '.join(usable)}"
        )
    if settings.kv_dtype not in known:
        raise InputError(f"kv_dtype: {device.name} has no {settings.kv_dtype}; use fp16")


def tensor_parallel_sizes(model: ModelConfig, most: int = MAX_DEVICES) -> Iterator[int]:
    """Group sizes that heads and widths divide into, smallest first."""
    return (size for size in range(1, most + 1) if model.divides(size))
