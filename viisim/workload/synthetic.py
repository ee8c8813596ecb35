"""Synthetic workloads: an arrival process, correlated lengths, shared prefixes and passages."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from itertools import repeat, takewhile
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from policies.interface import RequestView
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.arrivals import Arrivals, Gaps, RateCurve
from viisim.workload.interface import (
    BLOCK_TOKENS,
    CHUNK_REQUESTS,
    DEFAULT_MAX_OUTPUT_TOKENS,
    Labels,
    chunk_sizes,
    is_own,
    own_block,
    own_segment,
)
from viisim.workload.lengths import LengthSpec, Tokens
from viisim.workload.prefixes import Library, Passages, Pieces, Prefixes, chained_blocks
from viisim.workload.presets import load_preset, resolve_lengths
from viisim.workload.request import Request

__all__ = ["Passages", "Prefixes", "Synthetic"]

Row: TypeAlias = tuple[int, float, int, int, int, bool, tuple[int, ...]]
"""Arrival (ns, s), prompt and output tokens, prefix group, streamed, passages."""
Content: TypeAlias = tuple[Pieces, tuple[int, ...], int]
"""A prompt's pieces, its prefix blocks, and the tokens of such a block."""


class Synthetic:
    """Requests drawn from distributions.

    Every quantity has its own stream (`arrivals`, `lengths`, `prefixes`, `passages`,
    `streamed`) and takes the same draws from it for each request, used or not. So request k
    depends neither on how many follow it nor on the chunk size, and a change of one parameter
    leaves everything else of all requests as it was.
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
        gaps: Gaps | None = None,
        rate_curve: RateCurve | None = None,
        prefixes: Prefixes | None = None,
        passages: Passages | None = None,
        labels: Labels | None = None,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
        chunk_requests: int = CHUNK_REQUESTS,
    ) -> None:
        """Raises InputError, naming the parameter, for an impossible value.

        Arrivals are Poisson without `gaps`. `rank_correlation` is Spearman's, between prompt
        and output lengths, before prefixes and passages lengthen prompts and the limit cuts
        long answers; equal lengths (a constant, a flat table) weaken it. `streamed` is the share
        of requests that want a stream.
        """
        self.total_requests = parameters.whole("requests", requests)
        self.arrivals = Arrivals(rate_per_s, gaps, rate_curve)
        self.arrivals.check_span(requests)
        self.rate_per_s = rate_per_s
        self.prompt_tokens = resolve_lengths("prompt_tokens", prompt_tokens)
        self.output_tokens = resolve_lengths("output_tokens", output_tokens)
        self.model = model
        self.rank_correlation = parameters.correlation("rank_correlation", rank_correlation)
        self.streamed = parameters.share("streamed", streamed)
        self.prefixes = prefixes
        self.passages = passages
        self.labels = labels or Labels()
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
        """The preset's lengths, rank correlation, prefixes and passages, and its rate unless
        another is given. Arrivals are Poisson unless `gaps` are given: a preset's own
        burstiness is on record (`Preset.interarrival_cv`), not applied."""
        preset = load_preset(name)
        known = {"prefixes": preset.prefixes, "passages": preset.passages}
        return cls(
            requests=requests,
            model=model,
            rate_per_s=preset.rate_per_s if rate_per_s is None else rate_per_s,
            prompt_tokens=preset.prompt_tokens,
            output_tokens=preset.output_tokens,
            rank_correlation=preset.rank_correlation,
            **(known | others),
        )

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`. Memory does not grow with the number of requests."""
        self.cut_outputs = 0
        return self._generate(Streams(seed))

    def _generate(self, streams: Streams) -> Iterator[Request]:
        library = None
        if self.passages is not None:
            library = Library(self.passages, streams["passage_lengths"])
        sizes = chunk_sizes(self.total_requests, self._chunk_requests)
        first = 0
        for arrived_ns in self.arrivals.chunks_ns(streams["arrivals"], sizes):
            count = len(arrived_ns)
            prompts, outputs = self._lengths(streams["lengths"], count)
            groups = self._prefix_groups(streams["prefixes"], count)
            streamed = streams["streamed"].random(count) < self.streamed
            if self.prefixes is not None:
                least = np.where(groups < 0, 0, self.prefixes.tokens + 1)
                prompts = np.maximum(prompts, least)
            columns = (arrived_ns, arrived_ns / 1e9, prompts, outputs, groups, streamed)
            passages: Iterable[tuple[int, ...]] = repeat((), count)
            if library is not None:
                passages = library.draw(streams["passages"], count)
            # Plain Python values from here on: reading numpy scalars one by one is far slower.
            rows = zip(*(column.tolist() for column in columns), passages, strict=True)
            yield from self._build(first, rows, library)
            first += count

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
        return self.prefixes.draw(stream.random((count, 2)))

    def _build(self, first: int, rows: Iterable[Row], library: Library | None) -> Iterator[Request]:
        model, limit, labels = self.model, self.max_output_tokens, self.labels
        priority, tenant, traffic_class = labels.priority, labels.tenant, labels.traffic_class
        due_s: float | None = None
        for index, row in enumerate(rows, first):
            ns, arrived_s, prompt, output, group, stream, passages = row
            if library is None:
                pieces, blocks, block_tokens = self._content(index, prompt, group)
            else:
                pieces = self._with_passages(index, prompt, group, passages, library)
                prompt = sum(tokens for _, tokens in pieces)
                blocks, block_tokens = _blocks(index, pieces, prompt), BLOCK_TOKENS
            if labels.deadline_s is not None:
                due_s = labels.due_s(arrived_s)
            # By position, with the defaults written out: half the cost of naming them.
            view = RequestView(
                f"r{index}", model, arrived_s, prompt, limit, stream,
                priority, tenant, traffic_class, due_s, blocks, block_tokens,
            )  # fmt: skip
            yield Request(view, ns, pieces, output)

    def _content(self, index: int, prompt: int, group: int) -> Content:
        """A prompt with perhaps a prefix, which the scheduler sees as one block."""
        own = own_segment(index)
        if self.prefixes is None:
            return ((own, prompt),), (), 0
        tokens = self.prefixes.tokens
        if group < 0:
            return ((own, prompt),), (), tokens
        pieces = ((self.prefixes.segment(group), tokens), (own, prompt - tokens))
        blocks = self.prefixes.blocks(group, tokens) if self.prefixes.name else (group,)
        return pieces, blocks, tokens

    def _with_passages(
        self, index: int, prompt: int, group: int, passages: tuple[int, ...], library: Library
    ) -> Pieces:
        """Prefix, the request's own first tokens, passages, and the rest of its own."""
        assert self.passages is not None, "there is a library only for passages"
        pieces: list[tuple[Hashable, int]] = []
        groups = 0
        if self.prefixes is not None:
            groups = self.prefixes.groups
            if group >= 0:
                pieces.append((self.prefixes.segment(group), self.prefixes.tokens))
                prompt -= self.prefixes.tokens
        # Its own tokens are cut in two segments; their numbers differ from all others'.
        ahead = min(self.passages.behind_own_tokens, prompt - 1)
        if ahead:
            pieces.append((own_segment(2 * index), ahead))
        pieces += [(groups + passage, library.tokens[passage]) for passage in passages]
        pieces.append((own_segment(2 * index + 1), prompt - ahead))
        return tuple(pieces)


def _blocks(index: int, pieces: Pieces, prompt: int) -> tuple[int, ...]:
    """Ids of a prompt's full blocks: chained as long as others may have them too."""
    shared = takewhile(lambda piece: not is_own(piece[0]), pieces)
    chained = chained_blocks(list(shared), BLOCK_TOKENS)
    own = range(own_block(index, len(chained)), own_block(index, prompt // BLOCK_TOKENS))
    return chained + tuple(own)
