"""A new policy and its test, to start from: both work as they are."""

from __future__ import annotations

import keyword
import re
import sys
from string import Template

from policies.registry import POLICIES, PolicySpecError

_POLICY = Template('''\
"""State here, in a line, what this file is about."""

from policies.interface import ClusterView, Dispatch, Hold, Policy, RequestView, Verdict


class $cls(Policy):
    """Send each request to the ready replica with the fewest tokens, requests counted as well.

    `request_tokens`: how many tokens a request in flight counts for, besides its own.
    """

    def __init__(self, *, request_tokens: int = 0) -> None:
        if request_tokens < 0:
            raise ValueError(f"request_tokens is {request_tokens}: give 0 or more")
        self.request_tokens = request_tokens

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The lightest ready replica; ties go to the smaller id."""
        ready = view.ready(request.model)
        if not ready:
            return Hold()
        best = min(
            ready, key=lambda r: r.outstanding_tokens + self.request_tokens * r.inflight_requests
        )
        return Dispatch(request.id, best.id)
''')

_TEST = Template('''\
"""Tests of the policy in $name.py."""

from pathlib import Path

from policies.check import check_policy
from policies.interface import Dispatch, Hold
from policies.registry import policy_class
from policies.testing import cluster, request

$cls = policy_class(f"{Path(__file__).with_name('$name.py')}:$cls")


def test_picks_the_replica_with_the_fewest_tokens():
    assert $cls().place(request(), cluster(r0=300, r1=100)) == Dispatch("q", "r1")


def test_holds_while_no_replica_is_ready():
    assert $cls().place(request(), cluster()) == Hold()


def test_keeps_the_promises_of_a_policy():
    check_policy($cls)
''')


def scaffold(name: str) -> dict[str, str]:
    """The files of a new policy, by file name: its class and its tests.

    Raises PolicySpecError when the name cannot be a Python file's or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise PolicySpecError(
            f"{name!r} cannot name a policy: use small letters, digits and _, as in my_policy",
            "name",
        )
    if name in POLICIES or name in sys.stdlib_module_names or name in ("policies", "viisim"):
        raise PolicySpecError(f"{name!r} is taken: choose another name", "name")
    words = {"name": name, "cls": "".join(word.capitalize() for word in name.split("_"))}
    return {
        f"{name}.py": _POLICY.substitute(words),
        f"test_{name}.py": _TEST.substitute(words),
    }
