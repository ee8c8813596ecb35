"""The asyncio driver against fake workers; nothing waits for a fixed time."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.core import SchedulerCore
from policies.interface import (
    Action,
    Arrived,
    Cancelled,
    ClusterView,
    ConfigChanged,
    Dispatch,
    Event,
    Failed,
    Finished,
    FirstToken,
    Gauges,
    Hold,
    InvalidAction,
    Launch,
    LaunchFailed,
    Limits,
    Policy,
    PolicyError,
    Preempt,
    ReplicaChanged,
    RequestView,
    Retire,
    Shed,
    Tick,
    Verdict,
)
from policies.journal import Segment
from policies.least_loaded import LeastLoaded
from policies.registry import PolicySpec, PolicySpecError, policy_names
from policies.testing import request
from runtime.driver import CLOSING, Driver
from runtime.worker import WorkerBusy, WorkerError, WorkerRefused
from tests.fake_worker import FakeWorker, Pieces
from tests.small_experiment import FAULTY
from viisim.journal import JournalWriter, replay_journal

LIMIT_S = 20.0
"""A test that hangs fails after this long."""


class Urgent(Policy):
    """One request a replica; a more urgent one takes the place of another."""

    preempts = True

    def rank(self, request: RequestView) -> Any:
        """Most urgent first."""
        return (request.priority, request.arrived_s)

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """A free replica, else the place of the least urgent that shows nothing yet."""
        for replica in view.ready(request.model):
            if not replica.inflight_requests:
                return Dispatch(request.id, replica.id)
            (victim,) = view.inflight(replica.id)
            if victim.priority > request.priority and not replica.withdrawing_requests:
                return Preempt(victim.id)
        return Hold()


class Planner(Policy):
    """Holds everything and plans `actions`, once."""

    tick_s = 0.001

    def __init__(self, *actions: Action) -> None:
        self.actions = list(actions)

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Wait for the plan."""
        return Hold()

    def plan(self, queue: Any, view: ClusterView) -> list[Action]:
        """The given actions, then nothing."""
        planned, self.actions = self.actions, []
        return planned


class Starter(Planner):
    """Plans `actions`, and sends requests to whatever is ready."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """The first that is ready."""
        for replica in view.ready(request.model):
            return Dispatch(request.id, replica.id)
        return Hold()


class Hasty(Planner):
    """Withdraws `a` as soon as it learns that a launch failed."""

    preempts = True
    failed = False

    def observe(self, event: Event, view: ClusterView) -> None:
        """Notice failed launches."""
        self.failed = isinstance(event, LaunchFailed)

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Hold, but for that."""
        return Preempt("a") if self.failed else Hold()


class Careless(Policy):
    """Knows one replica, and when that is busy names one that does not exist."""

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """Sense first, then nonsense."""
        busy = any(replica.inflight_requests for replica in view.replicas)
        return Dispatch(request.id, "nowhere" if busy else "r0")


