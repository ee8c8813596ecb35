"""Figures out of the `config.json` of a Hugging Face checkpoint, or a clear line about each that
is missing or impossible."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from viisim.errors import InputError

# What `transformers` assumes for a family whose configuration leaves a key out.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {"sliding_window_pattern": 6, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": False},
    "qwen3_5_text": {"full_attention_interval": 4},
    "qwen3_next": {"full_attention_interval": 4},
}


def read_config(path: Path) -> Mapping[str, Any]:
    """The content of a `config.json`. Raises InputError: unreadable, or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the path of a readable file") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}: not JSON ({error.msg}); download the file again"
        ) from None
    except ValueError:
        raise InputError(f"{path}: not a text file in UTF-8; download it again") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: not a JSON object; give a model's config.json")
    return content


class Figures:
    """What stands in a configuration, or in its text part; `source` is named in errors."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._source = source
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise InputError(f"{source}: text_config: must have keys below it, not {text!r}")
        self.family = str(text.get("model_type", config.get("model_type", "")))
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        self._text = {**_FAMILY_DEFAULTS.get(self.family, {}), **tied, **text}

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of `keys` that is given; `default` where none is."""
        for key in keys:
            value = self._text.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.wrong(key, f"must be a whole number of at least {least}, not {value!r}")
            return value
        if default is None:
            raise self.wrong(
                keys[0], "required, but missing; give the config.json of a decoder model"
            )
        return default

    def wrong(self, key: str, sentence: str) -> InputError:
        """The error to raise for `key`."""
        return InputError(f"{self._source}: {key}: {sentence}")

    def optional(self, key: str) -> int | None:
        """A whole number, or None where it is null, 0 or absent."""
        return self.whole(key, default=0, least=0) or None

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self._text.get(key)
        return default if value is None else bool(value)

    def listed(self, key: str) -> list[Any] | None:
        """A list, or None."""
        value = self._text.get(key)
        return value if isinstance(value, list) else None

    def is_of(self, families: Iterable[str]) -> bool:
        """Whether the model type begins with one of these."""
        return self.family.startswith(tuple(families))
