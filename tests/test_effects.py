"""benchmarks/effects.py: the book-keeping around the pictures, on invented scores; one case of a table in full."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def effects(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import effects

    yield effects
    for name in ("effects", "arms", "speed", "speed.measure"):
        sys.modules.pop(name, None)


@pytest.fixture
def table(effects):
    from arms import Arm, Table

    arms = {"none": Arm(), "method": Arm(), "astray": Arm(control="method")}
    return Table("A title", "world-sd", 1.5, 10, arms, lambda case, pictures: {}, {"both": "both objects"})


def invented(prompts: int = 30):
    rng = np.random.default_rng(0)
    known = {}
    for number in range(prompts):
        plain = rng.random(4) < 0.5
        scores = {"none": plain, "method": plain | (rng.random(4) < 0.6), "astray": rng.random(4) < 0.5}
        known |= {(arm, f"prompt {number}"): {"both": list(map(float, s))} for arm, s in scores.items()}
    return known


def test_summary_compares_with_the_baseline_and_the_control(effects, table):
    known = invented()
    rows = {row["arm"]: row for row in effects.summary(table, known)}
    assert list(rows["method"]["over"]) == ["none", "astray"]
    for arm in ("method", "astray"):
        ours = [known[arm, f"prompt {n}"]["both"] for n in range(30)]
        theirs = [known["none", f"prompt {n}"]["both"] for n in range(30)]
        delta = rows[arm]["over"]["none"]["delta"]
        assert delta == pytest.approx(np.mean(ours) - np.mean(theirs))
        assert rows[arm]["mean"] == pytest.approx(np.mean(ours))
    assert rows["method"]["p"] < 0.05 < rows["astray"]["p"]
    line = effects.markdown(table, list(rows.values())).splitlines()
    assert line[0] == "| arm | both objects |"
    assert "]*; +" in line[3]
    assert "*" not in line[4]


def test_an_arm_without_a_score_has_an_empty_cell(effects, table):
    known = {key: scores for key, scores in invented().items() if key[0] != "astray"}
    rows = effects.summary(table, known)
    assert [row["arm"] for row in rows] == ["none", "method"]


def test_scores_of_a_killed_run_are_kept_and_the_cut_line_is_not(effects, tmp_path):
    file, settings = tmp_path / "new" / "x.jsonl", {"table": "x"}
    assert effects.read(file, settings) == {}
    line = json.dumps({"arm": "none", "prompt": "a dog", "scores": {"both": [1.0]}})
    with file.open("a") as log:
        log.write(line + "\n" + line[:20])
    assert effects.read(file, settings) == {("none", "a dog"): {"both": [1.0]}}
    assert file.read_text().endswith(line + "\n")
    with pytest.raises(SystemExit, match="made otherwise"):
        effects.read(file, {"table": "y"})


@pytest.mark.parametrize("name", [pytest.param("words", marks=pytest.mark.slow), "subjects"])
def test_one_case_of_every_arm(effects, tmp_path, monkeypatch, name):
    from arms import TABLES

    few = {key: make for key, make in TABLES.items() if key == name}
    monkeypatch.setitem(few, name, lambda: replace(TABLES[name](), steps=2))
    monkeypatch.setattr(effects, "TABLES", few)
    given = argparse.Namespace(prompts=1, num_seeds=2, arms=None, out=tmp_path, device="cpu")
    known = effects.run(name, given)
    arms = TABLES[name]().arms
    assert {arm for arm, _ in known} == set(arms)
    painted = (tmp_path / f"{name}.jsonl").stat().st_size
    assert effects.run(name, given) == known  # nothing is painted again
    assert (tmp_path / f"{name}.jsonl").stat().st_size == painted


def test_scores_of_other_prompts_are_left_out(effects, tmp_path, monkeypatch, table):
    monkeypatch.setattr(effects, "TABLES", {"x": lambda: table})
    given = argparse.Namespace(prompts=2, num_seeds=1, arms=None, out=tmp_path, device="cpu")
    mine = [case.prompts[-1] for case in table.cases(2)]
    effects.read(tmp_path / "x.jsonl", effects.settings("x", table, given))
    with (tmp_path / "x.jsonl").open("a") as log:
        for arm in table.arms:
            for prompt in (*mine, "of a longer run"):
                print(json.dumps({"arm": arm, "prompt": prompt, "scores": {"both": [1.0]}}), file=log)
    assert set(effects.run("x", given)) == {(arm, prompt) for arm in table.arms for prompt in mine}


def test_there_are_enough_prompts_and_longer_runs_begin_with_those_of_shorter_ones(effects):
    from arms import TABLES

    for name in ("words", "lengths"):
        many = TABLES[name]().cases(200)
        assert len({case.prompts for case in many}) == 200
        assert TABLES[name]().cases(20) == many[:20]