class Memory:
    """A journal kept in memory, which tells when a kind of event has come."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.actions: list[Action] = []
        self._awaited: dict[type, asyncio.Event] = {}

    def record(self, event: Event, actions: Sequence[Action]) -> None:
        """Note one handled event."""
        self.events.append(event)
        self.actions.extend(actions)
        self._seen(type(event)).set()

    def of(self, kind: type) -> list[Any]:
        """All events and actions of one class."""
        return [item for item in (*self.events, *self.actions) if type(item) is kind]

    async def seen(self, kind: type) -> None:
        """Wait for the first event of a class."""
        await self._seen(kind).wait()

    def _seen(self, kind: type) -> asyncio.Event:
        return self._awaited.setdefault(kind, asyncio.Event())


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario on a loop of its own; no task may outlive it."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(limited())


def down(request: RequestView, attempt: int) -> Pieces:
    """A worker that is down."""
    return [WorkerError("down")]


class FakeLauncher:
    """Starts fake workers, or fails, or takes for ever."""

    def __init__(self, error: WorkerError | None = None, *, hangs: bool = False) -> None:
        self.error = error
        self.hangs = hangs
        self.begun = asyncio.Event()
        self.ended: list[str] = []

    async def launch(self, action: Launch) -> FakeWorker:
        """See `runtime.worker.Launcher`."""
        self.begun.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return FakeWorker(action.replica_id, devices=action.devices)

    async def end(self, worker_id: str) -> None:
        """See `runtime.worker.Launcher`."""
        self.ended.append(worker_id)


def driver(policy: Policy, *workers: FakeWorker, **options: Any) -> tuple[Driver, Memory]:
    """A driver with a journal in memory."""
    limits = options.pop("limits", None)
    memory = Memory()
    return Driver(SchedulerCore(policy, limits=limits), workers, journal=memory, **options), memory


class TestAnswers:
    def test_requests_are_answered_by_a_worker(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), FakeWorker("r0"), FakeWorker("r1"))
            async with subject:
                answers = await asyncio.gather(
                    *(subject.submit(request(id=f"q{i}")) for i in range(8))
                )
            assert [(a.request_id, a.output_tokens) for a in answers] == [
                (f"q{i}", 2) for i in range(8)
            ]
            assert {d.replica_id for d in memory.of(Dispatch)} == {"r0", "r1"}

        run(scenario)

    def test_a_streamed_answer_comes_in_pieces(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0", lambda *_: (3, 1, 1)))
            pieces: list[int] = []
            async with subject:
                await subject.submit(request(), pieces.append)
            assert pieces == [3, 1, 1]

        run(scenario)

    def test_a_plain_answer_shows_nothing_before_its_end(self):
        async def scenario() -> None:
            subject, memory = driver(Urgent(), FakeWorker("r0"))
            pieces: list[int] = []
            async with subject:
                await subject.submit(request(streamed=False), pieces.append)
            assert (pieces, memory.of(FirstToken)) == ([], [])

        run(scenario)

    def test_arrival_is_on_the_drivers_clock(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), FakeWorker("r0"), clock=lambda: 42.0)
            async with subject:
                await subject.submit(request(arrived_s=1.0))
            (arrived,) = memory.of(Arrived)
            assert (arrived.now_s, arrived.request.arrived_s) == (42.0, 42.0)

        run(scenario)

    @pytest.mark.parametrize(("policy", "reported"), [(Urgent, 1), (LeastLoaded, 0)])
    def test_first_tokens_are_reported_only_when_wanted(self, policy: type[Policy], reported: int):
        async def scenario() -> None:
            subject, memory = driver(policy(), FakeWorker("r0"))
            async with subject:
                await subject.submit(request())
            assert len(memory.of(FirstToken)) == reported

        run(scenario)

    def test_an_id_in_use_is_refused_at_the_door(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            subject, _ = driver(LeastLoaded(), worker)
            async with subject, asyncio.TaskGroup() as clients:
                clients.create_task(subject.submit(request()))
                await worker.taken.get()
                with pytest.raises(ValueError, match="already in use"):
                    await subject.submit(request())
                worker.gate.set()

        run(scenario)

    def test_a_driver_that_is_not_open_takes_nothing(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0"))
            with pytest.raises(RuntimeError, match="not open"):
                await subject.submit(request())

        run(scenario)


class TestFaults:
    def test_a_busy_worker_is_not_blamed(self):
        def busy(request: RequestView, attempt: int) -> Pieces:
            return [WorkerBusy("full")]

        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), FakeWorker("r0", busy), FakeWorker("r1"))
            async with subject:
                assert isinstance(await subject.submit(request()), Finished)
            assert [(e.retryable, e.worker_fault) for e in memory.of(Failed)] == [(True, False)]

        run(scenario)

    def test_a_failed_request_is_retried_elsewhere(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), FakeWorker("r0", down), FakeWorker("r1"))
            async with subject:
                answer = await subject.submit(request())
            assert (answer.attempt, answer.output_tokens) == (2, 2)
            assert [d.replica_id for d in memory.of(Dispatch)] == ["r0", "r1"]

        run(scenario)

    def test_a_request_that_fails_everywhere_is_shed_with_the_reason(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0", down), FakeWorker("r1", down))
            async with subject:
                assert await subject.submit(request()) == Shed("q", "failed: down")

        run(scenario)

    def test_a_stream_that_dies_is_not_retried(self):
        async def scenario() -> None:
            dies = FakeWorker("r0", lambda *_: (1, WorkerError("reset")))
            subject, memory = driver(LeastLoaded(), dies, FakeWorker("r1"))
            async with subject:
                assert await subject.submit(request()) == Shed("q", "failed: reset")
            assert len(memory.of(Dispatch)) == 1

        run(scenario)

    def test_a_plain_answer_that_dies_halfway_is_retried(self):
        async def scenario() -> None:
            dies = FakeWorker("r0", lambda *_: (1, WorkerError("reset")))
            subject, _ = driver(LeastLoaded(), dies, FakeWorker("r1"))
            async with subject:
                answer = await subject.submit(request(streamed=False))
            assert (answer.attempt, answer.output_tokens) == (2, 2)

        run(scenario)

    def test_a_refused_request_is_neither_retried_nor_blamed(self):
        async def scenario() -> None:
            refuses = FakeWorker("r0", lambda *_: [WorkerRefused("prompt too long")])
            subject, memory = driver(LeastLoaded(), refuses, FakeWorker("r1"))
            async with subject:
                assert await subject.submit(request()) == Shed("q", "failed: prompt too long")
            assert not memory.of(Failed)[0].worker_fault

        run(scenario)

    def test_a_workers_own_cancellation_is_a_failure(self):
        async def scenario() -> None:
            lost = FakeWorker("r0", lambda *_: [asyncio.CancelledError()])
            subject, _ = driver(LeastLoaded(), lost, FakeWorker("r1"))
            async with subject:
                assert isinstance(await subject.submit(request()), Finished)

        run(scenario)

    def test_an_error_of_the_program_costs_one_request_and_is_logged(
        self, caplog: pytest.LogCaptureFixture
    ):
        def odd(request: RequestView, attempt: int) -> Pieces:
            return [KeyError("bug")] if request.id == "q" else (1,)

        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0", odd), FakeWorker("r1", odd))
            async with subject:
                assert await subject.submit(request()) == Shed("q", "failed: 'bug'")
                assert isinstance(await subject.submit(request(id="p")), Finished)

        run(scenario)
        assert "attempt 1 of q" in caplog.text

    def test_a_policys_nonsense_reaches_everybody_and_frees_the_workers(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            subject, _ = driver(Careless(), worker)

            async def owner() -> None:
                async with subject:
                    clients = (subject.submit(request(id=name)) for name in "ab")
                    told = await asyncio.gather(*clients, return_exceptions=True)
                    assert [type(error) for error in told] == [InvalidAction] * 2
                    with pytest.raises(InvalidAction):
                        await subject.submit(request(id="c"))

            with pytest.raises(InvalidAction, match="nowhere"):
                await owner()
            assert worker.inflight == 0

        run(scenario)


class TestPriority:
    @pytest.mark.parametrize(("said", "told"), [(None, 5), (0, 0), (-2, -2)])
    def test_the_engine_is_told_the_requests_own_unless_the_policy_says_another(
        self, said: int | None, told: int
    ):
        action = Dispatch("q", "r0", said)

        async def scenario() -> None:
            worker = FakeWorker("r0")
            subject, _ = driver(Planner(action), worker)
            async with subject:
                await subject.submit(request(id="q", priority=5))
            assert worker.priorities == [told]

        run(scenario)


class TestWithdrawing:
    def test_a_preempted_request_is_withdrawn_requeued_and_answered_later(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            subject, memory = driver(Urgent(), worker)
            async with subject, asyncio.TaskGroup() as clients:
                later = clients.create_task(subject.submit(request(id="later", priority=5)))
                assert await worker.taken.get() == ("later", 1)
                urgent = clients.create_task(subject.submit(request(id="urgent", priority=0)))
                assert await worker.taken.get() == ("urgent", 1)
                worker.gate.set()
                assert (await urgent).output_tokens == 2
                assert (await later).attempt == 2
            assert memory.of(Preempt) == [Preempt("later", 1)]
            assert (worker.aborted, worker.peak) == (1, 1)

        run(scenario)

    def test_what_has_been_shown_is_not_withdrawn(self):
        # The core knows of the first byte before the client sees it, or this would be an error.
        async def scenario() -> None:
            worker = FakeWorker("r0", lambda *_: (1,) * 50)
            subject, memory = driver(ShownStays(), worker)
            async with subject, asyncio.TaskGroup() as clients:
                clients.create_task(subject.submit(request(id="later", priority=5)))
                await worker.shown.wait()
                await subject.submit(request(id="urgent", priority=0))
            assert memory.of(Preempt) == []

        run(scenario)

    def test_a_worker_that_ignores_the_abort_shows_nothing_more(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True, stubborn=True)
            subject, memory = driver(Urgent(), worker)
            pieces: list[int] = []
            async with subject, asyncio.TaskGroup() as clients:
                client = subject.submit(request(id="later", priority=5), pieces.append)
                clients.create_task(client)
                await worker.taken.get()
                clients.create_task(subject.submit(request(id="urgent", priority=0)))
                await memory.seen(Cancelled)
                assert pieces == []
                worker.gate.set()

        run(scenario)

    def test_a_client_that_leaves_frees_the_slot(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            subject, memory = driver(Urgent(), worker)
            async with subject, asyncio.TaskGroup() as clients:
                leaves = clients.create_task(subject.submit(request(id="leaves")))
                assert await worker.taken.get() == ("leaves", 1)
                clients.create_task(subject.submit(request(id="stays")))
                leaves.cancel()
                assert await worker.taken.get() == ("stays", 1)
                worker.gate.set()
            assert leaves.cancelled()
            assert [c.attempt for c in memory.of(Cancelled)] == [0, 1]
            assert worker.peak == 1

        run(scenario)

    def test_an_attempt_withdrawn_before_its_first_step_ends_as_any_other(self):
        async def scenario() -> None:
            worker = FakeWorker("r0")
            subject, memory = driver(Urgent(), worker)
            async with subject:
                # Both are submitted before the loop comes to the first attempt's task.
                await asyncio.gather(
                    subject.submit(request(id="later", priority=5)),
                    subject.submit(request(id="urgent", priority=0)),
                )
            assert [(c.request_id, c.attempt) for c in memory.of(Cancelled)] == [("later", 1)]
            assert [worker.taken.get_nowait() for _ in range(2)] == [("urgent", 1), ("later", 2)]

        run(scenario)

    def test_a_queued_client_that_leaves_is_forgotten(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded())
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await memory.seen(Arrived)
                client.cancel()
                await memory.seen(Cancelled)
                assert subject.core.queued_requests == 0

        run(scenario)

    def test_closing_sheds_what_waits_and_frees_the_workers(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            subject, _ = driver(LeastLoaded(), worker)
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await worker.taken.get()
            assert await client == Shed("q", CLOSING)
            assert (worker.inflight, subject.core.inflight_requests) == (0, 0)

        run(scenario)


class ShownStays(Urgent):
    """Urgent, but it remembers what clients have seen."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def observe(self, event: Event, view: ClusterView) -> None:
        """Remember first tokens."""
        if isinstance(event, FirstToken):
            self.shown.add(event.request_id)

    def place(self, request: RequestView, view: ClusterView) -> Verdict:
        """As Urgent, except that what was shown stays."""
        verdict = super().place(request, view)
        shown = isinstance(verdict, Preempt) and verdict.request_id in self.shown
        return Hold() if shown else verdict


