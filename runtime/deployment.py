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
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

from aiohttp import web

from policies.core import SchedulerCore
from policies.interface import Launch, PolicyError
from policies.interface import Limits as CoreLimits
from runtime.access import Client
from runtime.app import DRIVER, KEYS, make_app
from runtime.cards.assignment import STARTED, cards_beside
from runtime.cards.metrics import CardMetrics
from runtime.cards.readers import Cards, open_cards
from runtime.cards.watch import CardWatch, NoCards, capped
from runtime.cluster import Planned, client_of, free_ports, planned
from runtime.commands import WorkerCommand, command_of
from runtime.driver import Driver
from runtime.http_worker import HttpWorker
from runtime.processes import Home, WorkerProcess
from runtime.proxy import Limits
from runtime.serve import listening, stop_signals
from runtime.simulated.faults import inject
from runtime.simulated.fork_server import ForkServer
from runtime.supervisor import Patience, Supervisor
from runtime.tokens import Tokenizer
from runtime.worker import Journal, WorkerError
from viisim.config import DeployConfig, Experiment, ReplicaConfig, load_experiment
from viisim.errors import InputError

log = logging.getLogger(__name__)

URL_LIMIT_S = 10.0
"""How long the first of servers that run already may take to answer."""
NOT_IN_FILE = ""
"""In place of the file's number, of replicas that a policy launched."""


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
        self._freed = asyncio.Event()
        self._forked_by: dict[str, ForkServer] = {}
        self._takes_reloads = False
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
        with caps, stop_signals(self.reload) as stop:
            try:
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
                for server in set(self._forked_by.values()):
                    server.close()

    async def _until(self, stop: asyncio.Event) -> None:
        """Have workers serve, and watch them, until then."""
        limit_c = self._experiment.deploy.max_temperature_c
        beside = [asyncio.create_task(self._watch.watch(self._driver, limit_c))]
        self._driver.on_failure = stop.set  # whoever started us may start us again
        try:
            replicas = planned(self._experiment)
            self._take(replicas, self._clients_of(self._experiment, replicas, ()))
            self._takes_reloads = True
            if not await self._first_is_up(stop):
                return
            if self._with_faults:
                beside.append(asyncio.create_task(self._play_faults()))
            self._say(f"serving http://{self._experiment.deploy.listen}/v1 (Ctrl-C ends it)")
            await stop.wait()
        finally:
            self._takes_reloads = False  # what it would add nobody would end
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
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(pid, signal.SIGKILL)

    async def _first_is_up(self, stop: asyncio.Event) -> bool:
        """Whether a worker came up before the operator gave up. Simulated ones all do at once,
        and are waited for. Raises InputError when none comes up."""
        waits: dict[str, asyncio.Task[InputError | None]] = {}
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                # A reload meanwhile adds some, and takes others away.
                for name in self._replicas.keys() - waits.keys():
                    waits[name] = asyncio.create_task(self._why_not_up(self._replicas[name]))
                waited_for = [waits[name] for name in self._replicas]
                left = [wait for wait in waited_for if not wait.done()]
                reasons = [wait.result() for wait in waited_for if wait.done()]
                if None in reasons and not (left and self._is_simulated()):
                    return True
                if reasons and reasons[-1] is not None and not left:
                    raise reasons[-1]
                await asyncio.wait([*left, stopped], return_when=asyncio.FIRST_COMPLETED)
            return False
        finally:
            for task in (*waits.values(), stopped):
                task.cancel()

    def _is_simulated(self) -> bool:
        return all(one.entry.worker.kind == "simulated" for one in self._replicas.values())

    async def _why_not_up(self, replica: Planned) -> InputError | None:
        """Wait for it; None once it is up."""
        limit_s = URL_LIMIT_S if replica.entry.worker.kind == "url" else None
        try:
            async with asyncio.timeout(limit_s):
                await self._supervisor.until_up(replica.id)
        except InputError as error:
            return error
        except TimeoutError:
            return InputError(
                f"{replica.id}: {replica.url} did not become healthy within {limit_s:g} s; "
                "look whether the server runs there"
            )
        return None

    # -- workers --

    def _clients_of(
        self, experiment: Experiment, replicas: Sequence[Planned], gone: Collection[str]
    ) -> list[HttpWorker]:
        """The clients of replicas that are to be added while those of `gone` go. Nothing has
        changed if this raises InputError."""
        kept = {
            card: name
            for name, cards in self._cards_of.items()
            if name not in gone and not self._driver.is_retiring(name)
            for card in cards
        }
        cards = cards_beside(kept, experiment, replicas)
        for replica in replicas:
            self._make_log_folder(replica.entry)
        return [self._client_of(replica, cards.get(replica.id)) for replica in replicas]

    def _client_of(self, replica: Planned, cards: tuple[int, ...] | None) -> HttpWorker:
        return client_of(replica, cards, partial(self._watch.shown, cards) if cards else None)

    def _take(self, replicas: Sequence[Planned], workers: Sequence[HttpWorker]) -> None:
        """Have these served, by their clients."""
        server = None
        if any(replica.entry.worker.kind == "simulated" for replica in replicas):
            # Another one after each reload: the former has read the file as it was.
            server = ForkServer(self._file, self._overrides, self._speed)
        for replica, worker in zip(replicas, workers, strict=True):
            if server is not None and replica.entry.worker.kind == "simulated":
                self._forked_by[replica.id] = server
            self._begin(replica, worker)
            self._driver.add(worker, is_up=False)

    def _begin(self, replica: Planned, worker: HttpWorker) -> None:
        """Start the replica's server, unless it runs by itself, and watch it."""
        self._replicas[replica.id] = replica
        self._used_ids.add(replica.id)
        settings, entry = replica.entry.worker, replica.entry
        if settings.kind == "url":
            for sentence in worker.adapter.cannot:
                log.info("%s (%s): %s", replica.id, worker.adapter.title, sentence)
            self._supervisor.keep(worker)
            return
        if settings.kind == "simulated":
            server = self._forked_by[replica.id]
            self._supervisor.keep(worker, partial(server.start, replica.file_id, replica.port))
            return
        cards = tuple(map(_card, worker.devices))
        if cards:
            self._cards_of[replica.id] = cards
        output = self._log_folder(entry) / f"{replica.id}.log"
        command = command_of(replica, cards, self._home.mark)
        self._supervisor.keep(
            worker,
            partial(self._start_on, cards, replica.id, command, output),
            log=output,
            start_limit_s=settings.start_limit(entry.devices),
        )

    async def _start_on(
        self, cards: Sequence[int], worker_id: str, command: WorkerCommand, output: Path
    ) -> WorkerProcess:
        """Start a server once those that had its cards before have ended: a reload gives them to
        another worker while the former still finishes what it has."""
        while self._had_before(worker_id) & set(cards):
            self._freed.clear()
            await self._freed.wait()
        return await WorkerProcess.start(command, output, self._home)

    def _had_before(self, worker_id: str) -> set[int]:
        before = takewhile(lambda name: name != worker_id, self._cards_of)
        return {card for name in before for card in self._cards_of[name]}

    def _workers_on(self, card: int) -> list[str]:
        return [name for name, cards in self._cards_of.items() if card in cards]

    def _log_folder(self, entry: ReplicaConfig) -> Path:
        chosen = entry.worker.log_dir
        return self._home.folder / "logs" if chosen is None else Path(chosen)

    def _make_log_folder(self, entry: ReplicaConfig) -> None:
        if entry.worker.kind not in STARTED:
            return
        folder = self._log_folder(entry)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"worker.log_dir: {folder}: {error.strerror}; give a folder"
            ) from error

    # -- see runtime.worker.Launcher --

    async def launch(self, action: Launch) -> HttpWorker:
        """Start a worker like those of the file for the model on so many devices."""
        try:
            entry = self._entry_for(action)
            url = f"http://127.0.0.1:{free_ports(1)[0]}"
            replica = Planned(action.replica_id, entry, url, NOT_IN_FILE)
            self._make_log_folder(entry)
            worker = self._client_of(replica, tuple(map(_card, action.devices)))
        except InputError as error:
            raise WorkerError(str(error)) from error
        self._begin(replica, worker)
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
        await self._supervisor.end(worker_id)
        self._cards_of.pop(worker_id, None)
        self._freed.set()
        server = self._forked_by.pop(worker_id, None)
        if server is not None and server not in self._forked_by.values():
            server.close()

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
        if not self._takes_reloads:
            self._say("not reloaded: the deployment is starting or ending")
            return
        try:
            wanted = load_experiment(self._file, self._overrides)
            new, gone = self._compared(wanted)
            workers = self._clients_of(wanted, new, gone)
            policy, known = dict(wanted.policy.spec), dict(self._experiment.policy.spec)
            limits = limits_at(wanted, self._speed)
            self._app[KEYS].replace(_clients(wanted.deploy))
            if policy != known or limits != self._driver.core.limits:
                self._driver.change(limits, policy if policy != known else None)
        except (ValueError, OSError, PolicyError) as error:  # an InputError is a ValueError
            log.error("not reloaded: %s", error)
            self._say(f"not reloaded: {error}")
            return
        for key in _needing_a_restart(self._experiment, wanted):
            log.warning("%s: changed in the file, and takes effect after a restart", key)
        self._experiment = wanted
        self._take(new, workers)
        for worker_id in gone:
            self._driver.retire(worker_id)
        self._say(f"reloaded: {len(new)} workers added, {len(gone)} retired")

    def _compared(self, wanted: Experiment) -> tuple[list[Planned], list[str]]:
        """The replicas that are to be added, and the ids of those that are to go. What a policy
        has launched is its own matter, and what ends already is as good as gone."""
        left = {
            name: _identity(one.entry)
            for name, one in self._replicas.items()
            if one.file_id != NOT_IN_FILE and not self._driver.is_retiring(name)
        }
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


def _needing_a_restart(before: Experiment, wanted: Experiment) -> list[str]:
    """The keys whose change a reload leaves for the next start."""
    old, new = before.deploy.model_dump(), wanted.deploy.model_dump()
    return [f"deploy.{key}" for key in new if key != "keys" and new[key] != old[key]]


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
