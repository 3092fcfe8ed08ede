"""All logs of the speed benchmarks as one document, ``benchmarks/RESULTS.md``.

    python benchmarks/speed/results.py             # write it
    python benchmarks/speed/results.py --check     # exit code 1 where it is not what the logs say

Every number there comes from a file of ``benchmarks/logs/speed``. What is said about a script's numbers (which aim is
missed, and where the time goes) stands in ``benchmarks/speed/remarks/<script>.md`` and is put above its tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import plots

RESULTS = measure.ROOT / "benchmarks" / "RESULTS.md"
REMARKS = Path(__file__).resolve().parent / "remarks"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOTHING = "— not measured here"
FEW = 3
"""Ratios with an aim that the overview prints by themselves; of more it says how many reach it."""
Log = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the overview: what is measured, against what, and the scripts whose logs belong to it."""

    job: str
    peer: str
    aim: str
    scripts: tuple[str, ...]


ROWS = (
    Row("attached, nothing active", "the plain pipeline or model", "at most 1.01 on GPU, 1.02 on CPU", ("idle",)),
    Row(
        "SoftPAG and PAG step",
        "diffusers' PAG pipelines, the unforked lane",
        "at most 1.03 x the bound from counted FLOPs; 10 % faster than diffusers on SDXL mid, 25 % on SD3 from layer "
        "12; memory of the plain batch + 3 %",
        ("guidance",),
    ),
    Row(
        "A-STAR and Attend-and-Excite step",
        "diffusers' Attend-and-Excite pipeline",
        "at most 0.6 x its time, 0.4 x its peak memory",
        ("nursing",),
    ),
    Row(
        "IR-Diffusion, 3 subjects, SDXL",
        "the same with explicit maps",
        "at most 0.25 x time in the steered layers, memory linear in N",
        ("sharing",),
    ),
    Row(
        "VHR, PAI, VAR, GIFT: prefill and decode",
        "plain sdpa; eager with full maps",
        "decode at most 1.01, 1.03, 1.06, 1.06, prefill at most 1.05, memory + 3 %; VAR 5 x faster than with maps",
        ("decoding",),
    ),
    Row(
        "8 variants of one prompt",
        "8 runs one after the other",
        "at least 4 x on GPU at 512 px; on CPU at least as fast",
        ("variants",),
    ),
    Row("HeadHunter round on SD3", "one candidate at a time, unforked", "at least 2 x images a second", ("search",)),
    Row("compare, 5 methods", "5 separate runs", "at least 2.5 x samples a second on GPU, 1.3 x on CPU", ("compare",)),
    Row(
        "maps of 4 words over 20 steps, SD3",
        "storing full maps",
        "memory independent of layers and steps",
        ("maps",),
    ),
    Row("growth with tokens, variants, sites", "the plain kernel", "nothing worse than linear in variants", ("scale",)),
    Row(
        "kernels that return the log-sum-exp",
        "the library's call without it, the explicit map",
        "none: the fastest should be chosen",
        ("kernels",),
    ),
    Row("several processes", "one process", "none: the gain is told", ("processes",)),
)


