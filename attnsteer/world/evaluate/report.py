"""Scores of the shipped models as text, and kept: scores.json holds them, README.md shows them as tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PICTURES = {
    "one": "one",
    "two": "two",
    "two_exact": "two, exactly",
    "three": "three",
    "count": "number",
    "frame": "frame",
    "place": "place",
    "background": "background",
}
HEAD = """# The models of the small world

How each was made and what it knows: the `README.md` in its folder. What they score, all by one command:

```
attnsteer world evaluate all --write
```

Everything is asked of scenes and combinations of categories that no training scene has. `scores.json` has the raw
numbers and the versions they were measured with.
"""
PAINTERS = """
## Pictures

Share of pictures, in percent, on which the judge sees what the prompt asks for: one object and no other; both of two,
or all of three (whatever else); of two exactly those; "two dogs" and nothing else; a frame around the right one of
two; one left of or above the other; the background. Of one object there are four times as many pictures as of every
other kind. "True scenes" are rendered from the same prompts: what they lack is the judge's own mistake.

"""
READER = """
## The judge

Rendered test scenes with turned, hidden and framed objects and graded backgrounds. Of a category: half the share of
scenes with it where the judge sees it, and half the share of scenes without it where it does not.

"""
WORDS = {
    "worst_category": "worst of the 67 categories",
    "mean_category": "mean of the 67 categories",
    "worst_core_category": "worst of the 28 core categories",
    "mean_core_category": "mean of the 28 core categories",
    "categories": "scenes with exactly the right categories",
    "counts": "scenes with exactly the right numbers",
    "frames": "objects with the right frame, or none",
    "backgrounds": "scenes with the right background, both ends of a graded one",
}
ANSWERER = "\n## Answers\n\n"


def text(name: str, scores: Mapping[str, float]) -> str:
    """One line for each score."""
    return "\n".join([name, *(f"  {key.replace('_', ' '):32} {value:.4g}" for key, value in scores.items())])


def row(name: str, scores: Mapping[str, float]) -> str:
    """A picture model's row of the table."""
    cells = [_percent(scores[key]) if key in scores else "" for key in PICTURES]
    pace = f"{scores['seconds_per_picture']:.2g}" if "seconds_per_picture" in scores else ""
    head = [f"{scores[key]:g}" if key in scores else "" for key in ("guidance", "pictures")]
    return f"| {' | '.join([name, *head, *cells, pace])} |"


def write(name: str, scores: Mapping[str, float], folder: Path) -> None:
    """Keep a model's scores in scores.json of the folder, and write its README.md anew."""
    file = folder / "scores.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    versions = {package: version(package) for package in ("torch", "diffusers", "transformers")}
    made = {"command": f"attnsteer world evaluate {name.removeprefix('world-')} --write", **versions}
    kept[name] = {"scores": dict(scores), **made, "python": platform.python_version()}
    file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").write_text(tables({model: entry["scores"] for model, entry in kept.items()}))


def tables(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The whole README.md; a model without scores has no row."""
    titles = ["model", "guidance", "pictures", *PICTURES.values(), "s a picture"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [row(name, scores[name]) for name in ("world-sd", "world-sd3", "world-flux") if name in scores]
    judge, llava = scores.get("world-judge", {}), scores.get("world-llava", {})
    lines.append(row("true scenes", {key: judge[f"true_{key}"] for key in PICTURES if f"true_{key}" in judge}))
    page = HEAD + PAINTERS + "\n".join(lines) + "\n"
    if judge:
        page += READER + _list({WORDS[key]: judge[key] for key in WORDS})
    return page + (ANSWERER + _list({key.replace("_", " "): value for key, value in llava.items()}) if llava else "")


def _list(scores: Mapping[str, float]) -> str:
    lines = [f"| {key} | {_percent(value)} |" for key, value in scores.items() if value <= 1]  # no counts of scenes
    return "\n".join(["| what | % |", "|---|---|", *lines]) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
