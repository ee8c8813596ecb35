"""Reading the text of measurement files, plain or gzipped, with every mistake in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from viisim.calibration.measurements import Floats
from viisim.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"


def read_text(path: Path) -> tuple[str, str]:
    """The file's text, and the SHA-256 of its bytes as they lie on disk. Raises InputError."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
        return content.decode("utf-8"), hashlib.sha256(raw).hexdigest()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: the gzip file is cut off or broken; copy it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8; give a measurement file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the path of a readable file") from None


def parse_json(text: str, where: str) -> Any:
    """A JSON document. Raises InputError naming the place where it breaks off."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at_end = not text[error.pos :].strip()
        what = "ends in the middle" if at_end else f"is broken ({error.msg})"
        raise InputError(
            f"{where}: line {error.lineno}: the JSON {what}; copy or record the file again"
        ) from None


def parse_json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one a line; empty lines are skipped. Raises InputError."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number}: not a whole JSON object; record the file again, or "
                f"remove the line"
            )
        rows.append(row)
    return rows


def numbers(rows: Iterable[Mapping[str, Any]], key: str, path: Path) -> Floats:
    """The column `key` of all rows. Raises InputError: missing, no number, or negative."""
    found = []
    for number, row in enumerate(rows, 1):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_sane(value):
            raise InputError(
                f"{path}: row {number}: {key}: {_shown(value)}; it must be a number from 0"
            )
        found.append(float(value))
    return np.array(found)


def _is_sane(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _shown(value: Any) -> str:
    return "missing" if value is None else f"is {str(value)[:40]}"
