"""An inference server inside the test: answers, streams, fails, or hangs until it is aborted."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from policies.interface import RequestView, StepCosts
from runtime.driver import Job
from runtime.worker import Reading

Pieces = Sequence[int | BaseException]


def two_tokens(request: RequestView, attempt: int) -> Pieces:
    """The plainest answer."""
    return (1, 1)


@dataclass
class FakeWorker:
    """`answers(request, attempt)` gives the pieces of an answer; an exception is raised."""

    id: str
    answers: Callable[[RequestView, int], Pieces] = two_tokens
    model: str = "m"
    devices: tuple[str, ...] = ()
    max_num_seqs: int = 4
    kv_blocks: int = 100
    block_tokens: int = 16
    step_costs: StepCosts = StepCosts()  # noqa: RUF009 - frozen
    piece_s: float = 0.0
    """Time before each piece."""
    stubborn: bool = False
    """Ignores cancellation and answers nevertheless."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, the worker hangs after taking a request."""
    taken: "asyncio.Queue[tuple[str, int]]" = field(default_factory=asyncio.Queue)
    """(request id, attempt) of what was sent here."""
    priorities: list[int] = field(default_factory=list)
    """What the engine was told of each."""
    shown: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a first piece has been read."""
    readings: "asyncio.Queue[Reading]" = field(default_factory=asyncio.Queue)
    """What `gauges` has answered."""
    hanging: bool = False
    inflight: int = 0
    peak: int = 0
    aborted: int = 0

    def __post_init__(self) -> None:
        if not self.hanging:
            self.gate.set()

    async def answer(self, job: Job) -> int:
        """Answer one request."""
        self.inflight += 1
        self.peak = max(self.peak, self.inflight)
        self.taken.put_nowait((job.request.id, job.attempt))
        self.priorities.append(job.engine_priority)
        tokens = 0
        try:
            await self._wait_for_gate()
            for piece in self.answers(job.request, job.attempt):
                await asyncio.sleep(self.piece_s)
                if isinstance(piece, BaseException):
                    raise piece
                tokens += piece
                self._pass_on(job, piece)
                self.shown.set()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.inflight -= 1
        return tokens

    @staticmethod
    def _pass_on(job: Job, piece: int) -> None:
        """The client, where there is one, is a function of the tokens of a piece."""
        if job.request.streamed and job.begin() and job.client is not None:
            job.client(piece)

    async def gauges(self) -> Reading:
        """What a scrape shows."""
        reading = Reading(self.inflight, 0, self.inflight / self.max_num_seqs)
        self.readings.put_nowait(reading)
        return reading

    async def _wait_for_gate(self) -> None:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            if not self.stubborn:
                raise
