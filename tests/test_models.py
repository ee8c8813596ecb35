"""Models: the catalogue's shapes against published sizes, and the reading of config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from viisim.architecture import Attention, LatentAttention
from viisim.errors import InputError
from viisim.models import load_model, model_entry, model_names, split_model_name

# Numbers of weights that the checkpoints' own indices state, less vision towers.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-vl-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": 15_706_484_224,
}
# Rounded, as their makers say them: gemma-3 in GB without the tower, gpt-oss less its biases.
ROUNDED = {
    "gemma-3-27b": 27.0e9,
    "gemma-4-26b": 25.2e9,
    "qwen3.6-27b": 27e9,
    "gpt-oss-120b": 116.8e9,
}

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 128,
}


def config_file(tmp_path: Path, content: Any) -> str:
    """A config.json with this content; text is written as it is."""
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def mistake(tmp_path: Path, content: Any) -> str:
    """What is said of such a file, less its name."""
    path = config_file(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(caught.value).startswith(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_are_counted_to_the_last(name: str) -> None:
    count = load_model(name).parameters()
    assert count.total - count.tower == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_the_weights_add_up_to_the_stated_size(name: str) -> None:
    count = load_model(name).parameters()
    assert count.total - count.tower == pytest.approx(ROUNDED[name], rel=0.005)


@pytest.mark.parametrize("name", model_names())
def test_a_model_of_the_catalogue_has_a_source(name: str) -> None:
    assert model_entry(name).source


def test_every_model_of_the_catalogue_is_compared_with_a_stated_size() -> None:
    same_text_model = {"qwen3-vl-8b", "qwen3-vl-32b"}  # as qwen3-8b and qwen3-32b
    assert {*PUBLISHED, *ROUNDED, *same_text_model} == set(model_names())


def test_an_unknown_model_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'qwen3-8b'"):
        load_model("qwen3-8")


@pytest.mark.parametrize(
    ("served", "parts"),
    [
        ("qwen3-vl-8b-awq", ("qwen3-vl-8b", "awq")),
        ("mistral-7b-v0.1", ("mistral-7b-v0.1", None)),
        ("awq", ("awq", None)),
    ],
)
def test_a_served_name_may_end_in_its_quantisation(
    served: str, parts: tuple[str, str | None]
) -> None:
    assert split_model_name(served) == parts


def test_a_config_file_is_counted_by_hand(tmp_path: Path) -> None:
    count = load_model(config_file(tmp_path, TINY)).parameters()
    attention, feed_forward, norms = 8 * 8 * 2 + 8 * 4 * 2, 3 * 8 * 16, 2 * 8
    assert count.linear == 2 * (attention + feed_forward + norms) + 8
    assert count.embedding == count.head == 80


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    path = config_file(tmp_path, {**TINY, "tie_word_embeddings": True})
    assert load_model(path).parameters().head == 0


def test_without_kv_heads_every_head_has_its_own(tmp_path: Path) -> None:
    content = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    (attention,) = load_model(config_file(tmp_path, content)).mixers
    assert isinstance(attention, Attention)
    assert attention.kv_heads == 4


def test_the_checkpoint_says_how_it_is_quantised(tmp_path: Path) -> None:
    path = config_file(tmp_path, {**TINY, "quantization_config": {"quant_method": "awq"}})
    assert load_model(path).quantisation == "awq"


def test_listed_layer_types_are_followed(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    path = config_file(tmp_path, {**TINY, "layer_types": types, "sliding_window": 64})
    assert [(m.layers, m.window_tokens) for m in load_model(path).mixers] == [(1, None), (1, 64)]


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    path = config_file(tmp_path, {**TINY, "sliding_window": 64, "use_sliding_window": False})
    assert [m.window_tokens for m in load_model(path).mixers] == [None]


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    (mixer,) = load_model("deepseek-v2-lite").mixers
    assert isinstance(mixer, LatentAttention)
    assert mixer.kv_elements() == mixer.kv_elements(tensor_parallel=4) == 512 + 64


def test_a_kv_head_is_copied_when_there_are_more_devices() -> None:
    (attention,) = load_model("qwen2.5-7b").mixers
    assert [attention.kv_elements(t) for t in (1, 2, 4, 28)] == [1024, 512, 256, 256]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {key: value for key, value in TINY.items() if key != "num_attention_heads"},
            "num_attention_heads: required, but missing; give the config.json of a decoder model",
        ),
        (
            {**TINY, "hidden_size": "8"},
            "hidden_size: must be a whole number of at least 1, not '8'",
        ),
        (
            {**TINY, "num_key_value_heads": 3},
            "num_key_value_heads: 3 do not divide 4 heads; correct it",
        ),
        (
            {**TINY, "num_local_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok: 5 of 4 experts; correct it",
        ),
        (
            {**TINY, "num_attention_heads": 16},
            "head_dim: required, but missing; hidden_size 8 is no multiple of 16 heads",
        ),
        (
            {**TINY, "layer_types": ["full_attention"]},
            "layer_types: has 1 entries for 2 layers; correct it",
        ),
        (
            {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 3},
            "first_k_dense_replace: 3 of 2 layers; correct it",
        ),
        ([1], "not a JSON object; give a model's config.json"),
        (
            '{"num_hidden_layers": 2,',
            "line 1: not JSON (Expecting property name enclosed in double quotes); "
            "download the file again",
        ),
    ],
)
def test_a_broken_config_is_one_clear_line(tmp_path: Path, content: Any, sentence: str) -> None:
    assert mistake(tmp_path, content) == sentence


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        load_model(str(tmp_path / "config.json"))