# ---- reading ---------------------------------------------------------------------------------------------------------
def read(folder: Path) -> list[Log]:
    """All logs, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def script(log: Mapping[str, Any]) -> str:
    """The script whose row of the overview a log belongs to; the job begins with it."""
    return str(log["job"]).partition("-")[0]


def device(log: Mapping[str, Any]) -> str:
    return str(log["settings"]["device"])


def title(log: Mapping[str, Any]) -> str:
    return f"{log['job']}, {DEVICES[device(log)]}"


def anchor(text: str) -> str:
    """A heading as the target of a link, as GitHub and GitLab make it."""
    return "".join(c for c in text.lower().replace(" ", "-") if c.isalnum() or c in "-_")


# ---- the overview ----------------------------------------------------------------------------------------------------
def overview(logs: Sequence[Log]) -> list[str]:
    """One line for each row of what was to be measured."""
    lines = table(["job", "peer", "aim", "CPU", "GPU", "reached"])
    for row in ROWS:
        cells = [row.job, row.peer, row.aim]
        for name in DEVICES:
            mine = [log for log in logs if script(log) in row.scripts and device(log) == name]
            cells.append("<br>".join(map(summary, mine)) or NOTHING)
        lines.append(line([*cells, reached([log for log in logs if script(log) in row.scripts])]))
    return lines


def summary(log: Log) -> str:
    """A log in a few words: the ratios that have an aim, or how many reach it and which is furthest off."""
    link = f"[{log['job'].partition('-')[2] or log['job']}](#{anchor(title(log))})"
    aimed = [ratio for ratio in log["ratios"] if ratio["reached"] is not None]
    if len(aimed) <= FEW:
        told = aimed or log["ratios"][:FEW]
        return f"{link}: {'; '.join(f'{each(ratio)} {number(ratio)}' for ratio in told)}"
    worst = max(aimed, key=off)
    count = f"{sum(ratio['reached'] for ratio in aimed)} of {len(aimed)} aims"
    return f"{link}: {count}{'' if worst['reached'] else f', furthest off {each(worst)} {number(worst)}'}"


def each(ratio: Mapping[str, Any]) -> str:
    what = "" if ratio["what"] == "time" else f" ({ratio['what']})"
    return f"{ratio['case']} / {ratio['to']}{what}".replace("|", "\\|")


def off(ratio: Mapping[str, Any]) -> float:
    """How far from its aim, as a factor; above 1 is missed."""
    value = max(ratio["ratio"], 1e-12)
    over = value / ratio["most"] if ratio["most"] is not None else 0.0
    under = ratio["least"] / value if ratio["least"] is not None else 0.0
    return float(max(over, under))


def number(ratio: Mapping[str, Any], name: str = "ratio") -> str:
    return f"{ratio[name]:.3f}" if ratio[name] < 10 else f"{ratio[name]:.1f}"


def reached(logs: Sequence[Log]) -> str:
    """yes, no, or how many of the aims, on every device that was measured."""
    said = []
    for name, shown in DEVICES.items():
        found = [r["reached"] for log in logs if device(log) == name for r in log["ratios"] if r["reached"] is not None]
        if found:
            word = "yes" if all(found) else "no" if not any(found) else f"{sum(found)} of {len(found)}"
            said.append(f"{shown}: {word}")
    return ", ".join(said) or "—"


# ---- one log ---------------------------------------------------------------------------------------------------------
def section(log: Log) -> list[str]:
    """Command, versions, settings and tables of a log."""
    versions = ", ".join(f"{name} {log[name]}" for name in ("torch", "diffusers", "transformers"))
    threads = f", {log['threads']} thread{'s' * (log['threads'] != 1)}" if device(log) == "cpu" else ""
    settings = ", ".join(f"{name}: {told(value)}" for name, value in log["settings"].items())
    repeats = max((len(case["raw_s"]) for case in log["cases"].values()), default=0)
    lines = [f"### {title(log)}", "", "```bash", log["command"], "```", ""]
    hardware = f"{log['hardware']}{threads}, {log.get('clock', 'wall clock')}"
    lines += [f"{hardware}; Python {log['python']}, {versions}. {repeats} repetitions. {settings}.", ""]
    lines += [*table(["ratio", "median", "lowest", "highest", "aim", "reached"]), *map(ratio_line, log["ratios"]), ""]
    lines += [*table(["case", "median", "peak memory"]), *(case_line(*case) for case in log["cases"].items()), ""]
    lines += growth(log)
    return lines + [text for note in log["notes"] for text in (note, "")]


def told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def ratio_line(ratio: Mapping[str, Any]) -> str:
    aims = [f"at {name} {ratio[name]:g}" for name in ("most", "least") if ratio[name] is not None]
    verdict = {None: "", True: "yes", False: "**no**"}[ratio["reached"]]
    return line([each(ratio), *(number(ratio, name) for name in ("ratio", "low", "high")), " and ".join(aims), verdict])


def case_line(name: str, case: Mapping[str, Any]) -> str:
    peak = "" if case["peak_bytes"] is None else f"{case['peak_bytes'] / 2**20:.1f} MiB"
    return line([name.replace("|", "\\|"), f"{1e3 * case['median_s']:.2f} ms", peak])


def growth(log: Log) -> list[str]:
    """Exponents and the picture of a log that varies a size."""
    if "curves" not in log["settings"]:
        return []
    over, found = log["settings"]["over"], plots.curves(log)
    fits = ", ".join(f"{name} {plots.exponent(points):.2f}" for name, points in found.items())
    name = f"{log['job']}-{device(log)}.png"
    drawn = f"![Seconds against number of {over}](plots/{name})"
    return [f"Exponents of time ~ {over} ^ x, fitted to the upper half of the sizes: {fits}.", "", drawn, ""]


# ---- the document ----------------------------------------------------------------------------------------------------
def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str]) -> list[str]:
    return [line(heads), line("---" for _ in heads)]


def render(logs: Sequence[Log], remarks: Path = REMARKS) -> str:
    """The whole document."""
    lines = [
        "# Speed",
        "",
        "Every number is of a log in [`logs/speed`](logs/speed), which holds command, versions, hardware and all raw",
        "times; [`speed/results.py`](speed/results.py) makes this page of them. All cases of a run take turns, so that",
        "a slow moment hits all; a ratio is the median of the pairwise quotients. Where times are the CPU time of one",
        "thread, other work on the machine disturbs them least. Peak memory is that of tensors that a run makes,",
        "weights not counted.",
        "",
        measured_on(logs),
        "",
        *overview(logs),
        "",
    ]
    for row in ROWS:
        mine = [log for log in logs if script(log) in row.scripts]
        said = [remarks / f"{name}.md" for name in row.scripts if (remarks / f"{name}.md").exists()]
        if mine or said:
            lines += [f"## {row.job[0].upper()}{row.job[1:]}", ""]
            lines += [text for file in said for text in (file.read_text().strip(), "")]
            lines += [text for log in mine for text in section(log)]
    return "\n".join(lines).rstrip() + "\n"


def measured_on(logs: Sequence[Log]) -> str:
    """What was measured on what, and what was not."""
    lacking = {
        shown: [row.job for row in ROWS if not any(script(x) in row.scripts and device(x) == name for x in logs)]
        for name, shown in DEVICES.items()
    }
    said = []
    for shown, jobs in lacking.items():
        if len(jobs) == len(ROWS):
            said.append(f"**Nothing here was measured on a {shown}.**")
        elif jobs:
            said.append(f"Not measured on a {shown}: {'; '.join(jobs)}.")
    if len(lacking["GPU"]) == len(ROWS):
        said.append(
            "The scripts take `--device cuda --dtype bfloat16` and then build the published configurations with random "
            "weights; no aim for a GPU counts as reached, and ratios of small models on a CPU do not stand for it."
        )
    return " ".join(said) or "Everything was measured on both."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    options = parser.parse_args(arguments)
    text = render(read(measure.LOGS))
    if options.check:
        same = RESULTS.exists() and RESULTS.read_text() == text
        print("RESULTS.md is what the logs say" if same else "RESULTS.md is not what the logs say")
        return 0 if same else 1
    RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
