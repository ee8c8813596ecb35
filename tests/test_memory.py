"""Memory: weights, keys and values, blocks, and the smallest group that holds a model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viisim.architecture import ModelConfig
from viisim.errors import InputError
from viisim.hardware import Device, device_names, load_device
from viisim.memory import (
    DEFAULTS,
    GIB,
    activation_bytes,
    kv_bytes_per_token,
    memory_use,
    sequence_kv_bytes,
    tensor_parallel_sizes,
    weights_bytes,
)
from viisim.models import load_model, model_names
from viisim.placement import (
    Split,
    blocks_in_log,
    kv_blocks,
    longest_context_tokens,
    placement,
)

CARD = load_device("radeon_vii")

# Bytes a token, GiB of weights in fp16 and W4, GiB of activations, blocks on a 16,368 MiB card.
TABLE = {
    "llama-2-7b": (524_288, 12.55, 3.69, 0.30, 151, 1_285),
    "mistral-7b-v0.1": (131_072, 13.49, 3.94, 0.30, 126, 5_014),
    "llama-3.1-8b": (131_072, 14.96, 5.41, 0.47, None, 4_175),
    "llama-2-13b": (819_200, 24.24, 6.89, 0.30, None, 560),
    "qwen2.5-7b": (57_344, 14.19, 5.26, 0.56, None, 9_614),
    "qwen2.5-14b": (196_608, 27.51, 9.44, 0.53, None, 1_389),
    "qwen3-8b": (147_456, 15.26, 5.76, 0.49, None, 3_544),
    "qwen3-14b": (163_840, 27.51, 9.43, 0.57, None, 1_652),
}
models = st.sampled_from(model_names()).map(load_model)
cards = st.sampled_from(device_names()).map(load_device)
formats = st.sampled_from(["fp16", "w4a16", "q8", "q4", "q3"])


@pytest.mark.parametrize("name", TABLE)
def test_bytes_a_token(name: str) -> None:
    assert kv_bytes_per_token(load_model(name)) == TABLE[name][0]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(("quantisation", "column"), [("fp16", 1), ("w4a16", 2)])
def test_weights_of_the_table(name: str, quantisation: str, column: int) -> None:
    gib = weights_bytes(load_model(name), quantisation) / GIB
    # Qwen3-14B in W4 has 9.43502 GiB, on the edge between two roundings.
    assert gib == pytest.approx(TABLE[name][column], abs=0.0051)


@pytest.mark.parametrize("name", TABLE)
def test_activations_of_the_table(name: str) -> None:
    assert round(activation_bytes(load_model(name)) / GIB, 2) == TABLE[name][3]


@pytest.mark.parametrize("name", TABLE)
def test_blocks_in_four_bits_to_the_block(name: str) -> None:
    assert kv_blocks(load_model(name), CARD, "w4a16") == TABLE[name][5]


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[4]])
def test_blocks_in_fp16_to_the_block(name: str) -> None:
    assert kv_blocks(load_model(name), CARD, "fp16") == TABLE[name][4]


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not row[4]])
def test_fp16_does_not_fit(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} as fp16 does not fit 1 x radeon_vii"):
        kv_blocks(load_model(name), CARD, "fp16")


def test_a_public_log_of_an_rtx_3090() -> None:
    llama = load_model("llama-3.1-8b")
    available_gib = 23.58 * 0.9 - 17.06 - 0.35
    assert blocks_in_log(available_gib, kv_bytes_per_token(llama)) == 1950  # 1,952 were logged


def test_awq_and_gptq_are_w4a16() -> None:
    llama = load_model("llama-2-7b")
    assert {weights_bytes(llama, name) for name in ("awq", "gptq", "w4a16")} == {
        weights_bytes(llama, "w4a16")
    }


def test_gpt_oss_weighs_what_its_checkpoint_does() -> None:
    gib = weights_bytes(load_model("gpt-oss-120b"), "mxfp4") / GIB
    assert gib == pytest.approx(60.8, rel=0.005)


# --------------------------------------------------------------------------------------
# Keys and values


def test_fp8_keys_and_values_take_half() -> None:
    llama = load_model("llama-2-7b")
    assert kv_bytes_per_token(llama, "fp8") * 2 == kv_bytes_per_token(llama, "fp16")


def test_gemma_4_keeps_210_kib_a_token() -> None:
    assert kv_bytes_per_token(load_model("gemma-4-26b")) == 210 * 1024


def test_only_windowed_layers_stop_growing() -> None:
    gemma = load_model("gemma-3-27b")  # 52 layers of 1,024 tokens, 10 of all; 8 KiB a layer
    beyond = sequence_kv_bytes(gemma, 3024) - sequence_kv_bytes(gemma, 1024)
    assert beyond == 2000 * 10 * 2 * 16 * 128 * 2
    assert sequence_kv_bytes(gemma, 1024) == 1024 * kv_bytes_per_token(gemma)


def test_a_recurrent_state_is_there_from_the_first_token() -> None:
    qwen = load_model("qwen3.6-27b")
    state = 48 * (48 * 128 * 128 + 3 * (2 * 16 * 128 + 48 * 128)) * 2
    assert sequence_kv_bytes(qwen, 0) == state
    assert kv_bytes_per_token(qwen) == 16 * 2 * 4 * 256 * 2


def test_latent_attention_is_not_divided() -> None:
    model = load_model("deepseek-v2-lite")
    assert kv_bytes_per_token(model, tensor_parallel=4) == 27 * 576 * 2


# --------------------------------------------------------------------------------------
# What fits


def test_the_longest_context_leaves_one_block() -> None:
    llama = load_model("llama-2-7b")
    use = memory_use(llama, CARD)
    assert longest_context_tokens(llama, use) == (151 - 1) * 16


def test_a_window_in_every_layer_lets_context_grow_to_the_models_positions() -> None:
    mistral = load_model("mistral-7b-v0.1")
    use = memory_use(mistral, CARD, "w4a16")
    assert longest_context_tokens(mistral, use) == 32768


@pytest.mark.parametrize(
    ("name", "quantisation", "split", "group"),
    [
        ("llama-2-7b", "fp16", "tensor", (1, 1)),
        ("llama-2-13b", "fp16", "tensor", (2, 1)),
        ("qwen2.5-14b", "fp16", "tensor", (4, 1)),  # two cards hold it, but 16 tokens of context
        ("qwen2.5-7b", "fp16", "tensor", (2, 1)),
        ("llama-2-70b", "w4a16", "tensor", (4, 1)),
        ("llama-2-70b", "w4a16", "layers", (1, 3)),
        ("gemma-4-26b", "q3", "tensor", (1, 1)),  # as VIIWork runs it
        ("qwen3.6-27b", "q4", "tensor", (2, 1)),  # as VIIWork runs it
        ("gpt-oss-120b", "mxfp4", "layers", (1, 6)),
    ],
)
def test_the_smallest_group(
    name: str, quantisation: str, split: Split, group: tuple[int, int]
) -> None:
    found = placement(load_model(name), CARD, quantisation, split)
    assert (found.tensor_parallel, found.stages) == group
    assert found.devices == group[0] * group[1]


def test_a_longer_context_takes_more_cards() -> None:
    llama = load_model("llama-3.1-8b")
    assert placement(llama, CARD, "w4a16", context_tokens=32768).devices == 1
    assert placement(llama, CARD, "w4a16", context_tokens=131072).devices == 2


def test_a_model_that_does_not_fit_is_told_what_would() -> None:
    with pytest.raises(InputError) as caught:
        kv_blocks(load_model("llama-2-70b"), CARD)
    assert str(caught.value) == (
        "llama-2-70b as fp16 does not fit 1 x radeon_vii: 128.48 GiB of weights in a budget of "
        "14.39 GiB a card; it fits with tensor_parallel 16 or as w4a16 with tensor_parallel 4"
    )


def test_what_would_fit_does_fit() -> None:
    assert kv_blocks(load_model("llama-2-70b"), CARD, "fp16", tensor_parallel=16) > 1
    assert kv_blocks(load_model("llama-2-70b"), CARD, "w4a16", tensor_parallel=4) > 1


def test_heads_must_divide() -> None:
    with pytest.raises(InputError, match=r"3 does not divide .* use one of 1, 2, 4, 8, 16"):
        memory_use(load_model("llama-2-70b"), CARD, "w4a16", tensor_parallel=3)


def test_a_group_of_no_size_is_refused() -> None:
    with pytest.raises(InputError, match="tensor_parallel: 0 does not divide"):
        memory_use(load_model("llama-2-70b"), CARD, "w4a16", tensor_parallel=0)


def test_gfx906_does_not_compute_in_fp8() -> None:
    with pytest.raises(InputError, match="radeon_vii does not compute in fp8; use one of fp16"):
        kv_blocks(load_model("llama-2-7b"), CARD, "fp8")


def test_gfx906_has_no_fp8_cache() -> None:
    with pytest.raises(InputError, match="kv_dtype: radeon_vii has no fp8; use fp16"):
        memory_use(load_model("llama-2-7b"), CARD, settings=replace(DEFAULTS, kv_dtype="fp8"))


def test_a_utilisation_above_one_is_refused() -> None:
    with pytest.raises(InputError, match="utilisation: must be above 0 and at most 1, not 90"):
        replace(DEFAULTS, utilisation=90)


def test_an_unknown_quantisation_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'awq'"):
        weights_bytes(load_model("llama-2-7b"), "aqw")


@given(models, cards, formats)
def test_more_devices_never_leave_fewer_blocks(
    model: ModelConfig, card: Device, quantisation: str
) -> None:
    sizes = list(tensor_parallel_sizes(model))
    blocks = [memory_use(model, card, quantisation, size).blocks for size in sizes]
    assert blocks == sorted(blocks)


@given(models, cards, formats, st.integers(1, 26))
def test_more_stages_never_hold_more_each(
    model: ModelConfig, card: Device, quantisation: str, stages: int
) -> None:
    use = [memory_use(model, card, quantisation, 1, count) for count in (stages, stages + 1)]
    assert use[0].weights_bytes >= use[1].weights_bytes
    assert use[0].blocks <= use[1].blocks


@given(models, st.integers(1, 16))
def test_a_group_holds_the_model_at_least_once(model: ModelConfig, size: int) -> None:
    if model.divides(size):
        assert size * model.parameters(size).total >= model.parameters().total


@given(models, st.integers(0, 100_000), st.integers(0, 100_000))
def test_a_longer_sequence_never_keeps_less(model: ModelConfig, one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert sequence_kv_bytes(model, short) <= sequence_kv_bytes(model, long)
