"""Which cards each replica takes, and which are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, islice

from runtime.cluster import Planned
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
        for replica_id, entry in experiment.numbered_replicas()
        if entry.worker.kind in STARTED
    }


def cards_beside(
    kept: Mapping[int, str], experiment: Experiment, replicas: Sequence[Planned]
) -> dict[str, tuple[int, ...]]:
    """The cards of replicas that are added beside workers which keep theirs: those that the file
    names, else the lowest that neither the file names nor a worker keeps.

    Raises InputError where the file names a card twice, or one that is kept.
    """
    by_file = cards_of(experiment)
    named = {card for one in experiment.cluster.replicas for card in one.worker.cards or ()}
    free = (card for card in count() if card not in named and card not in kept)
    found = {}
    for replica in replicas:
        if replica.entry.worker.kind not in STARTED:
            continue
        if replica.entry.worker.cards is None:
            found[replica.id] = tuple(islice(free, replica.entry.devices))
            continue
        found[replica.id] = by_file[replica.file_id]
        for card in found[replica.id]:
            if card in kept:
                raise InputError(
                    f"{experiment.name}: cluster.replicas: card {card} is wanted for another "
                    f"replica, but {kept[card]} runs there and stays; give another card"
                )
    return found


def spare_cards(experiment: Experiment) -> tuple[int, ...]:
    """The cards that `cluster.spare` stands for: the lowest that no replica has."""
    spare = experiment.cluster.spare
    taken = {card for cards in cards_of(experiment).values() for card in cards}
    free = (card for card in count() if card not in taken)
    return tuple(islice(free, 0 if spare is None else spare.count))


def _named_cards(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """The cards of replicas whose entry names them."""
    ids = (replica_id for replica_id, _ in experiment.numbered_replicas())
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
