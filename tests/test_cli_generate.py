"""``attnsteer generate``: methods by name, subjects, variants, seeds and stories."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from attnsteer import Where, run_variants
from attnsteer.cli import main, options, several
from attnsteer.cli.several import label
from attnsteer.cli.sheet import captioned_sheet
from attnsteer.config import processor_from_dict
from attnsteer.errors import SteeringError
from attnsteer.processors import PAG, IRDiffusion, SoftPAG, available
from tests.tiny import pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny pipelines."""
    place = tmp_path_factory.mktemp("generate")
    for name in ("sd15", "sd3", "wan"):
        pipelines.build(name).save_pretrained(place / name)
    return place


SIZE = ["--num-steps", "2", "--call", "height=48", "--call", "width=80"]
SHORT = [*SIZE, "--call", "max_sequence_length=16"]


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert run("generate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ---- names -----------------------------------------------------------------------------------------------------------
def test_methods_have_friendly_names() -> None:
    for text, name in [
        ("attend-and-excite", "AttendAndExcite"),
        ("a-star", "AStar"),
        ("divide_and_bind", "DivideAndBind"),
        ("CONFORM", "Conform"),
        ("syngen", "SynGen"),
        ("softpag", "SoftPAG"),
        ("ir-diffusion", "IRDiffusion"),
        ("consistent-self-attention", "ConsistentSelfAttention"),
        ("vhr", "VHR"),
    ]:
        assert options.method(text) == name
    bare = {re.sub(r"[-_\s]", "", name).lower() for name in available()}
    assert len(bare) == len(available())  # no two methods share a friendly name
    for name in available():
        assert options.method(name) == options.method(name.lower()) == name


def test_an_unknown_method_lists_what_exists_and_the_closest() -> None:
    with pytest.raises(SteeringError, match="did you mean AttendAndExcite.*AStar, .*VHR"):
        options.method("attend-and-exite")
    with pytest.raises(SteeringError, match="'zzz'; there are: AStar") as error:
        options.method("zzz")
    assert "did you mean" not in str(error.value)


def given(**said: Any) -> Namespace:
    nothing = {"subjects": None, "param": [], "layers": None, "heads": None, "steps": None, "config": None}
    return Namespace(**{"model": "somewhere", "method": None, **nothing, **said})


def test_embedded_models_bring_what_fits_them_and_options_go_first() -> None:
    words = {"method": "a-star", "subjects": "dog, red car"}
    assert options.configuration(given(**words))["parameters"] == {"subjects": ["dog", "red car"]}
    assert options.configuration(given(**words, model="world-sd"))["parameters"]["level"] == 0
    assert options.configuration(given(**words, model="world-sd", param=["level=1"]))["parameters"]["level"] == 1
    assert options.configuration(given(method="pag", model="world-sd"))["parameters"] == {}
    for model, parameters in options.EMBEDDED.items():
        for name in parameters:
            assert any(name in options.parameters_of(method) for method in available()), (model, name)


def test_methods_in_one_text_are_read_like_options() -> None:
    (one,) = options.written("attend-and-excite:subjects=dog,red car,level=1,steps=0:4", "somewhere")
    assert (one.subjects, one.level, one.where) == (("dog", "red car"), 1, Where(steps=slice(0, 4)))
    (one,) = options.written("carve:general=What + why?,regions=2", "somewhere")
    assert (one.general, one.regions) == ("What + why?", 2)
    carve, vicrop = options.written("carve:general=a+b,regions=2+vicrop:map=rel-att", "somewhere")
    assert (carve.general, carve.regions, vicrop.map) == ("a+b", 2, "rel-att")
    (story,) = options.written("consistent-self-attention:strength=.5", "somewhere", prompts=2)
    assert story.frames == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("pai:alpha=.2,alpha=.5", "alpha twice"),
        ("pai:layers=", "layers once"),
        ("pai:layers=1,layers=2", "layers once"),
        ("ir-diffusion:start_layer=1", "cannot be written here"),
        ("pai+vhhr", "no method 'vhhr'; did you mean VHR"),
    ],
)
def test_methods_in_one_text_that_say_nothing_clear_are_refused(text: str, why: str) -> None:
    with pytest.raises(SteeringError, match=why):
        options.written(text, "somewhere")


