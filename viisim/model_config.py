"""A model's shape from its `config.json`.

Only what memory and time depend on is read, under the names that `transformers` uses. A figure
that is missing or impossible is an InputError naming file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from viisim.architecture import (
    Attention,
    LatentAttention,
    LinearAttention,
    Mixer,
    ModelConfig,
)
from viisim.config_figures import Figures

_BIASED = ("qwen2",)
_QK_NORMED = ("qwen3", "gemma3", "gemma4")
_GATED = ("qwen3_5", "qwen3_next")


def model_from(config: Mapping[str, Any], source: str, name: str) -> ModelConfig:
    """The model that a `config.json`'s content describes; `source` is named in errors.

    Raises InputError for a figure that is missing, of another type, or contradictory.
    """
    figures = Figures(config, source)
    layers = figures.whole("num_hidden_layers")
    experts = figures.whole(
        "num_experts", "num_local_experts", "n_routed_experts", default=0, least=0
    )
    intermediate = figures.whole("intermediate_size", default=0 if experts else None, least=0)
    width = figures.whole("moe_intermediate_size", default=intermediate) if experts else 0
    dense_layers, expert_layers = _feed_forward_layers(figures, layers, experts)
    return ModelConfig(
        name=name,
        hidden=figures.whole("hidden_size"),
        intermediate=intermediate,
        vocabulary=figures.whole("vocab_size"),
        max_positions=figures.whole("max_position_embeddings", default=4096),
        mixers=_mixers(figures, layers),
        dense_layers=dense_layers,
        expert_layers=expert_layers,
        experts=experts,
        experts_per_token=_experts_per_token(figures, experts),
        expert_intermediate=width,
        shared_intermediate=_shared_width(figures, width) if experts else 0,
        tied_embeddings=figures.flag("tie_word_embeddings"),
        tower_parameters=_tower(config.get("vision_config"), source),
        quantisation=_stored_as(config),
    )


def _feed_forward_layers(figures: Figures, layers: int, experts: int) -> tuple[int, int]:
    """How many layers have a dense part, and how many have experts."""
    if not experts:
        return layers, 0
    if figures.flag("enable_moe_block"):  # Gemma 4: both, side by side
        return layers, layers
    dense = figures.whole("first_k_dense_replace", default=0, least=0)
    if dense > layers:
        raise figures.wrong("first_k_dense_replace", f"{dense} of {layers} layers; correct it")
    return dense, layers - dense


def _experts_per_token(figures: Figures, experts: int) -> int:
    if not experts:
        return 0
    chosen = figures.whole("num_experts_per_tok", "experts_per_token", "top_k_experts")
    if chosen > experts:
        raise figures.wrong("num_experts_per_tok", f"{chosen} of {experts} experts; correct it")
    return chosen


def _shared_width(figures: Figures, width: int) -> int:
    shared = figures.whole("n_shared_experts", default=0, least=0) * width
    return figures.whole("shared_expert_intermediate_size", default=shared, least=0)


def _mixers(figures: Figures, layers: int) -> tuple[Mixer, ...]:
    heads = figures.whole("num_attention_heads")
    if rank := figures.optional("kv_lora_rank"):
        latent = LatentAttention(
            layers=layers,
            heads=heads,
            kv_rank=rank,
            query_rank=figures.optional("q_lora_rank"),
            rope_dim=figures.whole("qk_rope_head_dim"),
            nope_dim=figures.whole("qk_nope_head_dim"),
            value_dim=figures.whole("v_head_dim"),
        )
        return (latent,)
    full, windowed, linear = _kinds(figures, layers)
    mixers: list[Mixer] = []
    if full:
        mixers.append(_attention(figures, full, heads, whole_context=True))
    if windowed:
        mixers.append(_attention(figures, windowed, heads, whole_context=False))
    if linear:
        mixers.append(_linear_attention(figures, linear))
    return tuple(mixers)


def _kinds(figures: Figures, layers: int) -> tuple[int, int, int]:
    """How many layers attend to everything, to a window, and through a recurrent state."""
    if types := figures.listed("layer_types"):
        if len(types) != layers:
            raise figures.wrong(
                "layer_types", f"has {len(types)} entries for {layers} layers; correct it"
            )
        windowed, linear = types.count("sliding_attention"), types.count("linear_attention")
        return layers - windowed - linear, windowed, linear
    if interval := figures.optional("full_attention_interval"):
        return layers // interval, 0, layers - layers // interval
    if not (figures.optional("sliding_window") and figures.flag("use_sliding_window", True)):
        return layers, 0, 0
    if pattern := figures.optional("sliding_window_pattern"):
        return layers // pattern, layers - layers // pattern, 0
    return 0, layers, 0


def _attention(figures: Figures, layers: int, heads: int, whole_context: bool) -> Attention:
    kv_heads = figures.whole("num_key_value_heads", default=heads)
    head_dim = figures.optional("head_dim") or _usual_head_dim(figures, heads)
    shared = False
    if whole_context:  # Gemma 4 gives these layers a shape of their own
        kv_heads = figures.whole("num_global_key_value_heads", default=kv_heads)
        head_dim = figures.whole("global_head_dim", default=head_dim)
        shared = figures.flag("attention_k_eq_v")
    if heads % kv_heads:
        raise figures.wrong(
            "num_key_value_heads", f"{kv_heads} do not divide {heads} heads; correct it"
        )
    return Attention(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window_tokens=None if whole_context else figures.whole("sliding_window"),
        stores_values=not shared,
        gated=figures.is_of(_GATED),
        bias=figures.flag("attention_bias", figures.is_of(_BIASED)),
        qk_norm=figures.is_of(_QK_NORMED),
    )


def _usual_head_dim(figures: Figures, heads: int) -> int:
    hidden = figures.whole("hidden_size")
    if hidden % heads:
        raise figures.wrong(
            "head_dim",
            f"required, but missing; hidden_size {hidden} is no multiple of {heads} heads",
        )
    return hidden // heads


def _linear_attention(figures: Figures, layers: int) -> LinearAttention:
    return LinearAttention(
        layers=layers,
        key_heads=figures.whole("linear_num_key_heads"),
        value_heads=figures.whole("linear_num_value_heads"),
        key_dim=figures.whole("linear_key_head_dim"),
        value_dim=figures.whole("linear_value_head_dim"),
        kernel=figures.whole("linear_conv_kernel_dim", default=4),
    )


def _tower(vision: Any, source: str) -> int:
    """Weights of a vision tower: its layers, and the mergers that lead into the text model.

    Position and patch embeddings, below 1 % of it, are left out.
    """
    if not isinstance(vision, Mapping):
        return 0
    figures = Figures(vision, f"{source}: vision_config")
    hidden, columns = figures.whole("hidden_size"), figures.whole("intermediate_size")
    layers = figures.whole("depth", "num_hidden_layers")
    count = layers * (4 * hidden**2 + 2 * hidden * columns)
    if out := figures.optional("out_hidden_size"):
        merged = hidden * figures.whole("spatial_merge_size", default=1) ** 2
        mergers = 1 + len(figures.listed("deepstack_visual_indexes") or [])
        count += mergers * merged * (merged + out)
    return count


def _stored_as(config: Mapping[str, Any]) -> str | None:
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return None
    method = str(stored.get("quant_method", ""))
    return method if method in ("awq", "gptq", "fp8", "mxfp4") else None
