"""Prompt tokens counted by the model's own tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from runtime.tokens import TokenEstimate, Tokenizer, read_prompt
from viisim.errors import InputError


def words(folder: Path) -> Path:
    """A tokenizer of three words; the others are one token each too."""
    vocabulary = {"the": 0, "same": 1, "prompt": 2, "?": 3}
    model = Words(WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = Whitespace()
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_text_has_as_many_tokens_as_the_tokenizer_says(tmp_path: Path):
    prompt = read_prompt("/v1/completions", {"prompt": "the same prompt, the same tokens"})
    assert Tokenizer(words(tmp_path)).tokens(prompt) == 7


def test_token_ids_are_counted_as_they_are(tmp_path: Path):
    prompt = read_prompt("/v1/completions", {"prompt": [5, 6, 7]})
    assert Tokenizer(words(tmp_path)).tokens(prompt) == 3


@pytest.mark.parametrize("content", [None, "no JSON"], ids=["missing", "not one"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"mine\.json: .*; give a tokenizer\.json"):
        Tokenizer(path)


def test_a_prefix_block_holds_its_share_of_the_tokens():
    prompt = read_prompt("/v1/completions", {"prompt": "x" * 1024})
    assert prompt.block_tokens(TokenEstimate().tokens(prompt)) == 64
