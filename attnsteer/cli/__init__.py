"""The command ``attnsteer``. One file per subcommand, each with ``add(subparsers)`` and ``run(arguments) -> int``.

Exit codes: 0 done, 1 the run failed, 2 the request cannot be carried out as given, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from .._version import __version__
from ..errors import NotReachedError, SteeringError
from . import compare, demo, generate, listing, maps, models, score, search, sites, world

COMMANDS = (demo, listing, sites, generate, maps, compare, score, search, world)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line with all subcommands."""
    top = argparse.ArgumentParser(
        prog="attnsteer",
        description="Steer what pretrained diffusion and vision-language models look at, without training.",
        epilog="example: attnsteer demo",
    )
    top.add_argument("--version", action="version", version=f"attnsteer {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code says how it went."""
    try:
        given = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help, the version or its complaint
        return int(stop.code or 0)
    _quiet()
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        print("attnsteer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nobody reads any more; keeps the interpreter's exit quiet
        return 1
    except (SteeringError, models.RunError, OSError, MemoryError) as error:
        print(f"attnsteer: error: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, SteeringError) and not isinstance(error, NotReachedError) else 1
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        print(f"attnsteer: error: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, SteeringError) else " ".join(text.split())


def _quiet() -> None:
    """Libraries speak only of errors, unless the user set them otherwise."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


__all__ = ["main", "parser"]
