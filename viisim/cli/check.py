"""`viisim check`: whether a policy keeps the promises that everything rests on."""

from __future__ import annotations

from typing import Annotated

import typer

CLAUSES = {
    "deterministic": "same seed, same decisions, in any process",
    "own_generator": "randomness comes from self.rng",
    "no_clock": "time comes from views and events",
    "relative_time": "a shift of all times changes nothing",
    "valid_answers": "no answer is refused, nothing raises",
    "conservation": "nothing is held for ever",
    "outage": "survives the loss of all replicas",
    "no_kept_view": "no view is used after its call",
}
"""The clauses of `policies.check`, in its order, in short."""


def check(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="A shipped name, module:Class, or path/to/file.py:Class.",
            show_default=False,
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter. May be repeated."),
    ] = None,
) -> None:
    """Examine a policy, clause by clause. Takes about a second.

    viisim check least_loaded
    viisim check my_policy.py:MyPolicy --set cap=8
    """
    from policies.check import findings
    from viisim.documents import override

    policy = {"class" if ":" in spec or spec.endswith(".py") else "name": spec}
    for parameter in set_ or []:
        override(policy, parameter)
    found = findings(policy)
    broken = {finding.clause for finding in found}
    for clause, promise in CLAUSES.items():
        if not found:
            typer.echo(f"ok      {clause}: {promise}")
        elif clause in broken:
            for finding in found:
                if finding.clause == clause:
                    typer.echo(f"BROKEN  {finding}")
    if found:
        typer.echo(f"{spec} breaks {len(broken)} of {len(CLAUSES)} clauses, or more: what follows")
        typer.echo("from these is examined once they are repaired")
        raise typer.Exit(1)
    typer.echo(f"{spec} keeps all {len(CLAUSES)} clauses")
