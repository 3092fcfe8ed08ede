"""Prompts in the 80 templates that CLIP's authors published for ImageNet, and the parts of a prompt."""

from __future__ import annotations

import re

TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
"""Radford et al., 2021, arXiv:2103.00020."""

_DOUBLED = re.compile(r"\b(?:a|the) (an?)\b")


def filled(phrase: str, literal: bool = False) -> list[str]:
    """The phrase in every template, without the article that a phrase with its own one doubles.

    "a photo of a a cat." becomes "a photo of a cat.", as in Attend-and-Excite's evaluation (arXiv 2301.13826).

    Args:
        literal: remove it as the authors' code does, which replaces "a a" and then "the a" by "a" wherever these
            letters stand, inside of words too: "a zebra and a cat" becomes "a zebrand a cat", "the apple" "apple".
            On the prompts of the paper both give the same.
    """
    texts = [template.format(phrase) for template in TEMPLATES]
    if literal:
        return [text.replace("a a", "a").replace("the a", "a") for text in texts]
    return [_DOUBLED.sub(r"\1", text) for text in texts]


def parts(prompt: str, literal: bool = False) -> list[str]:
    """What a prompt names: its pieces between " and ", else between " with "; empty where it has neither.

    Args:
        literal: only the first two, as the authors' code takes them.
    """
    for word in (" and ", " with "):
        if word in prompt:
            found = prompt.split(word)
            return found[:2] if literal else found
    return []
