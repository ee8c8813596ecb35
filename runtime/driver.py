"""`Driver`: asyncio around one `SchedulerCore`; `viisim.simulation` is its simulated twin.

Theory of operation. Everything that happens becomes an event and goes through `Driver.report`,
which hands it to the core, journals it, and performs the core's actions; events raised meanwhile
wait their turn. Performing never blocks: a `Dispatch` starts a task that reads the worker's
answer, a `Preempt` cancels that task. An attempt ends when its task ends, and only then is its
terminal event reported, so that a slot is never counted free while a worker still holds it.

All of it runs on one event loop, in one thread; nothing here awaits between reading the core and
acting on what it said.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from policies.core import SchedulerCore
from policies.interface import (
    Arrived,
    Cancelled,
    ConfigChanged,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Launch,
    LaunchFailed,
    Limits,
    Preempt,
    ReplicaChanged,
    RequestView,
    Retire,
    Shed,
    Tick,
)
from policies.registry import make_policy
from runtime.worker import (
    GaugedWorker,
    Journal,
    Launcher,
    Reading,
    Worker,
    WorkerBusy,
    WorkerError,
    WorkerRefused,
)

log = logging.getLogger(__name__)

Answer: TypeAlias = Finished | Shed
"""How a request ends for its client: a whole answer, or a refusal with its reason."""

CLOSING = "closing"
"""Reason of the `Shed` that requests get when the driver closes under them."""


class _Call:
    """A client waiting for an answer."""

    __slots__ = ("answer", "client", "request")

    def __init__(self, request: RequestView, answer: asyncio.Future[Answer], client: Any) -> None:
        self.request = request
        self.answer = answer
        self.client = client


class Job:
    """A request at a worker: lives exactly as long as its task."""

    __slots__ = (
        "_on_begin",
        "aborted",
        "attempt",
        "client",
        "engine_priority",
        "request",
        "shown",
        "task",
        "worker_id",
    )

    task: asyncio.Task[int]

    def __init__(self, call: _Call, action: Dispatch, on_begin: Callable[[Job], None]) -> None:
        self.request = call.request
        self.client = call.client
        """Whatever was given to `Driver.submit`: where the worker puts the answer."""
        self.attempt = action.attempt
        self.engine_priority = action.priority_of(call.request)
        self.worker_id = action.replica_id
        self.shown = False
        """A byte of the answer has reached the client."""
        self.aborted = False
        self._on_begin = on_begin

    def begin(self) -> bool:
        """Whether pieces may be passed on. The core is told first: what the client has seen
        cannot be withdrawn."""
        if self.aborted:
            return False
        if not self.shown:
            self.shown = True
            self._on_begin(self)
        return True

    def abort(self) -> None:
        """Have the server let it go; nothing more is passed on."""
        self.aborted = True
        self.task.cancel()


# -- the driver --


class Driver:
    """Runs one core against real workers; use it as an async context manager.

    `core` must not have handled an event yet. `workers` take requests from the beginning; `add`
    brings others. Without a `launcher` no `Launch` of the policy succeeds. `on_fault` is told the
    id of a worker that has failed a request. `clock` gives monotonic seconds, by default the
    loop's; deadlines of requests are on it. `scrape_s` is the time between two readings of a
    worker's gauges, None for no readings.

    When the policy or the journal fails, every waiting `submit` raises that error, and so does
    the end of the context: a core that raised has no defined state to go on from.
    """

    def __init__(
        self,
        core: SchedulerCore,
        workers: Iterable[Worker],
        *,
        journal: Journal | None = None,
        scrape_s: float | None = None,
        clock: Callable[[], float] | None = None,
        launcher: Launcher | None = None,
        on_fault: Callable[[str], None] = lambda worker_id: None,
    ) -> None:
        self.core = core
        self._workers: dict[str, Worker] = {}
        self._first_workers = tuple(workers)
        self._launcher = launcher
        self._on_fault = on_fault
        self._launches: dict[str, asyncio.Task[Worker]] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._drained: dict[str, set[str]] = {}
        self._down: set[str] = set()
        self._journal = journal
        self._scrape_s = scrape_s
        self._clock = clock
        self._calls: dict[str, _Call] = {}
        self._attempts: dict[str, Job] = {}
        self._scrapers: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[str] = set()
        self._events: deque[Event] = deque()
        self._handling = False
        self._open = False
        self._error: Exception | None = None
        self.on_failure: Callable[[], object] = lambda: None
        """Called when the policy or the journal fails: the driver does nothing any more."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s: float | None = None

    async def __aenter__(self) -> Driver:
        self._loop = asyncio.get_running_loop()
        self._clock = self._clock or self._loop.time
        self._open = True
        for worker in self._first_workers:
            self.add(worker)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close as if every client left, and wait until no worker holds anything."""
        self._open = False
        self._dismiss_clients()
        self._stop_timer()
        for task in (*self._scrapers.values(), *self._launches.values()):
            task.cancel()
        while tasks := self._tasks():
            await asyncio.wait(tasks)
        if self._error is not None and error is None:
            raise self._error

    # -- for clients --

    def now_s(self) -> float:
        """The time on the driver's clock."""
        assert self._clock is not None, "set when the driver is entered"
        return self._clock()

    def knows(self, request_id: str) -> bool:
        """Whether the id is in use."""
        return request_id in self._calls or request_id in self._attempts

    async def submit(self, request: RequestView, client: Any = None) -> Answer:
        """Have a request answered; `arrived_s` becomes the time of this call.

        `client` is what workers pass the answer on to, as `Job.client`. Cancelling this call
        means that the client has left. Raises ValueError when the id is in use, RuntimeError
        when the driver is not open.
        """
        if self._error is not None:
            raise self._error
        if not self._open:
            raise RuntimeError("the driver is not open: submit inside `async with driver`")
        if self.knows(request.id):
            raise ValueError(f"request id {request.id!r} is already in use")
        now_s = self.now_s()
        request = replace(request, arrived_s=now_s)
        call = _Call(request, self._loop.create_future(), client)
        self._calls[request.id] = call
        self.report(Arrived(now_s, request))
        try:
            return await call.answer
        except asyncio.CancelledError:
            if self._calls.get(request.id) is call:
                self._client_left(request.id)
            raise

    # -- for operators --

    @property
    def workers(self) -> Mapping[str, Worker]:
        """Those that the driver knows, by id, ready or not; it changes as they come and go."""
        return self._workers

    def add(self, worker: Worker, *, is_up: bool = True) -> None:
        """Take a worker in; one that is not up yet gets requests after `set_up`.

        Raises ValueError when a worker of that id is there.
        """
        if worker.id in self._workers:
            raise ValueError(f"worker {worker.id!r} is there already")
        self._workers[worker.id] = worker
        if not is_up:
            self._down.add(worker.id)
        self.report(_described(worker, self._state(worker.id), self.now_s()))
        # A launch may succeed while the driver closes, and nobody would end the readings.
        if self._open and self._scrape_s is not None and isinstance(worker, GaugedWorker):
            task = self._loop.create_task(self._scrape(worker, self._scrape_s))
            task.add_done_callback(partial(self._scraper_ended, worker.id))
            self._scrapers[worker.id] = task

    def set_up(self, worker_id: str, is_up: bool) -> None:
        """Whether the worker's process can serve. One that cannot gets no requests; those that
        it has end when their connections do."""
        if worker_id not in self._workers or is_up is (worker_id not in self._down):
            return
        (self._down.discard if is_up else self._down.add)(worker_id)
        self._report_state(worker_id)

    def drain(self, worker_id: str, why: str) -> None:
        """Give the worker no more requests until `undrain` for the same reason."""
        self._drained.setdefault(worker_id, set()).add(why)
        self._report_state(worker_id)

    def undrain(self, worker_id: str, why: str) -> None:
        """Give it requests again, unless there is another reason not to."""
        reasons = self._drained.get(worker_id, set())
        reasons.discard(why)
        if not reasons:
            self._drained.pop(worker_id, None)
        self._report_state(worker_id)

    def retire(self, worker_id: str) -> None:
        """Let the worker finish what it has, then end it; as the policy's `Retire`."""
        if worker_id in self._workers:
            self.drain(worker_id, "retired")
            self._retiring.add(worker_id)
            self._let_go_if_idle(worker_id)

    def is_retiring(self, worker_id: str) -> bool:
        """Whether the worker ends once it has finished what it has, and takes no more."""
        return worker_id in self._retiring

    def change(self, limits: Limits, policy: dict[str, Any] | None = None) -> None:
        """Go on with other limits, and another policy if one is given, as in an experiment.

        Raises PolicyError when there is no such policy, or it is not sound: nothing has changed
        then.
        """
        if policy is not None:
            SchedulerCore(make_policy(policy, self.core.folder))  # which checks it
        # The policy so far may not have wanted to know whose first byte has been shown.
        for job in list(self._attempts.values()):
            if job.shown and not self.core.wants_first_token:
                self.report(FirstToken(self.now_s(), job.request.id, job.attempt))
        self.report(ConfigChanged(self.now_s(), limits, policy))

    def _report_state(self, worker_id: str) -> None:
        if self._open and worker_id in self._workers and worker_id not in self._retiring:
            self.report(ReplicaChanged(self.now_s(), worker_id, self._state(worker_id)))

    def _state(self, worker_id: str) -> str:
        if worker_id in self._drained or worker_id in self._retiring:
            return "draining"
        return "starting" if worker_id in self._down else "ready"

    # -- events in, actions out --

    def report(self, event: Event) -> None:
        """Handle an event: ask the core, journal, perform. Events raised meanwhile follow."""
        if self._error is not None:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        except Exception as error:
            self._fail(error)
        finally:
            self._handling = False
        self._arm_timer()

    def _handle(self, event: Event) -> None:
        actions = self.core.handle(event)
        if self._journal is not None:
            self._journal.record(event, actions)
        for action in actions:
            _PERFORM[type(action)](self, action)

    def _dispatch(self, action: Dispatch) -> None:
        call = self._calls[action.request_id]
        job = Job(call, action, self._began)
        self._attempts[action.request_id] = job
        job.task = self._loop.create_task(self._workers[job.worker_id].answer(job))
        # Not inside the task: one cancelled before its first step never runs a line.
        job.task.add_done_callback(partial(self._attempt_ended, job))

    def _shed(self, action: Shed) -> None:
        self._answer(action.request_id, action)

    def _preempt(self, action: Preempt) -> None:
        self._attempts[action.request_id].abort()

    # -- workers that come and go --

    def _launch(self, action: Launch) -> None:
        if self._launcher is None:
            reason = "this driver starts no workers"
            self.report(LaunchFailed(self.now_s(), action.replica_id, reason))
            return
        task = self._loop.create_task(self._launcher.launch(action))
        self._launches[action.replica_id] = task
        task.add_done_callback(partial(self._launch_ended, action.replica_id))

    def _launch_ended(self, worker_id: str, task: asyncio.Task[Worker]) -> None:
        del self._launches[worker_id]
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            self.add(task.result())
            if worker_id in self._retiring:
                self._let_go_if_idle(worker_id)
            return
        self._retiring.discard(worker_id)
        if error is not None and not isinstance(error, WorkerError):
            log.error("launching %s", worker_id, exc_info=error)
        reason = str(error) if error is not None else "called off"
        self.report(LaunchFailed(self.now_s(), worker_id, reason))

    def _retire(self, action: Retire) -> None:
        if action.replica_id in self._launches:
            self._launches[action.replica_id].cancel()
        self._retiring.add(action.replica_id)
        self._let_go_if_idle(action.replica_id)

    def _let_go_if_idle(self, worker_id: str) -> None:
        """A retired worker goes when its last attempt has ended."""
        busy = any(attempt.worker_id == worker_id for attempt in self._attempts.values())
        if busy or worker_id not in self._workers:
            return
        del self._workers[worker_id]
        if worker_id in self._scrapers:
            self._scrapers[worker_id].cancel()
        if self._launcher is None:
            self._gone(worker_id)
            return
        task = self._loop.create_task(self._launcher.end(worker_id))
        self._ends.add(task)
        task.add_done_callback(partial(self._worker_ended, worker_id))

    def _worker_ended(self, worker_id: str, task: asyncio.Task[None]) -> None:
        self._ends.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("ending %s", worker_id, exc_info=task.exception())
        self._gone(worker_id)

    def _gone(self, worker_id: str) -> None:
        """Only now are its devices free."""
        self._retiring.discard(worker_id)
        self._drained.pop(worker_id, None)
        self._down.discard(worker_id)
        self.report(ReplicaChanged(self.now_s(), worker_id, "gone"))

    # -- attempts --

    def _began(self, job: Job) -> None:
        if self.core.wants_first_token:
            self.report(FirstToken(self.now_s(), job.request.id, job.attempt))

    def _attempt_ended(self, job: Job, task: asyncio.Task[int]) -> None:
        del self._attempts[job.request.id]
        event = self._terminal_event(job, task)
        if isinstance(event, Finished):
            self._answer(event.request_id, event)
        self.report(event)
        if isinstance(event, Failed) and event.worker_fault:
            self._on_fault(job.worker_id)
        if job.worker_id in self._retiring:
            self._let_go_if_idle(job.worker_id)

    def _terminal_event(self, job: Job, task: asyncio.Task[int]) -> Finished | Failed | Cancelled:
        subject = (self.now_s(), job.request.id, job.attempt)
        error = None if task.cancelled() else task.exception()
        if job.aborted:  # whatever it still produced was not passed on
            return Cancelled(*subject)
        if task.cancelled():
            error = WorkerError("the worker's client was cancelled")
        if error is None:
            return Finished(*subject, output_tokens=task.result())
        if not isinstance(error, WorkerError):
            # Our own bug, or the client's: it costs this request only, and is never silent.
            log.error("attempt %d of %s", job.attempt, job.request.id, exc_info=error)
        elsewhere = isinstance(error, WorkerError) and not isinstance(error, WorkerRefused)
        return Failed(
            *subject,
            reason=str(error) or type(error).__name__,
            retryable=elsewhere and not job.shown,
            worker_fault=elsewhere and not isinstance(error, WorkerBusy),
        )

    # -- clients --

    def _answer(self, request_id: str, answer: Answer) -> None:
        call = self._calls.pop(request_id, None)
        if call is not None and not call.answer.done():
            call.answer.set_result(answer)

    def _client_left(self, request_id: str) -> None:
        del self._calls[request_id]
        self.report(Cancelled(self.now_s(), request_id, 0))
        if request_id in self._attempts:
            self._attempts[request_id].abort()

    def _dismiss_clients(self) -> None:
        for request_id, call in list(self._calls.items()):
            self._client_left(request_id)
            if not call.answer.done():
                call.answer.set_result(Shed(request_id, CLOSING))

    # -- timer --

    def _arm_timer(self) -> None:
        """Have the loop call when the core wants its next `Tick`."""
        due_s = self.core.next_timer_s() if self._open and self._error is None else None
        if due_s == self._timer_s:
            return
        self._stop_timer()
        if due_s is not None:
            self._timer_s = due_s
            delay_s = due_s - self.now_s()
            self._timer = self._loop.call_at(self._loop.time() + delay_s, self._timer_fired)

    def _timer_fired(self) -> None:
        due_s = self._timer_s
        self._stop_timer()
        now_s = self.now_s()
        # The loop fires up to one clock resolution early, and the core wants no early Tick.
        if due_s is not None and now_s >= due_s:
            self.report(Tick(now_s))
        else:
            self._arm_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_s = None

    # -- gauges --

    async def _scrape(self, worker: GaugedWorker, period_s: float) -> None:
        """Read a worker's gauges for ever. Those of a silent worker grow old: `age_s` tells."""
        while True:
            # The server samples while the reading is under way: the early end is the honest one,
            # because what was dispatched since then may be missing from the reading.
            sampled_s = self.now_s()
            with suppress(WorkerError):
                self._report_gauges(worker.id, sampled_s, await worker.gauges())
            await asyncio.sleep(max(0.0, sampled_s + period_s - self.now_s()))

    def _report_gauges(self, worker_id: str, sampled_s: float, reading: Reading) -> None:
        self.report(
            Gauges(
                self.now_s(),
                worker_id,
                sampled_s,
                running=reading.running,
                waiting=reading.waiting,
                kv_usage=reading.kv_usage,
                power_w=reading.power_w,
                temperature_c=reading.temperature_c,
            )
        )

    def _scraper_ended(self, worker_id: str, task: asyncio.Task[None]) -> None:
        del self._scrapers[worker_id]
        if not task.cancelled():
            log.error("the gauges of %s are read no more", worker_id, exc_info=task.exception())

    # -- the end --

    def _tasks(self) -> list[asyncio.Task[Any]]:
        """Everything this driver started whose end it has not yet dealt with."""
        attempts = (attempt.task for attempt in self._attempts.values())
        return [*attempts, *self._scrapers.values(), *self._launches.values(), *self._ends]

    def _fail(self, error: Exception) -> None:
        """The core cannot go on: everybody who waits learns why, and workers are freed."""
        if self._error is not None:
            return
        self._error = error
        self.on_failure()
        self._events.clear()
        self._stop_timer()
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(error)
        self._calls.clear()
        for task in self._tasks():
            task.cancel()


def _described(worker: Worker, state: str, now_s: float) -> ReplicaChanged:
    return ReplicaChanged(
        now_s,
        worker.id,
        state,
        model=worker.model,
        devices=worker.devices,
        max_num_seqs=worker.max_num_seqs,
        kv_blocks=worker.kv_blocks,
        block_tokens=worker.block_tokens,
        step_costs=worker.step_costs,
    )


_PERFORM: dict[type, Callable[[Driver, Any], None]] = {
    Dispatch: Driver._dispatch,
    Shed: Driver._shed,
    Preempt: Driver._preempt,
    Launch: Driver._launch,
    Retire: Driver._retire,
}
