"""From an experiment's `cluster` block to running workers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.adapters import adapter
from runtime.http_worker import CardState, HttpWorker
from viisim.config import Experiment, ReplicaConfig, SimulatedReplica
from viisim.step_costs import step_costs_of


@dataclass(frozen=True, slots=True)
class Planned:
    """One replica of the file: its id, as the simulator gives it, and what it is."""

    id: str
    entry: ReplicaConfig
    url: str
    """Where it listens, or will."""
    file_id: str
    """What the file's numbering calls it; `id` is another where the file changed meanwhile."""

    @property
    def port(self) -> int:
        """Of a server that is started here."""
        return int(self.url.rpartition(":")[2])


def planned(experiment: Experiment) -> list[Planned]:
    """Every replica of the cluster, with a free port for each that is to be started."""
    entries = experiment.numbered_replicas()
    ports = free_ports(len(entries))
    return [
        Planned(name, entry, entry.worker.url or f"http://127.0.0.1:{port}", name)
        for (name, entry), port in zip(entries, ports, strict=True)
    ]


def client_of(
    replica: Planned,
    cards: Sequence[int] | None = None,
    card_state: CardState | None = None,
) -> HttpWorker:
    """The driver's side of the replica; `cards` are those it was given, None for one without."""
    entry = replica.entry
    server = adapter(entry.worker.server)
    if entry.device is None and entry.profile is None:
        return HttpWorker(
            replica.id,
            entry.model,
            replica.url,
            adapter=server,
            card_state=card_state,
            devices=_devices(replica, cards),
            forwards_priority=entry.engine.scheduling_policy == "priority",
        )
    simulated = SimulatedReplica.of(replica.id, entry)
    settings = simulated.settings.scheduler_settings()
    return HttpWorker(
        replica.id,
        entry.model,
        replica.url,
        devices=_devices(replica, cards),
        max_num_seqs=settings.max_num_seqs,
        kv_blocks=settings.usable_blocks,
        block_tokens=settings.block_tokens,
        step_costs=step_costs_of(simulated.profile, settings.max_num_batched_tokens),
        adapter=server,
        card_state=card_state,
        forwards_priority=settings.scheduling_policy == "priority",
    )


def _devices(replica: Planned, cards: Sequence[int] | None) -> tuple[str, ...]:
    """Cards by the names that policies launch on; simulated ones are nobody else's."""
    if cards is not None:
        return tuple(f"gpu{card}" for card in cards)
    return tuple(f"{replica.id}/gpu{number}" for number in range(replica.entry.devices))


def free_ports(number: int) -> list[int]:
    """Ports on the loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
