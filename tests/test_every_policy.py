"""Every shipped policy keeps the promises of `check_policy`, and reads like the others."""

import numpy as np
import pytest

from policies.check import check_policy
from policies.interface import Dispatch, Hold, Policy
from policies.registry import make_policy, policy_class, policy_names
from policies.testing import cluster, request


def _seeded(name: str) -> Policy:
    policy = make_policy(name)
    policy.rng = np.random.default_rng(0)
    return policy


@pytest.mark.parametrize("name", policy_names())
def test_keeps_every_clause(name):
    check_policy(name)


@pytest.mark.parametrize("name", policy_names())
def test_holds_while_no_replica_is_ready(name):
    assert _seeded(name).place(request(), cluster()) == Hold()


@pytest.mark.parametrize("name", policy_names())
def test_takes_the_only_replica(name):
    verdict = _seeded(name).place(request(), cluster(r7=10))
    assert isinstance(verdict, Dispatch)
    assert verdict.replica_id == "r7"


@pytest.mark.parametrize("name", policy_names())
def test_states_its_rule_in_the_first_line(name):
    first = (policy_class(name).__doc__ or "").splitlines()[0]
    assert first.endswith(".")
    assert len(first) < 100


@pytest.mark.parametrize("name", policy_names())
def test_lives_in_the_file_of_its_name(name):
    assert policy_class(name).__module__ == f"policies.{name}"
