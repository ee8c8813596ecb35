"""`viisim plan`: which cards for which load, at what power and cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viisim.cli.terminal import plain_table, progress, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from viisim.config import Slo
    from viisim.plan import Planned, Prices
    from viisim.workload.config import WorkloadConfig

_TIME = re.compile(r"(ttft|tpot|e2e)=(\d+(?:\.\d+)?)(ms|s)")
_SECONDS = {"ms": 1e-3, "s": 1.0}


def plan(
    model: Annotated[
        str,
        typer.Option(metavar="M", help="A model's name or config.json.", show_default=False),
    ],
    device: Annotated[
        list[str],
        typer.Option(metavar="D", help="A device; may be repeated.", show_default=False),
    ],
    slo: Annotated[
        str,
        typer.Option(
            metavar="ttft=2s,tpot=100ms",
            help="What 95 % of the requests must meet: ttft, tpot, e2e.",
            show_default=False,
        ),
    ],
    workload: Annotated[
        str,
        typer.Option(metavar="W", help="A preset, an experiment (.yaml) or a trace."),
    ] = "azure_conv",
    load: Annotated[
        float | None, typer.Option(metavar="R", min=0, help="Requests/s that must be sustained.")
    ] = None,
    users: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="Requests in the system that must be sustained."),
    ] = None,
    max_cards: Annotated[int, typer.Option(min=1, max=16, help="Most cards of one machine.")] = 8,
    quantisation: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Weights to try [dim]\\[default: fp16,fp8,w4a16][/dim]"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="USD", min=0, help="Most to spend on the purchase.")
    ] = None,
    requests: Annotated[int, typer.Option(min=50, help="Requests of a trial, per card.")] = 200,
    lifetime_years: Annotated[float, typer.Option(min=0.1, help="Worthless after.")] = 3.0,
    usd_per_kwh: Annotated[float, typer.Option(min=0, help="Electricity.")] = 0.15,
    host_usd: Annotated[float, typer.Option(min=0, help="Price of all but the cards.")] = 0.0,
    host_w: Annotated[float, typer.Option(min=0, help="Draw of all but the cards.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """What fits on which cards, for how many users, at what power and cost.

    viisim plan --model llama-3.1-8b --device radeon_vii --slo ttft=5s,tpot=100ms
    viisim plan --model qwen3-8b --device mi50 --device rtx_4090 --slo tpot=80ms --load 1.5

    Each line is one configuration at the highest load that short simulations sustain.
    """
    from viisim import plan as planning
    from viisim.plan import Demand, Prices

    objectives = parse_slo(slo)
    prices = Prices(
        lifetime_years=lifetime_years, usd_per_kwh=usd_per_kwh, host_usd=host_usd, host_w=host_w
    )
    demand = Demand(workload=find_workload(workload), slo=objectives, requests_per_card=requests)
    names = quantisation.split(",") if quantisation else planning.QUANTISATIONS
    tried = planning.candidates(model, device, max_cards, names)
    tried = planning.affordable(tried, budget, prices)
    with progress("configurations") as note:
        rows = planning.plan(tried, demand, prices, note)
    best = planning.cheapest(rows, load, users)
    if as_json:
        goal = {"load_per_s": load, "users": users}
        show_json(_document(rows, best, model, workload, objectives, prices) | {"goal": goal})
        return
    show(*_tables(rows))
    typer.echo(_verdict(best, load, users))
    typer.echo(_fine_print(prices))


def parse_slo(text: str) -> Slo:
    """Objectives as the command line has them. Raises InputError for anything else."""
    from viisim.config import Slo

    found: dict[str, float] = {}
    for part in text.replace(" ", "").split(","):
        match = _TIME.fullmatch(part)
        if match is None or float(match[2]) == 0:
            raise InputError(f"--slo {text}: {part!r} is no objective; write ttft=2s,tpot=100ms")
        found[f"{match[1]}_s"] = float(match[2]) * _SECONDS[match[3]]
    return Slo(**found)


def find_workload(text: str) -> WorkloadConfig:
    """A preset by name, an experiment's workload, or a trace. Raises InputError."""
    from viisim.config import load_experiment
    from viisim.workload.config import SyntheticWorkload, TraceWorkload
    from viisim.workload.presets import load_preset

    if text.endswith((".yaml", ".yml")):
        return load_experiment(text).workload
    if Path(text).is_file():
        return TraceWorkload(kind="trace", path=str(Path(text).resolve()))
    load_preset(text)
    content = {"kind": "synthetic", "preset": text, "requests": 1}
    return SyntheticWorkload.model_validate(content)


def _tables(rows: Sequence[Planned]) -> Iterator[Table | str]:
    """One table a device, and below it what sustains no load, with the reason."""
    for device, group in groupby(rows, key=lambda row: row.candidate.device):
        table = plain_table("", "req/s", "users", "tok/s", "W", "$", "$/Mtok", "profile")
        table.title, table.title_justify = device.title, "left"
        for column in table.columns[1:7]:
            column.justify = "right"
        own = list(group)
        for row in own:
            if not row.limit:
                table.add_row(_split(row), *_figures(row), row.candidate.label)
        if table.row_count:
            yield table
        for row in own:
            if row.limit:
                yield f"{describe(row)} ({row.candidate.label}): {row.limit}"


def _figures(row: Planned) -> list[str]:
    return [
        f"{row.load_per_s:.2f}",
        f"{row.users:.1f}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.power_w:,.0f}",
        _usd(row.purchase_usd, 0),
        _usd(row.usd_per_million_tokens, 2),
    ]


def describe(row: Planned) -> str:
    """A configuration in words: `4 radeon_vii as 2xTP2 w4a16`."""
    return f"{row.candidate.cards} {row.candidate.device.name} as {_split(row)}"


def _split(row: Planned) -> str:
    candidate = row.candidate
    size = candidate.profile.tensor_parallel
    return f"{candidate.replicas}xTP{size} {candidate.quantisation}"


def _usd(amount: float | None, digits: int) -> str:
    return "unknown" if amount is None else f"{amount:,.{digits}f}"


def _verdict(best: Planned | None, load: float | None, users: float | None) -> str:
    goals = [f"{load:g} requests/s"] if load is not None else []
    goals += [f"{users:g} users"] if users is not None else []
    goal = " and ".join(goals)
    if best is None:
        return f"none of these sustains {goal or 'any load'}; raise --max-cards or the objectives"
    what = f"cheapest per hour that sustains {goal}" if goal else "cheapest per token"
    return f"{what}: {describe(best)} ({best.candidate.label})"


def _fine_print(prices: Prices) -> str:
    return (
        "\n2xTP4: two replicas of four cards each. W: mean of the cards at that load. $/Mtok: "
        "generated tokens, purchase over "
        f"{prices.lifetime_years:g} years at this load all the time, and "
        f"${prices.usd_per_kwh:g}/kWh. Prices and draws are the catalogue's, with its confidence. "
        "uncalibrated: a roofline's step times, not fitted to any run."
    )


def _document(
    rows: Sequence[Planned],
    best: Planned | None,
    model: str,
    workload: str,
    slo: Slo,
    prices: Prices,
) -> dict[str, Any]:
    return {
        "model": model,
        "workload": Path(workload).name,
        "slo": slo.model_dump(),
        "prices": {name: getattr(prices, name) for name in prices.__slots__},
        "configurations": [row.to_dict() for row in rows],
        "cheapest": None if best is None else best.to_dict(),
    }
