"""Requests whose model has no ready worker wait only so long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.exchange import Exchange

LOOK_S = 1.0
"""How often it is looked whether requests wait for workers that are all gone."""


@dataclass(eq=False, slots=True)
class Wait:
    """A request in the driver."""

    model: str
    exchange: Exchange
    task: asyncio.Task[Any]
    since_s: float
    is_in_vain: bool = False
    """It was cancelled by us."""


class Waits:
    """Ends the wait of requests whose model has no ready worker.

    The core holds a request until a worker takes it, and cannot know that none will come back.
    `is_ready` says whether a model has a worker that takes requests, `most_s` how long may be
    waited for one.
    """

    def __init__(self, is_ready: Callable[[str], bool], most_s: Callable[[], float]) -> None:
        self._is_ready = is_ready
        self._most_s = most_s
        self._waits: dict[Wait, None] = {}
        self._unready_since_s: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, model: str, exchange: Exchange) -> Wait:
        """The current task is cancelled if it waits in vain, until `end`."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "called by a handler"
        wait = Wait(model, exchange, task, loop.time())
        self._waits[wait] = None
        if self._timer is None:
            self._arm(loop)
        return wait

    def end(self, wait: Wait) -> None:
        """The request has left the driver."""
        del self._waits[wait]

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        every_s = min(LOOK_S, self._most_s() / 4)
        self._timer = loop.call_later(every_s, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if not self._waits:
            self._unready_since_s.clear()
            return
        now_s, most_s = loop.time(), self._most_s()
        for model in {wait.model for wait in self._waits}:
            if self._is_ready(model):
                self._unready_since_s.pop(model, None)
            else:
                self._unready_since_s.setdefault(model, now_s)
        for wait in self._waits:
            since_s = max(wait.since_s, self._unready_since_s.get(wait.model, now_s))
            due = now_s >= since_s + most_s and not wait.is_in_vain
            if due and wait.exchange.is_waiting:
                wait.is_in_vain = True
                wait.task.cancel()
        self._arm(loop)
