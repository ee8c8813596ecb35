"""Presets: the shape of a real workload, small enough to ship.

A preset is a YAML file in `presets/` with the quantiles of prompt and output lengths, their rank
correlation and the arrival rate, derived from a public trace that its comment names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

import yaml

from viisim.errors import InputError
from viisim.workload.lengths import (
    Constant,
    Lengths,
    LengthSpec,
    QuantileTable,
    lengths_from_mapping,
)

_FOLDER = files("viisim.workload") / "presets"


@dataclass(frozen=True, slots=True)
class Preset:
    """What is known of a real workload."""

    name: str
    source: str
    licence: str
    rate_per_s: float
    """Mean rate of the trace."""
    interarrival_cv: float
    """Coefficient of variation of the trace's inter-arrival times; 1 is Poisson."""
    rank_correlation: float
    """Spearman's, between prompt and output length."""
    prompt_tokens: QuantileTable
    output_tokens: QuantileTable


def preset_names() -> list[str]:
    """The presets that ship, in alphabetical order."""
    names = [entry.name for entry in _FOLDER.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@cache
def load_preset(name: str) -> Preset:
    """The preset called `name`. Raises InputError for an unknown one."""
    known = preset_names()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise InputError(f"preset: there is no {name!r}; {hint}")
    fields = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for key in ("prompt_tokens", "output_tokens"):
        fields[key] = QuantileTable(fields[key], f"preset {name}: {key}")
    return Preset(name=name, **fields)


def resolve_lengths(name: str, spec: LengthSpec) -> Lengths:
    """The distribution that parameter `name` (`prompt_tokens` or `output_tokens`) asks for.

    A preset's name stands for that preset's own table. Raises InputError.
    """
    if isinstance(spec, str):
        preset = load_preset(spec)
        return preset.prompt_tokens if name == "prompt_tokens" else preset.output_tokens
    if isinstance(spec, int | float):  # a float is refused by name
        return Constant(spec, name)
    if isinstance(spec, Mapping):
        return lengths_from_mapping(name, spec)
    return spec
