"""The cluster of an experiment: its replicas, their engines, and what else there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from viisim.documents import Strict, inside
from viisim.errors import InputError
from viisim.hardware import load_device
from viisim.interconnect import InterconnectConfig, interconnect_of
from viisim.profile import (
    Count,
    EngineSettings,
    Profile,
    SchedulingPolicy,
    Share,
    Whole,
    load_profile,
    profile_names,
)
from viisim.roofline import roofline_profile
from viisim.worker_config import WorkerConfig
from viisim.workload.config_parts import Located, Positive


class EngineConfig(Strict):
    """Engine settings that differ from the profile's; see `EngineSettings` for meanings."""

    num_kv_blocks: Annotated[int, Field(ge=2)] | None = None
    block_tokens: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_model_len: Count | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    scheduling_policy: SchedulingPolicy | None = None
    async_scheduling: bool | None = None
    long_prefill_token_threshold: Whole | None = None
    adaptive_long_prefill: bool | None = None
    reserve_full_prompt: bool | None = None
    watermark: Share | None = None
    coalesce: bool | None = None

    def resolve(self, profile: Profile) -> EngineSettings:
        """All settings: these, and the profile's for the rest.

        Raises InputError, beginning with the key, for a combination that vLLM would refuse.
        """
        known = {name: getattr(profile.engine, name) for name in EngineSettings.model_fields}
        try:
            return EngineSettings(**{**known, **self.model_dump(exclude_none=True)})
        except ValidationError as error:
            raise InputError(error.errors()[0]["msg"]) from None


class ReplicaConfig(Located):
    """`count` equal replicas."""

    count: Count = 1
    device: str | None = None
    model: str
    tensor_parallel: Count = 1
    stages: Count = 1
    """Of a layer split: so many tensor-parallel groups one behind the other. Only for a profile
    computed from the catalogues."""
    interconnect: InterconnectConfig | None = None
    """Between the devices of one replica; None: as the catalogue has it. A measured profile
    contains its own."""
    profile: str | None = None
    """A profile's name, or a YAML file; `device/model` if absent."""
    slowdown: Positive = 1.0
    """Every step takes so many times what the profile says, as on a card that throttles. Nobody
    tells the policy."""
    engine: EngineConfig = EngineConfig()
    worker: WorkerConfig = WorkerConfig()

    @property
    def profile_name(self) -> str:
        """The profile this entry is simulated with."""
        return self.profile or f"{self.device}/{self.model}"

    @property
    def devices(self) -> int:
        """How many devices one replica takes."""
        return self.tensor_parallel * self.stages

    def load_profile(self) -> Profile:
        """The measured profile; where there is none and none is named, an uncalibrated one from
        the catalogues of devices and models. Raises InputError for what neither knows."""
        if self.is_catalogued:
            return self._roofline()
        return load_profile(self.profile_name, self._folder)

    @property
    def is_catalogued(self) -> bool:
        """Whether the profile is computed, because nobody measured the pair."""
        own = f"{self.device}/{self.model}"
        return self.profile in (None, own) and own not in profile_names()

    def _roofline(self) -> Profile:
        try:
            device = load_device(str(self.device))
            return roofline_profile(
                device.name,
                self.model,
                tensor_parallel=self.tensor_parallel,
                stages=self.stages,
                interconnect=interconnect_of(device, self.interconnect),
            )
        except InputError as error:
            raise InputError(
                f"no profile {self.profile_name!r} ships, and without one: {error}"
            ) from None

    @model_validator(mode="after")
    def _can_be_simulated(self) -> Self:
        if self.worker.kind == "url":
            return self
        if self.device is None and self.profile is None:
            raise inside("device: required, but missing (only a worker of kind url needs none)")
        profile = self.load_profile()
        if profile.tensor_parallel != self.tensor_parallel:
            raise inside(
                f"tensor_parallel: profile {self.profile_name!r} is for "
                f"{profile.tensor_parallel}, not {self.tensor_parallel}; name another profile"
            )
        if not self.is_catalogued and (self.stages > 1 or self.interconnect is not None):
            key = "stages" if self.stages > 1 else "interconnect"
            raise inside(
                f"{key}: profile {self.profile_name!r} was measured and contains its own "
                "communication; leave the key out"
            )
        try:
            self.engine.resolve(profile)
        except InputError as error:
            raise inside(f"engine.{error}") from None
        return self


class SpareConfig(Strict):
    """Devices that no replica uses at the start: a policy may `Launch` on them."""

    count: Count
    device: str

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str) -> str:
        try:
            return load_device(device).name
        except InputError as error:
            raise ValueError(str(error)) from None


class LoadConfig(Strict):
    """What it takes until a launched replica is ready: its weights from disk, then, by all its
    devices at once, over PCIe; then the engine starts."""

    disk_bytes_per_s: Positive = 2e9
    pcie_bytes_per_s: Positive | None = None
    """To each device; None: of its slot in the catalogue."""
    engine_start_s: Annotated[float, Field(ge=0)] = 0.0
    """Graph capture, profiling and what else an engine does before it serves."""


class ClusterConfig(Strict):
    """The replicas, what else there is, and how gauges are read."""

    scrape_s: Positive = 1.0
    """Time between two readings of a replica's gauges."""
    scrape_delay_s: Annotated[float, Field(ge=0)] = 0.05
    """How late a reading arrives."""
    replicas: tuple[ReplicaConfig, ...] = Field(min_length=1, strict=False)
    spare: SpareConfig | None = None
    load: LoadConfig = LoadConfig()

    @property
    def models(self) -> list[str]:
        """The models served, sorted."""
        return sorted({entry.model for entry in self.replicas})


@dataclass(frozen=True, slots=True)
class SimulatedReplica:
    """One replica to simulate."""

    id: str
    """`r0`, `r1`, ... in the order of the file, padded so that ids sort in that order."""
    model: str
    device: str
    tensor_parallel: int
    profile: Profile
    slowdown: float
    settings: EngineSettings
    stages: int = 1

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.tensor_parallel * self.stages

    @classmethod
    def of(cls, replica_id: str, entry: ReplicaConfig) -> Self:
        """One replica of an entry, with its profile read. Raises InputError if there is none."""
        profile = entry.load_profile()
        return cls(
            id=replica_id,
            model=entry.model,
            device=entry.device or profile.device,
            tensor_parallel=entry.tensor_parallel,
            profile=profile,
            slowdown=entry.slowdown,
            settings=entry.engine.resolve(profile),
            stages=entry.stages,
        )
