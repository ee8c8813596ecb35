"""What `viisim validate --live` is to show: a YAML file that names experiments.

The experiments are ordinary ones, which can be simulated and deployed by themselves. Here is said
which loads, policies and workloads they are measured with, and for how long.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from viisim.config import PolicyConfig
from viisim.documents import Strict, check, inside, override, read_yaml
from viisim.errors import InputError
from viisim.profile import Count, Positive
from viisim.workload.config import WorkloadConfig
from viisim.workload.config_parts import Located

ACCURACY, RANKING = "accuracy", "ranking"
"""Parts of a validation, and folders of their measurements."""


class FigureConfig(Strict):
    """What policies are judged by; less is better."""

    metric: Literal["ttft_s", "tpot_s", "e2e_s"]
    statistic: Literal["mean", "p50", "p90", "p99"] = "mean"
    traffic_class: str | None = None
    """Of this class's requests; None: of all."""


class PartConfig(Located):
    """One deployment of an experiment."""

    experiment: str
    overrides: tuple[str, ...] = Field(default=(), strict=False)
    """`key.path=value`: what is changed in the experiment."""

    @property
    def file(self) -> Path:
        """The experiment's, to open on this machine."""
        return self.located(self.experiment)


class AccuracyConfig(PartConfig):
    """One policy at several loads: how far are predicted figures from measured ones?"""

    loads: tuple[Positive, ...] = Field(min_length=1, strict=False)
    """Fractions of the measured capacity."""
    repetitions: Annotated[int, Field(ge=2)] = 3
    """Of one list of requests a load; how they differ is the noise floor."""
    capacity_runs: Count = 3
    """Of the closed loop that finds the capacity: before each repetition, until there were as many.
    The first decides the rates of the loads."""
    capacity_turns: Count = 5
    """Requests of each user in it: the first and the last are its beginning and its end."""
    run_s: Positive = 45.0
    """How long requests arrive, in each run."""


class RankedWorkload(Strict):
    """Traffic under which routing matters."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    load: Positive
    """Fraction of the capacity that the simulator finds, under the experiment's own policy."""
    judged_by: FigureConfig
    workload: Annotated[WorkloadConfig, Field(discriminator="kind")]


class RankingConfig(PartConfig):
    """Several policies under the same traffic: does the simulator rank them as reality does?"""

    policies: tuple[PolicyConfig, ...] = Field(min_length=2, strict=False)
    workloads: tuple[RankedWorkload, ...] = Field(min_length=1, strict=False)
    repetitions: Count = 3
    """Other requests in each, the same for every policy."""
    run_s: Positive = 45.0

    @field_validator("policies")
    @classmethod
    def _policies_are_named_once(
        cls, policies: tuple[PolicyConfig, ...]
    ) -> tuple[PolicyConfig, ...]:
        for policy in policies:
            if policy.name is None:
                raise ValueError(
                    "give policies by name: a deployment takes no code over the network"
                )
        twice = [label for label, n in Counter(map(label_of, policies)).items() if n > 1]
        if twice:
            raise ValueError(f"{twice[0]} comes twice")
        return policies

    @model_validator(mode="after")
    def _workloads_are_named_once(self) -> Self:
        names = [workload.name for workload in self.workloads]
        for name in names:
            if names.count(name) > 1:
                raise inside(f"workloads: {name!r} comes twice; give each a name of its own")
        return self


class ValidationConfig(Strict):
    """A whole validation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    accuracy: AccuracyConfig
    ranking: RankingConfig | None = None
    quick: tuple[str, ...] = Field(default=(), strict=False)
    """`key.path=value`: what `--quick` changes."""

    @property
    def parts(self) -> dict[str, PartConfig]:
        """By name, those that the file asks for."""
        found: dict[str, PartConfig] = {ACCURACY: self.accuracy}
        if self.ranking is not None:
            found[RANKING] = self.ranking
        return found


def label_of(policy: PolicyConfig) -> str:
    """A policy by its name, with its parameters where it has any."""
    parameters = [f"{key}={value}" for key, value in policy.spec.items() if key != "name"]
    return f"{policy.name}({', '.join(parameters)})" if parameters else str(policy.name)


def load_validation(path: Path, *, quick: bool = False) -> ValidationConfig:
    """The validation in a YAML file. Raises InputError, one line for the first mistake."""
    data = read_yaml(path)
    if quick:
        changes = check(ValidationConfig, data, str(path), path.parent).quick
        if not changes:
            raise InputError(f"{path}: quick: says nothing; list what --quick is to change")
        for change in changes:
            override(data, change)
    return check(ValidationConfig, data, str(path), path.parent)
