"""The page that compares AIBrix's measured routing with the simulator's."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from policies.interface import Dispatch, Finished
from policies.testing import cluster, request
from viisim.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "validation_aibrix.md"


@pytest.fixture(scope="module")
def aibrix() -> ModuleType:
    path = ROOT / "experiments" / "validation" / "aibrix.py"
    spec = importlib.util.spec_from_file_location("validation_aibrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["validation_aibrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setups(aibrix: ModuleType, shared: Path) -> Any:
    path = shared / aibrix.DATA
    if not path.exists():
        pytest.skip(f"no {path}")
    return aibrix.read(path)


@pytest.fixture(scope="module")
def fitted(aibrix: ModuleType, setups: Any) -> Any:
    return aibrix.fit(setups)


def predicted_s(aibrix: ModuleType, setups: Any, fitted: Any, name: str, router: Any) -> float:
    """Mean time to first token of the calmest run, with one seed."""
    runs = {0.1: setups[name][0.1]}
    found = aibrix.predict(fitted, aibrix.profile_of(fitted), router, runs, seeds=[1])
    return float(found.mean(0.1, aibrix.ttft))


# --------------------------------------------------------------------------------------
# The measured runs


def test_data_that_are_absent_are_named(aibrix: ModuleType, tmp_path: Path):
    with pytest.raises(InputError, match=r"t\.csv\.gz: no such file; set VIISIM_SHARED"):
        aibrix.read(tmp_path / "t.csv.gz")


def test_every_set_up_was_asked_at_eleven_rates(setups: Any):
    assert {name: len(runs) for name, runs in setups.items()} == {
        "naive": 11,
        "aibrix_naive_7": 11,
        "ps_naive": 11,
    }


def test_simulated_prompts_are_as_long_as_measured_ones(aibrix: ModuleType, setups: Any):
    runs = setups["naive"]
    asked = [one.prompt_tokens for rate in sorted(runs) for one in runs[rate]]
    made = [one.view.prompt_tokens for one in aibrix.requests_of(runs, ring=1)]
    assert made[-len(asked) :] == asked


def test_the_fit_takes_nothing_from_runs_above_the_calm_ones(
    aibrix: ModuleType, setups: Any, fitted: Any
):
    calm = {
        name: {rate: run for rate, run in runs.items() if rate <= aibrix.CALM_PER_S}
        for name, runs in setups.items()
    }
    assert aibrix.fit(calm) == fitted


def test_the_page_shows_what_is_fitted_now(fitted: Any):
    page = PAGE.read_text(encoding="utf-8")
    for figure in (
        f"{fitted.hit_s * 1e3:.1f} ms",
        f"{fitted.miss_s * 1e3:.1f} ms",
        f"{fitted.token_s * 1e3:.2f} ms",
        f"{fitted.sequence_s * 1e3:.2f} ms",
    ):
        assert figure in page


def test_the_page_predicts_the_crossover_within_a_load_step():
    page = PAGE.read_text(encoding="utf-8")
    assert any(f"requests/s, {steps} load steps away" in page for steps in (0, 1))


# --------------------------------------------------------------------------------------
# The simulation of them


def test_a_calm_run_of_misses_is_given_back(aibrix: ModuleType, setups: Any, fitted: Any):
    everywhere = predicted_s(
        aibrix, setups, fitted, "naive", aibrix.BALANCERS["every request in turn"]
    )
    assert everywhere == pytest.approx(fitted.miss_s, rel=0.02)


def test_users_on_a_ring_find_prompts_that_the_warm_up_left(
    aibrix: ModuleType, setups: Any, fitted: Any
):
    seen = aibrix.ttft(aibrix.measured(setups["ps_naive"][0.1]))
    on_ring = predicted_s(aibrix, setups, fitted, "ps_naive", aibrix.BY_SESSION)
    assert on_ring == pytest.approx(seen, rel=0.15)


# --------------------------------------------------------------------------------------
# Connections that are kept alive


def place(policy: Any, name: str, now_s: float) -> str:
    """Where a request goes."""
    verdict = policy.place(request(id=name), cluster(now_s, r0=0, r1=0))
    assert isinstance(verdict, Dispatch)
    return verdict.replica_id


def finish(policy: Any, name: str, now_s: float) -> None:
    """The request is answered."""
    policy.observe(Finished(now_s, name, 1, 100), cluster(now_s, r0=0, r1=0))


def test_a_request_opens_a_connection_while_the_others_are_busy(aibrix: ModuleType):
    policy = aibrix.KeepAlive(in_turn=True)
    assert [place(policy, "a", 0.0), place(policy, "b", 1.0)] == ["r0", "r1"]


def test_a_request_takes_the_oldest_idle_connection(aibrix: ModuleType):
    policy = aibrix.KeepAlive(in_turn=True)
    place(policy, "a", 0.0)
    place(policy, "b", 0.0)
    finish(policy, "b", 1.0)
    finish(policy, "a", 2.0)
    assert place(policy, "c", 3.0) == "r0"


def test_a_connection_idle_for_too_long_is_closed(aibrix: ModuleType):
    policy = aibrix.KeepAlive(in_turn=True)
    place(policy, "a", 0.0)
    finish(policy, "a", 1.0)
    assert place(policy, "b", 1.0 + aibrix.IDLE_S) == "r1"


# --------------------------------------------------------------------------------------
# Where two curves cross


def test_curves_cross_where_a_straight_line_says(aibrix: ModuleType):
    found = aibrix.crossing([1.0, 2.0, 3.0], np.array([2.0, 2.0, 2.0]), np.array([1.0, 1.0, 3.0]))
    assert found == (2, 2.5)


def test_a_curve_that_starts_above_crosses_at_once(aibrix: ModuleType):
    assert aibrix.crossing([1.0, 2.0], np.array([1.0, 1.0]), np.array([2.0, 0.5])) == (0, 1.0)


def test_a_curve_that_stays_below_never_crosses(aibrix: ModuleType):
    assert aibrix.crossing([1.0, 2.0], np.array([1.0, 1.0]), np.array([0.5, 0.5])) is None
