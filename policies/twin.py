"""Ask a model of every replica what a placement would cost, and when to wait for a better one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import Any, NamedTuple

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
    Shed,
    Verdict,
)
from policies.mirror import Flight, Mirror, Placement
from policies.predictor import History
from policies.prefix import PrefixIndex

LATE_SLACK_SHARE = 0.7
"""Of a stream's slack: so much a request that is late anyway may use up."""
SHORT_BACKLOG_SHARE = 0.1
"""Of the tightest TTFT objective: a replica with less of prompts to compute is given more, so that
it stays busy, and who has least time is not behind what was bound too early."""
USABLE_KV_SHARE = 0.95
"""Of the KV blocks: so many may be filled by prompts and guessed answers."""
NEW_ANSWER_TOKENS = 256
"""The guess before any answer of the kind was seen."""
EXAMINED = 8
"""Of more replicas than that, those with the fewest outstanding tokens are asked about, and the
one with the longest prefix: the cost of a decision stays flat."""
MOST_CREDIT = 3.0
"""Dispatches that the late lane can save up."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a client should see."""

    ttft_s: float
    tpot_s: float


class Waiting(NamedTuple):
    """A queued request that can be served in time."""

    prompt_s: float
    """What its prompt takes where it is fastest."""
    turn_s: float
    """Those of an earlier one go first."""


