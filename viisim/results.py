"""Run directories: written whole or not at all, and the same bytes wherever they are written.

    manifest.json       what was run: configuration, seeds, versions, hashes of profiles and trace
    requests.parquet    one row a request: `seed`, then the columns of `REQUEST_COLUMNS`
    replicas.parquet    one row a sample of a replica: `seed`, then `SAMPLE_COLUMNS`
    summary.json        the metrics, per seed and over seeds, with their definitions
    plots/              figures, drawn from the files above

No file holds a path of the machine, a host name or a time of day. Everything is written into a
hidden folder beside the target, which is renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from viisim import __version__
from viisim.errors import InputError
from viisim.metrics import Summary
from viisim.plots import draw_all
from viisim.records import OUTCOMES, REQUEST_COLUMNS, SAMPLE_COLUMNS, SeedResult

FORMAT = 1
"""Version of the run directory's layout; it changes when a reader would have to."""

LIBRARIES = ("matplotlib", "numpy", "pyarrow", "scipy", "simpy")
"""What a result's bytes may depend on, besides Python and viisim itself."""

_META = {"viisim_format": str(FORMAT), "outcomes": json.dumps(OUTCOMES)}

# --------------------------------------------------------------------------------------
# The manifest


def make_manifest(
    config: Mapping[str, Any], seeds: Sequence[int], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """What a run was made of.

    `config` is the resolved experiment, without absolute paths; `hashes` names every file that
    the run read (profiles, trace, a policy's source) and gives its SHA-256.
    """
    return {
        "format": FORMAT,
        "config": dict(config),
        "seeds": list(seeds),
        "sha256": dict(hashes),
        "code": code_version(),
        "versions": {
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "viisim": __version__,
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, and whether its packages were changed since.

    None where the code was installed without its history.
    """
    root = Path(__file__).resolve().parents[1]
    top, commit = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    changes = _git(root, "status", "--porcelain", "--", "policies", "viisim", "runtime")
    return {"commit": commit, "dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# --------------------------------------------------------------------------------------
# Writing


class RunFolder:
    """A run directory while it is being written. `path` is where it will be, then is."""

    def __init__(self, path: Path, aside: Path) -> None:
        self.path = path
        self._aside = aside

    def write(
        self,
        manifest: Mapping[str, Any],
        results: Sequence[SeedResult],
        summary: Summary,
        make_plots: bool = True,
    ) -> None:
        """Write all files. `results` are stored in the order given."""
        _write_json(self._aside / "manifest.json", manifest)
        _write_json(self._aside / "summary.json", summary)
        requests = ((result.seed, result.requests | _named(result)) for result in results)
        samples = ((result.seed, result.samples) for result in results)
        _write_parquet(self._aside / "requests.parquet", REQUEST_COLUMNS, requests)
        _write_parquet(self._aside / "replicas.parquet", SAMPLE_COLUMNS, samples)
        if make_plots:
            draw_all(load_run(self._aside), self._aside / "plots")


@contextmanager
def open_run(folder: Path, numbered: bool = False) -> Iterator[RunFolder]:
    """A run directory to write; it appears at `folder` when the block ends well.

    Entered before a simulation, it fails early. With `numbered`, a taken name gets a number
    (`least_loaded-2`); otherwise it is an error. If the block raises, nothing is left behind.
    Raises InputError if the folder is taken or cannot be written.
    """
    path = next(_free_names(folder)) if numbered else folder
    _require_free(path)
    with _folder_beside(path) as aside:
        run = RunFolder(path, aside)
        yield run
        run.path = _publish(aside, folder, numbered)


def write_run(
    folder: Path,
    manifest: Mapping[str, Any],
    results: Sequence[SeedResult],
    summary: Summary,
    make_plots: bool = True,
) -> Path:
    """Write a whole run directory at once. Raises InputError, as `open_run` does."""
    with open_run(folder) as run:
        run.write(manifest, results, summary, make_plots)
    return run.path


def _free_names(folder: Path) -> Iterator[Path]:
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return (name for name in chain([folder], numbered) if not os.path.lexists(name))


def _require_free(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        if any(folder.iterdir()):
            raise InputError(
                f"{folder}: the folder is not empty; remove it or give another with --out"
            )
    elif os.path.lexists(folder):
        raise InputError(f"{folder}: is there already, not a folder; give another with --out")


@contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """A hidden folder on the same file system, gone at the end with all that is left in it."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); give another folder with --out"
        ) from error
    try:
        with aside as name:
            # A folder within, for that has the permissions of the user's other folders.
            inner = Path(name) / "run"
            inner.mkdir()
            yield inner
    except BaseException:
        for parent in made:
            _remove_if_empty(parent)
        raise


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _publish(aside: Path, folder: Path, numbered: bool) -> Path:
    """Rename to the first free name: another run may have taken the one chosen at the start."""
    for name in _free_names(folder) if numbered else [folder]:
        try:
            return aside.rename(name)
        except OSError:
            if not numbered:
                _require_free(name)
            if not os.path.lexists(name):
                raise
    raise InputError(f"{folder}: cannot be replaced; give another folder with --out")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Keys sorted, floats by repr; a NaN is a mistake and raises."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


_WORDS = pa.dictionary(pa.int32(), pa.string())


def _named(result: SeedResult) -> dict[str, Any]:
    """The columns that are stored as words."""
    words = {"traffic_class": result.traffic_classes, "tenant": result.tenants}
    return {
        name: pa.DictionaryArray.from_arrays(pa.array(result.requests[name]), list(values))
        for name, values in words.items()
    }


def _write_parquet(
    path: Path,
    columns: Mapping[str, type],
    seeds: Iterator[tuple[int, Mapping[str, Any]]],
) -> None:
    """One row group a seed (more beyond a million rows), with a `seed` column in front."""
    fields = [
        ("seed", pa.int64()),
        *(
            (name, _WORDS if name in ("traffic_class", "tenant") else pa.from_numpy_dtype(t))
            for name, t in columns.items()
        ),
    ]
    schema = pa.schema(fields, metadata=_META)
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=3) as writer:
        for seed, table in seeds:
            rows = next(iter(table.values())).size
            arrays = [pa.repeat(pa.scalar(seed, pa.int64()), rows)]
            arrays += [
                value if isinstance(value := table[name], pa.Array) else pa.array(value)
                for name in columns
            ]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=1 << 20)


