"""The `workload` section of an experiment file: its models, and the workloads made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

from pydantic import Field, model_validator

from viisim.documents import Strict, inside
from viisim.errors import InputError
from viisim.profile import Count
from viisim.workload.config_parts import (
    ArrivalsConfig,
    Fraction,
    Located,
    OptionalLength,
    PassagesConfig,
    Positive,
    PrefixConfig,
    RateCurveConfig,
)
from viisim.workload.interface import (
    BLOCK_TOKENS,
    DEFAULT_MAX_OUTPUT_TOKENS,
    Labels,
    Workload,
)
from viisim.workload.mixture import MOST_PARTS, Labelled, Mixture
from viisim.workload.prefixes import Prefixes
from viisim.workload.presets import load_preset, session_preset
from viisim.workload.servegen import ServeGen
from viisim.workload.sessions import Sessions
from viisim.workload.synthetic import Synthetic
from viisim.workload.trace import TraceReplay


class WorkloadBase(Located):
    """What may be said of a workload of any kind."""

    model: str | None = None
    """Which model the requests ask for; may be left out when the cluster serves only one."""
    streamed: Fraction = 1.0
    max_output_tokens: Count = DEFAULT_MAX_OUTPUT_TOKENS
    traffic_class: str = ""
    tenant: str = ""
    priority: int = 0
    """Smaller is more urgent."""
    deadline_s: Positive | None = None
    """From arrival: a request still in the central queue by then is shed."""

    @property
    def labels(self) -> Labels:
        """What is said of all its requests."""
        return Labels(
            traffic_class=self.traffic_class,
            tenant=self.tenant,
            priority=self.priority,
            deadline_s=self.deadline_s,
        )


class FileWorkload(WorkloadBase):
    """A workload that is read from a file, when it is built."""

    path: str = Field(min_length=1)
    limit: Count | None = None
    """The earliest so many requests only."""

    @property
    def file(self) -> Path:
        """The path to open on this machine."""
        return self.located(self.path)


class DrawnWorkload(WorkloadBase):
    """A workload that is drawn: arrivals at a rate, and what is given before a preset's."""

    requests: Count
    preset: str | None = None
    rate_per_s: Positive | None = None
    arrivals: ArrivalsConfig | None = None
    """Poisson if absent, with a preset too."""
    rate_curve: RateCurveConfig | None = None
    prefixes: PrefixConfig | None = None

    def _required(self) -> Iterator[str]:
        """What must be given without a preset."""
        yield "rate_per_s"

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        for name in self._required():
            if self.preset is None and getattr(self, name) is None:
                raise inside(f"{name}: required without a preset, but missing")
        try:
            _made(cast("WorkloadPart", self), model="")
        except InputError as error:
            raise inside(str(error)) from None
        return self

    def _common(self, model: str) -> dict[str, Any]:
        """What all drawn workloads are made with, but for what a preset may give."""
        return {
            "requests": self.requests,
            "model": model,
            "gaps": self.arrivals.make() if self.arrivals else None,
            "rate_curve": self.rate_curve.make() if self.rate_curve else None,
            "streamed": self.streamed,
            "max_output_tokens": self.max_output_tokens,
            "labels": self.labels,
        }

    def _given(self, names: tuple[str, ...], preset: object) -> dict[str, Any]:
        """These parameters as written, else as in the preset; those in neither are left out."""
        given = {name: _either(getattr(self, name), getattr(preset, name, None)) for name in names}
        if self.prefixes is not None:
            given["prefixes"] = Prefixes(**self.prefixes.model_dump())
        return {name: value for name, value in given.items() if value is not None}


def _either(written: Any, known: Any) -> Any:
    return known if written is None else written


# --------------------------------------------------------------------------------------
# Workloads


