"""`SchedulerCore` under random scripts of events: the invariants hold at every instant."""

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    Cancelled,
    Dispatch,
    Failed,
    Finished,
    FirstToken,
    Hold,
    Limits,
    Policy,
    Preempt,
    ReplicaChanged,
    Shed,
    Tick,
)
from policies.state import IN_FLIGHT, QUEUED, WITHDRAWING
from policies.testing import request

REPLICAS = ("r0", "r1", "r2")
MODELS = {"r0": "a", "r1": "a", "r2": "b"}

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["arrive"] * 4
            + ["finish"] * 3
            + ["first token", "fail", "abort", "client leaves", "stale", "tick"]
            + ["ready", "draining", "gone"]
        ),
        st.integers(0, 1000),
    ),
    max_size=80,
)


class Impatient(Policy):
    """Two slots a replica; the urgent displace the others; each class is a lane."""

    preempts = True
    tick_s = 3.0

    def lane(self, request):
        return request.model, request.priority

    def place(self, request, view):
        for replica in view.ready(request.model):
            if replica.inflight_requests < 2:
                return Dispatch(request.id, replica.id)
        if request.priority == 0:
            for replica in view.ready(request.model):
                for other in view.inflight(replica.id):
                    if other.priority and not other.streamed and not replica.withdrawing_requests:
                        return Preempt(other.id)
        return Hold()

    def plan(self, queue, view):
        waiting = list(queue)
        if len(waiting) > 5:
            yield Shed(waiting[-1].id, "too many")


class Player:
    """Turns a random script into events that a driver could report, and checks after each."""

    def __init__(self) -> None:
        limits = Limits(max_queued=8, queue_timeout_s=20.0, eject_after=2, eject_s=4.0)
        self.core = SchedulerCore(Impatient(), limits=limits)
        self.now_s = 0.0
        self.arrived = 0
        self.running: dict[str, Dispatch] = {}
        self.preempted_now: list[str] = []

    def play(self, step: str, choice: int) -> None:
        self.now_s += choice % 4
        timer_s = self.core.next_timer_s()
        while timer_s is not None and timer_s <= self.now_s:
            self.report(Tick(max(timer_s, self.core._view.now_s)))
            timer_s = self.core.next_timer_s()
        event = self.event(step, choice)
        if event is not None:
            self.report(event)

    def event(self, step, choice):
        now_s, replica_id = self.now_s, REPLICAS[choice % 3]
        if step == "arrive":
            self.arrived += 1
            return Arrived(now_s, self.request(choice))
        if step == "tick":
            return Tick(now_s)
        if step in ("ready", "draining", "gone"):
            return ReplicaChanged(now_s, replica_id, step, MODELS[replica_id])
        if not self.running:
            return None
        attempt = list(self.running.values())[choice % len(self.running)]
        which = (now_s, attempt.request_id, attempt.attempt)
        if step == "first token":
            streamed = self.core._view.request(attempt.request_id).streamed
            return FirstToken(*which) if streamed else None
        if step == "client leaves":
            return Cancelled(now_s, attempt.request_id, 0)
        if step == "stale":
            return Finished(now_s, attempt.request_id, attempt.attempt + 1, 5)
        del self.running[attempt.request_id]
        if step == "finish":
            return Finished(*which, 5)
        return Cancelled(*which) if step == "abort" else Failed(*which, "broken", choice % 2 == 0)

    def request(self, choice):
        return request(
            id=f"q{self.arrived}",
            model="b" if choice % 5 == 0 else "a",
            arrived_s=self.now_s,
            prompt_tokens=1 + choice,
            priority=choice % 3,
            streamed=choice % 2 == 0,
            deadline_s=self.now_s + choice % 30 if choice % 7 == 0 else None,
        )

    def report(self, event) -> None:
        actions = self.core.handle(event)
        for action in actions:
            if isinstance(action, Dispatch):
                self.running[action.request_id] = action
        preempted = [action.request_id for action in actions if isinstance(action, Preempt)]
        assert len(preempted) == len(set(preempted)), "I10: at most one preemption an event"
        self.check()

    def check(self) -> None:
        core, counts = self.core, self.core.counts
        ended = counts["finished"] + counts["shed"] + counts["cancelled"]
        assert counts["arrived"] == self.arrived
        assert self.arrived == ended + core.queued_requests + core.inflight_requests, "I1"
        assert core.inflight_requests == len(self.running)
        states = [entry.state for entry in core._entries.values()]
        assert states.count(QUEUED) == core.queued_requests == sum(map(len, core._lanes.values()))
        assert all(len(lane) for lane in core._lanes.values())
        for replica in core._view.replicas:
            entries = replica.inflight.values()
            assert {entry.state for entry in entries} <= {IN_FLIGHT, WITHDRAWING}
            assert replica.inflight_requests == len(entries)
            assert replica.outstanding_tokens == sum(e.view.expected_tokens for e in entries)
            withdrawing = [entry for entry in entries if entry.state == WITHDRAWING]
            assert replica.withdrawing_requests == len(withdrawing)
        timer_s = core.next_timer_s()
        assert timer_s is None or timer_s == core.next_timer_s()

    def drain(self) -> None:
        """Bring everything back and answer everything."""
        for replica_id in REPLICAS:
            self.report(ReplicaChanged(self.now_s, replica_id, "ready", MODELS[replica_id]))
        for choice in range(0, 4000, 4):
            if not (self.core.queued_requests or self.core.inflight_requests):
                return
            self.now_s += 1
            self.play("finish", choice)


def played(script) -> Player:
    player = Player()
    for replica_id in REPLICAS:
        player.report(ReplicaChanged(0.0, replica_id, "ready", MODELS[replica_id]))
    for step, choice in script:
        player.play(step, choice)
    return player


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_invariants_hold_after_every_event(script):
    played(script)


@given(STEPS)
@settings(max_examples=75, deadline=None)
def test_everything_ends_and_every_token_is_released(script):
    player = played(script)
    player.drain()
    core = player.core
    assert (core.queued_requests, core.inflight_requests) == (0, 0)
    assert all(replica.outstanding_tokens == 0 for replica in core._view.replicas)


@given(STEPS)
@settings(max_examples=75, deadline=None)
def test_no_timer_that_is_due_stays_after_its_tick(script):
    player = played(script)
    now_s = player.now_s + 100
    player.report(Tick(now_s))
    timer_s = player.core.next_timer_s()
    assert timer_s is None or timer_s > now_s


@given(STEPS)
@settings(max_examples=50, deadline=None)
def test_equal_scripts_give_equal_counts(script):
    """Invariant I7, in one process: the rest is the journal's."""
    assert played(script).core.counts == played(script).core.counts
