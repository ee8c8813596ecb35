"""One engine's batch former: vLLM V1's scheduler, synchronous and asynchronous.

Theory of operation. `schedule` forms the batch of one engine step, `update` takes its output.
The rules are numbered R1-R16 in docs/model.md. Two representations of running sequences keep
this fast and exact:

* Sequences in prefill are handled one by one.
* Sequences that decode are members of a *group*. All of them gain one token a step, so the
  group is a clock (steps so far), a count, a sum of offsets (tokens = clock + offset), a
  histogram of offsets modulo the block size (who needs a block at which step), and a heap of
  the clock readings at which members end. Nothing walks over the members.

When blocks or budget may run short the group is dissolved for one step and the rules are
followed to the letter, sequence by sequence (`_run_literally`).

Asynchronous scheduling forms step t+1 before the output of step t is known. A token then
counts from the moment its step is scheduled, here as in vLLM; what differs is that a sequence
ends one step later and that content is keyed one token later (`_lag_tokens`).
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from viisim.engine.blocks import BlockPool, Match, Node
from viisim.engine.sequence import (
    DECODING,
    DONE,
    ENDING,
    LOOSE,
    PREFILL,
    WAITING,
    Sequence,
)


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """vLLM's scheduler and cache options, under viisim's names."""

    num_kv_blocks: int
    """The pool as vLLM counts it; one block is never handed out."""
    block_tokens: int = 16
    max_num_seqs: int = 256
    """Sequences running at once (vLLM's max_num_active_seqs where that is set)."""
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    prefix_caching: bool = True
    chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    """Most prefill tokens of one sequence in a step while others run or wait; 0: no cap."""
    adaptive_long_prefill: bool = False
    reserve_full_prompt: bool = True
    """Admit only when the whole prompt would fit (vLLM's scheduler_reserve_full_isl)."""
    watermark_blocks: int = 0
    async_scheduling: bool = False

    @property
    def usable_blocks(self) -> int:
        """Blocks that can hold KV entries."""
        return self.num_kv_blocks - 1


class Batch:
    """What one engine step computes. Class attributes are the defaults; most stay."""

    decodes = 0
    """Decoding sequences in the step."""
    context_tokens = 0
    """Tokens those attend to, the new ones included."""
    prefills: tuple[tuple[Sequence, int], ...] = ()
    """(sequence, tokens) of prompts, or parts of them, computed in the step."""
    prefill_tokens = 0
    prefill_pairs = 0
    """(token, attended token) pairs of the prefills."""
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    firsts: tuple[Sequence, ...] = ()
    """Prefills that this step completes: they emit a token."""
    lasts: tuple[Sequence, ...] = ()
    """Sequences that end with this step's output."""
    late = 0
    """Of `decodes`, those that had missed a step before."""
    late_since_ps: tuple[int, ...] = ()
    """When those, and resumed ones among `firsts`, got their last token before this step's."""
    literal: dict[Sequence, int] | None = None
    """Tokens by sequence when the step was formed literally."""

    def add_prefill(self, sequence: Sequence, start: int, end: int) -> None:
        """The step computes the sequence's tokens from `start` up to `end`."""
        tokens = end - start
        self.prefills += ((sequence, tokens),)
        self.prefill_tokens += tokens
        self.prefill_pairs += tokens * start + tokens * (tokens + 1) // 2

    @property
    def is_empty(self) -> bool:
        """Whether the step computes nothing."""
        return not self.decodes and not self.prefills


class Scheduler:
    """Forms batches over one block pool."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.pool = BlockPool(
            settings.usable_blocks,
            settings.block_tokens,
            settings.prefix_caching,
            self._key_growing,
        )
        self.running: dict[Sequence, None] = {}
        """In order of admission."""
        self.waiting = WaitingQueue(settings.scheduling_policy == "priority")
        self.preemptions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._block_tokens = settings.block_tokens
        self._max_tokens = settings.max_num_batched_tokens
        self._lag_tokens = 2 if settings.async_scheduling else 1
        self._behind: set[Sequence] = set()
        """Members that got no token in the last step; the next one is formed literally."""
        self._admissions = 0
        self._prefilling: list[Sequence] = []
        self.clock = 0
        """Steps that the decode group has made."""
        self.members = 0
        """Sequences in the decode group."""
        self.offsets = 0
        """Sum of tokens - clock over the members: what they attend to is offsets + members *
        clock."""
        self._residues = [0] * settings.block_tokens
        self._ends: list[tuple[int, int, Sequence]] = []
        self._head_may_fit = False
        """The head of the queue, not admitted now, may be in the next step without any event."""

    # -- requests in and out --

    def add(self, sequence: Sequence) -> bool:
        """Queue a request; returns whether it may change what the next step does (the head
        of the queue blocks those behind it, R7)."""
        settings = self.settings
        if sequence.end_tokens > settings.max_model_len:
            sequence.end_tokens = settings.max_model_len
        is_head = self.waiting.push(sequence)
        if is_head and len(self.running) < settings.max_num_seqs:
            return True
        return settings.long_prefill_token_threshold > 0

    def abort(self, sequence: Sequence) -> None:
        """Remove a sequence wherever it is (R16). Of one that has ended: nothing."""
        state = sequence.state
        if state == DONE:
            return
        if state == WAITING:
            self.waiting.remove(sequence)
        else:
            if state == DECODING:
                self._leave_group(sequence)
            elif state == PREFILL:
                self._prefilling.remove(sequence)
            del self.running[sequence]
            self._release(sequence, sequence.tokens - self._lag(sequence))
            self._behind.discard(sequence)
        sequence.state = DONE

    @property
    def has_requests(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self.waiting)

    # -- one step --

    def schedule(self) -> Batch:
        """Form the next batch: running sequences first, then admissions (R1)."""
        batch = Batch()
        budget = -1 if self._behind else self._run_group(batch)
        if budget < 0:
            budget = self._run_literally(batch)
        self._head_may_fit = False
        if self.waiting.items and not batch.preempted:
            self._admit(batch, budget)
        return batch

    def update(self, lasts: Iterable[Sequence]) -> list[Sequence]:
        """Take a batch's output, given its `lasts`; returns the sequences that ended, blocks
        released (R15)."""
        ended = []
        for sequence in lasts:
            if sequence.state == ENDING:
                del self.running[sequence]
                self._release(sequence, sequence.tokens - 1)
            elif sequence.state == WAITING:  # preempted while its last token was on the way
                self.waiting.remove(sequence)
            else:
                continue
            sequence.state = DONE
            ended.append(sequence)
        return ended

    def _release(self, sequence: Sequence, known_tokens: int) -> None:
        """Give the blocks of a sequence back for good; those that `known_tokens` fill are
        cached. Outputs that no prompt can contain need not be keyed for that."""
        if sequence.shareable or not self.settings.prefix_caching:
            self._key(sequence, known_tokens)
            self.pool.release(sequence)
        else:
            full = min(known_tokens, sequence.computed) // self._block_tokens
            self.pool.release(sequence, max(full - sequence.keyed_blocks, 0))

    # -- running sequences, as a group --

    def _run_group(self, batch: Batch) -> int:
        """Give every running sequence its tokens; returns the budget left, or -1, and nothing
        done, when budget or blocks may not suffice for all."""
        members = self.members
        budget = self._max_tokens - members
        needed = self._residues[-self.clock % self._block_tokens] if members else 0
        prefilling = self._prefilling
        if prefilling:
            sequence = prefilling[0]
            if len(prefilling) > 1 or sequence.order != self._admissions:
                return -1
            chunk = min(sequence.tokens - sequence.computed, self._prefill_cap(), budget)
            if chunk <= 0:
                return -1
            blocks = -(-(sequence.computed + chunk) // self._block_tokens)
            needed += blocks - sequence.blocks
        pool = self.pool
        if budget < 0 or needed > pool.free_blocks:
            return -1
        if needed:
            pool.take(needed)
        if members:
            batch.decodes = members
            batch.context_tokens = self.offsets + members * self.clock
            self.clock += 1
            if self._ends[0][0] <= self.clock:
                batch.lasts = self._pop_ends()
        if prefilling:
            sequence.blocks = blocks
            start = sequence.computed
            batch.add_prefill(sequence, start, start + chunk)
            sequence.computed = start + chunk
            pool.register(sequence, sequence.computed // self._block_tokens)
            if sequence.computed == sequence.tokens:
                prefilling.clear()
                self._emit(batch, sequence)
            budget -= chunk
        return budget

    def _pop_ends(self) -> tuple[Sequence, ...]:
        """Members whose last token is scheduled now leave the group."""
        ends = self._ends
        clock = self.clock
        lasts: tuple[Sequence, ...] = ()
        while ends and ends[0][0] <= clock:
            finish_clock, _, sequence = heapq.heappop(ends)
            if sequence.state == DECODING and sequence.finish_clock == finish_clock:
                self._leave_group(sequence)
                sequence.state = ENDING
                lasts += (sequence,)
        return lasts

    def _end_with(self, batch: Batch, sequence: Sequence) -> None:
        sequence.state = ENDING
        batch.lasts += (sequence,)

    def _emit(self, batch: Batch, sequence: Sequence) -> None:
        """The prefill completes in this step, which therefore yields a token."""
        sequence.tokens += 1
        batch.firsts += (sequence,)
        if sequence.late_since_ps >= 0:
            self._come_late(batch, sequence)
        if sequence.tokens >= sequence.end_tokens:
            self._end_with(batch, sequence)
        else:
            self._join_group(sequence)

    def _prefill_cap(self) -> int:
        """Most tokens of one prefill in this step (R2)."""
        settings = self.settings
        threshold = settings.long_prefill_token_threshold
        if not threshold:
            return settings.max_num_batched_tokens
        requests = len(self.running) + len(self.waiting)
        if requests <= 1:
            return settings.max_num_batched_tokens
        if settings.adaptive_long_prefill:
            return max(threshold, settings.max_num_batched_tokens // requests)
        return threshold

    # -- the decode group --

    def _join_group(self, sequence: Sequence) -> None:
        clock = self.clock
        offset = sequence.offset = sequence.tokens - clock
        sequence.state = DECODING
        self.members += 1
        self.offsets += offset
        # A member needs a block in the step that computes its token number k * block + 1.
        self._residues[(offset - 1) % self._block_tokens] += 1
        sequence.finish_clock = sequence.end_tokens - offset
        heapq.heappush(self._ends, (sequence.finish_clock, sequence.order, sequence))
        if sequence.shareable:
            self._growing_at(sequence).append(sequence)

    def _leave_group(self, sequence: Sequence) -> None:
        """Write the sequence's own counts again."""
        offset = sequence.offset
        sequence.tokens = offset + self.clock
        sequence.computed = sequence.tokens - 1
        sequence.blocks = -(-sequence.computed // self._block_tokens)
        sequence.state = LOOSE
        self.members -= 1
        self.offsets -= offset
        self._residues[(offset - 1) % self._block_tokens] -= 1
        if sequence.shareable:
            self._key_growing(sequence.tail or self.pool.root)
            self._growing_at(sequence).remove(sequence)

    def _growing_at(self, sequence: Sequence) -> list[Sequence]:
        """The sequences adding content where this one's keyed content ends."""
        tail = sequence.tail or self.pool.root
        if tail.growing is None:
            tail.growing = []
        return tail.growing

    def _key(self, sequence: Sequence, tokens: int) -> None:
        """Key the blocks that `tokens` tokens fill (no prefill is keyed beyond its chunks)."""
        blocks = min(tokens, sequence.computed) // self._block_tokens
        if blocks > sequence.keyed_blocks:
            self.pool.register(sequence, blocks)

    def _key_growing(self, node: Node) -> None:
        """Key what the members growing behind `node` have added, in the order in which step
        by step keying would have done it: who is ahead in tokens first, then in running
        order. Members that gained no whole block stay where they are."""
        growing, node.growing = node.growing, None
        if not growing:
            return
        block_tokens = self._block_tokens
        growing.sort(key=lambda sequence: (-sequence.offset, sequence.order))
        for sequence in growing:
            blocks = (sequence.offset + self.clock - self._lag_tokens) // block_tokens
            if blocks > sequence.keyed_blocks:
                sequence.tokens = sequence.offset + self.clock
                self.pool.register(sequence, blocks)
            self._growing_at(sequence).append(sequence)

    def key_all_growing(self) -> None:
        """Key everything that decoding sequences with shareable outputs have added."""
        for sequence in self.running:
            if sequence.state == DECODING and sequence.shareable:
                self._key_growing(sequence.tail or self.pool.root)

    def tokens_of(self, sequence: Sequence) -> int:
        """Prompt and output tokens of a sequence, those on the way included."""
        return sequence.offset + self.clock if sequence.state == DECODING else sequence.tokens

    # -- running sequences, one by one --

    def _run_literally(self, batch: Batch) -> int:
        """R1-R5 to the letter, for a step in which blocks or budget may be short."""
        settings = self.settings
        pool = self.pool
        budget = settings.max_num_batched_tokens
        cap = self._prefill_cap()
        self._dissolve_group()
        for sequence in self._behind:
            self._key(sequence, sequence.computed)
        given: dict[Sequence, int] = {}
        for sequence in list(self.running):
            if sequence.state == WAITING or sequence.state == ENDING:
                continue  # preempted in this step, or its last token is on the way
            if not budget:
                break
            tokens = min(sequence.tokens - sequence.computed, cap, budget)
            while True:
                blocks = -(-(sequence.computed + tokens) // settings.block_tokens)
                if blocks - sequence.blocks <= pool.free_blocks:
                    break
                victim = self._victim()
                budget += given.pop(victim, 0)
                self._preempt(batch, victim)
                if victim is sequence:
                    break
            if sequence.state == WAITING:
                break  # R3: preempting itself ends the running phase
            pool.take(blocks - sequence.blocks)
            sequence.blocks = blocks
            sequence.computed += tokens
            budget -= tokens
            given[sequence] = tokens
            known = sequence.tokens - (self._lag(sequence) - 1 if sequence.state == LOOSE else 0)
            self._key(sequence, known)
        self._regroup(batch, given)
        self._behind = {s for s in self.running if s.state == DECODING and s not in given}
        return budget

    def _lag(self, sequence: Sequence) -> int:
        """By how many tokens its keyed content lags behind; nothing of a sequence that missed
        the last step is on the way, even asynchronously."""
        return 1 if sequence in self._behind else self._lag_tokens

    @staticmethod
    def _come_late(batch: Batch, sequence: Sequence) -> None:
        """The batch brings a token more than a step after the last one."""
        batch.late_since_ps += (sequence.late_since_ps,)
        sequence.late_since_ps = -1

    def _dissolve_group(self) -> None:
        for sequence in self.running:
            if sequence.state == DECODING:
                self._leave_group(sequence)
        self._ends.clear()

    def _regroup(self, batch: Batch, given: dict[Sequence, int]) -> None:
        """Book what was given; those that decode form the group again."""
        batch.literal = dict(given)
        for sequence in list(self.running):
            tokens = given.get(sequence, 0)
            if sequence.state == PREFILL:
                if tokens:
                    batch.add_prefill(sequence, sequence.computed - tokens, sequence.computed)
                    if sequence.computed == sequence.tokens:
                        self._prefilling.remove(sequence)
                        self._emit(batch, sequence)
            elif sequence.state == LOOSE:
                if tokens:
                    batch.decodes += 1
                    batch.context_tokens += sequence.tokens
                    sequence.tokens += 1
                    if sequence.late_since_ps >= 0:
                        batch.late += 1
                        self._come_late(batch, sequence)
                if sequence.tokens >= sequence.end_tokens:
                    self._end_with(batch, sequence)
                else:
                    self._join_group(sequence)

    def _victim(self) -> Sequence:
        """Who loses its blocks (R4)."""
        if not self.waiting.by_priority:
            return next(reversed(self.running))
        return max(self.running, key=lambda sequence: (sequence.priority, sequence.arrival))

    def _preempt(self, batch: Batch, sequence: Sequence) -> None:
        """Release everything, keep the outputs, recompute later (R5)."""
        if sequence.state == PREFILL:
            self._prefilling.remove(sequence)
        else:
            self._key(sequence, sequence.computed + 1 - self._lag(sequence))
        del self.running[sequence]
        self.pool.release(sequence)
        sequence.computed = 0
        sequence.state = WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        batch.preempted += (sequence,)
        self.waiting.put_back(sequence)

    # -- admission --

    def _admit(self, batch: Batch, budget: int) -> None:
        """Take waiting requests until one does not fit (R7, R8)."""
        settings = self.settings
        pool, running, waiting = self.pool, self.running, self.waiting
        block_tokens = self._block_tokens
        cap = self._prefill_cap()
        while waiting.items and len(running) < settings.max_num_seqs:
            if budget <= 0:
                self._head_may_fit = True
                return
            sequence = waiting.items[0]
            match = pool.match(sequence)
            start = match.blocks * block_tokens
            tokens = sequence.tokens - start
            if tokens > cap:
                tokens = cap
            if tokens > budget:
                if not settings.chunked_prefill:
                    self._head_may_fit = bool(batch.prefills)
                    return
                tokens = budget
            end = start + tokens
            blocks = -(-end // block_tokens)
            if not self._fits(sequence, match, blocks):
                self._head_may_fit = match.growing
                return
            waiting.items.popleft()
            if match.blocks:
                pool.acquire(sequence, match)
            pool.take(blocks - match.blocks)
            sequence.blocks = blocks
            sequence.computed = end
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = start
                self.queried_tokens += sequence.tokens
                self.hit_tokens += start
            self._admissions += 1
            sequence.order = self._admissions
            running[sequence] = None
            batch.admitted += (sequence,)
            batch.add_prefill(sequence, start, end)
            pool.register(sequence, end // block_tokens)
            if end == sequence.tokens:
                self._emit(batch, sequence)
            else:
                sequence.state = PREFILL
                self._prefilling.append(sequence)
            budget -= tokens

    def _fits(self, sequence: Sequence, match: Match, blocks: int) -> bool:
        """The block tests of R8; `blocks` is what hit and chunk need together."""
        settings = self.settings
        if settings.reserve_full_prompt:  # no sequence is longer than max_model_len
            blocks = -(-sequence.tokens // self._block_tokens)
        if settings.watermark_blocks and self.running:
            # Waived when nothing runs, or a request could starve.
            blocks += settings.watermark_blocks
        return blocks - match.blocks + match.unused_blocks <= self.pool.free_blocks

    # -- many steps at once --

    def decode_steps(self) -> int:
        """How many steps, from now on, are sure to be decode steps of the group and nothing
        else, if nothing arrives and nothing is aborted."""
        members = self.members
        if not members or self.waiting.items or self._prefilling or self._behind:
            return 0
        if members > self._max_tokens:
            return 0
        return self._steps_to_an_end()

    def steps_after(self, batch: Batch) -> int:
        """The same for the steps after `batch`, which has just been scheduled: whoever waits
        now, waits on."""
        if (
            batch.lasts
            or batch.literal is not None
            or self._prefilling
            or self._head_may_fit
            or not self.members
            or self.members > self._max_tokens
        ):
            return 0
        return self._steps_to_an_end()

    def _steps_to_an_end(self) -> int:
        """How many decode steps there are until a member ends, as far as the blocks last."""
        ends = self._ends
        while ends[0][2].state != DECODING or ends[0][2].finish_clock != ends[0][0]:
            heapq.heappop(ends)
        steps = ends[0][0] - self.clock
        if self.pool.free_blocks >= self.members * (steps // self._block_tokens + 1):
            return steps
        return self._steps_with_blocks(steps)

    def _steps_with_blocks(self, steps: int) -> int:
        """How many of `steps` decode steps the free blocks allow."""
        # In a whole cycle of block_tokens steps every member takes one block.
        cycle = self._block_tokens
        cycles, free = divmod(self.pool.free_blocks, self.members)
        allowed = cycles * cycle
        while allowed < steps:
            free -= self._residues[(-self.clock - allowed) % cycle]
            if free < 0:
                break
            allowed += 1
        return min(allowed, steps)

    def blocks_for(self, steps: int) -> int:
        """Blocks that the group takes in its next `steps` steps."""
        residues = self._residues
        cycle = len(residues)
        whole, rest = divmod(steps, cycle)
        # Step i of the rest takes residues[(-clock - i) % cycle]: a slice, perhaps in two parts.
        start = (1 - self.clock - rest) % cycle
        blocks = whole * self.members + sum(residues[start : start + rest])
        if start + rest > cycle:
            blocks += sum(residues[: start + rest - cycle])
        return blocks

    def advance(self, steps: int) -> tuple[Sequence, ...]:
        """Make `steps` decode steps of the group without forming their batches; returns who
        ends with the last of them."""
        self.pool.take(self.blocks_for(steps))
        self.clock += steps
        return self._pop_ends() if self._ends[0][0] <= self.clock else ()


class WaitingQueue:
    """The engine's queue: first come first served with preempted sequences in front, or by
    (priority, arrival, name) (R5, R6)."""

    __slots__ = ("by_priority", "items")

    def __init__(self, by_priority: bool) -> None:
        self.by_priority = by_priority
        self.items: deque[Sequence] = deque()
        """In queue order."""

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.items)

    def push(self, sequence: Sequence) -> bool:
        """Queue a new request; returns whether it is the head now."""
        items = self.items
        if self.by_priority:
            insort(items, sequence, key=_urgency)
            return items[0] is sequence
        items.append(sequence)
        return len(items) == 1

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence."""
        if self.by_priority:
            insort(self.items, sequence, key=_urgency)
        else:
            self.items.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the middle."""
        self.items.remove(sequence)


def _urgency(sequence: Sequence) -> tuple[int, float, str]:
    """R6: names compare as text, so "r10" comes before "r9"."""
    return (sequence.priority, sequence.arrival, sequence.name)
