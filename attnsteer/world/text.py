"""What is said about scenes: captions for pictures, questions with true answers, and both tokenizers.

Everything said here is true of the scene it was made from; nothing else is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from attnsteer.world import sampling
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE, FRAMES, NUMBERS, find
from attnsteer.world.scenes import Scene

DESCRIBE = "Please describe this image in detail."
DESCRIPTIONS = (DESCRIBE, DESCRIBE, "Describe the image.")
Turn = tuple[str, str]  # question, answer


def listing(phrases: Sequence[str]) -> str:
    """ "a dog", "a dog and a cat", "a dog, a cat and a car"."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def phrase(name: str, count: int = 1, frame: str = "") -> str:
    """ "a dog", "two dogs", "a red-framed dog", "two red-framed dogs"."""
    if not frame:
        return find(name).counted(count)
    first, rest = find(name).counted(count).split(" ", 1)
    return f"{'a' if count == 1 else first} {frame}-framed {rest}"


def objects(scene: Scene, frames: bool = True) -> str:
    """The objects with their numbers and frames, in reading order: "two dogs and a red-framed car"."""
    kinds = Counter((thing.name, thing.frame if frames else "") for thing in scene.objects)
    return listing([phrase(name, count, frame) for (name, frame), count in kinds.items()])


def backdrop(scene: Scene) -> str:
    """ "blue" or, for a background that changes from top to bottom, "blue to white"."""
    return f"{scene.background} to {scene.gradient}" if scene.gradient else scene.background


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption for training and prompting pictures: "a dog and a car on a blue background".

    With `rng`, in one of several wordings, some of which say less: where two objects are, or no background.
    """
    said, draw = objects(scene), rng.random() if rng is not None else 1.0
    if draw < 0.1 and len(scene.objects) == 2 and len(scene.categories) == 2:
        one, other = (phrase(thing.name, frame=thing.frame) for thing in scene.objects)
        relation = next((r for i, r, j in scene.relations if (i, j) == (0, 1)), "")
        said = {"left of": f"{one} to the left of {other}", "above": f"{one} above {other}", "": said}[relation]
    if 0.1 <= draw < 0.25:
        return said
    if 0.25 <= draw < 0.35:
        return f"a {backdrop(scene)} background with {said}"
    return f"{'a picture of ' if 0.35 <= draw < 0.45 else ''}{said} on a {backdrop(scene)} background"


def describe(scene: Scene) -> str:
    """The answer to `DESCRIBE`."""
    return f"The image shows {objects(scene, frames=False)} on a {backdrop(scene)} background."


def _bare(name: str) -> str:
    """The singular without article: "dog", "pair of scissors"."""
    return find(name).phrase.split(" ", 1)[1]


def exists(scene: Scene, name: str) -> Turn:
    """Is it there? Answers start with Yes or No."""
    question = f"Is there {find(name).phrase} in the image?"
    if name not in scene.counts:
        return question, f"No, there is no {_bare(name)} in the image."
    count = scene.counts[name]
    verb = "is" if count == 1 else "are"
    return question, f"Yes, there {verb} {find(name).counted(count)} in the image."


def how_many(scene: Scene, name: str = "") -> Turn:
    """How many of this category, or of all objects if `name` is empty."""
    count = scene.counts.get(name, 0) if name else len(scene.objects)
    one, many = (_bare(name), find(name).plural) if name else ("object", "objects")
    answer = f"There is one {one}." if count == 1 else f"There are {NUMBERS[count]} {many}."
    return f"How many {many} are in the image?", answer


def background(scene: Scene) -> Turn:
    """What colour the background has."""
    return "What color is the background?", f"The background is {backdrop(scene)}."


def frame(scene: Scene, name: str) -> Turn:
    """What colour the frame of the only object of this category has."""
    colour = next(thing.frame for thing in scene.objects if thing.name == name)
    answer = f"The frame of the {_bare(name)} is {colour}." if colour else f"The {_bare(name)} has no frame."
    return f"What color is the frame of the {_bare(name)}?", answer


def relation(scene: Scene, one: str, kind: str, other: str) -> Turn:
    """Is the only object of the first category left of, or above, the only one of the other?"""
    place = {thing.name: index for index, thing in enumerate(scene.objects)}
    words = "to the left of" if kind == "left of" else kind
    holds = (place[one], kind, place[other]) in scene.relations
    claim = f"the {_bare(one)} is {'' if holds else 'not '}{words} the {_bare(other)}"
    return f"Is the {_bare(one)} {words} the {_bare(other)}?", f"{'Yes' if holds else 'No'}, {claim}."


def random_turn(scene: Scene, rng: np.random.Generator, pool: Sequence[str] = CORE) -> Turn:
    """A question about the scene and its true answer: existence (half yes, half no), looks, number, colours, places.

    Frames and places are asked about only where a category has one object.
    """
    draw = rng.random()
    present = scene.categories[int(rng.integers(len(scene.categories)))]
    absent = [name for name in pool if name not in scene.counts]
    missing = absent[int(rng.integers(len(absent)))]
    single = [name for name, count in scene.counts.items() if count == 1]
    if draw < 0.08 and len(single) > 1:
        one, other = rng.permutation(single)[:2]
        return relation(scene, str(one), ("left of", "above")[int(rng.integers(2))], str(other))
    if 0.08 <= draw < 0.14 and present in single:
        return frame(scene, present)
    if draw < 0.64:
        return exists(scene, present if rng.random() < 0.5 else missing)
    if draw < 0.84:
        return DESCRIPTIONS[int(rng.integers(len(DESCRIPTIONS)))], describe(scene)
    if draw < 0.94:
        return how_many(scene, (present, missing, "", "")[int(rng.integers(4))])
    return background(scene)


def corpus(count: int = 6000) -> Iterator[str]:
    """Sentences that tokenizers are trained on: all categories, numbers and colours occur."""
    every = [category.name for category in CATEGORIES]
    for number in range(count):
        rng = np.random.default_rng((17, number))
        scene = sampling.sample((18, number), categories=every, style=sampling.VARIED)
        yield caption(scene, rng)
        yield describe(scene)
        for name in (scene.categories[0], every[number % len(every)]):
            yield from (*exists(scene, name), *how_many(scene, name))
        yield from (*how_many(scene), *background(scene), *DESCRIPTIONS)
        if len(scene.objects) == len(scene.categories) > 1:
            one, other = scene.categories[:2]
            yield from (*frame(scene, one), *relation(scene, one, "left of", other))
    yield from (f"{number} objects, {colour}" for number in NUMBERS for colour in BACKGROUNDS)
    yield from (phrase(name, frame=colour) for name in every for colour in FRAMES)


# ---------------------------------------------------------------------------------------------------- tokenizers

CLIP_SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@cache
def clip_vocabulary(merges: int = 280) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a CLIP tokenizer: all bytes, all bytes as word ends, then the merges, then the ends.

    Few merges on purpose: longer object names stay several pieces, as in the big models.
    """
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=5000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((line for line in corpus() if "background" in line and "." not in line), trainer)
    learned = _merges(tokenizer)[:merges]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in learned)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, learned


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


@cache
def t5_vocabulary(size: int) -> list[tuple[str, float]]:
    """Pieces and scores of a T5 tokenizer: <pad>, </s>, <unk>, then `size` pieces learned from the captions."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", initial_alphabet=[], show_progress=False
    )
    tokenizer.train_from_iterator((line for line in corpus() if "background" in line and "." not in line), trainer)
    return [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]


def chat_tokenizer(size: int = 640) -> Tokenizer:
    """A byte-level BPE tokenizer for questions and answers; it has <image> and starts texts with <s>."""
    return Tokenizer.from_str(_chat_tokenizer(size))


@cache
def _chat_tokenizer(size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (text for line in corpus() for text in (line, " " + line, "\n" + line, "USER: ", " ASSISTANT:"))
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()
