"""YAML documents checked against pydantic models: every mistake is one clear line.

Experiments and profiles are both read this way. A mistake becomes
`file: key.path: what is wrong and how to repair it`, as an InputError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from viisim.errors import InputError

Document = TypeVar("Document", bound=BaseModel)


def nearest(word: str, words: Iterable[str]) -> str:
    """A sentence that repairs a mistyped word: the closest valid one, else all of them."""
    valid = list(words)
    close = get_close_matches(word, valid, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(valid)}."


def inside(mistake: str) -> PydanticCustomError:
    """An error to raise in a validator for `mistake`, which begins with the key inside."""
    return PydanticCustomError("inside", "{mistake}", {"mistake": mistake})


class Strict(BaseModel):
    """A frozen part of a document: unknown keys and values of another type are errors.

    Validators and `model_post_init` find the document's folder in the context: relative paths
    in a document start there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config["extra"] == "forbid":
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    raise _unknown_key(str(key), known)
        return data


def _unknown_key(key: str, known: Iterable[str]) -> PydanticCustomError:
    mistake = f"unknown key {key!r}. {nearest(key, known)}"
    return PydanticCustomError("unknown_key", "{mistake}", {"mistake": mistake})


def check(model: type[Document], data: Any, source: str, folder: Path) -> Document:
    """`data` as a `model`. Raises InputError for the first mistake; `source` is the file."""
    try:
        return model.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        sentence = _sentence(error.errors(include_url=False)[0], data)
        raise InputError(f"{source}: {sentence}") from None


# --------------------------------------------------------------------------------------
# Reading


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises InputError: unreadable, broken, or a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8; save it as one") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the path of a readable file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for. Raises InputError naming `source` and the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f": line {mark.line + 1}"
        raise InputError(f"{source}{line}: {error.problem or 'broken YAML'}; correct it") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2025-13-01
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: not YAML ({reason}); correct it") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML without its traps: a key may come once, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} comes twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent, and would read 1e-3 as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


# --------------------------------------------------------------------------------------
# Changing


def override(data: Any, assignment: str) -> None:
    """Carry out `key.path=value` in `data`; the value is YAML, list entries go by index.

    Missing keys are made, for the model to judge. Raises InputError.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    where = f"--set {assignment}"
    if not equals or not all(keys):
        raise InputError(f"{where}: write key.path=value")
    value = parse_yaml(text, where)
    for key in keys[:-1]:
        data = _step(data, key, where)
    if isinstance(data, list):
        data[_index(data, keys[-1], where)] = value
    elif isinstance(data, dict):
        data[keys[-1]] = value
    else:
        raise InputError(f"{where}: {keys[-1]!r} is not a key there; nothing lies below {data!r}")


def _step(data: Any, key: str, where: str) -> Any:
    """What lies below `key`; an empty mapping is put there when nothing does."""
    if isinstance(data, list):
        return data[_index(data, key, where)]
    if not isinstance(data, dict):
        raise InputError(f"{where}: {key!r} is not a key there; nothing lies below {data!r}")
    if data.get(key) is None:
        data[key] = {}
    return data[key]


def _index(entries: list[Any], key: str, where: str) -> int:
    if not (key.isdecimal() and int(key) < len(entries)):
        raise InputError(f"{where}: {key!r} is no entry; use 0 to {len(entries) - 1}")
    return int(key)


def named_file(path: str, folder: Path) -> Path:
    """The file that a document in `folder`, or a `--set` of the caller's, names: it lies beside
    the document, else where a shell would look for it."""
    beside = folder / path
    return beside if beside.exists() or not Path(path).exists() else Path(path)


# --------------------------------------------------------------------------------------
# Saying what is wrong


def _sentence(details: ErrorDetails, data: Any) -> str:
    """`key.path: what is wrong`, without pydantic's own words."""
    path = _path(details["loc"], data)
    kind = details["type"]
    if kind == "inside":
        return f"{path}.{details['msg']}" if path else details["msg"]
    say = _SAYINGS.get(kind, _say_in_general)
    if kind.startswith("union_tag"):
        path = f"{path}.kind" if path else "kind"
    return f"{path}: {say(details)}" if path else say(details)


def _path(location: tuple[int | str, ...], data: Any) -> str:
    """The keys of `location` that stand in the document, not the names of union members."""
    keys: list[str] = []
    for key in location:
        if isinstance(data, Mapping) and key not in data and key == data.get("kind"):
            continue
        keys.append(str(key))
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            data = None
    return ".".join(keys)


def _say_in_general(details: ErrorDetails) -> str:
    message = re.sub(r"^\w+ should", "must", details["msg"])
    return f"{message}, not {_short(details['input'])}"


def _say_union_tag(details: ErrorDetails) -> str:
    context = details["ctx"]
    words = re.findall(r"'([^']*)'", str(context["expected_tags"]))
    return f"unknown kind {context['tag']!r}. {nearest(str(context['tag']), words)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_SAYINGS: dict[str, Callable[[ErrorDetails], str]] = {
    "missing": lambda _: "required, but missing",
    "unknown_key": lambda details: details["msg"],
    "value_error": lambda details: str(details["ctx"]["error"]),
    "union_tag_invalid": _say_union_tag,
    "union_tag_not_found": lambda _: "required, but missing",
    "tuple_type": lambda details: f"must be a list, not {_short(details['input'])}",
    "too_short": lambda _: "must have at least one entry",
    "model_type": lambda details: f"must have keys below it, not {_short(details['input'])}",
    "model_attributes_type": lambda d: f"must have keys below it, not {_short(d['input'])}",
}