def test_a_story_has_as_many_frames_as_prompts() -> None:
    story = given(method="consistent-self-attention", prompt=["a", "b", "c"])
    assert options.configuration(story)["parameters"] == {"frames": 3}
    story.param = ["frames=2"]
    assert options.configuration(story)["parameters"] == {"frames": 2}


# ---- one picture -----------------------------------------------------------------------------------------------------
def test_subjects_reach_the_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [folder / "sd15", "--prompt", "a dog and a red car", *SIZE]
    words = ["--subjects", "dog,car", "--param", "max_refinement_steps=0", "--param", "level=1"]
    first = report(capsys, *plain, "--out", folder / "plain.png")
    second = report(capsys, *plain, "--method", "attend-and-excite", *words, "--out", folder / "excited.png")
    assert second["processors"][0]["parameters"]["subjects"] == ["dog", "car"]
    assert Image.open(first["files"][0]).tobytes() != Image.open(second["files"][0]).tobytes()


# ---- several ---------------------------------------------------------------------------------------------------------
def test_variants_are_the_product_and_equal_run_variants(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = ["--method", "softpag", "--param", "scale=9", "--heads", "0"]
    tried = ["--variants", "strength=.5,1", "--variants", "layers=1,2:4"]
    out = folder / "grid" / "sheet.png"
    found = report(capsys, folder / "sd3", "--prompt", "a dog", *SHORT, *method, *tried, "--out", out)
    names = ["plain", *(f"strength={u}, layers={where}" for u in (".5", "1") for where in ("1", "2:4"))]
    assert [picture["variant"] for picture in found["pictures"]] == names
    parameters = found["pictures"][2]["processors"][0]["parameters"]
    assert parameters["where"] == {"layers": {"slice": [2, 4, None]}, "heads": 0}
    assert (parameters["strength"], parameters["scale"]) == (0.5, 9)
    assert sorted(found["files"]) == sorted(str(f) for f in out.parent.iterdir() if f != out)
    width, height = Image.open(found["sheet"]).size
    assert width > 5 * 176 > height  # five pictures in one row

    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "sd3")
    pipe.set_progress_bar_config(disable=True)
    variants = [None, *(processor_from_dict(picture["processors"][0]) for picture in found["pictures"][1:])]
    arguments = {"num_inference_steps": 2, "height": 48, "width": 80, "max_sequence_length": 16}
    pictures = [result.image for result in run_variants(pipe, "a dog", variants=variants, **arguments)]
    assert [picture.tobytes() for picture in pictures] == [Image.open(file).tobytes() for file in found["files"]]
    assert len({picture.tobytes() for picture in pictures}) == 5


def test_seeds_are_columns_and_plain_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "a dog", *SHORT, "--method", "pag", "--layers", "1", "--num-seeds", "2", "--seed", "5"]
    found = report(capsys, folder / "sd3", *arguments, "--batch", "1", "--out", folder / "seeds.png")
    said = [(picture["variant"], picture["of"]) for picture in found["pictures"]]
    assert said == [("plain", "seed 5"), ("PAG", "seed 5"), ("plain", "seed 6"), ("PAG", "seed 6")]
    assert (
        run("generate", folder / "sd3", "--prompt", "a dog", *SHORT, "--seed", "6", "--out", folder / "alone.png") == 0
    )
    pictures = [torch.tensor(list(Image.open(f).tobytes())) for f in (found["files"][2], folder / "alone.png")]
    assert (pictures[0] - pictures[1]).abs().max() <= 1  # a batch of one, as alone
    assert len({Image.open(file).tobytes() for file in found["files"]}) == 4


