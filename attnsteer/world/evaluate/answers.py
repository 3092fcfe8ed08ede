"""How well world-llava answers about scenes whose combinations no training scene had, and where its mistakes come from.

Descriptions: recall, and CHAIR_I, the share of named objects that are not there (Rohrbach et al., 2018,
arXiv:1809.02156), on balanced scenes (company by chance) and on "lonely" ones, where no object has its usual partner.
Yes/no questions as in POPE (Li et al., 2023, arXiv:2305.10355): F1 with absent objects drawn at random, and with the
usual partner of an object that is there (adversarial). Why: how much the model without the picture likes what was made
up, against the other absent categories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch

from attnsteer.metrics import chair
from attnsteer.world import sampling, text
from attnsteer.world.catalog import CATEGORIES, CORE, find
from attnsteer.world.scenes import Scene

UNSEEN = 2_000_000_011  # first part of every seed used here
Answers = Callable[[Sequence[Scene], Sequence[str]], list[str]]


# ---------------------------------------------------------------------------------------------------- scenes


def balanced(number: int, style: sampling.Style = sampling.VARIED) -> Scene:
    """A scene of one to four objects with company by chance, of a combination that no training scene has."""
    return sampling.sample((UNSEEN, number), split="test", style=style)


def lonely(number: int, style: sampling.Style = sampling.VARIED) -> Scene:
    """The same with one to three objects, none of which has its usual partner."""
    for attempt in numbers():
        seed = (UNSEEN, 7, number, attempt)
        scene = sampling.sample(seed, count=1 + number % 3, repeat=0, split="test", style=style)
        if not partners(scene) & set(scene.categories):
            break
    return scene


def partners(scene: Scene) -> set[str]:
    """The usual partners of its objects."""
    return {find(name).partner for name in scene.categories}


# ---------------------------------------------------------------------------------------------------- descriptions


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
    pairs = zip(said, drawn, strict=True)
    records = [chair.caption(n, sorted(named(line)), scene.categories) for n, (line, scene) in enumerate(pairs)]
    table = chair.ratios(records)
    exact = sum(r.mentions == r.right == r.there for r in records) / len(records)
    return {"chair_i": table["chair_i"].value, "recall": table["recall"].value, "exact": exact}


def mentions(sentence: str) -> list[tuple[str, str]]:
    """The categories in the order of a description, each with the words before it: ("dog", "The image shows")."""
    found = []
    for item in re.finditer(r"(?:shows| and|,) (.+?)(?=,| and | on an? |$)", sentence):
        found += [(name, sentence[: item.start(1)].rstrip()) for name in named(item[1])]
    return found


# ---------------------------------------------------------------------------------------------------- the model


class Answerer:
    """world-llava behind one method, and the same model without the picture."""

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

    @torch.no_grad()
    def blind(self, begun: str, ends: Sequence[str], question: str = text.DESCRIBE) -> torch.Tensor:
        """Log-probability, without a picture, that the answer goes on from `begun` with each of `ends`: [ends]."""
        words = self.processor.tokenizer
        start = words(f"USER: {question} ASSISTANT: {begun}").input_ids
        rows = [words(f" {end}", add_special_tokens=False).input_ids for end in ends]
        length = max(map(len, rows))
        tokens = torch.tensor([start + row + [words.pad_token_id] * (length - len(row)) for row in rows])
        logits = self.model(input_ids=tokens.to(self.device)).logits[:, len(start) - 1 : -1]
        likely = logits.log_softmax(-1).gather(2, tokens[:, len(start) :, None].to(self.device))[..., 0].cpu()
        inside = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return (likely * inside).sum(1)


# ---------------------------------------------------------------------------------------------------- measures


def f1(said: Sequence[bool], true: Sequence[bool]) -> float:
    """2 TP / (2 TP + FP + FN)."""
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    return 2 * hits / max(1, sum(said) + sum(true))


def pope(answer: Answers, drawn: Sequence[Scene]) -> dict[str, float]:
    """F1 and the share of right answers about one object that is there and one that is not, in each scene."""
    rng = np.random.default_rng(UNSEEN)
    report = {}
    there = [text.exists(scene, str(rng.choice(scene.categories))) for scene in drawn]
    yes = [said.startswith("Yes") for said in answer(drawn, [question for question, _ in there])]
    report["yes_no_present"] = sum(yes) / len(yes)
    for kind in ("random", "adversarial"):
        turns = []
        for scene in drawn:
            absent = [name for name in CORE if name not in scene.counts]
            usual = sorted(partners(scene).intersection(absent))
            turns.append(text.exists(scene, str(rng.choice(usual if kind == "adversarial" and usual else absent))))
        false = [said.startswith("Yes") for said in answer(drawn, [question for question, _ in turns])]
        report[f"yes_no_{kind}_absent"] = 1 - sum(false) / len(false)
        report[f"pope_{kind}_f1"] = f1(yes + false, [True] * len(yes) + [False] * len(false))
    return report


def details(answer: Answers, drawn: Sequence[Scene]) -> dict[str, float]:
    """The share of answers about numbers, colours and places that are right to the letter."""
    single = [next((name for name, n in scene.counts.items() if n == 1), "") for scene in drawn]
    pairs = [(s, s.categories) for s in drawn if len(s.objects) == len(s.categories) > 1]
    asked = {
        "background": [(scene, text.background(scene)) for scene in drawn],
        "count_objects": [(scene, text.how_many(scene)) for scene in drawn],
        "count_category": [(scene, text.how_many(scene, scene.categories[0])) for scene in drawn],
        "frame": [(scene, text.frame(scene, name)) for scene, name in zip(drawn, single, strict=True) if name],
        "left_of": [(scene, text.relation(scene, names[0], "left of", names[1])) for scene, names in pairs],
    }
    report = {}
    for kind, about in asked.items():
        said = answer([scene for scene, _ in about], [question for _, (question, _) in about])
        report[kind] = sum(a == true for a, (_, (_, true)) in zip(said, about, strict=True)) / max(1, len(said))
    return report


def causes(answer: Answerer, said: Sequence[str], drawn: Sequence[Scene]) -> dict[str, float]:
    """Where made-up objects stand in what the model expects without the picture; the objects that are there compared.

    Each named object is ranked against all categories that are neither there nor named before it, by `Answerer.blind`.
    made_up: how many; _percentile: mean share of those categories that are less likely (0.5 by chance); _first, _top3:
    share with rank 1, 1 to 3; _partners: share that are the usual partner of an object that is there.
    """
    ranks: dict[str, list[tuple[float, int]]] = {"made_up": [], "there": []}
    usual = 0
    for sentence, scene in zip(said, drawn, strict=True):
        for name, begun in mentions(sentence):
            made_up = name not in scene.counts
            usual += made_up and name in partners(scene)
            others = [n for n in CORE if n not in scene.counts and n != name and n not in named(begun)]
            likely = answer.blind(begun, [find(n).phrase for n in [name, *others]])
            above = int((likely[1:] > likely[0]).sum())
            ranks["made_up" if made_up else "there"].append((1 - above / len(others), above + 1))
    report: dict[str, float] = {"made_up": len(ranks["made_up"])}
    for kind, found in ranks.items():
        table = np.array(found or [(0.0, 99)])
        report[f"{kind}_percentile"] = float(table[:, 0].mean())
        report |= {f"{kind}_{key}": float((table[:, 1] <= n).mean()) for key, n in (("first", 1), ("top3", 3))}
    report["made_up_partners"] = usual / max(1, len(ranks["made_up"]))
    return report


def evaluate_llava(folder: Path, count: int, device: str = "cpu") -> dict[str, float]:
    """All numbers about the answering model, from `count` scenes of each kind."""
    answer = Answerer(folder, device)
    drawn, alone = ([kind(number) for number in range(count)] for kind in (balanced, lonely))
    report: dict[str, float] = {"scenes": count, **pope(answer, drawn), **details(answer, drawn)}
    report |= description_scores(answer(drawn, [text.DESCRIBE] * count), drawn)
    said = answer(alone, [text.DESCRIBE] * count)
    report |= {f"lonely_{key}": value for key, value in description_scores(said, alone).items()}
    return report | {f"lonely_{key}": value for key, value in causes(answer, said, alone).items()}
