"""The part of report.html that shows what the methods said about some pictures, and where the plain model looks."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .answered import Answered
from .looks import Look, Looks
from .samples import Sample
from .store import Entry
from .tasks import Task, marked, wrong

EXAMPLES = 12
"""Pictures of each task that are shown."""
SIDE, HEAT_SIDE = 224, 160
"""Longer sides of pictures and of their heat maps in pixels."""
LEGENDS = {
    "chair": "Objects named: <mark>there</mark>, <mark class='made-up'>made up</mark>.",
    "pope": "Answers that are <mark class='made-up'>wrong</mark> are marked.",
}
HEAT = (
    "Heat: where {} looks while it says the word (mean over the heads of the second half of the layers, without "
    "attention sinks; each map in colours up to its own maximum)."
)


def examples(comparison: Answered, task: Task, looks: Looks | None) -> list[str]:
    """Headline, legend and examples of a task; nothing where there are no answers."""
    answers = comparison.complete(task)
    samples = {sample.id: sample for sample in task.samples}
    shown = chosen(answers)
    if not shown:
        return []
    plain = comparison.methods[0]
    seen: dict[str, Look] = {}
    if looks is not None and not plain.processors:
        found = {n: looks.of(comparison.key(task, samples[n], plain), samples[n], answers[n][0]) for n in shown}
        seen = {name: look for name, look in found.items() if look is not None}
    legend = [f"Where the methods differ most. {LEGENDS.get(task.name, '')}", *_heat_notes(plain.label, seen)]
    head = ["<h3>Examples</h3>", *(f'<p class="notes">{line}</p>' for line in legend)]
    return head + [_example(comparison, samples[name], answers[name], seen.get(name)) for name in shown]


def _heat_notes(label: str, seen: Mapping[str, Look]) -> list[str]:
    reasons = sorted({look.reason for look in seen.values() if look.reason})
    missing = sum(bool(look.reason) for look in seen.values())
    said = [HEAT.format(html.escape(label))] if missing < len(seen) else []
    return said + ([f"Heat maps left out: {missing}; {html.escape('; '.join(reasons))}"] if reasons else [])


def chosen(answers: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Samples on which methods differ most: in what is counted first, then in words. The first ones where all agree."""

    def disagreement(name: str) -> tuple[int, int]:
        entries = answers[name]
        counted = {
            repr((e["counts"].get("made_up"), e["counts"].get("right"), e["counts"].get("said"))) for e in entries
        }
        return -len(counted), -len({entry["output"] for entry in entries})

    return sorted(answers, key=disagreement)[:EXAMPLES]  # a stable sort: ties keep the order of the samples


def _example(comparison: Answered, sample: Sample, entries: Sequence[Entry], look: Look | None) -> str:
    said = "\n".join(
        f'<p><span class="method">{html.escape(method.label)}</span><br>{highlighted(entry)}</p>'
        for method, entry in zip(comparison.methods, entries, strict=True)
    )
    truth = html.escape(f"truth: {', '.join(sample.truth)}")
    about = f'<p><strong>{html.escape(sample.prompt)}</strong><br><span class="notes">{truth}</span></p>'
    picture: Any = sample.picture.open()
    figures = [_figure(_small(picture), sample.image)]
    if look is not None and look.heat:
        caption = f"“{look.word}”, {100 * look.share:.1f} % of the attention on the picture"
        figures.append(_figure(look.over(picture, HEAT_SIDE), f"heat map of {look.word}", caption))
    return f'<div class="example">{"".join(figures)}<div>{about}{said}</div></div>'


def _figure(picture: Any, alt: str, caption: str = "") -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="{data_uri(file.getvalue())}">{below}</figure>'


def _small(picture: Any) -> Any:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def data_uri(content: bytes) -> str:
    """A PNG file as the address of a picture."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def highlighted(entry: Entry) -> str:
    """An answer with its objects marked; of a question the whole answer where it is wrong."""
    text, parts, place = entry["output"], [], 0
    for start, end, made_up in marked(entry["counts"]):
        kind = ' class="made-up"' if made_up else ""
        parts += [html.escape(text[place:start]), f"<mark{kind}>{html.escape(text[start:end])}</mark>"]
        place = end
    said = "".join([*parts, html.escape(text[place:])]) or "<em>(nothing)</em>"
    return f'<mark class="made-up">{said}</mark>' if wrong(entry["counts"]) else said
