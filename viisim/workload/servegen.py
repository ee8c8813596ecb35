"""Workloads composed client by client, from the pools of ServeGen.

ServeGen (Alibaba, "Workload Characterization and Generation of Large Language Model Serving in
Production", 2025) describes each client of a production service; see
`viisim.workload.servegen_pool` for what a pool holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

import numpy as np
from numpy.random import Generator

from policies.interface import RequestView
from viisim.errors import InputError
from viisim.streams import Streams
from viisim.workload import parameters
from viisim.workload.arrivals import Times
from viisim.workload.interface import DEFAULT_MAX_OUTPUT_TOKENS, Labels, own_segment
from viisim.workload.request import Request
from viisim.workload.servegen_pool import ClientWindow, read_pool

Row: TypeAlias = tuple[int, int, int, int, bool]
"""Arrival (ns), client, prompt and output tokens, streamed."""
Planned: TypeAlias = tuple[int, ClientWindow, int]
"""A client, one of its windows, and how many requests it sends there."""

_SERVEGEN = crc32(b"servegen")
_ARRIVALS, _LENGTHS = 0, 1
_GOLDEN = (math.sqrt(5) - 1) / 2
_MOST_REQUESTS = 10**9


class ServeGen:
    """The requests of a pool's clients, each a tenant (`client-7`) with its own process.

    A client sends in each of its windows as many requests as its rate says (fractions are
    carried on), and their gaps, drawn from the window's family with its cv, are stretched to
    fill the window: rate and cv were measured on windows and are reproduced on windows.
    Prompt and output lengths are drawn independently, for a pool does not tell how they go
    together. Clients without published lengths are left out, with their requests: `left_out`.
    Each client and window has a generator of its own.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        model: str,
        start_s: float = 0.0,
        duration_s: float = 3600.0,
        rate_scale: float = 1.0,
        rate_per_s: float | None = None,
        limit: int | None = None,
        streamed: float = 1.0,
        labels: Labels | None = None,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
    ) -> None:
        """Reads the file. Raises InputError, naming the parameter or the file.

        Served is the part of the day from `start_s` on, which becomes time 0. `rate_scale`
        multiplies all rates; `rate_per_s` does so that this is the mean over all that is served.
        `limit` keeps the earliest requests only. A tenant in `labels` precedes the clients':
        `acme/client-7`.
        """
        self.path = Path(path)
        self.model = model
        self.pool = read_pool(path)
        self.left_out = self.pool.left_out
        self.start_s = start_s
        self.duration_s = parameters.positive("duration_s", duration_s)
        self.streamed = parameters.share("streamed", streamed)
        self.labels = labels or Labels()
        self.max_output_tokens = parameters.whole("max_output_tokens", max_output_tokens)
        self.limit = None if limit is None else parameters.whole("limit", limit)
        served = {c: self._served(windows) for c, windows in self.pool.clients.items()}
        expected = sum(w.rate_per_s * w.width_s for windows in served.values() for w in windows)
        if not (start_s >= 0 and expected > 0):
            raise InputError(f"start_s: no client of {path} sends from {start_s!r} s on; correct")
        parameters.positive("rate_scale", rate_scale)
        if rate_per_s is not None:
            rate_scale = parameters.positive("rate_per_s", rate_per_s) * duration_s / expected
        if expected * rate_scale > _MOST_REQUESTS:
            raise InputError(f"duration_s: {expected * rate_scale:.1e} requests are too many")
        self.rate_scale = rate_scale
        self._plan = _planned(served, rate_scale)
        total = sum(count for _, _, count in self._plan)
        if not total:
            raise InputError("rate_scale: not one request comes of it; raise it or duration_s")
        self.total_requests = total if limit is None else min(total, limit)
        self.cut_outputs = 0
        """Answers cut to the limit by the last call of `requests`, as far as it has come."""

    def _served(self, windows: tuple[ClientWindow, ...]) -> list[ClientWindow]:
        """The parts of the windows inside the time that is served."""
        end_s = self.start_s + self.duration_s
        kept = []
        for window in windows:
            start_s = max(window.start_s, self.start_s)
            width_s = min(window.start_s + window.width_s, end_s) - start_s
            if width_s > 0:
                kept.append(replace(window, start_s=start_s - self.start_s, width_s=width_s))
        return kept

    def requests(self, seed: int) -> Iterator[Request]:
        """See `Workload.requests`."""
        self.cut_outputs = 0
        Streams(seed)  # refuses a negative seed at once
        rows = islice(self._rows(seed), self.total_requests)
        return (self._request(index, *row) for index, row in enumerate(rows))

    def _rows(self, seed: int) -> Iterator[Row]:
        """In order of arrival. Windows lie on one grid, so those of one start end together."""
        for _, group in groupby(self._plan, key=_start_s):
            rows = [row for part in group for row in self._window_rows(seed, *part)]
            yield from sorted(rows, key=itemgetter(0))

    def _window_rows(
        self, seed: int, client: int, window: ClientWindow, count: int
    ) -> Iterator[Row]:
        stream = self._stream(seed, client, window, _LENGTHS)
        normals, uniforms = stream.standard_normal((count, 2)), stream.random(count)
        outputs = window.output_tokens.tokens(normals[:, 1])
        columns = (
            _arrivals(window, count, self._stream(seed, client, window, _ARRIVALS)),
            np.full(count, client),
            window.prompt_tokens.tokens(normals[:, 0]),
            outputs,
            uniforms < self.streamed,
        )
        return zip(*(column.tolist() for column in columns), strict=True)

    def _stream(self, seed: int, client: int, window: ClientWindow, what: int) -> Generator:
        at = round((self.start_s + window.start_s) * 1e3)
        return Generator(
            np.random.PCG64(np.random.SeedSequence([seed, _SERVEGEN, client, at, what]))
        )

    def _request(
        self, index: int, ns: int, client: int, prompt: int, output: int, streamed: bool
    ) -> Request:
        if output > self.max_output_tokens:
            self.cut_outputs += 1
            output = self.max_output_tokens
        labels = self.labels
        view = RequestView(
            id=f"r{index}",
            model=self.model,
            arrived_s=ns / 1e9,
            prompt_tokens=prompt,
            max_output_tokens=self.max_output_tokens,
            streamed=streamed,
            priority=labels.priority,
            tenant=f"{labels.tenant}/client-{client}" if labels.tenant else f"client-{client}",
            traffic_class=labels.traffic_class,
            deadline_s=labels.due_s(ns / 1e9),
        )
        return Request(view, ns, ((own_segment(index), prompt),), output)


def _planned(served: Mapping[int, Sequence[ClientWindow]], rate_scale: float) -> list[Planned]:
    """The windows in order of time, each with its number of requests.

    A client sends its n-th request when it has accumulated n, less a fraction of its own: by
    the golden ratio, which spreads the fractions of any number of clients evenly. So clients
    too slow for one request are still represented in the sum of all.
    """
    plan: list[Planned] = []
    for client, windows in served.items():
        due = (client + 1) * _GOLDEN % 1
        for window in windows:
            due += window.rate_per_s * window.width_s * rate_scale
            plan.append((client, window, int(due)))
            due %= 1
    return sorted(plan, key=_start_s)


def _start_s(planned: Planned) -> float:
    return planned[1].start_s


def _arrivals(window: ClientWindow, count: int, stream: Generator) -> Times:
    """`count` arrivals; the last gap ends with the window."""
    into = np.cumsum(window.gaps.spacing(stream, count + 1))[:-1]
    times: Times = np.rint((window.start_s + into * window.width_s) * 1e9).astype(np.int64)
    return times
