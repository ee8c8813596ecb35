"""BurstGPT 1 to 3: CSV with Timestamp (s), Model, Request tokens, Response tokens and Log Type.

Release 3 inserts Session ID and Elapsed time behind the first column, so columns go by name; its
rows of the API log have no session. A request that failed is a row of 0 and 0 tokens. Times are
whole seconds, in release 3 on a clock that does not begin at 0.
"""

from __future__ import annotations

from viisim.workload.formats.rows import CsvReader, Row
from viisim.workload.formats.values import (
    NS_PER_S,
    BadRowError,
    decimal,
    nanoseconds,
    number,
    tokens,
)


class BurstGptReader(CsvReader):
    """Reads a BurstGPT trace; the log (conversation or API) is the traffic class."""

    name = "burstgpt"
    fields = ("Timestamp", "Request tokens", "Response tokens")
    optional = ("Session ID", "Model", "Log Type")
    words = ("session", "model", "traffic_class")

    def row(self, *cells: str) -> Row:
        time, prompt, output, session, model, log = cells
        if number(prompt) == 0:
            raise BadRowError(
                "`Request tokens` is 0: BurstGPT records failed requests so, and nothing can be "
                "served; delete such rows or skip them with skip_bad"
            )
        return Row(
            nanoseconds("Timestamp", decimal(time), NS_PER_S),
            tokens("Request tokens", number(prompt), 1),
            tokens("Response tokens", number(output)),
            words=(session, model, log),
        )
