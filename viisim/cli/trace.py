"""`viisim trace`: recorded traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viisim.cli.terminal import plain_table, show, show_json

if TYPE_CHECKING:
    from viisim.workload.info import LengthSummary, TraceInfo

trace = typer.Typer(help="Look into recorded traffic.", no_args_is_help=True)


@trace.callback()
def _trace() -> None:
    """Look into recorded traffic."""


@trace.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Azure CSV or Mooncake JSONL, plain or gz.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show format, requests, span, rate, burstiness, lengths and shared prefixes of a trace.

    viisim trace info AzureLLMInferenceTrace_conv.csv.gz
    """
    from viisim.workload.info import trace_info

    found = trace_info(file)
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


def _figures(found: TraceInfo) -> Iterator[tuple[str, str]]:
    """What can be said of the trace, label and text."""
    yield "format", found.format
    yield "requests", f"{found.requests:,}"
    yield "span", f"{found.span_s:,.1f} s"
    if found.rate_per_s is not None:
        yield "rate", f"{found.rate_per_s:.4g} requests/s"
    yield "busiest minute", f"{found.peak_60s_per_s:.4g} requests/s"
    if found.interarrival_cv is not None:
        yield "inter-arrival CV", f"{found.interarrival_cv:.3g} (Poisson: 1)"
    yield "dispersion in 1 s", f"{found.dispersion_1s:.3g} (Poisson: 1)"
    if found.zero_outputs:
        yield "answers of 0 tokens", f"{found.zero_outputs:,}"
    if found.prefix_share is None:
        yield "shared prefixes", "not recorded in this format"
    else:
        yield "shared prefixes", f"{found.prefix_share:.1%} of the prompt tokens came before"
        yield "prefix blocks", f"{found.unique_blocks:,} different, of {found.block_tokens} tokens"


def _lengths(of: LengthSummary) -> list[str]:
    values = (of.mean, of.min, of.p50, of.p90, of.p95, of.p99, of.max)
    return [f"{value:,.0f}" for value in values]
