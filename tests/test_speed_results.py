"""benchmarks/RESULTS.md: made of the logs, saying what was not measured; how growth is fitted and drawn."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"
MODULES = ("measure", "plots", "results")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    import results

    yield results
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def log(results, tmp_path):
    """A log as ``measure.report`` writes it, with invented times."""
    import measure

    def make(job="idle-world-sd3", device="cpu", ratio=1.011, settings=None, cases=None, **aims):
        options = measure.parser("").parse_args(["--repeats", "1", "--warm-up", "0", "--log", str(tmp_path / "x.json")])
        named = cases or {"plain": 0.1, "steered": 0.1 * ratio}
        ratios = [measure.Ratio("steered", "plain", **aims)] if cases is None else []
        found = measure.report(job, options, dict.fromkeys(named, lambda: None), ratios, settings)
        for name, seconds in named.items():
            found["cases"][name] |= {"median_s": seconds, "raw_s": [seconds]}
        found["settings"]["device"] = device
        for each, aimed in zip(found["ratios"], ratios, strict=True):
            each |= {"ratio": ratio, "low": ratio, "high": ratio, "reached": aimed.reached(ratio)}
        return found

    return make


def test_the_document_is_what_the_logs_say(results):
    import measure

    assert results.RESULTS.read_text() == results.render(results.read(measure.LOGS)), (
        "run python benchmarks/speed/results.py"
    )


def test_every_log_of_the_repository_belongs_to_a_row(results):
    import measure

    known = {name for row in results.ROWS for name in row.scripts}
    assert {results.script(log) for log in results.read(measure.LOGS)} <= known
    for name in known:
        assert (SPEED / f"{name}.py").exists(), f"no script writes logs called {name}-..."


def test_pictures_of_the_document_are_there_and_small(results):
    import measure

    drawn = [log for log in results.read(measure.LOGS) if "curves" in log["settings"]]
    assert {log["settings"]["over"] for log in drawn} == {"tokens", "variants", "sites"}
    for log in drawn:
        picture = results.RESULTS.parent / "plots" / f"{log['job']}-{results.device(log)}.png"
        assert 0 < picture.stat().st_size < 40_000


def test_what_was_not_measured_is_said(results, log, tmp_path):
    nothing = results.render([], tmp_path)
    assert "Nothing here was measured on a CPU" in nothing
    assert "Nothing here was measured on a GPU" in nothing
    some = results.render([log(most=1.02)], tmp_path)
    assert "Nothing here was measured on a GPU" in some
    assert "Not measured on a CPU: SoftPAG and PAG step; " in some
    row = next(line for line in some.splitlines() if line.startswith("| attached"))
    assert row.endswith("| [world-sd3](#idle-world-sd3-cpu): steered / plain 1.011 | — not measured here | CPU: yes |")


def test_a_missed_aim_is_not_called_reached(results, log, tmp_path):
    found = results.render([log(most=1.01), log("idle-world-llava", "cuda", 0.99, most=1.01)], tmp_path)
    assert "| CPU: no, GPU: yes |" in found
    assert "| steered / plain | 1.011 | 1.011 | 1.011 | at most 1.01 | **no** |" in found
    assert "### idle-world-llava, GPU" in found
    several = log(most=1.01)
    several["ratios"] = [{**several["ratios"][0], "ratio": r, "reached": r <= 1.01} for r in (0.9, 1.0, 1.3, 1.2)]
    assert results.summary(several).endswith("2 of 4 aims, furthest off steered / plain 1.300")
    assert results.reached([several]) == "CPU: 2 of 4"


def test_a_ratio_that_should_be_large_is_furthest_off_where_it_is_small(results, log):
    slow = log("compare-world-llava", ratio=0.5, least=1.3)
    assert results.off(slow["ratios"][0]) == pytest.approx(2.6)
    assert results.reached([slow]) == "CPU: no"


def test_remarks_stand_above_the_tables_of_their_script(results, log, tmp_path):
    (tmp_path / "idle.md").write_text("Here is where the time goes.\n")
    found = results.render([log(most=1.02)], tmp_path)
    assert found.index("## Attached, nothing active") < found.index("Here is where") < found.index("### idle-world-sd3")


def test_links_lead_to_headings(results, log, tmp_path):
    found = results.render([log("decoding-qwen2.5-vl-7b", most=2)], tmp_path)
    heading = next(line[4:] for line in found.splitlines() if line.startswith("### "))
    assert f"(#{results.anchor(heading)})" in found
    assert results.anchor(heading) == "decoding-qwen25-vl-7b-cpu"


def test_growth_is_fitted_and_drawn(results, log, tmp_path):
    import plots

    times = {f"linear, {n}": 0.01 * n for n in (1, 4, 16)} | {f"square, {n}": 0.01 * n**2 for n in (1, 4, 16)}
    settings = {"over": "variants", "sizes": [1, 4, 16], "curves": ["linear", "square"]}
    found = log("scale-variants", settings=settings, cases=times)
    assert [plots.exponent(p) for p in plots.curves(found).values()] == pytest.approx([1, 2])
    assert math.isnan(plots.exponent([(1.0, 2.0)]))
    assert "fitted to the upper half of the sizes: linear 1.00, square 2.00." in results.render([found], tmp_path)
    plots.picture(found).save(tmp_path / "plot.png", optimize=True)
    assert (tmp_path / "plot.png").stat().st_size < 40_000


def test_writing_and_checking(results, log, tmp_path, monkeypatch, capsys):
    import measure

    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "idle-world-sd3-cpu.json").write_text(json.dumps(log(most=1.02)))
    monkeypatch.setattr(measure, "LOGS", logs)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    assert results.main(["--check"]) == 1
    assert results.main([]) == 0
    assert results.main(["--check"]) == 0
    capsys.readouterr()
