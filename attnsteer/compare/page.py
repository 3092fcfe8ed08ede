"""report.html: tables, plots, and what the methods said about some pictures, in one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from .answered import Answered
from .examples import data_uri, examples
from .looks import Looks
from .results import Results
from .tables import MARK, TITLES, groups, notes, table

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
.example img { width: 192px; display: block; image-rendering: pixelated; }
.example figure { margin: 0; width: 192px; flex: none; }
figcaption { color: #6e6e78; font-size: 12px; line-height: 1.3; margin-top: .3rem; }
.example p { margin: .2rem 0; }
.method { color: #6e6e78; font-size: 13px; }
mark { border-radius: 3px; padding: 0 2px; background: #d2eed8; }
mark.made-up { background: #f9c8c4; text-decoration: underline; }
"""


def page(comparison: Answered, results: Results, plots: Mapping[str, bytes], looks: Looks | None = None) -> str:
    """The whole page.

    Args:
        plots: PNG files by name; a plot whose name starts with a task's belongs to it.
        looks: heat maps of the examples; None leaves them out.
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
        parts += examples(comparison, task, looks)
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
    return f'<img alt="{html.escape(name)}" src="{data_uri(content)}">'
