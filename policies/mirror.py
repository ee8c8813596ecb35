"""A replica followed by arithmetic: what a scheduler can know of it between two events.

A `Mirror` holds who is in prefill and who decodes, and moves them on as if every engine step took
what the step model says: prompts one after the other in the order of their dispatch, one token a
step for everybody who decodes. First tokens and ends, which a driver reports, set it right. It
knows neither true output lengths nor the engine's queue.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.interface import RequestView, StepCosts
from policies.step_model import StepModel

CATCH_UP = 0.5
"""Share of its coming decode steps that a delayed stream may count on to catch up: prompts yet to
come take the rest."""
UNFORESEEN_SHARE = 0.25
"""Of the guessed answer: so much at least is taken to be left, however long it is already."""
LEAST_PREFILL_SHARE = 0.2
"""Of an engine's time; below it the estimate of a wait would be of no use."""


class Flight:
    """One request in flight, as its mirror sees it."""

    __slots__ = (
        "cached_tokens",
        "expected_tokens",
        "first_s",
        "joined",
        "left_share",
        "lost",
        "request",
        "tpot_slo_s",
    )

    def __init__(
        self, request: RequestView, cached_tokens: int, expected_tokens: float, tpot_slo_s: float
    ) -> None:
        self.request = request
        self.tpot_slo_s = tpot_slo_s
        self.expected_tokens = expected_tokens
        """Length of the answer, as guessed at dispatch."""
        self.cached_tokens = cached_tokens
        """What of the prompt need not be computed."""
        self.left_share = 1.0
        """What of the rest is still to be computed. A share, so that many small advances come to
        the same as one: a step is paid once."""
        self.first_s = 0.0
        """When the first token came; meaningless during prefill."""
        self.joined = 0.0
        """The mirror's `steps` at that moment."""
        self.lost = False
        """It missed its objective before it was sent: nothing can be taken from it any more."""


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """What it would cost to put a request on a replica; the smallest is the best."""

    misses: bool
    """Its first token would come too late."""
    harmed: int
    """Streams there that would end too slowly, and otherwise would not."""
    delay_s: float
    """Added for all together: those there, and the request itself."""
    backlog_s: float
    """Until the prompts there are computed."""
    replica_id: str


