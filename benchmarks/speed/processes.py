"""How much faster several processes are than one: the same comparison and the same search, dealt to 1 and to 2.

    python benchmarks/speed/processes.py --log                                  # on CPUs, one thread for each process
    python benchmarks/speed/processes.py --device cuda --dtype bfloat16 --processes 1 2 4 --log

Several processes are started as the command line documents it, ``accelerate launch --multi_gpu --num_processes N``, one
alone by ``python``. They load their model once, stay, and do the whole work whenever they are told to, each time in a
new folder; so start and loading are not counted, and groups of processes take turns in one run. Nothing is aimed at:
two processes at most halve the time, and they share the memory bandwidth of one machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
from measure import Ratio

JOBS = ("compare", "search")
PAUSE = 0.002
"""Seconds between two looks for a file."""
PATIENCE = 600.0
"""Seconds until a group counts as stuck."""
Work = Callable[[Path], Any]


# ---- the work of one process -----------------------------------------------------------------------------------------
def comparing(options: argparse.Namespace, device: str) -> Work:
    """Two methods on pictures of the small world, by the embedded model."""
    import tellers

    from attnsteer.cli.compare import parsed
    from attnsteer.compare import Answerer, Answers, Comparison, limited, with_controls, world

    teller = tellers.speaking("world-llava", device, options.dtype)
    answerer, whole = Answerer(teller.model, teller.processor), world.describe()
    task: Any = replace(whole, samples=limited(whole.samples, options.samples, 0))
    methods = with_controls([parsed("vhr")], [])
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def work(folder: Path) -> None:
        answers = Answers(folder, rank)
        Comparison(answerer, [task], methods, answers, options.batch_size, rank, count).run()
        answers.close()

    return work


def searching(options: argparse.Namespace, device: str) -> Work:
    """A round of HeadHunter over one layer, on the embedded SD3."""
    import torch
    from diffusers import DiffusionPipeline

    from attnsteer import Where
    from attnsteer.search import HeadHunter
    from attnsteer.world import assets

    pipe = DiffusionPipeline.from_pretrained(assets.path("models/world-sd3"), dtype=getattr(torch, options.dtype))
    pipe.to(device).set_progress_bar_config(disable=True)
    pairs = [(f"a {name} and a car", seed) for seed, name in enumerate(("dog", "cat", "bird", "chair"))]
    call = {"guidance_scale": 1.0}

    def work(folder: Path) -> None:
        given = {"k": 1, "rounds": 1, "steps": options.steps, "batch": options.batch_size, "call": call}
        HeadHunter(pipe, None, pairs, where=Where(layers=[2]), out=folder, **given).run()

    return work


def serve(options: argparse.Namespace) -> None:
    """Do the work whenever the file of the next turn appears, until there is one that says stop."""
    import torch

    torch.set_num_threads(1)
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if options.device == "cuda" else "cpu"
    work = {"compare": comparing, "search": searching}[options.serve](options, device)
    turn = 0
    (options.folder / f"done-{turn}-{rank}").touch()
    while not (options.folder / "stop").exists():
        if not (options.folder / f"go-{turn + 1}").exists():
            time.sleep(PAUSE)
            continue
        turn += 1
        with torch.no_grad():
            work(options.folder / f"work-{turn}")
        (options.folder / f"done-{turn}-{rank}").touch()


# ---- the groups of processes -----------------------------------------------------------------------------------------
class Group:
    """Processes that wait for work.

    Args:
        job: ``"compare"`` or ``"search"``.
        count: how many processes.
        folder: an empty one of its own.
    """

    def __init__(self, job: str, count: int, folder: Path, options: argparse.Namespace):
        folder.mkdir(parents=True)
        self.count, self.folder, self.turn = count, folder, 0
        given = [str(Path(__file__).resolve()), "--serve", job, "--folder", str(folder)]
        for name in ("device", "dtype", "samples", "batch-size", "steps"):
            given += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
        self._said = (folder / "said").open("w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(measure.ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, *_launcher(count), *given]
        self._process = subprocess.Popen(command, stdout=self._said, stderr=self._said, env=environment)

    def wait(self) -> None:
        """Until all processes have done this turn.

        Raises:
            RuntimeError: a process ended, or none of it within ten minutes.
        """
        deadline = time.monotonic() + PATIENCE
        while len(list(self.folder.glob(f"done-{self.turn}-*"))) < self.count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._said.seek(0)
                raise RuntimeError(f"{self.count} processes came to nothing:\n{self._said.read()[-3000:]}")
            time.sleep(PAUSE)

    def __call__(self) -> None:
        """One turn."""
        self.turn += 1
        (self.folder / f"go-{self.turn}").touch()
        self.wait()

    def stop(self) -> None:
        (self.folder / "stop").touch()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._said.close()


def _launcher(count: int) -> list[str]:
    if count == 1:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
    return [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]


def measured(job: str, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of processes in turns."""
    with tempfile.TemporaryDirectory() as folder:
        groups: dict[str, Group] = {}
        try:
            for count in options.processes:
                name = f"{count} process{'es' * (count > 1)}"
                groups[name] = Group(job, count, Path(folder) / str(count), options)
                groups[name].wait()
            first, *others = groups
            ratios = [Ratio(first, other) for other in others]
            settings = {"job": job, "threads of each process": 1, "samples in a batch": options.batch_size}
            settings |= {"samples": options.samples} if job == "compare" else {"steps": options.steps}
            settings["cores"] = len(os.sched_getaffinity(0))
            return measure.report(f"processes-{job}", options, groups, ratios, settings, wall=True)
        finally:
            for group in groups.values():
                group.stop()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=3)
    add = parser.add_argument
    add("--job", choices=JOBS, action="append", help="default: both")
    add("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers to compare (default: 1 2)")
    add("--samples", type=int, default=24, help="pictures of the comparison (default: %(default)s)")
    add("--steps", type=int, default=4, help="denoising steps of the search (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="samples or pictures at once (default: %(default)s)")
    add("--serve", choices=JOBS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options)
        return []
    return [measured(job, options) for job in options.job or JOBS]


if __name__ == "__main__":
    main()
