"""Azure Public Dataset: CSV with TIMESTAMP (wall clock), ContextTokens and GeneratedTokens.

The 2023 files have 7 decimals and no time zone, those of 2024 a zone and decimals of any number;
the multimodal ones have a column NumImages besides, which is ignored.
"""

from __future__ import annotations

from viisim.workload.formats.rows import CsvReader, Row
from viisim.workload.formats.values import number, tokens, wall_clock_ns


class AzureReader(CsvReader):
    """Reads an Azure LLM inference trace."""

    name = "azure"
    fields = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def row(self, *cells: str) -> Row:
        stamp, prompt, output = cells
        return Row(
            wall_clock_ns("TIMESTAMP", stamp),
            tokens("ContextTokens", number(prompt), 1),
            tokens("GeneratedTokens", number(output)),
        )