def test_a_file_of_configurations(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = [PAG(scale=2.0).to_dict(), [SoftPAG(strength=0.25).to_dict()]]
    (folder / "variants.json").write_text(json.dumps(tried))
    arguments = ["--prompt", "a dog", *SHORT, "--variants", folder / "variants.json", "--out", folder / "file.png"]
    assert run("generate", folder / "sd3", *arguments) == 0
    files = capsys.readouterr().out.split()
    assert files[-1] == str(folder / "file.png")
    assert [Path(file).name for file in files[:-1]] == [
        "file-0-plain-seed-0.png",
        "file-1-pag-scale-2.0-seed-0.png",
        "file-2-softpag-strength-0.25-seed-0.png",
    ]


def test_a_story_is_one_batch_beside_its_plain_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = ["--prompt", "a dog", "--prompt", "a cat", *SIZE, "--method", "consistent-self-attention"]
    more = ["--param", "skip=[0, 0]", "--call", "guidance_scale=1", "--out", folder / "story.png"]
    assert run("generate", folder / "sd15", *story, *more) == 2  # it has an option of its own
    capsys.readouterr()
    more = ["--param", "skip=[0, 0]", "--negative-prompt", "blur", "--out", folder / "story.png"]
    found = report(capsys, folder / "sd15", *story, *more)
    assert [picture["of"] for picture in found["pictures"]] == 2 * ["1. a dog", "2. a cat"]
    assert found["pictures"][-1]["processors"][0]["parameters"]["frames"] == 2
    plain, steered = (found["files"][:2], found["files"][2:])
    for one, other in zip(plain, steered, strict=True):
        assert Image.open(one).tobytes() != Image.open(other).tobytes()


def test_a_saved_configuration_brings_its_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = torch.zeros(1, 2, 2)
    masks[:, 0] = 1
    IRDiffusion(references=masks, scene=masks, start_layer=0).save_pretrained(str(folder / "layout"))
    story = ["--prompt", "a dog", "--prompt", "a red dog", *SIZE, "--config", folder / "layout"]
    found = report(capsys, folder / "sd15", *story, "--out", folder / "layout.png")
    assert found["pictures"][-1]["processors"][0]["parameters"]["scene"] == {"tensor": "scene"}
    first, scene, same, other = (Image.open(file).tobytes() for file in found["files"])
    assert first == same
    assert scene != other


def test_videos_of_variants_are_gifs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "a dog", *SHORT, "--call", "num_frames=3", "--num-seeds", "2"]
    found = report(capsys, folder / "wan", *arguments, "--out", folder / "videos.png")
    assert [getattr(Image.open(file), "n_frames", 1) for file in found["files"]] == [3, 3]
    assert Image.open(found["sheet"]).width > 2 * 176


def test_commas_inside_brackets_do_not_part_values() -> None:
    assert several._values("layers=1,2:4") == ["1", "2:4"]
    assert several._values('subjects=["dog","car"],["cat"]') == ['["dog","car"]', '["cat"]']
    assert several._values("tokens=[[2],[5, 6]],[[5],[2]]") == ["[[2],[5, 6]]", "[[5],[2]]"]


# ---- labels and sheets -----------------------------------------------------------------------------------------------
def test_labels_say_what_is_no_default() -> None:
    assert label([PAG()]) == "PAG"
    assert label([SoftPAG(Where(layers=[2, 3]), strength=0.25), PAG()]) == "SoftPAG layers=[2, 3] strength=0.25 + PAG"
    masks = torch.zeros(1, 2, 2)
    assert label([IRDiffusion(references=masks, scene=masks, start_layer=3)]).endswith("start_layer=3")


def test_captions_stand_above_their_pictures() -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    sheet = captioned_sheet([(picture, "one two three"), (picture, "one"), (picture, "three")], columns=2, side=64)
    assert sheet.size == (8 + 2 * 72, 8 + 2 * 17 + 17 + 2 * 72)
    assert sheet.getpixel((8 + 32, 8 + 34 + 32)) == (255, 0, 0)


