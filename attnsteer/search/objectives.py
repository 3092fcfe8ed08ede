"""What a search maximises: callables from pictures and prompts to scores, and combinations of their means.

Any ``(images, prompts) -> scores`` will do; it gets 8-bit PIL pictures with the full prompts, and gives one number a
picture, higher is better. It must judge every picture by itself, since pictures come in any order and company.

    Clip, PickScore, Aesthetic, HPS     transformers checkpoints, by folder or hub id
    WorldJudge                          the small world's judge, embedded
    Colourfulness                       a look, without any model
    Harmonic([PickScore(), Clip()])     rank by the harmonic mean of the mean scores
    Thresholded(Clip(), [(PickScore(), 20.0), (Aesthetic(), 6.0)])    rank by CLIP those whose means reach the others
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..digests import weights_of
from ..errors import SteeringError
from ..metrics.pictures.encoders import Encoders, affine_head
from ..plain import short
from .contents import Unknown, code_of, content_of

Columns = dict[str, list[float]]
Given = Callable[[Sequence[Any], Sequence[str]], Any]


class Objective:
    """Base of all objectives: named scores for each picture, and how their means over all pictures rank a candidate."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values on which the scores depend; scores under other settings are never reused."""
        raise NotImplementedError

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Columns:
        raise NotImplementedError

    def rank(self, means: Mapping[str, float]) -> float | None:
        """The score of a candidate; None where it fails a threshold."""
        raise NotImplementedError

    @property
    def leaves(self) -> list[Objective]:
        """The objectives that look at pictures."""
        return [self]

    @property
    def reusable(self) -> bool:
        """Whether equal settings mean equal scores, so that another search may use them."""
        return True


class _Single(Objective):
    """One number a picture."""

    name = "score"

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Columns:
        return {self.name: _numbers(self.measure(images, prompts), len(images), self.name)}

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        raise NotImplementedError

    def rank(self, means: Mapping[str, float]) -> float | None:
        return means[self.name]


class Custom(_Single):
    """Somebody's function.

    Its scores are reused where its code, default values, closure, bound arguments and attributes are the same; of an
    object the code of all its methods, of a module that of all modules inside. Where one of these cannot be hashed they
    never are, unless its attribute ``settings`` (plain values) says on what it depends besides its code; this attribute
    then counts alone. What it reads from global names is for ``settings`` too.
    """

    def __init__(self, function: Given):
        if not callable(function):
            raise SteeringError(f"objective={short(function)} cannot be called: give (images, prompts) -> scores.")
        self.function = function
        named = function if hasattr(function, "__qualname__") else type(function)
        self.name = str(getattr(function, "name", None) or getattr(named, "__name__", "score"))
        told, code = getattr(function, "settings", None), None
        with suppress(Unknown):
            code = content_of(function) if told is None else code_of(function)
        self._reusable = told is not None or code is not None
        self._settings: dict[str, Any] = {"callable": f"{named.__module__}.{named.__qualname__}", "code": code}
        self._settings["settings"] = dict(told or {})

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    @property
    def reusable(self) -> bool:
        return self._reusable

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        return self.function(images, prompts)


def objective_of(given: Objective | Given) -> Objective:
    """An objective as it is, and any other callable as one."""
    return given if isinstance(given, Objective) else Custom(given)


# ---- transformers checkpoints ----------------------------------------------------------------------------------------
class _TextImage(_Single):
    """The agreement of a CLIP model's embeddings of prompt and picture."""

    prefix = ""
    factor: float | None = 1.0
    """What the cosine is multiplied by; None: what the model learned (the exponential of its logit scale)."""

    def __init__(self, checkpoint: str, processor: str | None = None, device: Any = "cpu"):
        self.encoders = Encoders(checkpoint, processor or checkpoint, device)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"objective": self.name, "prefix": self.prefix, **self.encoders.settings}

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        cosine = (self.encoders.images(images) * self.encoders.texts([self.prefix + p for p in prompts])).sum(-1)
        return (self.encoders.scale if self.factor is None else self.factor) * cosine


