"""The page that checks the project's premise, and the record that it gives back."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from viisim.config import load_experiment
from viisim.experiment import run_experiment
from viisim.plan import simulate_candidate
from viisim.premise import _tokens_by_second as tokens_by_second
from viisim.premise import bound_tokens_per_s, configuration, record_of, serve

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "experiments" / "premise" / "rx_9070_xt.yaml"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    path = ROOT / "experiments" / "premise" / "make.py"
    spec = importlib.util.spec_from_file_location("premise_make", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["premise_make"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_command_writes(make: ModuleType):
    assert (ROOT / "docs" / "premise.md").read_text(encoding="utf-8") == make.page()


def test_every_claim_has_a_verdict_of_three(make: ModuleType):
    verdicts = [claim.verdict for group in make.claims().values() for claim in group]
    assert len(verdicts) >= 40
    known = ("reproduced", "implausible", "not checkable")
    assert [text for text in verdicts if not text.startswith(known)] == []


def test_a_claim_above_the_bound_is_implausible(make: ModuleType):
    assert make.verdict(200, 50, 100) == "implausible: 2.0 times the bound"


def test_a_claim_near_the_prediction_is_reproduced(make: ModuleType):
    assert make.verdict(100, 80, 150, "why") == "reproduced; why"


# --------------------------------------------------------------------------------------
# The record


@pytest.mark.parametrize(
    ("field", "recorded"),
    [
        ("tokens_per_s", 248.12),
        ("peak_tokens_per_s", 325),
        ("tpot_s", 0.02294),
        ("ttft_s", 187.8726),
        ("active", 5.69),
    ],
)
def test_the_record_comes_back_within_five_percent(field: str, recorded: float):
    found = getattr(record_of(load_experiment(RECORD)), field)
    assert found == pytest.approx(recorded, rel=0.05)


def test_the_seconds_hold_every_token_of_the_run():
    counts = tokens_by_second(load_experiment(RECORD, ["workload.requests=30"]), 1)
    assert counts.sum() == 30 * 512


def test_the_stepped_clock_ends_with_the_simulation():
    experiment = load_experiment(RECORD, ["workload.requests=30"])
    record = record_of(experiment)
    seconds = len(tokens_by_second(experiment, 1))
    assert seconds == int(30 * 512 / record.tokens_per_s) + 1


# --------------------------------------------------------------------------------------
# The four configurations


@pytest.mark.parametrize("name", ["radeon_vii_x1", "radeon_vii_x4", "rtx_4090", "a100_40gb"])
def test_the_claimed_rate_is_a_light_load(name: str):
    experiment = load_experiment(RECORD.parent / f"{name}.yaml", ["seeds=[1]"])
    values = run_experiment(experiment).summary["values"]
    assert values["slo_attainment"]["mean"] == 1.0


# --------------------------------------------------------------------------------------
# Users and bounds


def test_the_bound_of_llama_2_7b_on_a_radeon_vii_is_bandwidth_over_weights():
    assert bound_tokens_per_s("llama-2-7b", "radeon_vii") == pytest.approx(76, rel=0.03)


def test_the_measured_bandwidth_lowers_the_bound():
    measured = bound_tokens_per_s("llama-2-7b", "radeon_vii", measured=True)
    assert measured == pytest.approx(63, rel=0.03)


def test_a_user_alone_stays_below_the_bound():
    served = serve(configuration("llama-2-7b", "radeon_vii"), 1, 256, 64)
    assert served.tokens_per_s < bound_tokens_per_s("llama-2-7b", "radeon_vii")


def test_users_ask_again_only_when_answered():
    from viisim.premise import ROUNDS, _questions

    candidate = configuration("llama-2-7b", "radeon_vii")
    rows = simulate_candidate(candidate, _questions(1, 64, 8)).requests
    assert len(rows["arrived_ns"]) == ROUNDS
    assert (rows["arrived_ns"][1:] >= rows["finished_ns"][:-1]).all()
