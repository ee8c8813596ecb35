"""What a driver is connected to: workers, whoever starts them, and a journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from policies.interface import Action, Event, Launch, StepCosts

if TYPE_CHECKING:
    from runtime.driver import Job


class WorkerError(Exception):
    """The world's fault: a worker is down, slow, or answered with an error."""


class WorkerRefused(WorkerError):  # noqa: N818 - the family is WorkerDown, WorkerTimeout, ...
    """The worker refused the request itself, as any other would: not retried, not blamed."""


class WorkerBusy(WorkerError):  # noqa: N818
    """The worker is sound and full: the request is tried elsewhere, and the worker not blamed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a worker's metrics say at one moment; the fields of `Gauges`."""

    running: int
    waiting: int
    kv_usage: float
    power_w: float | None = None
    temperature_c: float | None = None


class Worker(Protocol):
    """A client of one inference server. The properties are those of `ReplicaChanged`."""

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def devices(self) -> tuple[str, ...]: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def kv_blocks(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def step_costs(self) -> StepCosts: ...

    async def answer(self, job: Job) -> int:
        """Have the server answer, pass the answer on to `job.client`, and return the number of
        its tokens when it is whole.

        Of a streamed request, pieces are passed on as they come, the first of them only if
        `job.begin()` allows it. Raises WorkerError. When cancelled it aborts the request on the
        server, and returns only when the server holds it no longer.
        """


@runtime_checkable
class GaugedWorker(Worker, Protocol):
    """A worker whose metrics can be read."""

    async def gauges(self) -> Reading:
        """Read them. Raises WorkerError."""


class Launcher(Protocol):
    """Starts workers that the policy wants, and ends those that it retires."""

    async def launch(self, action: Launch) -> Worker:
        """A worker of that id that serves. Raises WorkerError; leaves nothing behind then, nor
        when cancelled."""

    async def end(self, worker_id: str) -> None:
        """End the worker's processes, if they are ours: its devices are free afterwards."""


class Journal(Protocol):
    """Where (event, actions) pairs go, in order; `viisim.journal.JournalWriter` is one."""

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one handled event."""
