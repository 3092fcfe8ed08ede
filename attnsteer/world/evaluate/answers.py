"""How well world-llava answers, on scenes that training never saw.

Answers to yes/no questions, counts and colours that are right, and the objects named in descriptions: recall, and
CHAIR_I, the share of named objects that are not there (Rohrbach et al., 2018, arXiv:1809.02156), on scenes with chance
company and on "lonely" scenes, where no object has its usual partner.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from attnsteer.world import sampling, text
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE, find
from attnsteer.world.scenes import Scene

UNSEEN = 2_000_000_011  # first part of every seed used here


def named(sentence: str) -> set[str]:
    """The categories that a sentence names, longest names first: "hot dog" is no dog."""
    found, rest = set(), sentence.lower()
    forms = [(form, c.name) for c in CATEGORIES for form in (c.plural, find(c.name).phrase.split(" ", 1)[1], c.name)]
    for form, name in sorted(forms, key=lambda pair: -len(pair[0])):
        rest, hits = re.subn(rf"\b{re.escape(form)}\b", " ", rest)
        if hits:
            found.add(name)
    return found


def description_scores(said: Iterable[str], drawn: Sequence[Scene]) -> dict[str, float]:
    """chair_i: named objects that are not there / named objects; recall: objects named / objects; exact: both right."""
    names = [(named(sentence), set(scene.categories)) for sentence, scene in zip(said, drawn, strict=True)]
    mentioned = sum(len(a) for a, _ in names)
    return {
        "chair_i": sum(len(a - b) for a, b in names) / max(1, mentioned),
        "recall": sum(len(a & b) for a, b in names) / sum(len(b) for _, b in names),
        "exact": sum(a == b for a, b in names) / len(names),
    }


class Answerer:
    """world-llava behind one method."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder).to(device).eval()
        self.processor, self.device = AutoProcessor.from_pretrained(folder), device

    @torch.no_grad()
    def __call__(self, drawn: Sequence[Scene], questions: Sequence[str], batch: int = 32) -> list[str]:
        """Greedy answers."""
        answers = []
        for first in range(0, len(drawn), batch):
            prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions[first : first + batch]]
            pictures = [scene.image() for scene in drawn[first : first + batch]]
            inputs = self.processor(text=prompts, images=pictures, padding=True, return_tensors="pt").to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=48, do_sample=False)
            answers += self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def lonely(number: int) -> Scene:
    """A scene of one to three objects in which no object has its usual partner."""
    rng = np.random.default_rng((UNSEEN, 7, number))
    names: list[str] = []
    while len(names) < 1 + number % 3:
        name = CORE[int(rng.integers(len(CORE)))]
        if name not in names and find(name).partner not in names:
            names.append(name)
    return sampling.compose(names, list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))], seed=number)


def evaluate_llava(folder: Path, count: int, device: str = "cpu") -> dict[str, float]:
    """All numbers about the answering model."""
    answer = Answerer(folder, device)
    drawn = [sampling.sample((UNSEEN, number)) for number in range(count)]
    report: dict[str, float] = {"scenes": count}
    rng = np.random.default_rng(UNSEEN)
    kinds = {
        "yes_no_present": [text.exists(s, s.categories[int(rng.integers(len(s.categories)))]) for s in drawn],
        "yes_no_absent": [text.exists(s, str(rng.choice([n for n in CORE if n not in s.counts]))) for s in drawn],
        "background": [text.background(s) for s in drawn],
        "count_objects": [text.how_many(s) for s in drawn],
    }
    for kind, turns in kinds.items():
        said = answer(drawn, [question for question, _ in turns])
        right = [
            a.split(",")[0] == b.split(",")[0] if kind.startswith("yes") else a == b
            for a, (_, b) in zip(said, turns, strict=True)
        ]
        report[kind] = sum(right) / count
    report |= description_scores(answer(drawn, [text.DESCRIBE] * count), drawn)
    alone = [lonely(number) for number in range(count)]
    said = answer(alone, [text.DESCRIBE] * count)
    report |= {f"lonely_{key}": value for key, value in description_scores(said, alone).items()}
    wrong = [(w, s) for a, s in zip(said, alone, strict=True) for w in named(a) - set(s.categories)]
    partners = sum(w in {find(name).partner for name in s.categories} for w, s in wrong)
    report["lonely_wrong_that_are_partners"] = partners / max(1, len(wrong))
    return report
