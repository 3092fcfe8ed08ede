"""Do the methods help? Every method against the plain model and against controls of the same strength, on the small
world.

    python benchmarks/effects.py                                     # all tables: hours on a CPU core; resumes
    python benchmarks/effects.py words --prompts 20 --num-seeds 2 --out outputs/effects-trial

Scores are appended to OUT/<table>.jsonl case by case: a run that was killed goes on where it was. OUT/<table>.json has
the numbers, OUT/<table>.md the table: for each arm its mean, in brackets the difference to the first arm and, behind a
semicolon, to its control, both paired by prompt and seed, with the interval that holds 95 % of a bootstrap over prompts
(10,000 draws). * marks p < .05 against the first arm, after Holm's correction over the arms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import TABLES, Arm, Case, Table
from speed.measure import environment

import attnsteer
from attnsteer.metrics.statistics import Effect, holm, paired_bootstrap
from attnsteer.world import assets
from attnsteer.world.evaluate.pictures import load

HERE = Path(__file__).parent
SEED = 5_000
"""Of the first picture of a case; every arm has the same."""
SHARES = ("both", "exact", "placed")
"""Scores that are shown in percent."""
Known = dict[tuple[str, str], dict[str, list[float]]]
"""(arm, prompt) -> scores."""


# ---- painting --------------------------------------------------------------------------------------------------------
def paint(pipe: Any, table: Table, arm: Arm, case: Case, number: int, seeds: int) -> list[dict[int, Any]]:
    """One case of one arm: for each seed the picture of each prompt."""
    method = arm.make(pipe, case, number) if arm.make else None
    guidance = table.guidance if arm.guidance is None else arm.guidance
    call = {**assets.call(type(pipe).__name__, guidance), "num_inference_steps": table.steps}
    rows = [(seed, row) for seed in range(seeds) for row in arm.rows or range(len(case.prompts))]
    first = SEED + seeds * len(case.prompts) * number
    sources = [torch.Generator().manual_seed(first + seed * len(case.prompts) + row) for seed, row in rows]
    call |= {"negative_prompt": [""] * len(rows)}
    with attnsteer.steer(pipe, method) if method else nullcontext():
        painted = pipe([case.prompts[row] for _, row in rows], generator=sources, **call).images
    found: list[dict[int, Any]] = [{} for _ in range(seeds)]
    for (seed, row), picture in zip(rows, painted, strict=True):
        found[seed][row] = picture
    return found


def run(name: str, given: argparse.Namespace) -> Known:
    """All cases of a table; what its file knows already is not painted again."""
    from tqdm import tqdm

    table = TABLES[name]()
    wanted = table.cases(given.prompts)
    chosen = [arm for arm in table.arms if not given.arms or arm in given.arms]
    file = given.out / f"{name}.jsonl"
    prompts = {case.prompts[-1] for case in wanted}
    known = {key: scores for key, scores in read(file, settings(name, table, given)).items() if key[1] in prompts}
    jobs = [(arm, number) for number in range(len(wanted)) for arm in chosen]
    missing = [(arm, number) for arm, number in jobs if (arm, wanted[number].prompts[-1]) not in known]
    if not missing:
        return known
    pipe = load(assets.path(f"models/{table.model}"), given.device)
    with file.open("a") as log:
        for arm, number in tqdm(missing, name, mininterval=1 if sys.stderr.isatty() else 60):
            case = wanted[number]
            pictures = paint(pipe, table, table.arms[arm], case, number, given.num_seeds)
            scores = table.score(case, pictures)
            print(json.dumps({"arm": arm, "prompt": case.prompts[-1], "scores": scores}), file=log, flush=True)
            known[arm, case.prompts[-1]] = scores
    return known


def settings(name: str, table: Table, given: argparse.Namespace) -> dict[str, Any]:
    """What scores depend on besides arm and prompt."""
    call: dict[str, Any] = {"model": table.model, "guidance": table.guidance, "steps": table.steps}
    weights = hashlib.sha256()
    for file in sorted(assets.path(f"models/{table.model}").rglob("*.safetensors")):
        weights.update(file.read_bytes())
    call |= {"weights": weights.hexdigest()[:16], "parameters": dict(table.parameters)}
    return {"table": name, **call, "seeds": given.num_seeds, "first_seed": SEED}


def read(file: Path, wanted: dict[str, Any]) -> Known:
    """The scores in a file, whose first line says how they were made; a line that a kill cut off is dropped."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted) + "\n")
    text = file.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    head, *lines = map(json.loads, text.splitlines())
    if head != wanted:
        raise SystemExit(f"{file} was made otherwise ({head}): give another --out.")
    return {(line["arm"], line["prompt"]): line["scores"] for line in lines}


