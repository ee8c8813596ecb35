"""Which cards each replica takes, and which are left."""

from __future__ import annotations

from itertools import count, islice

from runtime.cluster import numbered
from viisim.config import Experiment
from viisim.errors import InputError

STARTED = ("vllm", "container")
"""Kinds of workers that take cards of this machine."""


def cards_of(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """The cards of every replica that is started here, by its id, as HIP counts them.

    Entries that name none get the lowest that no entry names. Raises InputError where an entry
    names too few or too many, or two replicas the same.
    """
    shares = _named_cards(experiment)
    taken: dict[int, str] = {}
    for replica_id, cards in shares.items():
        for card in cards:
            if card in taken:
                raise InputError(
                    f"{experiment.name}: cluster.replicas: card {card} is given to both "
                    f"{taken[card]} and {replica_id}; give each card to one replica"
                )
            taken[card] = replica_id
    free = (card for card in count() if card not in taken)
    return {
        replica_id: tuple(islice(free, entry.devices))
        if entry.worker.cards is None
        else shares[replica_id]
        for replica_id, entry in numbered(experiment)
        if entry.worker.kind in STARTED
    }


def check_cards(experiment: Experiment) -> None:
    """Raises InputError, naming both replicas, where two would take the same card."""
    cards_of(experiment)


def spare_cards(experiment: Experiment) -> tuple[int, ...]:
    """The cards that `cluster.spare` stands for: the lowest that no replica has."""
    spare = experiment.cluster.spare
    taken = {card for cards in cards_of(experiment).values() for card in cards}
    free = (card for card in count() if card not in taken)
    return tuple(islice(free, 0 if spare is None else spare.count))


def _named_cards(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """The cards of replicas whose entry names them."""
    ids = (replica_id for replica_id, _ in numbered(experiment))
    shares: dict[str, tuple[int, ...]] = {}
    for index, entry in enumerate(experiment.cluster.replicas):
        own, cards, size = list(islice(ids, entry.count)), entry.worker.cards, entry.devices
        if cards is None:
            continue
        if cards and len(cards) != entry.count * size:
            raise InputError(
                f"{experiment.name}: cluster.replicas.{index}.worker.cards: {len(cards)} for "
                f"{entry.count} x {size}; give {entry.count * size}, or leave the key out"
            )
        shares |= {name: cards[n * size : (n + 1) * size] for n, name in enumerate(own)}
    return shares
