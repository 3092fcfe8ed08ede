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
from .tasks import Task, marked

EXAMPLES = 12
"""Pictures of each task that are shown."""
SIDE = 224  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #141418; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { border-bottom: 1px solid #d6d6da; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
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
            parts.append(_table(*table(results, task.name)))
        parts += [f'<p class="notes">{html.escape(line)}</p>' for line in notes(results, task.name)]
        headings, rows = groups(results, task.name)
        parts += [_table(headings, rows)] if rows else []
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


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<td class="marked">{html.escape(text)}</td>' if text.endswith(MARK) else f"<td>{html.escape(text)}</td>"


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
    legend = "What the methods say differently: <mark>there</mark>, <mark class='made-up'>made up</mark>."
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
    about = f"<p><strong>{html.escape(sample.prompt)}</strong><br>{html.escape(', '.join(sample.truth))}</p>"
    picture = f'<img alt="{html.escape(sample.image)}" src="{_picture(sample)}">'
    return f'<div class="example">{picture}<div>{about}{said}</div></div>'


def _picture(sample: Sample) -> str:
    picture: Any = sample.picture.open()
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _data(file.getvalue())


def highlighted(entry: Entry) -> str:
    """An answer with its objects marked."""
    text, parts, place = entry["output"], [], 0
    for start, end, made_up in marked(entry["counts"]):
        kind = ' class="made-up"' if made_up else ""
        parts += [html.escape(text[place:start]), f"<mark{kind}>{html.escape(text[start:end])}</mark>"]
        place = end
    return "".join([*parts, html.escape(text[place:])]) or "<em>(nothing)</em>"