class TestTimers:
    def test_a_request_held_too_long_is_shed_when_the_core_says(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), limits=Limits(queue_timeout_s=0.01))
            async with subject:
                assert await subject.submit(request()) == Shed("q", "timeout")
            (arrived,), (tick,) = memory.of(Arrived), memory.of(Tick)
            assert tick.now_s >= arrived.now_s + 0.01

        run(scenario)

    def test_a_deadline_is_kept(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded())
            async with subject:
                due = replace(request(), deadline_s=subject.now_s() + 0.01)
                assert await subject.submit(due) == Shed("q", "deadline")

        run(scenario)

    def test_a_clock_behind_the_loops_makes_no_early_tick(self):
        async def scenario() -> None:
            loop = asyncio.get_running_loop()
            subject, memory = driver(
                LeastLoaded(),
                limits=Limits(queue_timeout_s=0.01),
                clock=lambda: loop.time() / 2,
            )
            async with subject:
                await subject.submit(request())
            (arrived,), (tick,) = memory.of(Arrived), memory.of(Tick)
            assert tick.now_s >= arrived.now_s + 0.01

        run(scenario)

    def test_another_policy_is_told_what_was_shown_before_it_came(self):
        # An urgent request would take the running one's place, had its first byte not been shown.
        async def scenario() -> None:
            worker = FakeWorker("r0", max_num_seqs=1, piece_s=0.01, answers=lambda *_: (1,) * 20)
            subject, memory = driver(LeastLoaded(), worker)
            async with subject:
                first = asyncio.create_task(subject.submit(request(id="a"), lambda _: None))
                await worker.shown.wait()
                subject.change(Limits(), {"class": f"{__name__}:ShownStays"})
                second = asyncio.create_task(subject.submit(request(id="b", priority=-1)))
                assert isinstance(await first, Finished)
                assert isinstance(await second, Finished)
            assert memory.of(FirstToken)[0].request_id == "a"
            assert Preempt not in map(type, memory.actions)

        run(scenario)

    def test_a_policy_that_cannot_be_made_changes_nothing(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), FakeWorker("r0"))
            async with subject:
                with pytest.raises(PolicySpecError, match="least_loded"):
                    subject.change(Limits(), {"name": "least_loded"})
                assert isinstance(await subject.submit(request()), Finished)
            assert memory.of(ConfigChanged) == []

        run(scenario)

    def test_new_limits_hold_from_the_next_arrival(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded())
            async with subject:
                subject.report(ConfigChanged(subject.now_s(), Limits(max_queued=0)))
                assert await subject.submit(request()) == Shed("q", "queue_full")

        run(scenario)


