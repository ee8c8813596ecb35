"""`viisim worker`: simulated inference servers."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from viisim.cli.run import Overrides
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.config import Experiment, SimulatedReplica


def worker(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (YAML).")],
    replica: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="Which of its replicas. May be repeated, with a --port each. "
            "[dim]\\[default: the first][/dim]",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(help="Port on the loopback. [dim]\\[default: 8000][/dim]", show_default=False),
    ] = None,
    speed: Annotated[float, typer.Option(help="10: ten seconds pass in one.")] = 1.0,
    set_: Overrides = None,
    fork_server: Annotated[bool, typer.Option("--fork-server", hidden=True)] = False,
) -> None:
    """Serve simulated replicas behind the HTTP API of a vLLM server, each as its own process.

    viisim worker experiments/least_loaded.yaml --port 8001
    curl -N 127.0.0.1:8001/v1/completions -d '{"prompt": "hello", "max_tokens": 8, "stream": true}'

    Tokens come at the profile's step times. `POST /fault {"kind": "slow", "factor": 3}` has
    something go wrong: crash, hang, slow, refuse, cut, error; none ends it.
    """
    from viisim.config import load_experiment

    if not 0 < speed < math.inf:
        raise InputError(f"--speed {speed}: give a number above 0")
    if fork_server:
        # What a policy's file prints when it is imported is no answer.
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        _fork_on_request(load_experiment(file, set_ or []), speed, answers)
        return
    experiment = load_experiment(file, set_ or [])
    chosen = _chosen(experiment, replica or [])
    ports = port or [8000]
    if len(ports) != len(chosen):
        raise InputError(f"--port: {len(chosen)} replicas need as many ports, not {len(ports)}")
    if len(chosen) == 1:
        _serve(chosen[0], ports[0], speed)
        return
    _import_all()
    children: list[int] = []
    for one, its_port in zip(chosen, ports, strict=True):
        child = os.fork()
        if not child:
            _serve(one, its_port, speed)
            return
        children.append(child)
    _outlive(children)


def _fork_on_request(experiment: Experiment, speed: float, answers: TextIO) -> None:
    """For each line `REPLICA PORT` of standard input fork a worker and answer with its process
    id; at the end of the input, end with all of them. See `runtime.simulated.fork_server`."""
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever asked watches them
    ours, theirs = os.pipe()
    for line in iter(sys.stdin.readline, ""):
        replica, port = line.split()
        child = os.fork()
        if not child:
            os.close(theirs)
            answers.close()
            os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdin.fileno())
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve(_chosen(experiment, [replica])[0], int(port), speed, ours)
            return
        print(child, file=answers, flush=True)


def _chosen(experiment: Experiment, ids: Sequence[str]) -> list[SimulatedReplica]:
    from viisim.config import SimulatedReplica

    entries = {
        name: entry for name, entry in experiment.numbered_replicas() if entry.worker.kind != "url"
    }
    for name in ids:
        if name not in entries:
            known = ", ".join(entries) or "none to simulate"
            raise InputError(f"--replica {name}: there are {known}")
    if not entries:
        raise InputError(f"{experiment.name}: cluster.replicas: none to simulate")
    return [SimulatedReplica.of(name, entries[name]) for name in ids or [next(iter(entries))]]


def _import_all() -> None:
    """Import what serving needs once, before the processes part."""
    import runtime.serve
    import runtime.simulated.api  # noqa: F401 - for the processes that part from this one


def _serve(
    replica: SimulatedReplica, port: int, speed: float, ends_with: int | None = None
) -> None:
    """Serve until told to stop, or until the other end of the pipe `ends_with` is closed."""
    from runtime.serve import run, serve
    from runtime.simulated.api import make_app
    from runtime.simulated.worker import SimulatedWorker
    from viisim.step_costs import step_time_of

    settings = replica.settings
    simulated = SimulatedWorker(
        replica.model,
        settings.scheduler_settings(),
        lambda slowdown: step_time_of(
            replica.profile, settings.max_num_seqs, slowdown * replica.slowdown
        ),
        speed,
        # Started again under a fault, it must not look well before the fault is upon it.
        start_s=0.25 if ends_with is not None else 0.0,
    )

    async def main() -> None:
        if ends_with is not None:
            asyncio.get_running_loop().add_reader(ends_with, os._exit, 0)
        await serve(make_app(simulated), "127.0.0.1", port)

    run(main())


def _outlive(children: Sequence[int]) -> None:
    """Return when all have ended; told to end, end them."""
    running = list(children)
    try:
        while running:
            os.waitpid(running[0], 0)
            del running[0]
    finally:
        for child in running:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
