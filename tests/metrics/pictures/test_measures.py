"""Measures over pictures of several prompts with encoders of fixed vectors, and their summary in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnsteer.metrics.pictures import pixels, summary
from attnsteer.metrics.pictures.measures import (
    CHUNK,
    Alike,
    Changed,
    Clip,
    Distances,
    Each,
    Measure,
    Metric,
    Present,
    Shown,
)
from attnsteer.metrics.pictures.sets import on_noise
from attnsteer.metrics.pictures.templates import TEMPLATES
from attnsteer.world import sampling
from attnsteer.world.judge import Judge


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 14, 3), np.uint8))


class Encoder:
    """Mean colours of pictures, and for texts a vector for each of the words that it knows."""

    described = {"checkpoint": "fake"}  # noqa: RUF012
    words = {"cat": (1.0, 0.0, 0.0), "dog": (0.0, 1.0, 0.0), "photo": (0.0, 0.0, 1.0)}  # noqa: RUF012

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.sizes = scale, list[int]()

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        self.sizes.append(len(pictures))
        return self.scale * np.stack([np.asarray(each, dtype=float).mean((0, 1)) for each in pictures])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        known = [[vector for word, vector in self.words.items() if word in text.lower()] for text in texts]
        return self.scale * np.array([np.sum(found or [(0.1, 0.1, 0.1)], axis=0) for found in known])


class Said:
    """Captions that depend on the picture."""

    described = {"checkpoint": "captions"}  # noqa: RUF012

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        return ["a cat" if np.asarray(each)[0, 0, 0] > 127 else "a dog" for each in pictures]


def plain(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (12, 12), color)


def by_name(measure: Any) -> dict[str, Metric]:
    return {metric.name: metric for metric in measure.metrics()}


def test_agreement_with_fixed_vectors() -> None:
    measure = Clip(Encoder(), Said())
    prompt = "a cat and a dog"
    shown = [Shown(prompt, "0"), Shown(prompt, "1")]
    measure.look(shown, [plain((60, 80, 0)), plain((200, 0, 0))])
    found = by_name(measure)
    assert found["clip_cosine"].values == {
        (prompt, "0"): pytest.approx(1.4 / math.sqrt(2)),
        (prompt, "1"): pytest.approx(math.sqrt(0.5)),
    }
    prefixed = (0.6 + 0.8) / math.sqrt(3)  # "A photo depicts ..." is a photo too
    assert found["clip_score"].values[prompt, "0"] == pytest.approx(2.5 * prefixed)
    photos = sum("photo" in text for text in TEMPLATES)
    whole = photos * np.array([1, 1, 1]) / math.sqrt(3) + (80 - photos) * np.array([1, 1, 0]) / math.sqrt(2)
    whole /= np.linalg.norm(whole)
    assert found["full_prompt"].values[prompt, "0"] == pytest.approx(whole @ [0.6, 0.8, 0])
    part = photos * np.array([1, 0, 1]) / math.sqrt(2) + (80 - photos) * np.array([1.0, 0, 0])
    part /= np.linalg.norm(part)
    assert found["minimum_object"].values[prompt, "0"] == pytest.approx(0.6 * part[0])
    assert found["minimum_object"].values[prompt, "1"] == 0
    assert found["text_text"].values == {(prompt, "0"): pytest.approx(whole[1]), (prompt, "1"): pytest.approx(whole[0])}
    assert found["text_text"].backbone["captioner"] == {"checkpoint": "captions"}
    assert found["clip_diversity"].values == {(prompt, ""): pytest.approx(0.4)}
    assert "clip_i" not in found and set(measure.without) == {"clip_i", "clip_i_subject"}


def test_prompts_without_parts_are_left_out_and_counted() -> None:
    measure = Clip(Encoder())
    for prompt in ("a cat", "a dog", "a cat and a dog", "a dog with a cat", "a dog and a cat and a dog"):
        measure.look([Shown(prompt, "0")], [picture(1)])
    found = by_name(measure)
    assert len(found["full_prompt"].values) == 5
    assert {prompt for prompt, _ in found["minimum_object"].values} == {
        "a cat and a dog",
        "a dog with a cat",
        "a dog and a cat and a dog",
    }
    assert measure.notes == [
        'minimum_object: 2 prompts have neither " and " nor " with "',
        "minimum_object: 1 prompts have more than two parts, and all count",
    ]
    assert "text_text" not in found


def test_to_the_letter_prompts_without_parts_are_skipped() -> None:
    measure = Clip(Encoder(), Said(), literal=True)
    for prompt in ("a cat", "a cat and a dog"):
        measure.look([Shown(prompt, "0")], [picture(1)])
    found = by_name(measure)
    for name in ("full_prompt", "minimum_object", "text_text"):
        assert list(found[name].values) == [("a cat and a dog", "0")]
    assert len(found["clip_cosine"].values) == len(found["clip_score"].values) == 2
    assert measure.notes == ['full_prompt, minimum_object, text_text: 1 prompts have neither " and " nor " with "']


def test_the_length_of_embeddings_changes_nothing() -> None:
    found = []
    for scale in (1.0, 37.0):
        measure = Clip(Encoder(scale), Said())
        for prompt in ("a cat and a dog", "a dog"):
            measure.look([Shown(prompt, str(n), ("set", "0")) for n in range(3)], [picture(n) for n in range(3)])
        found.append({name: metric.values for name, metric in by_name(measure).items()})
    assert len(found[0]) == 7 and found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values)


def test_sets_and_seeds_in_loops() -> None:
    measure, encoder = Alike(Encoder(), "dino", "dino_diversity"), Encoder()
    prompts, seeds = ["a cat", "a dog on grass", "a dog"], ["0", "1"]
    pictures = {(p, s): picture(10 * i + j) for i, p in enumerate(prompts) for j, s in enumerate(seeds)}
    mask = np.zeros((12, 14), bool)
    mask[2:9, 3:10] = True
    for prompt in prompts:
        one = "" if prompt == "a dog" else "pet"
        shown = [Shown(prompt, s, (one, s) if one else ("", ""), mask) for s in seeds]
        measure.look(shown, [pictures[prompt, s] for s in seeds])
    found = by_name(measure)

    def cosine(a: Image.Image, b: Image.Image) -> float:
        x, y = encoder.images([a, b])
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    for seed in seeds:
        pair = pictures["a cat", seed], pictures["a dog on grass", seed]
        assert found["dino"].values["pet", seed] == pytest.approx(cosine(*pair))
        alone = [on_noise(each, mask) for each in pair]
        assert found["dino_subject"].values["pet", seed] == pytest.approx(cosine(*alone))
    assert len(found["dino"].values) == 2
    for prompt in prompts:
        pair = pictures[prompt, "0"], pictures[prompt, "1"]
        assert found["dino_diversity"].values[prompt, ""] == pytest.approx(1 - cosine(*pair))
    told = summary.summarised(found["dino"], draws=20)
    assert (told["images"], told["prompts"], told["seeds"], told["values"]) == (4, 2, 2, 2)


def test_equal_pictures_are_consistent_and_not_diverse() -> None:
    measure, pixel = Alike(Encoder(), "clip_i", "d"), Distances(pixels.rms, "rms_diversity", "RMS", {})
    shown = [Shown("a dog", str(n), ("dog", "0")) for n in range(4)]
    for each in (measure, pixel):
        each.look(shown, [picture(1)] * 4)
    found = by_name(measure)
    assert found["clip_i"].values == {("dog", "0"): pytest.approx(1)}
    assert found["d"].values["a dog", ""] == pytest.approx(0, abs=1e-12)
    assert by_name(pixel)["rms_diversity"].values == {("a dog", ""): 0}


def test_diversity_in_loops_and_in_any_order() -> None:
    pictures, values = [picture(n) for n in range(4)], []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        measure = Distances(pixels.rms, "x", "RMS", {})
        measure.look([Shown("p", str(n)) for n in order], [pictures[n] for n in order])
        measure.look([Shown("q", "0")], pictures[:1])  # one picture has no diversity
        values.append(by_name(measure)["x"].values)
    apart = [
        np.sqrt(np.mean((np.asarray(a) / 255.0 - np.asarray(b) / 255.0) ** 2)) for a, b in combinations(pictures, 2)
    ]
    assert values[0] == pytest.approx({("p", ""): np.mean(apart)}) and values[1] == pytest.approx(values[0])


def test_encoders_get_a_few_pictures_at_once() -> None:
    encoder = Encoder()
    count = 2 * CHUNK + 3
    Alike(encoder, "c", "d").look([Shown("p", str(n)) for n in range(count)], [picture(n) for n in range(count)])
    assert encoder.sizes == [CHUNK, CHUNK, 3]


def test_scores_of_objectives_keep_their_pictures() -> None:
    class Score:
        def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[float]]:
            return {"x": [float(np.asarray(i).mean()) + len(p) for i, p in zip(images, prompts, strict=True)]}

    measure, count = Each(Score(), "x", "some", {"checkpoint": "fake"}), CHUNK + 2
    measure.look([Shown("abc", str(n)) for n in range(count)], [picture(n) for n in range(count)])
    wanted = {("abc", str(n)): np.asarray(picture(n)).mean() + 3 for n in range(count)}
    assert by_name(measure)["x"].values == pytest.approx(wanted)


def test_the_judge_sees_which_objects_are_there() -> None:
    judge = Judge.load()
    measure = Present(judge, {"checkpoint": "world-judge"})
    both = sampling.compose(["dog", "car"], "blue", seed=3).image()
    more = sampling.compose(["dog", "car", "clock"], "white", seed=4).image()
    lone = sampling.compose(["dog"], "white", seed=5).image()
    measure.look([Shown("a dog and a car", str(n)) for n in range(3)], [both, more, lone])
    measure.look([Shown("a sunset", "0")], [lone])
    found = {name: list(metric.values.values()) for name, metric in by_name(measure).items()}
    assert found == {"objects": [1, 1, 0.5], "all_objects": [1, 1, 0], "only_objects": [1, 0, 0]}
    assert measure.notes == ["objects: 1 prompts name no category that the judge knows"]


def test_the_size_of_a_change() -> None:
    dark, light = plain((10, 20, 30)), plain((61, 71, 81))
    changed = Changed(lambda shown: dark)
    assert isinstance(changed, Measure) and changed.without == ["identical", "rms", "psnr", "ssim"]
    changed.look([Shown("p", "0"), Shown("p", "1")], [dark, light])
    found = by_name(changed)
    assert found["identical"].values == {("p", "0"): 1, ("p", "1"): 0}
    assert found["rms"].values == pytest.approx({("p", "0"): 0, ("p", "1"): 0.2})
    assert found["psnr"].values == pytest.approx({("p", "1"): 10 * math.log10(25)})
    assert found["ssim"].values["p", "0"] == 1
    same = Changed(lambda shown: {"0": dark, "1": light}[shown.seed])
    same.look([Shown("p", "0")], [dark])
    assert set(by_name(same)) == {"identical", "rms", "ssim"}


# ---- summary ---------------------------------------------------------------------------------------------------------
def metric(values: dict[tuple[str, str], float], better: str = "higher") -> Metric:
    found = Metric("m", "scale", better)
    for (prompt, seed), value in values.items():
        found.add((prompt, seed), value, [Shown(prompt, seed)])
    return found


OURS = {("a", "0"): 1.0, ("a", "1"): 3.0, ("b", "0"): 5.0, ("c", "0"): 100.0}
THEIRS = {("b", "0"): 5.0, ("a", "1"): 1.0, ("a", "0"): 2.0, ("d", "0"): -50.0}


def test_the_mean_is_that_of_all_pictures() -> None:
    told = summary.summarised(metric(OURS), draws=200)
    assert told["value"] == pytest.approx(109 / 4) and told["low"] <= told["value"] <= told["high"]
    assert (told["images"], told["prompts"], told["seeds"], told["samples"]) == (4, 3, 2, 3)


def test_differences_are_of_what_both_have() -> None:
    effect = summary.difference(metric(OURS), metric(THEIRS), draws=4000)
    assert effect is not None
    assert (effect["value"], effect["baseline"]) == (pytest.approx(3), pytest.approx(8 / 3))
    assert effect["delta"] == pytest.approx((-1 + 2 + 0) / 3)
    assert effect["pairs"] == 3 and effect["samples"] == 2 and effect["win_rate"] == pytest.approx(0.5)
    # two prompts are drawn from two: (a, a) and (b, b) with a quarter each, both with a half
    assert effect["low"] == pytest.approx(0) and effect["high"] == pytest.approx(0.5)
    assert effect["positive"] == pytest.approx(0.75 + 0.25 / 2, abs=0.03)
    assert summary.difference(metric(OURS), metric({("z", "0"): 1.0})) is None


def test_the_same_seed_gives_the_same_interval() -> None:
    first, again, other = (summary.difference(metric(OURS), metric(THEIRS), 101, 0.9, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_win_rates_count_ties_half() -> None:
    assert summary.win_rate([1, 2, 3, 4], [0, 2, 5, 3]) == pytest.approx(2.5 / 4)
    assert summary.win_rate([1, 2, 3, 4], [0, 2, 5, 3], "lower") == pytest.approx(1.5 / 4)
    assert summary.win_rate([1.0], [1.0]) == 0.5
    with pytest.raises(ValueError, match="no pairs"):
        summary.win_rate([1.0], [])


def test_values_of_other_pictures_are_no_pairs() -> None:
    ours, theirs = Metric("d", "s"), Metric("d", "s")
    ours.add(("a", ""), 1.0, [Shown("a", "0"), Shown("a", "1")])
    theirs.add(("a", ""), 2.0, [Shown("a", "0"), Shown("a", "2")])
    assert summary.paired_keys(ours, theirs) == []
    theirs.add(("a", ""), 2.0, [Shown("a", "1"), Shown("a", "0")])
    assert summary.paired_keys(ours, theirs) == [("a", "")]
