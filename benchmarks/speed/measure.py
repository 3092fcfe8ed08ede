"""How every speed benchmark measures: all cases in turns within one run, medians of paired ratios, peak memory, a log.

A script says what its cases are and which ratio it aims at::

    options = measure.parser(__doc__).parse_args()
    cases = {"plain": lambda: pipe(...), "steered": lambda: ...}
    measure.report("idle", options, cases, [Ratio("steered", "plain", most=1.02)], settings={"model": options.model})

Every case runs ``--repeats`` times after ``--warm-up`` rounds that are not counted, each repetition in turn with the
others, so that a slow moment hits all of them; a ratio is the median over the repetitions of the pairwise quotients.
A run that returns ``Parts`` says itself how long its parts took; "case: part" is then a case too. Memory is the peak of
one more run of each case: of the caching allocator on a GPU, of all live tensors of this process on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
"""Logs name files from here on, wherever the checkout is."""
LOGS = ROOT / "benchmarks" / "logs" / "speed"
Cases = Mapping[str, Callable[[], Any]]


class Parts(dict[str, float]):
    """What a run may return: seconds of its parts by name, each a case of its own, "case: part", in ratios."""


@dataclass(frozen=True)
class Ratio:
    """A quotient of two cases and what it should be.

    Attributes:
        case, to: names of cases; the quotient is ``case / to``.
        most: the aim: at most this; None: nothing is aimed at.
        least: the aim: at least this (how often faster: name the slow one as ``case``).
        what: ``"time"`` or ``"memory"``.
    """

    case: str
    to: str
    most: float | None = None
    least: float | None = None
    what: str = "time"

    def reached(self, value: float) -> bool | None:
        if self.most is None and self.least is None:
            return None
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


# ---- time ------------------------------------------------------------------------------------------------------------
def clock(run: Callable[[], Any], device: str, wall: bool = False) -> tuple[float, Parts]:
    """Seconds of one run, by CUDA events on a GPU, else by ``now``; and those of its parts, where it tells."""
    if wall or device != "cuda":
        tick = time.perf_counter if wall else now
        start = tick()
        found = run()
        return tick() - start, found if isinstance(found, Parts) else Parts()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    found = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, found if isinstance(found, Parts) else Parts()


def now() -> float:
    """Seconds of CPU time that this process has used, which others on the machine hardly disturb; with several threads
    (set OMP_NUM_THREADS=1 to have one) the wall clock, since CPU time adds theirs up."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(cases: Cases, repeats: int, warm_up: int, device: str, wall: bool = False) -> dict[str, list[float]]:
    """Time every case ``repeats`` times, all cases in turn, the order reversed in every other round."""
    for _ in range(warm_up):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            whole, parts = clock(cases[name], device, wall)
            times[name].append(whole)
            for part, seconds in parts.items():
                times.setdefault(f"{name}: {part}", []).append(seconds)
    return times


# ---- memory ----------------------------------------------------------------------------------------------------------
def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory that tensors made by one run hold at once, in bytes; what lived before is not counted."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---- reports ---------------------------------------------------------------------------------------------------------
def environment(device: str, wall: bool = False) -> dict[str, Any]:
    """Command, versions, hardware and clock, for the log."""
    import diffusers
    import transformers

    processor = platform.processor() or platform.machine()
    own = "CPU time" if torch.get_num_threads() == 1 else "wall clock"
    return {
        "command": " ".join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{processor} CPU",
        "threads": torch.get_num_threads(),
        "clock": "wall clock" if wall else "CUDA events" if device == "cuda" else own,
    }


def quotient(ratio: Ratio, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median, least and most of the pairwise quotients, beside the aim."""
    quotients = [a / b for a, b in zip(values[ratio.case], values[ratio.to], strict=True)]
    median = statistics.median(quotients)
    spread = {"ratio": median, "low": min(quotients), "high": max(quotients)}
    return {**asdict(ratio), **spread, "reached": ratio.reached(median)}


def report(
    job: str,
    options: argparse.Namespace,
    cases: Cases,
    ratios: Sequence[Ratio],
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    wall: bool = False,
) -> dict[str, Any]:
    """Measure, print a table, and write ``--log``; ``results.py`` puts the logs into RESULTS.md.

    Args:
        job: the name of the log, with what tells it from others of the same script ("guidance-sdxl").
        options: of ``parser``.
        cases: name -> what is timed.
        ratios: quotients that matter; memory is measured for the cases that one of them names.
        settings: what was run: model, size, steps, rows.
        notes: sentences for RESULTS.md.
        wall: time by the wall clock, as the work of other processes must be.
    """
    with torch.no_grad():
        times = in_turns(cases, options.repeats, options.warm_up, options.device, wall)
        weighed = dict.fromkeys(n for r in ratios if r.what == "memory" for n in (r.case, r.to))
        peaks = {name: peak_bytes(cases[name], options.device) for name in weighed}
    measured = {"time": times, "memory": {name: [float(value)] for name, value in peaks.items()}}
    found = {
        "job": job,
        **environment(options.device, wall),
        "settings": {"device": options.device, "dtype": options.dtype, **(settings or {})},
        "notes": list(notes),
        "cases": {
            name: {"median_s": statistics.median(raw), "raw_s": raw, "peak_bytes": peaks.get(name)}
            for name, raw in times.items()
        },
        "ratios": [quotient(ratio, measured[ratio.what]) for ratio in ratios],
    }
    show(found)
    if options.log:
        file = LOGS / f"{job}-{options.device}.json" if options.log is True else Path(options.log)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def show(found: Mapping[str, Any]) -> None:
    """The cases and the ratios, line by line."""
    for name, case in found["cases"].items():
        peak = f"   {case['peak_bytes'] / 2**20:9.1f} MiB" if case["peak_bytes"] is not None else ""
        print(f"{name:44s} {1e3 * case['median_s']:10.2f} ms{peak}")
    for ratio in found["ratios"]:
        print(f"{ratio['what']}: {ratio['case']} / {ratio['to']} = {ratio['ratio']:.3f}"
              f" ({ratio['low']:.3f} to {ratio['high']:.3f}){aim(ratio)}")  # fmt: skip


def aim(ratio: Mapping[str, Any]) -> str:
    """``, aim at most 1.02: reached``."""
    wanted = [f"at {name} {ratio[name]:g}" for name in ("most", "least") if ratio[name] is not None]
    return f", aim {' and '.join(wanted)}: {'reached' if ratio['reached'] else 'MISSED'}" if wanted else ""


def parser(text: str | None, repeats: int = 7) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="default: %(default)s"
    )
    made.add_argument("--repeats", type=int, default=repeats, help="counted runs of each case (default: %(default)s)")
    made.add_argument("--warm-up", type=int, default=1, help="runs before those (default: %(default)s)")
    made.add_argument(
        "--log", nargs="?", const=True, help="write JSON: alone to benchmarks/logs/speed, or to the file named"
    )
    return made
