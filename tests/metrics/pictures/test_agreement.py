"""Agreement with the prompt: the formulas by hand and in loops, templates, parts of a prompt."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from attnsteer.metrics.pictures import agreement
from attnsteer.metrics.pictures.templates import TEMPLATES, filled, parts

RNG = np.random.default_rng(5)
IMAGES, TEXTS = RNG.normal(size=(7, 5)), RNG.normal(size=(7, 5))


def loop_cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_cosines_and_clip_scores_in_loops() -> None:
    wanted = [loop_cosine(i, t) for i, t in zip(IMAGES, TEXTS, strict=True)]
    assert min(wanted) < 0 < max(wanted)
    np.testing.assert_allclose(agreement.cosine(IMAGES, TEXTS), wanted, rtol=1e-12)
    np.testing.assert_allclose(agreement.clip_score(IMAGES, TEXTS), [2.5 * max(w, 0) for w in wanted], rtol=1e-12)
    assert agreement.clip_score([1.0, 0.0], [0.36, math.sqrt(1 - 0.36**2)]) == pytest.approx(0.9)
    assert agreement.clip_score([1.0, 0.0], [-1.0, 0.0]) == 0


def test_the_minimum_object_by_hand() -> None:
    objects = [[1.0, 0.0], [0.0, 1.0]]
    assert agreement.minimum_object([[0.6, 0.8]], objects) == pytest.approx([0.6])
    assert agreement.minimum_object([[1.0, 1.0]], objects) == pytest.approx([math.sqrt(0.5)])
    for image, found in zip(IMAGES, agreement.minimum_object(IMAGES, TEXTS[:3]), strict=True):
        assert found == pytest.approx(min(loop_cosine(image, text) for text in TEXTS[:3]))


def test_lengths_of_embeddings_do_not_matter() -> None:
    for function in (agreement.cosine, agreement.clip_score, agreement.minimum_object):
        for scales in ((3.0, 1.0), (1.0, 0.01), (1e6, 1e-6)):
            scaled = function(scales[0] * IMAGES, scales[1] * TEXTS)
            np.testing.assert_allclose(scaled, function(IMAGES, TEXTS), rtol=1e-12)
    lengths = RNG.uniform(0.1, 10, (7, 1))
    np.testing.assert_allclose(agreement.averaged(lengths * TEXTS), agreement.averaged(TEXTS), rtol=1e-12)


def test_the_average_of_templates_is_the_mean_of_directions() -> None:
    directions = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in TEXTS]
    mean = [sum(column) / 7 for column in zip(*directions, strict=True)]
    length = math.sqrt(sum(v * v for v in mean))
    np.testing.assert_allclose(agreement.averaged(TEXTS), [v / length for v in mean], rtol=1e-12)
    assert agreement.averaged([[2.0, 0.0], [0.0, 0.1]]) == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("bad", [[[0.0, 0.0]], [[float("nan"), 1.0]], [[float("inf"), 1.0]]])
def test_embeddings_without_direction_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no direction"):
        agreement.cosine(bad, [[1.0, 0.0]])


# ---- templates -------------------------------------------------------------------------------------------------------
def test_there_are_eighty_different_templates() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert TEMPLATES[0] == "a bad photo of a {}." and TEMPLATES[-1] == "a tattoo of the {}."


def test_doubled_articles_are_removed() -> None:
    for literal in (False, True):
        cats = filled("a cat", literal)
        assert len(cats) == 80
        assert cats[TEMPLATES.index("a photo of a {}.")] == "a photo of a cat."
        assert cats[TEMPLATES.index("a photo of the {}.")] == "a photo of a cat."
        assert cats[TEMPLATES.index("a {} in a video game.")] == "a cat in a video game."
        assert cats[TEMPLATES.index("a photo of many {}.")] == "a photo of many a cat."
        assert filled("an owl", literal)[TEMPLATES.index("art of a {}.")] == "art of an owl."
        assert filled("cats", literal)[TEMPLATES.index("art of a {}.")] == "art of a cats."


def test_the_literal_form_replaces_letters_wherever_they_stand() -> None:
    place = TEMPLATES.index("a photo of the {}.")
    assert filled("apple", True)[place] == "a photo of apple."
    assert filled("apple")[place] == "a photo of the apple."
    both = "a zebra and a cat"
    assert filled(both, True)[place] == "a photo of a zebrand a cat."
    assert filled(both)[place] == f"a photo of {both}."


ANIMALS = ["cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse"]
OBJECTS = [
    "backpack",
    "glasses",
    "crown",
    "suitcase",
    "chair",
    "balloon",
    "bow",
    "car",
    "bowl",
    "bench",
    "clock",
    "apple",
]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white"]


def test_on_the_prompts_of_the_paper_both_forms_agree() -> None:
    colours = [f"a {colour} {name}" for colour in COLOURS for name in OBJECTS]
    prompts = [f"a {one} and a {other}" for one in ANIMALS for other in ANIMALS]
    prompts += [f"a {one} with a {other}" for one in ANIMALS for other in ("glasses", "crown", "bow")]
    prompts += [f"{one} and {other}" for one in colours[::5] for other in colours[::7]]
    for prompt in prompts:
        for phrase in (prompt, *parts(prompt)):
            assert filled(phrase) == filled(phrase, literal=True)
        assert parts(prompt) == parts(prompt, literal=True) == re.split(" and | with ", prompt)


def test_parts_of_prompts() -> None:
    assert parts("a cat and a dog") == ["a cat", "a dog"]
    assert parts("a dog with a crown") == ["a dog", "a crown"]
    assert parts("a dog with a hat and a cat") == ["a dog with a hat", "a cat"]
    assert parts("a dog") == [] and parts("a brand without hands") == []
    assert parts("a cat and a dog and a car") == ["a cat", "a dog", "a car"]
    assert parts("a cat and a dog and a car", literal=True) == ["a cat", "a dog"]
