"""A request in the simulation, between its arrival and its end."""

from __future__ import annotations

from viisim.engine.replica import Replica
from viisim.engine.sequence import Sequence as EngineSequence
from viisim.workload.request import Request


class Flight(EngineSequence):
    """The sequence that an engine computes, and what the records want to know. A new one stands
    for every attempt but the first."""

    __slots__ = (
        "attempt",
        "dispatched_ns",
        "failed",
        "index",
        "over",
        "replica",
        "request",
        "withdrawn",
    )

    def __init__(self, index: int, request: Request) -> None:
        view = request.view
        super().__init__(
            view.id,
            request.prompt,
            view.prompt_tokens,
            request.output_tokens,
            request.output_segment,
        )
        self.index = index
        self.request = request
        self.attempt = 0
        self.dispatched_ns = -1
        self.replica: Replica | None = None
        """Where it is; None until the engine has it."""
        self.withdrawn = False
        """A Preempt was issued, or the attempt failed: nothing that it still does reaches the
        client."""
        self.over = False
        """The core has been told that the attempt was cancelled or failed."""
        self.failed = False

    def lose_answer(self, now_ns: int) -> None:
        """What of its answer is still on the way to the client never gets there."""
        if self.first_token_ns > now_ns:
            self.first_token_ns = -1

    @property
    def shown(self) -> bool:
        """Whether the client has seen a byte of a stream that is not whole yet."""
        return self.request.view.streamed and self.first_token_ns >= 0

    @property
    def outputs_so_far(self) -> int:
        """Tokens that its engine has made."""
        if self.replica is None:
            return 0
        return self.replica.engine.scheduler.tokens_of(self) - self.prompt_tokens
