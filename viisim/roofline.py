"""Step times for a device and a model that nobody measured together.

A decode step reads the weights it needs once and computes for every sequence, one after the
other, as measured cards do at small batches; prefill is arithmetic; attention has an efficiency
of its own. All three efficiencies stand in the device's entry of the catalogue, with sources. The
result is a profile like any other, labelled "uncalibrated": nothing in it was fitted to this
model, its calibrated range is empty, and so every step of a run counts as extrapolation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from viisim.architecture import ModelConfig
from viisim.errors import InputError
from viisim.hardware import Device, load_device
from viisim.interconnect import Communication, Interconnect, interconnect_of
from viisim.memory import (
    DEFAULTS,
    MemorySettings,
    find_quantisation,
    sequence_kv_bytes,
    weights_bytes,
)
from viisim.models import load_model, split_model_name
from viisim.placement import kv_blocks
from viisim.profile import (
    CalibratedRange,
    DecodeTime,
    PrefillTime,
    Profile,
    ProfileEngine,
    StepTime,
)

UNCALIBRATED = "uncalibrated"
"""First word of such a profile's source."""

TYPICAL_CONTEXT_TOKENS = 4096
"""Context at which layers with a window are averaged with those without."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Step times of a group of devices that share a model, from first principles."""

    device: Device
    model: ModelConfig
    quantisation: str = "fp16"
    tensor_parallel: int = 1
    kv_dtype: str = "fp16"
    stages: int = 1
    """Of a layer split. They work one after the other, as long as one device with all layers."""
    interconnect: Interconnect | None = None
    """None: as the catalogue has it for the device."""

    def decode_base_s(self, sequences: int) -> float:
        """A decode step of `sequences` sequences, less what grows with their context."""
        streaming = self.device.bandwidth_bytes_per_s * self.device.weights_efficiency.value
        return (
            self.read_bytes(sequences) / streaming
            + sequences * self.token_s
            + self.communication.step_s
            + sequences * self.communication.token_s
        )

    @property
    def per_context_token_s(self) -> float:
        """What each token of context adds to a decode step."""
        tokens = min(TYPICAL_CONTEXT_TOKENS, self.model.max_positions)
        kept = sequence_kv_bytes(self.model, tokens, self.kv_dtype, self.tensor_parallel)
        empty = sequence_kv_bytes(self.model, 0, self.kv_dtype, self.tensor_parallel)
        reading = self.device.bandwidth_bytes_per_s * self.device.attention_efficiency.value
        return (kept - empty) / tokens / reading

    @property
    def token_s(self) -> float:
        """Matrix products of one token: two operations for each weight it passes."""
        computing = self.device.flops_per_s * self.device.compute_efficiency.value
        return 2 * self.active_weights / computing

    @property
    def prefill_token_s(self) -> float:
        """What each prompt token adds to a step, what is sent for it included."""
        return self.token_s + self.communication.token_s

    @property
    def prefill_pair_s(self) -> float:
        """What each (token, attended token) pair adds; layers with a window count in part."""
        tokens = TYPICAL_CONTEXT_TOKENS
        flops = sum(
            mixer.layers
            * mixer.pair_flops(self.tensor_parallel)
            * _seen(mixer.window_tokens, tokens)
            for mixer in self.model.mixers
        )
        computing = self.device.flops_per_s * self.device.attention_efficiency.value
        return flops / computing

    @property
    def active_weights(self) -> float:
        """Weights that one token passes on one device; tables are looked up, not multiplied."""
        count = self.model.parameters(self.tensor_parallel)
        chosen = self.model.experts_per_token / self.model.experts if self.model.experts else 0.0
        return count.linear + count.experts * chosen

    def read_bytes(self, tokens: int) -> float:
        """Weights that a step of `tokens` tokens reads on one device.

        Experts are taken as chosen at random, so more tokens meet more of them; the head is read
        whole, of the embedding a few rows only.
        """
        bits, count = (
            find_quantisation(self.quantisation),
            self.model.parameters(self.tensor_parallel),
        )
        head = count.head or count.embedding  # tied: the same table
        read = bits.linear * count.linear + bits.tables * head
        if self.model.experts:
            missed = (1 - self.model.experts_per_token / self.model.experts) ** tokens
            read += bits.experts * count.experts * (1 - missed)
        return read / 8

    @property
    def communication(self) -> Communication:
        """What the devices of the group send each other."""
        link = self.interconnect or interconnect_of(self.device)
        model = self.model
        shared = link.tensor_parallel(model.layers, model.hidden, self.tensor_parallel)
        return shared + link.layer_split(model.hidden, self.stages)


def _seen(window_tokens: int | None, tokens: int) -> float:
    """Share of the causal pairs of a prompt of `tokens` that a window leaves."""
    window = tokens if window_tokens is None else min(window_tokens, tokens)
    return (window * tokens - window * (window - 1) / 2) / (tokens * (tokens + 1) / 2)


