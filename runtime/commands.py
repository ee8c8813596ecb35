"""From replicas to command lines: how the vLLM server of each is started.

Nothing is started here. Every flag and variable comes with its source, which `viisim deploy
--dry-run` prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.cluster import Planned
from runtime.vllm_flags import Given, architecture_of, card_variables, is_nvidia, serve_flags
from viisim.config import ReplicaConfig
from viisim.errors import InputError
from viisim.models import model_entry, model_names, split_model_name

DEPLOYMENT_VARIABLE = "VIISIM_DEPLOYMENT"
DEPLOYMENT_LABEL = "viisim.deployment"
"""What says whose a process or a container is."""

STOP_S = 30
"""How long a container may take to end before it is killed."""

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+) config\.json")
_UNQUANTISED = (None, "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """How a replica's server is started."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """On top of the environment that is inherited."""
    stop_argv: tuple[str, ...] | None
    """Ends a container, whose processes are no children of `argv`'s; None for a process."""
    why: Mapping[str, str]
    """Where each flag or variable comes from, in the order of the command."""


# --------------------------------------------------------------------------------------
# One replica


def command_of(replica: Planned, cards: Sequence[int], deployment: str) -> WorkerCommand:
    """The command for a replica of kind `vllm` or `container`, on `cards`
    (see `runtime.cards.assignment`).

    `deployment` marks what belongs together: the process finds it in its environment, the
    container in its label. It is made of letters, digits, dots, hyphens and underscores.
    """
    worker = replica.entry.worker
    variables, flags = _variables(replica, cards), serve_flags(replica, cards)
    server = (
        *_filled(worker.command, replica),
        weights_of(replica.entry),
        *_written_out(flags),
        *_filled(worker.args, replica),
    )
    mark = Given(DEPLOYMENT_VARIABLE, deployment, "viisim deploy: finds what it left behind")
    if worker.kind == "vllm":
        known = (*variables, mark)
        return WorkerCommand(server, _values(known), None, _sources(replica, known, flags))
    name = _container_name(replica, deployment)
    options = _container_options(replica, cards, name, deployment)
    passed = [part for given in variables for part in ("-e", f"{given.name}={given.value}")]
    mounted = [part for mount in worker.mounts for part in ("-v", mount)]
    argv = (
        worker.engine,
        "run",
        *_written_out(options),
        *passed,
        *mounted,
        str(worker.image),
        *server,
    )
    stop_argv = (worker.engine, "stop", "-t", str(STOP_S), name)
    why = _sources(replica, (*options, *variables, mark), flags)
    return WorkerCommand(argv, _values([mark]), stop_argv, why)


def weights_of(entry: ReplicaConfig) -> str:
    """What the server loads; see `WorkerConfig.weights`."""
    if entry.worker.weights is not None:
        return entry.worker.weights
    stem, stored = split_model_name(entry.model)
    known = stored in _UNQUANTISED and stem in model_names()
    found = _HUB_ID.match(model_entry(stem).source) if known else None
    return entry.model if found is None else found[1]


# --------------------------------------------------------------------------------------
# Environment


def _variables(replica: Planned, cards: Sequence[int]) -> list[Given]:
    """What the cards need, then what the file says, which wins."""
    needed = list(card_variables(replica, cards))
    written = replica.entry.worker.env
    values = _filled(tuple(written.values()), replica)
    return [given for given in needed if given.name not in written] + [
        Given(name, value, "worker.env") for name, value in zip(written, values, strict=True)
    ]


# --------------------------------------------------------------------------------------
# Containers


def _container_options(
    replica: Planned, cards: Sequence[int], name: str, deployment: str
) -> list[Given]:
    """Access to the cards as ROCm's documentation and the gfx906 images' have it."""
    needed = "ROCm in containers (vllm-gfx906-mobydick, README)"
    options = [
        Given("--rm", None, "nothing is left behind"),
        Given("--name", name, "viisim deploy: ends it by this name"),
        Given("--label", f"{DEPLOYMENT_LABEL}={deployment}", "viisim deploy: finds its own"),
        Given("--network", "host", "the server listens on the loopback"),
        Given("--ipc=host", None, needed),
    ]
    if not cards:
        return options
    if is_nvidia(architecture_of(replica.entry, cards)):
        raise InputError(
            f"{replica.id}: worker.kind: containers are for ROCm; for {replica.entry.device} write "
            "kind: vllm, or start it yourself and give kind: url"
        )
    return [
        *options,
        Given("--device=/dev/kfd", None, needed),
        Given("--device=/dev/dri", None, needed),
        Given("--group-add", "video", needed),
    ]


def _container_name(replica: Planned, deployment: str) -> str:
    """Of the deployment too: two of them on one machine must not end each other's."""
    return re.sub(r"[^\w.-]", "-", f"viisim-{deployment}-{replica.id}")


# --------------------------------------------------------------------------------------
# Writing it down


def _filled(texts: Sequence[str], replica: Planned) -> tuple[str, ...]:
    """With the placeholders filled in; other braces, as of JSON, stay."""
    number = re.search(r"\d+$", replica.id)
    words = {
        "{index}": str(int(number[0])) if number else "0",
        "{port}": replica.url.rpartition(":")[2],
        "{replica}": replica.id,
    }
    pattern = re.compile("|".join(map(re.escape, words)))
    return tuple(pattern.sub(lambda found: words[found[0]], text) for text in texts)


def _written_out(given: Sequence[Given]) -> Iterator[str]:
    """Flags and values in turn."""
    for flag in given:
        yield flag.name
        if flag.value is not None:
            yield flag.value


def _values(given: Sequence[Given]) -> dict[str, str]:
    return {one.name: one.value or "" for one in given}


def _sources(replica: Planned, before: Sequence[Given], flags: Sequence[Given]) -> dict[str, str]:
    worker, weights = replica.entry.worker, weights_of(replica.entry)
    why = {one.name: one.why for one in before}
    if worker.mounts:
        why["-v"] = "worker.mounts"
    if worker.weights is not None:
        why[weights] = "worker.weights"
    else:
        is_named = weights == replica.entry.model
        why[weights] = (
            "model, for want of worker.weights" if is_named else "model: its catalogue id"
        )
    why |= {one.name: one.why for one in flags}
    return why | {arg: "worker.args" for arg in worker.args if arg.startswith("-")}