class SyntheticWorkload(DrawnWorkload):
    """Requests on their own, with lengths of a preset, or given."""

    kind: Literal["synthetic"]
    prompt_tokens: OptionalLength
    output_tokens: OptionalLength
    rank_correlation: Annotated[float, Field(ge=-1, le=1)] | None = None
    passages: PassagesConfig | None = None

    def _required(self) -> Iterator[str]:
        yield from ("rate_per_s", "prompt_tokens", "output_tokens")

    def make(self, model: str) -> Synthetic:
        """The workload. Raises InputError naming the parameter."""
        preset = None if self.preset is None else load_preset(self.preset)
        names = ("rate_per_s", "prompt_tokens", "output_tokens", "rank_correlation", "prefixes")
        given = self._given(names, preset)
        if self.passages is not None:
            given["passages"] = self.passages.make()
        elif preset is not None:
            given["passages"] = preset.passages
        return Synthetic(**self._common(model), **given)


class SessionsWorkload(DrawnWorkload):
    """Closed-loop conversations; `rate_per_s` counts sessions, `requests` all their turns."""

    kind: Literal["sessions"]
    turns: OptionalLength
    first_tokens: OptionalLength
    """The first prompt, behind the system prefix."""
    turn_tokens: OptionalLength
    """What each later prompt adds to the conversation so far."""
    output_tokens: OptionalLength
    think_s: Mapping[str, float] | None = None
    """From answer to next prompt: `{median: s, cv: c}` or `{exponential: mean_s}`."""
    max_prompt_tokens: Count | None = None
    """A session ends before a prompt would exceed it."""
    block_tokens: Annotated[int, Field(ge=8)] = BLOCK_TOKENS
    """Tokens per prefix block that the scheduler is told of."""

    def _required(self) -> Iterator[str]:
        yield from ("rate_per_s", "turns", "first_tokens", "turn_tokens", "output_tokens")
        yield "think_s"

    def make(self, model: str) -> Sessions:
        """The workload. Raises InputError naming the parameter."""
        preset, known = (None, None) if self.preset is None else session_preset(self.preset)
        names = ("rate_per_s", "turns", "first_tokens", "turn_tokens", "think_s")
        given = self._given((*names, "max_prompt_tokens", "prefixes"), known)
        given["output_tokens"] = _either(
            self.output_tokens, preset.output_tokens if preset else None
        )
        return Sessions(**self._common(model), **given, block_tokens=self.block_tokens)


class TraceWorkload(FileWorkload):
    """The requests of a recorded trace."""

    kind: Literal["trace"]
    time_scale: Positive = 1.0
    """2.0 is twice as slow: half the rate."""
    skip_bad: bool = False
    """Leave broken rows out, and count them."""
    closed_loop: bool = True
    """A session's next turn waits for the answer to the one before, where the trace knows."""

    def make(self, model: str) -> Workload:
        """The workload. Raises InputError naming the parameter, or the file and line."""
        replay = TraceReplay(
            path=self.file,
            model=model,
            time_scale=self.time_scale,
            limit=self.limit,
            streamed=self.streamed,
            max_output_tokens=self.max_output_tokens,
            skip_bad=self.skip_bad,
            closed_loop=self.closed_loop,
        )
        return replay if self.labels == Labels() else Labelled(replay, self.labels)


class ServeGenWorkload(FileWorkload):
    """Part of a day of a ServeGen pool, client by client."""

    kind: Literal["servegen"]
    start_s: Annotated[float, Field(ge=0)] = 0.0
    """The time of day that becomes time 0."""
    duration_s: Positive = 3600.0
    rate_scale: Positive | None = None
    """Multiplies the rates of all clients."""
    rate_per_s: Positive | None = None
    """In the place of `rate_scale`: the mean rate of all that is served."""

    @model_validator(mode="after")
    def _rate_is_stated_once(self) -> Self:
        if self.rate_scale is not None and self.rate_per_s is not None:
            raise inside("rate_scale: stated by rate_per_s already; delete one of them")
        return self

    def make(self, model: str) -> ServeGen:
        """The workload. Raises InputError naming the parameter, or the file."""
        return ServeGen(
            path=self.file,
            model=model,
            start_s=self.start_s,
            duration_s=self.duration_s,
            rate_scale=1.0 if self.rate_scale is None else self.rate_scale,
            rate_per_s=self.rate_per_s,
            limit=self.limit,
            streamed=self.streamed,
            labels=self.labels,
            max_output_tokens=self.max_output_tokens,
        )


