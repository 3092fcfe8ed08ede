"""Files of other people with known scores, for the tests that have them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest


def shared(name: str) -> Path:
    """A file of the folder `shared` beside the checkout, or beside a folder that it is in; without it: skip."""
    for place in Path(__file__).resolve().parents:
        path = place / "shared" / name
        if path.exists():
            return path
    pytest.skip(f"no folder `shared` with {name} beside the checkout")


def fixture(name: str) -> Path:
    return shared(f"fixtures/{name}")


def text(name: str) -> str:
    path = fixture(name)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def document(name: str) -> Any:
    return json.loads(text(name))


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(name).splitlines() if line.strip()]
