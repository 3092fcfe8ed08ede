"""Numbers of the report: against naive loops, marked only where the interval says so, the same for the same seed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnsteer.compare import Comparison, results, tables
from attnsteer.compare.report import made_up, note_samples, write
from attnsteer.compare.results import grouped_samples

from .common import METHODS, WORDS, Parrot, comparison, tasks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison of 40 scenes whose answers are made up; VHR draws other answers than the baseline, as good ones."""
    made = comparison(tmp_path_factory.mktemp("results"), by=Parrot(), tasks=tasks(40), batch_size=7)
    made.run()
    made.answers.close()
    return made


@pytest.fixture(scope="module")
def numbers(found: Comparison) -> dict[str, Any]:
    return results(found, "parrot", seed=0, draws=2000)


def said(found: Comparison, task: Any, label: str) -> list[Any]:
    method = next(method for method in METHODS if method.label == label)
    return [found.answers.answers[found.key(task, sample, method)] for sample in task.samples]


def test_captions_are_counted_as_by_hand(found: Comparison, numbers: dict[str, Any]) -> None:
    task = found.tasks[0]
    for label in ("baseline", "VHR", "strong"):
        mentions = wrong = captions = right = there = words = cut = 0
        for sample, entry in zip(task.samples, said(found, task, label), strict=True):
            named = entry["output"].removeprefix("A picture of ").removesuffix(".").split(" and ")
            named = [name for name in named if name]
            mentions += len(named)
            wrong += sum(name not in sample.truth for name in named)
            captions += any(name not in sample.truth for name in named)
            right += len(set(named) & set(sample.truth))
            there += len(set(sample.truth))
            words += len(entry["output"].split())
            cut += entry["finish"] == "length"
        shown = numbers["tasks"]["chair"]["groups"]["all"]["methods"][label]
        assert shown["chair_i"]["value"] == pytest.approx(wrong / mentions)
        assert (shown["chair_i"]["numerator"], shown["chair_i"]["denominator"]) == (wrong, mentions)
        assert shown["chair_s"]["value"] == pytest.approx(captions / 40)
        assert shown["recall"]["value"] == pytest.approx(right / there)
        assert shown["words"]["value"] == pytest.approx(words / 40)
        assert shown["truncated"]["value"] == pytest.approx(cut / 40)


def test_questions_are_counted_by_split_and_together(found: Comparison, numbers: dict[str, Any]) -> None:
    task = found.tasks[1]
    groups = numbers["tasks"]["pope"]["groups"]
    pooled = []
    for split in ("random", "popular", "adversarial"):
        pairs = [
            (sample.truth == ("yes",), not entry["output"].startswith("No"))
            for sample, entry in zip(task.samples, said(found, task, "strong"), strict=True)
            if split in sample.groups
        ]
        assert len(pairs) == 80
        pooled += pairs
        hits, yes = sum(a and b for a, b in pairs), sum(b for _, b in pairs)
        assert groups[split]["methods"]["strong"]["f1"]["value"] == pytest.approx(2 * hits / (40 + yes))
    values = groups["all"]["methods"]["strong"]
    assert values["accuracy"]["value"] == pytest.approx(sum(a == b for a, b in pooled) / 240)
    assert values["yes"]["value"] == pytest.approx(sum(b for _, b in pooled) / 240)
    assert groups["all"] | {"methods": None} == {"images": 40, "samples": 240, "methods": None}


