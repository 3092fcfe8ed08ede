"""`attnsteer compare`: what it writes and prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnsteer.cli import compare, main, models
from attnsteer.compare import world
from attnsteer.compare.answering import Answerer
from tests.tiny import pipelines

from .common import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 12 scenes instead of hundreds."""
    monkeypatch.setattr(world.describe, "__defaults__", (12,))
    monkeypatch.setattr(world.exists, "__defaults__", (0, 12))


def run(*arguments: Any) -> int:
    return main(["compare", *(str(argument) for argument in arguments)])


def test_a_comparison_writes_a_report_and_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", model, "--limit", 2, "--batch-size", 4, "--max-new-tokens", 3]
    command += ["--draws", 100, "--output", tmp_path / "out"]
    steered = [*command, "--method", "vhr:alpha=3", "--method", "soft=vhr:alpha=1.5", "--controls", "random-heads"]
    assert run(*steered, "--verify-batch", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    labels = ["baseline", "vhr:alpha=3", "vhr:alpha=3, random-heads", "soft", "soft, random-heads"]
    assert [method["label"] for method in report["methods"]] == labels
    assert report["verified"]["samples"] == {"chair": 1, "pope": 1}
    assert set(report["verified"]["pope"]) == set(labels)
    assert report["errors"] == 0
    for task, questions in (("chair", 2), ("pope", 8)):
        assert report["tasks"][task]["samples"] == questions
        assert report["tasks"][task]["groups"]["all"]["images"] == 2
        assert list(report["tasks"][task]["groups"]["all"]["methods"]) == labels
    assert all(Path(file).is_file() for file in report["files"])
    names = {Path(file).name for file in report["files"]}
    assert {"results.json", "table.md", "table.csv", "table.tex", "report.html", "chair-chair_i.png"} <= names
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept == {key: value for key, value in report.items() if key not in ("files", "errors")}
    chosen = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert {name.rsplit("-", 1)[0] for name in chosen["pope"]} == set(chosen["chair"])
    lines = (tmp_path / "out" / "answers-0.jsonl").read_bytes()
    assert run(*steered) == 0
    printed = capsys.readouterr().out
    assert "CHAIR_I ↓" in printed and "soft, random-heads" in printed and "report.html" in printed
    assert "Smallest difference of CHAIR_S" in printed
    assert (tmp_path / "out" / "answers-0.jsonl").read_bytes() == lines
    before = (tmp_path / "out" / "table.md").read_bytes()
    assert run(*command, "--tasks", "chair", "--seed", 1) == 0
    assert (tmp_path / "out" / "table.md").read_bytes() != before
    assert json.loads((tmp_path / "out" / "samples.json").read_text()) != chosen


def test_merging_writes_the_report_of_what_is_there_and_asks_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["--model", model, "--limit", 3, "--batch-size", 2, "--max-new-tokens", 3, "--draws", 100]
    command += ["--method", "vhr", "--output", out]
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(*command) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    torn = out / "answers-1.jsonl"
    lines = whole[torn.name].splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:-2]) + lines[-2][:-40])
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", None)
        contents = []
        for _ in range(2):
            assert run("--merge", "--output", out) == 1
            said = capsys.readouterr()
            assert "attnsteer: 2 answers are missing" in said.err
            contents.append({file.name: file.read_bytes() for file in out.iterdir()})
        assert contents[0] == contents[1]
        assert contents[0][torn.name] == torn.read_bytes()
        assert "samples are left out" in contents[0]["table.md"].decode()
        torn.write_bytes(whole[torn.name])
        assert run("--merge", "--output", out, "--limit", 3) == 0
        assert {file.name: file.read_bytes() for file in out.iterdir()} == whole, "as those who asked have written it"
        capsys.readouterr()
        assert run("--merge", "--output", out, "--limit", 2) == 2
        assert "--limit is 3 in" in capsys.readouterr().err
        assert run("--merge", "--output", out, "--verify-batch", 1) == 2
        assert "cannot take --verify-batch" in capsys.readouterr().err
        assert run("--merge", "--output", tmp_path / "nowhere") == 2
        assert "no comparison was started there" in capsys.readouterr().err


