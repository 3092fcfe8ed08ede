"""A model that answers: many pictures and many methods as rows of one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .._version import __version__
from ..attach import attach, sites
from ..chat import question_inputs
from ..digests import tensor_digest
from ..errors import SteeringError
from ..hosts.replay import prefill, refusals
from ..hosts.vision import seen_once
from ..lines import identity
from .methods import Method
from .samples import Sample

SHORT = 32
"""Most tokens of a short answer, of which the prompt is nearly all the work."""


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens; tokens: its ids, without the one that ends it.
        finish: ``"stop"``, or ``"length"`` where the limit cut it.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


class Answerer:
    """A vision-language model and its Hugging Face processor; answers are greedy.

    Args:
        model: with nothing attached.
        processor: of the model.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.digest = model_digest(model, processor)

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """Everything that an answer depends on besides question and method."""
        return {
            "model": self.digest,
            "generation": {"do_sample": False, "max_new_tokens": max_new_tokens},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "versions": {"attnsteer": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        }

    def groups(self, methods: Sequence[Method]) -> list[list[Method]]:
        """Methods that can be rows of one batch, in as few batches as taking them in order gives.

        Raises:
            SteeringError: a method that this model cannot have at all.
        """
        found: list[list[Method]] = []
        for method in methods:
            try:
                self._try([method])
            except SteeringError as error:
                raise SteeringError([f"{method.label}: {reason}" for reason in error.reasons]) from error
            for group in found:
                try:
                    self._try([*group, method])
                except SteeringError:
                    continue
                group.append(method)
                break
            else:
                found.append([method])
        return found

    def _try(self, methods: Sequence[Method]) -> None:
        around = next((method.around for method in methods if method.around is not None), None)
        if around is None:
            with self._steered(methods):
                pass
        elif len(methods) > 1:
            raise SteeringError(f"{type(around).__name__} asks by itself: nothing can share its batches.")
        else:
            there = sites(self.model)
            around.where_for(there).select(there, around.kinds)

    def _steered(self, methods: Sequence[Method]) -> Any:
        if not any(method.processors for method in methods):
            return nullcontext()
        return attach(self.model, variants=[method.processors for method in methods], processor=self.processor)

    def __call__(self, samples: Sequence[Sample], methods: Sequence[Method], limit: int) -> list[list[Answer]]:
        """Answers by method, then by sample.

        Args:
            methods: rows of one batch, one block of samples for each; or one that asks by itself.
            limit: most tokens of an answer.
        """
        pictures, questions = [sample.picture.open() for sample in samples], [sample.prompt for sample in samples]
        if len(methods) == 1 and methods[0].around is not None:
            found = methods[0].around.answers(self.model, self.processor, pictures, questions, limit=limit)
            return [self._answers([each.tokens for each in found], limit)]
        inputs = question_inputs(self.processor, pictures, questions).to(self.model.device, self.model.dtype)
        with seen_once(self.model, len(methods)):
            found = self._from_one_prefill(methods, inputs, limit)
            found |= self._in_lockstep([m for m in methods if m.label not in found], inputs, limit)
        return [found[method.label] for method in methods]

    def _from_one_prefill(
        self, methods: Sequence[Method], inputs: Mapping[str, Any], limit: int
    ) -> dict[str, list[Answer]]:
        """Answers by those methods that change no row of a prompt but its last: all others are computed once.

        On a GPU long answers stay in the batch of all methods: memory bounds decoding there, and a second batch would
        take as long as the first.
        """
        sharing = [method for method in methods if not any(map(refusals, method.processors))]
        if len(sharing) < 2 or (limit > SHORT and self.model.device.type != "cpu"):
            return {}
        processors = [processor for method in sharing for processor in method.processors]
        try:
            ready = prefill(self.model, *processors, processor=self.processor, **inputs)
        except SteeringError:  # a prompt that is read in both directions
            return {}
        out = ready.generate(variants=[method.processors for method in sharing], **_greedy(limit))
        return self._by_method(sharing, out, inputs, limit)

    def _in_lockstep(self, methods: Sequence[Method], inputs: Mapping[str, Any], limit: int) -> dict[str, list[Answer]]:
        """Answers by methods that are rows of one batch from the start."""
        if not methods:
            return {}
        rows = {name: _repeated(value, len(methods)) for name, value in inputs.items()}
        with self._steered(methods):
            out = self.model.generate(**rows, **_greedy(limit))
        return self._by_method(methods, out, inputs, limit)

    def _by_method(
        self, methods: Sequence[Method], out: Any, inputs: Mapping[str, Any], limit: int
    ) -> dict[str, list[Answer]]:
        """Generated rows, one block for each method, as its answers."""
        batch, prompt = inputs["input_ids"].shape
        answers = self._answers(out[:, prompt:].tolist(), limit)
        return {method.label: answers[n * batch : (n + 1) * batch] for n, method in enumerate(methods)}

    def _answers(self, new: Sequence[Sequence[int]], limit: int) -> list[Answer]:
        """What generated tokens say."""
        ends = _ends(self.model.generation_config)
        cut = [_cut(row, ends, limit) for row in new]
        texts = self.processor.batch_decode([ids for ids, _ in cut], skip_special_tokens=True)
        return [Answer(text.strip(), ids, end) for text, (ids, end) in zip(texts, cut, strict=True)]


def _greedy(limit: int) -> dict[str, Any]:
    return {"max_new_tokens": limit, "do_sample": False, "num_beams": 1}


def _repeated(value: Any, times: int) -> Any:
    """The same rows again for each method. Pictures come first to last in every family, whatever their first axis is
    (rows, patches or tiles), so whole blocks can be put behind each other."""
    import torch

    return torch.cat([value] * times) if isinstance(value, torch.Tensor) else list(value) * times


def _ends(config: Any) -> set[int]:
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


def _cut(row: Sequence[int], ends: set[int], limit: int) -> tuple[tuple[int, ...], str]:
    """The tokens before the one that ends the answer, and whether there was one. A row that ended is padded."""
    place = next((i for i, token in enumerate(row) if token in ends), None)
    if place is not None:
        return tuple(row[:place]), "stop"
    return tuple(row), "length" if len(row) >= limit else "stop"


def model_digest(model: Any, processor: Any) -> str:
    """A hash of the configuration, every weight, and how pictures and text become its inputs."""
    weights = {
        name: tensor_digest(tensor) if tensor.device.type != "meta" else [str(tensor.dtype), list(tensor.shape)]
        for name, tensor in model.state_dict().items()
        if hasattr(tensor, "device")
    }
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    saved = {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    config |= saved  # as save_pretrained would note them
    generation = model.generation_config.to_dict()
    generation.pop("transformers_version", None)
    return identity(
        {"weights": weights, "config": _json(config), "generation": _json(generation), **_inputs(processor)}
    )


def _inputs(processor: Any) -> dict[str, Any]:
    tokenizer, pixels = getattr(processor, "tokenizer", processor), getattr(processor, "image_processor", None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "words": hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16],
        "template": getattr(processor, "chat_template", None),
        "pixels": _json(pixels.to_dict()) if pixels is not None else None,
    }


def _json(value: Any) -> Any:
    """Values that JSON does not have, by their text."""
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
