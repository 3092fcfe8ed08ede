"""Several processes of one comparison: none waits for another, and a dead one leaves only its own share undone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnsteer.cli import main

from .common import METHODS, ROOT, Parrot, environment, finished, outputs, tasks, tiny
from .test_run import entries, keys

SCENES = 24
SCRIPT = """
import os
import sys

sys.path.insert(0, {root!r})
from pathlib import Path
from tests.compare.common import Parrot, finished, tasks

rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
finished(Path({out!r}), by=Parrot(pause=0.05), tasks=tasks({scenes})[:1], batch_size=1, rank=rank, count=count)
"""


def test_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "run.py"
    file.write_text(SCRIPT.format(root=str(ROOT), out=str(out), scenes=SCENES))
    started = [
        subprocess.Popen(
            [sys.executable, str(file)], env={**environment(), "RANK": str(rank), "WORLD_SIZE": "2"}, cwd=tmp_path
        )
        for rank in range(2)
    ]
    deadline, victim = time.monotonic() + 1200, out / "answers-1.jsonl"
    while time.monotonic() < deadline and (not victim.exists() or victim.read_bytes().count(b"\n") < 4):
        assert started[1].poll() is None, "the process was over before it could be killed"
        time.sleep(0.002)
    os.kill(started[1].pid, signal.SIGKILL)
    assert started[1].wait(60) == -signal.SIGKILL
    assert started[0].wait(1200) == 0
    share = len(METHODS) * SCENES // 2
    counts = [sum("output" in e for e in entries(out) if _rank(e, out) == rank) for rank in range(2)]
    assert counts[0] == share
    assert 0 < counts[1] < share
    found = finished(out, by=Parrot(), tasks=tasks(SCENES)[:1], batch_size=1)
    assert found.there(found.tasks[0]) == (2 * share, 2 * share)
    assert set(keys(out).values()) == {1}
    assert outputs(found) == outputs(finished(tmp_path / "whole", by=Parrot(), tasks=tasks(SCENES)[:1], batch_size=1))


def _rank(entry: dict[str, object], out: Path) -> int:
    """Whose share a sample is: batches of one are dealt in turn."""
    return int(str(entry["sample"]).removeprefix("lonely-")) % 2


@pytest.mark.slow
def test_accelerate_launches_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["compare", "--model", str(tmp_path / "model"), "--limit", "6", "--batch-size", "1", "--tasks", "chair"]
    command += ["--max-new-tokens", "4", "--output"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port), "-m", "attnsteer", *command, str(tmp_path / "two")]
    done = subprocess.run(launch, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(file.name for file in (tmp_path / "two").glob("answers-*")) == ["answers-0.jsonl", "answers-1.jsonl"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert main([*command, str(tmp_path / "two")]) == 0, "merging again changes nothing"
    capsys.readouterr()
    for name in ("results.json", "table.md", "report.html"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
