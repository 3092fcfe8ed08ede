"""``attnsteer list``: the processors that there are."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from typing import Any

from .options import command


def add(subparsers: Any) -> None:
    command(subparsers, "list", run, "List all processors with their parameters.", ["list", "list --json"])


def run(given: argparse.Namespace) -> int:
    from ..processors import available, get

    found = {name: _describe(get(name)) for name in available()}
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, about in found.items():
        print(about["summary"] if about["summary"].startswith(name) else f"{name}: {about['summary']}")
        for parameter, default in about["parameters"].items():
            print(f"    {parameter} = {default}")
    return 0


def _describe(processor: type) -> dict[str, Any]:
    """The first line of the docstring of its file (or class), and every parameter with its default."""
    summary = (sys.modules[processor.__module__].__doc__ or processor.__doc__ or "").strip().splitlines()
    shown = {}
    for field in fields(processor):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown[field.name] = repr(default).replace("Where(layers='all', heads='all', steps='all')", "everywhere")
    return {"summary": summary[0] if summary else "", "parameters": shown}
