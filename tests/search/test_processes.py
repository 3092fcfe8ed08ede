"""Searches that are killed, and searches of several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attnsteer.search import Selection, generations

from .common import PAIRS, hunter

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch

torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.search.common import hunter

search = hunter(out={out!r}, batch=3{more})
search.run()
"""
TOTAL = generations(12, len(PAIRS), 2, 2)


def script(folder: Path, more: str = "") -> Path:
    file = folder / "search.py"
    file.write_text(SCRIPT.format(root=str(ROOT), out=str(folder / "out"), more=more))
    return file


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def entries(folder: Path) -> list[dict[str, Any]]:
    """All scores in the files of all processes; a torn line does not count."""
    found = []
    for file in sorted(folder.glob("scores-*.jsonl")):
        whole = file.read_bytes()
        found += [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
    return [entry for entry in found if "set" in entry]


def keys(folder: Path) -> Counter[str]:
    return Counter(json.dumps([e["run"], e["set"], e["prompt"], e["seed"]]) for e in entries(folder))


@pytest.fixture(scope="module")
def reference() -> Selection:
    """The same search in one process without a break."""
    return hunter(batch=3).run()


def test_a_killed_search_goes_on_and_counts_nothing_twice(tmp_path: Path, reference: Selection) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, str(script(tmp_path))], env=environment(), cwd=tmp_path) as process:
        deadline = time.monotonic() + 300
        while len(entries(out)) < TOTAL // 2 - 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the search was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
    known = len(entries(out))
    assert TOTAL // 2 - 5 <= known < TOTAL
    file = out / "scores-0.jsonl"
    file.write_bytes(file.read_bytes() + b'{"run": "torn in the mid')  # as a kill in the middle of a write would
    search = hunter(out=out, batch=3)
    found = search.run()
    assert search.resumed == known, "everything that was written is used"
    assert len(keys(out)) == TOTAL
    assert set(keys(out).values()) == {1}
    assert found.rounds == reference.rounds
    assert found.scores == reference.scores, "every batch has the same shape, so nothing differs"
    assert Selection.load(out / "heads.json") == found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(file: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port()), str(file)]
    return subprocess.run(launch, env=environment(), cwd=file.parent, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path, reference: Selection) -> None:
    done = launched(script(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("scores-*")) == ["scores-0.jsonl", "scores-1.jsonl"]
    counts = [sum('"set"' in line for line in file.read_text().splitlines()) for file in sorted(out.glob("scores-*"))]
    assert sum(counts) == len(keys(out)) == TOTAL
    assert min(counts) >= TOTAL // 2 - 2 * 3
    found = Selection.load(out / "heads.json")
    assert found.rounds == reference.rounds
    assert found.scores == reference.scores
    search = hunter(out=out, batch=3)  # one process goes on where two were
    assert search.run() == found
    assert search.resumed == TOTAL


@pytest.mark.slow
def test_processes_with_different_settings_say_so(tmp_path: Path) -> None:
    done = launched(script(tmp_path, ", steps=2 + int(__import__('os').environ['RANK'])"))
    assert done.returncode != 0
    assert "The 2 processes of this search do not agree on its settings (" in done.stderr
    assert "steps" in done.stderr.split("do not agree on its settings (")[1].split(")")[0]
    assert not entries(tmp_path / "out")
