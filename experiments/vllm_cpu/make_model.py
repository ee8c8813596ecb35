"""Llama models with random weights, for real vLLM workers on a CPU.

    python make_model.py FOLDER [NAME ...]

writes the configuration and tokenizer of each into FOLDER/NAME; vLLM makes the weights up itself
(`--load-format dummy`). A printable ASCII character is one token and one token such a character,
so that lengths of texts are lengths in tokens. Needs `tokenizers`, which vLLM brings along.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
MAX_TOKENS = 4096

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Size(NamedTuple):
    """What a model's weight and speed depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "tiny": Size(256, 1024, 4, 4, 2),  # 4 million parameters
    "s": Size(512, 2048, 8, 8, 2),  # 30
    "m3": Size(1024, 4096, 3, 16, 4),  # 46
    "m": Size(1024, 4096, 8, 16, 4),  # 122
    "l": Size(1280, 5120, 16, 20, 4),  # 378
}


def write_model(folder: Path, size: Size) -> None:
    """Write everything that vLLM reads of a model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    contents = {
        "generation_config": special,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "add_bos_token": False,
            "model_max_length": MAX_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.hidden // size.heads,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": MAX_TOKENS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            **special,
        },
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main(folder: str, *names: str) -> None:
    """Write these models, all if none is named."""
    for name in names or SIZES:
        write_model(Path(folder) / name, SIZES[name])


if __name__ == "__main__":
    main(*sys.argv[1:])
