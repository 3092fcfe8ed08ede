"""`attnsteer score pictures` and `score geneval` on folders of small-world pictures and tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnsteer.cli import folders, main
from attnsteer.cli.generate import file_name
from attnsteer.digests import weights_of
from attnsteer.errors import SteeringError
from attnsteer.metrics.pictures.judged import request
from attnsteer.world import sampling
from attnsteer.world.evaluate.pictures import wishes
from attnsteer.world.judge import Judge
from tests.tiny import encoders

Capture = pytest.CaptureFixture[str]
FEW = ["--draws", "50"]
PAIRS = {"a dog and a car": ("dog", "car"), "a cat and a pizza": ("cat", "pizza"), "a bus": ("bus",)}


def score(capsys: Capture, *arguments: Any, code: int = 0) -> dict[str, Any]:
    assert main(["score", *(str(argument) for argument in arguments), "--json", *FEW]) == code
    captured = capsys.readouterr()
    return {**json.loads(captured.out), "stderr": captured.err}


def refused(capsys: Capture, *arguments: Any) -> str:
    assert main(["score", *(str(argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def values(report: dict[str, Any]) -> dict[str, float]:
    return {name: row["value"] for name, row in report["metrics"].items()}


def painted(folder: Path, seeds: int = 2, without: str = "", shift: int = 0) -> Path:
    """True scenes of all prompts, under the names of `attnsteer generate`; ``without`` one category."""
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, names in PAIRS.items():
        for seed in range(seeds):
            kept = [name for name in names if name != without] or ["clock"]
            scene = sampling.compose(kept, "blue", seed=seed + shift)
            scene.image().save(folder / f"{file_name(prompt)}-{seed}.png")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PAIRS) + "\n")
    return path


@pytest.mark.parametrize("name", ["pictures", "geneval"])
def test_both_explain_themselves_with_an_example(name: str, capsys: Capture) -> None:
    assert main(["score", name, "--help"]) == 0
    shown = capsys.readouterr().out
    for expected in ("examples:", f"attnsteer score {name}", "--judge", "--strict", "--json", "--seed", "--records"):
        assert expected in shown


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_the_judge_tells_which_objects_were_forgotten(tmp_path: Path, prompts: Path, capsys: Capture) -> None:
    ours, plain = painted(tmp_path / "ours"), painted(tmp_path / "plain", without="pizza")
    arguments = ("pictures", "--prompts", prompts, "--images", ours, "--judge")
    report = score(capsys, *arguments, "--baseline", plain)
    found = values(report)
    assert found["objects"] == found["all_objects"] == found["only_objects"] == 1
    row = report["metrics"]["all_objects"]
    assert (row["images"], row["prompts"], row["seeds"]) == (6, 3, 2)
    assert (
        row["backbone"]["preprocessing"]["size"] == {"height": 64, "width": 64}
        and len(row["backbone"]["weights"]) == 16
    )
    assert row["backbone"]["checkpoint"] == "world-judge" and row["scale"] and row["better"] == "higher"
    effect = row["difference"]
    assert effect["baseline"] == pytest.approx(4 / 6) and effect["delta"] == pytest.approx(1 / 3)
    assert effect["win_rate"] == pytest.approx((2 + 4 / 2) / 6) and effect["pairs"] == 6 and effect["samples"] == 3
    assert found["identical"] == pytest.approx(4 / 6) and 0 < found["ssim"] < 1
    assert report["metrics"]["psnr"]["images"] == 2
    assert report["skipped"]["clip_cosine"] == "needs --clip" and "objects" not in report["skipped"]
    assert main(["score", *map(str, arguments), "--baseline", str(plain), *FEW]) == 0
    shown = capsys.readouterr().out
    assert "skipped, needs --dino: dino, dino_diversity" in shown
    assert "+0.3333 [" in shown and "66.7 %" in shown and "world-judge" in shown


def test_equal_folders_do_not_differ(tmp_path: Path, prompts: Path, capsys: Capture) -> None:
    ours = painted(tmp_path / "ours")
    report = score(capsys, "pictures", "--prompts", prompts, "--images", ours, "--baseline", ours, "--judge")
    assert values(report)["identical"] == values(report)["ssim"] == 1 and values(report)["rms"] == 0
    assert "psnr" not in report["metrics"]
    effects = [row["difference"] for row in report["metrics"].values() if "difference" in row]
    assert len(effects) == 4
    assert all(effect["delta"] == effect["low"] == effect["high"] == 0 for effect in effects)
    assert all(effect["win_rate"] == 0.5 for effect in effects)


def test_every_model_from_folders(tmp_path: Path, capsys: Capture) -> None:
    ours, masks = painted(tmp_path / "ours", seeds=3), tmp_path / "masks"
    masks.mkdir()
    for file in ours.iterdir():
        inside = np.zeros((64, 64), np.uint8)
        inside[8:40, 8:40] = 255
        Image.fromarray(inside).save(masks / file.name)
    asked = [{"prompt": prompt, "set": "one" if prompt != "a bus" else ""} for prompt in PAIRS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    clip, dino, blip = (make(tmp_path / make.__name__) for make in (encoders.clip, encoders.dinov2, encoders.blip))
    report = score(
        capsys,
        *("pictures", "--prompts", tmp_path / "p.jsonl", "--images", ours, "--masks", masks, "--clip", clip),
        *("--dino", dino, "--blip", blip, "--pickscore", clip, "--hps", clip, "--records", tmp_path / "r.jsonl"),
    )
    kinds = {"clip_cosine", "clip_score", "full_prompt", "minimum_object", "text_text", "pickscore", "hps"}
    pairs = {"clip_diversity", "clip_i", "clip_i_subject", "dinov2", "dinov2_subject", "dinov2_diversity"}
    assert set(report["metrics"]) == kinds | pairs | {"rms_diversity"}
    found, rows = values(report), report["metrics"]
    assert found["hps"] == pytest.approx(found["clip_cosine"], abs=1e-5)
    assert found["pickscore"] == pytest.approx(np.exp(3.0) * found["clip_cosine"], rel=1e-4)
    assert rows["pickscore"]["backbone"]["preprocessing"] == rows["clip_i"]["backbone"]["preprocessing"]
    assert rows["clip_cosine"]["images"] == 9 and rows["minimum_object"]["images"] == 6
    assert rows["clip_i"]["values"] == 3 and rows["clip_i"]["images"] == 6 and rows["clip_i"]["prompts"] == 2
    assert rows["clip_diversity"]["values"] == 3
    assert rows["dinov2"]["backbone"]["checkpoint"] == str(dino) and rows["clip_i"]["backbone"]["preprocessing"]
    assert rows["text_text"]["backbone"]["captioner"]["checkpoint"] == str(blip)
    assert report["notes"] == ['minimum_object: 1 prompts have neither " and " nor " with "']
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    mine = [line["value"] for line in lines if line["metric"] == "full_prompt"]
    assert len(mine) == 9 and np.mean(mine) == pytest.approx(found["full_prompt"])


def test_what_cannot_be_measured_is_skipped_with_the_reason(tmp_path: Path, prompts: Path, capsys: Capture) -> None:
    ours, clip = painted(tmp_path / "ours", seeds=1), encoders.clip(tmp_path / "clip")
    report = score(capsys, "pictures", "--prompts", prompts, "--images", ours, "--clip", clip)
    assert report["skipped"]["clip_i"] == "needs sets of two pictures"
    assert report["skipped"]["clip_i_subject"] == "needs --masks, and sets of two pictures"
    assert report["skipped"]["clip_diversity"] == report["skipped"]["rms_diversity"] == "needs two pictures of a prompt"


def test_pictures_and_prompts_without_each_other_are_named(tmp_path: Path, prompts: Path, capsys: Capture) -> None:
    ours, plain = painted(tmp_path / "ours"), painted(tmp_path / "plain", seeds=1)
    (ours / "a-bus-0.png").rename(ours / "a-tram-0.png")
    (ours / "a-bus-1.png").unlink()
    arguments = ("pictures", "--prompts", prompts, "--images", ours, "--baseline", plain, "--judge")
    report = score(capsys, *arguments, "--strict", code=1)
    said = "\n".join(report["problems"])
    assert "a-tram-0.png: belongs to none of the prompts" in said and "no picture of the prompt 'a bus'" in said
    assert "3 pictures are in one of the two runs only" in said and report["bad_lines"] == 3
    assert report["metrics"]["objects"]["difference"]["pairs"] == 2


def test_refusals(tmp_path: Path, prompts: Path, capsys: Capture) -> None:
    ours = painted(tmp_path / "ours")
    base = ("pictures", "--prompts", prompts, "--images", ours)
    assert "give both" in refused(capsys, *base, "--blip", "x")
    assert "give that too" in refused(capsys, *base, "--baseline-variant", "x")
    assert "made in float32" in refused(capsys, *base, "--dtype", "float16")
    assert "There is no folder" in refused(capsys, *base[:3], "--images", tmp_path / "nowhere")
    assert "give the prompts with --prompts" in refused(capsys, "pictures", "--images", ours)
    assert "cannot be loaded to score pictures" in refused(capsys, *base, "--clip", tmp_path / "nowhere")
    (tmp_path / "two.txt").write_text("a bus\na bus\n")
    assert "twice the prompt 'a bus'" in refused(
        capsys, "pictures", "--prompts", tmp_path / "two.txt", "--images", ours
    )
    other = painted(tmp_path / "other")
    for file in other.iterdir():
        Image.open(file).resize((32, 32)).save(file)
    assert "cannot be compared pixel by pixel" in refused(capsys, *base, "--baseline", other)


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_names_that_generate_gives(tmp_path: Path, capsys: Capture) -> None:
    prompt = "a dog and a car"
    call = ["world-sd", "--prompt", prompt, "--num-steps", "2", "--method", "attend-and-excite"]
    out = [
        *call,
        "--subjects",
        "dog,car",
        "--num-seeds",
        "2",
        "--out",
        str(tmp_path / f"{file_name(prompt)}-0.png"),
        "--json",
    ]
    assert main(["generate", *out]) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    asked = [folders.Asked(prompt)]
    with pytest.raises(SteeringError, match=r"several variants \(plain, attendandexcite\): choose one with --variant"):
        folders.read(tmp_path, asked)
    for number, variant in enumerate(("plain", "AttendAndExcite")):
        found = folders.read(tmp_path, asked, variant)
        assert [str(each.file) for each in found.pictures[prompt]] == written[number::2]  # seeds first
        assert [each.shown.seed for each in found.pictures[prompt]] == ["0", "1"] and not found.problems
    with pytest.raises(SteeringError, match="no variant 'softpag'"):
        folders.read(tmp_path, asked, "softpag")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_stories_are_sets(tmp_path: Path, capsys: Capture) -> None:
    long = "a photo of 3 dogs, which all sit side by side on a blue ground"
    story = ["a dog on grass", long, "2 cats", ".5 of a bus"]
    call = ["generate", "world-sd", "--num-steps", "2", "--seed", "7", "--json", "--out", "a-dog-on-grass-7.png"]
    call[-1] = str(tmp_path / call[-1])
    call += ["--method", "consistent-self-attention", "--param", "strength=0.5"]
    assert main([*call, *(word for prompt in story for word in ("--prompt", prompt))]) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    asked = [folders.Asked(prompt) for prompt in story]
    for row, variant in enumerate(("plain", "ConsistentSelfAttention")):
        found = folders.read(tmp_path, asked, variant)
        pictures = [picture for prompt in story for picture in found.pictures[prompt]]
        assert [str(each.file) for each in pictures] == written[4 * row : 4 * row + 4]
        assert [each.shown.seed for each in pictures] == ["7", "8", "9", "10"]
        assert {each.shown.subject for each in pictures} == {("a-dog-on-grass", "7")}
        assert not found.problems


def test_one_folder_a_prompt(tmp_path: Path) -> None:
    touch(tmp_path, "a dog/3.png", "a dog/12.png", "a-cat-on-a-mat/1.jpg", "a-dog-5.png", "a-dog-and-a-cat-5.png")
    asked = [folders.Asked("a cat on a mat", "pet"), folders.Asked("a dog", "pet"), folders.Asked("a dog and a cat")]
    found = folders.read(tmp_path, asked)
    assert {prompt: [each.shown.seed for each in pictures] for prompt, pictures in found.pictures.items()} == {
        "a cat on a mat": ["1"],
        "a dog": ["12", "3", "5"],
        "a dog and a cat": ["5"],
    }
    assert found.pictures["a dog"][0].shown.subject == ("pet", "12")
    touch(tmp_path, "a dog/5.png")
    assert "the same prompt and seed" in folders.read(tmp_path, asked).problems[0]


def test_prompts_with_the_same_file_names_need_folders(tmp_path: Path) -> None:
    long = "a dog " * 60
    touch(tmp_path, "a dog!/1.png", "a dog?/2.png", "a-dog-0.png", f"{file_name(long)}-4.png")
    found = folders.read(tmp_path, [folders.Asked(prompt) for prompt in ("a dog!", "a dog?", long)])
    assert [[each.shown.seed for each in pictures] for pictures in found.pictures.values()] == [["1"], ["2"], ["4"]]
    assert "'a dog!' has the file names of another prompt" in found.problems[0]
    assert "a-dog-0.png: belongs to none of the prompts" in found.problems[1]


def test_folders_of_geneval_bring_their_prompts(tmp_path: Path) -> None:
    touch(tmp_path, "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png", "00002/samples/0.png")
    for number, text in enumerate(('{"prompt": "a bench", "tag": "x"}\n', '{"prompt": "a cow"}', "{")):
        (tmp_path / f"{number:05}" / "metadata.jsonl").write_text(text)
    found = folders.read(tmp_path, None)
    assert {prompt: [each.shown.seed for each in rows] for prompt, rows in found.pictures.items()} == {
        "a bench": ["0000", "0001"],
        "a cow": ["0000"],
    }
    assert found.pictures["a bench"][0].request == {"prompt": "a bench", "tag": "x"}
    assert len(found.problems) == 1 and "00002" in found.problems[0]
    chosen = folders.read(tmp_path, [folders.Asked("a cow", "farm")])
    assert list(chosen.pictures) == ["a cow"] and chosen.pictures["a cow"][0].shown.subject == ("farm", "0000")


# ---- geneval ---------------------------------------------------------------------------------------------------------
def test_geneval_of_the_judge(tmp_path: Path, capsys: Capture) -> None:
    asked = [wish for kind in ("two", "count", "frame") for wish in wishes(kind, 1)[:4]]
    for run, wrong in (("plain", True), ("steered", False)):
        for number, wish in enumerate(asked):
            place = tmp_path / run / f"{number:05}"
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(json.dumps(request(wish)) + "\n")
            wish.scene.image().save(place / "samples/0000.png")
            empty = sampling.compose(["clock"], "white", seed=1).image()
            (empty if wrong and wish.kind == "count" else wish.scene.image()).save(place / "samples/0001.png")
    kept = tmp_path / "detections.jsonl"
    steered, plain = tmp_path / "steered", tmp_path / "plain"
    report = score(
        capsys, "geneval", "--images", steered, "--judge", "--against", plain, "--write-detections", kept, "--strict"
    )
    assert set(report["parts"]) == {"two_object", "counting", "frame"}
    assert report["overall"] == report["correct_images"] == report["correct_prompts"] == 1
    assert report["against_overall"] == pytest.approx((1 + 0.5 + 1) / 3) and report["against_correct_prompts"] == 1
    effect = report["parts"]["counting"]["differences"]["correct"]
    assert effect["delta"] == 0.5 == effect["low"] and effect["samples"] == 4
    assert report["settings"]["score"] == 0 and "judge" in report["settings"]["detector"]
    assert report["settings"]["weights"] == weights_of(Judge.load().network)
    again = score(capsys, "geneval", "--detections", kept, "--score", 0, "--counting-score", 0)
    assert {tag: part["counts"] for tag, part in again["parts"].items()} == {
        tag: part["counts"] for tag, part in report["parts"].items()
    }


def test_colours_cannot_be_asked_of_the_judge(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "g/00000"
    (place / "samples").mkdir(parents=True)
    include = [{"class": "dog", "count": 1}, {"class": "car", "count": 1, "color": "red"}]
    line = {"tag": "colors", "prompt": "a dog and a red car", "include": include}
    (place / "metadata.jsonl").write_text(json.dumps(line))
    sampling.compose(["dog", "car"], "blue", seed=3).image().save(place / "samples/0.png")
    said = refused(capsys, "geneval", "--images", tmp_path / "g", "--judge")
    assert "asks for the color of car, which the detections do not have" in said


def test_geneval_of_files(tmp_path: Path, capsys: Capture) -> None:
    prompt = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    box = {"class": "dog", "box": [0, 0, 9, 9], "score": 0.5}
    lines = [{"image": f"00000/samples/{n:04}.png", "detections": [box] if n else []} for n in range(4)]
    (tmp_path / "d.json").write_text(json.dumps(lines))
    arguments = ("geneval", "--detections", tmp_path / "d.json", "--metadata", tmp_path / "prompts.jsonl")
    assert score(capsys, *arguments)["overall"] == 0.75
    assert score(capsys, *arguments, "--score", 0.5)["overall"] == 0
    assert "give one of them" in refused(capsys, *arguments, "--images", tmp_path)
    assert "go together" in refused(capsys, "geneval", "--images", tmp_path)
    assert "No line" in refused(capsys, *arguments[:3])


def test_runs_are_compared_on_the_tags_of_both(tmp_path: Path, capsys: Capture) -> None:
    box = {"class": "dog", "box": [0, 0, 9, 9], "score": 0.95}
    for run, tags in (("ours", ("single_object", "counting")), ("theirs", ("single_object", "two_object"))):
        lines = [
            {"image": f"{tag}-{n}", "tag": tag, "prompt": tag, "include": [{"class": "dog", "count": 1}]}
            | {"detections": [box] if n or tag == "counting" else []}
            for tag in tags
            for n in range(2)
        ]
        (tmp_path / f"{run}.json").write_text(json.dumps(lines))
    arguments = ("geneval", "--detections", tmp_path / "ours.json", "--against", tmp_path / "theirs.json")
    report = score(capsys, *arguments, "--strict", code=1)
    assert report["overall"] == report["correct_images"] == report["against_overall"] == 0.5
    assert set(report["parts"]) == {"single_object", "counting"} and "differences" not in report["parts"]["counting"]
    assert [problem.split()[2] for problem in report["problems"]] == ["counting", "two_object"]
    (tmp_path / "theirs.json").write_text(json.dumps(lines[2:]))
    assert "no tag in common" in refused(capsys, *arguments)
