"""Questions about pictures as rows of one batch: prompts, one vision encoding per picture, greedy answers.

Each prompt is written by the Hugging Face processor on its own; the rows are then padded on the left here, so that all
end at the same position whatever side a tokenizer prefers. Vision towers run once for each picture: the language model
takes what they found (``mm_encoder_outputs``) instead of pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..chat import question_inputs
from ..digests import tensor_digest
from ..errors import SteeringError
from .decoders import core
from .vlm_families import PACKED, PER_TOKEN, padding_id, vision_tokens
from .vlm_inputs import TOKEN_BY_TOKEN

Pictures = tuple[Image.Image, ...]
Encodings = dict[Hashable, Any]
"""What the vision tower made of pictures, by what it was shown of them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as rows.

    Attributes:
        inputs: what ``generate`` takes, with the vision encoding in place of pixels.
        rows: the inputs of each row alone, with its pixels and without padding.
        pictures: the pictures of each row.
    """

    inputs: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: list[Pictures]

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


def row(
    model: torch.nn.Module, hf_processor: Any, pictures: Pictures, question: str, template: str | None = None
) -> dict[str, Tensor]:
    """The inputs of one prompt (``chat.question_inputs``) as tensors on the model's device, pixels in its dtype."""
    inner: Any = core(model)
    given = question_inputs(hf_processor, [pictures], [question], template)
    tensors = {name: value.to(inner.device) for name, value in given.items() if isinstance(value, Tensor)}
    return {name: value.to(inner.dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def batch(
    model: torch.nn.Module,
    hf_processor: Any,
    pictures: Sequence[Pictures],
    questions: Sequence[str],
    template: str | None = None,
    encodings: Encodings | None = None,
) -> Batch:
    """One row for each question; equal pictures share their encoding.

    Args:
        encodings: of earlier batches of this model; those of this one are added. None begins anew.

    Raises:
        SteeringError: a model that takes no pictures, or ``row``'s.
    """
    inner: Any = core(model)
    if (
        not hasattr(inner, "get_image_features")
        or "mm_encoder_outputs" not in inspect.signature(inner.forward).parameters
    ):
        raise SteeringError(f"{type(inner).__name__} takes no picture as tokens of its prompt.")
    rows = [row(model, hf_processor, *one, template) for one in zip(pictures, questions, strict=True)]
    return Batch(joined(inner, rows, pictures, {} if encodings is None else encodings), rows, list(pictures))


def joined(
    inner: Any, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Pictures], encodings: Encodings
) -> dict[str, Any]:
    """Rows as one batch, padded on the left, with the encoding of their pictures in place of pixels."""
    longest = max(given["input_ids"].shape[1] for given in rows)
    pad = padding_id(inner.config, vision_tokens(inner.config))
    fill = {"input_ids": pad, "attention_mask": 0, **dict.fromkeys(PER_TOKEN, 0)}
    encoding = _encoding_inputs(inner)
    inputs: dict[str, Any] = {}
    for name in rows[0]:
        values = [given[name] for given in rows]
        if name in fill:
            values = [F.pad(v, (longest - v.shape[1], 0), value=fill[name]) for v in values]
        elif name.startswith("pixel_"):
            continue  # the encoder has seen them
        inputs[name] = torch.cat(values)
    shown = [{name: given[name] for name in encoding if name in given} for given in rows]
    parts = [part for one, seen in zip(shown, pictures, strict=True) for part in _by_picture(one, len(seen))]
    inputs["mm_encoder_outputs"] = {"image": _encodings([_encoded(inner, part, encodings) for part in parts])}
    return inputs


def _by_picture(shown: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """What the tower is shown of a row, picture by picture; in one where tiles do not tell whose they are."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in shown.items():
        sizes = shown.get(PACKED.get(name, ""))
        lengths = [1] * len(value) if sizes is None else sizes.prod(-1).tolist()
        if len(lengths) != count:
            return [dict(shown)]
        for part, piece in zip(parts, value.split(lengths), strict=True):
            part[name] = piece
    return parts


def _encoded(inner: Any, shown: Mapping[str, Tensor], encodings: Encodings) -> Any:
    """What the tower makes of a picture, or what it made of an equal one."""
    key = tuple((name, tensor_digest(value)) for name, value in shown.items())
    if key not in encodings:
        with torch.no_grad():
            encodings[key] = inner.get_image_features(**shown, return_dict=True)
    return encodings[key]


def greedy(model: Any, batch: Batch, max_new_tokens: int) -> list[list[int]]:
    """The tokens that the model says after each prompt, with the one that ends the answer where it comes.

    Every token has a pass of its own, the first that of the whole prompt: who looks on may count them.
    """
    inputs = {**batch.inputs, "mm_encoder_outputs": dict(batch.inputs["mm_encoder_outputs"])}
    with torch.no_grad():
        found = model.generate(**inputs, **TOKEN_BY_TOKEN, max_new_tokens=max_new_tokens, return_dict_in_generate=False)
    inner: Any = core(model)
    config = inner.generation_config
    ends = {*config.eos_token_id} if isinstance(config.eos_token_id, (list, tuple)) else {config.eos_token_id}
    said = found[:, batch.length :].tolist()
    return [one[: next((n + 1 for n, token in enumerate(one) if token in ends), len(one))] for one in said]


def words(hf_processor: Any, tokens: Sequence[int]) -> str:
    """An answer as text."""
    return str(getattr(hf_processor, "tokenizer", hf_processor).decode(tokens, skip_special_tokens=True)).strip()


def _encoding_inputs(inner: Any) -> list[str]:
    """What the vision tower wants of a prompt's inputs."""
    names = inspect.signature(inner.get_image_features).parameters
    return [name for name in names if name.startswith("pixel_") or name in ("image_grid_thw", "image_sizes")]


def _encodings(found: Sequence[Any]) -> Any:
    """The encodings of several pictures behind each other, in the class of the family.

    Features are a tensor, or a list or tuple by picture; Qwen3-VL has such a list for each of some layers besides.
    """
    joint = {"pooler_output": _behind([one.pooler_output for one in found])}
    if getattr(found[0], "deepstack_features", None) is not None:
        joint["deepstack_features"] = [
            _behind(layer) for layer in zip(*(one.deepstack_features for one in found), strict=True)
        ]
    return type(found[0])(**joint)


def _behind(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return [feature for part in parts for feature in part]
