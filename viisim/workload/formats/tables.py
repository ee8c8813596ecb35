"""CSV traces of simulators and load generators, with times in seconds.

- vidur: arrived_at, num_prefill_tokens, num_decode_tokens. Files of lengths only have no
  arrived_at; all their requests come at 0 s, so replay them as a batch or with other arrivals.
- splitwise-sim: arrival_timestamp, prompt_size, token_size; request_type 2 is a language model,
  anything else is another service. application_id and batch_size do not matter to a replay.
- guidellm `trace_synthetic`: timestamp, input_length, output_length. In a CSV these are always
  guidellm's; for JSON lines see `mooncake`.
"""

from __future__ import annotations

from viisim.workload.formats.rows import CsvReader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    BadRowError,
    decimal,
    nanoseconds,
    number,
    short,
    tokens,
)

_SPLITWISE_LLM = 2


class VidurReader(CsvReader):
    """Reads a processed trace of vidur, with or without arrivals."""

    name = "vidur"
    fields = ("num_prefill_tokens", "num_decode_tokens")
    optional = ("arrived_at",)

    def row(self, *cells: str) -> Row:
        prompt, output, time = cells
        if "arrived_at" in self.missing:
            arrived_ns = 0
        else:
            arrived_ns = nanoseconds("arrived_at", decimal(time), NS_PER_S)
        return Row(
            arrived_ns,
            tokens("num_prefill_tokens", number(prompt), 1),
            tokens("num_decode_tokens", number(output)),
        )


class SplitwiseReader(CsvReader):
    """Reads a trace of splitwise-sim."""

    name = "splitwise"
    fields = ("arrival_timestamp", "prompt_size", "token_size")
    optional = ("request_type",)

    def row(self, *cells: str) -> Row:
        time, prompt, output, kind = cells
        if "request_type" not in self.missing and number(kind) != _SPLITWISE_LLM:
            raise BadRowError(
                f"`request_type` is {short(kind)}; only {_SPLITWISE_LLM} is a language model: "
                "delete the row"
            )
        return Row(
            nanoseconds("arrival_timestamp", decimal(time), NS_PER_S),
            tokens("prompt_size", number(prompt), 1),
            tokens("token_size", number(output)),
        )


class GuidellmCsvReader(CsvReader):
    """Reads guidellm's `trace_synthetic` CSV."""

    name = "guidellm"
    fields = ("timestamp", "input_length", "output_length")

    def row(self, *cells: str) -> Row:
        time, prompt, output = cells
        return Row(
            nanoseconds("timestamp", decimal(time), NS_PER_S),
            tokens("input_length", number(prompt), 1),
            tokens("output_length", number(output)),
        )
