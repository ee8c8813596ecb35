"""`viisim deploy`: the experiment's policy behind the OpenAI API."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.run import Overrides
from viisim.errors import InputError

if TYPE_CHECKING:
    from runtime.processes import Home
    from viisim.config import Experiment

MAX_PORT = 2**16 - 1


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (YAML).")],
    set_: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what fits on which card, and start nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the workers' commands, and start nothing.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every decision there, for `viisim replay`."),
    ] = None,
    journal_mib: Annotated[
        int, typer.Option(min=1, help="Size of a journal file; then the next one begins.")
    ] = 64,
    journal_files: Annotated[int, typer.Option(min=2, help="The latest so many are kept.")] = 16,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Workers' logs, and what must outlast a crash. "
            "[dim]\\[default: ~/.local/state/viisim/NAME][/dim]",
            show_default=False,
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="Of simulated workers; 10: ten seconds pass in one.")
    ] = 1.0,
    faults: Annotated[
        bool, typer.Option("--faults", help="Let the file's faults happen to simulated workers.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve a public address without keys.")
    ] = False,
) -> None:
    """Serve the OpenAI API with the policy of an experiment, over its replicas.

    viisim deploy experiments/least_loaded.yaml
    curl -N 127.0.0.1:8080/v1/completions -H 'content-type: application/json' \\
      -d '{"model": "qwen3-vl-8b-awq", "prompt": "hello", "max_tokens": 8, "stream": true}'

    Simulated, vllm and container replicas are started here and restarted when they end; those of
    kind `url` are taken as they run. SIGHUP has the file read again: workers are added, drained
    and ended, the policy changes, and no request is lost. Ctrl-C ends it, once what is under way
    has been answered.
    """
    from policies.core import SchedulerCore
    from policies.journal import Segment
    from runtime.deployment import Deployment, limits_at
    from runtime.processes import Home
    from runtime.rolling_journal import RollingJournal
    from runtime.serve import run
    from viisim.config import load_experiment, resolved

    if not 0 < speed < math.inf:
        raise InputError(f"--speed {speed}: give a number above 0")
    overrides = set_ or []
    experiment = load_experiment(file, overrides)
    if plan or dry_run:
        _show(experiment, Home(state or _default_state(experiment)), plan, dry_run)
        return
    _check_address(experiment, insecure)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with ExitStack() as stack:
        home = stack.enter_context(Home(state or _default_state(experiment)))
        for pid in home.end_leftovers():
            typer.echo(f"ended process {pid}, which an earlier start left behind")
        limits = limits_at(experiment, speed)
        core = SchedulerCore(experiment.policy.make(), limits=limits, folder=file.parent)
        writer = None
        if journal is not None:
            head = Segment(resolved(experiment)["policy"], limits=limits)
            writer = RollingJournal(journal, head, core, journal_mib * 2**20, journal_files)
            stack.callback(writer.close)
        deployment = Deployment(
            file,
            overrides,
            home,
            core,
            journal=writer,
            speed=speed,
            with_faults=faults,
            say=typer.echo,
        )
        run(deployment.serve())


def _show(experiment: Experiment, home: Home, plan: bool, dry_run: bool) -> None:
    from runtime.cluster import planned
    from viisim.cli.dry_run import print_commands
    from viisim.cli.placement import print_placement

    if plan:
        print_placement(experiment)
    if dry_run:
        print_commands(experiment, planned(experiment), home.mark)


def _default_state(experiment: Experiment) -> Path:
    """By the XDG base directory specification."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "viisim" / experiment.name


def _check_address(experiment: Experiment, insecure: bool) -> None:
    """Raises InputError for a public address without keys, too: who can reach it could spend the
    cards."""
    host, _, port = experiment.deploy.listen.rpartition(":")
    if int(port) > MAX_PORT:
        raise InputError(f"deploy.listen: {port} is no port; give one up to {MAX_PORT}")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or experiment.deploy.keys or insecure):
        raise InputError(
            f"deploy.listen: {experiment.deploy.listen} can be reached from other machines; give "
            "deploy.keys, or --insecure if everybody may use it"
        )