def test_what_was_asked_again_is_known_to_later_reports(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--model", model, "--limit", 2, "--tasks", "chair", "--max-new-tokens", 3, "--draws", 100, "--no-maps"]
    assert run(*command, "--method", "vhr", "--output", out, "--verify-batch", 2) == 0
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "when asked alone and not in a batch: 0 of 2 (baseline), 0 of 2 (vhr)" in whole["table.md"].decode()
    assert run("--merge", "--no-maps", "--output", out) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert run(*command, "--method", "vhr", "--method", "vhr:alpha=3", "--output", out) == 0
    assert ": 0 of 2 (baseline), 0 of 2 (vhr)." in (out / "table.md").read_text()
    (out / "verified.json").write_text("[1]")
    capsys.readouterr()
    assert run("--merge", "--output", out) == 2
    assert "verified.json is not what --verify-batch writes" in capsys.readouterr().err


def test_real_pictures_by_the_same_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "export", str(tmp_path / "coco"), "--count", "4"]) == 0
    notes = tmp_path / "coco" / "annotations"
    files = ["--images", tmp_path / "coco" / "images", "--instances", notes / "instances_test.json"]
    files += ["--captions-gt", notes / "captions_test.json", "--tasks", "chair", "--max-new-tokens", 3, "--draws", 100]
    capsys.readouterr()
    assert run("--model", model, *files, "--prompt", "What is it?", "--output", tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"]["chair"]["samples"] == 4
    (line, *_) = (tmp_path / "out" / "answers-0.jsonl").read_text().splitlines()[1:]
    assert json.loads(line)["prompt"] == "What is it?"
    assert json.loads(line)["label"] == "baseline"
    written = (tmp_path / "out" / "report.html").read_bytes()
    assert run("--merge", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == written


def test_errors_are_told_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Answerer.__call__

    def failing(self: Any, samples: Any, methods: Any, limit: int) -> Any:
        if any(method.processors for method in methods):
            raise ValueError("a broken method")
        return plain(self, samples, methods, limit)

    command = [
        "--model",
        model,
        "--limit",
        1,
        "--tasks",
        "chair",
        "--max-new-tokens",
        3,
        "--draws",
        100,
        "--output",
        tmp_path,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "__call__", failing)
        assert run(*command) == 1
    printed = capsys.readouterr()
    assert "chair, lonely-" in printed.err and "vhr: ValueError: a broken method" in printed.err
    assert f"{len(compare.METHODS) - 1} answers failed" in printed.err
    assert "No sample was answered by all methods" in printed.out
    assert run(*command) == 0
    assert "failed" not in capsys.readouterr().err


WRONG: dict[str, tuple[list[Any], str]] = {
    "an unknown method": (["--method", "vhhr"], "There is no method 'vhhr'; did you mean"),
    "a method that makes pictures": (["--model", "{model}", "--method", "pag"], "pag:"),
    "an unknown control": (["--controls", "other"], "There is no control 'other'"),
    "annotations without pictures": (["--instances", "x.json"], "say where they are with --images"),
    "no pictures": (["--images", "{0}/none", "--instances", "x.json"], "No such file"),
    "a model that makes pictures": (["--model", "{0}/sd3"], "needs a model that answers questions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_compared_is_one_sentence(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[case]
    if "sd3" in str(arguments):
        pipelines.build("sd3").save_pretrained(tmp_path / "sd3")
    filled = [argument.format(tmp_path, model=model) for argument in arguments]
    assert run(*filled, "--limit", 1, "--output", tmp_path / "out") in (1, 2)
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_unknown_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tasks", "chair,amber") == 2
    assert "allowed are chair, pope" in capsys.readouterr().err


def test_everything_compared_by_default_exists() -> None:
    assert [compare.parsed(text).label for text in compare.METHODS] == list(compare.METHODS)
