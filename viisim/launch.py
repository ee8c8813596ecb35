"""What a policy's `Launch` comes to in a simulated cluster: a replica, and the time until it is
ready, or the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from policies.interface import Launch
from viisim.config import ClusterConfig, LoadConfig, ReplicaConfig, SimulatedReplica
from viisim.documents import nearest
from viisim.errors import InputError
from viisim.hardware import Device, load_device
from viisim.profile import load_profile, profile_names
from viisim.roofline import total_weights_bytes
from viisim.simulation import NS_PER_S, ReplicaSpec


@dataclass(frozen=True, slots=True)
class Launcher:
    """Makes replicas of the cluster's devices. That a device is free, the scheduler's core sees
    to; a model, that it fits, the profile or the catalogues."""

    cluster: ClusterConfig
    devices: Mapping[str, str]
    """What each device is, by its name."""
    make_spec: Callable[[SimulatedReplica, tuple[str, ...]], ReplicaSpec]
    made: dict[str, SimulatedReplica] = field(default_factory=dict)
    """What was launched so far, by id."""

    def __call__(self, action: Launch) -> tuple[ReplicaSpec, int] | str:
        """The replica and the nanoseconds until it is ready, or why there is none."""
        try:
            device = self._device(action)
            entry = self._entry(action, device)
            load_s = load_time_s(self.cluster.load, device, action.model, len(action.devices))
            replica = SimulatedReplica.of(action.replica_id, entry)
        except InputError as error:
            return str(error)
        self.made[replica.id] = replica
        return self.make_spec(replica, action.devices), round(load_s * NS_PER_S)

    def _device(self, action: Launch) -> Device:
        """What all of the named devices are."""
        for name in action.devices:
            if name not in self.devices:
                raise InputError(f"unknown device {name!r}. {nearest(name, self.devices)}")
        kinds = sorted({self.devices[name] for name in action.devices})
        if len(kinds) > 1:
            raise InputError(f"devices of several kinds: {', '.join(kinds)}; use equal ones")
        return load_device(kinds[0])

    def _entry(self, action: Launch, device: Device) -> ReplicaConfig:
        """The file's own entry for such replicas; else what is known of the pair."""
        size = len(action.devices)
        for entry in self.cluster.replicas:
            if (entry.model, entry.device, entry.devices) == (action.model, device.name, size):
                return entry.model_copy(update={"slowdown": 1.0})
        return known_entry(device.name, action.model, size)


def known_entry(device: str, model: str, tensor_parallel: int) -> ReplicaConfig:
    """A replica as it would be with nothing but this said of it.

    Raises InputError for a model that neither the profiles nor the catalogue know for so many
    devices, or that does not fit them.
    """
    own = f"{device}/{model}"
    if own in profile_names():
        measured = load_profile(own).tensor_parallel
        if measured != tensor_parallel:
            raise InputError(f"profile {own!r} is for {measured} devices, not {tensor_parallel}")
    entry = ReplicaConfig.model_construct(
        device=device, model=model, tensor_parallel=tensor_parallel
    )
    entry.load_profile()
    return entry


def load_time_s(load: LoadConfig, device: Device, model: str, devices: int) -> float:
    """Seconds until the weights of a model are on so many devices and its engine has started.

    Raises InputError for a model whose size the catalogue does not know.
    """
    weights = total_weights_bytes(re.sub(r"-tp\d+$", "", model))
    pcie = load.pcie_bytes_per_s or device.pcie.bytes_per_s
    return weights / load.disk_bytes_per_s + weights / devices / pcie + load.engine_start_s
