"""The journal's language: events and actions as JSON, checkpoints, and replay.

A journal is a list of lines. A *segment* line says how to make the core: the policy, the seed,
the limits, and a checkpoint, which is null at the start of a run. Then comes one line per
handled event with the actions it caused. Fed to a core made from the segment line, the same
events must cause the same actions (invariant I7).

    {"segment": {"version": 1, "policy": {"name": "least_loaded"}, "seed": 1, ...}}
    {"event": {"event": "Arrived", "now_s": 0.5, ...}, "actions": [{"action": "Dispatch", ...}]}

Nothing here touches a file; `viisim.journal` does.

A checkpoint is a pickle of the core with its policy and generator, in base64: policies keep
whatever objects they like, and no other format holds them all. Loading a pickle can run code,
so load checkpoints only of journals you trust.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from policies.core import SchedulerCore
from policies.interface import Action, Event, Limits, PolicyError
from policies.registry import PolicySpec, make_policy

VERSION = 1

T = TypeVar("T")


class JournalError(ValueError):
    """A journal line says nothing this version understands: one line with the reason."""


# -- dataclasses to JSON and back --


class _Shape(Generic[T]):
    """How one dataclass is written: which fields there are, and which need restoring."""

    def __init__(self, kind: type[T], tag: str = "") -> None:
        hints = get_type_hints(kind)
        names = [part.name for part in fields(kind)]  # type: ignore[arg-type]
        self.kind = kind
        self.tuples = [name for name in names if get_origin(hints[name]) is tuple]
        self.nested = {name: _Shape(hints[name]) for name in names if is_dataclass(hints[name])}
        self._keys = [tag, *names] if tag else names
        # One call reads all fields; the class name comes first when it is asked for.
        self._read = attrgetter(*["__class__.__name__"] * bool(tag), *names)

    def encode(self, value: T) -> dict[str, Any]:
        record = dict(zip(self._keys, self._read(value), strict=True))
        for name, shape in self.nested.items():
            record[name] = shape.encode(record[name])
        return record

    def decode(self, record: Any) -> T:
        """Raises JournalError when fields are missing or unknown."""
        try:
            values = dict(record)
            for name in self.tuples:
                if name in values:
                    values[name] = tuple(values[name])
            for name, shape in self.nested.items():
                values[name] = shape.decode(values[name])
            return self.kind(**values)
        except (TypeError, KeyError) as error:
            raise JournalError(f"not a {self.kind.__name__}: {error}") from error


class _Codec(Generic[T]):
    """A family of dataclasses, told apart by the class name under the key `tag`."""

    def __init__(self, tag: str, kinds: Sequence[type]) -> None:
        self.tag = tag
        self.shapes: dict[str, _Shape[Any]] = {kind.__name__: _Shape(kind, tag) for kind in kinds}

    def encode(self, value: T) -> dict[str, Any]:
        return self.shapes[type(value).__name__].encode(value)

    def decode(self, record: Any) -> T:
        if not isinstance(record, Mapping):
            raise JournalError(f"not an {self.tag}: {record!r}")
        values = dict(record)
        name = values.pop(self.tag, None)
        shape = self.shapes.get(name) if isinstance(name, str) else None
        if shape is None:
            raise JournalError(f"unknown {self.tag} {name!r}; known: {', '.join(self.shapes)}")
        decoded: T = shape.decode(values)
        return decoded


_EVENTS: _Codec[Event] = _Codec("event", get_args(Event))
_ACTIONS: _Codec[Action] = _Codec("action", get_args(Action))
_LIMITS = _Shape(Limits)

encode_event = _EVENTS.encode
decode_event = _EVENTS.decode
encode_action = _ACTIONS.encode
decode_action = _ACTIONS.decode


def _plain(value: Any) -> Any:
    """What JSON has no word for: numpy numbers, and the class of a policy."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    raise TypeError(f"{value!r} cannot be written to a journal")


_to_json = json.JSONEncoder(separators=(",", ":"), default=_plain).encode

# -- lines --


@dataclass(frozen=True, slots=True)
class Segment:
    """The head of a segment: how to make the core that its events are fed to."""

    policy: PolicySpec
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    """At the start of the segment."""
    checkpoint: str | None = None
    """The core at the start of the segment, None for a fresh one."""

    def make_core(self, folder: Path | None = None) -> SchedulerCore:
        """The core at the start of the segment. Loads the checkpoint: see the module's warning.

        `folder` is where relative policy files are looked up. Raises PolicySpecError when the
        policy cannot be made, JournalError when the checkpoint cannot be loaded.
        """
        # Made in either case: it imports the policy's module, which the pickle refers to.
        policy = make_policy(self.policy, folder)
        if self.checkpoint is None:
            return SchedulerCore(policy, self.seed, self.limits, folder=folder)
        return restore(self.checkpoint)


