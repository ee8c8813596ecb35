"""One deliberately bad policy for each clause of `check_policy`, and some for each way to break it.

The name of the clause that each breaks is its `breaks`; `repair` is a word of the message.
"""

import random
import time
from contextlib import suppress
from datetime import datetime

import numpy as np

from policies.interface import Dispatch, Hold, Launch, Policy, Preempt, Shed
from policies.least_loaded import LeastLoaded


class Chooser(Policy):
    """Dispatches to the ready replica that `choose` picks."""

    breaks = repair = ""

    def place(self, request, view):
        ready = view.ready(request.model)
        return Dispatch(request.id, self.choose(ready, request, view).id) if ready else Hold()

    def choose(self, ready, request, view):
        return ready[0]


class WalksThroughASet(Chooser):
    breaks, repair = "deterministic", "sort first"

    def choose(self, ready, request, view):
        return view.replica(next(iter({replica.id for replica in ready})))


class SeedsItself(Chooser):
    breaks, repair = "deterministic", "self.rng"

    def choose(self, ready, request, view):
        return ready[np.random.default_rng().integers(len(ready))]


class RemembersInItsClass(Chooser):
    breaks, repair = "deterministic", "not in the class"
    seen = set()  # noqa: RUF012 - bad on purpose

    def choose(self, ready, request, view):
        known = request.id in self.seen
        self.seen.add(request.id)
        return ready[-1] if known else ready[0]


class UsesTheGlobalGenerator(Chooser):
    breaks, repair = "own_generator", "self.rng"

    def choose(self, ready, request, view):
        return random.choice(ready)


class UsesNumpysGlobalGenerator(Chooser):
    breaks, repair = "own_generator", "self.rng"

    def choose(self, ready, request, view):
        return ready[np.random.randint(len(ready))]  # noqa: NPY002 - bad on purpose


class ReadsAClock(Chooser):
    breaks, repair = "no_clock", "view.now_s"

    def choose(self, ready, request, view):
        return ready[int(time.monotonic()) % len(ready)]


class AsksForToday(Chooser):
    breaks, repair = "no_clock", "view.now_s"

    def choose(self, ready, request, view):
        return ready[datetime.now().hour % len(ready)]


class KnowsWhatTimeItIs(Chooser):
    breaks, repair = "relative_time", "differences of times"

    def choose(self, ready, request, view):
        return ready[view.now_s > 1000 and len(ready) > 1]


class AnswersAWord(Chooser):
    breaks, repair = "valid_answers", "answer Dispatch, Hold, Shed or Preempt"

    def place(self, request, view):
        return "r0"


class SendsToTheWrongModel(Chooser):
    breaks, repair = "valid_answers", "the replica serves"

    def place(self, request, view):
        return Dispatch(request.id, view.replicas[0].id)


class SendsToNobody(Chooser):
    breaks, repair = "valid_answers", "Did you mean 'r0'?"

    def place(self, request, view):
        return Dispatch(request.id, "r00")


class Raises(Chooser):
    breaks, repair = "valid_answers", "in choose, line"

    def choose(self, ready, request, view):
        return ready[7]


class PreemptsUnannounced(Chooser):
    breaks, repair = "valid_answers", "set `preempts = True`"

    def place(self, request, view):
        victim = next(view.inflight(view.replicas[0].id), None)
        return Preempt(victim.id) if victim else super().place(request, view)


class LaunchesOnUsedDevices(LeastLoaded):
    breaks, repair = "valid_answers", "belongs to replica"
    tick_s = 1.0

    def plan(self, queue, view):
        return [Launch("alpha", view.replicas[0].devices)]


class PlansNothingAtAll(LeastLoaded):
    breaks, repair = "valid_answers", "an iterable of actions"
    tick_s = 1.0

    def plan(self, queue, view):
        return None


class PlansAllTheTime(LeastLoaded):
    breaks, repair = "valid_answers", "a positive number of seconds"
    tick_s = 0


class WritesToItsView(Chooser):
    breaks, repair = "valid_answers", "read-only"

    def choose(self, ready, request, view):
        ready[0].outstanding_tokens = 0
        return ready[0]


class ReachesBehindItsView(Chooser):
    breaks, repair = "valid_answers", "ReplicaView has no `failures`"

    def choose(self, ready, request, view):
        return min(ready, key=lambda replica: replica.failures)


class SwallowsWhatItBreaks(Chooser):
    breaks, repair = "valid_answers", "read-only"

    def choose(self, ready, request, view):
        with suppress(Exception):
            ready[0].running = 0
        return ready[0]


class HoldsForEver(Chooser):
    breaks, repair = "conservation", "answer Dispatch or Shed"

    def place(self, request, view):
        return Hold() if request.prompt_tokens > 2900 else super().place(request, view)


class NeedsAReplica(Policy):
    breaks, repair = "outage", "answer Hold()"

    def place(self, request, view):
        return Dispatch(request.id, view.ready(request.model)[0].id)


class SulksAfterAnOutage(Chooser):
    breaks, repair = "outage", "answer Dispatch or Shed"
    hurt = False

    def place(self, request, view):
        self.hurt |= not view.replicas
        return Hold() if self.hurt else super().place(request, view)


class KeepsItsView(Chooser):
    breaks, repair = "no_kept_view", "keep the values you need"
    view = None

    def rank(self, request):
        return self.view.queued_requests if self.view else 0

    def choose(self, ready, request, view):
        self.view = view
        return ready[0]


class KeepsAReplica(Chooser):
    breaks, repair = "no_kept_view", "keep the values you need"
    last = None

    def choose(self, ready, request, view):
        last, self.last = self.last, ready[0]
        return ready[0] if last is None or last.inflight_requests else ready[-1]


class KeepsALane(Chooser):
    breaks, repair = "no_kept_view", "keep the values you need"
    lanes = None

    def next_lane(self, lanes, view):
        self.lanes = lanes
        return super().next_lane(lanes, view)

    def place(self, request, view):
        if self.lanes:
            return Shed(request.id, "too many lanes")
        if all(replica.inflight_requests for replica in view.ready(request.model)):
            return Hold()
        return super().place(request, view)


class KeepsTheQueue(LeastLoaded):
    breaks, repair = "no_kept_view", "keep the values you need"
    tick_s = 1.0
    queue = ()

    def plan(self, queue, view):
        self.queue = queue
        return ()

    def rank(self, request):
        return len(self.queue)
