"""Policies by name, by class and by file; and the scaffold of a new one."""

import pickle
import re
import runpy
import sys
from pathlib import Path

import pytest

import policies
from policies.least_kv import LeastKv
from policies.least_loaded import LeastLoaded
from policies.registry import PolicySpecError, make_policy, policy_class, policy_names
from policies.scaffold import scaffold

OWN = """
from policies.interface import Dispatch, Hold, Policy

class Own(Policy):
    def __init__(self, limit, *, slots=4):
        if slots < 1:
            raise ValueError("slots: give at least 1")
        self.limit, self.slots = limit, slots

    def place(self, request, view):
        return Hold()

class Other: ...

class Unfinished(Policy): ...
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def refusal(spec, folder=None):
    with pytest.raises(PolicySpecError) as caught:
        make_policy(spec, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_lists_every_policy_that_has_a_file():
    files = (Path(policies.__file__).parent).glob("*.py")
    defining = {
        file.stem for file in files if re.search(r"^class \w+\(Policy\):", file.read_text(), re.M)
    }
    assert policy_names() == sorted(defining)


@pytest.mark.parametrize(
    "spec",
    ["least_loaded", "policies.least_loaded:LeastLoaded", LeastLoaded, {"name": "least_loaded"}],
)
def test_a_name_a_place_and_a_class_name_the_same_policy(spec):
    assert type(make_policy(spec)) is LeastLoaded


def test_parameters_go_to_the_constructor():
    policy = make_policy({"name": "least_kv", "hold_above": 0.9})
    assert isinstance(policy, LeastKv)
    assert policy.hold_above == 0.9


def test_a_policy_is_loaded_from_a_file_relative_to_a_folder(own):
    assert make_policy({"class": "own.py:Own", "limit": 3}, own).limit == 3


def test_a_file_that_is_not_in_the_folder_is_looked_up_here(own, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(own)
    elsewhere = tmp_path_factory.mktemp("experiments")
    assert make_policy({"class": "own.py:Own", "limit": 3}, elsewhere).limit == 3


def test_a_file_is_loaded_once_while_it_stays_the_same(own):
    assert policy_class("own.py:Own", own) is policy_class(f"{own}/own.py:Own")


def test_an_edited_file_is_loaded_anew(own):
    before = policy_class("own.py:Own", own)
    (own / "own.py").write_text(OWN.replace("slots=4", "slots=5"))
    assert policy_class("own.py:Own", own) is not before


def test_a_policy_from_a_file_can_be_pickled(own):
    policy = make_policy({"class": "own.py:Own", "limit": 3}, own)
    assert pickle.loads(pickle.dumps(policy)).limit == 3


@pytest.mark.parametrize(
    ("spec", "message", "key"),
    [
        ("least_load", "unknown policy 'least_load'. Did you mean 'least_loaded'?", "name"),
        ("zzz", "unknown policy 'zzz'. Known: cache_aware, ", "name"),
        ({"name": None}, "unknown policy None", "name"),
        ({}, "give a policy either `name`", ""),
        ({"name": "random", "class": "a:B"}, "not both", ""),
        ({"name": "least_kv", "hold_abov": 1}, "Did you mean 'hold_above'?", "hold_abov"),
        ({"name": "random", "seed": 1}, "Random has no parameter 'seed'. It has none.", "seed"),
        ({"name": "least_kv", "hold_above": 7}, "LeastKv(hold_above=7) failed: ValueError", ""),
        ("no_such_module:Own", "or give its file: path/to/file.py:Class", "class"),
        ("policies.least_loaded:LeastLoad", "Did you mean 'LeastLoaded'?", "class"),
        ("policies.interface:Hold", "derive the class from policies.interface.Policy", "class"),
        ("own.py:", "write module:Class or path/to/file.py:Class", "class"),
        ("own.py:Owm", "own.py has no class 'Owm'. Did you mean 'Own'?", "class"),
        ("own.py:Other", "own.py:Other is no policy: derive the class", "class"),
        ("own.py:Unfinished", "own.py:Unfinished is unfinished: it must define `place`", "class"),
        ("own.py:Own", "Own needs the parameter 'limit'", "limit"),
        ({"class": "own.py:Own", "limit": 1, "slots": 0}, "slots: give at least 1", ""),
        ("missing.py:Own", "cannot read missing.py: No such file or directory", "class"),
        (3, "unknown policy 3. Known", "name"),
        (int, "int is no policy", "class"),
    ],
)
def test_a_wrong_spec_is_one_line_with_its_repair(own, spec, message, key):
    with pytest.raises(PolicySpecError) as caught:
        make_policy(spec, own)
    assert message in str(caught.value)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Own(:", "cannot load own.py: SyntaxError in line 1: "),
        ("import no_such_module", "cannot load own.py: ModuleNotFoundError: No module named"),
        ("raise RuntimeError('two\\nlines')", "cannot load own.py: RuntimeError: two lines"),
        ("\0", "cannot load own.py: "),
    ],
)
def test_a_broken_file_is_one_line(own, text, message):
    (own / "own.py").write_text(text)
    assert refusal("own.py:Own", own).startswith(message)


def test_a_broken_file_leaves_no_module_behind(own):
    (own / "own.py").write_text("raise RuntimeError")
    before = set(sys.modules)
    refusal("own.py:Own", own)
    assert set(sys.modules) == before


# -- scaffold ----------------------------------------------------------------------------------


def test_a_scaffold_is_a_policy_and_its_test_that_pass(tmp_path):
    for name, text in scaffold("my_policy").items():
        (tmp_path / name).write_text(text)
    tests = runpy.run_path(str(tmp_path / "test_my_policy.py"))
    passed = [name for name, test in tests.items() if name.startswith("test_") and not test()]
    assert len(passed) == 3


def test_a_scaffold_names_its_class_in_camel_case():
    assert "class ShortestFirst2(Policy):" in scaffold("shortest_first2")["shortest_first2.py"]


@pytest.mark.parametrize("name", ["", "My-Policy", "2fast", "class", "a b", "../up", "Upper"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(PolicySpecError, match="cannot name a policy: use small letters"):
        scaffold(name)


@pytest.mark.parametrize("name", ["least_loaded", "heapq", "policies"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(PolicySpecError, match="is taken"):
        scaffold(name)
