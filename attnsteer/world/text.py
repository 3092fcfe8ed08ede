"""What is said about scenes: captions for pictures, questions with true answers, and both tokenizers.

Everything said here is true of the scene it was made from; nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from attnsteer.world import scenes
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE, NUMBERS, find
from attnsteer.world.scenes import Scene

DESCRIBE = "Please describe this image in detail."
DESCRIPTIONS = (DESCRIBE, DESCRIBE, "Describe the image.")
Turn = tuple[str, str]  # question, answer


def listing(phrases: Sequence[str]) -> str:
    """ "a dog", "a dog and a cat", "a dog, a cat and a car"."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def objects(scene: Scene) -> str:
    """The objects with their numbers, in reading order: "two dogs and a car"."""
    return listing([find(name).counted(count) for name, count in scene.counts.items()])


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption for training and prompting pictures: "a dog and a car on a blue background".

    With `rng`, sometimes without the background, sometimes starting with "a picture of".
    """
    text, draw = objects(scene), rng.random() if rng is not None else 1.0
    if draw < 0.2:
        return text
    return f"{'a picture of ' if draw < 0.3 else ''}{text} on a {scene.background} background"


def describe(scene: Scene) -> str:
    """The answer to `DESCRIBE`."""
    return f"The image shows {objects(scene)} on a {scene.background} background."


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
    return "What color is the background?", f"The background is {scene.background}."


def random_turn(scene: Scene, rng: np.random.Generator, pool: Sequence[str] = CORE) -> Turn:
    """A question about the scene and its true answer: existence (half yes, half no), description, number, colour."""
    draw = rng.random()
    present = scene.categories[int(rng.integers(len(scene.categories)))]
    absent = [name for name in pool if name not in scene.counts]
    missing = absent[int(rng.integers(len(absent)))]
    partner = find(present).partner
    if partner in absent and rng.random() < 0.3:
        missing = partner
    if draw < 0.60:
        return exists(scene, present if rng.random() < 0.5 else missing)
    if draw < 0.82:
        return DESCRIPTIONS[int(rng.integers(len(DESCRIPTIONS)))], describe(scene)
    if draw < 0.93:
        return how_many(scene, (present, missing, "", "")[int(rng.integers(4))])
    return background(scene)


def corpus(count: int = 6000) -> Iterator[str]:
    """Sentences that tokenizers are trained on: all categories, numbers and colours occur."""
    every = [category.name for category in CATEGORIES]
    for number in range(count):
        rng = np.random.default_rng((17, number))
        scene = scenes.sample((18, number), categories=every)
        yield caption(scene, rng)
        yield describe(scene)
        for name in (scene.categories[0], every[number % len(every)]):
            yield from (*exists(scene, name), *how_many(scene, name))
        yield from (*how_many(scene), *background(scene), *DESCRIPTIONS)
    yield from (f"{number} objects, {colour}" for number in NUMBERS for colour in BACKGROUNDS)


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
