"""Where the world's data files are, and how the shipped pipelines are called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

VARIABLE = "ATTNSTEER_ASSETS"
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"guidance_scale": 1.0, "height": 64, "width": 64},
    "StableDiffusion3Pipeline": {"guidance_scale": 3.0, "max_sequence_length": 1},
    "FluxPipeline": {
        "true_cfg_scale": 4.0,
        "negative_prompt": "",
        "height": 64,
        "width": 64,
        "max_sequence_length": 32,
    },
}
"""How the shipped pipeline of each class is called: well enough for single objects, with room for steering where there
are two. world-sd takes no guidance (with 4 it paints nearly all pairs). world-sd3's T5 encoder is a placeholder: one
zero token does as well as 256, in less time."""
GUIDED_BY = {name: next(iter(call)) for name, call in CALLS.items()}
"""The argument that sets classifier-free guidance; 1 is none."""


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


def call(pipeline: str, guidance: float | None = None) -> dict[str, Any]:
    """Arguments for calling the shipped pipeline of a class (a key of `CALLS`).

    Args:
        guidance: strength of classifier-free guidance, 1 is none (default: what is best for this pipeline). With a
            list of prompts give a list of `negative_prompt` too.
    Raises:
        ValueError: none is shipped.
    """
    if pipeline not in CALLS:
        raise ValueError(f"No shipped pipeline is a {pipeline}; there are {', '.join(CALLS)}.")
    return {**CALLS[pipeline], **({} if guidance is None else {GUIDED_BY[pipeline]: guidance})}
