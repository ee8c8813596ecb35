"""`viisim load`: send a workload to a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viisim.cli.run import Overrides
from viisim.cli.terminal import plain_table, progress, show, show_json
from viisim.errors import InputError

if TYPE_CHECKING:
    from runtime.load import Record
    from viisim.metrics import Slo
    from viisim.workload.interface import Workload


def load(
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT of the server.")],
    workload: Annotated[
        Path, typer.Argument(metavar="WORKLOAD", help="An experiment (YAML), or any trace.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records, a line of JSON a request.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="What a trace's requests ask for; experiments say it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of an experiment's workload.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="The earliest requests only.")] = None,
    speed: Annotated[float, typer.Option(help="10: ten seconds' worth in one.")] = 1.0,
    key: Annotated[
        str | None, typer.Option(envvar="VIISIM_KEY", help="API key; better in VIISIM_KEY.")
    ] = None,
    exact_lengths: Annotated[
        bool, typer.Option(help="Answers of the workload's lengths (ignore_eos, a vLLM option).")
    ] = True,
    token_ids: Annotated[
        str,
        typer.Option(metavar="FROM:TO", help="What prompts are made of, for small vocabularies."),
    ] = "100:30000",
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Send a workload to an OpenAI endpoint on its own schedule, and record every answer.

    viisim load http://127.0.0.1:8080 experiments/least_loaded.yaml --out records.jsonl
    viisim load http://127.0.0.1:8000 trace.csv.gz --model llama --limit 500

    Requests leave when they are due, however slow the answers; latencies count from then.
    Exit status 1 if a request failed.
    """
    from itertools import count, islice

    from runtime.load import LoadClient
    from runtime.serve import run

    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: give an address, http://HOST:PORT")
    if not speed > 0:
        raise InputError(f"--speed {speed}: give a number above 0")
    vocabulary = _range(token_ids)
    source, slo = _workload(workload, model, set_ or [])
    total = min(source.total_requests, limit or source.total_requests)
    records: list[Record] = []

    done = count(1)
    with progress("answered") as note:

        def answered(record: Record) -> None:
            if note is not None:
                note(next(done), total)

        client = LoadClient(
            url,
            key=key,
            exact_lengths=exact_lengths,
            speed=speed,
            vocabulary=vocabulary,
            on_done=answered,
        )

        async def main() -> None:
            records.extend(await client.send(islice(source.requests(seed), limit)))

        run(main())
    if out is not None:
        out.write_text("".join(record.line() + "\n" for record in records), encoding="utf-8")
    summary = summarised(records, slo, speed)
    if as_json:
        show_json(summary)
    else:
        _show(summary)
    if summary["failed"]:
        raise typer.Exit(1)


def _range(text: str) -> range:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) + 1 < int(high)):
        raise InputError(f"--token-ids {text}: give two token ids or more, such as 100:30000")
    return range(int(low), int(high))


def _workload(path: Path, model: str | None, overrides: list[str]) -> tuple[Workload, Slo | None]:
    """The workload, and the objectives that an experiment judges it by."""
    if path.suffix in (".yaml", ".yml"):
        from viisim.config import load_experiment

        experiment = load_experiment(path, overrides)
        return experiment.build_workload(), experiment.slo
    from viisim.workload.trace import TraceReplay

    if model is None:
        raise InputError(f"{path}: say with --model what the trace's requests ask for")
    return TraceReplay(path=path, model=model), None


def summarised(records: list[Record], slo: Slo | None = None, speed: float = 1.0) -> dict[str, Any]:
    """Latencies of the whole answers, and how many failed; with an SLO also how many met it.

    Everything is on the client's clock; an SLO is not, and is met `speed` times as soon.
    """
    import numpy as np

    from runtime.load import inter_token_s, late_share
    from viisim.metrics import distribution

    whole = [record for record in records if not record.error]

    def of(values: list[float | None]) -> Any:
        return distribution(np.array([v for v in values if v is not None], dtype=np.float64))

    tpot = [
        (r.token_s[-1] - r.token_s[0]) / (r.output_tokens - 1)
        for r in whole
        if r.streamed and r.output_tokens > 1 and r.token_s
    ]
    span_s = max((r.due_s + (r.e2e_s or 0) for r in whole), default=0.0)
    met = None if slo is None else _met(whole, slo, speed)
    return {
        "requests": len(records),
        "met_slo": met,
        "failed": len(records) - len(whole),
        "first_error": next((r.error for r in records if r.error), ""),
        "late_share": late_share(records),
        "throughput_requests_per_s": len(whole) / span_s if span_s else 0.0,
        "throughput_output_tokens_per_s": sum(r.output_tokens for r in whole) / span_s
        if span_s
        else 0.0,
        "ttft_s": of([r.ttft_s for r in whole]),
        "ttft_from_sent_s": of([r.ttft_from_sent_s for r in whole]),
        "tpot_s": of(list(tpot)),
        "itl_s": of([gap for r in whole for gap in inter_token_s(r)]),
        "e2e_s": of([r.e2e_s for r in whole]),
        "e2e_from_sent_s": of([r.e2e_from_sent_s for r in whole]),
    }


def _met(whole: list[Record], slo: Slo, speed: float) -> int:
    """How many of these whole answers a simulation would say had met the SLO."""
    import numpy as np

    from viisim.metrics import meets_slo
    from viisim.records import FINISHED

    def ns(seconds: list[float | None]) -> Any:
        return np.array([(value or 0.0) * speed * 1e9 for value in seconds])

    classes = sorted({record.traffic_class for record in whole}) or [""]
    columns = {
        "traffic_class": np.array([classes.index(r.traffic_class) for r in whole], dtype=np.intp),
        "output_tokens": np.array([r.output_tokens for r in whole]),
        "streamed": np.array([r.streamed for r in whole], dtype=bool),
        "arrived_ns": np.zeros(len(whole)),
        "first_token_ns": ns([r.ttft_s for r in whole]),
        "finished_ns": ns([r.e2e_s for r in whole]),
        "outcome": np.full(len(whole), FINISHED),
    }
    return int(meets_slo(columns, slo, classes).sum())


def _show(summary: dict[str, Any]) -> None:
    table = plain_table("seconds", "mean", "p50", "p90", "p99")
    for name, found in summary.items():
        if isinstance(found, dict):
            values = (found[key] for key in ("mean", "p50", "p90", "p99"))
            table.add_row(name, *("-" if v is None else f"{v:.4g}" for v in values))
    show(table)
    typer.echo(
        f"{summary['requests']} requests, {summary['failed']} failed, "
        f"{summary['late_share']:.1%} left late, "
        f"{summary['throughput_requests_per_s']:.3g} requests/s"
    )
    if summary["met_slo"] is not None:
        typer.echo(f"{summary['met_slo']} met the SLO of the experiment")
    if summary["first_error"]:
        typer.echo(f"first error: {summary['first_error']}", err=True)
