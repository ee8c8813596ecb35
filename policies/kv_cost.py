"""The cost of prefill and decode on each replica, as in Dynamo's KV router."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from math import exp, isfinite

from policies.interface import (
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Hold,
    Policy,
    ReplicaChanged,
    ReplicaView,
    RequestView,
    Verdict,
)
from policies.prefix import PrefixIndex

RULES = ("dynamo", "lmetric")


class KvCost(Policy):
    """Take the replica with the least prefill to compute plus blocks to decode (Dynamo).

    The cost of NVIDIA Dynamo's KV router, in KV blocks: the prompts being prefilled there, plus
    this one less what is believed to be cached, plus the blocks of all that is in flight. A
    prompt is being prefilled until its first token, or the end of an answer that is not
    streamed.

    `rule`: `dynamo`, that sum; or `lmetric`, the product of prefill and decode blocks + 1.
    `temperature`: 0 takes the least cost; above, replicas are drawn with probability
    proportional to exp(-cost / temperature), which spreads equal guesses.
    """

    def __init__(self, *, rule: str = "dynamo", temperature: float = 0.0) -> None:
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}: give one of {', '.join(RULES)}")
        number = isinstance(temperature, (int, float)) and isfinite(temperature)
        if not (number and temperature >= 0):
            raise ValueError(f"temperature is {temperature!r}: give 0 or more KV blocks")
        self.rule = rule
        self.temperature = temperature
        self._index = PrefixIndex()
        self._prefilling: dict[str, tuple[str, int]] = {}
        """Of each request before its first token, its replica and uncached prompt tokens."""
        self._prefill_tokens: Counter[str] = Counter()
        """Their sum per replica."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Ties of the least cost go to fewer outstanding tokens, then to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        chosen = self._choose(request, ready)
        self._note_prefill(request, chosen)
        self._index.dispatched(request, chosen)
        return Dispatch(request.id, chosen.id)

    def _choose(self, request: RequestView, ready: Sequence[ReplicaView]) -> ReplicaView:
        if len(ready) == 1:
            return ready[0]
        costs = [self._cost_blocks(request, replica) for replica in ready]
        if self.temperature:
            return ready[self._draw(costs)]
        best = min(range(len(ready)), key=lambda n: (costs[n], ready[n].outstanding_tokens))
        return ready[best]

    def _cost_blocks(self, request: RequestView, replica: ReplicaView) -> float:
        cached_tokens = self._index.matched_tokens(replica.id, request)
        active_tokens = self._prefill_tokens[replica.id]
        prefill = (active_tokens + request.prompt_tokens - cached_tokens) / replica.block_tokens
        decode = replica.outstanding_tokens / replica.block_tokens
        return prefill + decode if self.rule == "dynamo" else prefill * (decode + 1)

    def _draw(self, costs: Sequence[float]) -> int:
        least = min(costs)  # taken off, so that no exponential underflows for all of them
        heights = list(accumulate(exp((least - cost) / self.temperature) for cost in costs))
        return min(bisect_right(heights, self.rng.random() * heights[-1]), len(costs) - 1)

    def observe(self, event: Event, view: ClusterView) -> None:
        """Follow which prompts are still being prefilled, and which caches are lost."""
        if isinstance(event, (FirstToken, Finished, Failed)) or (
            isinstance(event, Cancelled) and event.attempt
        ):
            self._forget_prefill(event.request_id)
        elif isinstance(event, ReplicaChanged):
            self._index.observe(event)

    def _note_prefill(self, request: RequestView, replica: ReplicaView) -> None:
        self._forget_prefill(request.id)  # a replay may ask twice about one request
        tokens = request.prompt_tokens - self._index.matched_tokens(replica.id, request)
        self._prefilling[request.id] = replica.id, tokens
        self._prefill_tokens[replica.id] += tokens

    def _forget_prefill(self, request_id: str) -> None:
        noted = self._prefilling.pop(request_id, None)
        if noted is None:
            return
        replica_id, tokens = noted
        self._prefill_tokens[replica_id] -= tokens
