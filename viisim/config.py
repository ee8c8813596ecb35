"""Experiments: one YAML file that both simulates and deploys.

Theory of operation. `load_experiment` reads the file, applies `--set` overrides and checks the
whole against the models below, which are also the schema for editors. What can be checked
without running is checked here: the policy is made once, profiles are read, engine settings
are compared with what vLLM would accept.

Paths are kept as they were written and are opened relative to the file's folder; what is not there
(of a `--set`, say) is opened from where one stands; a path that begins with `$VIISIM_SHARED/` is
looked up in the folder of shared traces. So `resolved` holds no path of this machine: an absolute
path is reduced to its file name there, and whoever runs the result again says where the file is
(`--set workload.path=FILE`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from policies.interface import Limits, Policy
from policies.predictor import History, LengthPredictor
from policies.registry import PolicySpecError, make_policy, policy_class
from viisim.cluster_config import (
    ClusterConfig,
    EngineConfig,
    LoadConfig,
    ReplicaConfig,
    SimulatedReplica,
    SpareConfig,
)
from viisim.documents import Strict, check, inside, nearest, override, read_yaml
from viisim.errors import InputError
from viisim.faults import ANY, Fault, FaultConfig, Thermal, schedule
from viisim.hardware import device_names, load_device
from viisim.power import PowerDraw, power_draw
from viisim.predictors import Noisy, Oracle
from viisim.profile import (
    Count,
    Share,
    Whole,
)
from viisim.worker_config import WorkerConfig
from viisim.workload.config import (
    MixedWorkload,
    ServeGenWorkload,
    SessionsWorkload,
    SyntheticWorkload,
    TraceWorkload,
    WorkloadConfig,
    build_workload,
    models_asked_for,
    scaled,
    workload_files,
)
from viisim.workload.config_parts import Located, Positive, shared_folder
from viisim.workload.interface import Workload

__all__ = [
    "ClusterConfig",
    "DeployConfig",
    "EngineConfig",
    "Experiment",
    "LimitsConfig",
    "LoadConfig",
    "MixedWorkload",
    "PolicyConfig",
    "PredictorConfig",
    "ReplicaConfig",
    "ServeGenWorkload",
    "SessionsWorkload",
    "SimulatedReplica",
    "Slo",
    "SloConfig",
    "SpareConfig",
    "SyntheticWorkload",
    "TraceWorkload",
    "WorkerConfig",
    "WorkloadConfig",
    "build_workload",
    "experiment_from",
    "load_experiment",
    "resolved",
    "scaled",
    "schema",
    "shared_folder",
    "workload_files",
]

_LIMITS = Limits()
_PREDICTOR_SAMPLE = 10_000


# --------------------------------------------------------------------------------------
# The policy


class PolicyConfig(Located):
    """`{name: least_loaded}` or `{class: "path/to/file.py:Class"}`, and its parameters."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    class_: str | None = Field(default=None, alias="class")

    @property
    def spec(self) -> dict[str, Any]:
        """The policy as it was written: its name or class, then its parameters."""
        key, value = ("class", self.class_) if self.name is None else ("name", self.name)
        return {key: value, **(self.model_extra or {})}

    def parameters(self) -> frozenset[str]:
        """The names that the policy's constructor takes."""
        return frozenset(inspect.signature(policy_class(self.spec, self._folder)).parameters)

    def set_objectives(self, slo: SloConfig) -> None:
        """The SLO is the operator's wish, and no secret: a policy with parameters of these names
        is made with it, unless the file gives others."""
        parameters = self.parameters()
        objectives: dict[str, Any] = _objectives(slo)
        objectives["classes"] = {
            name: found for name, own in slo.classes.items() if (found := _objectives(own))
        }
        for name, value in objectives.items():
            if value and name in parameters and self.model_extra is not None:
                self.model_extra.setdefault(name, value)

    def make(self) -> Policy:
        """A new policy. Raises InputError, beginning with the key that is wrong."""
        try:
            return make_policy(self.spec, self._folder)
        except PolicySpecError as error:
            raise InputError(f"{error.key}: {error}" if error.key else str(error)) from error

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if (self.name is None) == (self.class_ is None):
            raise ValueError("give either name or class")
        try:
            self.make()
        except InputError as error:
            cause = error.__cause__
            named = isinstance(cause, PolicySpecError) and cause.key
            raise inside(str(error)) if named else error from None
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return self.spec


# --------------------------------------------------------------------------------------
# The experiment


class Slo(Strict):
    """What a request must meet to count as goodput; None: any time will do."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    e2e_s: Positive | None = None


class SloConfig(Slo):
    """The experiment's objectives, with others for some traffic classes."""

    classes: Mapping[str, Slo] = Field(default_factory=dict)
    """By traffic class, each in the place of the general one."""


class PredictorConfig(Strict):
    """How well answer lengths are known in advance; results are labelled with it."""

    kind: Literal["none", "history", "noisy", "oracle"] = "none"
    rank_correlation: Annotated[float, Field(ge=0, le=1)] | None = None
    """Spearman's, between guess and truth; for kind `noisy` only."""

    @model_validator(mode="after")
    def _correlation_belongs_to_noisy(self) -> Self:
        if (self.kind == "noisy") != (self.rank_correlation is not None):
            raise inside("rank_correlation: give it with kind 'noisy', and only there")
        return self


