"""Embeddings of transformers' CLIP models, and the head of an aesthetic predictor: what scores of pictures rest on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional as F

from ...digests import weights_of
from ...errors import SteeringError

T = TypeVar("T")


class Encoders:
    """Normalised embeddings of a CLIP model in float32; each text is encoded once.

    Args:
        checkpoint: folder or hub id of the model.
        processor: folder or hub id of its tokenizer and picture preprocessing.
        device: where it runs.
    """

    def __init__(self, checkpoint: str, processor: str, device: Any = "cpu"):
        self.checkpoint, self.processor, self.device = str(checkpoint), str(processor), str(device)
        self._texts: dict[str, Tensor] = {}

    @property
    def settings(self) -> dict[str, str]:
        """On what the embeddings depend."""
        return {"checkpoint": self.checkpoint, "processor": self.processor, "weights": weights_of(self._loaded[0])}

    @property
    def described(self) -> dict[str, Any]:
        """The settings for a report, with how pictures are made ready."""
        processor = self._loaded[1]
        return {**self.settings, "dtype": "float32", "preprocessing": preprocessing(processor.image_processor)}

    @property
    def scale(self) -> float:
        """The factor on cosines that the model learned."""
        return float(self._loaded[0].logit_scale.detach().exp())

    @torch.no_grad()
    def images(self, pictures: Sequence[Any]) -> Tensor:
        """``(n, width)``"""
        model, processor = self._loaded
        pixels = processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").to(self.device)
        pooled = model.vision_model(pixel_values=pixels["pixel_values"]).pooler_output
        return F.normalize(model.visual_projection(pooled).float(), dim=-1)

    def texts(self, given: Sequence[str]) -> Tensor:
        """``(n, width)``; longer texts are cut."""
        for text in dict.fromkeys(given):
            if text not in self._texts:
                self._texts[text] = self.encode([text])[0]
        return torch.stack([self._texts[text] for text in given])

    @torch.no_grad()
    def encode(self, given: Sequence[str]) -> Tensor:
        """The same in one batch, and not kept: for many texts that are only asked for once."""
        model, processor = self._loaded
        limit = model.config.text_config.max_position_embeddings
        how = {"truncation": True, "padding": len(given) > 1, "max_length": limit, "return_tensors": "pt"}
        pooled = model.text_model(**processor(text=list(given), **how).to(self.device)).pooler_output
        return F.normalize(model.text_projection(pooled).float(), dim=-1)

    @property
    def _loaded(self) -> tuple[Any, Any]:
        return _load(self.checkpoint, self.processor, self.device)


def preprocessing(processor: Any) -> dict[str, Any]:
    """Sizes, crop, resize filter and normalisation of a picture processor of transformers, as far as it says."""
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_normalize", "image_mean", "image_std")
    values = json.loads(processor.to_json_string())
    if isinstance(values.get("resample"), int):
        values["resample"] = Resampling(values["resample"]).name.lower()
    return {name: values[name] for name in names if values.get(name) is not None}


@lru_cache(maxsize=4)
def _load(checkpoint: str, processor: str, device: str) -> tuple[Any, Any]:
    """Objectives with the same model share it."""
    from transformers import CLIPModel, CLIPProcessor

    model = readable(checkpoint, lambda: CLIPModel.from_pretrained(checkpoint, dtype=torch.float32))
    return model.to(device).eval(), readable(processor, lambda: CLIPProcessor.from_pretrained(processor))


def affine_head(source: str) -> tuple[Tensor, Tensor]:
    """Linear layers without activations between them as one: weight ``(width,)`` and bias, in float64."""
    state = readable(source, lambda: _state(source))
    found = [re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state]
    numbers = sorted(int(match[1]) for match in found if match)
    if not numbers:
        raise SteeringError(f"{source!r} holds no aesthetic predictor: wanted are weights called layers.0.weight, ...")
    weight: Tensor = torch.eye(state[f"layers.{numbers[0]}.weight"].shape[1], dtype=torch.float64)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    for number in numbers:
        layer, offset = (state[f"layers.{number}.{part}"].double() for part in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + offset
    if weight.shape[0] != 1:
        raise SteeringError(f"{source!r} predicts {weight.shape[0]} numbers: an aesthetic predictor has one.")
    return weight[0], bias[0]


def _state(source: str) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    file = Path(source).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    elif not file.is_file():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(source, "model.safetensors"))
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def readable(source: str, read: Callable[[], T]) -> T:
    """The result of ``read``; what the libraries raise about files becomes one sentence."""
    import pickle

    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError, HfHubHTTPError)
    try:
        return read()
    except SteeringError:
        raise
    except (*kinds, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SteeringError(f"{source!r} cannot be loaded to score pictures: {reason}") from error
