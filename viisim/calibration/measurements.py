"""What was measured, in one form for all files: requests as a client saw them, or engine steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from viisim.errors import InputError

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Setup:
    """What ran. A profile belongs to one model, build and power cap."""

    model: str
    build: str
    """Version of the engine as it names itself, else its image."""
    image: str = ""
    device: str = ""
    power_cap_w: float | None = None
    tensor_parallel: int | None = None
    engine_name: str = "vllm"
    engine: Mapping[str, int | bool] = field(default_factory=dict)
    """Engine settings that the file states, under our names."""

    def __str__(self) -> str:
        parts = [self.model, f"build {self.build}" if self.build else "", self.device]
        if self.tensor_parallel is not None:
            parts.append(f"TP{self.tensor_parallel}")
        if self.power_cap_w is not None:
            parts.append(f"{self.power_cap_w:g} W")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class RequestLog:
    """Requests in the order in which they were sent."""

    prompt_tokens: Counts
    output_tokens: Counts
    ttft_s: Floats
    e2e_s: Floats
    gaps_s: tuple[Floats, ...] | None = None
    """Gaps between the tokens of each request; None where only totals were kept."""
    arrived_s: Floats | None = None
    """When each was sent, from 0; None in a closed loop, where it follows from the others."""
    started_s: Floats | None = None
    """When the engine took each up, on the clock of `arrived_s`; None where not recorded."""
    concurrency: int | None = None
    """Requests that a closed loop keeps in flight; None in an open one."""
    cached_tokens: Counts | None = None
    """Prompt tokens found in the prefix cache; None where that is still to be found out."""
    repeats_one_prompt: bool = False
    """Every request sends the same prompt, so all but the first find it cached."""
    goes_on: bool = False
    """More requests followed: what ran beside the last ones is not known."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def cached(self) -> Counts:
        """Prompt tokens found in the prefix cache: 0 where that is not known."""
        if self.cached_tokens is None:
            return np.zeros(len(self), dtype=np.int64)
        return self.cached_tokens

    @property
    def uncached(self) -> NDArray[np.bool_]:
        """Requests whose prompt was computed, at least half of it."""
        return np.asarray(2 * self.cached < self.prompt_tokens)

    def first(self, requests: int) -> RequestLog:
        """The first requests only."""

        def cut(column: Any) -> Any:
            return None if column is None else column[:requests]

        columns = ("prompt_tokens", "output_tokens", "ttft_s", "e2e_s", "gaps_s")
        more = ("arrived_s", "started_s", "cached_tokens")
        cuts = {name: cut(getattr(self, name)) for name in (*columns, *more)}
        return replace(self, **cuts, goes_on=self.goes_on or requests < len(self))


@dataclass(frozen=True, slots=True)
class StepLog:
    """Engine steps, one entry a step (or `steps` equal ones that nothing tells apart)."""

    duration_s: Floats
    decodes: Counts
    context_tokens: Counts
    """Tokens that the decoding sequences attend to, summed."""
    steps: Counts
    """Engine steps that the entry stands for."""
    prefill_tokens: Counts
    prefill_pairs: Counts
    """(token, attended token) pairs of the prefills."""
    host_s: Floats
    """Part of the duration that the host took; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.duration_s)

    def part(self, kept: Any) -> StepLog:
        """The entries that an index, slice or mask keeps."""
        return StepLog(*(getattr(self, name)[kept] for name in StepLog.__slots__))

    def divided(self, factors: Floats) -> StepLog:
        """The entries with durations so many times shorter."""
        return replace(self, duration_s=self.duration_s / factors, host_s=self.host_s / factors)

    @staticmethod
    def joined(logs: Sequence[StepLog]) -> StepLog:
        """All entries of several logs."""
        columns = ([getattr(log, name) for log in logs] for name in StepLog.__slots__)
        return StepLog(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured run: requests, or engine steps."""

    name: str
    path: Path
    sha256: str
    kind: str
    """The format it came in."""
    setup: Setup
    requests: RequestLog | None = None
    steps: StepLog | None = None
    recorded: str = ""
    """When, as the file writes it; sorts in time."""

    def __len__(self) -> int:
        return len(self.requests) if self.requests is not None else len(self.steps or ())


def one_setup(runs: Sequence[Measurement], power_caps: bool = True) -> Setup:
    """The setup that all runs share; with `power_caps` they may differ in their cap.

    Raises InputError naming the models or builds that were mixed.
    """
    for name, what in (("model", "models"), ("build", "builds"), ("device", "devices")):
        found = sorted({str(getattr(run.setup, name)) for run in runs})
        if len(found) > 1:
            raise InputError(
                f"{_examples(runs, name)}: measurements of {len(found)} {what} are mixed "
                f"({', '.join(found)}), but a profile belongs to one model, build and power cap; "
                f"give those of one, or pick with --only TEXT"
            )
    degrees = sorted({run.setup.tensor_parallel or 0 for run in runs} - {0})
    if len(degrees) > 1:
        raise InputError(
            f"{_examples(runs, 'tensor_parallel')}: measurements of several tensor-parallel "
            f"degrees are mixed ({', '.join(map(str, degrees))}); give those of one"
        )
    caps = {run.setup.power_cap_w for run in runs}
    if not power_caps and len(caps) > 1:
        raise InputError(f"measurements at several power caps are mixed ({caps}); give one")
    known: dict[str, int | bool] = {}
    for run in runs:
        known |= run.setup.engine
    return replace(runs[0].setup, engine=known, tensor_parallel=degrees[0] if degrees else None)


def _examples(runs: Sequence[Measurement], name: str) -> str:
    """Two files that differ in the field."""
    first = runs[0]
    other = next(r for r in runs if getattr(r.setup, name) != getattr(first.setup, name))
    return first.name if first.path == other.path else f"{first.name} and {other.name}"
