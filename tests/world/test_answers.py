"""The answering model: true data, split by combination; training that resumes exactly; scores that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnsteer.world import assets, sampling, text
from attnsteer.world.catalog import CORE
from attnsteer.world.evaluate import answers
from attnsteer.world.train import data, llava

TINY = ["--layers", "2", "--heads", "2", "--width", "32", "--turns", "2", "--threads", "1", "--float32"]
TINY += ["--batch", "2", "--tower-batch", "2", "--language-batch", "2", "--decay", "0", "--warmup", "1"]


def tiny() -> tuple[llava.Llava, llava.Chat]:
    torch.manual_seed(0)
    words = llava.processor().tokenizer
    return llava.build(words, 2, 2, 32).eval(), llava.Chat(words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_resumes_bit_exactly_in_every_stage(tmp_path: Path) -> None:
    def run(name: str, tower: int, language: int, steps: int) -> dict[str, torch.Tensor]:
        stages = ["--tower-steps", str(tower), "--language-steps", str(language), "--steps", str(steps)]
        places = ["--out", str(tmp_path / name / "model"), "--run", str(tmp_path / name / "run"), "--resume"]
        llava.main([*TINY, *stages, *places])
        return weights(tmp_path / name / "model")

    whole = run("whole", 3, 3, 3)
    for stopped in ((2, 0, 0), (3, 1, 0), (3, 3, 2)):
        run("parts", *stopped)
    parts = run("parts", 3, 3, 3)
    assert whole.keys() == parts.keys()
    for key in whole:
        assert torch.equal(whole[key], parts[key]), key
    tower_only = run("tower", 3, 0, 0)
    same = {key for key in whole if torch.equal(whole[key], tower_only[key])}
    assert same == {key for key in whole if "vision_tower" in key}  # frozen after its stage; all else is trained


def test_questions_of_one_picture_do_not_see_each_other() -> None:
    model, chat = tiny()
    processor, scene = llava.processor(), sampling.sample(3)
    turns = [text.exists(scene, "dog"), text.how_many(scene), text.background(scene)]
    together, alone = chat.batch([chat.about_picture(turns)]), chat.about_picture(turns[2:])
    length, start = len(alone[0]) - len(chat.with_image), len(chat.about_picture(turns[:2])[0])
    wanted = processor(
        text="USER: <image>\n{} ASSISTANT: {}</s>".format(*turns[2]), images=scene.image(), return_tensors="pt"
    )
    assert wanted.input_ids[0].tolist() == alone[0]
    assert torch.equal(wanted.pixel_values, data.pixels([scene]))
    together.pop("labels")
    with torch.no_grad():
        a = model(**together, pixel_values=wanted.pixel_values).logits[0, start : start + length]
        b = model(**wanted).logits[0, -length:]
    assert torch.allclose(a, b, atol=1e-5)


def test_conversation_is_the_chat_template_without_picture() -> None:
    _, chat = tiny()
    scene = sampling.sample(3)
    turns = [text.exists(scene, "dog"), text.how_many(scene)]
    ids, labels, places, groups = chat.conversation(turns)
    messages = [
        {"role": role, "content": [{"type": "text", "text": line}]}
        for turn in turns
        for role, line in zip(("user", "assistant"), turn, strict=True)
    ]
    wanted = llava.processor().apply_chat_template(messages)
    assert chat.words.decode(ids).removeprefix("<s>").strip() == wanted
    assert places == list(range(len(ids))) and set(groups) == {0}
    learned = chat.words.decode([label for label in labels if label != -100])
    assert learned == "".join(f" {answer}</s>" for _, answer in turns)


def test_every_scene_is_described_once_and_asked_about_truthfully() -> None:
    rng = np.random.default_rng(0)
    for scene in llava.draw((0, 9), 40, prior=0.5):
        assert sampling.split_of_scene(scene) == "train"
        turns = llava.questions(scene, rng, 4)
        described = [answer for question, answer in turns if question in text.DESCRIPTIONS]
        assert len(turns) == 4 and described == [text.describe(scene)]
        for question, answer in turns:
            if question.startswith("Is there"):
                assert answer.startswith("Yes") == bool(answers.named(question) & set(scene.categories))


def test_patch_facts_are_what_is_to_be_seen() -> None:
    style = sampling.Style(frame=1.0, gradient=1.0)
    for seed in range(5):
        scene = sampling.sample(seed, count=2, repeat=0, style=style)
        facts = llava.patch_facts(scene)
        assert (facts < np.array(llava.FACTS)).all()
        assert facts[:, 0].tolist() == data.patch_labels([scene])[0].tolist()
        for thing in scene.objects:
            patch = facts[int(thing.centre[1]) // 8 * 8 + int(thing.centre[0]) // 8]
            assert patch[2] == 1
            mine = facts[facts[:, 0] == data.NUMBER[thing.name]]
            assert set(mine[:, 1]) == {list(llava.FRAMES).index(thing.frame) + 1}
        assert facts[:, 2].sum() == 2
        colours = list(llava.BACKGROUNDS)
        assert (facts[:, 3:] == (colours.index(scene.background), colours.index(scene.gradient) + 1)).all()


# ---------------------------------------------------------------------------------------------------- measures


def test_scenes_of_the_evaluation_were_held_out() -> None:
    for number in range(60):
        scene, alone = answers.balanced(number), answers.lonely(number)
        assert len(alone.categories) == len(alone.objects) == 1 + number % 3
        assert not answers.partners(alone) & set(alone.categories)
        for one in (scene, alone):
            assert len(one.categories) == 1 or sampling.split_of_scene(one) == "test"


def test_mentions_are_found_with_the_words_before_them() -> None:
    said = "The image shows a dog, two stop signs and a pizza on a blue background."
    assert answers.mentions(said) == [
        ("dog", "The image shows"),
        ("stop sign", "The image shows a dog,"),
        ("pizza", "The image shows a dog, two stop signs and"),
    ]
    assert answers.mentions("The image shows an apple") == [("apple", "The image shows")]


def test_f1_by_hand() -> None:
    assert answers.f1([True, True, False, False], [True, False, True, False]) == 0.5
    assert answers.f1([False], [True]) == 0


def test_blind_log_probability_is_the_product_over_the_tokens(tmp_path: Path) -> None:
    model, chat = tiny()
    llava.export(model, tmp_path)
    answer = answers.Answerer(tmp_path)
    begun, ends = "The image shows a dog and", ["a cup", "a traffic light", "an elephant"]
    found = answer.blind(begun, ends)
    for end, likely in zip(ends, found.tolist(), strict=True):
        tokens = chat.words(f"USER: {text.DESCRIBE} ASSISTANT: {begun}").input_ids
        total = 0.0
        for token in chat.encode(f" {end}"):
            with torch.no_grad():
                logits = answer.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            tokens = [*tokens, token]
        assert likely == pytest.approx(total, abs=1e-4)


def test_causes_rank_what_is_made_up_among_the_absent_categories() -> None:
    class Fond(answers.Answerer):
        def __init__(self) -> None: ...

        def blind(self, begun: str, ends: Sequence[str], question: str = "") -> torch.Tensor:
            return torch.tensor([2.0 if end == "a sports ball" else 1.0 if end == "a cup" else 0.0 for end in ends])

    scene = sampling.compose(["dog", "car"])
    report = answers.causes(Fond(), ["The image shows a dog, a sports ball and a cup on a white background."], [scene])
    assert report["made_up"] == 2 and report["made_up_partners"] == 0.5  # a dog comes with a ball
    assert report["made_up_percentile"] == report["made_up_first"] == 1.0  # the ball is named before the cup
    assert report["there_first"] == 0.0 and report["there_top3"] == 1.0  # the dog: third, behind these two
    assert report["there_percentile"] == pytest.approx(1 - 2 / (len(CORE) - 2))


# ---------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def shipped() -> answers.Answerer:
    try:
        return answers.Answerer(assets.path("models/world-llava"))
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")


def test_recorded_scores_of_the_shipped_model(shipped: answers.Answerer) -> None:
    """32 scenes of each kind; the tolerance is one or two answers, as other CPUs round differently."""
    drawn = [answers.balanced(number) for number in range(32)]
    alone = [answers.lonely(number) for number in range(32)]
    yes_no = answers.pope(shipped, drawn)
    scores = answers.description_scores(shipped(alone, [text.DESCRIBE] * 32), alone)
    assert yes_no["pope_random_f1"] == pytest.approx(0.969, abs=0.04)
    assert scores["chair_i"] == pytest.approx(0.086, abs=0.04)
    assert scores["recall"] == pytest.approx(0.841, abs=0.04)