class Twin(Policy):
    """Place where a step-time model foresees the fewest missed objectives, then the least delay.

    A mirror of each replica (`policies.mirror`) is kept from what any scheduler sees: its own
    dispatches, first tokens, ends, and the step costs of the replica's profile. It tells when
    a request's first token would come there, and which of the streams there would miss their
    time per output token by the stall of its prompt and by the larger batch.

    - Bound late: while every placement harms a stream, queues behind prompts or finds no room in
      KV, the request is held, until its own objective is at risk. An idle replica always serves.
    - Those who can still be served in time go first, by latest start: `deadline_s` or the TTFT
      objective, less the prompt's own time. Who cannot, at arrival, goes to a lane apart. It is
      served when that harms nobody, and at least `late_share` of the dispatches are its own, by
      arrival, so that nobody starves. With `shed_late` it is refused (`late`) instead, unless
      a replica is idle.
    - A level of `priority` counts as `aging_s` of waiting.

    Answers are expected to be as long as predicted, or as the mean of their tenant and class so
    far. Objectives are the operator's: `ttft_slo_s` and `tpot_slo_s`, and in `classes` others by
    traffic class, `{batch: {ttft_slo_s: 60}}`. Where step costs are unknown, the fewest
    outstanding tokens decide and nothing is held.
    """

    def __init__(
        self,
        *,
        ttft_slo_s: float = 5.0,
        tpot_slo_s: float = 0.1,
        classes: Mapping[str, Mapping[str, float]] | None = None,
        late_share: float = 0.02,
        shed_late: bool = False,
        aging_s: float = 30.0,
    ) -> None:
        general = {"ttft_slo_s": ttft_slo_s, "tpot_slo_s": tpot_slo_s}
        self._general = _objective("", general, {})
        self._classes = {
            name: _objective(f"classes.{name}.", general, given)
            for name, given in (classes or {}).items()
        }
        self._tightest_ttft_s = min(
            each.ttft_s for each in (self._general, *self._classes.values())
        )
        if not (_is_number(late_share) and 0 < late_share <= 1):
            raise ValueError(f"late_share is {late_share!r}: give a share above 0, up to 1")
        if not (_is_number(aging_s) and aging_s >= 0):
            raise ValueError(f"aging_s is {aging_s!r}: give seconds, 0 to ignore priorities")
        if not isinstance(shed_late, bool):
            raise ValueError(f"shed_late is {shed_late!r}: give true or false")
        self._late_share, self._shed_late, self._aging_s = late_share, shed_late, aging_s
        self._credit = 0.0
        """Dispatches that the late lane has earned."""
        self._mirrors: dict[str, dict[str, Mirror]] = {}
        """By model and replica."""
        self._where: dict[str, Mirror] = {}
        self._on_time: dict[str, Waiting] = {}
        """Queued requests that can be served in time."""
        self._late: dict[str, None] = {}
        """Queued requests that cannot, in order of arrival."""
        self._history = History()
        self._prefixes = PrefixIndex()

    # -- the queue --

    def lane(self, request: RequestView) -> Hashable:
        """By model, with those who are late apart."""
        if request.id not in self._on_time and request.id not in self._late:
            self._sort_in(request)
        return request.model, request.id in self._late

    def rank(self, request: RequestView) -> Any:
        """Those on time before the late ones, by latest start; these by arrival."""
        if request.id in self._late:
            return True, request.arrived_s + request.priority * self._aging_s
        waiting = self._on_time.get(request.id)
        return False, self._turn_s(request, 0.0) if waiting is None else waiting.turn_s

    def _turn_s(self, request: RequestView, prompt_s: float) -> float:
        """Its latest start, as far as its priority lets that count."""
        return self._due_s(request) - prompt_s + request.priority * self._aging_s

    def _sort_in(self, request: RequestView) -> None:
        """Late: it could not even start in time behind those in prefill and those on time that
        go first."""
        mirrors = self._mirrors.get(request.model, {})
        prompts_s = [self._prompt_s(request, *item) for item in mirrors.items()]
        fastest_s = min(prompts_s, default=0.0)
        turn_s = self._turn_s(request, fastest_s)
        first = (other.prompt_s for other in self._on_time.values() if other.turn_s <= turn_s)
        ahead_s, capacity, soonest_s, own_s = sum(first), 0.0, inf, inf
        for mirror, prompt_s in zip(mirrors.values(), prompts_s, strict=True):
            mirror.advance(request.arrived_s)
            share = mirror.prefill_share()
            speed, backlog_s = (fastest_s or 1.0) / (prompt_s or 1.0), mirror.backlog_s()
            ahead_s += backlog_s * speed
            capacity += share * speed
            soonest_s = min(soonest_s, backlog_s / share)
            own_s = min(own_s, prompt_s / share)
        wait_s = max(soonest_s, ahead_s / capacity) + own_s if prompts_s else 0.0
        if request.arrived_s + wait_s > self._due_s(request):
            self._late[request.id] = None
        else:
            self._on_time[request.id] = Waiting(fastest_s, turn_s)

    def _prompt_s(self, request: RequestView, replica_id: str, mirror: Mirror) -> float:
        """Time that the replica alone would take for the prompt."""
        cached_tokens = self._cached_tokens(request, replica_id)
        return mirror.model.prefill_s(request.prompt_tokens - cached_tokens, cached_tokens)

    def _objective(self, request: RequestView) -> Objective:
        return self._classes.get(request.traffic_class, self._general)

    def _due_s(self, request: RequestView) -> float:
        """When the first token should have come."""
        due_s = request.arrived_s + self._objective(request).ttft_s
        return due_s if request.deadline_s is None else min(due_s, request.deadline_s)

    # -- placement --

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The best replica, if now is the time; `Hold` otherwise."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        if not all(replica.step_costs.decode_sequences for replica in ready):
            self._forget_queued(request.id)
            lightest = min(ready, key=lambda replica: replica.outstanding_tokens)
            return Dispatch(request.id, lightest.id)
        best = self._best(request, ready, view)
        if self._shed_late and request.id in self._late and _all_busy(ready):
            self._forget_queued(request.id)
            return Shed(request.id, "late")
        if best is None or not self._is_time(request, best, view):
            return Hold()
        self._settle(request, best, view)
        return Dispatch(request.id, best.replica_id)

    def _best(
        self, request: RequestView, ready: Sequence[ReplicaView], view: ClusterView
    ) -> Placement | None:
        """None while no replica has room."""
        due_s = self._due_s(request)
        slack_share = LATE_SLACK_SHARE if request.id in self._late else 1.0
        expected_tokens = self._expected_tokens(request)
        placements = []
        for replica in self._candidates(request, ready):
            mirror = self._mirror(replica, view)
            flight = self._flight(request, replica.id, expected_tokens)
            if _has_room(replica, mirror, flight):
                placements.append(
                    mirror.foresee(replica.id, flight, view.now_s, due_s, slack_share)
                )
        return min(placements, default=None)

    def _candidates(
        self, request: RequestView, ready: Sequence[ReplicaView]
    ) -> Sequence[ReplicaView]:
        if len(ready) <= EXAMINED:
            return ready
        chosen = nsmallest(EXAMINED, ready, key=lambda replica: replica.outstanding_tokens)
        holder, _ = self._prefixes.best(ready, request.prefix_blocks)
        return chosen if holder is None or holder in chosen else [*chosen, holder]

    def _is_time(self, request: RequestView, best: Placement, view: ClusterView) -> bool:
        """Whether holding on would gain nothing."""
        if not view.replica(best.replica_id).inflight_requests:
            return True
        is_short = best.backlog_s <= SHORT_BACKLOG_SHARE * self._tightest_ttft_s
        if request.id in self._late:
            return (is_short and self._credit >= 1) or not (best.harmed or best.backlog_s)
        return best.misses or (is_short and not best.harmed)

    def _settle(self, request: RequestView, best: Placement, view: ClusterView) -> None:
        """Note the dispatch."""
        late = request.id in self._late
        if late and (best.harmed or best.backlog_s):
            self._credit -= 1
        elif not late:
            self._credit = min(self._credit + self._late_share, MOST_CREDIT)
        self._forget_queued(request.id)
        flight = self._flight(request, best.replica_id, self._expected_tokens(request))
        flight.lost = late or best.misses
        self._prefixes.dispatched(request, view.replica(best.replica_id))
        self._put(self._mirrors[request.model][best.replica_id], flight)

    def _flight(self, request: RequestView, replica_id: str, expected_tokens: float) -> Flight:
        cached_tokens = self._cached_tokens(request, replica_id)
        return Flight(request, cached_tokens, expected_tokens, self._objective(request).tpot_s)

    def _expected_tokens(self, request: RequestView) -> float:
        """How long the answer will probably be."""
        guess = request.predicted_output_tokens
        if guess is None:
            guess = self._history.predict(request).predicted_output_tokens
        return min(NEW_ANSWER_TOKENS, request.max_output_tokens) if guess is None else guess

    def _cached_tokens(self, request: RequestView, replica_id: str) -> int:
        """What of the prompt is believed to be there; its last token is always computed."""
        return min(self._prefixes.matched_tokens(replica_id, request), request.prompt_tokens - 1)

    # -- mirrors --

    def _mirror(self, replica: ReplicaView, view: ClusterView) -> Mirror:
        """The replica's mirror as of now, with those in it who are in flight there."""
        mirrors = self._mirrors.setdefault(replica.model, {})
        mirror = mirrors.get(replica.id)
        if mirror is None:
            mirror = mirrors[replica.id] = Mirror(replica.step_costs, view.now_s)
        mirror.advance(view.now_s)
        if len(mirror) != replica.inflight_requests:
            self._repair(mirror, replica.id, view)
        return mirror

    def _repair(self, mirror: Mirror, replica_id: str, view: ClusterView) -> None:
        """Others may have dispatched: a journal replayed, or whoever ran before."""
        there = {request.id: request for request in view.inflight(replica_id)}
        for request_id in [*mirror.prefills, *mirror.decodes]:
            if request_id not in there:
                mirror.remove(request_id)
        for request_id, request in there.items():
            if request_id not in mirror:
                expected_tokens = self._expected_tokens(request)
                self._put(mirror, self._flight(request, replica_id, expected_tokens))

    def _put(self, mirror: Mirror, flight: Flight) -> None:
        mirror.add(flight)
        self._where[flight.request.id] = mirror

    # -- what happens --

    def observe(self, event: Event, view: ClusterView) -> None:
        """Set the mirrors right by what really happened."""
        if isinstance(event, FirstToken):
            mirror = self._where.get(event.request_id)
            if mirror is not None:
                mirror.advance(event.now_s)
                mirror.first_token(event.request_id, event.now_s)
        elif isinstance(event, (Finished, Failed, Cancelled)):
            self._on_end(event)
        elif isinstance(event, ReplicaChanged):
            for mirrors in self._mirrors.values():
                mirrors.pop(event.replica_id, None)  # made anew when it is asked about
            self._prefixes.observe(event)
        if len(self._on_time) + len(self._late) > view.queued_requests + 1:
            self._forget_shed(view)

    def _on_end(self, event: Finished | Failed | Cancelled) -> None:
        if event.attempt == 0:
            return  # the client left; its attempt, if any, has still to end
        mirror = self._where.pop(event.request_id, None)
        if mirror is None:
            return
        mirror.advance(event.now_s)
        flight = mirror.remove(event.request_id)
        if flight is not None and isinstance(event, Finished):
            self._history.observe(flight.request, event.output_tokens)

    def _forget_queued(self, request_id: str) -> None:
        self._on_time.pop(request_id, None)
        self._late.pop(request_id, None)

    def _forget_shed(self, view: ClusterView) -> None:
        """Those that the core refused on its own: no event tells."""
        for request_id in [*self._on_time, *self._late]:
            try:
                view.request(request_id)
            except KeyError:
                self._forget_queued(request_id)


