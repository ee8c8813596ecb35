"""The mutable state of one request inside an engine."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viisim.engine.blocks import Node, Run

#: WAITING    in the engine's queue (never admitted, or preempted)
#: PREFILL    admitted, its prompt (and, when resumed, its outputs) not yet all scheduled
#: DECODING   a member of the decode group: its progress is the group's clock plus `offset`
#: LOOSE      decoding, but taken out of the group for the length of one literal step
#: ENDING     its last token is on the way; it holds its blocks until that has arrived
#: DONE       finished or aborted
WAITING, PREFILL, DECODING, LOOSE, ENDING, DONE = range(6)


class Sequence:
    """A request with its blocks and progress.

    `tokens` counts prompt and outputs, *expected* outputs included: a token counts from the
    moment the step that computes it is scheduled. `computed` counts the tokens scheduled so
    far. Both are stale while the sequence is a member of the decode group.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached_tokens",
        "computed",
        "end_tokens",
        "finish_clock",
        "first_token_ns",
        "keyed_blocks",
        "late_since_ps",
        "name",
        "offset",
        "order",
        "output_segment",
        "preemptions",
        "priority",
        "prompt",
        "prompt_tokens",
        "runs",
        "shareable",
        "started_ns",
        "state",
        "tail",
        "tokens",
    )

    def __init__(
        self,
        name: str,
        prompt: tuple[tuple[Hashable, int], ...],
        prompt_tokens: int,
        output_tokens: int,
        output_segment: Hashable | None = None,
        priority: int = 0,
        arrival: float = 0.0,
    ) -> None:
        self.name = name
        self.prompt = prompt
        self.prompt_tokens = prompt_tokens
        self.end_tokens = prompt_tokens + output_tokens
        self.shareable = output_segment is not None
        """Whether a later prompt may contain the outputs."""
        # An anonymous segment is a bare object, not the sequence: a cycle would keep it alive
        # while garbage collection is off.
        self.output_segment: Hashable = object() if output_segment is None else output_segment
        self.priority = priority
        self.arrival = arrival
        """Orders equals under priority scheduling; any comparable number."""
        self.state = WAITING
        self.order = -1
        """Position in the order of admission, hence in the running list."""
        self.tokens = prompt_tokens
        self.computed = 0
        self.offset = 0
        self.finish_clock = -1
        self.blocks = 0
        self.keyed_blocks = 0
        self.runs: list[Run] = []
        self.tail: Node | None = None
        self.cached_tokens = -1
        """Prefix hit of the first admission; -1 before it."""
        self.preemptions = 0
        self.started_ns = -1
        self.first_token_ns = -1
        self.late_since_ps = -1
        """When its latest token was made, if it then missed a step; else -1."""

    @property
    def content(self) -> tuple[tuple[Hashable, int], ...]:
        """All its tokens as pieces; outputs form `output_segment`."""
        outputs = self.tokens - self.prompt_tokens
        return (*self.prompt, (self.output_segment, outputs)) if outputs else self.prompt
