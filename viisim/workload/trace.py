"""Replay of recorded traces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.random import Generator

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.interface import CHUNK_REQUESTS, DEFAULT_MAX_OUTPUT_TOKENS, own_segment
from viisim.workload.request import Request
from viisim.workload.trace_file import Column, read_trace

Pieces: TypeAlias = tuple[tuple[int, int], ...]

_LONGEST_SPAN_NS = 2**62


class TraceReplay:
    """The requests of a trace file, at its own times or stretched.

    Azure prompts are all different. A Mooncake prompt is one piece per hash id, so prompts share
    what the trace says they share, and the scheduler sees the ids as `prefix_blocks`. Only the
    share of streamed requests depends on the seed (stream `streamed`).
    """

    def __init__(
        self,
        *,
        path: str | Path,
        model: str,
        time_scale: float = 1.0,
        limit: int | None = None,
        streamed: float = 1.0,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
    ) -> None:
        """Reads the file. Raises InputError, naming the parameter or the file and line.

        The first arrival becomes 0 and every gap is multiplied by `time_scale`: 2.0 is twice as
        slow, half the rate. `limit` keeps the earliest requests only. `max_output_tokens` is the
        limit that every request states, whatever its recorded answer (a limit made from the
        answer would tell the scheduler its length): longer answers are cut to it. A recorded
        answer of 0 tokens becomes 1, the least an engine generates.
        """
        self.path = Path(path)
        self.model = model
        self.time_scale = parameters.positive("time_scale", time_scale)
        self.limit = None if limit is None else parameters.whole("limit", limit)
        self.streamed = parameters.share("streamed", streamed)
        self.max_output_tokens = parameters.whole("max_output_tokens", max_output_tokens)
        self._columns = read_trace(path)
        kept = slice(self.limit)
        self._arrived_ns = self._stretched(self._columns.arrived_ns[kept])
        outputs = self._columns.output_tokens[kept]
        self._outputs = np.clip(outputs, 1, self.max_output_tokens)
        self.total_requests = len(outputs)
        self.cut_outputs = int(np.count_nonzero(outputs > self.max_output_tokens))
        """Answers cut to the limit."""
        self.zero_outputs = int(np.count_nonzero(outputs == 0))
        """Answers recorded with 0 tokens and replayed with 1."""

    def _stretched(self, arrived_ns: Column) -> Column:
        if self.time_scale == 1:
            return arrived_ns
        if int(arrived_ns[-1]) * self.time_scale > _LONGEST_SPAN_NS:
            raise InputError(f"time_scale: {self.time_scale!r} makes the trace outlast a century")
        stretched: Column = np.rint(arrived_ns * self.time_scale).astype(np.int64)
        return stretched

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`."""
        return self._generate(Streams(seed)["streamed"])

    def _generate(self, stream: Generator) -> Iterator[Request]:
        for first in range(0, self.total_requests, CHUNK_REQUESTS):
            chunk = slice(first, min(first + CHUNK_REQUESTS, self.total_requests))
            arrived_ns = self._arrived_ns[chunk]
            columns = (
                arrived_ns,
                arrived_ns / 1e9,
                self._columns.prompt_tokens[chunk],
                self._outputs[chunk],
                stream.random(len(arrived_ns)) < self.streamed,
            )
            # Plain Python values from here on: reading numpy scalars one by one is far slower.
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for index, (ns, arrived_s, prompt, output, streamed) in enumerate(rows, first):
                blocks = self._columns.blocks(index)
                view = RequestView(
                    f"r{index}",
                    self.model,
                    arrived_s,
                    prompt,
                    self.max_output_tokens,
                    streamed,
                    prefix_blocks=tuple(blocks),
                    prefix_block_tokens=self._columns.block_tokens,
                )
                yield Request(view, ns, self._pieces(index, prompt, blocks), output)

    def _pieces(self, index: int, prompt_tokens: int, blocks: list[int]) -> Pieces:
        """A prompt without hash ids is the request's own; otherwise a piece is a block."""
        if not blocks:
            return ((own_segment(index), prompt_tokens),)
        block_tokens, whole_blocks = self._columns.block_tokens, len(blocks) - 1
        tail = (blocks[-1], prompt_tokens - whole_blocks * block_tokens)
        return (*zip(blocks, repeat(block_tokens, whole_blocks), strict=False), tail)
