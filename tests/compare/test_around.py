"""CARVE and ViCrop as arms of a comparison: they ask by themselves; kept, counted and resumed like the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from attnsteer.cli.compare import parsed
from attnsteer.compare import Answerer, Comparison, Method, results, with_controls, world
from attnsteer.errors import SteeringError
from attnsteer.processors import CARVE, VHR
from tests.test_looking import world as loaded

from .common import answerer, comparison, finished

WRITTEN = ("vhr", "carve", "carve:keep=0.6,steps=first", "vicrop:map=rel-att")


@cache
def small_world() -> Answerer:
    return Answerer(*loaded())


def methods(*texts: str) -> list[Method]:
    return with_controls([parsed(text) for text in texts], [])


def tasks() -> list[Any]:
    """Three descriptions and one question about each picture."""
    asked = world.exists(0, 3)
    return [world.describe(3), replace(asked, samples=asked.samples[::4])]


class Calls:
    """The small world's answerer, which notes who was asked together."""

    def __init__(self) -> None:
        self.labels: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(small_world(), name)

    def __call__(self, samples: Sequence[Any], methods: Sequence[Method], limit: int) -> Any:
        self.labels.append([method.label for method in methods])
        return small_world()(samples, methods, limit)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Calls]:
    by = Calls()
    return finished(tmp_path_factory.mktemp("around"), methods(*WRITTEN), by=by, tasks=tasks()), by


def test_they_say_what_they_say_when_called(found: tuple[Comparison, Calls]) -> None:
    comparison, _ = found
    model, processor = loaded()
    cut = []
    for task in comparison.tasks:
        for method in comparison.methods[2:]:
            for sample in task.samples:
                (how,) = method.processors
                wanted = replace(how, max_new_tokens=min(how.max_new_tokens, task.max_new_tokens))
                alone = wanted.answer(model, processor, sample.picture.open(), sample.prompt)
                entry = comparison.answers.answers[comparison.key(task, sample, method)]
                assert entry["output"] == alone.answer
                assert entry["counts"] == task.count(sample, alone.answer, entry["finish"] == "length")
                cut.append(entry["finish"])
    assert set(cut) == {"stop"}
    assert comparison.errors() == {}


def test_they_have_batches_of_their_own_and_the_numbers_of_all(found: tuple[Comparison, Calls]) -> None:
    comparison, by = found
    assert by.labels[:4] == [["baseline", "vhr"], *([label] for label in WRITTEN[1:])]
    values = results(comparison, "small world", draws=50)["tasks"]["chair"]["groups"]["all"]["methods"]
    assert list(values) == ["baseline", *WRITTEN]
    assert all({"recall", "words", "truncated"} < set(value) for value in values.values())


def test_a_second_run_asks_nothing_and_another_parameter_asks_alone(found: tuple[Comparison, Calls]) -> None:
    comparison, _ = found
    again = Calls()
    finished(comparison.answers.folder, methods(*WRITTEN), by=again, tasks=tasks())
    assert again.labels == []
    finished(comparison.answers.folder, methods(*WRITTEN, "carve:regions=1"), by=again, tasks=tasks()[:1])
    assert again.labels == [["carve:regions=1"]] * 2


def test_hashes_depend_on_their_parameters() -> None:
    texts = ("carve", "carve:keep=0.3", "carve:steps=end", "carve:layers=1", "carve:suffix=shortly")
    texts += ("vicrop", "vicrop:map=grad-att", "vicrop:layer=1", "vicrop:side=20")
    assert len({parsed(text).digest for text in texts}) == len(texts)
    assert parsed("carve").digest == parsed("mine=carve:keep=0.2").digest


def test_they_are_asked_in_the_words_of_the_task() -> None:
    for model in ("world-llava", "some/model"):
        for name in ("carve", "vicrop"):
            (how,) = parsed(name, model).processors
            assert how.to_dict()["parameters"]["suffix"] == ""
    (how,) = parsed("carve:suffix=shortly", "some/model").processors
    assert how.to_dict()["parameters"]["suffix"] == "shortly"


def test_an_answer_may_be_longer_than_their_passes_and_is_cut_at_the_limit(tmp_path: Path) -> None:
    short = [Method("short", (CARVE(max_new_tokens=2, final_images="refined", suffix=""),))]
    (task,) = tasks()[:1]
    by = small_world()
    ((whole, *_),) = by(task.samples[:1], short, 64)
    ((cut, *_),) = by(task.samples[:1], short, 5)
    assert (whole.finish, cut.finish) == ("stop", "length")
    assert len(whole.tokens) > 5 == len(cut.tokens)
    assert whole.tokens[:5] == cut.tokens


def test_what_the_model_cannot_have_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    for text in ("carve:layers=99", "vicrop:layer=99"):
        with pytest.raises(SteeringError, match=f"{text}: Layer 99 does not exist"):
            comparison(tmp_path, methods(text))
    with pytest.raises(SteeringError, match="both: CARVE cannot be attached: it asks a model several times"):
        answerer().groups([Method("both", (VHR(), CARVE()))])


def test_the_command_compares_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnsteer.cli import main

    monkeypatch.setattr(world.describe, "__defaults__", (3,))
    arguments = ["--method", "baseline", "--method", "carve", "--method", "vicrop:map=rel-att", "--tasks", "chair"]
    assert main(["compare", *arguments, "--limit", "1", "--draws", "50", "--output", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["tasks"]["chair"]["groups"]["all"]["methods"]) == ["baseline", "carve", "vicrop:map=rel-att"]