class Clip(_TextImage):
    """``100 <t, i>`` of CLIP; the prompt gets a prefix. About 15 to 40, the scale that ``Harmonic`` needs beside
    PickScore.

    Args:
        checkpoint: a CLIP model of transformers; the paper's is ViT-L/14.
        prefix: goes before each prompt.
        device: where the model runs.
    """

    name = "clip"
    factor = 100.0

    def __init__(
        self,
        checkpoint: str = "openai/clip-vit-large-patch14",
        prefix: str = "A photo that depicts ",
        device: Any = "cpu",
    ):
        super().__init__(checkpoint, device=device)
        self.prefix = prefix


class PickScore(_TextImage):
    """``exp(logit_scale) <t, i>`` of PickScore v1 (arXiv 2305.01569), about 18 to 24: the paper's objective."""

    name = "pickscore"
    factor = None

    def __init__(
        self,
        checkpoint: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        device: Any = "cpu",
    ):
        if processor is None and checkpoint == "yuvalkirstain/PickScore_v1":
            processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        super().__init__(checkpoint, processor, device)


class HPS(_TextImage):
    """``<t, i>`` of HPS v2 or v2.1 (arXiv 2306.09341), about 0.20 to 0.35; the versions are not comparable.

    Args:
        checkpoint: the ViT-H/14 weights in the format of transformers' CLIP; the published file is in another one.
        processor: where the tokenizer and the picture preprocessing are, if not there.
        device: where the model runs.
    """

    name = "hps"

    def __init__(self, checkpoint: str, processor: str | None = None, device: Any = "cpu"):
        super().__init__(checkpoint, processor, device)


class Aesthetic(_Single):
    """LAION's aesthetic predictor (v2, linearMSE): an affine map of CLIP ViT-L/14's picture embedding, about 4 to 7.

    Args:
        checkpoint: the CLIP model.
        head: its linear layers without activations between, ``layers.0.weight`` and so on: a safetensors or pth file,
            a folder with a ``model.safetensors``, or a hub id.
        device: where the model runs.
    """

    name = "aesthetic"

    def __init__(
        self,
        checkpoint: str = "openai/clip-vit-large-patch14",
        head: str = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
        device: Any = "cpu",
    ):
        self.encoders, self.head = Encoders(checkpoint, checkpoint, device), head
        self._affine: Any = None

    @property
    def settings(self) -> Mapping[str, Any]:
        weight, bias = self._loaded()
        ends = [float(weight.sum()), float(bias)]
        return {"objective": self.name, **self.encoders.settings, "head": str(self.head), "values": ends}

    def _loaded(self) -> Any:
        if self._affine is None:
            self._affine = affine_head(self.head)
        return self._affine

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        weight, bias = self._loaded()
        return self.encoders.images(images).double().cpu() @ weight + bias


# ---- without a model -------------------------------------------------------------------------------------------------
class Colourfulness(_Single):
    """How colourful a picture is (Hasler and Süsstrunk, 2003), about 0 to 110 for photographs.

    ``sqrt(var(a) + var(b)) + 0.3 sqrt(mean(a)^2 + mean(b)^2)`` over pixels, with ``a = R - G`` and ``b = (R + G) / 2 -
    B`` in 0..255. A look that searches find heads for; it says nothing about the prompt.
    """

    name = "colourfulness"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"objective": self.name}

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        import numpy as np

        found = []
        for image in images:
            red, green, blue = np.asarray(image.convert("RGB"), dtype=float).reshape(-1, 3).T
            a, b = red - green, (red + green) / 2 - blue
            found.append(math.sqrt(a.var() + b.var()) + 0.3 * math.hypot(a.mean(), b.mean()))
        return found


