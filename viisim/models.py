"""Models by name, or by the `config.json` of a Hugging Face checkpoint.

The catalogue holds figures only, under the keys of `config.json`, so that one reader serves both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from viisim.architecture import ModelConfig
from viisim.config_figures import read_config
from viisim.documents import Strict, check, nearest, read_yaml
from viisim.errors import InputError
from viisim.model_config import model_from

_CATALOGUE = Path(__file__).parent / "catalogue" / "models.yaml"
_QUANTISED_SUFFIXES = ("awq", "gptq", "w4a16", "fp8", "fp16", "bf16", "mxfp4", "q8", "q4", "q3")


class ModelEntry(Strict):
    """One model of the catalogue."""

    source: str
    confidence: Literal["published", "reported", "reconstructed"]
    """published: by the model's makers; reported: by others; reconstructed: some figure is an
    inference, checked against the published size."""
    config: dict[str, Any]


def model_names() -> list[str]:
    """The catalogue's models, in alphabetical order."""
    return sorted(_entries())


def model_entry(name: str) -> ModelEntry:
    """The catalogue's entry: figures, source and confidence. Raises InputError if unknown."""
    entries = _entries()
    if name not in entries:
        raise InputError(f"unknown model {name!r}. {nearest(name, entries)}")
    return entries[name]


def load_model(name_or_path: str) -> ModelConfig:
    """A model of the catalogue, by name, or of a `config.json`, by path.

    Raises InputError for an unknown name, or a file that is broken or lacks a figure.
    """
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        return model_from(read_config(path), str(path), path.absolute().parent.name)
    entry = model_entry(name_or_path)
    return model_from(entry.config, f"catalogue: {name_or_path}", name_or_path)


def split_model_name(name: str) -> tuple[str, str | None]:
    """A served name as model and quantisation.

    The second is None where the name ends in no known quantisation.

    >>> split_model_name("qwen3-8b-awq")
    ('qwen3-8b', 'awq')
    """
    stem, _, last = name.rpartition("-")
    return (stem, last) if stem and last in _QUANTISED_SUFFIXES else (name, None)


@cache
def _entries() -> dict[str, ModelEntry]:
    content: dict[str, Any] = read_yaml(_CATALOGUE)
    return {
        name: check(ModelEntry, entry, f"catalogue: {name}", _CATALOGUE.parent)
        for name, entry in content.items()
    }
