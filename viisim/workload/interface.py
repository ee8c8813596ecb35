"""What every workload offers, and the conventions they share.

Segments of prompts are whole numbers. From 0 up they name content that several prompts may
contain: hash ids of a trace, groups of a synthetic prefix. Below 0 they belong to one request
alone: `own_segment`. So the two never collide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from viisim.workload.request import Request

DEFAULT_MAX_OUTPUT_TOKENS = 2048
"""The output limit of a request unless the workload states another. It is above the longest
answer of the public Azure (1,899) and Mooncake (2,000) traces, so by default none is cut."""

CHUNK_REQUESTS = 16_384
"""Requests prepared at a time: enough for numpy to pay, a few MiB however long the workload."""


class Workload(Protocol):
    """A source of requests."""

    @property
    def total_requests(self) -> int:
        """How many requests one call of `requests` gives."""

    @property
    def cut_outputs(self) -> int:
        """Answers shortened to the output limit among the requests prepared so far."""

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests in order of arrival, ids `r0`, `r1`, ...; equal seeds, equal requests.

        `arrived_ns` never decreases, and `view.arrived_s` is `arrived_ns / 1e9`. Raises
        InputError for a negative seed.
        """


def own_segment(index: int) -> int:
    """The segment of request number `index` that no other prompt contains."""
    return -1 - index
