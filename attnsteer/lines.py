"""Files of JSON lines that survive a kill at any moment: whole lines are appended, a torn last one is cut off."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import SteeringError


def identity(settings: Mapping[str, Any]) -> str:
    """A short hash of settings."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Lines:
    """A file to append whole lines to, for this process alone.

    Args:
        file: made if it is missing; what stands behind its last end of line is cut off.
        what: how an error calls the job that writes, e.g. ``"search"``.

    Raises:
        SteeringError: another process is writing to it.
    """

    def __init__(self, file: Path, what: str):
        self._file: Any = open(file, "a+b")  # noqa: SIM115 - closed by ``close``
        try:
            _lock(self._file)
        except BlockingIOError:
            self.close()
            raise SteeringError(
                f"Another {what} is writing to {str(file.parent)!r}: give each its own folder."
            ) from None
        self._file.seek(0)
        whole = self._file.read()
        if whole and not whole.endswith(b"\n"):
            self._file.truncate(whole.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries, on the disk before this returns."""
        self._file.write(b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lock(opened: Any) -> None:
    """Keep other processes out, where the system can.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system: nobody watches
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


def whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line; what stands behind the last end of line is still being written."""
    whole = file.read_bytes()
    yield from enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), start=1)
