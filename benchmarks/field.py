"""The same traffic on the same workers through viisim, vllm-router and smg, in turns.

    pip install -e '.[deploy,tokenizer]'
    python -m venv field-venv && field-venv/bin/pip install vllm-router==0.1.17 smg==1.13.0
    PATH=$PATH:$PWD/field-venv/bin python benchmarks/field.py \\
        --profiles runs/field/profiles --load 0.9 > field.json

Starts the workers of experiments/validation/field.yaml, once, and sends them the requests of a
seed through one system after the other; then those of the next seed, in another order. Prints a
table on stderr and JSON on stdout: goodput (requests a second that met the SLO of their class), p99
TTFT of each class, failed requests, and CPU of router and client; each with its median, its mean
and the 95 % interval over the seeds, and goodput also beside each rival's of the same seed.

What is equal for all:

- Requests: lengths, classes, instants. Contents differ from run to run, so that none finds
  another's prompts in a prefix cache. Prompts are texts of one character a token, because smg
  takes no token ids; that counts true for the character tokenizers of experiments/vllm_cpu.
- Engines, which schedule by priority. The rivals pass on the one in the request's body, and so
  does viisim where the policy says nothing else, as `hybrid` does.
- A fresh router on workers that have nothing to do.

What is not: viisim is told the engines' settings and step times (the experiment's profiles), and
by API keys which class a request is of. The rivals have no use for either. Their settings are as
they ship, but for two: they look for workers each second as they start, and smg reads the workers'
gauges each second, as viisim does (10 s is its default). smg's own priority scheduler stays off, as
it ships: of a vLLM server behind HTTP it assumes 64 places, more than these engines have, so it
would order nothing that the engines do not.

Each rival has its best policy: those in `RIVALS` are each tried with the requests of one more
seed, and the one with the most goodput goes on. `vllm-router:power_of_two` in --systems names one
instead; viisim's may have parameters, as `viisim:twin/shed_late=true` has.

With 45 s a run, 5 seeds, and 8 policies to try, it takes about half an hour; --profiles has each
worker measured first where its profile is missing, five to ten minutes each. --quick takes a minute
or two and shows that everything works, no more. Logs, and each run's records, stay in --state.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from numpy.random import default_rng

from runtime.cards.assignment import cards_of
from runtime.cluster import Planned, free_ports, planned
from runtime.commands import WorkerCommand, command_of
from runtime.http_worker import HttpWorker
from runtime.load import LoadClient, Record, late_share
from runtime.processes import Home, WorkerProcess
from runtime.tokens import Tokenizer
from runtime.worker import WorkerError
from viisim.capacity import offered_per_s
from viisim.cells import policy_spec
from viisim.cli.load import summarised
from viisim.config import Experiment, SloConfig, experiment_from
from viisim.documents import override, read_yaml
from viisim.errors import InputError
from viisim.statistics import estimate, paired_difference
from viisim.validation.predict import capacity_under_backlog_per_s, requests_at
from viisim.workload.request import Request

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments/validation/field.yaml"
SYSTEMS = ("viisim:hybrid", "viisim:twin", "vllm-router", "smg")
CHARACTERS = range(33, 127)
"""Printable, and no spaces, which a server may strip."""
ROUTER_START_S = 60.0
IDLE_S = 180.0
"""How long what the run before left may take to end."""
ANSWER_S = 300.0
"""How long a request may take before the client gives it up."""
LOOK_S = 0.25
SETTLE_S = 3.0
"""After a router's first answer: by then it has found every worker and read its gauges."""
WARM_UP_REQUESTS = 16

# -- the systems --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rival:
    """A router of others."""

    tested: str
    """The version, on PyPI, whose flags these are."""
    policies: tuple[str, ...]
    """Those that make sense here; the first is the router's default. Left out: those that hash
    (no session, no equal prefix), chance, and those that need other connections to the engine."""


