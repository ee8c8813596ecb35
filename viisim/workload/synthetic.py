"""Synthetic workloads: Poisson arrivals, correlated lengths, shared prefixes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.interface import CHUNK_REQUESTS, DEFAULT_MAX_OUTPUT_TOKENS, own_segment
from viisim.workload.lengths import LengthSpec, Tokens
from viisim.workload.presets import load_preset, resolve_lengths
from viisim.workload.request import Request

_LONGEST_SPAN_S = 1e8  # three years: nanoseconds stay far from the end of 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """Prompts that begin alike, as with system prompts.

    A `share` of the prompts begins with one of `groups` prefixes of `tokens` tokens, all equally
    likely. The prefix takes the place of the prompt's first tokens; a prompt shorter than
    `tokens + 1` is lengthened to that, so something of its own always follows.
    """

    share: float
    groups: int
    tokens: int

    def __post_init__(self) -> None:
        """Raises InputError for an impossible value."""
        parameters.share("prefixes.share", self.share)
        parameters.whole("prefixes.groups", self.groups)
        parameters.whole("prefixes.tokens", self.tokens, parameters.MAX_TOKENS - 1)


class Synthetic:
    """Requests drawn from distributions.

    Every quantity has its own stream (`arrivals`, `lengths`, `prefixes`, `streamed`) and takes
    the same draws from it for each request, used or not. So request k depends neither on how
    many follow it nor on the chunk size, and a change of one parameter leaves everything else
    of all requests as it was. Arrival gaps are rounded to whole nanoseconds before they are
    summed: sums of whole numbers do not depend on where a chunk begins.
    """

    def __init__(
        self,
        *,
        requests: int,
        rate_per_s: float,
        prompt_tokens: LengthSpec,
        output_tokens: LengthSpec,
        model: str,
        rank_correlation: float = 0.0,
        streamed: float = 1.0,
        prefixes: Prefixes | None = None,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
        chunk_requests: int = CHUNK_REQUESTS,
    ) -> None:
        """Raises InputError, naming the parameter, for an impossible value.

        `rank_correlation` is Spearman's, between prompt and output lengths, before prefixes
        lengthen short prompts and the limit cuts long answers; equal lengths (a constant, a
        flat table) weaken it. `streamed` is the share of requests that want a stream.
        """
        self.total_requests = parameters.whole("requests", requests)
        self.rate_per_s = parameters.positive("rate_per_s", rate_per_s)
        if requests / rate_per_s > _LONGEST_SPAN_S:
            raise InputError(
                f"rate_per_s: {rate_per_s!r} spreads {requests:,} requests over more than "
                f"{_LONGEST_SPAN_S:.0e} s; use a higher rate"
            )
        self.prompt_tokens = resolve_lengths("prompt_tokens", prompt_tokens)
        self.output_tokens = resolve_lengths("output_tokens", output_tokens)
        self.model = model
        self.rank_correlation = parameters.correlation("rank_correlation", rank_correlation)
        self.streamed = parameters.share("streamed", streamed)
        self.prefixes = prefixes
        self.max_output_tokens = parameters.whole("max_output_tokens", max_output_tokens)
        self.cut_outputs = 0
        """Answers cut to the limit by the last call of `requests`, as far as it has come."""
        self._chunk_requests = parameters.whole("chunk_requests", chunk_requests)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        requests: int,
        model: str,
        rate_per_s: float | None = None,
        **others: Any,
    ) -> Self:
        """The preset's lengths and rank correlation, and its rate unless another is given."""
        preset = load_preset(name)
        return cls(
            requests=requests,
            model=model,
            rate_per_s=preset.rate_per_s if rate_per_s is None else rate_per_s,
            prompt_tokens=preset.prompt_tokens,
            output_tokens=preset.output_tokens,
            rank_correlation=preset.rank_correlation,
            **others,
        )

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`. Memory does not grow with the number of requests."""
        self.cut_outputs = 0
        return self._generate(Streams(seed))

    def _generate(self, streams: Streams) -> Iterator[Request]:
        last_ns = 0
        for first in range(0, self.total_requests, self._chunk_requests):
            count = min(self._chunk_requests, self.total_requests - first)
            arrived_ns = last_ns + np.cumsum(self._gaps_ns(streams["arrivals"], count))
            last_ns = int(arrived_ns[-1])
            prompts, outputs = self._lengths(streams["lengths"], count)
            groups = self._prefix_groups(streams["prefixes"], count)
            streamed = streams["streamed"].random(count) < self.streamed
            yield from self._build(first, arrived_ns, prompts, outputs, groups, streamed)

    def _gaps_ns(self, stream: Generator, count: int) -> NDArray[np.int64]:
        gaps_s = stream.standard_exponential(count) / self.rate_per_s
        return np.rint(gaps_s * 1e9).astype(np.int64)

    def _lengths(self, stream: Generator, count: int) -> tuple[Tokens, Tokens]:
        """Prompt and output lengths, coupled by a Gaussian copula."""
        # The Gaussian correlation that gives this rank correlation (Kruskal 1958).
        gaussian = 2 * math.sin(math.pi * self.rank_correlation / 6)
        own = math.sqrt(max(0.0, 1 - gaussian**2))
        normals = stream.standard_normal((count, 2))
        prompts = self.prompt_tokens.tokens(normals[:, 0])
        outputs = self.output_tokens.tokens(gaussian * normals[:, 0] + own * normals[:, 1])
        self.cut_outputs += int(np.count_nonzero(outputs > self.max_output_tokens))
        return prompts, np.minimum(outputs, self.max_output_tokens)

    def _prefix_groups(self, stream: Generator, count: int) -> NDArray[np.int64]:
        """The prefix group of each request, -1 for none."""
        if self.prefixes is None:
            return np.full(count, -1, dtype=np.int64)
        uniforms = stream.random((count, 2))
        groups = (uniforms[:, 1] * self.prefixes.groups).astype(np.int64)
        return np.where(uniforms[:, 0] < self.prefixes.share, groups, -1)

    def _build(
        self,
        first: int,
        arrived_ns: NDArray[np.int64],
        prompts: Tokens,
        outputs: Tokens,
        groups: NDArray[np.int64],
        streamed: NDArray[np.bool_],
    ) -> Iterator[Request]:
        """The requests of one chunk. A prefix is one prefix block, named by its group."""
        prefix_tokens = self.prefixes.tokens if self.prefixes else 0
        prompts = np.where(groups < 0, prompts, np.maximum(prompts, prefix_tokens + 1))
        columns = (arrived_ns, arrived_ns / 1e9, prompts, outputs, groups, streamed)
        # Plain Python values from here on: reading numpy scalars one by one is far slower.
        rows = zip(*(column.tolist() for column in columns), strict=True)
        model, limit = self.model, self.max_output_tokens
        for index, (ns, arrived_s, prompt, output, group, stream) in enumerate(rows, first):
            own = own_segment(index)
            pieces: tuple[tuple[int, int], ...] = ((own, prompt),)
            blocks: tuple[int, ...] = ()
            if group >= 0:
                pieces = ((group, prefix_tokens), (own, prompt - prefix_tokens))
                blocks = (group,)
            # By position, with the defaults written out: half the cost of naming them.
            view = RequestView(
                f"r{index}", model, arrived_s, prompt, limit, stream,
                0, "", "", None, blocks, prefix_tokens,
            )  # fmt: skip
            yield Request(view, ns, pieces, output)
