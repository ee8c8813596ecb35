"""viisim's own records as a workload: what was served before is served again.

- A run directory, or its `requests.parquet`: the requests of its first seed, at the simulated
  times of their arrival.
- Client records (`*.requests.jsonl`), `sent_s` in seconds on a clock that may begin before 0.
- Journals: `Arrived` says what came and when, `Finished` how long the answer was.

Requests that never finished have no answer whose length could be replayed: they are left out and
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from viisim.errors import InputError
from viisim.records import FINISHED, OUTCOMES
from viisim.workload.formats.rows import JsonReader, Reader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    BadRowError,
    Fields,
    UnfinishedError,
    hash_ids,
    nanoseconds,
    needed,
    priority,
    short,
    started_blocks,
    tokens,
    word,
)


class RunReader(Reader[tuple[Any, ...]]):
    """Reads the requests of a run directory."""

    name = "viisim_run"
    fields = (
        "outcome",
        "arrived_ns",
        "prompt_tokens",
        "output_tokens",
        "priority",
        "tenant",
        "traffic_class",
    )
    words = ("tenant", "traffic_class")

    def rows(self, record: tuple[Any, ...]) -> Sequence[Row]:
        outcome, arrived_ns, prompt, output, urgency, tenant, traffic_class = record
        if outcome != FINISHED:
            raise UnfinishedError(f"the request was {OUTCOMES[outcome]}: its answer is unknown")
        prompt = tokens("prompt_tokens", prompt, 1)
        return (Row(arrived_ns, prompt, output, priority=urgency, words=(tenant, traffic_class)),)


def run_records(path: Path) -> Iterator[tuple[Any, ...]]:
    """The requests of the first seed in a `requests.parquet`, as RunReader takes them."""
    # Loaded here, because it takes longer than reading most traces.
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["seed", *RunReader.fields])
        table = table.filter(pc.equal(table["seed"], pc.min(table["seed"])))
        columns = [table[name].to_pylist() for name in RunReader.fields]
    except (pa.ArrowException, KeyError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(
            f"{path}: not the requests.parquet of a run ({reason}); give one, or a trace"
        ) from None
    return zip(*columns, strict=True)


class ClientRecordReader(JsonReader):
    """Reads client-side request records. A prefix group has no length, so nothing is shared."""

    name = "viisim_requests"
    fields = ("sent_s", "prompt_tokens", "output_tokens")

    def of(self, fields: Fields) -> Sequence[Row]:
        sent, prompt, output = needed(fields, *self.fields, of="a request record")
        if output is None:
            raise UnfinishedError("the request has no `output_tokens`: its answer is unknown")
        return (
            Row(
                nanoseconds("sent_s", sent, NS_PER_S, negative=True),
                tokens("prompt_tokens", prompt, 1),
                tokens("output_tokens", output),
                priority=priority(fields),
            ),
        )


class JournalReader(JsonReader):
    """Reads a journal; a request becomes a row when it finishes."""

    name = "viisim_journal"
    fields = ("event", "actions")
    words = ("session", "tenant", "traffic_class", "model")

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._begun: dict[str, Row] = {}

    def of(self, fields: Fields) -> Sequence[Row]:
        if "segment" in fields:
            return ()
        (event,) = needed(fields, "event", of="a journal line")
        kind = event.get("event") if isinstance(event, dict) else None
        if kind == "Arrived":
            (request,) = needed(event, "request", of="Arrived")
            if not isinstance(request, dict):
                raise BadRowError(f"`request` is {short(request)}; it must be an object")
            (name,) = needed(request, "id", of="a request")
            self._begun[word("id", name)] = self._row(request)
        elif kind == "Finished":
            name, output = needed(event, "request_id", "output_tokens", of="Finished")
            # A journal that was rotated has the arrival in an earlier file.
            row = self._begun.pop(word("request_id", name), None)
            if row is not None:
                return (row._replace(output_tokens=tokens("output_tokens", output)),)
        elif not isinstance(kind, str):
            raise BadRowError(f"`event` is {short(event)}; it must be an event of a journal")
        return ()

    def _row(self, request: Fields) -> Row:
        arrived, prompt = needed(request, "arrived_s", "prompt_tokens", of="a request")
        prompt = tokens("prompt_tokens", prompt, 1)
        return Row(
            nanoseconds("arrived_s", arrived, NS_PER_S, negative=True),
            prompt,
            0,
            self._ids(request, prompt),
            priority=priority(request),
            words=tuple(word(name, request.get(name)) for name in self.words),
        )

    def _ids(self, request: Fields, prompt: int) -> Sequence[int]:
        """The blocks of a prompt where they are counted in tokens and of the file's one size; a
        proxy counts bytes, which do not say how many tokens are shared."""
        block_tokens = tokens("prefix_block_tokens", request.get("prefix_block_tokens", 0))
        ids = hash_ids(request.get("prefix_blocks", []), "prefix_blocks")
        if not block_tokens or not ids:
            return ()
        if len(ids) not in (prompt // block_tokens, started_blocks(prompt, block_tokens)):
            return ()
        if self.block_tokens not in (0, block_tokens):
            return ()
        self.block_tokens = block_tokens
        return ids

    def unfinished(self) -> Iterable[str]:
        return (f"request {name} never finished: its answer is unknown" for name in self._begun)
