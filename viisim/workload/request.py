"""A request as the workload knows it: the scheduler's view of it, and the truth behind it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from policies.interface import RequestView


@dataclass(slots=True)
class Request:
    """One request of a workload.

    `view` is all that a scheduler sees. The rest is the engine's truth: `prompt` as pieces
    `(segment, tokens)`, where token k of a piece is the same token wherever the same segment's
    k-th token appears (so equal segments at the start of two prompts are a shared prefix, and
    nothing is ever materialised); the true output length; and `output_segment`, the segment
    that the generated tokens form, or None when no later prompt can contain them.
    """

    view: RequestView
    arrived_ns: int
    prompt: tuple[tuple[Hashable, int], ...]
    output_tokens: int
    output_segment: Hashable | None = None
    next_turn: Callable[[int], Request] | None = None
    """In a closed-loop session: the user's next request, given the instant (ns) at which this
    one was answered. It arrives no earlier. A session whose turn is shed or refused ends."""
