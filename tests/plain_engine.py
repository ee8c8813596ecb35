"""A plain model of vLLM V1's scheduler: one block, one key, one step at a time.

The oracle of the fast engine. It obeys the rules R1-R16 of golden/FORMAT.md (and its section 5
for asynchronous scheduling) as literally as it can and makes no attempt at speed. The words are
the rules' own: L is a sequence's length (prompt and outputs so far), P the number of its tokens
that are on the way but not known yet (always 0 with synchronous scheduling).
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import takewhile

from viisim.conform import Observation
from viisim.golden import GoldenConfig, GoldenRequest

Key = tuple[tuple[int, int, int], ...]
"""All tokens from the start of a sequence to the end of a block, as runs (segment, k of the first
token, tokens), each as long as possible: two keys are equal iff all their tokens are (R11)."""


@dataclass(eq=False)
class Block:
    """A block of the KV cache."""

    number: int
    users: int = 0
    key: Key | None = None


class BlockPool:
    """The free queue and the prefix cache (R9-R14)."""

    def __init__(self, usable_blocks: int) -> None:
        numbered = (Block(number) for number in range(1, usable_blocks + 1))
        self.free = OrderedDict((block, str(block.number)) for block in numbered)
        """The free queue, front first, with each block's number as text."""
        self.holders: dict[Key, dict[Block, None]] = {}
        """The blocks that carry a key, in the order of their registration (R13)."""

    def take(self, count: int) -> list[Block]:
        """R9: from the front; a block that carried a key is evicted."""
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            block.users = 1
        return blocks

    def _forget(self, block: Block) -> None:
        if block.key is None:
            return
        del self.holders[block.key][block]
        if not self.holders[block.key]:
            del self.holders[block.key]
        block.key = None

    def register(self, block: Block, key: Key) -> None:
        """R12, R13: a duplicate is registered too."""
        block.key = key
        self.holders.setdefault(key, {})[block] = None

    def find(self, keys: list[Key]) -> list[Block]:
        """R11, R13: up to the first missing key; of each the longest registered holder."""
        return [next(iter(self.holders[k])) for k in takewhile(self.holders.__contains__, keys)]

    def use(self, blocks: list[Block]) -> None:
        """R14: a hit takes unused blocks out of the free queue."""
        for block in blocks:
            if block.users == 0:
                del self.free[block]
            block.users += 1

    def release(self, blocks: list[Block]) -> None:
        """R10: from last to first; blocks without a key to the front, others to the back."""
        for block in blocks:
            block.users -= 1
        unused = [block for block in reversed(blocks) if block.users == 0]
        for block in unused:
            self.free[block] = str(block.number)
        for block in reversed([block for block in unused if block.key is None]):
            self.free.move_to_end(block, last=False)


@dataclass(eq=False)
class Sequence:
    """A request inside the engine."""

    request: GoldenRequest
    tokens: list[tuple[int, int]]
    """Prompt and outputs so far; L of them."""
    blocks: list[Block] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    """Keys of the first whole blocks of `tokens`; see `PlainEngine._keys`."""
    computed: int = 0
    expected: int = 0
    """P."""
    preemptions: int = 0
    ended: bool = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def outputs(self) -> int:
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def urgency(self) -> tuple[int, float]:
        """R4: the largest one is the victim."""
        return self.request.priority, self.request.arrival_time


@dataclass
class Step:
    """One `schedule()` under way."""

    budget: int
    cap: int
    """The long-prefill cap (R2)."""
    scheduled: dict[Sequence, int] = field(default_factory=dict)
    admitted: dict[Sequence, int] = field(default_factory=dict)
    """With the tokens of their prefix hits."""
    preempted: list[Sequence] = field(default_factory=list)


