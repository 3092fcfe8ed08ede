"""The results as tables: text for a terminal, Markdown, LaTeX, and CSV with everything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .results import ALL, Results

MARK = "*"
ARROWS = {"lower": "↓", "higher": "↑", "": ""}
TITLES = {"chair": "Descriptions (CHAIR)", "pope": "Questions (POPE)"}

Row = list[str]


def table(results: Results, task: str, group: str = ALL) -> tuple[Row, list[Row]]:
    """Headings and rows. Headline metrics with interval, difference and its interval; guards with their difference."""
    metrics = results["tasks"][task]["metrics"]
    headings = ["method"]
    for metric in metrics:
        title = f"{metric['title']} {ARROWS[metric['better']]}".strip()
        headings += [title, "difference"] if metric["headline"] else [title]
    found = results["tasks"][task]["groups"][group]["methods"]
    return headings, [[label, *_cells(metrics, values)] for label, values in found.items()]


def _cells(metrics: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Iterator[str]:
    for metric in metrics:
        found, percent = values[metric["name"]], metric["percent"]
        value, change = number(found["value"], percent), found.get("difference")
        if metric["headline"]:
            yield f"{value} {interval(found, percent)}"
            yield difference(change, percent) if change else ""
        else:
            mark = MARK if change and change["marked"] else ""
            yield f"{value} ({number(change['value'], percent, sign=True)}){mark}" if change else value


def number(value: float, percent: bool = True, sign: bool = False) -> str:
    """A share in percent, or a number, with one decimal; 0 has no sign."""
    text = f"{100 * value if percent else value:{'+' if sign else ''}.1f}"
    return text.lstrip("+-") if float(text) == 0 else text


def interval(found: Mapping[str, Any], percent: bool = True, sign: bool = False) -> str:
    return f"[{number(found['low'], percent, sign)}, {number(found['high'], percent, sign)}]"


def difference(change: Mapping[str, Any], percent: bool = True) -> str:
    """With its interval, and the mark where that does not hold 0."""
    mark = f" {MARK}" if change["marked"] else ""
    return f"{number(change['value'], percent, sign=True)} {interval(change, percent, sign=True)}{mark}"


def notes(results: Results, task: str) -> list[str]:
    """What must be said about a table."""
    found = results["tasks"][task]
    everything = found["groups"].get(ALL)
    if everything is None:
        return ["No sample was answered by all methods."]
    said = [
        f"{found['samples']} answers of each method about {everything['images']} pictures. Shares in percent; "
        f"{100 * results['level']:g} % intervals from {results['draws']} bootstrap draws of pictures, seed "
        f"{results['seed']}. {MARK}: the interval of the paired difference to the baseline does not hold 0 (not "
        "corrected for the number of comparisons).",
    ]
    for metric in found["metrics"]:
        sizes = [
            f"{_resolvable(values[metric['name']]['difference'], metric['percent'])} ({label})"
            for label, values in everything["methods"].items()
            if "difference" in values[metric["name"]]
        ]
        if metric["headline"] and sizes:
            said.append(f"Smallest difference of {metric['title']} that so many pictures show: {', '.join(sizes)}.")
    if found["left_out"]:
        said.append(f"{found['left_out']} samples are left out: not every method has answered them.")
    flips = results.get("verified", {}).get(task)
    if flips:
        shares = [f"{count} of {results['verified']['samples'][task]} ({label})" for label, count in flips.items()]
        said.append(f"Other answers when asked alone and not in a batch: {', '.join(shares)}.")
    return said


def _resolvable(change: Mapping[str, Any], percent: bool) -> str:
    """A bootstrap over pictures that are all alike knows no spread."""
    return number(change["resolvable"], percent) if change["resolvable"] else "unknown, as no picture differs"


def groups(results: Results, task: str) -> tuple[Row, list[Row]]:
    """The headline metrics by group; no rows where there is one group."""
    found = results["tasks"][task]
    headline = [metric for metric in found["metrics"] if metric["headline"]]
    headings = ["group", "method"]
    for metric in headline:
        headings += [f"{metric['title']} {ARROWS[metric['better']]}", "difference"]
    rows = [
        [group, label, *_cells(headline, values)]
        for group, part in found["groups"].items()
        if group != ALL
        for label, values in part["methods"].items()
    ]
    return headings, rows


# ---- formats ---------------------------------------------------------------------------------------------------------
def text(headings: Row, rows: Sequence[Row]) -> str:
    """Columns side by side."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [headings, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def markdown(headings: Row, rows: Sequence[Row]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def latex(headings: Row, rows: Sequence[Row]) -> str:
    """A tabular for the package booktabs."""
    head, *body = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in [headings, *rows]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def _escaped(cell: str) -> str:
    for sign in "&%$#_{}":
        cell = cell.replace(sign, f"\\{sign}")
    return cell.replace("↓", r"$\downarrow$").replace("↑", r"$\uparrow$").replace("[", "{[}").replace("]", "{]}")


def page(results: Results) -> str:
    """table.md: every task with its notes, and its groups."""
    parts = [f"# {results['model']}"]
    for task in results["tasks"]:
        parts += [f"## {TITLES.get(task, task)}"]
        if results["tasks"][task]["groups"]:
            parts += [markdown(*table(results, task))]
        parts += ["\n".join(f"{line}  " for line in notes(results, task)).rstrip()]
        headings, rows = groups(results, task)
        parts += [markdown(headings, rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def document(results: Results) -> str:
    """table.tex: one tabular for each task."""
    found = [latex(*table(results, task)) for task in results["tasks"] if results["tasks"][task]["groups"]]
    return "\n\n".join(found) + "\n"


COLUMNS = ("task", "group", "method", "metric", "value", "low", "high", "numerator", "denominator")
CHANGES = ("value", "low", "high", "p", "resolvable", "marked")


def lines(results: Results) -> str:
    """table.csv: one line for each number, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"difference_{name}" for name in CHANGES), "images"])
    for task, found in results["tasks"].items():
        for group, part in found["groups"].items():
            for label, values in part["methods"].items():
                for name, value in values.items():
                    change = value.get("difference", {})
                    head = [task, group, label, name, *(value[column] for column in COLUMNS[4:])]
                    writer.writerow([*head, *(change.get(key, "") for key in CHANGES), part["images"]])
    return file.getvalue()
