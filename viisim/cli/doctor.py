"""`viisim doctor`: what this machine has for serving, what is missing, and how to get it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import plain_table, show, show_json

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.stacks import Finding

_STYLES = {"ok": "green", "missing": "yellow", "wrong": "red", "unknown": "dim"}


def doctor(
    python: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The interpreter that runs vLLM, if not this one."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where models are kept [dim]\\[default: $HF_HOME or ~/.cache/huggingface][/dim]",
        ),
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="A port that must be free; may be repeated. [dim]\\[default: 8080][/dim]",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when workers on cards cannot run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    root: Annotated[
        Path, typer.Option(hidden=True, help="Read /proc, /sys, /dev and /opt below this folder.")
    ] = Path("/"),
) -> None:
    """Look at drivers, cards, links, versions and room; say what is missing and how to get it.

    viisim doctor
    viisim doctor --python ~/vllm-venv/bin/python --weights /data/models
    viisim doctor --strict && viisim deploy FILE

    Nothing is changed and nothing is started. Without --strict the status is 0 whatever is found.
    """
    from runtime.doctor import Host, examine, ready_for_cards

    host = Host(
        root=root,
        python=python or Path(sys.executable),
        weights=weights or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")),
        ports=tuple(port or (8080,)),
    )
    findings = examine(host)
    is_ready = ready_for_cards(findings)
    if json:
        found = [asdict(finding) for finding in findings]
        show_json({"ready_for_cards": is_ready, "findings": found})
    else:
        show(_table(findings), *_to_do(findings))
        for line in _what_runs(is_ready):
            typer.echo(line)
    if strict and not is_ready:
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    from rich.text import Text

    table = plain_table("", "", "found")
    for one in findings:
        state = Text(one.state, style=_STYLES[one.state])
        table.add_row(Text(one.subject), state, Text(one.said))
    return table


def _to_do(findings: Sequence[Finding]) -> Iterator[Table]:
    """What can be done about what is not as it should be; first what serving cannot do without."""
    from rich.text import Text

    left = [one for one in findings if one.state != "ok" and one.repair]
    if not left:
        return
    table = plain_table("", "what to do")
    for one in sorted(left, key=lambda one: not one.needed):
        table.add_row(Text(one.subject), Text(one.repair))
    yield table


def _what_runs(is_ready: bool) -> Iterator[str]:
    if is_ready:
        yield "Workers can run on the cards. What would be started, and where:"
        yield "  viisim deploy FILE --plan"
        yield "  viisim deploy FILE --dry-run"
        return
    yield "Workers cannot run on cards here. What runs on any machine:"
    yield "  viisim deploy experiments/least_loaded.yaml       simulated workers"
    yield "  viisim deploy experiments/deploy/vllm_cpu.yaml    real vLLM on the CPU"
    yield "docs/operations.md leads from a bare box to serving."
