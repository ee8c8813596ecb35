"""The KV block pool with its prefix cache, in extents.

A prompt of 1,155 tokens is 73 blocks; touching each would cost more than everything else the
engine does. So blocks are counted, not numbered, and the cache is kept in *runs*: consecutive
blocks of one request. The rules are vLLM's (docs/model.md, rules R8-R14); only the bookkeeping
differs, and a plain per-block model checks it block by block in the tests.

Content is a radix tree. A `Node` is a stretch of consecutive block contents behind one prefix;
its `runs` are the physical holders of that content, oldest first (equal prompts computed at the
same time hold the same content twice, R13). A run covers its node from the start; eviction
takes its deepest blocks first, so it may cover less than the node. When a request shares only
the first part of a node, the node and its runs split.

The free queue (R9, R10) is: blocks without content, a mere count, then cached blocks nobody
uses, least recently released first. One release is one entry, consumed from the deep end.
Eviction is put off: which cached blocks are gone matters only to a look-up that finds some, so
`take` runs up a debt that is settled then, a whole run at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TypeAlias

from viisim.engine.sequence import Sequence

#: What a prompt is made of: (segment, tokens).
Pieces: TypeAlias = tuple[tuple[Hashable, int], ...]
#: Names the content of one block relative to the blocks before it: (segment, first token) for
#: a block inside one piece, else a tuple of (segment, first token, tokens) slices.
BlockKey: TypeAlias = tuple[Hashable, ...]


def spans(pieces: Pieces, block_tokens: int, first: int, last: int) -> list[tuple[BlockKey, int]]:
    """The blocks first..last-1 of the content, as (key of the first block, number of blocks).

    The blocks of one span lie in one piece, so each key follows from the one before.
    """
    if len(pieces) == 1:
        return [((pieces[0][0], first * block_tokens), last - first)] if first < last else []
    found: list[tuple[BlockKey, int]] = []
    at, target, start, index = first * block_tokens, last * block_tokens, 0, 0
    while at < target:
        segment, length = pieces[index]
        end = start + length
        if at >= end:
            start, index = end, index + 1
            continue
        whole = (min(end, target) - at) // block_tokens
        if whole:
            found.append(((segment, at - start), whole))
            at += whole * block_tokens
            continue
        slices: list[Hashable] = []
        block_end = at + block_tokens
        while at < block_end:
            segment, length = pieces[index]
            take = min(start + length, block_end) - at
            if take:
                slices.append((segment, at - start, take))
            at += take
            if at == start + length:
                start, index = at, index + 1
        found.append((tuple(slices), 1))
    return found


class Node:
    """A stretch of block contents behind one prefix."""

    __slots__ = ("blocks", "children", "growing", "key", "parent", "runs")

    def __init__(self, parent: Node | None, key: BlockKey, blocks: int) -> None:
        self.parent = parent
        self.key = key
        self.blocks = blocks
        self.children: dict[BlockKey, Node] = {}
        self.runs: list[Run] = []
        self.growing: list[Sequence] | None = None
        """Sequences decoding shareable outputs behind this node, not yet keyed."""


class Run:
    """Consecutive blocks of one holder: the first `blocks` contents of `node`. Blocks beyond
    those of the node, or without a node, are private: nobody can look them up."""

    __slots__ = ("blocks", "halves", "node", "release", "users")

    def __init__(self, node: Node | None, blocks: int, users: int, release: int = 0) -> None:
        self.node = node
        self.blocks = blocks
        self.users = users
        self.release = release
        """Its entry in the free queue; meaningless while used."""
        self.halves: tuple[Run, Run] | None = None
        """Set when the run was split: its holders then hold both halves."""

    def leaves(self) -> Iterator[Run]:
        """The unsplit parts, shallow first."""
        if self.halves is None:
            yield self
        else:
            for half in self.halves:
                yield from half.leaves()


class Match:
    """The result of a prefix look-up; `BlockPool.acquire` turns it into a hit."""

    __slots__ = ("blocks", "growing", "path", "unused_blocks")

    def __init__(self) -> None:
        self.blocks = 0
        self.unused_blocks = 0
        """Hit blocks that nobody uses: a hit takes them out of the free queue."""
        self.path: list[tuple[Node, int]] = []
        self.growing = False
        """The look-up ended where a running sequence is still adding content."""


_NO_MATCH = Match()


class BlockPool:
    """`usable_blocks` KV blocks of `block_tokens` tokens.

    `key_growing` is called before a look-up or a registration walks on from a node where
    sequences are still adding content, and must key what they have added so far.
    """

    def __init__(
        self,
        usable_blocks: int,
        block_tokens: int,
        caching: bool,
        key_growing: Callable[[Node], None] = lambda node: None,
    ) -> None:
        self.usable_blocks = usable_blocks
        self.block_tokens = block_tokens
        self.caching = caching
        self.free_blocks = usable_blocks
        self.blank_blocks = usable_blocks
        """Those of the free blocks that carry no content."""
        self.contents = 0
        """Distinct block contents in the cache, used or not."""
        self.root = Node(None, (), 0)
        self._key_growing = key_growing
        self._debt = 0
        """Cached blocks taken whose content is still in the tree."""
        self._most_debt = max(usable_blocks // 4, 1)
        self._releases: OrderedDict[int, list[Run]] = OrderedDict()
        self._next_release = 0

    # -- taking and releasing --

    def take(self, blocks: int) -> None:
        """Take blocks from the front of the free queue; content in the way is evicted (R9)."""
        self.free_blocks -= blocks
        if blocks <= self.blank_blocks:
            self.blank_blocks -= blocks
        else:
            self._debt += blocks - self.blank_blocks
            self.blank_blocks = 0
            if self._debt > self._most_debt:
                self.settle()

    def release(self, sequence: Sequence, private_blocks: int = 0) -> None:
        """Give back all blocks of the sequence (R10).

        `private_blocks`: full blocks behind the keyed ones whose content nobody can look up
        again; they queue as cached blocks do, but need no place in the tree.
        """
        held = sequence.runs
        if len(held) == 1 and held[0].halves is None:
            runs = held  # by far the most frequent case
        else:
            runs = [run for handle in held for run in handle.leaves()]
        freed = []
        cached = private_blocks
        for run in runs:
            run.users -= 1
            if not run.users:
                freed.append(run)
                cached += run.blocks
        if private_blocks:
            self.contents += private_blocks
            if freed and freed[-1] is runs[-1]:
                freed[-1].blocks += private_blocks
            else:
                freed.append(Run(None, private_blocks, 0))
        if freed:
            entry = self._next_release = self._next_release + 1
            self._releases[entry] = freed
            for run in freed:
                run.release = entry
        blank = sequence.blocks - sequence.keyed_blocks - private_blocks
        self.blank_blocks += blank
        self.free_blocks += blank + cached
        sequence.runs = []
        sequence.blocks = sequence.keyed_blocks = 0
        sequence.tail = None

    def settle(self) -> None:
        """Evict what has been taken: oldest release first, deepest block first."""
        debt, self._debt = self._debt, 0
        releases = self._releases
        while debt:
            entry, runs = next(iter(releases.items()))
            while debt and runs:
                run = runs[-1]
                taken = run.blocks if run.blocks < debt else debt
                debt -= taken
                node = run.node
                if node is None or len(node.runs) == 1:
                    self.contents -= taken
                else:
                    others = max(other.blocks for other in node.runs if other is not run)
                    self.contents -= min(taken, max(0, run.blocks - others))
                run.blocks -= taken
                if not run.blocks:
                    runs.pop()
                    if node is not None:
                        node.runs.remove(run)
                        if not node.runs and not node.children:
                            self._prune(node)
            if not runs:
                del releases[entry]

    def _prune(self, node: Node) -> None:
        """Remove a node that holds nothing, and ancestors that existed only for it."""
        while node.parent is not None and not node.runs and not node.children:
            del node.parent.children[node.key]
            node = node.parent

    # -- looking up --

    def match(self, sequence: Sequence) -> Match:
        """The longest cached prefix, at most all but the last token, whole blocks (R11)."""
        if not self.caching:
            return _NO_MATCH
        node = self.root
        if node.growing:
            self._key_growing(node)
        segment, tokens = sequence.prompt[0]
        begins_with_block = tokens >= self.block_tokens
        if begins_with_block and (segment, 0) not in node.children and not node.growing:
            return _NO_MATCH  # by far the most frequent case
        found = Match()
        limit = (sequence.tokens - 1) // self.block_tokens
        for key, blocks in spans(sequence.content, self.block_tokens, 0, limit):
            while blocks:
                child = node.children.get(key)
                if child is None:
                    found.growing = bool(node.growing)
                    return found
                if self._debt:
                    self.settle()
                    continue
                wanted = min(blocks, child.blocks)
                covered = 0
                for run in child.runs:
                    if run.blocks > covered:
                        reach = min(run.blocks, wanted)
                        if not run.users:
                            found.unused_blocks += reach - covered
                        covered = reach
                        if covered == wanted:
                            break
                if covered:
                    found.path.append((child, covered))
                    found.blocks += covered
                if covered < child.blocks:
                    return found
                node = child
                if node.growing:
                    self._key_growing(node)
                blocks -= wanted
                if blocks:
                    key = self._advance(key, wanted)
        found.growing = bool(node.growing)
        return found

    def acquire(self, sequence: Sequence, match: Match) -> None:
        """Use the matched blocks, the oldest holder of each (R13, R14)."""
        node = self.root
        for node, covered in match.path:
            if covered < node.blocks:
                node = self._split(node, covered)
            while True:
                run = node.runs[0]
                if run.blocks < node.blocks:
                    self._use(self._split(node, run.blocks).runs[0], sequence)
                else:
                    self._use(run, sequence)
                    break
        sequence.tail = node
        sequence.blocks = sequence.keyed_blocks = match.blocks

    def _use(self, run: Run, sequence: Sequence) -> None:
        if not run.users:
            self._leave_queue(run)
            self.free_blocks -= run.blocks
        run.users += 1
        sequence.runs.append(run)

    def _leave_queue(self, run: Run) -> None:
        """Take a run that is wanted again out of the free queue; its private blocks stay."""
        runs = self._releases[run.release]
        assert run.node is not None, "private runs are never wanted again"
        private = run.blocks - run.node.blocks
        if private:
            run.blocks -= private
            runs[runs.index(run)] = Run(None, private, 0, run.release)
        else:
            runs.remove(run)
            if not runs:
                del self._releases[run.release]

    # -- registering --

    def register(self, sequence: Sequence, blocks: int) -> None:
        """Key the sequence's blocks up to the first `blocks` (R12, R13)."""
        keyed = sequence.keyed_blocks
        if blocks <= keyed or not self.caching:
            return
        sequence.keyed_blocks = blocks
        node = sequence.tail or self.root
        runs = sequence.runs
        for key, count in spans(sequence.content, self.block_tokens, keyed, blocks):
            while count:
                if node.growing:
                    self._key_growing(node)
                child = node.children.get(key)
                if child is None:
                    node.children[key] = child = Node(node, key, count)
                    self.contents += count
                elif self._debt:
                    self.settle()
                    continue
                else:
                    if count < child.blocks:
                        child = self._split(child, count)
                    covered = max((run.blocks for run in child.runs), default=0)
                    self.contents += max(child.blocks - covered, 0)
                run = Run(child, child.blocks, 1)
                child.runs.append(run)
                runs.append(run)
                count -= child.blocks
                node = child
                if count:
                    key = self._advance(key, child.blocks)
        sequence.tail = node

    def _advance(self, key: BlockKey, blocks: int) -> BlockKey:
        segment, token = key
        assert isinstance(token, int), "only a one-block span straddles pieces"
        return (segment, token + blocks * self.block_tokens)

    def _split(self, node: Node, at: int) -> Node:
        """Cut the node behind its first `at` blocks; returns the new, upper node.

        The object `node` becomes the lower part, so that a sequence whose content ends with
        `node` still ends there.
        """
        assert node.parent is not None, "the root is never split"
        upper = Node(node.parent, node.key, at)
        node.parent.children[node.key] = upper
        node.key = self._advance(node.key, at)
        node.parent = upper
        node.blocks -= at
        lower_runs: list[Run] = []
        for run in node.runs:
            if run.blocks <= at:
                run.node = upper
                upper.runs.append(run)
                continue
            shallow = Run(upper, at, run.users, run.release)
            deep = Run(node, run.blocks - at, run.users, run.release)
            if not run.users:
                runs = self._releases[run.release]
                index = runs.index(run)
                runs[index : index + 1] = (shallow, deep)
            run.halves = (shallow, deep)
            upper.runs.append(shallow)
            lower_runs.append(deep)
        node.runs = lower_runs
        if lower_runs or node.children:
            upper.children[node.key] = node
        return upper

    # -- for checks --

    def free_queue(self) -> Iterator[Run]:
        """Cached blocks nobody uses in the order of eviction: deepest block of each run first."""
        self.settle()
        for runs in self._releases.values():
            yield from reversed(runs)