RIVALS = {
    "vllm-router": Rival(
        "0.1.17", ("cache_aware", "power_of_two", "round_robin", "sticky_least_loaded")
    ),
    "smg": Rival("1.13.0", ("cache_aware", "power_of_two", "round_robin", "least_load")),
}


@dataclass(frozen=True, slots=True)
class System:
    """A router and its policy; an empty one is still to be chosen."""

    router: str
    policy: str

    @classmethod
    def named(cls, name: str) -> System:
        """`ROUTER:POLICY`, or a rival's name alone. Raises InputError."""
        router, _, policy = name.partition(":")
        if router not in RIVALS and not (router == "viisim" and policy):
            names = ", ".join(("viisim:POLICY", *(f"{one}[:POLICY]" for one in RIVALS)))
            raise InputError(f"--systems {name}: no such system; there are {names}")
        return cls(router, policy)

    def __str__(self) -> str:
        return f"{self.router}:{self.policy}" if self.policy else self.router


def program_of(router: str, given: str | None) -> str:
    """The rival's executable: as given, or on PATH. Raises InputError when it is not there."""
    found = shutil.which(given or router)
    if found is None:
        raise InputError(
            f"{given or router}: no such program; pip install {router}=={RIVALS[router].tested} in "
            f"an environment of its own and give --{router} PATH, or do --without {router}"
        )
    return found


