"""Inter-token latencies, counted in bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from viisim.records import ITL_EDGES_S


class ItlHistogram:
    """Counts gaps between consecutive tokens of a sequence in the bins of `ITL_EDGES_S`.

    A train of decode steps gives gaps in arithmetic progression. Rows are collected and binned
    many at a time, which keeps the cost of a train at four appends.
    """

    _ROWS = 1 << 14

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(len(ITL_EDGES_S) - 1, dtype=np.int64)
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, sequences: int, first_ps: int, growth_ps: int, steps: int) -> None:
        """Count `steps` gaps first, first + growth, ... of each of `sequences` sequences."""
        self._rows.append((sequences, first_ps, growth_ps, steps))
        if len(self._rows) >= self._ROWS:
            self._flush()

    def counts(self) -> NDArray[np.int64]:
        """Gaps per bin. Gaps outside the edges fall into the first or the last bin."""
        self._flush()
        return self._counts.copy()

    def _flush(self) -> None:
        if not self._rows:
            return
        sequences, first, growth, steps = np.array(self._rows, dtype=np.int64).T
        self._rows.clear()
        row = np.repeat(np.arange(len(steps)), steps)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
        gaps_s = (first[row] + nth * growth[row]) * 1e-12
        bins = np.searchsorted(ITL_EDGES_S, gaps_s, side="right") - 1
        np.clip(bins, 0, len(self._counts) - 1, out=bins)
        self._counts += np.bincount(
            bins, weights=sequences[row], minlength=len(self._counts)
        ).astype(np.int64)
