"""A weighted sum of scores, as in llm-d."""

from collections.abc import Sequence

from policies.interface import (
    ClusterView,
    Dispatch,
    Event,
    Hold,
    Policy,
    ReplicaView,
    RequestView,
    Verdict,
)
from policies.prefix import PrefixIndex


class Weighted(Policy):
    """Take the highest weighted sum of the scores for prefix, queue and KV room (llm-d).

    The scorers of llm-d's inference scheduler, each from 0 to 1: the share of the prompt's
    blocks that the replica is believed to hold; (max - q) / (max - min) of the engines' waiting
    requests q, 1 for all while they are equal; and 1 - KV usage. Queue and KV are gauges, as
    old as the last scrape: between scrapes only the prefix score sees what was just sent.

    `prefix`, `queue`, `kv`: the weights, 0 or more, one of them above 0; defaults as in llm-d.
    """

    def __init__(self, *, prefix: float = 3.0, queue: float = 2.0, kv: float = 2.0) -> None:
        weights = {"prefix": prefix, "queue": queue, "kv": kv}
        for name, value in weights.items():
            if not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name} is {value!r}: give a weight of 0 or more")
        if not any(weights.values()):
            raise ValueError("all weights are 0: give prefix, queue or kv a weight above 0")
        self.prefix, self.queue, self.kv = prefix, queue, kv
        self._index = PrefixIndex()

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties go to fewer outstanding tokens (llm-d: at random), then to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        scores = self._scores(request, ready)
        best = min(range(len(ready)), key=lambda n: (-scores[n], ready[n].outstanding_tokens))
        chosen = ready[best]
        self._index.dispatched(request, chosen)
        return Dispatch(request.id, chosen.id)

    def _scores(self, request: RequestView, ready: Sequence[ReplicaView]) -> list[float]:
        blocks = request.prefix_blocks
        waiting = [replica.waiting for replica in ready]
        most, least = max(waiting), min(waiting)
        scores = []
        for replica in ready:
            known = self._index.matched(replica.id, blocks) / len(blocks) if blocks else 0.0
            quiet = (most - replica.waiting) / (most - least) if most > least else 1.0
            scores.append(
                self.prefix * known + self.queue * quiet + self.kv * (1 - replica.kv_usage)
            )
        return scores

    def observe(self, event: Event, view: ClusterView) -> None:
        """A replica that is gone has lost its cache."""
        self._index.observe(event)