def version_of(router: str, program: str) -> str:
    """The package's version in the environment that the program is installed in."""
    python = Path(program).resolve().with_name("python")
    code = f"from importlib.metadata import version; print(version({router!r}))"
    with suppress(OSError, subprocess.SubprocessError):
        command = [str(python), "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()
    return "unknown"


def rival_command(
    system: System, program: str, urls: Sequence[str], port: int, metrics_port: int
) -> list[str]:
    """How a rival is started in front of the workers."""
    command = [program] if system.router == "vllm-router" else [program, "launch"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
    command += ["--policy", system.policy, "--worker-startup-check-interval", "1"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    if system.router == "vllm-router":
        return [*command, "--log-level", "warning"]
    command += ["--backend", "vllm", "--load-monitor-interval", "1", "--log-level", "warn"]
    # It would look for the model's tokenizer on the hub, and wait for requests when told to end.
    return [*command, "--disable-tokenizer-autoload", "--shutdown-grace-period-secs", "1"]


def viisim_command(file: Path, state: Path) -> list[str]:
    """How `viisim deploy` is started."""
    return [sys.executable, "-m", "viisim", "deploy", str(file), "--state", str(state)]


def key_of(traffic_class: str) -> str:
    """The API key of a class's client: that is how viisim knows the class."""
    return f"field-{traffic_class or 'all'}"


def deployed(
    data: Mapping[str, Any], policy: str, urls: Sequence[str], port: int, classes: Iterable[str]
) -> dict[str, Any]:
    """The experiment for `viisim deploy`, in front of workers that run already."""
    changed = deepcopy(dict(data))
    changed["policy"] = policy_spec(policy)
    entries = changed["cluster"]["replicas"]
    for entry, url in zip(entries, urls, strict=True):
        entry["worker"] = {"kind": "url", "url": url}
    keys = [
        {
            "sha256": hashlib.sha256(key_of(name).encode()).hexdigest(),
            "traffic_class": name,
            "best_priority": -1000,
        }
        for name in classes
    ]
    listen = f"127.0.0.1:{port}"
    changed["deploy"] = {**changed.get("deploy", {}), "listen": listen, "keys": keys}
    return changed


def single(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The experiment with an entry for each replica, and profiles that are found from anywhere."""
    changed = deepcopy(dict(data))
    entries = []
    for entry in changed["cluster"]["replicas"]:
        profile = entry.get("profile")
        if profile is not None and profile.endswith((".yaml", ".yml")):
            entry["profile"] = str((folder / profile).resolve())
        entries += [deepcopy({**entry, "count": 1}) for _ in range(entry.get("count", 1))]
    changed["cluster"]["replicas"] = entries
    return changed


# -- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What one system did with one seed's requests."""

    system: str
    seed: int
    goodput_per_s: float
    failed: int
    late_share: float
    """Of requests that the client sent late."""
    router_cpu: float
    client_cpu: float
    """Shares of the machine's CPU time."""
    p99_ttft_s: Mapping[str, float | None]
    """By class."""
    met_share: Mapping[str, float]
    """Of each class's requests, those that met their SLO."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Which requests count, and for how long they arrive: the earliest are warm-up."""

    ids: frozenset[str]
    span_s: float

    @classmethod
    def of(cls, requests: Sequence[Request], warmup_fraction: float) -> Counted:
        """All but that share of the requests, which are in order of arrival."""
        kept = requests[int(len(requests) * warmup_fraction) :]
        span_ns = kept[-1].arrived_ns - kept[0].arrived_ns if kept else 0
        if not span_ns:
            raise InputError("--run-s: too few requests arrive in it; give more seconds")
        return cls(frozenset(request.view.id for request in kept), span_ns / 1e9)


def judged(
    records: Sequence[Record],
    counted: Counted,
    slo: SloConfig,
    *,
    system: System,
    seed: int,
    router_cpu: float,
    client_cpu: float,
) -> Run:
    """The figures of a run. A failed request met nothing, and has no TTFT."""
    kept = [record for record in records if record.id in counted.ids]
    classes = sorted({record.traffic_class for record in kept})
    by_class = {
        name: summarised([record for record in kept if record.traffic_class == name], slo)
        for name in classes
    }
    return Run(
        system=str(system),
        seed=seed,
        goodput_per_s=sum(found["met_slo"] for found in by_class.values()) / counted.span_s,
        failed=sum(found["failed"] for found in by_class.values()),
        late_share=late_share(kept),
        router_cpu=router_cpu,
        client_cpu=client_cpu,
        p99_ttft_s={name: found["ttft_s"]["p99"] for name, found in by_class.items()},
        met_share={name: found["met_slo"] / found["requests"] for name, found in by_class.items()},
    )


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % half width, median, and the values, one a seed."""
    known = [value for value in values if value is not None]
    median = statistics.median(known) if known else None
    return {**estimate(values), "median": median, "values": list(values)}


def summed_up(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one system, over its seeds."""
    names = ("goodput_per_s", "failed", "late_share", "router_cpu", "client_cpu")
    figures: dict[str, Any] = {n: spread([getattr(run, n) for run in runs]) for n in names}
    for name in ("p99_ttft_s", "met_share"):
        classes = sorted({key for run in runs for key in getattr(run, name)})
        figures[name] = {
            key: spread([getattr(run, name).get(key) for run in runs]) for key in classes
        }
    return figures


def compared(by_system: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """viisim's policies beside each rival: goodput relative to that of the rival in the same seed,
    and the paired difference in requests a second."""
    found = []
    for name, runs in by_system.items():
        for other, rivals in by_system.items():
            if not name.startswith("viisim:") or other.startswith("viisim:"):
                continue
            ours = [run.goodput_per_s for run in runs]
            theirs = [run.goodput_per_s for run in rivals]
            gains = [a / b - 1 if b else None for a, b in zip(ours, theirs, strict=True)]
            difference = paired_difference(ours, theirs)
            found.append(
                {"system": name, "beside": other, "gain": spread(gains), "difference": difference}
            )
    return found


def reported(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the runs show; each system has had every seed, in the same order."""
    by_system: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_system.setdefault(run.system, []).append(run)
    by_system = dict(sorted(by_system.items(), key=lambda item: not item[0].startswith("viisim:")))
    return {
        "systems": {name: summed_up(own) for name, own in by_system.items()},
        "comparisons": compared(by_system),
        "runs": [asdict(run) for run in runs],
    }


def best_policy(runs: Sequence[Run]) -> str:
    """The policy with the most goodput; of equal ones, the first."""
    return max(runs, key=lambda run: run.goodput_per_s).system.partition(":")[2]


def orders(systems: Sequence[System], seeds: Sequence[int]) -> list[tuple[int, System]]:
    """Every system with every seed, seed by seed, and in each by an order of its own."""
    return [
        (seed, systems[index])
        for seed in seeds
        for index in default_rng(seed).permutation(len(systems))
    ]


# -- the table ----------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> list[str]:
    """The report's lines, for people."""
    systems = report["systems"]
    classes = sorted({name for found in systems.values() for name in found["p99_ttft_s"]})
    heads = ["system", "goodput/s", *(f"p99 TTFT {name}, s" for name in classes)]
    heads += ["failed", "router CPU", "client CPU"]
    rows = [heads]
    for name, found in systems.items():
        row = [name, _with_interval(found["goodput_per_s"])]
        row += [_with_interval(found["p99_ttft_s"].get(one)) for one in classes]
        row += [f"{sum(found['failed']['values'])}"]
        row += [f"{found[key]['mean']:.1%}" for key in ("router_cpu", "client_cpu")]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for one in report["comparisons"]:
        gain = _with_interval(one["gain"], percent=True)
        lines.append(f"{one['system']} beside {one['beside']}: goodput {gain}")
    return lines


def _with_interval(found: Mapping[str, Any] | None, percent: bool = False) -> str:
    if found is None or found["mean"] is None:
        return "-"
    mean, half = found["mean"], found["half_width"]
    if percent:
        return f"{mean:+.1%}" if half is None else f"{mean:+.1%} ± {half:.1%}"
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


# -- traffic ------------------------------------------------------------------------------------


async def send(url: str, requests: Sequence[Request], salt: str, speed: float) -> list[Record]:
    """Each class by a client with its key, all at once."""
    by_class: dict[str, list[Request]] = {}
    for request in requests:
        by_class.setdefault(request.view.traffic_class, []).append(request)
    clients = [
        LoadClient(
            url,
            key=key_of(name),
            vocabulary=CHARACTERS,
            as_text=True,  # smg takes no token ids
            salt=salt,
            speed=speed,
            timeout_s=ANSWER_S,
        )
        for name in by_class
    ]
    sent = [client.send(iter(own)) for client, own in zip(clients, by_class.values(), strict=True)]
    return [record for records in await asyncio.gather(*sent) for record in records]


# -- processes ----------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU time that a process and its children have used. Raises InputError when it has ended."""
    try:
        process = psutil.Process(pid)
        spent = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        raise InputError("a router ended during a run; its log is in --state") from None
    return sum(one.user + one.system for one in spent)


async def comes(condition: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
    """Whether something that other processes do happens in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not await condition():  # noqa: ASYNC110 - other processes set no event
                await asyncio.sleep(LOOK_S)
            return True
    return False


async def is_busy(worker: HttpWorker) -> bool:
    """Whether the worker has requests, or does not say."""
    try:
        reading = await worker.gauges()
    except WorkerError:
        return True
    return bool(reading.running or reading.waiting)


async def first_answer(url: str, model: str, key: str) -> tuple[bool, str]:
    """Whether a router answers a request of one token, and what it says."""
    body = {"model": model, "prompt": "!", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    address = f"{url}/v1/completions"
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(address, json=body, headers=headers) as answer,
        ):
            return answer.status == 200, f"{answer.status} {(await answer.text())[:200]}"
    except aiohttp.ClientError as error:
        return False, str(error)


def simulated_command(replica: Planned, file: Path) -> WorkerCommand:
    """A worker that is simulated, to try all this out."""
    argv = [sys.executable, "-m", "viisim", "worker", str(file)]
    argv += ["--replica", replica.id, "--port", str(replica.port)]
    return WorkerCommand(tuple(argv), {}, None, {})


class Field:
    """The workers, the traffic, and what runs them through a system."""

    def __init__(
        self,
        options: argparse.Namespace,
        programs: Mapping[str, str],
        data: dict[str, Any],
        experiment: Experiment,
        home: Home,
    ) -> None:
        self.options = options
        self.programs = programs
        self.data = data
        self.experiment = experiment
        self.home = home
        self.workers: list[HttpWorker] = []
        self.rate_per_s = rate_of(experiment, options.load)
        first = self.requests(experiment.seeds[0])
        self.classes = sorted({request.view.traffic_class for request in first})

    def requests(self, seed: int) -> list[Request]:
        """What is sent in one run."""
        return requests_at(self.experiment, self.rate_per_s, self.options.run_s, seed)

    # -- workers --

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The workers: those that run already, or else started here and ended afterwards."""
        replicas = planned(self.experiment)
        urls = self.options.workers or [replica.url for replica in replicas]
        if len(urls) != len(replicas):
            raise InputError(
                f"--workers: {len(urls)} URLs, but {self.experiment.name} has {len(replicas)} "
                "replicas; give one for each"
            )
        async with AsyncExitStack() as stack:
            processes: list[WorkerProcess | None] = [None] * len(replicas)
            if not self.options.workers:
                commands = self._worker_commands(replicas)
                for index, (replica, command) in enumerate(zip(replicas, commands, strict=True)):
                    log = self.home.folder / f"{replica.id}.log"
                    process = await WorkerProcess.start(command, log, self.home)
                    stack.push_async_callback(process.stop)
                    processes[index] = process
            for replica, url in zip(replicas, urls, strict=True):
                worker = HttpWorker(replica.id, replica.entry.model, url)
                stack.callback(worker.close)
                self.workers.append(worker)
            for replica, worker, started in zip(replicas, self.workers, processes, strict=True):
                await self._until_healthy(replica, worker, started)
            await self._warm_up()
            yield

    def _worker_commands(self, replicas: Sequence[Planned]) -> list[WorkerCommand]:
        cards = cards_of(self.experiment)
        return [
            simulated_command(replica, self._write("simulated", self.data))
            if replica.entry.worker.kind == "simulated"
            else command_of(replica, cards.get(replica.id, ()), self.home.mark)
            for replica in replicas
        ]

    async def _until_healthy(
        self, replica: Planned, worker: HttpWorker, process: WorkerProcess | None
    ) -> None:
        log = self.home.folder / f"{replica.id}.log"
        hint = f"look at {worker.url}" if process is None else f"look into {log}"
        limit_s = replica.entry.worker.start_limit(replica.entry.devices)

        async def is_decided() -> bool:
            return await worker.is_healthy() or process is None or process.has_ended

        if not (await comes(is_decided, limit_s) and await worker.is_healthy()):
            raise InputError(f"{replica.id}: the worker does not serve; {hint}")

    async def _warm_up(self) -> None:
        """A batch on every worker, so that its memory has been touched."""
        requests = self.requests(self.experiment.seeds[0])[:WARM_UP_REQUESTS]
        for worker in self.workers:
            await send(worker.url, requests, f"{worker.id}{time.time_ns()}", speed=1e6)

    async def _until_idle(self) -> None:
        """Raises InputError for a worker that somebody else keeps busy."""

        async def are_idle() -> bool:
            return not any([await is_busy(worker) for worker in self.workers])

        if not await comes(are_idle, IDLE_S):
            raise InputError(f"the workers are busy after {IDLE_S:g} s; leave them to this alone")

    # -- one run --

    def _write(self, name: str, data: Mapping[str, Any]) -> Path:
        path = self.home.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(data), sort_keys=False))
        return path

    def _command(self, system: System, port: int, metrics_port: int) -> WorkerCommand:
        urls = [worker.url for worker in self.workers]
        if system.router == "viisim":
            data = deployed(self.data, system.policy, urls, port, self.classes)
            argv = viisim_command(self._write("viisim", data), self.home.folder / "viisim")
        else:
            program = self.programs[system.router]
            argv = rival_command(system, program, urls, port, metrics_port)
        return WorkerCommand(tuple(argv), {}, None, {})

    @asynccontextmanager
    async def _router(self, system: System) -> AsyncIterator[tuple[str, int]]:
        """The system in front of the workers: its URL and its process id."""
        port, metrics_port = free_ports(2)
        url, log = f"http://127.0.0.1:{port}", self.home.folder / f"{system.router}.log"
        command = self._command(system, port, metrics_port)
        process = await WorkerProcess.start(command, log, self.home)
        try:
            await self._until_answered(url, process, log)
            await asyncio.sleep(SETTLE_S)
            yield url, process.pid
        finally:
            await process.stop()

    async def _until_answered(self, url: str, process: WorkerProcess, log: Path) -> None:
        said = ""

        async def is_decided() -> bool:
            nonlocal said
            answers, said = await first_answer(url, self.experiment.model, key_of(self.classes[0]))
            return answers or process.has_ended

        if not await comes(is_decided, ROUTER_START_S) or process.has_ended:
            raise InputError(f"{log.stem} does not serve ({said}); look into {log}")

    async def run(self, system: System, seed: int) -> Run:
        """One seed's requests through one system."""
        requests = self.requests(seed)
        counted = Counted.of(requests, self.experiment.warmup_fraction)
        await self._until_idle()
        async with self._router(system) as (url, pid):
            router_s, client_s, start_s = cpu_s(pid), time.process_time(), time.perf_counter()
            records = await send(url, requests, f"{system}{time.time_ns()}", speed=1.0)
            available_s = (time.perf_counter() - start_s) * (psutil.cpu_count() or 1)
            found = judged(
                records,
                counted,
                self.experiment.slo,
                system=system,
                seed=seed,
                router_cpu=(cpu_s(pid) - router_s) / available_s,
                client_cpu=(time.process_time() - client_s) / available_s,
            )
        lines = "".join(f"{record.line()}\n" for record in records)
        name = re.sub(r"[:/]", ".", f"{system}.{seed}.jsonl")
        (self.home.folder / name).write_text(lines)
        print(
            f"{system}, seed {seed}: goodput {found.goodput_per_s:.3g}/s, {found.failed} failed"
            + next((f" ({record.error})" for record in records if record.error), ""),
            file=sys.stderr,
        )
        return found

    async def chosen(self, system: System) -> tuple[System, list[Run]]:
        """The system with its best policy, and the runs that showed it."""
        if system.policy:
            return system, []
        policies = RIVALS[system.router].policies
        if self.options.quick:
            return System(system.router, policies[0]), []
        seed = max(self.experiment.seeds) + 1
        runs = [await self.run(System(system.router, policy), seed) for policy in policies]
        return System(system.router, best_policy(runs)), runs

    async def compete(self) -> dict[str, Any]:
        """Everything; the report."""
        async with self.running():
            systems, tried = [], []
            for named in wanted(self.options):
                system, runs = await self.chosen(named)
                systems.append(system)
                tried += runs
            systems = list(dict.fromkeys(systems))  # a rival's best may be named as well
            pairs = orders(systems, self.experiment.seeds)
            runs = [await self.run(system, seed) for seed, system in pairs]
        return {
            "experiment": self.experiment.name,
            "rate_per_s": self.rate_per_s,
            "run_s": self.options.run_s,
            "seeds": list(self.experiment.seeds),
            "versions": {name: version_of(name, path) for name, path in self.programs.items()},
            "tried": [asdict(run) for run in tried],
            **reported(runs),
        }


def rate_of(experiment: Experiment, load: float | None) -> float:
    """Requests a second: the experiment's own, or the share of what the simulator says that its
    workers can serve."""
    if load is None:
        return offered_per_s(experiment)
    return load * capacity_under_backlog_per_s(experiment)


# -- profiles -----------------------------------------------------------------------------------


def measured(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The experiment with profiles of the workers as they run here: those in the folder, and where
    one is missing, `viisim calibrate --live --as-deployed` makes it. Equal workers have one."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = deepcopy(data)
    made: dict[str, str] = {}
    entries = changed["cluster"]["replicas"]
    for index, entry in enumerate(entries):
        kind = json.dumps(entry, sort_keys=True)
        if kind not in made:
            profile = folder.resolve() / f"r{index}.yaml"
            if not profile.exists():
                others = [other for other in entries if other is not entry]
                cluster = {**data["cluster"], "replicas": [entry, *others]}
                _calibrate({**data, "cluster": cluster}, profile)
            made[kind] = str(profile)
        entry["profile"] = made[kind]
    return changed


def _calibrate(data: Mapping[str, Any], profile: Path) -> None:
    """Of the first worker, beside the others."""
    file = profile.with_name(f"{profile.stem}_experiment.yaml")
    file.write_text(yaml.safe_dump(dict(data), sort_keys=False))
    command = [sys.executable, "-m", "viisim", "calibrate", "--live", str(file), "-o", str(profile)]
    command.append("--as-deployed")
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise InputError(f"{profile}: the worker could not be measured; see above")


# -- the command line ---------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), metavar="ROUTER[:POLICY]")
    parser.add_argument("--without", action="append", default=[], choices=sorted(RIVALS))
    for router in RIVALS:
        parser.add_argument(f"--{router}", metavar="PATH", help="its executable; else on PATH")
    parser.add_argument("--workers", nargs="+", metavar="URL", help="that run already")
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="of the workers; see above")
    parser.add_argument("--load", type=float, help="share of the simulated capacity; else as given")
    parser.add_argument("--run-s", type=float, default=45.0, help="how long requests arrive")
    parser.add_argument("--quick", action="store_true", help="one seed of 8 s, default policies")
    parser.add_argument("--state", type=Path, default=ROOT / "runs/field", help="folder for logs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.run_s = min(options.run_s, 8.0)
    return options


def wanted(options: argparse.Namespace) -> list[System]:
    """The systems to compare. Raises InputError for an unknown one."""
    named = [System.named(name) for name in options.systems]
    return [system for system in named if system.router not in options.without]


def programs_of(options: argparse.Namespace) -> dict[str, str]:
    """The rivals' executables. Raises InputError for one that is missing."""
    routers = {system.router for system in wanted(options)} & set(RIVALS)
    given = vars(options)
    return {name: program_of(name, given[name.replace("-", "_")]) for name in sorted(routers)}


def experiment_of(options: argparse.Namespace) -> tuple[dict[str, Any], Experiment]:
    """The experiment as data, an entry a replica, and read. Raises InputError."""
    file: Path = options.experiment
    data = read_yaml(file)
    for assignment in options.set:
        override(data, assignment)
    given = experiment_from(data, str(file), file.parent)
    if given.deploy.tokenizer is not None:
        Tokenizer(Path(given.deploy.tokenizer))  # is there, before others are measured for minutes
    data = single(data, file.parent)
    if options.quick:
        data["seeds"] = data["seeds"][:1]
    if options.profiles is not None:
        data = measured(data, options.profiles)
    return data, experiment_from(data, str(file), file.parent)


def main() -> None:
    options = parsed()
    try:
        programs = programs_of(options)
        data, experiment = experiment_of(options)
        with Home(options.state) as home:
            home.end_leftovers()
            field = Field(options, programs, data, experiment, home)
            report = asyncio.run(field.compete())
    except InputError as error:
        sys.exit(str(error))
    print(*table(report), sep="\n", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
