"""What an engine's steps were, one row a batch or train, and the sums and counts over them."""

from __future__ import annotations

from struct import Struct

import numpy as np
from numpy.typing import NDArray

from viisim.engine.step_time import PS_PER_S, StepTime
from viisim.records import ITL_EDGES_S

_ROW = Struct("=7q")
#: Rows kept before they are summed up; bounds memory, and lets numpy pay.
_ROWS = 1 << 14
#: Whole picoseconds, so that the last bit of a floating-point edge decides nothing.
_EDGES_PS = np.round(ITL_EDGES_S * PS_PER_S).astype(np.int64)


class StepLog:
    """Totals over all steps and the distribution of inter-token latencies.

    A row is (decodes, late, context_tokens, prefill_tokens, step_ps, growth_ps, steps): `steps`
    steps, of `step_ps` and then `growth_ps` longer each time, with `decodes` decoding sequences
    attending to `context_tokens` tokens in the first of them; `late` of these had missed a step
    before, so that this step's duration is not their gap. Noting a row, `add(pack(...))`, is
    all that happens per train; the arithmetic is done for many rows at once.
    """

    pack = _ROW.pack

    def __init__(self, step_time: StepTime) -> None:
        self._rows = bytearray()
        self.add = self._rows.extend
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
        self._count(np.array([gap_ps]), np.array([1]))

    def fold_if_long(self) -> None:
        """Sum up the rows once there are many."""
        if len(self._rows) >= _ROWS * _ROW.size:
            self.fold()

    def fold(self) -> None:
        """Sum up the rows."""
        if not self._rows:
            return
        table = np.frombuffer(bytes(self._rows), dtype=np.int64).reshape(-1, 7).T
        self._rows.clear()
        decodes, late, context_tokens, prefill_tokens, step_ps, growth_ps, steps = table
        self.steps += int(steps.sum())
        self.busy_ps += int((steps * step_ps + steps * (steps - 1) // 2 * growth_ps).sum())
        self.prefill_tokens += int(prefill_tokens.sum())
        self.decode_tokens += int((decodes * steps).sum())
        self.extrapolated_steps += self._step_time.extrapolated_steps(
            decodes, context_tokens, prefill_tokens, steps
        )
        self._count_trains(decodes - late, step_ps, growth_ps, steps)

    def _count_trains(
        self,
        sequences: NDArray[np.int64],
        step_ps: NDArray[np.int64],
        growth_ps: NDArray[np.int64],
        steps: NDArray[np.int64],
    ) -> None:
        """Count the gaps of whole trains: most keep to one bin, the others are spread out."""
        first = _bins(step_ps)
        in_one_bin = first == _bins(step_ps + (steps - 1) * growth_ps)
        self._add(first[in_one_bin], (sequences * steps)[in_one_bin])
        rows = np.flatnonzero(~in_one_bin)
        steps = steps[rows]
        row = np.repeat(rows, steps)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
        self._count(step_ps[row] + nth * growth_ps[row], sequences[row])

    def _count(self, gaps_ps: NDArray[np.int64], sequences: NDArray[np.int64]) -> None:
        self._add(_bins(gaps_ps), sequences)

    def _add(self, bins: NDArray[np.int64], gaps: NDArray[np.int64]) -> None:
        counts = np.bincount(bins, weights=gaps, minlength=len(self.itl_counts))
        self.itl_counts += counts.astype(np.int64)


def _bins(gaps_ps: NDArray[np.int64]) -> NDArray[np.int64]:
    bins = np.searchsorted(_EDGES_PS, gaps_ps, side="right") - 1
    return np.clip(bins, 0, len(_EDGES_PS) - 2)