# ---- tables ----------------------------------------------------------------------------------------------------------
def compare(known: Known, arm: str, other: str, score: str) -> Effect:
    """Paired over all prompts that both arms have."""
    prompts = [prompt for name, prompt in known if name == arm and (other, prompt) in known]
    arms = ([known[name, prompt][score] for prompt in prompts] for name in (arm, other))
    return paired_bootstrap(*arms)


def summary(table: Table, known: Known) -> list[dict[str, Any]]:
    """For each score and arm: mean, corrected p-value, differences to the baseline and to the arm's controls."""
    rows = []
    for score in table.columns:
        having = {arm for (arm, _), scores in known.items() if score in scores}
        baseline, *others = [arm for arm in table.arms if arm in having]
        effects = {arm: compare(known, arm, baseline, score) for arm in others}
        means = [np.mean(scores[score]) for (arm, _), scores in known.items() if arm == baseline]
        rows.append({"arm": baseline, "score": score, "mean": float(np.mean(means)), "over": {}})
        for (arm, effect), p in zip(effects.items(), holm([e.p for e in effects.values()]), strict=True):
            controls = [name for name in others if table.arms[name].control == arm]
            over = {baseline: effect, **{name: compare(known, arm, name, score) for name in controls}}
            differences = {name: asdict(found) for name, found in over.items()}
            rows.append({"arm": arm, "score": score, "mean": effect.mean, "p": p, "over": differences})
    return rows


def markdown(table: Table, rows: Sequence[dict[str, Any]]) -> str:
    """A line for each arm: its means, and their differences to the baseline and to its controls."""
    cells = {(row["arm"], row["score"]): cell(row) for row in rows}
    lines = [["arm", *table.columns.values()], ["---"] * (1 + len(table.columns))]
    arms = dict.fromkeys(row["arm"] for row in rows)
    lines += [[arm, *(cells.get((arm, score), "") for score in table.columns)] for arm in arms]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: dict[str, Any]) -> str:
    """``mean (difference to none [interval]*; to the control [interval])``; shares in percent."""
    share = row["score"] in SHARES
    factor, digits = (100, 1) if share else (1, 3)
    shown = [
        "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(factor * e[key] for key in ("delta", "low", "high")), d=digits)
        for e in row["over"].values()
    ]
    if shown and row["p"] < 0.05:
        shown[0] += "*"
    return f"{factor * row['mean']:.{digits}f}" + (f" ({'; '.join(shown)})" if shown else "")


def page(table: Table, rows: Sequence[dict[str, Any]], given: argparse.Namespace) -> str:
    """The table with its title."""
    counts = f"{given.prompts} prompts, {given.num_seeds} seeds each, {table.steps} steps, guidance {table.guidance:g}"
    return f"**{table.title}** ({table.model}, {counts})\n\n{markdown(table, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--prompts", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--num-seeds", type=int, default=4, help="pictures of each prompt and arm (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "logs" / "effects", help="scores (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    tables = {name: TABLES[name]() for name in given.tables or TABLES}  # what lacks something says so now
    for name, table in tables.items():
        known = run(name, given)
        rows = summary(table, known)
        report = {**environment(given.device), **settings(name, table, given), "rows": rows}
        (given.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        text = page(table, rows, given)
        (given.out / f"{name}.md").write_text(text)
        print(f"\n{text}")


if __name__ == "__main__":
    main()