WorkloadPart: TypeAlias = SyntheticWorkload | SessionsWorkload | TraceWorkload | ServeGenWorkload


class MixedWorkload(Strict):
    """Several workloads at once, each with its own labels."""

    kind: Literal["mixed"]
    model: str | None = None
    """Which model the requests of parts ask for that name none."""
    parts: tuple[Annotated[WorkloadPart, Field(discriminator="kind")], ...] = Field(
        min_length=1, max_length=MOST_PARTS, strict=False
    )

    def make(self, model: str) -> Mixture:
        """The workload. Raises InputError naming the part and what is wrong there."""
        made = []
        for index, part in enumerate(self.parts):
            try:
                made.append(_made(part, part.model or model))
            except InputError as error:
                raise InputError(f"parts.{index}: {error}") from None
        return Mixture(made)


WorkloadConfig: TypeAlias = WorkloadPart | MixedWorkload


def _made(config: WorkloadConfig, model: str) -> Workload:
    return config.make(model)


def build_workload(config: WorkloadConfig, model: str) -> Workload:
    """The workload; its requests ask for `model`, parts of a mixture perhaps for their own.
    Reads the files it names.

    Raises InputError naming the parameter, or the file and line.
    """
    return _made(config, model)


def scaled(config: WorkloadConfig, factor: float) -> WorkloadConfig:
    """The same workload at `factor` times its rate.

    Requests are the same, closer together or further apart: with `rate_per_s` that of a preset
    is written out, with `time_scale` pauses inside closed-loop sessions keep their length. A
    mixture is scaled part by part. A ServeGen pool has more requests in the same time instead.
    Raises InputError for a factor that is not above 0, or a preset without a rate.
    """
    if not factor > 0:
        raise InputError(f"load: {factor!r} is not possible; use a factor above 0")
    return config.model_copy(update=_faster(config, factor))


def _faster(config: WorkloadConfig, factor: float) -> dict[str, Any]:
    """The fields of the workload that change with its rate."""
    match config:
        case MixedWorkload():
            return {"parts": tuple(scaled(part, factor) for part in config.parts)}
        case TraceWorkload():
            return {"time_scale": config.time_scale / factor}
        case ServeGenWorkload() if config.rate_per_s is None:
            return {"rate_scale": (config.rate_scale or 1.0) * factor}
        case SyntheticWorkload() if config.rate_per_s is None:
            assert config.preset is not None, "required without a rate"
            return {"rate_per_s": load_preset(config.preset).rate_per_s * factor}
        case SessionsWorkload() if config.rate_per_s is None:
            assert config.preset is not None, "required without a rate"
            return {"rate_per_s": session_preset(config.preset)[1].rate_per_s * factor}
    assert config.rate_per_s is not None, "all other cases are above"
    return {"rate_per_s": config.rate_per_s * factor}


def models_asked_for(config: WorkloadConfig) -> Iterator[tuple[str, str | None]]:
    """The models that a workload names, each with its key; None where it leaves it open."""
    if not isinstance(config, MixedWorkload):
        yield "model", config.model
        return
    if config.model is not None:
        yield "model", config.model
    for index, part in enumerate(config.parts):
        yield f"parts.{index}.model", part.model or config.model


def workload_files(config: WorkloadConfig) -> dict[str, Path]:
    """The files that a workload reads, by the key that names each: `path`, `parts.2.path`."""
    if isinstance(config, MixedWorkload):
        return {
            f"parts.{index}.{key}": file
            for index, part in enumerate(config.parts)
            for key, file in workload_files(part).items()
        }
    return {"path": config.file} if isinstance(config, FileWorkload) else {}