class PlainEngine:
    """A `viisim.conform.StepEngine`."""

    def __init__(self, config: GoldenConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.usable_blocks)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.batches: deque[list[Sequence]] = deque()
        """In flight, oldest first: of each, the sequences that will get a token."""

    # What a driver calls

    @property
    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def batches_in_flight(self) -> int:
        return len(self.batches)

    @property
    def free_blocks(self) -> int:
        return len(self.pool.free)

    def free_queue(self) -> list[Key | None]:
        """Content of the free blocks, front to back; None for a block without a key."""
        return [block.key for block in self.pool.free]

    def freeq_crc(self) -> int:
        return zlib.crc32(",".join(self.pool.free.values()).encode())

    def add(self, request: GoldenRequest) -> None:
        tokens = [(segment, k) for segment, length in request.prompt for k in range(length)]
        self.waiting.append(Sequence(request, tokens))
        self._sort_waiting()

    def abort(self, request_id: str) -> None:
        """R16."""
        for sequence in self.running + self.waiting:
            if sequence.id == request_id:
                self._end(sequence)

    def schedule(self) -> Observation:
        """R1."""
        step = Step(self.config.max_num_batched_tokens, self._cap())
        self._schedule_running(step)
        if not step.preempted:
            self._admit_waiting(step)
        if step.scheduled:
            self.batches.append(self._sampling(step))
        return Observation(
            scheduled=[(s.id, tokens) for s, tokens in step.scheduled.items()],
            new=[s.id for s in step.admitted if not s.preemptions],
            resumed=[s.id for s in step.admitted if s.preemptions],
            preempted=[s.id for s in step.preempted],
            cached=[(s.id, hit) for s, hit in step.admitted.items()],
            running=[s.id for s in self.running],
            computed=[s.computed for s in self.running],
            waiting=[s.id for s in self.waiting],
            free_blocks=self.free_blocks,
            hashes=len(self.pool.holders),
        )

    def update(self) -> list[str]:
        """Each sequence that computed all its tokens gets one more; ids of those it ends."""
        finished = []
        for sequence in self.batches.popleft():
            if sequence.ended:
                continue
            self._append_output(sequence)
            if self._is_complete(sequence):
                self._end(sequence)
                finished.append(sequence.id)
        return finished

    # The running phase

    def _cap(self) -> int:
        """R2: counted once, at the start of the step."""
        requests = len(self.running) + len(self.waiting)
        threshold = self.config.long_prefill_token_threshold
        if threshold == 0 or requests <= 1:
            return self.config.max_num_batched_tokens
        if self.config.long_prefill_token_threshold_adaptive:
            return max(threshold, self.config.max_num_batched_tokens // requests)
        return threshold

    def _schedule_running(self, step: Step) -> None:
        """R1-R3."""
        position = 0
        while position < len(self.running) and step.budget > 0:
            sequence = self.running[position]
            tokens = self._running_tokens(sequence, step)
            if tokens > 0:
                if not self._make_room(sequence, tokens, step):
                    return
                self._compute(sequence, tokens, step)
            # A victim that stood before it has shifted the list.
            position = self.running.index(sequence) + 1

    def _running_tokens(self, sequence: Sequence, step: Step) -> int:
        """R2; 0: passed over, its last token is on the way (section 5)."""
        length, computed, expected = len(sequence.tokens), sequence.computed, sequence.expected
        limit = sequence.request.prompt_tokens + sequence.request.output_tokens
        if expected > 0 and computed + 2 - expected >= limit:
            return 0
        room = self.config.max_model_len - computed - 1
        return min(length + expected - computed, step.cap, step.budget, room)

    def _make_room(self, sequence: Sequence, tokens: int, step: Step) -> bool:
        """R3: preempt until the blocks suffice; False if that hit the sequence itself."""
        while self._new_blocks(sequence, tokens) > self.free_blocks:
            victim = self._victim()
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _victim(self) -> Sequence:
        """R4; `max` takes the first of equals."""
        if self.config.policy == "fcfs":
            return self.running[-1]
        return max(self.running, key=lambda sequence: sequence.urgency)

    def _preempt(self, victim: Sequence, step: Step) -> None:
        """R4, R5."""
        step.budget += step.scheduled.pop(victim, 0)
        step.preempted.append(victim)
        self._release(victim)
        victim.computed = victim.expected = 0
        victim.preemptions += 1
        self.running.remove(victim)
        self.waiting.insert(0, victim)
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        """R6."""
        if self.config.policy == "priority":
            self.waiting.sort(key=lambda sequence: (*sequence.urgency, sequence.id))

    # Admission

    def _admit_waiting(self, step: Step) -> None:
        """R7: a head that cannot be admitted blocks the queue."""
        while (
            self.waiting
            and step.budget > 0
            and len(self.running) < self.config.max_num_active_seqs
            and self._admit(self.waiting[0], step)
        ):
            pass

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        hits = self._hits(sequence)
        hit_tokens = len(hits) * self.config.block_size
        tokens = min(len(sequence.tokens) - hit_tokens, step.cap)
        if tokens > step.budget and not self.config.enable_chunked_prefill:
            return False
        tokens = min(tokens, step.budget)
        if not self._fits(sequence, hits, tokens):
            return False
        self.pool.use(hits)
        sequence.blocks = hits
        sequence.computed = hit_tokens
        self.running.append(self.waiting.pop(0))
        step.admitted[sequence] = hit_tokens
        self._compute(sequence, tokens, step)
        return True

    def _hits(self, sequence: Sequence) -> list[Block]:
        """R11: the last token is always computed."""
        return self.pool.find(self._keys(sequence, up_to=len(sequence.tokens) - 1))

    def _fits(self, sequence: Sequence, hits: list[Block], tokens: int) -> bool:
        """R8."""
        unused_hits = sum(block.users == 0 for block in hits)
        watermark = self.config.watermark_blocks if self.running else 0
        room = self.free_blocks - unused_hits - watermark + len(hits)
        length = min(len(sequence.tokens), self.config.max_model_len)
        if self.config.scheduler_reserve_full_isl and self._need(length) > room:
            return False
        return self._need(len(hits) * self.config.block_size + tokens) <= room

    # Blocks and tokens

    def _need(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _new_blocks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks it lacks to compute that many more tokens (R3)."""
        return max(0, self._need(sequence.computed + tokens) - len(sequence.blocks))

    def _compute(self, sequence: Sequence, tokens: int, step: Step) -> None:
        """Schedule tokens that fit: take blocks (R9) and key them (R12)."""
        sequence.blocks += self.pool.take(self._new_blocks(sequence, tokens))
        sequence.computed += tokens
        self._register(sequence, up_to=min(sequence.computed, len(sequence.tokens)))
        step.scheduled[sequence] = tokens
        step.budget -= tokens

    def _register(self, sequence: Sequence, up_to: int) -> None:
        """R12: each block that these tokens cover completely gets its key."""
        keys = self._keys(sequence, up_to)
        for block, key in zip(sequence.blocks, keys, strict=False):
            if block.key is None:
                self.pool.register(block, key)

    def _keys(self, sequence: Sequence, up_to: int) -> list[Key]:
        """Keys of the whole blocks among the first `up_to` tokens; none with caching off."""
        if not self.config.enable_prefix_caching:
            return []
        size, keys = self.config.block_size, sequence.keys
        for end in range((len(keys) + 1) * size, len(sequence.tokens) + 1, size):
            keys.append(_extended(keys[-1] if keys else (), sequence.tokens[end - size : end]))
        return keys[: up_to // size]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    # Output

    def _sampling(self, step: Step) -> list[Sequence]:
        """Sequences of the batch whose known and expected tokens are all computed."""
        sampling = [s for s in step.scheduled if s.computed == len(s.tokens) + s.expected]
        if self.config.async_scheduling:
            for sequence in sampling:
                sequence.expected += 1
        return sampling

    def _append_output(self, sequence: Sequence) -> None:
        """Section 5: blocks that waited for an expected token are keyed now. A preempted
        sequence expects nothing and holds no block, but the token counts."""
        sequence.tokens.append((sequence.request.out_seg, sequence.outputs))
        sequence.expected = max(0, sequence.expected - 1)
        self._register(sequence, up_to=sequence.computed - sequence.expected)

    def _is_complete(self, sequence: Sequence) -> bool:
        """R15."""
        too_long = len(sequence.tokens) >= self.config.max_model_len
        return too_long or sequence.outputs >= sequence.request.output_tokens

    def _end(self, sequence: Sequence) -> None:
        """R15, R16."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)
        sequence.ended = True


def _extended(key: Key, tokens: list[tuple[int, int]]) -> Key:
    """The key of the block that holds `tokens` behind the one of `key`."""
    runs = list(key)
    for segment, k in tokens:
        if runs and runs[-1][0] == segment and sum(runs[-1][1:]) == k:
            runs[-1] = (segment, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((segment, k, 1))
    return tuple(runs)