# ---- what is wrong ---------------------------------------------------------------------------------------------------
METHOD = ["--method", "softpag"]
WRONG: dict[str, tuple[list[str], str]] = {
    "no such method": (["--method", "soft-pug"], "did you mean SoftPAG"),
    "no subjects": (["--method", "pag", "--subjects", "dog"], "PAG takes no subjects; these methods do: AStar"),
    "an empty subject": (["--method", "a-star", "--subjects", "dog,"], "has an empty word"),
    "subjects of nothing": (["--subjects", "dog"], "--subjects belongs to a method"),
    "subjects twice": (
        ["--method", "a-star", "--subjects", "dog", "--param", 'subjects=["dog"]'],
        "say the same thing",
    ),
    "a word that is not there": (
        ["--method", "a-star", "--param", "level=1", "--subjects", "cow"],
        "'cow' is not in the prompt",
    ),
    "no such level": (["--method", "a-star", "--subjects", "dog"], "level=2: .*its levels are 0, 1. Give one of these"),
    "nothing to bind": (["--method", "syngen", "--subjects", "dog"], "no modifier to bind"),
    "variants of nothing": (["--variants", "strength=1"], "name one with --method"),
    "variants and a configuration": ([*METHOD, "--config", "x", "--variants", "scale=1"], "leave out --method"),
    "an empty variant": ([*METHOD, "--variants", "strength=.5,"], "has an empty value"),
    "a variant twice": ([*METHOD, "--variants", "scale=1", "--variants", "scale=2"], "names 'scale' twice"),
    "no such parameter": ([*METHOD, "--variants", "u=1"], "no parameter 'u'"),
    "out of range": ([*METHOD, "--variants", "strength=.5,2"], "strength=2"),
    "no such layer": ([*METHOD, "--variants", "layers=1,99"], "Layer 99 does not exist"),
    "no such file": (["--variants", "nowhere.json"], "is neither a file nor NAME=V1,V2"),
    "a file and a method": ([*METHOD, "--variants", "x.json"], "leave out --method"),
    "a file and more": (["--variants", "x.json", "--variants", "scale=1"], "give it alone"),
    "no list": (["--variants", "{}/bad/object.json"], "wanted is a list"),
    "no JSON": (["--variants", "{}/bad/text.json"], "not JSON"),
    "no processor in it": (["--variants", "{}/bad/entry.json"], "entry 2: .*no processor 'Nope'"),
    "a tensor": (["--method", "ir-diffusion"], "references and scene cannot be written here: .*--config FOLDER"),
    "a story of one": (["--method", "consistent-self-attention"], "give a --prompt for each of them"),
    "seeds of a story": (["--prompt", "y", "--num-seeds", "2"], "--num-seeds is for one prompt"),
    "no seeds": (["--num-seeds", "0"], "1 or more"),
    "no picture file": (["--num-seeds", "2", "--out", "x.txt"], "let it end in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad").mkdir(exist_ok=True)
    for name, text in [("object", "{}"), ("text", "["), ("entry", '[{"processor": "PAG"}, {"processor": "Nope"}]')]:
        (folder / "bad" / f"{name}.json").write_text(text)
    arguments, sentence = WRONG[case]
    model = [folder / "sd15", "--prompt", "a dog", *SIZE]
    assert run("generate", *model, *(a.replace("{}", str(folder)) for a in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(sentence, captured.err.strip().splitlines()[-1])


def test_answers_take_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for wrong in (["--num-seeds", "2"], ["--prompt", "again"], ["--method", "vhr", "--variants", "alpha=1,2"]):
        assert run("generate", "world-llava", "--image", tmp_path / "x.png", "--prompt", "what?", *wrong) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[2] for line in said] == ["--num-seeds", "'world-llava'", "--variants"]
