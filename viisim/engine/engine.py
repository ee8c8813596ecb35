"""One simulated engine in time: it knows no kernel and no clock but what it is told.

The kernel calls `arrive`, `abort` and `finish` with the current time and gets back the time of
the engine's next event; an event that a later call has replaced is stale, and the kernel
ignores it. While nothing can change who is in the batch, one event stands for many engine steps
(a *train*): a head of any kind, then decode steps of the same sequences, whose durations form
an arithmetic progression. Times and token counts follow in closed form, bit-identical to
stepping (tests/test_coalescing.py).

Inside, time is in integer picoseconds; a step ends, for the kernel, at the next nanosecond.
"""

from __future__ import annotations

from collections.abc import Collection
from math import isqrt

from viisim.engine.scheduler import Batch, Scheduler, SchedulerSettings
from viisim.engine.sequence import DECODING, DONE, WAITING, Sequence
from viisim.engine.step_log import StepLog
from viisim.engine.step_time import PS_PER_NS, StepTime


class Engine:
    """A vLLM V1 engine: scheduler, blocks and step times.

    `coalesce` False steps one by one, for comparison. `reports_first_tokens` False lets a train
    run on over the step that yields a first token; its time is recorded all the same.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        step_time: StepTime,
        coalesce: bool = True,
        reports_first_tokens: bool = True,
    ) -> None:
        self.scheduler = Scheduler(settings)
        self.step_time = step_time
        self.coalesce = coalesce
        self.reports_first_tokens = reports_first_tokens
        self.log = StepLog(step_time)
        self.first_tokens: list[Sequence] = []
        """Sequences whose first token came; the kernel empties it when it has told."""
        self.aborted: list[Sequence] = []
        """Sequences taken out because they had been aborted; likewise."""
        self._async = settings.async_scheduling
        self._clock_ps = 0
        """When the last batch ended."""
        self._idle_ps = 0
        """Of the time until then, how much nothing was computed."""
        self._prefill_ps = 0
        """And how much was in batches with prefills."""
        self._head: Batch | None = None
        """The batch that the train begins with; None when it has decode steps only."""
        self._following: Batch | None = None
        """Asynchronous only: the batch scheduled behind the head."""
        self._head_ps = 0
        self._held_ps = 0
        """By how much the machine's halts make the last step of the train longer, unless that is
        the head, which contains them."""
        self._halted_ps = 0
        """Until when the machine halts, or has."""
        self._train = 0
        """Steps until the next event, the head included; 0: the engine is idle."""
        self._decodes = (0, 0, 0, 0)
        """The steps behind the head: sequences, tokens they attend to in the first of these
        steps, its duration (ps), and by how much each further one is longer (ps)."""
        self._aborts: list[Sequence] = []
        self._told = (0, 0, 0)
        """What the gauges said when the last step before the train ended."""
        self._arrivals: list[int] = []
        """How many steps of the train were over when each request came that came during it."""

    # -- for the kernel --

    def arrive(self, sequence: Sequence, now_ns: int, step_ended: bool = False) -> int | None:
        """Take a request; returns the new time of the next event if that has changed.

        `step_ended`: a step that ends at this very nanosecond counts as over.
        """
        may_matter = self.scheduler.add(sequence)
        if not self._train:
            idle_ps = now_ns * PS_PER_NS - self._clock_ps
            if idle_ps > 0:
                self._idle_ps += idle_ps
                self._clock_ps += idle_ps
            return self._begin(now_ns)
        over = self._steps_over(now_ns, step_ended)
        self._arrivals.append(over)
        return self._cut(over) if may_matter else None

    def abort(self, sequence: Sequence, now_ns: int, step_ended: bool = False) -> int | None:
        """Take a request out at the end of the step in progress, which it wastes; returns the
        new time of the next event if that has changed. Only while something is computed."""
        self._aborts.append(sequence)
        return self._cut(self._steps_over(now_ns, step_ended)) if self._train > 1 else None

    def change_step_time(
        self, step_time: StepTime, now_ns: int, step_ended: bool = False
    ) -> int | None:
        """From the next step on, steps take this long; returns the new time of the next event if
        that has changed."""
        self.step_time = step_time
        return self._cut(self._steps_over(now_ns, step_ended)) if self._train > 1 else None

    def halt(self, until_ns: int, now_ns: int, step_ended: bool = False) -> int | None:
        """Compute nothing from now until then: the step in progress, or the first that would
        begin, takes so much longer. Returns the new time of the next event, None without one."""
        self._halted_ps = until_ns * PS_PER_NS
        if not self._train:
            return None
        self._train = self._steps_over(now_ns, step_ended) + 1
        longer_ps = (until_ns - now_ns) * PS_PER_NS
        if self._head is not None and self._train == 1:
            self._head_ps += longer_ps
        else:
            self._held_ps += longer_ps
        return self._end_ns()

    def finish(self, now_ns: int) -> tuple[Collection[Sequence], int | None]:
        """The train has run: take its output and start the next one. Returns who ended, and the
        time of the next event, None when there is no work left."""
        scheduler = self.scheduler
        head, following, steps = self._head, self._following, self._train
        lasts: Collection[Sequence] = ()
        if head is not None:
            steps -= 1
            self._finish_head(head)
            lasts = head.lasts
        if steps:
            self._log_decodes(steps)
            members, _, step_ps, growth_ps = self._decodes
            self._clock_ps += steps * step_ps + steps * (steps - 1) // 2 * growth_ps
            self._clock_ps += self._held_ps
            self._held_ps = 0
            if following is None:
                lasts = scheduler.advance(steps)
            else:  # asynchronous: the last step scheduled starts to run now
                following.lasts = scheduler.advance(steps)
                following.context_tokens += steps * members
        ended = scheduler.update(lasts) if lasts else lasts
        running, waiting, used = self._state()
        self._told = running, waiting - self._arrivals.count(self._train - 1), used
        self._arrivals.clear()
        self._head, self._following, self._train = following, None, 0
        if self._aborts:
            self._take_aborts()
        return ended, self._begin(now_ns)

    def _log_decodes(self, steps: int) -> None:
        """The decode steps behind the head are over."""
        members, context_tokens, step_ps, growth_ps = self._decodes
        log = self.log
        if self._held_ps:
            steps -= 1
            last_ps = step_ps + steps * growth_ps + self._held_ps
            log.add(log.pack(members, 0, context_tokens + steps * members, 0, last_ps, 0, 1))
        if steps:
            log.add(log.pack(members, 0, context_tokens, 0, step_ps, growth_ps, steps))

    def _finish_head(self, head: Batch) -> None:
        head_ps = self._head_ps
        self._clock_ps += head_ps
        late = head.late
        tokens, prefill_tokens = head.context_tokens, head.prefill_tokens
        if prefill_tokens:
            self._prefill_ps += head_ps
        log = self.log
        log.add(log.pack(head.decodes, late, tokens, prefill_tokens, head_ps, 0, 1))
        if head.firsts or late:
            self._take_tokens(head)

    def gauges(self, now_ns: int) -> tuple[int, int, int]:
        """Running, waiting, and KV blocks in use, as a scrape at this moment would read.

        vLLM says them at the end of each step (`Scheduler.make_stats`): without what came during
        it, which waits outside of the scheduler, and before the next step takes its own.
        """
        if not self._train:
            return self._state()
        over = self._steps_over(now_ns, step_ended=False)
        if not over:
            return self._told
        running, waiting, used = self._state()
        decodes = over if self._head is None else over - 1
        waiting -= sum(1 for before in self._arrivals if before >= over - 1)
        return running, waiting, used + self.scheduler.blocks_for(decodes)

    def _state(self) -> tuple[int, int, int]:
        """The same as the scheduler has it, with the blocks of no decode step of the train."""
        scheduler = self.scheduler
        used = scheduler.settings.usable_blocks - scheduler.pool.free_blocks
        return len(scheduler.running), len(scheduler.waiting), used

    def spent_ns(self, now_ns: int) -> tuple[int, int]:
        """Time spent computing until now, and how much of it in batches with prefills; the batch
        in progress counts as far as it has come."""
        end_ps, prefill_ps = self._clock_ps, self._prefill_ps
        if self._train:
            end_ps = max(end_ps, now_ns * PS_PER_NS)
            if self._head is not None and self._head.prefill_tokens:
                prefill_ps += min(end_ps - self._clock_ps, self._head_ps)
        return (end_ps - self._idle_ps) // PS_PER_NS, prefill_ps // PS_PER_NS

    @property
    def prefill_ns(self) -> int:
        """Time spent in batches with prefills, of those that are over."""
        return self._prefill_ps // PS_PER_NS

    def catch_up(self, now_ns: int) -> None:
        """Book the steps of the train that are over by now, those that end now included; for
        a simulation that stops within a train."""
        over = self._steps_over(now_ns, step_ended=True)
        if over:
            self._train, self._held_ps = over, 0  # it is the last step that is held
            self.finish(now_ns)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being computed."""
        return not self._train

    # -- starting --

    def _begin(self, now_ns: int) -> int | None:
        """Start the next train; returns when it ends, None when there is nothing to compute."""
        if self._async:
            return self._begin_ahead(now_ns)
        scheduler = self.scheduler
        steps = scheduler.decode_steps()
        if steps:
            return self._follow(steps if self.coalesce else 1)
        head = self._head = self._schedule(now_ns)
        if head is None:
            return None
        self._lead(head)
        return self._follow(scheduler.steps_after(head) if self._may_couple(head) else 0)

    def _begin_ahead(self, now_ns: int) -> int | None:
        """The same for asynchronous scheduling: the batch behind the head is formed now."""
        head = self._head
        if head is None:
            head = self._head = self._schedule(now_ns)
            if head is None:
                return None
        self._lead(head)
        following = self._following = self._schedule(now_ns)
        steps = 0
        if following is not None and not head.lasts and not following.prefills:
            steps = self.scheduler.steps_after(following) if self._may_couple(head) else 0
        return self._follow(steps)

    def _may_couple(self, head: Batch) -> bool:
        """Whether decode steps may follow the head in one train."""
        return self.coalesce and not (self.reports_first_tokens and head.firsts)

    def _schedule(self, now_ns: int) -> Batch | None:
        """Form a batch; None when nothing can be computed now."""
        scheduler = self.scheduler
        while scheduler.has_requests:
            batch = scheduler.schedule()
            if batch.literal is not None:
                self._note_missed_tokens(batch)
            if batch.decodes or batch.prefills:
                for sequence in batch.admitted:
                    if sequence.started_ns < 0:
                        sequence.started_ns = now_ns
                return batch
            if self._train:
                return None  # asynchronous: outputs on the way will change things
            # Somebody has preempted itself, which ends the step (R3) with nothing scheduled;
            # the engine's loop comes round at once.
            assert batch.preempted, "requests wait for ever: they do not fit the cache"
        return None

    def _lead(self, head: Batch) -> None:
        """The head starts now, alone so far."""
        self._train = 1
        self._head_ps = self.step_time.step_ps(
            head.decodes, head.context_tokens, head.prefill_tokens, head.prefill_pairs
        )
        if self._halted_ps > self._clock_ps:
            self._head_ps += self._halted_ps - self._clock_ps

    def _follow(self, steps: int) -> int:
        """Let that many decode steps of the group, or none, run behind the head, if there is
        one; returns when the train ends."""
        end_ps = self._clock_ps
        if self._head is not None:
            end_ps += self._head_ps
        if steps:
            scheduler = self.scheduler
            members = scheduler.members
            context_tokens = scheduler.offsets + members * scheduler.clock
            if self._following is not None:
                context_tokens = self._following.context_tokens
            slope_ps = self.step_time.slope_ps[members]
            step_ps = self.step_time.base_ps[members] + slope_ps * context_tokens
            growth_ps = slope_ps * members
            self._decodes = (members, context_tokens, step_ps, growth_ps)
            self._train += steps
            end_ps += steps * step_ps + steps * (steps - 1) // 2 * growth_ps
        return -(-end_ps // PS_PER_NS)

    # -- what steps yield --

    def _take_tokens(self, batch: Batch) -> None:
        """Note first tokens, and tokens that come more than a step after the last one."""
        self.log.fold_if_long()
        for sequence in batch.firsts:
            if sequence.first_token_ns < 0:
                sequence.first_token_ns = -(-self._clock_ps // PS_PER_NS)
                if self.reports_first_tokens:
                    self.first_tokens.append(sequence)
        for since_ps in batch.late_since_ps:
            self.log.add_late_gap(self._clock_ps - since_ps)

    def _take_aborts(self) -> None:
        for sequence in self._aborts:
            if sequence.state != DONE:
                self.scheduler.abort(sequence)
                self.aborted.append(sequence)
        self._aborts.clear()

    # -- gaps between tokens that are longer than a step --

    def _note_missed_tokens(self, batch: Batch) -> None:
        """Remember when those who get no token now got their last one."""
        last_token_ps = self._clock_ps
        if self._train:  # asynchronous: those of the head are on the way
            last_token_ps += self._head_ps
        given = (batch.literal or {}) | dict(batch.prefills)
        for sequence in (*self.scheduler.running, *batch.preempted):
            starved = sequence.state in (DECODING, WAITING) and sequence not in given
            if starved and sequence.late_since_ps < 0 and sequence.tokens > sequence.prompt_tokens:
                sequence.late_since_ps = last_token_ps

    # -- times within a train --

    def _end_ns(self) -> int:
        """When the train ends."""
        end_ps, steps = self._clock_ps + self._held_ps, self._train
        if self._head is not None:
            end_ps += self._head_ps
            steps -= 1
        if steps:
            _, _, step_ps, growth_ps = self._decodes
            end_ps += steps * step_ps + steps * (steps - 1) // 2 * growth_ps
        return -(-end_ps // PS_PER_NS)

    def _cut(self, over: int) -> int | None:
        """Let the train end with the step in progress, so many being over; returns its end if
        that is new."""
        if over + 1 == self._train:
            return None
        self._train = over + 1
        return self._end_ns()

    def _steps_over(self, now_ns: int, step_ended: bool) -> int:
        """How many of the train's steps have ended; never all of them, since the event of the
        last one is still to come."""
        # Steps whose end, rounded up to a nanosecond, is before now (or at now, if it counts).
        left_ps = (now_ns if step_ended else now_ns - 1) * PS_PER_NS - self._clock_ps
        heads = 0
        if self._head is not None:
            heads = 1
            left_ps -= self._head_ps
        if left_ps < 0 or self._train == heads:
            return 0
        _, _, step_ps, growth_ps = self._decodes
        if growth_ps:
            # The largest s with s * step + s (s - 1) / 2 * growth <= left.
            linear = 2 * step_ps - growth_ps
            steps = (isqrt(linear * linear + 8 * growth_ps * left_ps) - linear) // (2 * growth_ps)
        else:
            steps = left_ps // step_ps
        return min(heads + steps, self._train - 1)
