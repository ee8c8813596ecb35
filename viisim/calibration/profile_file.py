"""Profiles written as YAML, whole or not at all."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from viisim.errors import InputError
from viisim.profile import Profile

_WIDTH = 100


def write_profile(profile: Profile, path: Path, comments: Sequence[str] = ()) -> None:
    """Write the profile, with comment lines in front, and make its folder if there is none.
    Raises InputError if that is impossible.

    The file is written aside and moved into place, so that no reader and no interruption ever
    leaves half a profile.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(profile_text(profile, comments), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give another path with -o") from None
    finally:
        aside.unlink(missing_ok=True)


def profile_text(profile: Profile, comments: Sequence[str] = ()) -> str:
    """The file's content: what equals its default is left out."""
    head = [line for comment in comments for line in _comment(comment)]
    content = profile.model_dump(exclude_none=True)
    content = {name: _plain(value) for name, value in content.items() if value not in ("", (), {})}
    body = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=True)
    return "\n".join([*head, body])


def _comment(text: str) -> list[str]:
    """Commented lines; those that begin with a space are kept as they are (commands to copy)."""
    if text.startswith(" "):
        return [f"# {text}"]
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ") or ["#"]


class _Dumper(yaml.SafeDumper):
    """Short mappings and lists on one line, everything else a line each."""


class _Inline(dict[str, Any]):
    """A mapping to write on one line."""


_Dumper.add_representer(
    _Inline,
    lambda dumper, value: dumper.represent_mapping(
        "tag:yaml.org,2002:map", value.items(), flow_style=True
    ),
)
_Dumper.add_representer(
    tuple,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", list(value), flow_style=True
    ),
)


def _plain(value: Any) -> Any:
    """Leaves of the document as one-line mappings."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return [
            _Inline({key: each for key, each in entry.items() if each != ""}) for entry in value
        ]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        return [tuple(each) for each in value]
    return value
