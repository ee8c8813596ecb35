"""What vLLM's server is told: flags and environment, each with its source.

Flags are those of vLLM's own `serve`. What gfx906 cards (Radeon VII, MI50, MI60) need besides is
as the forks and images for them have it (FACTS section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from runtime.cluster import Planned
from viisim.config import ReplicaConfig
from viisim.hardware import device_names, load_device
from viisim.memory import DEFAULTS
from viisim.worker_config import ENGINE_FLAGS, WRITTEN_FLAGS


class Given(NamedTuple):
    """A flag or a variable, and its source."""

    name: str
    value: str | None
    why: str


# --------------------------------------------------------------------------------------
# The cards


def architecture_of(entry: ReplicaConfig, cards: Sequence[int]) -> str | None:
    """The compiler's name for the cards; None without any, or for a device nobody catalogued."""
    device = entry.device or entry.load_profile().device
    return load_device(device).architecture if cards and device in device_names() else None


def is_nvidia(architecture: str | None) -> bool:
    """Whether the compiler's name is of that make."""
    return architecture is not None and architecture.startswith("sm_")


def card_variables(replica: Planned, cards: Sequence[int]) -> Iterator[Given]:
    """The environment that a server on these cards needs."""
    if not cards:
        return
    entry = replica.entry
    architecture = architecture_of(entry, cards)
    chosen = "worker.cards" if entry.worker.cards else "worker.cards: not given, the lowest free"
    vendor = "CUDA" if is_nvidia(architecture) else "HIP"
    yield Given(f"{vendor}_VISIBLE_DEVICES", ",".join(map(str, cards)), chosen)
    if architecture == "gfx906":
        yield Given("HSA_OVERRIDE_GFX_VERSION", "9.0.6", "gfx906: as VIIWork starts its servers")
        yield Given("HIP_FORCE_DEV_KERNARG", "1", "gfx906: as in mixa3607/vllm-gfx906 images")
        yield Given(
            "FLASH_ATTENTION_TRITON_AMD_ENABLE",
            "TRUE",
            "gfx906: flash attention has a Triton backend only (vllm-gfx906-mobydick, README)",
        )
        if len(cards) > 1:
            why = "gfx906 groups: a collective that hangs is an error, not a wait for ever"
            yield Given("TORCH_NCCL_BLOCKING_WAIT", "1", why)


# --------------------------------------------------------------------------------------
# vLLM's flags


def serve_flags(replica: Planned, cards: Sequence[int]) -> list[Given]:
    """What follows `vllm serve WEIGHTS`, but for the file's own `args`.

    Raises InputError for a profile that cannot be read any more.
    """
    port = replica.url.rpartition(":")[2]
    return [
        Given("--host", "127.0.0.1", "clients go through the proxy"),
        Given("--port", port, "chosen by viisim deploy"),
        Given("--served-model-name", replica.entry.model, "model"),
        *_group_flags(replica.entry, cards),
        *_engine_flags(replica.entry),
        *_memory_flags(cards),
    ]


def _group_flags(entry: ReplicaConfig, cards: Sequence[int]) -> Iterator[Given]:
    """How the cards share the model, and what their chip needs."""
    is_gfx906 = architecture_of(entry, cards) == "gfx906"
    if is_gfx906:
        why = "gfx906 has no bfloat16 (vllm-gfx906-mobydick, README)"
        yield Given("--dtype", "float16", why)
    if entry.tensor_parallel > 1:
        yield Given("--tensor-parallel-size", str(entry.tensor_parallel), "tensor_parallel")
    if entry.stages > 1:
        yield Given("--pipeline-parallel-size", str(entry.stages), "stages")
    if is_gfx906 and entry.tensor_parallel > 1:
        why = "gfx906: transfers between cards are fragile, the forks have it off"
        yield Given("--disable-custom-all-reduce", None, why)


def _engine_flags(entry: ReplicaConfig) -> Iterator[Given]:
    """The engine as it is simulated: from the file, else from the profile."""
    written = entry.engine.model_dump(exclude_none=True)
    settings = entry.engine.resolve(entry.load_profile()).model_dump()
    for key, flag in ENGINE_FLAGS.items():
        yield _engine_flag(flag, settings[key], _source(entry, key))
    for key, flag in WRITTEN_FLAGS.items():
        if key in written:
            yield _engine_flag(flag, written[key], f"engine.{key}")


def _source(entry: ReplicaConfig, key: str) -> str:
    if getattr(entry.engine, key) is not None:
        return f"engine.{key}"
    if not entry.is_catalogued:
        return f"profile {entry.profile_name}"
    return (
        "the memory model: the longest that fits"
        if key == "max_model_len"
        else "vLLM's usual value, as simulated"
    )


def _engine_flag(flag: str, value: object, why: str) -> Given:
    if isinstance(value, bool):
        return Given(flag if value else flag.replace("--", "--no-", 1), None, why)
    return Given(flag, str(value), why)


def _memory_flags(cards: Sequence[int]) -> Iterator[Given]:
    if cards:
        why = "what the memory model counts with; vLLM's default changed between versions"
        yield Given("--gpu-memory-utilization", f"{DEFAULTS.utilisation:g}", why)
