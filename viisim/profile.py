"""Profiles: how one model, on one device, in one build of an engine, spends time and memory.

A profile is a YAML file; those that ship are in `profiles/` and are named by their path there,
`device/model`. Where a figure comes from, and how far it can be trusted, stands in the file.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from viisim.documents import Strict, check, inside, named_file, nearest, read_yaml
from viisim.engine.scheduler import SchedulerSettings
from viisim.errors import InputError

Count: TypeAlias = Annotated[int, Field(ge=1)]
Whole: TypeAlias = Annotated[int, Field(ge=0)]
Cost: TypeAlias = Annotated[float, Field(ge=0)]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
SchedulingPolicy: TypeAlias = Literal["fcfs", "priority"]
Interval: TypeAlias = Annotated[tuple[Whole, Whole], Field(strict=False)]
"""Least and most, both included."""
Positive: TypeAlias = Annotated[float, Field(gt=0)]
Watts: TypeAlias = Annotated[int, Field(gt=0, strict=False)]
Triple: TypeAlias = Annotated[tuple[float, float, float], Field(strict=False)]

_SHIPPED = Path(__file__).parent / "profiles"


class EngineSettings(Strict):
    """What an engine is started with, under vLLM's names, and how it is simulated.

    The defaults are vLLM's. Combinations that vLLM refuses to start with are errors.
    """

    num_kv_blocks: int = Field(ge=2)
    """The pool as vLLM counts it; one block is never handed out."""
    block_tokens: Count = 16
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    max_model_len: Count = 4096
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    async_scheduling: bool = False
    long_prefill_token_threshold: Whole = 0
    """Most prefill tokens of one sequence in a step that has others; 0: no cap."""
    adaptive_long_prefill: bool = False
    """Raise that cap to an equal share of the step's token budget."""
    reserve_full_prompt: bool = True
    """Admit a prompt only if all of it would fit (vLLM's scheduler_reserve_full_isl)."""
    watermark: Share = 0.0
    """Share of the pool to leave free when admitting."""
    coalesce: bool = True
    """Compute equal engine steps together. False steps one by one: the same results, slower."""

    @model_validator(mode="after")
    def _vllm_would_start(self) -> Self:
        room_tokens = (self.num_kv_blocks - 1) * self.block_tokens
        if self.max_model_len > room_tokens:
            raise inside(
                f"max_model_len: {self.max_model_len} tokens do not fit the KV cache, which holds "
                f"{room_tokens} (num_kv_blocks - 1 blocks of {self.block_tokens}); lower it"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise inside(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than max_num_seqs "
                f"({self.max_num_seqs}); raise it"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise inside(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than max_model_len "
                f"({self.max_model_len}) without chunked prefill; raise it"
            )
        return self

    def scheduler_settings(self) -> SchedulerSettings:
        """The same for the simulated engine's scheduler."""
        return SchedulerSettings(
            num_kv_blocks=self.num_kv_blocks,
            block_tokens=self.block_tokens,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            prefix_caching=self.enable_prefix_caching,
            chunked_prefill=self.enable_chunked_prefill,
            scheduling_policy=self.scheduling_policy,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            adaptive_long_prefill=self.adaptive_long_prefill,
            reserve_full_prompt=self.reserve_full_prompt,
            # vLLM takes the share of the whole pool, block 0 included, and rounds down.
            watermark_blocks=int(self.watermark * self.num_kv_blocks),
            async_scheduling=self.async_scheduling,
        )


class ProfileEngine(EngineSettings):
    """The engine that was measured, and the settings it has unless an experiment differs."""

    name: str
    version: str


class DecodeTime(Strict):
    """Time of a decode step of `sequences` sequences: base_s + per_context_token_s * context.

    `context` is the tokens all of them attend to, summed, the new ones included.
    """

    sequences: Count
    base_s: Cost
    per_context_token_s: Cost


class PrefillTime(Strict):
    """What prefill adds to a step."""

    base_s: Cost
    """Base of a step without decodes; with decodes, the larger of this and theirs (a step that
    prefills runs without captured graphs, whatever else it does)."""
    per_token_s: Cost
    per_token_context_s: Cost = 0.0
    """For each pair of a prefill token and a token it attends to: n tokens behind c earlier
    ones are n * c + n * (n + 1) / 2 pairs."""


class StepTime(Strict):
    """Time of an engine step, by what it computes.

    Decode terms between two listed batch sizes are interpolated. Beyond the last one the base
    continues in a straight line and the slope stays; that counts as extrapolation.
    """

    decode: tuple[DecodeTime, ...] = Field(min_length=1, strict=False)
    prefill: PrefillTime
    host_overhead_s: Cost = 0.0
    """Added to every step: the scheduler and the processing of its output."""

    @model_validator(mode="after")
    def _is_in_order_and_takes_time(self) -> Self:
        sizes = [entry.sequences for entry in self.decode]
        if any(second <= first for first, second in pairwise(sizes)):
            raise inside(f"decode: sequences {sizes} must increase; sort the entries")
        for index, entry in enumerate(self.decode):
            if entry.base_s + self.host_overhead_s == 0:
                raise inside(f"decode.{index}.base_s: a step takes time; give more than 0")
        return self


class CalibratedRange(Strict):
    """What was measured. Queries outside are answered, counted and reported."""

    decode_sequences: Interval
    context_tokens: Interval
    """Of one sequence."""
    prefill_tokens: Interval
    """Of one prompt."""

    @model_validator(mode="after")
    def _least_comes_first(self) -> Self:
        for name in type(self).model_fields:
            least, most = getattr(self, name)
            if least > most:
                raise inside(f"{name}: [{least}, {most}] is empty; write [least, most]")
        return self


class ApiDelay(Strict):
    """What a client waits beyond the engine's steps: HTTP, tokenisation, and the pipes between
    the API server and its engine.

    The simulator adds it. `viisim worker` does not: it is an API server, with delays of its own.
    """

    request_s: Cost = 0.0
    """From sending a request until the engine's scheduler has it, without its prompt's share."""
    request_per_prompt_token_s: Cost = 0.0
    answer_s: Cost = 0.0
    """From the end of a step until the client has the token."""


class NoiseModel(Strict):
    """How single steps scatter around the fitted times, as relative standard deviations."""

    decode_relative_sd: Cost
    prefill_relative_sd: Cost


class Covariance(Strict):
    """How uncertain the fitted coefficients are, in squares of their own units."""

    decode: tuple[Triple, ...] = Field(strict=False)
    """For each entry of `step_time.decode` that was measured: variance of its base, covariance,
    variance of its slope."""
    prefill: tuple[Triple, Triple, Triple] = Field(strict=False)
    """Rows and columns: base, token, pair."""


class Source(Strict):
    """One measured run that a profile was fitted to."""

    name: str
    kind: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    entries: Count
    """Requests, or engine steps."""
    recorded: str = ""
    concurrency: Count | None = None
    power_cap_w: Positive | None = None
    prompt_tokens: Interval | None = None
    cached_tokens: Whole = 0
    """Prompt tokens that the typical request found in the prefix cache."""


class Profile(Strict):
    """One model on one device (or tensor-parallel group), in one build of an engine."""

    device: str
    model: str
    tensor_parallel: Count = 1
    """Devices that share the model; all figures are for the group."""
    power_cap_w: Positive | None = None
    """Of each device; None where it is not known."""
    prefill_factor_by_power_cap_w: dict[Watts, Positive] = Field(default_factory=dict)
    """How many times as long prefill takes at other caps; decode takes as long."""
    engine: ProfileEngine
    step_time: StepTime
    range: CalibratedRange
    api: ApiDelay | None = None
    """None where it was not measured apart: there is none then, or the step times contain it."""
    source: str
    """Where the figures come from."""
    notes: str = ""
    """How they were derived, and how far to trust them."""
    noise: NoiseModel | None = None
    covariance: Covariance | None = None
    sources: tuple[Source, ...] = Field(default=(), strict=False)
    """The runs that were fitted; their hashes are of the files as they lie on disk."""
    cross_validation: Literal["runs", "halves"] | None = None
    """What `held_out_error` was measured on: each run predicted from the others, or each half of
    the only run from the other half."""
    held_out_error: dict[str, float] | None = None
    """Relative errors on measurements the fit has not seen, by what they are of."""


def profile_names() -> list[str]:
    """The profiles that ship, in alphabetical order."""
    paths = _SHIPPED.rglob("*.yaml")
    return sorted(path.relative_to(_SHIPPED).with_suffix("").as_posix() for path in paths)


def load_profile(name_or_path: str, folder: Path = Path()) -> Profile:
    """A profile that ships, by name, or a file (`.yaml`, `.yml`) relative to `folder`, else here.

    Raises InputError for an unknown name or a file that is no profile.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = named_file(name_or_path, folder)
        return check(Profile, read_yaml(path), str(path), path.parent)
    names = profile_names()
    if name_or_path not in names:
        raise InputError(f"unknown profile {name_or_path!r}. {nearest(name_or_path, names)}")
    return _shipped(name_or_path)


@cache
def _shipped(name: str) -> Profile:
    path = _SHIPPED / f"{name}.yaml"
    return check(Profile, read_yaml(path), f"profile {name}", path.parent)


def profile_hash(profile: Profile) -> str:
    """SHA-256 of the profile's content, whatever the layout and comments of its file."""
    # An absent `api` is left out: profiles have the hash that they had before there was any.
    absent = {"api"} if profile.api is None else None
    content = json.dumps(profile.model_dump(mode="json", exclude=absent), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
