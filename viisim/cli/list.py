"""`viisim list`: what there is to write into an experiment."""

from __future__ import annotations

from typing import Annotated

import typer

from viisim.cli.terminal import plain_table, show, show_json


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the policies, profiles and workload presets that ship.

    viisim list
    """
    catalogue = {"policies": policies(), "profiles": profiles(), "presets": presets()}
    if as_json:
        show_json(catalogue)
        return
    for kind, entries in catalogue.items():
        table = plain_table(kind, "")
        for name, description in entries.items():
            table.add_row(name, description)
        show(table)


def policies() -> dict[str, str]:
    """The shipped policies and the first line of what each says of itself."""
    from policies.registry import policy_class, policy_names

    return {name: (policy_class(name).__doc__ or "").partition("\n")[0] for name in policy_names()}


def profiles() -> dict[str, str]:
    """The shipped profiles: engine, KV cache, and where the figures come from."""
    from viisim.profile import load_profile, profile_names

    found = {}
    for name in profile_names():
        profile = load_profile(name)
        engine = profile.engine
        room_tokens = (engine.num_kv_blocks - 1) * engine.block_tokens
        found[name] = (
            f"{engine.name} {engine.version.partition(' ')[0]}, {room_tokens:,} tokens of KV "
            f"cache; {profile.source.partition(':')[0].strip()}"
        )
    return found


def presets() -> dict[str, str]:
    """The shipped workload presets: source, rate and median lengths."""
    from viisim.workload.presets import load_preset, preset_names

    found = {}
    for name in preset_names():
        preset = load_preset(name)
        found[name] = f"{preset.source}, {preset.rate_per_s:.3g} requests/s ({preset.licence})"
    return found