@dataclass(frozen=True, slots=True)
class Handled:
    """One event and the actions it caused."""

    event: Event
    actions: tuple[Action, ...]


Line: TypeAlias = Segment | Handled


def segment_line(segment: Segment) -> str:
    """The head of a segment as one line of JSON."""
    head = {
        "version": VERSION,
        "policy": segment.policy,
        "seed": segment.seed,
        "limits": _LIMITS.encode(segment.limits),
        "checkpoint": segment.checkpoint,
    }
    return _to_json({"segment": head})


def handled_line(event: Event, actions: Sequence[Action]) -> str:
    """A handled event as one line of JSON."""
    return _to_json(
        {"event": encode_event(event), "actions": [encode_action(action) for action in actions]}
    )


def parse_line(text: str | bytes) -> Line:
    """What a line says. Raises JournalError."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise JournalError(f"not JSON: {error}") from error
    match record:
        case {"segment": dict(head)}:
            return _parse_segment(head)
        case {"event": event, "actions": [*actions]}:
            return Handled(decode_event(event), tuple(map(decode_action, actions)))
    raise JournalError("neither a segment nor an event with its actions")


def _parse_segment(head: dict[Any, Any]) -> Segment:
    version = head.get("version")
    if version != VERSION:
        raise JournalError(f"journal format {version}; this version of viisim reads {VERSION}")
    match head:
        case {
            "policy": str() | dict() as policy,
            "seed": int(seed),
            "limits": dict(limits),
            "checkpoint": str() | None as checkpoint,
        }:
            return Segment(policy, seed, _LIMITS.decode(limits), checkpoint)
    raise JournalError("a segment line needs policy, seed, limits and checkpoint")


# -- checkpoints --


def checkpoint(core: SchedulerCore) -> str:
    """The core with its policy and generator, between two events.

    Raises PolicyError when the policy keeps something that cannot be pickled.
    """
    try:
        return base64.b64encode(pickle.dumps(core, protocol=5)).decode("ascii")
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"{type(core.policy).__name__} cannot be checkpointed ({error}): "
            "keep no lambdas, open files or local classes in a policy"
        ) from error


def restore(text: str) -> SchedulerCore:
    """The core of a checkpoint. Loading one can run code: restore only what you trust."""
    try:
        core = pickle.loads(base64.b64decode(text, validate=True))
    except Exception as error:  # a damaged pickle can raise anything
        raise JournalError(f"the checkpoint cannot be loaded: {error}") from error
    if not isinstance(core, SchedulerCore):
        raise JournalError(f"the checkpoint holds a {type(core).__name__}, not a core")
    return core


# -- replay --


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay leaves the record."""

    event: Event
    recorded: tuple[Action, ...]
    replayed: tuple[Action, ...]
    error: str = ""
    """What the core raised instead of answering."""

    def __str__(self) -> str:
        replayed = self.error or _listed(self.replayed)
        return f"{self.event}: recorded {_listed(self.recorded)}; replayed {replayed}"


def _listed(actions: Sequence[Action]) -> str:
    return ", ".join(map(str, actions)) or "no action"


class Replay:
    """Feeds recorded events to cores made from the segments, and compares the actions."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._core: SchedulerCore | None = None
        self.segments = self.events = self.actions = 0

    def take(self, line: Line) -> Difference | None:
        """Replay one line. After a difference the core has left the record: stop there.

        Raises JournalError when an event comes before any segment, and what
        `Segment.make_core` raises.
        """
        if isinstance(line, Segment):
            self._core = line.make_core(self._folder)
            self.segments += 1
            return None
        if self._core is None:
            raise JournalError("an event before the first segment line")
        try:
            replayed = tuple(self._core.handle(line.event))
        except Exception as error:  # a policy is foreign code; what it raises is a difference
            return Difference(line.event, line.actions, (), f"{type(error).__name__}: {error}")
        self.events += 1
        self.actions += len(replayed)
        if replayed != line.actions:
            return Difference(line.event, line.actions, replayed)
        return None