_USUAL_ANSWER_TOKENS = 512


def _objectives(slo: Slo) -> dict[str, float]:
    """An SLO as times to the first token and per token. One that bounds the end only is taken as
    half of it until the first token, and the other half for a usual answer."""
    found = {"ttft_slo_s": slo.ttft_s, "tpot_slo_s": slo.tpot_s}
    if slo.e2e_s is not None and slo.ttft_s is None and slo.tpot_s is None:
        found["ttft_slo_s"] = slo.e2e_s / 2
        found["tpot_slo_s"] = slo.e2e_s / 2 / _USUAL_ANSWER_TOKENS
    return {name: value for name, value in found.items() if value is not None}


class LimitsConfig(Strict):
    """The operator's limits; see `policies.interface.Limits` for meanings and defaults."""

    max_queued: Whole | None = _LIMITS.max_queued
    queue_timeout_s: Positive | None = _LIMITS.queue_timeout_s
    eject_after: Count = _LIMITS.eject_after
    eject_s: Positive = _LIMITS.eject_s
    max_attempts: Count = _LIMITS.max_attempts

    def limits(self) -> Limits:
        """The same for the scheduler core."""
        return Limits(**self.model_dump())


Digest: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 of a key, in hexadecimal: `printf %s KEY | sha256sum`."""


class KeyConfig(Strict):
    """An API key and what its holder may ask for."""

    sha256: Digest
    tenant: str = ""
    traffic_class: str = ""
    priority: int = 0
    """Of requests that state none; smaller is more urgent."""
    best_priority: int = 0
    """The most urgent that a request may state."""
    max_requests: Count | None = None
    """In the proxy at once, queued or running."""
    rate_per_s: Positive | None = None
    """Requests in the long run."""
    burst: Count = 10
    """Requests at once after a pause, before the rate holds."""


class DeployConfig(Strict):
    """How the proxy serves."""

    listen: str = Field(default="127.0.0.1:8080", pattern=r"^.+:\d+$")
    """HOST:PORT."""
    keys: tuple[KeyConfig, ...] = Field(default=(), strict=False)
    """Without any, everybody is served as the same anonymous client."""
    admin_sha256: Digest | None = None
    """Of the key for `/admin/*`; without it there are no such routes."""
    max_body_bytes: Count = 16 * 2**20
    max_connections: Count = 4096
    head_timeout_s: Positive = 10.0
    """How long a client may take to send the head of a request."""
    body_timeout_s: Positive = 60.0
    """And its body."""
    no_worker_wait_s: Positive | None = None
    """How long a request waits while no worker of its model is ready; None: as long as in the
    queue."""
    tokenizer: str | None = None
    """The model's tokenizer.json; None: prompt tokens are estimated from characters."""
    max_restarts: Count = 8
    """Of a worker that does not stay up for five minutes; then it is given up."""
    drain_s: Positive = 60.0
    """How long running requests may take to end after SIGTERM."""
    power_cap_w: dict[int, Positive] = Field(default_factory=dict)
    """Of cards, by their index. Restored when the deployment ends."""
    max_temperature_c: Positive | None = None
    """A card hotter than this gets no more requests until it has cooled by 10 degrees."""
    default_output_tokens: Count = 1024
    """Expected of a request that states no limit."""
    pass_on: tuple[str, ...] = Field(default=("/tokenize", "/detokenize"), strict=False)
    """Other paths that workers answer."""