# ---- the small world -------------------------------------------------------------------------------------------------
class WorldJudge(_Single):
    """Whether the small world's judge sees what the prompt names, and nothing else: from -1 to 1.

    The mean over the named categories of how sure the judge is of one (the mean of its four surest cells), less the
    share of other categories among all that it sees.

    Args:
        folder: another judge than the embedded one.
        device: where it runs.
    """

    name = "judge"
    cells = 4

    def __init__(self, folder: str | None = None, device: Any = "cpu"):
        self._folder, self._device = folder, device
        self._judge: Any = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"objective": self.name, "weights": weights_of(self._loaded().network)}

    def _loaded(self) -> Any:
        from attnsteer.world.judge import Judge

        if self._judge is None:
            self._judge = Judge.load(self._folder, self._device)
        return self._judge

    def measure(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        seen = self._loaded().cells(images)[1].astype(float)  # [n, 16, 16, categories + 1], 0: nothing there
        found = seen.reshape(len(images), -1, seen.shape[-1])
        return [self._one(cells, self._asked(prompt)) for cells, prompt in zip(found, prompts, strict=True)]

    def _asked(self, prompt: str) -> list[int]:
        from attnsteer.world.evaluate.answers import named

        categories = self._loaded().settings.categories
        asked = [1 + categories.index(name) for name in sorted(named(prompt)) if name in categories]
        if not asked:
            raise SteeringError(f"The judge of the small world knows nothing that is named in the prompt {prompt!r}.")
        return asked

    def _one(self, cells: Any, asked: list[int]) -> float:
        surest = [sum(sorted(cells[:, category])[-self.cells :]) / self.cells for category in asked]
        total, wanted = cells[:, 1:].sum(), cells[:, asked].sum()
        return float(sum(surest) / len(asked) - (total - wanted) / max(total, self.cells))


# ---- combinations ----------------------------------------------------------------------------------------------------
class _Combined(Objective):
    def __init__(self, parts: Sequence[Objective | Given]):
        self.parts = list(map(objective_of, parts))

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"objective": "several", "parts": [dict(part.settings) for part in self.parts]}

    @property
    def leaves(self) -> list[Objective]:
        return [leaf for part in self.parts for leaf in part.leaves]

    @property
    def reusable(self) -> bool:
        return all(part.reusable for part in self.parts)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Columns:
        columns: Columns = {}
        for part in {id(leaf): leaf for leaf in self.leaves}.values():  # one that serves twice is asked once
            for name, values in part(images, prompts).items():
                if name in columns:
                    raise SteeringError(f"Two parts of the objective are called {name!r}: each needs its own name.")
                columns[name] = values
        return columns


class Harmonic(_Combined):
    """Ranks by the harmonic mean of the parts' mean scores, ``2 p c / (p + c)`` for two. Their scales matter."""

    def __init__(self, parts: Sequence[Objective | Given]):
        if len(parts) < 2:
            raise SteeringError("A harmonic mean needs two objectives or more.")
        super().__init__(parts)

    def rank(self, means: Mapping[str, float]) -> float | None:
        values = [part.rank(means) for part in self.parts]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        # where it is not defined: its limit 0 or, so that more is still better, the worst part
        return len(known) / sum(1 / value for value in known) if min(known) > 0 else min(known)


class Thresholded(_Combined):
    """Ranks by one objective those candidates whose means of others reach their thresholds; the rest is not taken."""

    def __init__(self, by: Objective | Given, at_least: Sequence[tuple[Objective | Given, float]]):
        for _, bound in at_least:
            if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
                raise SteeringError(f"The threshold {bound!r} is no finite number.")
        super().__init__([by, *(part for part, _ in at_least)])
        self.bounds = [float(bound) for _, bound in at_least]

    def rank(self, means: Mapping[str, float]) -> float | None:
        first, *others = (part.rank(means) for part in self.parts)
        passed = [value is not None and value >= bound for value, bound in zip(others, self.bounds, strict=True)]
        return first if all(passed) else None


# ---- numbers ---------------------------------------------------------------------------------------------------------
def _numbers(given: Any, count: int, name: str) -> list[float]:
    """One finite float for each picture."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise SteeringError(
            f"The objective {name!r} gave {short(given)} for {count} pictures: wanted is one number each."
        )
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise SteeringError(f"The objective {name!r} gave {short(values)}: wanted is one number each.") from None
    if not all(map(math.isfinite, numbers)):
        wrong = next(value for value in numbers if not math.isfinite(value))
        raise SteeringError(f"The objective {name!r} gave {wrong}: a search needs finite scores.")
    return numbers
