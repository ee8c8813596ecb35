"""Policies by name: what an experiment file or the command line writes, and what it means.

A policy is named in one of three ways: a shipped name (`least_loaded`), an importable
`module:Class`, or a file, `path/to/file.py:Class`. Parameters are the keyword parameters of the
class's constructor. To ship a policy, write its file and add its line to `POLICIES`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from policies.interface import Policy, PolicyError

POLICIES = {
    "cache_aware": "policies.cache_aware:CacheAware",
    "earliest_deadline": "policies.earliest_deadline:EarliestDeadline",
    "freeness": "policies.freeness:Freeness",
    "hybrid": "policies.hybrid:Hybrid",
    "kv_cost": "policies.kv_cost:KvCost",
    "least_kv": "policies.least_kv:LeastKv",
    "least_loaded": "policies.least_loaded:LeastLoaded",
    "least_requests": "policies.least_requests:LeastRequests",
    "power_of_two": "policies.power_of_two:PowerOfTwo",
    "prefix_hash": "policies.prefix_hash:PrefixHash",
    "random": "policies.random:Random",
    "round_robin": "policies.round_robin:RoundRobin",
    "shortest_first": "policies.shortest_first:ShortestFirst",
    "thermal_aware": "policies.thermal_aware:ThermalAware",
    "token_load": "policies.token_load:TokenLoad",
    "twin": "policies.twin:Twin",
    "viiwork": "policies.viiwork:Viiwork",
    "vtc": "policies.vtc:Vtc",
    "weighted": "policies.weighted:Weighted",
}

PolicySpec: TypeAlias = str | type[Policy] | Mapping[str, Any]
"""A name, a class, or `{name or class: ..., **parameters}`."""


class PolicySpecError(PolicyError, ValueError):
    """A policy cannot be made as it was asked for: one line with the repair.

    `key` is the word of the spec that is wrong (`name`, `class` or a parameter; empty when the
    whole is).
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


def policy_names() -> list[str]:
    """The shipped policies, sorted."""
    return sorted(POLICIES)


def policy_class(spec: PolicySpec, folder: Path | None = None) -> type[Policy]:
    """The class that a spec names. Relative files are looked up in `folder`, else here."""
    return _resolve(spec, folder)[0]


def make_policy(spec: PolicySpec, folder: Path | None = None) -> Policy:
    """A new policy. Raises PolicySpecError, one line, when the spec or the class is wrong."""
    kind, parameters = _resolve(spec, folder)
    _check_parameters(kind, parameters)
    try:
        return kind(**parameters)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
        raise PolicySpecError(f"{kind.__name__}({given}) failed: {_brief(error)}") from error


# -- from a spec to a class ------------------------------------------------------------------


def _resolve(spec: PolicySpec, folder: Path | None) -> tuple[type[Policy], dict[str, Any]]:
    if not isinstance(spec, Mapping):
        key = "class" if isinstance(spec, type) or ":" in str(spec) else "name"
        spec = {key: spec}
    parameters = dict(spec)
    keys = [key for key in ("name", "class") if key in parameters]
    if len(keys) != 1:
        raise PolicySpecError(
            "give a policy either `name` (a shipped policy) or `class` (module:Class or "
            f"path/to/file.py:Class), not {'both' if keys else 'neither'}"
        )
    key = keys[0]
    value = parameters.pop(key)
    if key == "name":
        kind = _shipped(value)
    elif isinstance(value, type):
        kind = _as_policy(value, value.__qualname__)
    else:
        kind = _load(value, folder)
    return kind, parameters


def _shipped(name: Any) -> type[Policy]:
    place = POLICIES.get(name) if isinstance(name, str) else None
    if place is None:
        raise PolicySpecError(f"unknown policy {name!r}.{_hint(str(name), POLICIES)}", "name")
    return _load(place, None)


def _load(place: Any, folder: Path | None) -> type[Policy]:
    """The class at `module:Class` or `path/to/file.py:Class`."""
    where, colon, class_name = str(place).rpartition(":")
    if not (colon and where and class_name):
        raise PolicySpecError(
            f"{place!r} names no class: write module:Class or path/to/file.py:Class", "class"
        )
    if where.endswith(".py"):
        beside = (folder or Path()) / where
        module = _load_file(beside if beside.exists() else Path(where), where)
    else:
        module = _load_module(where)
    found = getattr(module, class_name, None)
    if found is None:
        raise PolicySpecError(
            f"{where} has no class {class_name!r}.{_hint(class_name, _policies_in(module))}",
            "class",
        )
    return _as_policy(found, str(place))


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (
            name,
            name.partition(".")[0],
        )
        repair = "; or give its file: path/to/file.py:Class" if missing else ""
        raise PolicySpecError(f"cannot import {name}: {_brief(error)}{repair}", "class") from error


def _load_file(path: Path, shown: str) -> ModuleType:
    """The module in a file, loaded once as long as the file stays the same.

    Its name is made from its content, so that objects pickled in one place load in another.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise PolicySpecError(f"cannot read {shown}: {error.strerror}", "class") from error
    name = f"policy_file_{path.stem}_{zlib.crc32(source):08x}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PolicySpecError(f"cannot load {shown}: {_brief(error)}", "class") from error
    return module


def _as_policy(found: Any, shown: str) -> type[Policy]:
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicySpecError(
            f"{shown} is no policy: derive the class from policies.interface.Policy", "class"
        )
    if inspect.isabstract(found):
        missing = ", ".join(f"`{name}`" for name in sorted(found.__abstractmethods__))
        raise PolicySpecError(f"{shown} is unfinished: it must define {missing}", "class")
    return found


def _policies_in(module: ModuleType) -> list[str]:
    """Names of the policy classes that the module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Policy)
        and value.__module__ == module.__name__
    ]


# -- parameters ------------------------------------------------------------------------------


def _check_parameters(kind: type[Policy], given: Mapping[str, Any]) -> None:
    """Compare with the constructor's signature, so that no typing error goes unnoticed."""
    parameters = inspect.signature(kind).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in given:
        if name not in known:
            repair = _hint(str(name), known) if known else " It has none."
            raise PolicySpecError(f"{kind.__name__} has no parameter {name!r}.{repair}", str(name))
    for parameter in parameters:
        required = parameter.name in known and parameter.default is parameter.empty
        if required and parameter.name not in given:
            raise PolicySpecError(
                f"{kind.__name__} needs the parameter {parameter.name!r}", parameter.name
            )


# -- messages --------------------------------------------------------------------------------


def _hint(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""


def _brief(error: Exception) -> str:
    """An exception in one line, with the line of a syntax error."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__} in line {error.lineno}: {error.msg}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
