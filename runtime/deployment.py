"""An experiment that is being served: its workers, and what changes while it runs.

A worker keeps its id as long as it lives. A reload compares the file's replicas with those that
run: equal ones stay, new ones get ids that were never used, the others finish what they have and
end. So no request is lost over a reload.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from aiohttp import web

from policies.core import SchedulerCore
from policies.interface import Launch
from policies.interface import Limits as CoreLimits
from policies.registry import PolicySpecError
from runtime.access import Client
from runtime.app import DRIVER, KEYS, make_app
from runtime.card_metrics import CardMetrics
from runtime.card_readers import Cards, open_cards
from runtime.card_watch import CardWatch, NoCards, capped
from runtime.cards import STARTED, cards_of
from runtime.cluster import Planned, client_of, free_ports, planned
from runtime.commands import command_of
from runtime.driver import Driver
from runtime.fault_injection import inject
from runtime.fork_server import ForkServer
from runtime.http_worker import HttpWorker
from runtime.processes import Home, WorkerProcess
from runtime.proxy import Limits
from runtime.serve import listening, stop_signals
from runtime.supervisor import Patience, Supervisor
from runtime.tokens import Tokenizer
from runtime.worker import Journal, WorkerError
from viisim.config import DeployConfig, Experiment, ReplicaConfig, load_experiment, resolved
from viisim.errors import InputError

log = logging.getLogger(__name__)

URL_LIMIT_S = 10.0
"""How long the first of servers that run already may take to answer."""


class Deployment:
    """The workers of an experiment behind one driver; its own `Launcher`.

    `say` is told, in a line each, what an operator wants to read.
    """

    def __init__(
        self,
        file: Path,
        overrides: Sequence[str],
        home: Home,
        core: SchedulerCore,
        *,
        journal: Journal | None = None,
        speed: float = 1.0,
        with_faults: bool = False,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self._file = file
        self._overrides = overrides
        self._home = home
        self._speed = speed
        self._with_faults = with_faults
        self._say = say
        self._experiment = load_experiment(file, overrides)
        self._replicas: dict[str, Planned] = {}
        self._used_ids: set[str] = set()
        self._cards_of: dict[str, tuple[int, ...]] = {}
        self._fork_servers: list[ForkServer] = []
        self._cards = self._open_cards()
        self._watch = CardWatch(self._cards, self._workers_on)
        self._app = self._make_app(core, journal)
        self._driver: Driver = self._app[DRIVER]
        patience = Patience(max_restarts=self._experiment.deploy.max_restarts)
        patience = patience.at_speed(time_scale(self._experiment, speed))
        self._supervisor = Supervisor(self._driver.set_up, patience)

    def _open_cards(self) -> Cards:
        """The machine's, if workers are started on any."""
        kinds = {entry.worker.kind for entry in self._experiment.cluster.replicas}
        return open_cards() if kinds & set(STARTED) else NoCards()

    def _make_app(self, core: SchedulerCore, journal: Journal | None) -> web.Application:
        settings = self._experiment.deploy
        tokenizer = None if settings.tokenizer is None else Tokenizer(Path(settings.tokenizer))
        return make_app(
            core,
            [],
            limits=Limits(
                settings.max_body_bytes,
                settings.default_output_tokens,
                settings.body_timeout_s,
                settings.no_worker_wait_s,
            ),
            clients=_clients(settings),
            admin_sha256=settings.admin_sha256,
            scrape_s=self._experiment.cluster.scrape_s / time_scale(self._experiment, self._speed),
            journal=journal,
            launcher=self,
            on_fault=lambda worker_id: self._supervisor.doubt(worker_id),
            token_count=tokenizer,
            collectors=[CardMetrics(self._watch.telemetry)],
            passed_on=settings.pass_on,
        )

    # -- from the first start to the end --

    async def serve(self) -> None:
        """Serve until told to stop. Raises InputError when no worker comes up."""
        settings = self._experiment.deploy
        host, _, port = settings.listen.rpartition(":")
        caps = capped(self._cards, settings.power_cap_w, self._home.folder / "power_caps")
        try:
            with caps, stop_signals(self.reload) as stop:
                async with listening(
                    self._app,
                    host,
                    int(port),
                    head_timeout_s=settings.head_timeout_s,
                    max_connections=settings.max_connections,
                    drain_s=settings.drain_s,
                ):
                    await self._until(stop)
        finally:
            await self._supervisor.close()
            for server in self._fork_servers:
                server.close()

    async def _until(self, stop: asyncio.Event) -> None:
        """Have workers serve, and watch them, until then."""
        limit_c = self._experiment.deploy.max_temperature_c
        beside = [asyncio.create_task(self._watch.watch(self._driver, limit_c))]
        try:
            self._take(planned(self._experiment))
            if not await self._first_is_up(stop):
                return
            if self._with_faults:
                beside.append(asyncio.create_task(self._play_faults()))
            self._say(f"serving http://{self._experiment.deploy.listen}/v1 (Ctrl-C ends it)")
            await stop.wait()
        finally:
            for task in beside:
                task.cancel()

    async def _play_faults(self) -> None:
        # The clock of a simulation starts with the first request.
        while not self._driver.core.counts["arrived"]:  # noqa: ASYNC110 - the core sets no event
            await asyncio.sleep(0.01)
        seed = self._experiment.seeds[0]
        simulated = {
            name: one.url
            for name, one in self._replicas.items()
            if one.entry.worker.kind == "simulated"
        }
        schedule = self._experiment.fault_schedule(seed)
        await inject(schedule, simulated, self._speed, self._kill)

    def _kill(self, worker_id: str) -> None:
        pid = self._supervisor.pid(worker_id)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    async def _first_is_up(self, stop: asyncio.Event) -> bool:
        """Whether a worker came up before the operator gave up. Simulated ones all do at once,
        and are waited for."""
        waits = [asyncio.create_task(self._up(name)) for name in self._replicas]
        stopped = asyncio.create_task(stop.wait())
        simulated = all(one.entry.worker.kind == "simulated" for one in self._replicas.values())
        try:
            while waits and not stop.is_set():
                await asyncio.wait([*waits, stopped], return_when=asyncio.FIRST_COMPLETED)
                ended = [wait for wait in waits if wait.done()]
                errors = [wait.exception() for wait in ended]
                waits = [wait for wait in waits if not wait.done()]
                if not waits and ended and errors[-1] is not None:
                    raise errors[-1]
                if None in errors and not (simulated and waits):
                    return True
            return False
        finally:
            for task in (*waits, stopped):
                task.cancel()

    async def _up(self, worker_id: str) -> None:
        replica = self._replicas[worker_id]
        limit_s = URL_LIMIT_S if replica.entry.worker.kind == "url" else None
        try:
            async with asyncio.timeout(limit_s):
                await self._supervisor.until_up(worker_id)
        except TimeoutError:
            raise InputError(
                f"{worker_id}: {replica.url} did not become healthy within {limit_s:g} s; "
                "look whether the server runs there"
            ) from None

    # -- workers --

    def _take(self, replicas: Sequence[Planned]) -> None:
        """Have these served."""
        cards = cards_of(self._experiment)
        if any(replica.entry.worker.kind == "simulated" for replica in replicas):
            # Another one after each reload: the former has read the file as it was.
            self._fork_servers.append(ForkServer(self._file, self._overrides, self._speed))
        for replica in replicas:
            self._driver.add(self._begin(replica, cards.get(replica.file_id)), is_up=False)

    def _begin(self, replica: Planned, cards: tuple[int, ...] | None) -> HttpWorker:
        """The client of a replica whose server is being started."""
        self._replicas[replica.id] = replica
        self._used_ids.add(replica.id)
        state = None
        if cards:
            self._cards_of[replica.id] = cards
            state = partial(self._watch.shown, cards)
        worker = client_of(replica, cards, state)
        self._keep(worker, replica, cards or ())
        return worker

    def _workers_on(self, card: int) -> list[str]:
        return [name for name, cards in self._cards_of.items() if card in cards]

    def _keep(self, worker: HttpWorker, replica: Planned, cards: tuple[int, ...]) -> None:
        """Start the replica's server, unless it runs by itself, and watch it."""
        settings, entry = replica.entry.worker, replica.entry
        if settings.kind == "url":
            for sentence in worker.adapter.cannot:
                log.info("%s (%s): %s", replica.id, worker.adapter.title, sentence)
            self._supervisor.keep(worker)
            return
        if settings.kind == "simulated":
            start = partial(self._fork_servers[-1].start, replica.file_id, replica.port)
            self._supervisor.keep(worker, start)
            return
        folder = self._home.folder / "logs" if settings.log_dir is None else Path(settings.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{replica.id}.log"
        command = command_of(replica, cards, self._home.mark)
        self._supervisor.keep(
            worker,
            partial(WorkerProcess.start, command, output, self._home),
            log=output,
            start_limit_s=settings.start_limit(entry.devices),
        )

    # -- see runtime.worker.Launcher --

    async def launch(self, action: Launch) -> HttpWorker:
        """Start a worker like those of the file for the model on so many devices."""
        try:
            entry = self._entry_for(action)
            url = f"http://127.0.0.1:{free_ports(1)[0]}"
            replica = Planned(action.replica_id, entry, url, action.replica_id)
            worker = self._begin(replica, tuple(map(_card, action.devices)))
        except InputError as error:
            raise WorkerError(str(error)) from error
        try:
            await self._supervisor.until_up(replica.id)
        except BaseException as error:
            await self.end(replica.id)
            if isinstance(error, InputError):
                raise WorkerError(str(error)) from error
            raise
        return worker

    async def end(self, worker_id: str) -> None:
        """End a worker that was started here, or watch one no more that was not."""
        self._replicas.pop(worker_id, None)
        self._cards_of.pop(worker_id, None)
        await self._supervisor.end(worker_id)

    def _entry_for(self, action: Launch) -> ReplicaConfig:
        for entry in self._experiment.cluster.replicas:
            wanted = (action.model, len(action.devices))
            if entry.worker.kind in STARTED and (entry.model, entry.devices) == wanted:
                return entry.model_copy(update={"count": 1})
        raise InputError(
            f"{action.model} on {len(action.devices)} devices: no such replica of kind vllm or "
            "container in the file to start it by"
        )

    # -- reload --

    def reload(self) -> None:
        """Read the file again and become what it says; a file that is wrong changes nothing."""
        try:
            wanted = load_experiment(self._file, self._overrides)
            cards_of(wanted)
            new, gone = self._compared(wanted)
            policy, known = resolved(wanted)["policy"], resolved(self._experiment)["policy"]
            limits = limits_at(wanted, self._speed)
            self._app[KEYS].replace(_clients(wanted.deploy))
            if policy != known or limits != self._driver.core.limits:
                self._driver.change(limits, policy if policy != known else None)
        except (InputError, PolicySpecError, ValueError) as error:
            log.error("not reloaded: %s", error)
            self._say(f"not reloaded: {error}")
            return
        self._experiment = wanted
        self._take(new)
        for worker_id in gone:
            self._driver.retire(worker_id)
        self._say(f"reloaded: {len(new)} workers added, {len(gone)} retired")

    def _compared(self, wanted: Experiment) -> tuple[list[Planned], list[str]]:
        """The replicas that are to be added, and the ids of those that are to go."""
        left = {name: _identity(one.entry) for name, one in self._replicas.items()}
        new = []
        for replica in planned(wanted):
            identity = _identity(replica.entry)
            same = next((name for name, known in left.items() if known == identity), None)
            if same is None:
                new.append(replace(replica, id=self._unused_id(replica.id)))
            else:
                del left[same]
        return new, list(left)

    def _unused_id(self, wanted: str) -> str:
        number = 0
        while wanted in self._used_ids:
            wanted, number = f"r{number}", number + 1
        self._used_ids.add(wanted)
        return wanted


def time_scale(experiment: Experiment, speed: float) -> float:
    """What the file's seconds are divided by: its workers' speed, if all of them are simulated."""
    kinds = {entry.worker.kind for entry in experiment.cluster.replicas}
    return speed if kinds == {"simulated"} else 1.0


def limits_at(experiment: Experiment, speed: float) -> CoreLimits:
    """The core's limits, in the time in which the workers live."""
    limits, scale = experiment.limits.limits(), time_scale(experiment, speed)
    waits_s = limits.queue_timeout_s
    return replace(
        limits,
        eject_s=limits.eject_s / scale,
        queue_timeout_s=None if waits_s is None else waits_s / scale,
    )


def _identity(entry: ReplicaConfig) -> str:
    """Equal for replicas that need no other worker."""
    return json.dumps(entry.model_dump(mode="json", exclude={"count"}), sort_keys=True)


def _card(device: str) -> int:
    """The HIP index that a policy's device stands for."""
    number = device.removeprefix("gpu")
    if not number.isdigit():
        raise InputError(f"unknown device {device!r}: they are gpu0, gpu1, ...")
    return int(number)


def _clients(settings: DeployConfig) -> list[Client]:
    return [
        Client(
            key.sha256,
            key.tenant,
            key.traffic_class,
            key.priority,
            key.best_priority,
            key.max_requests,
            key.rate_per_s,
            key.burst,
        )
        for key in settings.keys
    ]
