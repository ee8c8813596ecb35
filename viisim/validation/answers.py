"""What became of one run's requests: measured or simulated, the same columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from viisim.errors import InputError
from viisim.records import FINISHED, SeedResult

Floats = NDArray[np.float64]

LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS: Mapping[str, Callable[[Floats], float]] = {
    "mean": lambda values: float(values.mean()),
    "p50": lambda values: float(np.quantile(values, 0.5)),
    "p90": lambda values: float(np.quantile(values, 0.9)),
    "p99": lambda values: float(np.quantile(values, 0.99)),
}


@dataclass(frozen=True, slots=True)
class Answers:
    """One run. Columns have one entry a request, in order of arrival.

    Times are seconds on the client's clock from the start of the run; NaN where there is none: of
    a plain answer's first token, of an answer of one token between tokens, of a failed request.
    """

    ids: tuple[str, ...]
    """By which the runs of one list are paired; requests of a simulated run have none."""
    traffic_class: tuple[str, ...]
    due_s: Floats
    """When it was to arrive; latencies count from there."""
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    output_tokens: NDArray[np.int64]
    preemptions: int
    prefix_hit_tokens: int
    prompt_tokens: int
    """Of all prompts together."""

    def __len__(self) -> int:
        return self.due_s.size

    @property
    def failed(self) -> int:
        """Requests without a whole answer."""
        return int(np.isnan(self.e2e_s).sum())

    def latencies(self, name: str, traffic_class: str | None = None) -> Floats:
        """The known values of one of `LATENCIES`; of one class, if that is given."""
        values: Floats = getattr(self, name)
        known = ~np.isnan(values)
        if traffic_class is not None:
            known &= np.array(self.traffic_class) == traffic_class
        return values[known]

    @property
    def throughput_per_s(self) -> float:
        """Output tokens a second, from the first arrival to the last answer."""
        ends_s = (self.due_s + self.e2e_s)[~np.isnan(self.e2e_s)]
        if not ends_s.size:
            return 0.0
        return float(self.output_tokens.sum() / (ends_s.max() - self.due_s.min()))

    @property
    def prefix_hit_share(self) -> float:
        """Prompt tokens found in a prefix cache, of all."""
        return self.prefix_hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """What policies are judged by in a workload. Smaller is better; seconds."""

    metric: str
    """One of `LATENCIES`."""
    statistic: str
    """One of `STATISTICS`."""
    traffic_class: str | None = None
    """None: requests of every class."""

    def __post_init__(self) -> None:
        for word, known in ((self.metric, LATENCIES), (self.statistic, tuple(STATISTICS))):
            if word not in known:
                raise InputError(f"unknown figure '{word}'; it is one of {', '.join(known)}")

    def __str__(self) -> str:
        name = f"{self.statistic} {self.metric.removesuffix('_s').upper()}"
        return name if self.traffic_class is None else f"{name} of {self.traffic_class}"

    def of(self, runs: Sequence[Answers]) -> float:
        """The figure of all requests of the repetitions. Raises InputError if none has it."""
        values = [run.latencies(self.metric, self.traffic_class) for run in runs]
        if not any(known.size for known in values):
            classes = sorted(set(chain.from_iterable(run.traffic_class for run in runs)))
            raise InputError(
                f"no answered request has a {self}; there are requests of "
                f"{', '.join(classes) or 'no class'}"
            )
        return STATISTICS[self.statistic](np.concatenate(values))

    def concerns(self, run: Answers) -> NDArray[np.bool_]:
        """Which requests are of its traffic class."""
        if self.traffic_class is None:
            return np.ones(len(run), dtype=np.bool_)
        return np.array([name == self.traffic_class for name in run.traffic_class], dtype=np.bool_)


def simulated_answers(result: SeedResult) -> Answers:
    """A simulated run as its clients saw it."""
    columns: Mapping[str, NDArray[Any]] = result.requests
    finished = columns["outcome"] == FINISHED
    due_s = columns["arrived_ns"] / 1e9
    ttft_s = np.where(
        finished & columns["streamed"], columns["first_token_ns"] / 1e9 - due_s, np.nan
    )
    e2e_s = np.where(finished, columns["finished_ns"] / 1e9 - due_s, np.nan)
    output_tokens = np.where(finished, columns["output_tokens"], 0)
    return Answers(
        ids=(),
        traffic_class=tuple(result.traffic_classes[i] for i in columns["traffic_class"]),
        due_s=due_s,
        ttft_s=ttft_s,
        tpot_s=between_tokens_s(ttft_s, e2e_s, output_tokens),
        e2e_s=e2e_s,
        output_tokens=output_tokens.astype(np.int64),
        preemptions=int(columns["preemptions"].sum()),
        prefix_hit_tokens=int(columns["cached_tokens"].sum()),
        prompt_tokens=int(columns["prompt_tokens"].sum()),
    )


def between_tokens_s(ttft_s: Floats, e2e_s: Floats, output_tokens: NDArray[np.int64]) -> Floats:
    """Time per output token after the first, of each request."""
    gaps = np.where(output_tokens > 1, output_tokens - 1, np.nan)
    return (e2e_s - ttft_s) / gaps
