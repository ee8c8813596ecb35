"""What prompts have in common: system prompts, and passages of a document store.

Prompts are pieces `(segment, tokens)`; see `viisim.workload.request`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from viisim.errors import InputError
from viisim.workload import parameters
from viisim.workload.interface import SharedPrefix
from viisim.workload.lengths import Lengths

Pieces: TypeAlias = tuple[tuple[Hashable, int], ...]

_MOST_PASSAGES = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """Prompts that begin alike, as with system prompts.

    A `share` of the prompts begins with one of `groups` prefixes of `tokens` tokens, all equally
    likely. The prefix takes the place of the prompt's first tokens; a prompt shorter than
    `tokens + 1` is lengthened to that, so something of its own always follows. In a mixture,
    prefixes of the same `name` are the same prefixes.
    """

    share: float
    groups: int
    tokens: int
    name: str = ""

    def __post_init__(self) -> None:
        """Raises InputError for an impossible value."""
        parameters.share("prefixes.share", self.share)
        parameters.whole("prefixes.groups", self.groups)
        parameters.whole("prefixes.tokens", self.tokens, parameters.MAX_TOKENS - 1)

    def segment(self, group: int) -> Hashable:
        """The content of a group's prefix."""
        return SharedPrefix(self.name, group) if self.name else group

    def blocks(self, group: int, block_tokens: int) -> tuple[int, ...]:
        """The ids of the full blocks of a group's prefix."""
        return chained_blocks([(self.segment(group), self.tokens)], block_tokens)

    def draw(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The group for each pair of uniform variates, -1 for no prefix."""
        groups = (uniforms[:, 1] * self.groups).astype(np.int64)
        return np.where(uniforms[:, 0] < self.share, groups, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """Retrieved passages: a `share` of the prompts contains `per_request` of a pool.

    They stand behind the prefix, before the request's own tokens, and come on top of the
    prompt's length. Passage number r is drawn with probability proportional to r^-`zipf`; one
    drawn twice stands once. A passage has the same tokens in every prompt of every run with
    the same seed. An engine finds it in its prefix cache only where all before it is the same
    too: `behind_own_tokens` of the request's own before the passages leave nothing to find.
    """

    pool: int
    per_request: int
    zipf: float
    tokens: Lengths
    share: float = 1.0
    behind_own_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for an impossible value."""
        parameters.whole("passages.pool", self.pool, _MOST_PASSAGES)
        parameters.whole("passages.per_request", self.per_request, 1000)
        parameters.share("passages.share", self.share)
        if not 0 <= self.zipf <= 10:
            raise InputError(f"passages.zipf: {self.zipf!r} is not possible; use 0 to 10")
        if self.behind_own_tokens:
            parameters.whole("passages.behind_own_tokens", self.behind_own_tokens, 10**6)


class Library:
    """The passages of one seed: their lengths and popularity."""

    def __init__(self, passages: Passages, lengths: Generator) -> None:
        """`lengths` is a stream of its own: passage r is as long in a pool of any size."""
        self._passages = passages
        self.tokens: list[int] = passages.tokens.tokens(
            lengths.standard_normal(passages.pool)
        ).tolist()
        weights = np.arange(1, passages.pool + 1) ** -float(passages.zipf)
        self._below = np.cumsum(weights) / weights.sum()

    def draw(self, stream: Generator, count: int) -> list[tuple[int, ...]]:
        """The passages of the next `count` requests."""
        uniforms = stream.random((count, 1 + self._passages.per_request))
        chosen = np.searchsorted(self._below, uniforms[:, 1:], side="right")
        rows: list[list[int]] = np.minimum(chosen, self._passages.pool - 1).tolist()
        has_any: list[bool] = (uniforms[:, 0] < self._passages.share).tolist()
        return [
            tuple(dict.fromkeys(row)) if some else ()
            for row, some in zip(rows, has_any, strict=True)
        ]


def chained_blocks(pieces: Sequence[tuple[Hashable, int]], block_tokens: int) -> tuple[int, ...]:
    """Ids of the full blocks of a content: equal exactly where all up to there is equal.

    They are hashes of 56 bits, the same in every process; below 0 as long as all is of a
    `SharedPrefix`.
    """
    blocks: list[int] = []
    chain, room, is_named = 0, block_tokens, True
    slices: list[tuple[Hashable, int, int]] = []
    for segment, tokens in pieces:
        is_named = is_named and isinstance(segment, SharedPrefix)
        at = 0
        while at < tokens:
            taken = min(room, tokens - at)
            slices.append((segment, at, taken))
            at += taken
            room -= taken
            if not room:
                chain = _link(chain, tuple(slices))
                blocks.append(-1 - chain if is_named else chain)
                slices, room = [], block_tokens
    return tuple(blocks)


@lru_cache(maxsize=1 << 16)
def _link(chain: int, slices: tuple[tuple[Hashable, int, int], ...]) -> int:
    # Not hash(): Python salts the hash of a string anew in every process.
    digest = blake2b(repr((chain, slices)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
