"""What is measured on the pictures of many prompts, whoever made them: each measure looks at the pictures of one prompt
at a time, and gives its metrics at the end.

    measures = [Clip(Encoders(folder, folder)), Pixels()]
    for shown, pictures in by_prompt:           # all pictures of one prompt, PIL
        for measure in measures:
            measure.look(shown, pictures)
    metrics = [metric for measure in measures for metric in measure.metrics()]

Extractors are any objects with the methods named here; nothing takes the place of one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from . import agreement, pixels
from .judged import detections, presence
from .sets import consistency, diversity, on_noise
from .templates import filled, parts

CHUNK = 16
"""Pictures that an encoder gets at once."""

TEMPLATED = ("full_prompt", "minimum_object", "text_text")
"""What Attend-and-Excite's evaluation measures, on prompts with parts."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Shown:
    """What a picture is of.

    Attributes:
        prompt: in full; seed: what tells it from the others of its prompt, and pairs it with those of another run.
        subject: the set of pictures of one subject that it belongs to, and which of these sets; ("", "") for none.
        mask: where its subject is, truth values ``(height, width)``, or None.
    """

    prompt: str
    seed: str
    subject: Key = ("", "")
    mask: Any = field(default=None, compare=False, repr=False)


@dataclass
class Metric:
    """Values of one kind.

    Attributes:
        name, scale: what it is called and what it is; better: "higher", "lower" or "" where neither is.
        backbone: what the report says about the model behind it; empty without one.
        values: by cluster (the prompt, or the set) and item (the seed, or the number of the set).
        of: the pictures that each value is about.
    """

    name: str
    scale: str
    better: str = "higher"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    values: dict[Key, float] = field(default_factory=dict)
    of: dict[Key, tuple[Shown, ...]] = field(default_factory=dict)

    def add(self, key: Key, value: float, of: Sequence[Shown]) -> None:
        self.values[key], self.of[key] = float(value), tuple(of)

    def add_each(self, shown: Sequence[Shown], values: Any) -> None:
        """One value for each picture."""
        for one, value in zip(shown, values, strict=True):
            self.add((one.prompt, one.seed), value, [one])


class Measure:
    """Base of all: metrics by name, and what must be said about them."""

    def __init__(self, metrics: Sequence[Metric]):
        self._metrics = {metric.name: metric for metric in metrics}
        self.notes: list[str] = []

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        """Measure all pictures of one prompt."""
        raise NotImplementedError

    def metrics(self) -> list[Metric]:
        """Those that have a value."""
        return [metric for metric in self._metrics.values() if metric.values]

    @property
    def without(self) -> list[str]:
        """The names of those that have none."""
        return [name for name, metric in self._metrics.items() if not metric.values]


