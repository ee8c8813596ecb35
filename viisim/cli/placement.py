"""`viisim deploy --plan`: what the memory model says of every replica on its cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from viisim.cli.terminal import plain_table, show
from viisim.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from viisim.architecture import ModelConfig
    from viisim.config import Experiment, ReplicaConfig
    from viisim.memory import MemoryUse
    from viisim.profile import EngineSettings

_GIB = 2**30


def print_placement(experiment: Experiment) -> None:
    """Print where each replica goes and what fits there. Raises InputError for cards that
    overlap."""
    content = placement_of(experiment)
    show(_table(content["replicas"]), *_remarks(content))


def placement_of(experiment: Experiment) -> dict[str, Any]:
    """The placement for JSON. Sizes are in GiB, per card; `at_once` is how many sequences of
    the longest context the cache holds; `fits` is null where nothing is known.

    Raises InputError for cards that overlap.
    """
    from runtime.cards.assignment import cards_of

    cards = cards_of(experiment)
    rows = [
        {
            "id": replica_id,
            "model": entry.model,
            "device": entry.device,
            "worker": entry.worker.kind,
            "cards": list(cards[replica_id]) if replica_id in cards else None,
            **_fit(entry),
        }
        for replica_id, entry in experiment.numbered_replicas()
    ]
    return {"name": experiment.name, "replicas": rows, "spare": _spare(experiment)}


# --------------------------------------------------------------------------------------
# One replica


def _fit(entry: ReplicaConfig) -> dict[str, Any]:
    """What the replica takes of each of its cards, and what is left for keys and values."""
    if entry.worker.kind == "url":
        return {"fits": None, "why": "runs elsewhere"}
    settings = entry.engine.resolve(entry.load_profile())
    use, why = _memory(entry, settings)
    blocks = use.blocks if use is not None and _is_counted(entry) else settings.num_kv_blocks
    room_tokens = max(0, blocks - 1) * settings.block_tokens
    if why is None and use is not None:
        why = _complaint(entry, settings, use, room_tokens)
    return {
        "weights_gib": None if use is None else use.weights_bytes / _GIB,
        "budget_gib": None if use is None else use.budget_bytes / _GIB,
        "kv_blocks": blocks,
        "kv_tokens": room_tokens,
        "max_model_len": settings.max_model_len,
        "at_once": room_tokens / settings.max_model_len,
        "fits": None if use is None else why is None,
        "why": why,
    }


def _is_counted(entry: ReplicaConfig) -> bool:
    """Whether the memory model says how many blocks there are, and neither file nor profile."""
    return entry.is_catalogued and entry.engine.num_kv_blocks is None


def _memory(entry: ReplicaConfig, settings: EngineSettings) -> tuple[MemoryUse | None, str | None]:
    """The budget of the fullest card; None, and why, for what the catalogues do not have."""
    from viisim.hardware import load_device
    from viisim.memory import DEFAULTS, memory_use

    try:
        if entry.device is None or entry.worker.without_cards:
            return None, "no cards to count for; blocks are the profile's"
        model, stored = _model(entry.model)
        counted = replace(
            DEFAULTS,
            block_tokens=settings.block_tokens,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
        )
        group = (entry.tensor_parallel, entry.stages)
        return memory_use(model, load_device(entry.device), stored, *group, counted), None
    except InputError as error:
        return None, f"{error}; blocks are the profile's"


def _model(name: str) -> tuple[ModelConfig, str]:
    """A served model's shape, and how its weights are stored."""
    from viisim.models import load_model, split_model_name

    stem, stored = (name, None) if name.endswith(".json") else split_model_name(name)
    model = load_model(stem)
    return model, stored or model.quantisation or "fp16"


def _complaint(
    entry: ReplicaConfig, settings: EngineSettings, use: MemoryUse, room_tokens: int
) -> str | None:
    """Why the server would not start; None where it would."""
    if use.blocks < 2:
        needed = use.weights_bytes + use.activation_bytes + use.non_torch_bytes
        return (
            f"{needed / _GIB:.2f} GiB a card before any keys and values, of "
            f"{use.budget_bytes / _GIB:.2f}; use more cards or smaller weights"
        )
    written = entry.engine.num_kv_blocks
    if written is not None and written > use.blocks:
        return f"engine.num_kv_blocks: {written}, but there is room for {use.blocks}; lower it"
    if settings.max_model_len > room_tokens:
        return (
            f"max_model_len: {settings.max_model_len} tokens, but the cache holds {room_tokens}; "
            "lower it, or use more cards"
        )
    return None


# --------------------------------------------------------------------------------------
# Spare cards


def _spare(experiment: Experiment) -> dict[str, Any] | None:
    """What the spare cards could hold of the models that the cluster serves."""
    from runtime.cards.assignment import spare_cards

    spare = experiment.cluster.spare
    if spare is None:
        return None
    return {
        "device": spare.device,
        "cards": list(spare_cards(experiment)),
        "holds": [_held(name, spare.device, spare.count) for name in experiment.cluster.models],
    }


def _held(name: str, device: str, most: int) -> dict[str, Any]:
    from viisim.hardware import load_device
    from viisim.placement import placement

    try:
        model, stored = _model(name)
        found = placement(model, load_device(device), stored, max_devices=most)
    except InputError as error:
        return {"model": name, "replicas": 0, "why": str(error)}
    size = found.tensor_parallel
    return {"model": name, "replicas": most // size, "tensor_parallel": size, "why": None}


# --------------------------------------------------------------------------------------
# For people


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("", "model", "cards", "weights", "blocks", "context", "at once", "fits")
    for column in table.columns[3:7]:
        column.justify = "right"
    for row in rows:
        cards = row["cards"]
        table.add_row(
            row["id"],
            row["model"],
            "-" if not cards else ",".join(map(str, cards)),
            *_figures(row),
            {None: "?", True: "yes", False: "no"}[row["fits"]],
        )
    return table


def _figures(row: dict[str, Any]) -> list[str]:
    if "kv_blocks" not in row:
        return ["-"] * 4
    weights = row["weights_gib"]
    return [
        "?" if weights is None else f"{weights:.2f}",
        f"{row['kv_blocks']:,}",
        f"{row['max_model_len']:,}",
        f"{row['at_once']:.1f}",
    ]


def _remarks(content: dict[str, Any]) -> Iterator[str]:
    """Below the table: reasons, what spare cards hold, and what the columns mean."""
    for row in content["replicas"]:
        if row["why"]:
            yield f"{row['id']}: {row['why']}"
    spare = content["spare"]
    if spare is not None:
        yield f"spare: {len(spare['cards'])} x {spare['device']}, " + "; ".join(
            f"{held['replicas']} x {held['model']}" + (f" ({held['why']})" if held["why"] else "")
            for held in spare["holds"]
        )
    yield (
        "\nweights: GiB on each card. blocks: of the KV cache. context: the longest sequence; at "
        "once: how many of those the cache holds."
    )