class TestCluster:
    def test_gauges_are_scraped_and_dated_before_the_reading(self):
        async def scenario() -> None:
            worker = FakeWorker("r0")
            subject, memory = driver(LeastLoaded(), worker, scrape_s=0.001)
            async with subject:
                for _ in range(3):
                    await worker.readings.get()
                await memory.seen(Gauges)
            assert all(g.sampled_s <= g.now_s for g in memory.of(Gauges))

        run(scenario)

    def test_a_silent_worker_is_asked_again(self):
        class Silent(FakeWorker):
            async def gauges(self) -> Any:
                if not (await super().gauges() and self.readings.qsize() > 1):
                    raise WorkerError("no answer")
                return await self.readings.get()

        async def scenario() -> None:
            subject, memory = driver(LeastLoaded(), Silent("r0"), scrape_s=0.001)
            async with subject:
                await memory.seen(Gauges)

        run(scenario)

    def test_a_launch_comes_to_nothing_without_a_supervisor(self):
        async def scenario() -> None:
            subject, memory = driver(Planner(Launch("m", ("gpu0",))))
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await memory.seen(LaunchFailed)
            await client
            assert [e.replica_id for e in memory.of(LaunchFailed)] == ["m-0"]

        run(scenario)

    def test_a_launched_worker_takes_requests_and_is_ended_when_retired(self):
        async def scenario() -> None:
            launcher = FakeLauncher()
            subject, memory = driver(Starter(Launch("m", ("gpu0",))), launcher=launcher)
            async with subject:
                assert isinstance(await subject.submit(request()), Finished)
                subject.retire("m-0")
            assert launcher.ended == ["m-0"]
            assert [e.state for e in memory.of(ReplicaChanged)] == ["ready", "draining", "gone"]

        run(scenario)

    def test_a_failed_launch_is_told_with_its_reason(self):
        async def scenario() -> None:
            launcher = FakeLauncher(WorkerError("no room"))
            subject, memory = driver(Planner(Launch("m", ("gpu0",))), launcher=launcher)
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await memory.seen(LaunchFailed)
            await client
            assert [e.reason for e in memory.of(LaunchFailed)] == ["no room"]

        run(scenario)

    def test_a_launch_under_way_is_called_off_at_the_end(self):
        async def scenario() -> None:
            launcher = FakeLauncher(hangs=True)
            subject, memory = driver(Planner(Launch("m", ("gpu0",))), launcher=launcher)
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await launcher.begun.wait()
            await client
            assert [e.reason for e in memory.of(LaunchFailed)] == ["called off"]

        run(scenario)

    def test_a_launch_that_succeeds_while_the_driver_closes_does_not_hold_it_up(self):
        async def scenario() -> None:
            launcher = FakeLauncher()
            subject, _ = driver(
                Planner(Launch("m", ("gpu0",))), launcher=launcher, scrape_s=LIMIT_S
            )
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await launcher.begun.wait()  # it has returned, and the driver not heard of it
            await client

        run(scenario)

    def test_a_policy_that_is_not_sound_is_refused_and_changes_nothing(self, tmp_path: Path):
        (tmp_path / "faulty.py").write_text(FAULTY)
        spec = {"class": f"{tmp_path}/faulty.py:TickInWords"}

        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0"))
            async with subject:
                with pytest.raises(PolicyError, match="tick_s is 'soon'"):
                    subject.change(Limits(), spec)
                assert isinstance(await subject.submit(request()), Finished)

        run(scenario)

    def test_a_worker_that_is_down_takes_nothing_until_it_is_up(self):
        async def scenario() -> None:
            subject, memory = driver(LeastLoaded())
            async with subject:
                subject.add(FakeWorker("r0"), is_up=False)
                client = asyncio.create_task(subject.submit(request()))
                await memory.seen(Arrived)
                assert memory.actions == []
                subject.set_up("r0", True)
                assert isinstance(await client, Finished)

        run(scenario)

    def test_a_drained_worker_stays_so_while_any_reason_holds(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0"))
            async with subject:
                replica = subject.core.view.replica("r0")
                subject.drain("r0", "hot")
                subject.drain("r0", "admin")
                subject.undrain("r0", "hot")
                assert replica.state == "draining"
                subject.set_up("r0", False)
                subject.set_up("r0", True)
                assert replica.state == "draining"
                subject.undrain("r0", "admin")
                assert replica.state == "ready"

        run(scenario)

    def test_an_id_is_taken_once(self):
        async def scenario() -> None:
            subject, _ = driver(LeastLoaded(), FakeWorker("r0"))
            async with subject:
                with pytest.raises(ValueError, match="'r0' is there already"):
                    subject.add(FakeWorker("r0"))

        run(scenario)

    def test_what_an_action_raises_is_handled_after_the_other_actions(self):
        # Were the failed launch handled at once, `a` would be withdrawn before it is sent.
        async def scenario() -> None:
            planner = Hasty(Launch("m", ("gpu0",)), Dispatch("a", "r0"))
            subject, memory = driver(planner, FakeWorker("r0", hanging=True))
            async with subject, asyncio.TaskGroup() as clients:
                waiting = [clients.create_task(subject.submit(request(id=name))) for name in "ab"]
                await memory.seen(Cancelled)
                for client in waiting:
                    client.cancel()
            assert [type(action) for action in memory.actions] == [Launch, Dispatch, Preempt]

        run(scenario)

    def test_a_retired_worker_goes_when_its_last_request_has_ended(self):
        async def scenario() -> None:
            worker = FakeWorker("r0", hanging=True)
            planner = Planner(Dispatch("q", "r0"), Retire("r0"))
            subject, memory = driver(planner, worker, scrape_s=0.001)
            async with subject:
                client = asyncio.create_task(subject.submit(request()))
                await worker.taken.get()
                worker.gate.set()
                assert isinstance(await client, Finished)
            states = [e.state for e in memory.of(ReplicaChanged)]
            kinds = [type(e) for e in memory.events]
            assert states == ["ready", "gone"]
            assert kinds.index(Finished) < len(kinds) - 1 - kinds[::-1].index(ReplicaChanged)

        run(scenario)


# -- storms: many requests, many faults, and the journal of all that --


def dice(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return zlib.crc32(repr(key).encode()) / 2**32


def unreliable(worker_id: str) -> Callable[[RequestView, int], Pieces]:
    """Fails before, during, or not at all, as the dice of the attempt fall."""

    def answers(request: RequestView, attempt: int) -> Pieces:
        luck = dice(worker_id, request.id, attempt)
        if luck < 0.1:
            return [WorkerRefused("bad request")]
        if luck < 0.3:
            return [WorkerError("down")]
        if luck < 0.4:
            return [1, WorkerError("reset")]
        return [1] * (1 + int(luck * 8))

    return answers


async def storm(spec: PolicySpec, path: Path, requests: int = 60) -> list[FakeWorker]:
    """Requests against unreliable workers; one client in six leaves early. Journaled."""
    limits = Limits(max_queued=30, queue_timeout_s=0.5, eject_after=4, eject_s=0.002)
    head = Segment(spec, seed=3, limits=limits)
    core = head.make_core()
    workers = [FakeWorker(f"r{i}", unreliable(f"r{i}"), piece_s=0.0001) for i in range(3)]

    async def client(driver: Driver, index: int) -> None:
        view = request(
            id=f"q{index}",
            prompt_tokens=1 + int(1000 * dice("prompt", index)),
            streamed=dice("streamed", index) < 0.7,
            priority=index % 3,
        )
        patience_s = 0.0003 if index % 6 == 0 else LIMIT_S
        try:
            async with asyncio.timeout(patience_s):
                await driver.submit(view)
        except TimeoutError:
            assert index % 6 == 0, "only the impatient may leave unanswered"

    with JournalWriter(path, head, core=core, segment_events=100) as journal:
        driver = Driver(core, workers, journal=journal, scrape_s=0.001)
        async with driver, asyncio.TaskGroup() as clients:
            for index in range(requests):
                clients.create_task(client(driver, index))
                if index % 5 == 0:
                    await asyncio.sleep(0)
    assert (core.queued_requests, core.inflight_requests) == (0, 0)
    counts = core.counts
    assert counts["arrived"] == counts["finished"] + counts["shed"] + counts["cancelled"]
    return workers


@pytest.mark.parametrize(
    "spec", [*policy_names(), ShownStays], ids=lambda spec: getattr(spec, "__name__", spec)
)
class TestStorms:
    def test_nothing_is_left_at_any_worker(self, spec: PolicySpec, tmp_path: Path):
        async def scenario() -> None:
            workers = await storm(spec, tmp_path / "journal.jsonl")
            assert [worker.inflight for worker in workers] == [0, 0, 0]

        run(scenario)

    def test_its_journal_replays_with_zero_differences(self, spec: PolicySpec, tmp_path: Path):
        async def scenario() -> None:
            await storm(spec, tmp_path / "journal.jsonl")

        run(scenario)
        reports = [replay_journal(path, trust=True) for path in tmp_path.iterdir()]
        assert [str(report.difference) for report in reports if not report.equal] == []
        assert len(reports) > 1
        assert sum(report.actions for report in reports) > 40