# ---- embeddings of pictures ------------------------------------------------------------------------------------------
class Alike(Measure):
    """How alike the pictures of a set are, whole and as subjects on noise, and how different those of one prompt.

    Args:
        encoder: has ``images(pictures) -> (n, width)`` and ``described``.
        consistency: what the cosine of a set is called; diversity: what 1 - cosine of a prompt's seeds is.
        noise: seed of the background that subjects get.
    """

    def __init__(self, encoder: Any, consistency: str, diversity: str, noise: int = 0, more: Sequence[Metric] = ()):
        about, pairs = encoder.described, "mean cosine of the pairs of a set"
        own = [
            Metric(consistency, pairs, "higher", about),
            Metric(f"{consistency}_subject", f"{pairs}, subjects on noise of seed {noise}", "higher", about),
            Metric(diversity, "mean 1 - cosine of the pairs of a prompt", "higher", about),
        ]
        super().__init__([*more, *own])
        self.encoder, self.noise = encoder, noise
        self._names = consistency, f"{consistency}_subject", diversity
        self._sets: dict[str, dict[Key, list[tuple[Shown, Any]]]] = {name: {} for name in self._names[:2]}

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        self.embedded(shown, pictures)

    def embedded(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> Any:
        """The embeddings ``(n, width)``, after they were noted."""
        rows = chunked(self.encoder.images, pictures)
        if len(rows) > 1:
            self._metrics[self._names[2]].add((shown[0].prompt, ""), 1 - consistency(rows), shown)
        self._gather(self._names[0], shown, rows)
        masked = [(one, on_noise(each, one.mask, self.noise)) for one, each in zip(shown, pictures, strict=True)
                  if one.mask is not None and one.subject[0]]  # fmt: skip
        if masked:
            subjects, alone = zip(*masked, strict=True)
            self._gather(self._names[1], subjects, chunked(self.encoder.images, alone))
        return rows

    def metrics(self) -> list[Metric]:
        for name, groups in self._sets.items():
            for key, members in groups.items():
                if len(members) > 1:
                    rows = np.stack([row for _, row in members])
                    self._metrics[name].add(key, consistency(rows), [one for one, _ in members])
        return super().metrics()

    def _gather(self, name: str, shown: Sequence[Shown], rows: Any) -> None:
        for one, row in zip(shown, rows, strict=True):
            if one.subject[0]:
                self._sets[name].setdefault(one.subject, []).append((one, row))


class Clip(Alike):
    """Agreement with the prompts on the scales of ``agreement``, and CLIP-I.

    Args:
        encoder: also has ``encode(texts) -> (n, width)``.
        captions: has ``captions(pictures) -> [text, ...]`` and ``described``; without it no text-text similarity.
        literal: templates and parts of prompts as in the code of Attend-and-Excite's authors (see ``templates``), which
            skips prompts without parts: they have no full-prompt and no text-text similarity either.
    """

    def __init__(self, encoder: Any, captions: Any = None, literal: bool = False, noise: int = 0):
        about = encoder.described
        templates = "80 templates, as published" if literal else "80 templates"
        metrics = [
            Metric("clip_cosine", "cosine with the prompt", "higher", about),
            Metric("clip_score", f"2.5 max(cosine, 0) with {agreement.PREFIX!r} + prompt", "higher", about),
            Metric("full_prompt", f"cosine with the prompt in {templates}", "higher", about),
            Metric("minimum_object", f"least cosine with a part of the prompt in {templates}", "higher", about),
        ]
        if captions is not None:
            both = {**about, "captioner": captions.described}
            metrics.append(Metric("text_text", f"cosine of caption and prompt in {templates}", "higher", both))
        super().__init__(encoder, "clip_i", "clip_diversity", noise, metrics)
        self.captions, self.literal = captions, literal
        self._phrases: dict[str, Any] = {}
        self._named: dict[str, int] = {}

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        rows, prompt = self.embedded(shown, pictures), shown[0].prompt
        plain, prefixed = as_rows(self.encoder.encode([prompt, agreement.PREFIX + prompt]))
        found = {
            "clip_cosine": agreement.cosine(rows, plain),
            "clip_score": agreement.clip_score(rows, prefixed),
        }
        named = parts(prompt, self.literal)
        self._named[prompt] = len(named)
        templates = bool(named) or not self.literal
        if templates:
            found["full_prompt"] = agreement.cosine(rows, self.phrase(prompt))
        if named:
            found["minimum_object"] = agreement.minimum_object(rows, np.stack([self.phrase(part) for part in named]))
        if templates and self.captions is not None:
            said = [text for some in _chunks(pictures) for text in self.captions.captions(some)]
            told = np.concatenate([as_rows(self.encoder.encode(some)) for some in _chunks(said)])
            found["text_text"] = agreement.cosine(told, self.phrase(prompt))
        for name, values in found.items():
            self._metrics[name].add_each(shown, values)

    def phrase(self, text: str) -> Any:
        """Its one embedding in all templates."""
        if text not in self._phrases:
            self._phrases[text] = agreement.averaged(as_rows(self.encoder.encode(filled(text, self.literal))))
        return self._phrases[text]

    def metrics(self) -> list[Metric]:
        whole, many = (sum(test(n) for n in self._named.values()) for test in (lambda n: n == 0, lambda n: n > 2))
        said = {f'{whole} prompts have neither " and " nor " with "': whole}
        said[f"{many} prompts have more than two parts, and all count"] = many
        about = ", ".join(name for name in TEMPLATED if self.literal and name in self._metrics) or "minimum_object"
        self.notes = [f"{about}: {note}" for note, count in said.items() if count]
        return super().metrics()


# ---- without embeddings ----------------------------------------------------------------------------------------------
class Distances(Measure):
    """How different the seeds of a prompt are by a distance of two pictures, such as ``pixels.rms`` or LPIPS."""

    def __init__(self, distance: Callable[[Any, Any], float], name: str, scale: str, backbone: Mapping[str, Any]):
        super().__init__([Metric(name, f"mean {scale} of the pairs of a prompt", "higher", backbone)])
        self.distance, self.name = distance, name

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        if len(pictures) > 1:
            key = shown[0].prompt, ""
            self._metrics[self.name].add(key, diversity(pictures, self.distance), shown)


class Each(Measure):
    """Scores of single pictures by an objective of ``attnsteer.search`` or alike.

    Args:
        score: gives ``{name: values}`` for pictures and prompts.
        name: of its score; scale: what it is; backbone: what the report says about its model.
    """

    def __init__(self, score: Any, name: str, scale: str, backbone: Mapping[str, Any]):
        super().__init__([Metric(name, scale, "higher", backbone)])
        self.score, self.name = score, name

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        prompts = [one.prompt for one in shown]
        both = zip(_chunks(pictures), _chunks(prompts), strict=True)
        values = [value for some, asked in both for value in self.score(some, asked)[self.name]]
        self._metrics[self.name].add_each(shown, values)


class Present(Measure):
    """Which of the objects that the prompt names the judge of the small world sees (``judged.presence``)."""

    def __init__(self, judge: Any, described: Mapping[str, Any]):
        scales = {
            "objects": "share of the named categories that are seen",
            "all_objects": "share of pictures with all of them",
            "only_objects": "share of pictures with all of them and no other",
        }
        super().__init__([Metric(name, scale, "higher", described) for name, scale in scales.items()])
        self.judge = judge
        self._unknown: list[str] = []

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        from ...world.evaluate.answers import named

        asked = named(shown[0].prompt) & set(self.judge.settings.categories)
        if not asked:
            self._unknown.append(shown[0].prompt)
            return
        said = [presence(asked, seen) for seen in detections(self.judge, pictures)]
        columns = {"objects": "objects", "all_objects": "all", "only_objects": "only"}
        for name, part in columns.items():
            self._metrics[name].add_each(shown, [getattr(each, part) for each in said])

    def metrics(self) -> list[Metric]:
        unknown = f"objects: {len(self._unknown)} prompts name no category that the judge knows"
        self.notes = [unknown] if self._unknown else []
        return super().metrics()


class Changed(Measure):
    """How far pictures are from those of another run, at the same prompt and seed.

    Args:
        baseline: the other run's picture of the same prompt and seed.
        distance: a further distance, such as LPIPS, with ``described``.
    """

    def __init__(self, baseline: Callable[[Shown], Image.Image], distance: Any = None):
        metrics = [
            Metric("identical", "share of pictures that are equal pixel by pixel", ""),
            Metric("rms", "RMS distance to the baseline, pixels in 0..1", ""),
            Metric("psnr", "decibels, of the pictures that differ", ""),
            Metric("ssim", "structural similarity to the baseline", ""),
        ]
        if distance is not None:
            metrics.append(Metric("lpips", "LPIPS to the baseline", "", distance.described))
        super().__init__(metrics)
        self.baseline, self.distance = baseline, distance

    def look(self, shown: Sequence[Shown], pictures: Sequence[Image.Image]) -> None:
        """Measure all pictures of one prompt.

        Raises:
            ValueError: a picture and the other run's have different sizes.
        """
        for one, ours in zip(shown, pictures, strict=True):
            theirs = self.baseline(one)
            apart = pixels.rms(ours, theirs)
            found = {"identical": float(apart == 0), "rms": apart, "ssim": pixels.ssim(ours, theirs)}
            if apart:
                found["psnr"] = pixels.psnr(ours, theirs)
            if self.distance is not None:
                found["lpips"] = self.distance(ours, theirs)
            for name, value in found.items():
                self._metrics[name].add_each([one], [value])


# ---- chunks ----------------------------------------------------------------------------------------------------------
def chunked(encode: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    """The embeddings of all, ``(n, width)``, a few at a time."""
    return np.concatenate([as_rows(encode(some)) for some in _chunks(items)])


def as_rows(given: Any) -> Any:
    """A tensor or array as float64 NumPy array."""
    return np.asarray(given.cpu() if hasattr(given, "cpu") else given, dtype=np.float64)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[first : first + CHUNK] for first in range(0, len(items), CHUNK))
