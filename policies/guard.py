"""Windows that close: how `check_policy` sees what a policy does while it is asked.

A `Guard` makes every call of the policy that hands out a view. What the policy gets is a window
on the live object: it shows what the protocols of `policies.interface` promise and nothing
else, refuses to be written to, and is closed when the call ends. A breach raises, and is
remembered as well, so that a policy that swallows exceptions is still found out. `clock_reads`
sees every look at a clock.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinMethodType, FrameType, MethodType
from typing import Any, NoReturn

from policies.interface import ClusterView, LaneView, PolicyError, ReplicaView
from policies.state import Cluster, Lane, LazyQueue, Replica

_PROTOCOLS: dict[type, type] = {Cluster: ClusterView, Replica: ReplicaView, Lane: LaneView}
_MEMBERS = {
    kind: frozenset(name for name in vars(protocol) if not name.startswith("_"))
    for kind, protocol in _PROTOCOLS.items()
}
_CLOCKS = frozenset(
    f"{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    for unit in ("", "_ns")
) | {"clock_gettime", "clock_gettime_ns", "localtime", "gmtime", "ctime"}
_TODAY = frozenset({"now", "utcnow", "today"})


class KeptView(PolicyError):  # noqa: N818 - named after what was found, as InvalidAction is
    """A view was used after the call that it was given to."""


class WrittenView(PolicyError):  # noqa: N818
    """A view was written to, or reached into behind its protocol."""


class Guard:
    """Makes a core's calls of its policy: `SchedulerCore(policy, guard=Guard())`."""

    def __init__(self) -> None:
        self.breaches: list[PolicyError] = []

    def __call__(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Ask with windows in the place of views, and close them afterwards."""
        lease = _Lease(self.breaches)
        try:
            return question(*map(lease.window, arguments))
        finally:
            lease.open = False


class _Lease:
    """The windows of one call: open together, closed together."""

    def __init__(self, breaches: list[PolicyError]) -> None:
        self.open = True
        self._breaches = breaches

    def require_open(self, what: str) -> None:
        if not self.open:
            self.refuse(
                KeptView(
                    f"{what} was used after the call that it was given to; views are live and "
                    "valid during their call only: keep the values you need, or the id"
                )
            )

    def refuse(self, breach: PolicyError) -> NoReturn:
        self._breaches.append(breach)
        raise breach

    def window(self, value: Any) -> Any:
        """A window on a live object or on a collection of them; plain values as they are."""
        kind = type(value)
        if kind in _PROTOCOLS:
            return _Window(self, value)
        if kind is tuple and value and type(value[0]) is Replica:
            return tuple(_Window(self, replica) for replica in value)
        if kind is dict:
            return _MappingWindow(self, value)
        if kind is LazyQueue:
            return _QueueWindow(self, value)
        if kind in (MethodType, BuiltinMethodType):  # the latter of a compiled class
            return self._method(value)
        return self._items(value) if isinstance(value, Iterator) else value

    def _method(self, method: MethodType | BuiltinMethodType) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.require_open(f"`{method.__name__}`")
            return self.window(method(*arguments))

        return call

    def _items(self, live: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.require_open("an iterator of a view")
            try:
                item = next(live)
            except StopIteration:
                return
            yield self.window(item)


class _Window:
    """Shows the attributes that the live object's protocol promises."""

    __slots__ = ("_lease", "_live")
    _lease: _Lease
    _live: Any

    def __init__(self, lease: _Lease, live: Any) -> None:
        object.__setattr__(self, "_lease", lease)
        object.__setattr__(self, "_live", live)

    def __getattr__(self, name: str) -> Any:
        kind = type(self._live)
        protocol = _PROTOCOLS[kind].__name__
        self._lease.require_open(f"a {protocol}")
        if name.startswith("__"):
            raise AttributeError(name)  # a protocol of Python's own, asked for politely
        if name not in _MEMBERS[kind]:
            known = ", ".join(sorted(_MEMBERS[kind]))
            self._lease.refuse(WrittenView(f"{protocol} has no `{name}`; it has {known}"))
        return self._lease.window(getattr(self._live, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_write(name)

    def __delattr__(self, name: str) -> None:
        self._refuse_write(name)

    def _refuse_write(self, name: str) -> NoReturn:
        protocol = _PROTOCOLS[type(self._live)].__name__
        self._lease.refuse(
            WrittenView(
                f"`{name}` of a {protocol} was written to; views are read-only: keep notes in "
                "the policy itself"
            )
        )

    def __len__(self) -> int:
        self._lease.require_open("a LaneView")
        return len(self._live)

    def __bool__(self) -> bool:
        return True if type(self._live) is not Lane else len(self) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Window) and self._live is other._live

    def __hash__(self) -> int:
        return hash(self._live)

    def __repr__(self) -> str:
        return f"<window on a {_PROTOCOLS[type(self._live)].__name__}>"


class _MappingWindow(Mapping[Any, Any]):
    """The lanes that `next_lane` chooses among."""

    def __init__(self, lease: _Lease, live: Mapping[Any, Any]) -> None:
        self._lease = lease
        self._live = live

    def __getitem__(self, key: Any) -> Any:
        self._lease.require_open("the mapping of lanes")
        return self._lease.window(self._live[key])

    def __iter__(self) -> Iterator[Any]:
        self._lease.require_open("the mapping of lanes")
        return iter(self._live)

    def __len__(self) -> int:
        self._lease.require_open("the mapping of lanes")
        return len(self._live)


class _QueueWindow:
    """The queue that `plan` walks through."""

    def __init__(self, lease: _Lease, live: LazyQueue) -> None:
        self._lease = lease
        self._live = live

    def __iter__(self) -> Iterator[Any]:
        self._lease.require_open("the queue")
        return self._lease._items(iter(self._live))

    def __len__(self) -> int:
        self._lease.require_open("the queue")
        return len(self._live)


@contextmanager
def clock_reads() -> Iterator[list[str]]:
    """Collect who reads a clock meanwhile, however the function was imported.

    A profile function sees every call of a built-in one. Garbage collection rests meanwhile:
    tools hang clock-reading callbacks on it.
    """
    reads: list[str] = []

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and _is_clock(called):
            code = frame.f_code
            name = f"{_owner(called)}.{called.__name__}"
            file = Path(code.co_filename).name
            reads.append(f"{name}() was called in {code.co_name}, line {frame.f_lineno} of {file}")

    collects, previous = gc.isenabled(), sys.getprofile()
    gc.disable()
    sys.setprofile(watch)
    try:
        yield reads
    finally:
        sys.setprofile(previous)
        if collects:
            gc.enable()


def _is_clock(called: Any) -> bool:
    name = getattr(called, "__name__", "")
    if name in _CLOCKS:
        return getattr(called, "__module__", "") == "time"
    return name in _TODAY and _owner(called) in ("date", "datetime")


def _owner(called: Any) -> str:
    owner = getattr(called, "__self__", None)
    return getattr(owner, "__name__", "")
