"""Folders that commands are told to fill."""

from __future__ import annotations

from pathlib import Path

from viisim.errors import InputError


def make_empty(folder: Path, option: str, otherwise: str = "") -> None:
    """Make the folder that `option` names, if it is not there. Raises InputError when it holds
    anything, or cannot be made; `otherwise` is what may be done instead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{option} {folder}: is not empty; name a new folder{otherwise}")
    except OSError as error:
        raise InputError(
            f"{option} {folder}: cannot be made ({error.strerror}); name another folder"
        ) from error