def roofline_profile(
    device: str,
    model: str,
    quantisation: str | None = None,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    settings: MemorySettings = DEFAULTS,
    stages: int = 1,
    interconnect: Interconnect | None = None,
) -> Profile:
    """An uncalibrated profile of a catalogue device and a model (a name or a `config.json`).

    `stages` splits the layers over as many tensor-parallel groups; `interconnect` is the
    connection between the devices, None for the catalogue's.

    The quantisation is, in this order: as given, the name's ending (`qwen3-8b-awq`), the
    checkpoint's own, fp16. Raises InputError for unknown names, or a model that does not fit.
    """
    card, config, stored = load_device(device), *_model(model)
    bits = quantisation or stored or config.quantisation or "fp16"
    times = Roofline(card, config, bits, tensor_parallel, settings.kv_dtype, stages, interconnect)
    blocks = kv_blocks(config, card, bits, tensor_parallel, stages, settings)
    return Profile(
        device=device,
        model=model,
        tensor_parallel=tensor_parallel,
        engine=_engine(config, blocks, max_model_len, settings),
        step_time=_step_time(times, settings.max_num_seqs),
        range=CalibratedRange(
            decode_sequences=(0, 0), context_tokens=(0, 0), prefill_tokens=(0, 0)
        ),
        source=f"{UNCALIBRATED}: roofline of {card.title} and {config.name} as {bits}",
        notes=_notes(card, config) + _split_notes(times),
    )


def is_uncalibrated(profile: Profile) -> bool:
    """Whether the profile is a roofline's, to be labelled so wherever its results are shown."""
    return profile.source.startswith(UNCALIBRATED)


def total_weights_bytes(model: str) -> int:
    """Weights of a served model (`qwen3-8b-awq`, or a `config.json`), on however many devices.

    Raises InputError for one that the catalogue does not have.
    """
    config, stored = _model(model)
    return weights_bytes(config, stored or config.quantisation or "fp16")


def _model(name: str) -> tuple[ModelConfig, str | None]:
    if name.endswith(".json"):
        return load_model(name), None
    stem, quantisation = split_model_name(name)
    return replace(load_model(stem), name=name), quantisation


def _engine(
    model: ModelConfig, blocks: int, max_model_len: int | None, settings: MemorySettings
) -> ProfileEngine:
    room_tokens = (blocks - 1) * settings.block_tokens
    if max_model_len is not None and max_model_len > room_tokens:
        raise InputError(
            f"max_model_len: {max_model_len} tokens do not fit the KV cache, which holds "
            f"{room_tokens}; lower it, or share the model among more devices"
        )
    return ProfileEngine(
        name="vllm",
        version=f"any ({UNCALIBRATED})",
        num_kv_blocks=blocks,
        block_tokens=settings.block_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len or min(model.max_positions, room_tokens),
    )


def _step_time(times: Roofline, max_num_seqs: int) -> StepTime:
    # Straight lines between powers of two; only experts bend the curve.
    sizes = sorted({*(2**i for i in range(max_num_seqs.bit_length())), max_num_seqs})
    return StepTime(
        decode=tuple(
            DecodeTime(
                sequences=size,
                base_s=times.decode_base_s(size),
                per_context_token_s=times.per_context_token_s,
            )
            for size in sizes
        ),
        prefill=PrefillTime(
            base_s=times.decode_base_s(1),
            per_token_s=times.prefill_token_s,
            per_token_context_s=times.prefill_pair_s,
        ),
    )


def _split_notes(times: Roofline) -> str:
    if times.tensor_parallel == times.stages == 1:
        return ""
    cost = times.communication
    return (
        f" {times.tensor_parallel} devices a layer, {times.stages} stages one after the other; "
        f"what they send adds {cost.step_s * 1e3:.3g} ms a step and {cost.token_s * 1e6:.3g} us "
        "a token."
    )


def _notes(card: Device, model: ModelConfig) -> str:
    shares = (
        ("weights", card.weights_efficiency),
        ("attention", card.attention_efficiency),
        ("arithmetic", card.compute_efficiency),
    )
    listed = "; ".join(f"{name} {f.value:.2f} ({f.confidence}: {f.source})" for name, f in shares)
    experts = (
        " Experts are taken to run as well as dense layers; the gfx906 forks measured were about "
        "three times slower (Qwen3-VL-30B-A3B AWQ on two cards, 46 to 60 ms at batch 4)."
    )
    return (
        f"Not fitted to any run of this model. {card.bandwidth_bytes_per_s / 1e9:.0f} GB/s, "
        f"{card.flops_per_s / 1e12:.1f} TFLOPS; efficiencies: {listed}."
    ) + experts * (model.experts > 0)
