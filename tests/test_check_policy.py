"""`check_policy`: each clause catches the policy that breaks it, and says how to repair it."""

import gc
import importlib.util
import random
import sys
from functools import cache
from pathlib import Path

import pytest

from policies.check import Finding, check_policy, findings
from policies.interface import Dispatch, Hold, Launch, Policy, PolicyError, Preempt, Retire
from policies.least_loaded import LeastLoaded
from policies.registry import PolicySpecError

BAD_FILE = Path(__file__).with_name("bad_policies.py")
CLAUSES = {
    "deterministic",
    "own_generator",
    "no_clock",
    "relative_time",
    "valid_answers",
    "conservation",
    "outage",
    "no_kept_view",
}


def _bad_policies():
    spec = importlib.util.spec_from_file_location("bad_policies", BAD_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: kind for name, kind in vars(module).items() if getattr(kind, "breaks", "")}


BAD = _bad_policies()


@cache
def _findings(name):
    return findings(f"{BAD_FILE}:{name}")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_breaks_its_clause_and_no_other(name):
    assert {finding.clause for finding in _findings(name)} == {BAD[name].breaks}


@pytest.mark.parametrize("name", BAD)
def test_the_message_says_how_to_repair_it(name):
    assert BAD[name].repair in _findings(name)[0].message


def test_every_clause_has_its_bad_policy():
    assert {kind.breaks for kind in BAD.values()} == CLAUSES


def test_check_policy_raises_what_findings_lists():
    with pytest.raises(PolicyError, match=r"^no_clock: time.monotonic\(\) was called in choose"):
        check_policy(f"{BAD_FILE}:ReadsAClock")


class Batches(LeastLoaded):
    """Uses every door there is, properly: lanes, ranks, plan as a generator, all actions."""

    tick_s = 0.1
    preempts = True

    def __init__(self, *, slots: int = 3) -> None:
        self.slots = slots
        self.launched = 0
        self.most_queued = 0

    def lane(self, request):
        return request.model, request.priority

    def rank(self, request):
        return request.priority, request.arrived_s

    def next_lane(self, lanes, view):
        return min(lanes.items(), key=lambda item: (item[1].rank, len(item[1]), item[0]))[0]

    def place(self, request, view):
        ready = [r for r in view.ready(request.model) if r.inflight_requests < self.slots]
        if ready:
            return Dispatch(request.id, min(ready, key=lambda r: r.outstanding_tokens).id)
        return self.displace(request, view)

    def displace(self, request, view):
        for replica in view.ready(request.model):
            if replica.withdrawing_requests or request.priority > 0:
                continue
            for other in view.inflight(replica.id):
                if other.priority == 2 and not other.streamed:
                    return Preempt(other.id)
        return Hold()

    def plan(self, queue, view):
        if len(queue) > 6 and len(view.replicas) < 5:
            self.launched += 1
            yield Launch("alpha", (f"host/new{self.launched}",))
        if len(queue) == 0 and len(view.replicas) > 3:
            idle = [r for r in view.replicas if r.state == "ready" and not r.inflight_requests]
            yield from [Retire(r.id) for r in idle if r.id.startswith("alpha-")][:1]

    def observe(self, event, view):
        self.most_queued = max(self.most_queued, view.queued_requests)


def test_a_policy_that_uses_every_door_passes():
    assert findings(Batches) == []


def test_parameters_reach_the_policy_in_every_run():
    assert findings({"class": Batches, "slots": 1}) == []


def test_a_class_that_no_other_process_can_find_is_told_so():
    class Local(LeastLoaded):
        pass

    (finding,) = findings(Local)
    assert "at the top level of a file" in finding.message


def test_an_unknown_policy_is_an_error_rather_than_a_finding():
    with pytest.raises(PolicySpecError, match="Did you mean 'least_loaded'"):
        findings("least_load")


def test_what_was_watched_is_left_as_it_was():
    before = random.getstate(), sys.getprofile(), gc.isenabled()
    findings(LeastLoaded)
    assert (random.getstate(), sys.getprofile(), gc.isenabled()) == before


def test_a_finding_reads_as_clause_and_message():
    assert str(Finding("no_clock", "use view.now_s")) == "no_clock: use view.now_s"


def test_policies_are_abstract_until_they_place():
    class Unfinished(Policy):
        pass

    with pytest.raises(PolicySpecError, match="must define `place`"):
        findings(Unfinished)