# --------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run directory. The tables are read when asked for, and only the columns asked for."""

    path: Path
    manifest: dict[str, Any]
    summary: Summary

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.manifest["config"].get("name", "run"))

    @property
    def seeds(self) -> list[int]:
        return list(self.manifest["seeds"])

    def requests(self, seed: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of `requests.parquet`, of one seed or all."""
        return self._table("requests", seed, columns)

    def samples(self, seed: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of `replicas.parquet`, of one seed or all."""
        return self._table("replicas", seed, columns)

    def _table(self, name: str, seed: int | None, columns: Sequence[str] | None) -> pa.Table:
        wanted = None if seed is None else [("seed", "=", seed)]
        chosen = None if columns is None else list(columns)
        return pq.read_table(self.path / f"{name}.parquet", columns=chosen, filters=wanted)


def load_run(path: Path) -> LoadedRun:
    """Open a run directory. Raises InputError if it is none, or of another format."""
    manifest, summary = (_read_json(path / f"{name}.json") for name in ("manifest", "summary"))
    for table in ("requests.parquet", "replicas.parquet"):
        if not (path / table).is_file():
            raise InputError(f"{path / table}: missing; give a folder that `viisim run` wrote")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path / 'manifest.json'}: format {manifest.get('format')!r}, this viisim reads "
            f"{FORMAT}; run the experiment again"
        )
    return LoadedRun(path, manifest, summary)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give a folder that `viisim run` wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run the experiment again") from error


# --------------------------------------------------------------------------------------
# Comparing


def compare_bytes(a: Path, b: Path) -> list[str]:
    """Where the results of two runs differ, a line a file; empty if they are equal to the byte.

    The manifest is left out: it says what was run and with which versions, see
    `compare_manifests`.
    """
    names = {
        str(f.relative_to(run).as_posix()) for run in (a, b) for f in run.rglob("*") if f.is_file()
    }
    lines = []
    for name in sorted(names - {"manifest.json"}):
        one, other = a / name, b / name
        if not (one.is_file() and other.is_file()):
            lines.append(f"{name}: only in {'the first' if one.is_file() else 'the second'} run")
        elif one.read_bytes() != other.read_bytes():
            lines.append(f"{name}: {_difference(one, other)}")
    return lines


def compare_manifests(a: Path, b: Path) -> list[str]:
    """What differs in what was run: configuration, seeds, hashes, code and library versions."""
    one, other = (_read_json(run / "manifest.json") for run in (a, b))
    return list(_json_differences(one, other, ""))


def _difference(a: Path, b: Path) -> str:
    if a.suffix == ".parquet":
        return _parquet_difference(pq.read_table(a), pq.read_table(b))
    if a.suffix == ".json":
        differences = list(_json_differences(_read_json(a), _read_json(b), ""))
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        return differences[0] + more if differences else "same content, written differently"
    return f"{a.stat().st_size} and {b.stat().st_size} bytes, not equal"


def _parquet_difference(a: pa.Table, b: pa.Table) -> str:
    if a.column_names != b.column_names:
        return f"columns {', '.join(a.column_names)} and {', '.join(b.column_names)}"
    if a.num_rows != b.num_rows:
        return f"{a.num_rows} and {b.num_rows} rows"
    parts = []
    for name in a.column_names:
        rows = (a[name].to_numpy() != b[name].to_numpy()).nonzero()[0]
        if rows.size:
            first = f"row {rows[0]}: {a[name][int(rows[0])]} and {b[name][int(rows[0])]}"
            parts.append(f"column {name} differs in {rows.size} of {a.num_rows} rows ({first})")
    return "; ".join(parts) or "same content, written differently"


def _json_differences(a: Any, b: Any, key: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _json_differences(a.get(name), b.get(name), inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _json_differences(one, other, f"{key}.{index}")
    elif a != b:
        yield f"{key}: {json.dumps(a)} and {json.dumps(b)}"
