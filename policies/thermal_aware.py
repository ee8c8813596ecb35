"""Fewest outstanding tokens, and long prompts to the cool cards."""

from policies.interface import (
    ClusterView,
    Dispatch,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)

THROTTLED_PREFILL = 1725 / 930
"""Factor on the time of prefill on a throttled card: a passive MI50 at 100 C went from 1,725 to
930 MHz."""
STALE_S = 30.0
"""A temperature older than this is unknown: a card heats up in about a minute."""


class ThermalAware(Policy):
    """Take the fewest outstanding tokens, counting prompts up to 1.85-fold on hot cards.

    Heat costs prefill and hardly decode, which waits for memory: capping a gfx906 card from 225
    to 150 W left the time between tokens unchanged and prefill 19 % slower. So a prompt counts as
    many tokens more as a throttled card would need longer for it: from nothing at `soft_c` to all
    of it at `hard_c`, in proportion. Long prompts go to cool cards, short ones wherever there is
    least to do.

    A replica at `hard_c` or above, in degrees Celsius at its hottest card, is taken only when all
    are. Temperatures are gauges, as old as `age_s`; one that is unknown, or older than 30 s,
    counts as cool, so that without telemetry this is `least_loaded`.
    """

    def __init__(self, *, soft_c: float = 90.0, hard_c: float = 100.0) -> None:
        if not all(isinstance(limit, (int, float)) for limit in (soft_c, hard_c)):
            raise ValueError(f"soft_c is {soft_c!r} and hard_c {hard_c!r}: give degrees Celsius")
        if not soft_c < hard_c:
            raise ValueError(f"soft_c is {soft_c!r}: give less than hard_c, {hard_c!r}")
        self.soft_c = soft_c
        self.hard_c = hard_c

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The least load with the heat counted in; ties go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        best = min(ready, key=lambda replica: self._load(replica, request.prompt_tokens))
        return Dispatch(request.id, best.id)

    def _load(self, replica: ReplicaView, prompt_tokens: int) -> tuple[bool, float]:
        """Whether it is too hot, and its tokens."""
        heat = self._heat(replica)
        slower_tokens = heat * (THROTTLED_PREFILL - 1) * prompt_tokens
        return heat >= 1, replica.outstanding_tokens + slower_tokens

    def _heat(self, replica: ReplicaView) -> float:
        """0 up to `soft_c`, 1 from `hard_c`."""
        temperature_c = replica.temperature_c
        if temperature_c is None or temperature_c <= self.soft_c or replica.age_s > STALE_S:
            return 0.0
        return min((temperature_c - self.soft_c) / (self.hard_c - self.soft_c), 1.0)