def _all_busy(ready: Sequence[ReplicaView]) -> bool:
    return all(replica.inflight_requests for replica in ready)


def _has_room(replica: ReplicaView, mirror: Mirror, newcomer: Flight) -> bool:
    """Whether neither seats nor KV would run out; an idle replica has all it will ever have."""
    if not replica.inflight_requests:
        return True
    if 0 < replica.max_num_seqs <= replica.inflight_requests:
        return False
    tokens = mirror.reserved_tokens() + newcomer.request.prompt_tokens + newcomer.expected_tokens
    room_tokens = replica.kv_blocks * replica.block_tokens
    return not room_tokens or tokens <= USABLE_KV_SHARE * room_tokens


def _objective(where: str, general: Mapping[str, Any], given: Any) -> Objective:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where[:-1]} is {given!r}: give {{ttft_slo_s: ..., tpot_slo_s: ...}}")
    merged = {**general, **given}
    for name, value in merged.items():
        if name not in ("ttft_slo_s", "tpot_slo_s"):
            raise ValueError(f"{where}{name} is unknown: give ttft_slo_s and tpot_slo_s")
        if not (_is_number(value) and value > 0):
            raise ValueError(f"{where}{name} is {value!r}: give a number of seconds above 0")
    return Objective(merged["ttft_slo_s"], merged["tpot_slo_s"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
