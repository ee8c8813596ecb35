"""Presets: the shape of a real workload, small enough to ship.

A preset is a YAML file in `presets/` with the quantiles of prompt and output lengths, their rank
correlation and the arrival rate, derived from a public trace that its comment names. Where the
trace shows them, also what prompts have in common, and how conversations go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from viisim.errors import InputError
from viisim.workload.lengths import (
    Constant,
    Lengths,
    LengthSpec,
    QuantileTable,
    lengths_from_mapping,
)
from viisim.workload.prefixes import Passages, Prefixes

_FOLDER = files("viisim.workload") / "presets"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPreset:
    """How the conversations of a real workload go on; see `viisim.workload.sessions`."""

    rate_per_s: float
    """Conversations that begin per second."""
    turns: QuantileTable
    first_tokens: QuantileTable
    """The first prompt, behind the system prefix."""
    turn_tokens: QuantileTable
    """What each later prompt adds to the conversation so far."""
    think_s: Mapping[str, float]
    """From answer to next prompt: `{median, cv}`."""
    prefixes: Prefixes | None = None
    max_prompt_tokens: int | None = None
    """The longest prompt of the trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What is known of a real workload."""

    name: str
    source: str
    licence: str
    rate_per_s: float
    """Mean rate of the trace, in requests."""
    interarrival_cv: float | None = None
    """Coefficient of variation of the trace's inter-arrival times; 1 is Poisson. None where the
    trace does not tell."""
    rank_correlation: float
    """Spearman's, between prompt (without passages) and output length."""
    prompt_tokens: QuantileTable
    """All of the prompt but passages."""
    output_tokens: QuantileTable
    prefixes: Prefixes | None = None
    passages: Passages | None = None
    sessions: SessionPreset | None = None
    """For workloads of kind `sessions`; None where the trace shows no conversations."""


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
    fields = _with_parts(fields, f"preset {name}")
    if "sessions" in fields:
        sessions = _with_parts(fields["sessions"], f"preset {name}: sessions")
        fields["sessions"] = SessionPreset(**sessions)
    return Preset(name=name, **fields)


def _with_parts(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields with tables, prefixes and passages made of what the file has for them."""
    made = dict(fields)
    for key in ("prompt_tokens", "output_tokens", "turns", "first_tokens", "turn_tokens"):
        if key in made:
            made[key] = QuantileTable(made[key], f"{where}: {key}")
    if "prefixes" in made:
        made["prefixes"] = Prefixes(**made["prefixes"])
    if "passages" in made:
        tokens = QuantileTable(made["passages"]["tokens"], f"{where}: passages.tokens")
        made["passages"] = Passages(**{**made["passages"], "tokens": tokens})
    return made


def session_preset(name: str) -> tuple[Preset, SessionPreset]:
    """A preset that tells of conversations. Raises InputError for another."""
    preset = load_preset(name)
    if preset.sessions is None:
        able = [other for other in preset_names() if load_preset(other).sessions is not None]
        raise InputError(
            f"preset: {name!r} tells nothing of sessions; use one of {', '.join(able)}"
        )
    return preset, preset.sessions


def resolve_lengths(name: str, spec: LengthSpec) -> Lengths:
    """The distribution that parameter `name` asks for.

    A preset's name stands for that preset's own table of the same name: `prompt_tokens`,
    `output_tokens`, or with sessions `turns`, `first_tokens`, `turn_tokens`. Raises InputError.
    """
    if isinstance(spec, str):
        return _table(name, spec)
    if isinstance(spec, int | float):  # a float is refused by name
        return Constant(spec, name)
    if isinstance(spec, Mapping):
        return lengths_from_mapping(name, spec)
    return spec


def _table(name: str, preset: str) -> QuantileTable:
    whole = load_preset(preset)
    table = getattr(whole, name, None) or getattr(whole.sessions, name, None)
    if not isinstance(table, QuantileTable):
        raise InputError(f"{name}: preset {preset!r} has no such table; give numbers")
    return table
