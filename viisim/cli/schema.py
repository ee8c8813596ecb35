"""`viisim schema`: the shape of an experiment file, for editors."""

from __future__ import annotations

from viisim.cli.terminal import show_json


def schema() -> None:
    """Print the JSON Schema of experiment files; editors complete and check with it.

    viisim schema > experiment.schema.json
    """
    from viisim.config import schema as experiment_schema

    show_json(experiment_schema())
