"""What an engine's steps were, one row a batch or train, and the sums and counts over them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from viisim.engine.step_time import StepTime
from viisim.records import ITL_EDGES_S

#: Rows kept before they are summed up; bounds memory, and lets numpy pay.
_ROWS = 1 << 14


class StepLog:
    """Totals over all steps and the distribution of inter-token latencies.

    A row is (decodes, late, context_tokens, prefill_tokens, step_ps, growth_ps, steps): `steps`
    steps, of `step_ps` and then `growth_ps` longer each time, with `decodes` decoding sequences
    attending to `context_tokens` tokens in the first of them; `late` of these had missed a step
    before, so that this step's duration is not their gap. Appending a row is all that happens
    per train; the arithmetic is done for many rows at once.
    """

    def __init__(self, step_time: StepTime) -> None:
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.steps = 0
        self.busy_ps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.extrapolated_steps = 0
        self.itl_counts: NDArray[np.int64] = np.zeros(len(ITL_EDGES_S) - 1, dtype=np.int64)
        """Gaps between consecutive tokens of a sequence, per bin of `ITL_EDGES_S`; gaps outside
        the edges count in the first or the last bin."""
        self._step_time = step_time

    def add_late_gap(self, gap_ps: int) -> None:
        """Count one gap that is longer than a step."""
        self._count_gaps(np.array([gap_ps]), np.array([1]))

    def fold_if_long(self) -> None:
        """Sum up the rows once there are many."""
        if len(self.rows) >= _ROWS:
            self.fold()

    def fold(self) -> None:
        """Sum up the rows."""
        if not self.rows:
            return
        table = np.array(self.rows, dtype=np.int64).T
        self.rows.clear()
        decodes, late, context_tokens, prefill_tokens, step_ps, growth_ps, steps = table
        self.steps += int(steps.sum())
        self.busy_ps += int((steps * step_ps + steps * (steps - 1) // 2 * growth_ps).sum())
        self.prefill_tokens += int(prefill_tokens.sum())
        self.decode_tokens += int((decodes * steps).sum())
        self.extrapolated_steps += self._step_time.extrapolated_steps(
            decodes, context_tokens, prefill_tokens, steps
        )
        row = np.repeat(np.arange(len(steps)), steps)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
        self._count_gaps(step_ps[row] + nth * growth_ps[row], (decodes - late)[row])

    def _count_gaps(self, gaps_ps: NDArray[np.int64], sequences: NDArray[np.int64]) -> None:
        bins = np.searchsorted(ITL_EDGES_S, gaps_ps * 1e-12, side="right") - 1
        np.clip(bins, 0, len(self.itl_counts) - 1, out=bins)
        counts = np.bincount(bins, weights=sequences, minlength=len(self.itl_counts))
        self.itl_counts += counts.astype(np.int64)
