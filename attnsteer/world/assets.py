"""Where the world's data files are."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ATTNSTEER_ASSETS"


def root() -> Path:
    """The folder `assets/`: `$ATTNSTEER_ASSETS` if set, else the one of the checkout (or editable install).

    Raises:
        FileNotFoundError: neither place exists; the sentence names both.
    """
    chosen = os.environ.get(VARIABLE)
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "assets"
    if not (folder / "world").is_dir():
        raise FileNotFoundError(
            f"No assets folder at {folder}: set {VARIABLE} to the folder assets/ of an attnsteer checkout "
            f"({VARIABLE} is {'set to ' + repr(chosen) if chosen else 'not set'})."
        )
    return folder


def path(name: str) -> Path:
    """Path of one asset, for example `path("models/world-sd3")`.

    Args:
        name: relative to `assets/`, with forward slashes.
    Returns:
        an existing file or folder.
    Raises:
        FileNotFoundError: it is not there; the sentence lists what is there instead.
    """
    base = root()
    found = base / name
    if not found.exists():
        near = found.parent if found.parent.is_dir() else base
        have = sorted(entry.name for entry in near.iterdir())
        raise FileNotFoundError(f"No asset {name!r} in {base}; {near} holds {', '.join(have) or 'nothing'}.")
    return found
