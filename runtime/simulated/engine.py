"""The engine model in real time: what `viisim worker` computes with.

The same `Engine` that the simulator drives, stepped one step at a time by the event loop's
clock. Steps begin and end on the engine's own schedule, not when the loop gets round to them, so
that a late timer delays one delivery and nothing after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TypeAlias

from viisim.engine.engine import Engine
from viisim.engine.scheduler import SchedulerSettings
from viisim.engine.sequence import Sequence
from viisim.engine.step_time import StepTime

NS_PER_S = 10**9

OnTokens: TypeAlias = Callable[[int, bool], None]
"""Told of new tokens, and whether they are the last."""


class Stream:
    """One request inside the engine, and who waits for its tokens."""

    __slots__ = ("arrived_ns", "last_ns", "on_tokens", "output_tokens", "sequence", "visible")

    def __init__(
        self,
        name: str,
        prompt: tuple[tuple[Hashable, int], ...],
        output_tokens: int,
        on_tokens: OnTokens,
        priority: int = 0,
    ) -> None:
        prompt_tokens = sum(tokens for _, tokens in prompt)
        self.sequence = Sequence(name, prompt, prompt_tokens, output_tokens, priority=priority)
        self.output_tokens = output_tokens
        self.on_tokens = on_tokens
        self.visible = 0
        """Tokens that have been told."""
        self.arrived_ns = -1
        self.last_ns = -1
        """When the latest token came."""


class RealTimeEngine:
    """One engine on the event loop's clock. `speed` 10 lets ten seconds pass in one.

    Not for several threads; `submit` and `abort` are called on the loop.
    """

    def __init__(
        self, settings: SchedulerSettings, step_time: StepTime, speed: float = 1.0
    ) -> None:
        self._engine = Engine(settings, step_time, coalesce=False)
        self._loop = asyncio.get_running_loop()
        self._origin_s = self._loop.time()
        self._speed = speed
        self._streams: dict[Sequence, Stream] = {}
        self._due_ns: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.output_tokens = 0
        """All that were told."""
        self.prompt_tokens = 0
        """Of all requests that were submitted."""
        self.on_step: Callable[[Stream, int], None] = lambda stream, now_ns: None
        """Called for each stream that got a token, before it is told."""

    # -- for whoever serves --

    @property
    def scheduler(self) -> SchedulerSettings:
        """The settings in force."""
        return self._engine.scheduler.settings

    def now_ns(self) -> int:
        """The engine's time."""
        return round((self._loop.time() - self._origin_s) * self._speed * NS_PER_S)

    def submit(self, stream: Stream) -> None:
        """Take a request; its tokens come by `on_tokens`."""
        self._catch_up()
        now_ns = stream.arrived_ns = self.now_ns()
        stream.sequence.arrival = float(now_ns)
        self.prompt_tokens += stream.sequence.prompt_tokens
        self._streams[stream.sequence] = stream
        self._set_due(self._engine.arrive(stream.sequence, now_ns))

    def abort(self, stream: Stream) -> None:
        """Let a request go at the end of the step in progress; it hears no more."""
        if self._streams.pop(stream.sequence, None) is not None:
            self._catch_up()
            self._set_due(self._engine.abort(stream.sequence, self.now_ns()))

    def gauges(self) -> tuple[int, int, float]:
        """Running, waiting, and the share of KV blocks in use."""
        self._catch_up()
        running, waiting, used = self._engine.gauges(self.now_ns())
        return running, waiting, used / self.scheduler.usable_blocks

    def counters(self) -> tuple[int, int, int]:
        """Preemptions, prompt tokens looked up in the prefix cache, and those found there."""
        scheduler = self._engine.scheduler
        return scheduler.preemptions, scheduler.queried_tokens, scheduler.hit_tokens

    def spent_ns(self) -> tuple[int, int]:
        """See `Engine.spent_ns`."""
        self._catch_up()
        return self._engine.spent_ns(self.now_ns())

    def change_speed(self, step_time: StepTime) -> None:
        """From the next step on, steps take this long."""
        self._engine.step_time = step_time

    def close(self) -> None:
        """Compute no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._due_ns = self._timer = None

    # -- time --

    def _set_due(self, due_ns: int | None) -> None:
        if due_ns is None:
            return  # as before
        self._due_ns = due_ns
        if self._timer is not None:
            self._timer.cancel()
        due_s = self._origin_s + due_ns / NS_PER_S / self._speed
        self._timer = self._loop.call_at(due_s, self._catch_up, due_ns)

    def _catch_up(self, until_ns: int = 0) -> None:
        """End every step whose time has come, or comes by `until_ns`: a loop may fire a timer up
        to one resolution of its clock early."""
        now_ns = max(self.now_ns(), until_ns)
        while self._due_ns is not None and self._due_ns <= now_ns:
            ended_ns, self._due_ns = self._due_ns, None
            self._end_step(ended_ns)

    def _end_step(self, now_ns: int) -> None:
        engine = self._engine
        ended, due_ns = engine.finish(now_ns)
        self._set_due(due_ns)
        # Told only now: whoever hears it may submit or abort at once.
        told = self._made(engine.first_tokens)
        engine.first_tokens.clear()
        engine.aborted.clear()
        for sequence in list(ended):
            stream = self._streams.pop(sequence, None)
            if stream is not None:
                told[stream] = sequence.tokens - sequence.prompt_tokens
        for stream, tokens in told.items():
            new, stream.visible = tokens - stream.visible, tokens
            if new > 0:
                self.output_tokens += new
                self.on_step(stream, now_ns)
                stream.last_ns = now_ns
                stream.on_tokens(new, stream.sequence not in self._streams)

    def _made(self, firsts: list[Sequence]) -> dict[Stream, int]:
        """The tokens that each stream has after this step, where that has changed. A step gives
        a sequence one token or, where it is starved or preempted, none."""
        tokens_of = self._engine.scheduler.tokens_of
        told = {self._streams[sequence]: 1 for sequence in firsts if sequence in self._streams}
        for sequence, stream in self._streams.items():
            if stream.visible:
                made = tokens_of(sequence) - sequence.prompt_tokens
                told[stream] = min(stream.visible + 1, made)
        return told
