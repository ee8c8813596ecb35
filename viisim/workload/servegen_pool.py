"""Reads a day of a ServeGen client pool.

JSON, plain or gzip: `source`, `window_s`, `length_window_s`, and `clients`. A client has
`windows`, rows of start (s), rate (per s), cv of the gaps, and family (`G`amma or `W`eibull),
and `lengths`: by the start of a window of `length_window_s`, `{name: {q: [...]}}` with the 101
quantiles 0 to 100 % of `output_tokens` and of `input_tokens` or, in a multimodal pool, of
`text_tokens` and more. The upstream pool lacks the lengths of some clients: null here.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viisim.errors import InputError
from viisim.workload.arrivals import Gamma, Weibull
from viisim.workload.lengths import QuantileTable

_FAMILIES: dict[str, type[Gamma] | type[Weibull]] = {"G": Gamma, "W": Weibull}


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """How one client behaves for a while."""

    start_s: float
    width_s: float
    rate_per_s: float
    gaps: Gamma | Weibull
    prompt_tokens: QuantileTable
    """Of text: what images and sounds add is not known as a whole."""
    output_tokens: QuantileTable


@dataclass(frozen=True, slots=True)
class Pool:
    """A day of a pool."""

    source: str
    clients: Mapping[int, tuple[ClientWindow, ...]]
    """By the client's number, those with known lengths."""
    left_out: Mapping[int, float]
    """Clients without published lengths, and how many requests each sent that day."""

    @property
    def left_out_share(self) -> float:
        """Share of the day's requests that the clients left out sent."""
        missing = sum(self.left_out.values())
        known = sum(w.rate_per_s * w.width_s for client in self.clients.values() for w in client)
        return missing / (missing + known)


def read_pool(path: str | Path) -> Pool:
    """The pool in a file. Raises InputError, naming the file and the client, for another."""
    content = _content(Path(path))
    try:
        return _pool(content)
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the pool") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a day of a ServeGen pool ({type(error).__name__}: {error}); give one"
        ) from None


def _content(path: Path) -> Any:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip data are cut or damaged; fetch it again") from None
    except ValueError:
        raise InputError(f"{path}: not JSON; give a day of a ServeGen pool") from None
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; give a readable pool") from None


def _pool(content: dict[str, Any]) -> Pool:
    clients: dict[int, tuple[ClientWindow, ...]] = {}
    left_out: dict[int, float] = {}
    window_s = float(content["window_s"])
    for client in content["clients"]:
        if client["lengths"] is None:
            left_out[client["client"]] = sum(row[1] * window_s for row in client["windows"])
        else:
            windows = _windows(client, window_s, int(content["length_window_s"]))
            clients[client["client"]] = windows
    if not clients:
        raise InputError("no client has lengths")
    return Pool(str(content["source"]), clients, left_out)


def _windows(
    client: dict[str, Any], window_s: float, length_window_s: int
) -> tuple[ClientWindow, ...]:
    name = f"client {client['client']}"
    lengths = {int(start): _lengths(name, of) for start, of in client["lengths"].items()}
    windows = []
    for row in client["windows"]:
        start_s, rate_per_s, cv, family = row[:4]
        if start_s % window_s or rate_per_s <= 0 or family not in _FAMILIES:
            raise InputError(f"{name}: {row!r} is no window of {window_s:.0f} s")
        prompts, outputs = lengths[start_s // length_window_s * length_window_s]
        gaps = _FAMILIES[family](cv, f"{name}: cv")
        windows.append(ClientWindow(start_s, window_s, rate_per_s, gaps, prompts, outputs))
    return tuple(windows)


def _lengths(name: str, tables: dict[str, Any]) -> tuple[QuantileTable, QuantileTable]:
    prompt = "input_tokens" if "input_tokens" in tables else "text_tokens"
    return _table(name, prompt, tables), _table(name, "output_tokens", tables)


def _table(name: str, key: str, tables: dict[str, Any]) -> QuantileTable:
    """The quantiles; a length of 0 becomes 1, the least that can be served."""
    quantiles = tables[key]["q"]
    if len(quantiles) != 101:
        raise InputError(f"{name}: {key} has {len(quantiles)} quantiles, not 101")
    table = {float(percent): max(tokens, 1) for percent, tokens in enumerate(quantiles)}
    return QuantileTable(table, f"{name}: {key}")