class Experiment(Strict):
    """One experiment: what is served by what, scheduled how, and judged by which figures."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    policy: PolicyConfig
    cluster: ClusterConfig
    workload: Annotated[WorkloadConfig, Field(discriminator="kind")]
    predictor: PredictorConfig = PredictorConfig()
    slo: SloConfig = SloConfig()
    seeds: tuple[Whole, ...] = Field(min_length=1, strict=False)
    warmup_fraction: Share = 0.1
    """Share of the requests, the earliest to arrive, that no figure counts."""
    max_sim_s: Positive | None = None
    """Simulated time at which a run ends, whatever is unfinished; None: when all is done."""
    limits: LimitsConfig = LimitsConfig()
    faults: tuple[FaultConfig, ...] = Field(default=(), strict=False)
    """What goes wrong, in a simulation and over simulated workers alike."""
    deploy: DeployConfig = DeployConfig()

    @field_validator("seeds")
    @classmethod
    def _seeds_are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        twice = [seed for seed, times in Counter(seeds).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]} comes twice; equal seeds give equal runs")
        return seeds

    @model_validator(mode="after")
    def _objectives_reach_the_policy(self) -> Self:
        self.policy.set_objectives(self.slo)
        return self

    @model_validator(mode="after")
    def _requests_ask_for_a_served_model(self) -> Self:
        models = self.cluster.models
        for key, asked in models_asked_for(self.workload):
            if asked is None and len(models) > 1:
                raise inside(f"workload.{key}: required with several models: {', '.join(models)}")
            if asked is not None and asked not in models:
                raise inside(f"workload.{key}: nothing serves {asked!r}. {nearest(asked, models)}")
        return self

    @model_validator(mode="after")
    def _faults_befall_known_replicas(self) -> Self:
        entries = dict(self.numbered_replicas())
        for index, fault in enumerate(self.faults):
            key = f"faults.{index}"
            if fault.replica not in (ANY, *entries):
                raise inside(f"{key}.replica: {nearest(fault.replica, (ANY, *entries))}")
            if isinstance(fault, Thermal):
                befallen = [entries[fault.replica]] if fault.replica != ANY else entries.values()
                for entry in befallen:
                    if entry.device not in device_names():
                        raise inside(
                            f"{key}.kind: nobody knows what device {entry.device!r} draws, so "
                            "not how hot it gets; use slow"
                        )
        return self

    def numbered_replicas(self) -> list[tuple[str, ReplicaConfig]]:
        """Every replica's id (`r0`, `r1`, ... in the order of the file, padded so that ids sort
        in that order) and its entry."""
        entries = [entry for entry in self.cluster.replicas for _ in range(entry.count)]
        width = len(str(len(entries) - 1))
        return [(f"r{index:0{width}}", entry) for index, entry in enumerate(entries)]

    def fault_schedule(self, seed: int) -> Iterator[Fault]:
        """Every single fault of a run, in order of time; without end where one has a rate."""
        draws = {name: _card_draw(entry) for name, entry in self.numbered_replicas()}
        return schedule(self.faults, draws, seed)

    @property
    def model(self) -> str:
        """The model that the workload's requests ask for, unless a part of it names another."""
        return self.workload.model or self.cluster.models[0]

    def build_workload(self) -> Workload:
        """The workload. Raises InputError, as `build_workload` does."""
        return build_workload(self.workload, self.model)

    def make_predictor(self, seed: int) -> LengthPredictor | None:
        """The length predictor for one seed; None without one."""
        match self.predictor.kind:
            case "history":
                return History()
            case "oracle":
                return Oracle()
            case "noisy":
                # Other draws of the same workload: the guesses' distribution, not the answers.
                sample = islice(self.build_workload().requests(seed + 1), _PREDICTOR_SAMPLE)
                lengths = [request.output_tokens for request in sample]
                return Noisy(self.predictor.rank_correlation or 0.0, lengths, seed)
        return None

    def simulated_replicas(self) -> list[SimulatedReplica]:
        """Every replica to simulate; those of kind `vllm` and `container` by their profile.

        Raises InputError for one of kind `url`: nothing is known of what runs there.
        """
        for index, entry in enumerate(self.cluster.replicas):
            if entry.worker.kind == "url":
                raise InputError(
                    f"{self.name}: cluster.replicas.{index}.worker.kind: 'url' is for deploying "
                    "only; to simulate, write kind: simulated and a device"
                )
        return [SimulatedReplica.of(name, entry) for name, entry in self.numbered_replicas()]


def _card_draw(entry: ReplicaConfig) -> PowerDraw | None:
    """What one card of the replica draws; None for a device that is not in the catalogue."""
    if entry.device not in device_names():
        return None
    return power_draw(load_device(entry.device), entry.load_profile().power_cap_w)


# --------------------------------------------------------------------------------------
# In and out


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file, after `key.path=value` overrides.

    Raises InputError, one line for the first mistake.
    """
    path = Path(path)
    return experiment_from(read_yaml(path), str(path), path.parent, overrides)


def experiment_from(
    data: Any, source: str, folder: Path = Path(), overrides: Sequence[str] = ()
) -> Experiment:
    """The experiment that `data` describes: a parsed file, or what `resolved` gave.

    `source` is named in errors; relative paths start in `folder`. Raises InputError.
    """
    data = deepcopy(data)
    for assignment in overrides:
        override(data, assignment)
    return check(Experiment, data, source, folder)


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The experiment with every default filled in, for JSON; `experiment_from` reads it.

    Engine settings are complete, so a later change of a profile's defaults shows. Absolute
    paths are reduced to the file name: a manifest is the same on every machine.
    """
    content: dict[str, Any] = experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    for entry, written in zip(
        experiment.cluster.replicas, content["cluster"]["replicas"], strict=True
    ):
        if entry.worker.kind != "url":
            written["engine"] = entry.engine.resolve(entry.load_profile()).model_dump()
            written["profile"] = _portable(entry.profile_name)
            written["worker"] = {"kind": "simulated"}  # as it is in a simulation
    if not experiment.faults:  # a manifest without them is as it was before there were any
        del content["faults"]
    workload = content["workload"]
    parts = [(part, "path") for part in (workload, *workload.get("parts", ()))]
    for part, key in (*parts, (content["policy"], "class")):
        if key in part:
            part[key] = _portable(part[key])
    return content


def _portable(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path


def schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **Experiment.model_json_schema(by_alias=True)}
