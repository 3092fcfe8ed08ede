"""Comparisons that are interrupted, fail or run out of memory: nothing is lost, counted twice or made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer.compare import Answerer, Method, with_controls
from attnsteer.errors import SteeringError
from attnsteer.processors import VHR

from .common import METHODS, ROOT, TOKENS, Parrot, answerer, comparison, environment, finished, outputs, tasks, tiny

SCRIPT = """
import sys

sys.path.insert(0, {root!r})
from pathlib import Path
from tests.compare.common import Parrot, finished, tasks

finished(Path({out!r}), by=Parrot(pause=0.05), tasks=tasks({scenes})[:1], batch_size=1)
"""


def entries(folder: Path) -> list[dict[str, Any]]:
    """All answers in the files of all processes; a torn line does not count."""
    found = []
    for file in sorted(folder.glob("answers-*.jsonl")):
        whole = file.read_bytes()
        found += [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
    return [entry for entry in found if "settings" not in entry]


def keys(folder: Path) -> Counter[str]:
    names = ("run", "task", "sample", "of", "method")
    return Counter(json.dumps([entry[name] for name in names]) for entry in entries(folder))


class Counting:
    """An answerer that counts its calls, and may fail in them."""

    def __init__(self, fail: Any = None):
        self.calls: list[tuple[list[str], list[str]]] = []
        self.fail = fail

    def __getattr__(self, name: str) -> Any:
        return getattr(answerer(), name)

    def __call__(self, samples: Sequence[Any], methods: Sequence[Method], limit: int) -> Any:
        self.calls.append(([sample.id for sample in samples], [method.label for method in methods]))
        if self.fail is not None:
            self.fail(samples, methods)
        return answerer()(samples, methods, limit)


# ---- batches ---------------------------------------------------------------------------------------------------------
def test_rows_of_one_batch_say_what_each_method_says_alone(tmp_path: Path) -> None:
    found = finished(tmp_path, tasks=tasks(3))
    model, processor = tiny()
    for task in found.tasks:
        for method in METHODS:
            for sample in task.samples:
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": [
                        {"type": "image", "image": sample.picture.open()}, {"type": "text", "text": sample.prompt}
                    ]}],
                    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                )  # fmt: skip
                if method.processors:
                    with attnsteer.steer(model, *method.processors, processor=processor):
                        said = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                else:
                    said = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                ids = said[0, inputs["input_ids"].shape[1] :].tolist()
                entry = found.answers.answers[found.key(task, sample, method)]
                ended = model.generation_config.eos_token_id in ids
                assert entry["finish"] == ("stop" if ended else "length")
                assert entry["tokens"] == (ids[: ids.index(model.generation_config.eos_token_id)] if ended else ids)
                assert entry["output"] == processor.decode(entry["tokens"], skip_special_tokens=True).strip()
                assert entry["prompt"] == sample.prompt
                assert entry["counts"] == task.count(sample, entry["output"], not ended)
    assert len({entry["output"] for entry in found.answers.answers.values()}) > 1


def test_methods_share_batches_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    finished(tmp_path, by=first)
    assert first.calls[0] == (["lonely-0000", "lonely-0001"], ["baseline", "VHR", "strong"])
    assert len(first.calls) == 3
    before = (tmp_path / "answers-0.jsonl").read_bytes()
    finished(tmp_path, by=again)
    assert again.calls == []
    assert (tmp_path / "answers-0.jsonl").read_bytes() == before


def test_a_method_that_comes_later_is_asked_alone(tmp_path: Path) -> None:
    by = Counting()
    finished(tmp_path, METHODS[:2])
    finished(tmp_path, METHODS, by=by)
    assert {tuple(labels) for _, labels in by.calls} == {("strong",)}


def test_methods_that_cannot_share_a_batch_take_turns(tmp_path: Path) -> None:
    """What is attached together shares one image-free lane, so two ways to remove the image need two batches."""
    other = with_controls([Method("delete", (VHR(),)), Method("mask", (VHR(removal="mask"),))], [])
    by = Counting()
    found = finished(tmp_path, other, by=by)
    assert {tuple(labels) for _, labels in by.calls} == {("baseline", "delete"), ("mask",)}
    assert found.there(found.tasks[0]) == (18, 18)


def test_a_method_that_the_model_cannot_have_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    wrong = [*METHODS, Method("wrong", (VHR(attnsteer.Where(layers=[9])),))]
    with pytest.raises(SteeringError, match="wrong: Layer 9 does not exist"):
        comparison(tmp_path, wrong)


def test_processes_deal_batches_and_find_what_one_finds(tmp_path: Path) -> None:
    alone = finished(tmp_path / "one")
    for rank in (1, 0):
        found = finished(tmp_path / "two", rank=rank, count=2)
    assert outputs(found) == outputs(alone)
    assert set(keys(tmp_path / "two").values()) == {1}
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["answers-0.jsonl", "answers-1.jsonl"]


def test_asking_alone_again_counts_other_answers(tmp_path: Path) -> None:
    found = finished(tmp_path)
    assert found.verify(4) == {"chair": {"baseline": 0, "VHR": 0, "strong": 0}}
    for entry in found.answers.answers.values():
        if entry["label"] == "VHR":
            entry["output"] += " changed"
    assert found.verify(4) == {"chair": {"baseline": 0, "VHR": 4, "strong": 0}}


# ---- settings --------------------------------------------------------------------------------------------------------
def test_a_changed_setting_uses_no_old_line(tmp_path: Path) -> None:
    finished(tmp_path)
    wanted = len(METHODS) * 6
    longer = [replace(tasks()[0], max_new_tokens=TOKENS + 1)]
    asked = [replace(t, samples=[replace(s, prompt="What?") for s in t.samples]) for t in tasks()[:1]]
    model, processor = tiny()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.data
    before = weight.clone()
    weight[0, 0] += 1
    try:
        other = Answerer(model, processor)
    finally:
        weight.copy_(before)
    model.save_pretrained(tmp_path / "saved")  # which notes class and type in the configuration
    assert other.digest != answerer().digest == Answerer(model, processor).digest
    for options in ({"tasks": longer}, {"tasks": asked}, {"by": other}, {"methods": [Method("x", (VHR(alpha=1.5),))]}):
        found = comparison(tmp_path, **options)
        assert found.there(found.tasks[0]) == (0, 6 * len(found.methods)), options
        found.answers.close()
    assert len(entries(tmp_path)) == wanted
    renamed = [Method(method.label + "!", method.processors) for method in METHODS]
    found = comparison(tmp_path, renamed, batch_size=5)
    assert found.there(found.tasks[0]) == (wanted, wanted), "labels and the size of batches change no answer"
    found.answers.close()


# ---- interruptions ---------------------------------------------------------------------------------------------------
def test_a_killed_comparison_goes_on_and_counts_nothing_twice(tmp_path: Path) -> None:
    out, scenes = tmp_path / "out", 24
    file = tmp_path / "run.py"
    file.write_text(SCRIPT.format(root=str(ROOT), out=str(out), scenes=scenes))
    wanted = len(METHODS) * scenes
    with subprocess.Popen([sys.executable, str(file)], env=environment(), cwd=tmp_path) as process:
        deadline = time.monotonic() + 1200
        while len(entries(out)) < 6 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the comparison was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
    known = entries(out)
    assert 6 <= len(known) < wanted
    answers = out / "answers-0.jsonl"
    answers.write_bytes(answers.read_bytes()[:-40])  # a kill in the middle of a write
    torn = entries(out)
    assert torn == known[:-1]
    found = finished(out, by=Parrot(), tasks=tasks(scenes)[:1], batch_size=1)
    assert entries(out)[: len(torn)] == torn, "everything that was written is used"
    assert set(keys(out).values()) == {1}
    assert len(keys(out)) == wanted
    assert outputs(found) == outputs(finished(tmp_path / "whole", by=Parrot(), tasks=tasks(scenes)[:1], batch_size=1))


def test_two_comparisons_do_not_write_to_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    found = comparison(tmp_path)
    with pytest.raises(SteeringError, match="Another comparison is writing to"):
        comparison(tmp_path)
    found.answers.close()


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"run": "x"}', '{"settings": {}}'])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    finished(tmp_path)
    file = tmp_path / "answers-0.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(SteeringError, match=r"answers-0.jsonl, line 20: .* is no answer: remove this line"):
        comparison(tmp_path)


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_an_error_is_recorded_and_tried_again(tmp_path: Path) -> None:
    def fail(samples: Sequence[Any], methods: Sequence[Method]) -> None:
        if any(sample.id == "lonely-0003" for sample in samples) and any(m.label == "VHR" for m in methods):
            raise ValueError("nothing\nto say")

    found = finished(tmp_path, by=Counting(fail))
    assert found.there(found.tasks[0]) == (17, 18)
    assert list(found.errors().values()) == ["ValueError: nothing to say"]
    (error,) = [entry for entry in entries(tmp_path) if "error" in entry]
    assert (error["sample"], error["label"]) == ("lonely-0003", "VHR")
    assert "output" not in error
    mended = finished(tmp_path)
    assert mended.there(mended.tasks[0]) == (18, 18)
    assert mended.errors() == {}
    assert outputs(mended) == outputs(finished(tmp_path / "whole"))
    assert finished(tmp_path).errors() == {}, "the error is still in the file, and the answer behind it counts"


def test_an_error_inside_a_method_leaves_the_others_their_batch(tmp_path: Path) -> None:
    def fail(samples: Sequence[Any], methods: Sequence[Method]) -> None:
        if any(m.label == "strong" for m in methods):
            raise KeyError("k")

    by = Counting(fail)
    found = finished(tmp_path, by=by)
    assert found.there(found.tasks[0]) == (12, 18)
    assert set(found.errors().values()) == {"KeyError: 'k'"}
    assert (["lonely-0000", "lonely-0001"], ["baseline"]) in by.calls


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("CUDA out of memory")])
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path, error: Exception) -> None:
    def fail(samples: Sequence[Any], methods: Sequence[Method]) -> None:
        if len(samples) * len(methods) > 3:
            raise error

    by = Counting(fail)
    found = finished(tmp_path, by=by, batch_size=4)
    sizes = [len(samples) * len(methods) for samples, methods in by.calls]
    assert sizes == [12, 6, 3, 3, 3, 3, 3, 3], "what did not fit is not tried again"
    assert found.there(found.tasks[0]) == (18, 18)
    assert outputs(found) == outputs(finished(tmp_path / "whole"))


def test_out_of_memory_with_one_row_is_an_error(tmp_path: Path) -> None:
    def fail(samples: Sequence[Any], methods: Sequence[Method]) -> None:
        raise torch.OutOfMemoryError("not even one")

    found = finished(tmp_path, by=Counting(fail))
    assert found.there(found.tasks[0]) == (0, 18)
    assert set(found.errors().values()) == {"OutOfMemoryError: not even one"}
