"""What every workload offers, and the conventions they share.

Segments of prompts name their content. Whole numbers from 0 up name content that several prompts
of one workload may contain: hash ids of a trace, groups of a synthetic prefix. Numbers below 0
belong to one request alone: `own_segment`. A `SharedPrefix` means the same content in every part
of a mixture. So none collide.

Prefix blocks, which schedulers see, follow the same rule: ids from 0 up have a meaning within
their workload; ids below 0 name blocks of a `SharedPrefix` only, and mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from viisim.workload import parameters
from viisim.workload.request import Request

DEFAULT_MAX_OUTPUT_TOKENS = 2048
"""The output limit of a request unless the workload states another. It is above the longest
answer of the public Azure (1,899) and Mooncake (2,000) traces, so by default none is cut."""

CHUNK_REQUESTS = 16_384
"""Requests prepared at a time: enough for numpy to pay, a few MiB however long the workload."""

BLOCK_TOKENS = 64
"""Tokens per prefix block of generated conversations, as in the Weka traces."""

_INDEX_BITS = 28


class Workload(Protocol):
    """A source of requests."""

    @property
    def total_requests(self) -> int:
        """How many requests a run has, the later turns of closed-loop sessions included."""

    @property
    def cut_outputs(self) -> int:
        """Answers shortened to the output limit among the requests prepared so far."""

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests in order of arrival; equal seeds, equal requests.

        Of a closed-loop session it gives the first; `Request.next_turn` gives the others. Ids
        differ; those of workloads without sessions are `r0`, `r1`, ... `arrived_ns` never
        decreases, and `view.arrived_s` is `arrived_ns / 1e9`. Raises InputError for a negative
        seed.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a workload says of all its requests."""

    traffic_class: str = ""
    tenant: str = ""
    priority: int = 0
    """Smaller is more urgent, as in vLLM."""
    deadline_s: float | None = None
    """From arrival: a request still in the central queue by then is shed."""

    def __post_init__(self) -> None:
        """Raises InputError for an impossible deadline."""
        if self.deadline_s is not None:
            parameters.positive("deadline_s", self.deadline_s)

    def due_s(self, arrived_s: float) -> float | None:
        """The deadline of a request that arrives then."""
        return None if self.deadline_s is None else arrived_s + self.deadline_s


class SharedPrefix(NamedTuple):
    """The segment of a named prefix group: the same content wherever the name is the same."""

    name: str
    group: int


def own_segment(index: int) -> int:
    """The segment of request number `index` that no other prompt contains."""
    return -1 - index


def is_own(segment: Hashable) -> bool:
    """Whether the segment is one that no other prompt contains."""
    return isinstance(segment, int) and segment < 0


def own_block(owner: int, index: int) -> int:
    """The id of prefix block number `index` of a prompt that only its owner has."""
    return (owner << _INDEX_BITS) | index


def chunk_sizes(total: int, chunk_requests: int) -> Iterator[int]:
    """`total` in chunks: all of the full size but the last."""
    for first in range(0, total, chunk_requests):
        yield min(chunk_requests, total - first)
