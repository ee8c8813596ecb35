"""Fairness between tenants by virtual token counters."""

from collections.abc import Hashable, Mapping

from policies.interface import (
    Cancelled,
    ClusterView,
    Dispatch,
    Event,
    Failed,
    Finished,
    Hold,
    LaneView,
    Policy,
    RequestView,
    Verdict,
)
from policies.slots import checked_max_inflight, lightest, with_slot

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class Vtc(Policy):
    """Hold requests while replicas are full; the tenant that got the least service goes first.

    Virtual Token Counter: Y. Sheng et al., "Fairness in Serving Large Language Models", OSDI
    2024 (arXiv 2401.00588). A tenant's counter rises by 1 per prompt token at admission and by 2
    per decoded token. A tenant with nothing queued is lifted, when it comes back, to the smallest
    counter of those being served, so that absence saves up no credit.

    Outside the engine, decoded tokens are known when an answer ends. With a length predictor the
    guess is charged at dispatch and put right at the end; without one, answers in flight are not
    counted yet, and the paper's bound on the tenants' difference grows by them: the smaller
    `max_inflight` (as in `policies.slots.with_slot`), the tighter. Tenants of one model compete;
    the counters of another are its own. While the head of the least served tenant finds no slot,
    nobody else of the model passes it.
    """

    def __init__(self, *, max_inflight: int | None = None) -> None:
        self._max_inflight = checked_max_inflight(max_inflight)
        self._counters: dict[Hashable, float] = {}
        """Service by lane."""
        self._floors: dict[str, float] = {}
        """By model, the counter of whoever was served last, before that was charged: no queued
        tenant's counter is smaller."""
        self._charged: dict[str, tuple[Hashable, float, float]] = {}
        """Of a request in flight: its lane, and what its prompt and its guess were charged."""
        self._full: dict[str, None] = {}
        """Models of which a request was held since the last event."""

    def lane(self, request: RequestView) -> Hashable:
        """A lane per model and tenant."""
        return request.model, request.tenant

    def next_lane(self, lanes: Mapping[Hashable, LaneView], view: ClusterView) -> Hashable:
        """The smallest counter; ties by arrival."""
        return min(
            lanes.values(), key=lambda lane: (self._counter(lane.head), lane.head.arrived_s)
        ).key

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The lightest replica with a free slot."""
        if request.model in self._full:
            return Hold()
        free = with_slot(request, view.ready(request.model), self._max_inflight)
        if not free:
            self._full[request.model] = None
            return Hold()
        self._charge(request)
        return Dispatch(request.id, lightest(free).id)

    def observe(self, event: Event, view: ClusterView) -> None:
        """Settle the accounts of an attempt that ended."""
        self._full.clear()
        if isinstance(event, (Finished, Failed, Cancelled)) and event.attempt:
            charged = self._charged.pop(event.request_id, None)
            if charged is not None:
                lane, prompt, guess = charged
                self._counters[lane] += _correction(event, prompt, guess)

    def _counter(self, request: RequestView) -> float:
        floor = self._floors.get(request.model, 0.0)
        return max(self._counters.get(self.lane(request), 0.0), floor)

    def _charge(self, request: RequestView) -> None:
        lane, counter = self.lane(request), self._counter(request)
        self._floors[request.model] = counter
        prompt = PROMPT_WEIGHT * request.prompt_tokens
        guess = OUTPUT_WEIGHT * (request.predicted_output_tokens or 0)
        self._counters[lane] = counter + prompt + guess
        self._charged[request.id] = (lane, prompt, guess)


def _correction(event: Finished | Failed | Cancelled, prompt: float, guess: float) -> float:
    """What the end of an attempt changes: a failed one was no service, and is charged again when
    it is repeated; of one that its client left, the answer is unknown."""
    if isinstance(event, Finished):
        return OUTPUT_WEIGHT * event.output_tokens - guess
    return -prompt - guess if isinstance(event, Failed) else -guess
