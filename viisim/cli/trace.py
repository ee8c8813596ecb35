"""`viisim trace`: recorded traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import plain_table, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from viisim.workload.info import LengthSummary, TraceInfo

trace = typer.Typer(help="Look into recorded traffic, and convert it.", no_args_is_help=True)

_SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out broken rows and say how many.")
]


@trace.callback()
def _trace() -> None:
    """Look into recorded traffic, and convert it."""


@trace.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A trace in any known format.", show_default=False),
    ],
    skip_bad: _SkipBad = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show format, requests, span, rate, burstiness, lengths and shared prefixes of a trace.

    viisim trace info AzureLLMInferenceTrace_conv.csv.gz
    """
    from viisim.workload.info import trace_info

    found = trace_info(file, skip_bad=skip_bad)
    if as_json:
        show_json(found.to_dict())
        return
    figures = plain_table("", "")
    for label, text in _figures(found):
        figures.add_row(label, text)
    lengths = plain_table("tokens", "mean", "min", "p50", "p90", "p95", "p99", "max")
    for column in lengths.columns[1:]:
        column.justify = "right"
    lengths.add_row("prompt", *_lengths(found.prompt_tokens))
    lengths.add_row("output", *_lengths(found.output_tokens))
    show(figures, lengths)


@trace.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A trace in any known format, a journal, or the requests of a run.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="The file to write; packed if it ends in .gz.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="mooncake, vidur, azure, splitwise or llmservingsim.", show_default=False
        ),
    ],
    skip_bad: _SkipBad = False,
    limit: Annotated[
        int | None, typer.Option(help="The earliest requests only.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET if it is there.")] = False,
) -> None:
    """Write a trace in the format of another tool, and say what that format cannot hold.

    viisim trace convert conversation_trace.jsonl.gz conversation.csv --to vidur
    """
    from viisim.workload import parameters
    from viisim.workload.export import export_trace
    from viisim.workload.trace import earliest
    from viisim.workload.trace_file import read_trace

    if target.exists() and not force:
        raise InputError(f"{target}: is there already; give another name, or --force to replace it")
    if limit is not None:
        parameters.whole("--limit", limit)
    columns = earliest(read_trace(source, skip_bad=skip_bad), limit)
    losses = export_trace(columns, to, target)
    typer.echo(f"written: {len(columns):,} requests to {target}")
    if columns.skipped_rows:
        typer.echo(f"left out: {_left_out(columns.skipped_rows, columns.first_bad)}")
    for loss in losses:
        typer.echo(f"lost: {loss}")


def _figures(found: TraceInfo) -> Iterator[tuple[str, str]]:
    """What can be said of the trace, label and text."""
    yield "format", found.format
    yield "requests", f"{found.requests:,}"
    if found.skipped_rows:
        yield "left out", _left_out(found.skipped_rows, found.first_bad)
    yield "span", f"{found.span_s:,.1f} s"
    if found.rate_per_s is not None:
        yield "rate", f"{found.rate_per_s:.4g} requests/s"
    yield "busiest minute", f"{found.peak_60s_per_s:.4g} requests/s"
    if found.interarrival_cv is not None:
        yield "inter-arrival CV", f"{found.interarrival_cv:.3g} (Poisson: 1)"
    yield "dispersion in 1 s", f"{found.dispersion_1s:.3g} (Poisson: 1)"
    if found.zero_outputs:
        yield "answers of 0 tokens", f"{found.zero_outputs:,}"
    if found.sessions is not None:
        yield "sessions", f"{found.sessions:,}, of several turns {found.multi_turn_sessions:,}"
    if found.closed_loop_turns:
        yield "turns", f"{found.closed_loop_turns:,} wait for the answer before"
    if found.prefix_share is None:
        yield "shared prefixes", "not recorded"
    else:
        size = f"of {found.block_tokens} tokens" if found.block_tokens else "of various lengths"
        yield "shared prefixes", f"{found.prefix_share:.1%} of the prompt tokens came before"
        yield "prefix blocks", f"{found.unique_blocks:,} different, {size}"


def _left_out(rows: int, first: str | None) -> str:
    return f"{rows:,} rows, the first at {first}"


def _lengths(of: LengthSummary) -> list[str]:
    values = (of.mean, of.min, of.p50, of.p90, of.p95, of.p99, of.max)
    return [f"{value:,.0f}" for value in values]
