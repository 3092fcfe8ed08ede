"""report.html: tables, plots, and what the methods said about some pictures, in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .results import Results, complete
from .run import Comparison
from .samples import Sample
from .store import Entry
from .tables import MARK, TITLES, groups, notes, table
from .tasks import Task, marked, wrong

EXAMPLES = 12
"""Pictures of each task that are shown."""
SIDE = 224  # pixels
LEGENDS = {
    "chair": "Objects named: <mark>there</mark>, <mark class='made-up'>made up</mark>.",
    "pope": "Answers that are <mark class='made-up'>wrong</mark> are marked.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #141418; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { border-bottom: 1px solid #d6d6da; padding: .3rem .45rem; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
.name { text-align: left; }
.next td { border-top: 2px solid #a8a8b0; }
.wide { overflow-x: auto; }
.notes { color: #6e6e78; margin: .2rem 0; }
.marked { font-weight: 600; }
.plots img { max-width: 100%; margin: .5rem 0; display: block; }
.example { display: flex; gap: 1.2rem; margin: 1.2rem 0; border-top: 1px solid #d6d6da; padding-top: 1.2rem; }
.example img { width: 192px; align-self: flex-start; image-rendering: pixelated; }
.example p { margin: .2rem 0; }
.method { color: #6e6e78; font-size: 13px; }
mark { border-radius: 3px; padding: 0 2px; background: #d2eed8; }
mark.made-up { background: #f9c8c4; text-decoration: underline; }
"""


def page(comparison: Comparison, results: Results, plots: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        plots: PNG files by name; a plot whose name starts with a task's belongs to it.
    """
    parts = [f"<h1>{html.escape(results['model'])}</h1>"]
    for task in comparison.tasks:
        found = results["tasks"][task.name]
        parts.append(f"<h2>{html.escape(TITLES.get(task.name, task.name))}</h2>")
        if found["groups"]:
            parts.append(_table(*table(results, task.name), names=1))
        parts += [f'<p class="notes">{html.escape(line)}</p>' for line in notes(results, task.name)]
        headings, rows = groups(results, task.name)
        parts += [_table(headings, rows, names=2)] if rows else []
        parts.append('<div class="plots">')
        parts += [_plot(name, plots[name]) for name in plots if name.startswith(task.name)]
        parts.append("</div>")
        parts += _examples(comparison, task)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(results['model'])}: comparison</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """Rows whose first ``names`` columns are names; of several, the first is said once for all rows that share it."""
    head = "".join(_cell("th", cell, number < names) for number, cell in enumerate(headings))
    body, before = [], ""
    for row in rows:
        same = names > 1 and row[0] == before
        cells = ["" if same else row[0], *row[1:]]
        kind = ' class="next"' if names > 1 and before and not same else ""
        body.append(f"<tr{kind}>{''.join(_cell('td', cell, n < names) for n, cell in enumerate(cells))}</tr>")
        before = row[0]
    lines = "\n".join(body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(tag: str, text: str, name: bool) -> str:
    kind = "name" if name else "marked" if text.endswith(MARK) else ""
    inside = f'{tag} class="{kind}"' if kind else tag
    return f"<{inside}>{html.escape(text)}</{tag}>"


def _plot(name: str, content: bytes) -> str:
    return f'<img alt="{html.escape(name)}" src="{_data(content)}">'


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# ---- examples --------------------------------------------------------------------------------------------------------
def _examples(comparison: Comparison, task: Task) -> list[str]:
    answers = complete(comparison, task)
    samples = {sample.id: sample for sample in task.samples}
    shown = chosen(answers)
    if not shown:
        return []
    legend = f"Where the methods differ most. {LEGENDS.get(task.name, '')}"
    return [f"<h3>Examples</h3><p class='notes'>{legend}</p>"] + [
        _example(comparison, samples[name], answers[name]) for name in shown
    ]


def chosen(answers: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Samples on which methods differ most: in what is counted first, then in words. The first ones where all agree."""

    def disagreement(name: str) -> tuple[int, int]:
        entries = answers[name]
        counted = {
            repr((e["counts"].get("made_up"), e["counts"].get("right"), e["counts"].get("said"))) for e in entries
        }
        return -len(counted), -len({entry["output"] for entry in entries})

    return sorted(answers, key=disagreement)[:EXAMPLES]  # a stable sort: ties keep the order of the samples


def _example(comparison: Comparison, sample: Sample, entries: Sequence[Entry]) -> str:
    said = "\n".join(
        f'<p><span class="method">{html.escape(method.label)}</span><br>{highlighted(entry)}</p>'
        for method, entry in zip(comparison.methods, entries, strict=True)
    )
    truth = html.escape(f"truth: {', '.join(sample.truth)}")
    about = f'<p><strong>{html.escape(sample.prompt)}</strong><br><span class="notes">{truth}</span></p>'
    picture = f'<img alt="{html.escape(sample.image)}" src="{_picture(sample)}">'
    return f'<div class="example">{picture}<div>{about}{said}</div></div>'


def _picture(sample: Sample) -> str:
    picture: Any = sample.picture.open()
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _data(file.getvalue())


def highlighted(entry: Entry) -> str:
    """An answer with its objects marked; of a question the whole answer where it is wrong."""
    text, parts, place = entry["output"], [], 0
    for start, end, made_up in marked(entry["counts"]):
        kind = ' class="made-up"' if made_up else ""
        parts += [html.escape(text[place:start]), f"<mark{kind}>{html.escape(text[start:end])}</mark>"]
        place = end
    said = "".join([*parts, html.escape(text[place:])]) or "<em>(nothing)</em>"
    return f'<mark class="made-up">{said}</mark>' if wrong(entry["counts"]) else said