class Mirror:
    """One replica: prompts waiting or computed, and sequences that decode."""

    def __init__(self, costs: StepCosts, now_s: float) -> None:
        self.model = StepModel(costs)
        self.steps = 0.0
        """Decode steps so far: every decoding sequence gets one token in each."""
        self.prefills: dict[str, Flight] = {}
        self.decodes: dict[str, Flight] = {}
        self._at_s = now_s
        self._joined_context_tokens = 0.0
        self._booked_tokens = 0.0

    def __len__(self) -> int:
        return len(self.prefills) + len(self.decodes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.prefills or request_id in self.decodes

    @property
    def context_tokens(self) -> float:
        """What all decoding sequences attend to in a step."""
        return self._joined_context_tokens + self.steps * len(self.decodes)

    def generated_tokens(self, flight: Flight) -> float:
        """How much of its answer a decoding sequence has given so far."""
        return self.steps - flight.joined + 1

    def prefill_share(self) -> float:
        """Share of the time that prompts may take while those who decode keep up with their
        objectives, in the mean."""
        if not self.decodes:
            return 1.0
        tpot_slo_s = sum(flight.tpot_slo_s for flight in self.decodes.values()) / len(self.decodes)
        return max(1 - self._decode_step_s() / tpot_slo_s, LEAST_PREFILL_SHARE)

    def backlog_s(self) -> float:
        """Time until every prompt here is computed."""
        return sum(map(self._left_s, self.prefills.values()))

    def reserved_tokens(self) -> float:
        """KV tokens at the end of all that is here: prompts and guessed answers, and no less
        than what is here already."""
        return max(self._booked_tokens, self.context_tokens + self._queued_tokens())

    def foresee(
        self, replica_id: str, newcomer: Flight, now_s: float, due_s: float, slack_share: float
    ) -> Placement:
        """What it would cost to send `newcomer` here now, whose first token is due at `due_s`.

        Its prompt stalls everybody who decodes, and its decoding makes their steps longer.
        `slack_share`: how much of their slack it may use up before they count as harmed.
        """
        prompt_tokens, size = newcomer.request.prompt_tokens, len(self)
        stall_s = self._left_s(newcomer)
        context_tokens = self.context_tokens + self._queued_tokens()
        before_s = self.model.step_s(max(size, 1), context_tokens)
        after_s = self.model.step_s(size + 1, context_tokens + prompt_tokens)
        backlog_s = self.backlog_s()
        harmed, rest_tokens = self._strain(now_s + backlog_s, stall_s, after_s, slack_share)
        delay_s = len(self.decodes) * stall_s + rest_tokens * (after_s - before_s)
        delay_s += backlog_s + stall_s + newcomer.expected_tokens * after_s
        misses = now_s + backlog_s + stall_s > due_s
        return Placement(misses, harmed, delay_s, backlog_s, replica_id)

    def advance(self, now_s: float) -> None:
        """Move on to `now_s`; an earlier time changes nothing."""
        spare_s = now_s - self._at_s
        if spare_s <= 0:
            return
        self._at_s = now_s
        while self.prefills:
            flight = next(iter(self.prefills.values()))
            needed_s = self._left_s(flight)
            steps = self._left_steps(flight)
            if needed_s > spare_s:
                share = spare_s / needed_s
                flight.left_share *= 1 - share
                self.steps += steps * share
                return
            spare_s -= needed_s
            self.steps += steps
            self._join(flight, now_s - spare_s)
        if self.decodes:
            self.steps += spare_s / self._decode_step_s()

    def add(self, flight: Flight) -> None:
        """A request was sent here."""
        self.prefills[flight.request.id] = flight
        self._booked_tokens += _booked(flight)

    def first_token(self, request_id: str, now_s: float) -> None:
        """Its first token has come now, whatever the mirror thought."""
        flight = self.decodes.pop(request_id, None)
        if flight is not None:
            self._joined_context_tokens -= _joined_context(flight)
        else:
            flight = self.prefills.get(request_id)
        if flight is not None:
            self._join(flight, now_s)

    def remove(self, request_id: str) -> Flight | None:
        """It has left; None if it was never here."""
        flight = self.prefills.pop(request_id, None)
        if flight is None:
            flight = self.decodes.pop(request_id, None)
            if flight is not None:
                self._joined_context_tokens -= _joined_context(flight)
        if flight is not None:
            self._booked_tokens -= _booked(flight)
        return flight

    def _join(self, flight: Flight, now_s: float) -> None:
        self.prefills.pop(flight.request.id, None)
        flight.left_share = 0.0
        flight.first_s = now_s
        flight.joined = self.steps
        self._joined_context_tokens += _joined_context(flight)
        self.decodes[flight.request.id] = flight

    def _strain(
        self, from_s: float, stall_s: float, step_s: float, slack_share: float
    ) -> tuple[int, float]:
        """How many streams a stall at `from_s` harms, and the tokens that all of them still give.

        A stream may be late by what it has not used of its objective's time so far, and by what
        it is going to gain with steps of `step_s`. One loop and no calls in it: this is most of
        what a decision costs.
        """
        harmed, all_rest_tokens, steps = 0, 0.0, self.steps + 1
        for flight in self.decodes.values():
            given_tokens, expected_tokens = steps - flight.joined, flight.expected_tokens
            rest_tokens = expected_tokens - given_tokens
            least_tokens = UNFORESEEN_SHARE * expected_tokens
            if rest_tokens < least_tokens:
                rest_tokens = least_tokens
            all_rest_tokens += rest_tokens
            if flight.lost:
                continue
            tpot_s = flight.tpot_slo_s
            budget_s = tpot_s * (given_tokens - 1)
            if tpot_s > step_s:
                budget_s += CATCH_UP * rest_tokens * (tpot_s - step_s)
            unspent_s = budget_s * slack_share - (from_s - flight.first_s)
            if 0 <= unspent_s < stall_s:
                harmed += 1
        return harmed, all_rest_tokens

    def _queued_tokens(self) -> int:
        """The whole prompts of those in prefill."""
        return sum(flight.request.prompt_tokens for flight in self.prefills.values())

    def _decode_step_s(self) -> float:
        """A step without prefill."""
        return self.model.step_s(len(self.decodes), self.context_tokens)

    def _left_s(self, flight: Flight) -> float:
        cached_tokens = flight.cached_tokens
        own_tokens = flight.request.prompt_tokens - cached_tokens
        decodes = len(self.decodes)
        return flight.left_share * self.model.prefill_s(
            own_tokens, cached_tokens, decodes, self.context_tokens
        )

    def _left_steps(self, flight: Flight) -> float:
        own_tokens = flight.request.prompt_tokens - flight.cached_tokens
        return flight.left_share * self.model.prefill_steps(own_tokens, len(self.decodes))


def _joined_context(flight: Flight) -> float:
    """Its context less the steps of the mirror, which count for all."""
    return flight.request.prompt_tokens + 1 - flight.joined


def _booked(flight: Flight) -> float:
    return flight.request.prompt_tokens + flight.expected_tokens