def test_differences_are_paired_and_marked_where_the_interval_says_so(
    found: Comparison, numbers: dict[str, Any]
) -> None:
    task = found.tasks[0]
    plain, strong = ([e["counts"] for e in said(found, task, label)] for label in ("baseline", "strong"))
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(2000):
        places = rng.integers(40, size=40)
        rates = [
            sum(len(counts[i]["made_up"]) for i in places) / sum(counts[i]["mentions"] for i in places)
            for counts in (strong, plain)
        ]
        drawn.append(rates[0] - rates[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    change = numbers["tasks"]["chair"]["groups"]["all"]["methods"]["strong"]["chair_i"]["difference"]
    assert change["low"] == pytest.approx(low, abs=0.02)
    assert change["high"] == pytest.approx(high, abs=0.02)
    assert change["marked"]
    assert change["resolvable"] == pytest.approx(2.8 * np.std(drawn), rel=0.1)
    marks = []
    for part in numbers["tasks"].values():
        for group in part["groups"].values():
            for label, values in group["methods"].items():
                assert all(("difference" in value) == (label != "baseline") for value in values.values())
                marks += [v["difference"] for v in values.values() if "difference" in v]
    assert all(mark["marked"] == (mark["low"] > 0 or mark["high"] < 0) for mark in marks)
    assert not all(mark["marked"] for mark in marks)


def test_samples_that_one_method_lacks_are_left_out_for_all(tmp_path: Path) -> None:
    class Silent(Parrot):
        def __call__(self, samples: Any, methods: Any, limit: int) -> Any:
            if any(s.id == "lonely-0002" for s in samples) and any(m.label == "strong" for m in methods):
                raise ValueError("silence")
            return super().__call__(samples, methods, limit)

    made = comparison(tmp_path, by=Silent(), tasks=tasks(6))
    made.run()
    made.answers.close()
    part = results(made, "parrot", draws=100)["tasks"]["chair"]
    assert (part["samples"], part["left_out"]) == (5, 1)
    assert part["groups"]["all"]["images"] == 5
    assert "1 samples are left out" in "\n".join(tables.notes(results(made, "parrot", draws=100), "chair"))


def test_groups_hold_every_sample(found: Comparison) -> None:
    for task in found.tasks:
        groups = grouped_samples(task.samples)
        assert {s.id for s in groups["all"]} == {s.id for s in task.samples}
        assert len(groups["all"]) == sum(len(groups[name]) for name in groups if name != "all")
        shown = [name for name in groups if name != "all"]
        assert shown == (["random", "popular", "adversarial"] if task.name == "pope" else sorted(shown))


# ---- files -----------------------------------------------------------------------------------------------------------
def test_two_runs_with_one_seed_write_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        made = comparison(tmp_path / name, by=Parrot(), tasks=tasks(12), batch_size=5)
        made.run()
        note_samples(made, tmp_path / name)
        write(made, results(made, "parrot", draws=200), tmp_path / name)
        made.answers.close()
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    wanted = {"answers-0.jsonl", "samples.json", "results.json", "table.md", "table.csv", "table.tex", "report.html"}
    assert wanted < set(contents[0])
    for name in set(contents[0]) - wanted:
        assert name.endswith(".png")
        Image.open(io.BytesIO(contents[0][name])).verify()
    assert json.loads(contents[0]["samples.json"])["chair"] == [f"lonely-{number:04d}" for number in range(12)]


def test_tables_show_headlines_with_intervals_and_guards_beside_them(numbers: dict[str, Any]) -> None:
    headings, rows = tables.table(numbers, "chair")
    assert headings[:5] == ["method", "CHAIR_S ↓", "difference", "CHAIR_I ↓", "difference"]
    assert {"recall ↑", "words", "distinct words", "truncated ↓"} < set(headings)
    values = numbers["tasks"]["chair"]["groups"]["all"]["methods"]
    assert [row[0] for row in rows] == list(values)
    assert rows[0][2] == rows[0][4] == ""
    shown = rows[2][3]
    assert shown.startswith(f"{100 * values['strong']['chair_i']['value']:.1f} [")
    assert rows[2][4].startswith("+") and rows[2][4].endswith(" *")
    assert rows[1][4].endswith("]")
    assert "yes ratio" in tables.table(numbers, "pope")[0]
    said = "\n".join(tables.notes(numbers, "chair"))
    change = values["strong"]["chair_i"]["difference"]
    assert f"{100 * change['resolvable']:.1f} (strong)" in said
    lengths = {len(line) for line in tables.text(headings, rows).splitlines()}
    assert max(lengths) < 260


def test_csv_has_every_number(numbers: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.lines(numbers))))
    for row in rows:
        value = numbers["tasks"][row["task"]]["groups"][row["group"]]["methods"][row["method"]][row["metric"]]
        assert float(row["value"]) == value["value"]
        assert row["difference_marked"] == str(value["difference"]["marked"] if "difference" in value else "")
    assert len(rows) == 3 * (4 * 7 + 4 * 9)


def test_latex_and_markdown_are_escaped() -> None:
    headings, rows = ["a|b", "x_1 ↓"], [["50 % & more", "-1.0 [-2.0, 0.0] *"]]
    assert tables.markdown(headings, rows).splitlines()[0] == r"| a\|b | x_1 ↓ |"
    assert r"50 \% \& more & -1.0 {[}-2.0, 0.0{]} * \\" in tables.latex(headings, rows)
    assert r"x\_1 $\downarrow$" in tables.latex(headings, rows)


@pytest.mark.parametrize(
    ("value", "percent", "sign", "text"),
    [
        (0.1234, True, False, "12.3"),
        (0.1234, True, True, "+12.3"),
        (-0.0001, True, True, "0.0"),
        (12, False, False, "12.0"),
    ],
)
def test_numbers_are_percent_where_they_are_shares(value: float, percent: bool, sign: bool, text: str) -> None:
    assert tables.number(value, percent, sign) == text


def test_made_up_objects_by_category(found: Comparison) -> None:
    counts = made_up(found)
    assert list(counts) == ["baseline", "VHR", "strong"]
    assert sum(counts["strong"].values()) > sum(counts["baseline"].values()) > 0
    assert set(counts["strong"]) <= set(WORDS)
