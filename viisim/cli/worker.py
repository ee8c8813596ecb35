"""`viisim worker`: simulated inference servers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Serve simulated replicas behind the HTTP API of a vLLM server, each as its own process.

    viisim worker experiments/least_loaded.yaml --port 8001
    curl -N 127.0.0.1:8001/v1/completions -d '{"prompt": "hello", "max_tokens": 8, "stream": true}'

    Tokens come at the profile's step times. `POST /fault {"kind": "slow", "factor": 3}` has
    something go wrong: crash, hang, slow, refuse, cut, error; none ends it.
    """
    from viisim.config import load_experiment

    if not speed > 0:
        raise InputError(f"--speed {speed}: give a number above 0")
    chosen = _chosen(load_experiment(file, set_ or []), replica or [])
    ports = port or [8000]
    if len(ports) != len(chosen):
        raise InputError(f"--port: {len(chosen)} replicas need as many ports, not {len(ports)}")
    if len(chosen) == 1:
        _serve(chosen[0], ports[0], speed, until_eof)
        return
    _import_all()
    children: list[int] = []
    for one, its_port in zip(chosen, ports, strict=True):
        child = os.fork()
        if not child:
            _serve(one, its_port, speed, until_eof)
            return
        children.append(child)
    _outlive(children)


def _chosen(experiment: Experiment, ids: Sequence[str]) -> list[SimulatedReplica]:
    from runtime.cluster import numbered
    from viisim.config import SimulatedReplica

    entries = {name: entry for name, entry in numbered(experiment) if entry.worker.kind != "url"}
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
    import runtime.simulated_api  # noqa: F401 - for the processes that part from this one


def _serve(replica: SimulatedReplica, port: int, speed: float, until_eof: bool) -> None:
    from runtime.serve import run, serve
    from runtime.simulated_api import make_app
    from runtime.simulated_worker import SimulatedWorker
    from viisim.step_costs import step_time_of

    settings = replica.settings
    simulated = SimulatedWorker(
        replica.model,
        settings.scheduler_settings(),
        lambda slowdown: step_time_of(
            replica.profile, settings.max_num_seqs, slowdown * replica.slowdown
        ),
        speed,
    )

    async def main() -> None:
        if until_eof:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_at_eof)
        await serve(make_app(simulated), "127.0.0.1", port)

    run(main())


def _end_at_eof() -> None:
    """End with the process at the other end of standard input, however that ended."""
    if not os.read(sys.stdin.fileno(), 4096):
        os._exit(0)


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
