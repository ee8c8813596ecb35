"""What runs a replica when an experiment is deployed, and what of that its author may choose.

Paths are taken as a shell would: relative ones start where `viisim deploy` is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from viisim.documents import Strict, inside, nearest
from viisim.profile import Positive, Whole

Kind: TypeAlias = Literal["simulated", "url", "vllm", "container"]
Texts: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]
Variable: TypeAlias = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Mount: TypeAlias = Annotated[str, Field(pattern=r"^(/[^:]*|[A-Za-z0-9][\w.-]*):/[^:]*(:(ro|rw))?$")]

START_LIMIT_S = 1800.0
GROUP_START_LIMIT_S = 2700.0
"""How long a server on one card, or on several, may take to load (VIIWork's limits for the same
cards; FACTS section 2)."""

ENGINE_FLAGS = {
    "block_tokens": "--block-size",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "enable_prefix_caching": "--enable-prefix-caching",
    "enable_chunked_prefill": "--enable-chunked-prefill",
    "scheduling_policy": "--scheduling-policy",
}
"""vLLM's flags for what every engine is told, by the key of `engine` in the file."""

WRITTEN_FLAGS = {
    "num_kv_blocks": "--num-gpu-blocks-override",
    "async_scheduling": "--async-scheduling",
    "long_prefill_token_threshold": "--long-prefill-token-threshold",
    "adaptive_long_prefill": "--long-prefill-token-threshold-adaptive",
    "reserve_full_prompt": "--scheduler-reserve-full-isl",
    "watermark": "--watermark",
}
"""Those for what an engine is told only where the file says it: the first overrides what vLLM
measures, and the forks for older cards do not know them all."""

_KEYS: dict[str, tuple[str, ...]] = {
    "simulated": (),
    "url": ("url", "server"),
    "vllm": ("weights", "command", "args", "env", "cards", "start_limit_s", "log_dir"),
}
_KEYS["container"] = (*_KEYS["vllm"], "image", "engine", "mounts")

_KEY_OF_FLAG = {
    **{flag: f"engine.{key}" for key, flag in (ENGINE_FLAGS | WRITTEN_FLAGS).items()},
    "--model": "worker.weights",
    "--served-model-name": "model",
    "--tensor-parallel-size": "tensor_parallel",
    "-tp": "tensor_parallel",
    "--pipeline-parallel-size": "stages",
    "-pp": "stages",
}
_OURS = ("--host", "--port")
_VISIBLE = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_PLACEHOLDERS = ("index", "port", "replica")


class WorkerConfig(Strict):
    """What runs the replica when deployed. Every key but `kind` belongs to some kinds only."""

    kind: Kind = "simulated"
    """simulated: a model of the engine in real time; url: a server that runs already; vllm: a
    process that is started here; container: the same in an image."""
    url: str | None = Field(default=None, pattern="^https?://")
    """Where a running server listens; for kind `url` only."""
    server: Literal["vllm", "tgi", "mlc", "llama.cpp"] = "vllm"
    """What listens there; for kind `url` only."""

    weights: str | None = Field(default=None, min_length=1)
    """A folder, or an id on the Hugging Face hub, that the server loads. None: the id in the
    catalogue of models if the name is one of its own, else the name itself."""
    command: Texts = ("vllm", "serve")
    """How vLLM is started; weights and flags follow. `{index}`, `{port}` and `{replica}` stand for
    the replica's number, port and id, here and in `args` and `env`. Empty for an image whose
    entry point is `vllm serve`."""
    args: Texts = ()
    """More flags of vLLM; they come last, and so they win."""
    env: Mapping[Variable, str] = Field(default_factory=dict)
    """More environment variables; they win over those that the cards need."""
    cards: Annotated[tuple[Whole, ...], Field(strict=False)] | None = None
    """Indices as HIP counts them, for all replicas of the entry: each takes its share, in order.
    None: the lowest that no other entry names. Empty: the replica runs without cards."""
    start_limit_s: Positive | None = None
    """How long until it answers; None: 1800, or 2700 for several cards."""
    log_dir: str | None = Field(default=None, min_length=1)
    """Folder for the server's output, one file a replica; None: `logs` in the deployment's own."""

    image: str | None = Field(default=None, min_length=1)
    """What the container is made from; for kind `container`, and required there."""
    engine: Literal["docker", "podman"] = "docker"
    """What runs the container."""
    mounts: Annotated[tuple[Mount, ...], Field(strict=False)] = ()
    """`/HOST/FOLDER:/FOLDER[:ro]` or `VOLUME:/FOLDER`; a cache of weights, most of all."""

    def start_limit(self, devices: int) -> float:
        """Seconds that a replica on so many devices may take until it answers."""
        usual = GROUP_START_LIMIT_S if devices > 1 else START_LIMIT_S
        return self.start_limit_s or usual

    @property
    def without_cards(self) -> bool:
        """Whether the CPU of the machine computes, as the entry says."""
        return self.cards == ()

    @field_validator("cards")
    @classmethod
    def _cards_are_distinct(cls, cards: tuple[int, ...] | None) -> tuple[int, ...] | None:
        for card in cards or ():
            if (cards or ()).count(card) > 1:
                raise ValueError(f"card {card} comes twice; give it once")
        return cards

    @field_validator("args")
    @classmethod
    def _args_have_no_key_of_their_own(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for written in args:
            flag = written.partition("=")[0].replace("_", "-")
            key = _KEY_OF_FLAG.get(flag.replace("--no-", "--"))
            if key is not None:
                raise ValueError(f"{flag} belongs to a key of the file, {key}; set that")
            if flag in _OURS:
                raise ValueError(f"{flag} is chosen by viisim deploy; leave it out")
        return args

    @field_validator("env")
    @classmethod
    def _env_leaves_cards_to_their_key(cls, env: Mapping[str, str]) -> Mapping[str, str]:
        for name in _VISIBLE:
            if name in env:
                raise ValueError(f"{name} follows from the cards; give worker.cards")
        return env

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> Self:
        if self.kind == "url" and self.url is None:
            raise inside("url: required for kind 'url', but missing")
        if self.kind == "container" and self.image is None:
            raise inside("image: required for kind 'container', but missing")
        if self.kind == "vllm" and not self.command:
            raise inside("command: empty; give what starts vLLM, or leave the key out")
        for key in type(self).model_fields:
            if key in self.model_fields_set - {"kind", *_KEYS[self.kind]}:
                kinds = " or ".join(kind for kind, keys in _KEYS.items() if key in keys)
                raise inside(f"{key}: a worker of kind {self.kind!r} has none; write kind: {kinds}")
        return self

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> Self:
        parts = {"command": self.command, "args": self.args, "env": self.env.values()}
        for key, texts in parts.items():
            for word in _placeholders(texts):
                if word not in _PLACEHOLDERS:
                    raise inside(
                        f"{key}: unknown placeholder {{{word}}}. {nearest(word, _PLACEHOLDERS)}"
                    )
        return self

    @model_serializer(mode="wrap")
    def _only_keys_of_the_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {k: value for k, value in content.items() if k in ("kind", *_KEYS[self.kind])}


def _placeholders(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in re.findall(r"\{(\w+)\}", text)]
