"""Parts that the workloads of an experiment file have in common, and the files they name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, PrivateAttr, WithJsonSchema, model_validator

from viisim.documents import Strict, inside, named_file
from viisim.profile import Count
from viisim.workload.arrivals import Gamma, Gaps, Poisson, RateCurve, Weibull
from viisim.workload.parameters import MAX_TOKENS
from viisim.workload.prefixes import Passages
from viisim.workload.presets import resolve_lengths

Positive: TypeAlias = Annotated[float, Field(gt=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]

_SHARED = "$VIISIM_SHARED/"


def shared_folder() -> Path:
    """The folder of shared traces: the variable VIISIM_SHARED, else `../shared` beside the
    checkout."""
    return Path(os.environ.get("VIISIM_SHARED") or Path(__file__).parents[3] / "shared")


class Located(Strict):
    """A part that names files: it remembers the folder of the document it stands in."""

    _folder: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any) -> None:
        """Takes the folder from the validation context."""
        if context:
            self._folder = context["folder"]

    def located(self, path: str) -> Path:
        """Where on this machine a file is that the document names."""
        if path.startswith(_SHARED):
            return shared_folder() / path.removeprefix(_SHARED)
        return named_file(path, self._folder)


# --------------------------------------------------------------------------------------
# Lengths and tables


def _text_keys(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys of a table as text, as JSON would make them."""
    return {str(key): value for key, value in table.items()}


def _written_length(value: Any) -> Any:
    """A length as written, but for the keys of a table."""
    if isinstance(value, Mapping):
        return _text_keys(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(
            f"must be a number of tokens, a preset's name, {{geometric: mean}} or a table "
            f"{{percent: tokens}}, not {value!r}"
        )
    return value


def _written_table(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a table {{second: factor}}, not {value!r}")
    return _text_keys(value)


_NUMBERS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}

Length: TypeAlias = Annotated[
    Any,
    AfterValidator(_written_length),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
                {"type": "string"},
                _NUMBERS,
                {"type": "null"},
            ]
        }
    ),
]
OptionalLength: TypeAlias = Annotated[Length, Field(default=None, validate_default=False)]
Table: TypeAlias = Annotated[Any, AfterValidator(_written_table), WithJsonSchema(_NUMBERS)]


# --------------------------------------------------------------------------------------
# Parts of workloads


class ArrivalsConfig(Strict):
    """How bursty arrivals are."""

    kind: Literal["poisson", "gamma", "weibull"] = "poisson"
    cv: Positive | None = None
    """Standard deviation of the gaps over their mean; 1 is as bursty as Poisson."""
    burstiness: Positive | None = None
    """For kind `gamma`, in the place of `cv`: its shape, as in `vllm bench serve`."""

    @model_validator(mode="after")
    def _is_stated_once(self) -> Self:
        if self.kind == "poisson" and self.cv is not None:
            raise inside("cv: a Poisson process has none to choose; write kind: gamma or weibull")
        if self.kind != "gamma" and self.burstiness is not None:
            raise inside(f"burstiness: kind {self.kind!r} has none; write kind: gamma, or give cv")
        if self.kind != "poisson" and (self.cv is None) == (self.burstiness is None):
            choice = "cv or burstiness" if self.kind == "gamma" else "cv"
            raise inside(f"cv: kind {self.kind!r} needs {choice}, one of it")
        return self

    def make(self) -> Gaps:
        """The process. Raises InputError for an impossible figure."""
        if self.burstiness is not None:
            return Gamma.of_burstiness(self.burstiness)
        if self.cv is None:
            return Poisson()
        return Gamma(self.cv) if self.kind == "gamma" else Weibull(self.cv)


class RateCurveConfig(Strict):
    """A factor on the rate by time, repeated; see `viisim.workload.arrivals.RateCurve`."""

    period_s: Positive = 86_400.0
    points: Table
    shape: Literal["linear", "steps"] = "linear"

    def make(self) -> RateCurve:
        """The curve. Raises InputError for impossible points."""
        return RateCurve(self.points, self.period_s, self.shape)


class PrefixConfig(Strict):
    """A `share` of the prompts begins with one of `groups` prefixes of `tokens` tokens."""

    share: Fraction = 1.0
    groups: Count
    tokens: Count
    name: str = ""
    """In a mixture, prefixes of the same name are the same prefixes."""


class PassagesConfig(Strict):
    """A `share` of the prompts contains `per_request` passages of a pool; see
    `viisim.workload.prefixes.Passages`."""

    pool: Count
    per_request: Count
    zipf: Annotated[float, Field(ge=0)]
    tokens: Length
    share: Fraction = 1.0
    behind_own_tokens: Annotated[int, Field(ge=0)] = 0

    def make(self) -> Passages:
        """The passages. Raises InputError for an impossible figure."""
        tokens = resolve_lengths("passages.tokens", self.tokens)
        return Passages(**{**self.model_dump(), "tokens": tokens})
