"""`viisim deploy`: the experiment's policy behind the OpenAI API."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.run import Overrides
from viisim.errors import InputError

if TYPE_CHECKING:
    from policies.core import SchedulerCore
    from policies.interface import Action, Event
    from policies.journal import Segment
    from viisim.config import Experiment
    from viisim.journal import JournalWriter

log = logging.getLogger(__name__)


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (YAML).")],
    set_: Overrides = None,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every decision there, for `viisim replay`."),
    ] = None,
    journal_mib: Annotated[
        int, typer.Option(min=1, help="Size of a journal file; then the next one begins.")
    ] = 64,
    journal_files: Annotated[int, typer.Option(min=2, help="The latest so many are kept.")] = 16,
    speed: Annotated[
        float, typer.Option(help="Of simulated workers; 10: ten seconds pass in one.")
    ] = 1.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve a public address without keys.")
    ] = False,
) -> None:
    """Serve the OpenAI API with the policy of an experiment, over its replicas.

    viisim deploy experiments/least_loaded.yaml
    curl -N 127.0.0.1:8080/v1/completions -H 'content-type: application/json' \\
      -d '{"model": "qwen3-vl-8b-awq", "prompt": "hello", "max_tokens": 8, "stream": true}'

    Simulated replicas are started here; those of kind `url` are taken as they run. Ctrl-C ends it.
    """
    from policies.core import SchedulerCore
    from policies.journal import Segment
    from runtime.access import Client
    from runtime.app import make_app
    from runtime.cluster import SimulatedProcesses, client_of, planned, wait_until_healthy
    from runtime.proxy import Limits
    from runtime.serve import run, serve
    from viisim.config import load_experiment, resolved

    overrides = set_ or []
    experiment = load_experiment(file, overrides)
    host, _, port = experiment.deploy.listen.rpartition(":")
    _require_keys_in_public(experiment, host, insecure)
    replicas = planned(experiment)
    processes = SimulatedProcesses()

    async def main(core: SchedulerCore, writer: RollingJournal | None) -> None:
        workers = [client_of(replica) for replica in replicas]
        for worker, replica in zip(workers, replicas, strict=True):
            limit_s = 10.0 if replica.entry.worker.kind == "url" else 60.0
            await wait_until_healthy(worker, limit_s, processes.have_ended)
        settings = experiment.deploy
        app = make_app(
            core,
            workers,
            limits=Limits(
                settings.max_body_bytes,
                settings.default_output_tokens,
                settings.body_timeout_s,
                settings.no_worker_wait_s,
            ),
            token_count=token_count,
            clients=[
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
            ],
            admin_sha256=settings.admin_sha256,
            scrape_s=experiment.cluster.scrape_s,
            journal=writer,
            passed_on=settings.pass_on,
        )
        await serve(
            app,
            host,
            int(port),
            head_timeout_s=settings.head_timeout_s,
            max_connections=settings.max_connections,
            on_ready=lambda: typer.echo(f"serving http://{host}:{port}/v1 (Ctrl-C ends it)"),
        )

    with ExitStack() as stack:
        stack.callback(processes.stop)
        simulated = [replica for replica in replicas if replica.entry.worker.kind == "simulated"]
        processes.start(file, overrides, simulated, speed)
        limits = experiment.limits.limits()
        core = SchedulerCore(experiment.policy.make(), limits=limits)
        writer = None
        if journal is not None:
            head = Segment(resolved(experiment)["policy"], limits=limits)
            writer = RollingJournal(journal, head, core, journal_mib * 2**20, journal_files)
            stack.callback(writer.close)
        run(main(core, writer))


def _require_keys_in_public(experiment: Experiment, host: str, insecure: bool) -> None:
    """Who can reach a public address without a key can spend the cards."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or experiment.deploy.keys or insecure):
        raise InputError(
            f"deploy.listen: {experiment.deploy.listen} can be reached from other machines; give "
            "deploy.keys, or --insecure if everybody may use it"
        )
