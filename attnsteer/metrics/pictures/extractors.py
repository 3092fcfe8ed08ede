"""Other models that look at pictures: DINO, BLIP's captions, LPIPS. Each loads what it is told to, and nothing else.

Encoders have ``images(pictures) -> (n, width)`` and ``described``, what a report says about them; any object with both
can take their place, as in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...digests import weights_of
from ...errors import SteeringError
from .encoders import preprocessing, readable

CLASS_TOKENS = {
    "vit": "dino",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
}
"""Kinds of models of transformers whose first token is trained to stand for the picture, and what scores are called."""


class Dino:
    """Class tokens of a self-supervised vision transformer after its last normalisation, normalised, in float32.

    Papers on subjects use DINO ViT-S/16 (``facebook/dino-vits16``; UNCONFIRMED for all of them) or DINOv2.

    Args:
        checkpoint: folder or hub id of model and picture preprocessing.
        device: where it runs.
    """

    def __init__(self, checkpoint: str, device: Any = "cpu"):
        self.checkpoint, self.device = str(checkpoint), str(device)

    @property
    def name(self) -> str:
        """ "dino", "dinov2" or "dinov3", by the kind of the model."""
        return CLASS_TOKENS[self._loaded[0].config.model_type]

    @property
    def described(self) -> dict[str, Any]:
        model, processor = self._loaded
        found = {"checkpoint": self.checkpoint, "weights": weights_of(model), "dtype": "float32"}
        return {**found, "preprocessing": preprocessing(processor)}

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """``(n, width)``"""
        model, processor = self._loaded
        pixels = processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
        return F.normalize(model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0].float(), dim=-1)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        kind = readable(self.checkpoint, lambda: AutoConfig.from_pretrained(self.checkpoint)).model_type
        if kind not in CLASS_TOKENS:
            known = ", ".join(CLASS_TOKENS)
            raise SteeringError(f"{self.checkpoint!r} is a model of the kind {kind!r}; class tokens have {known}.")
        model = readable(self.checkpoint, lambda: AutoModel.from_pretrained(self.checkpoint, dtype=torch.float32))
        processor = readable(self.checkpoint, lambda: AutoImageProcessor.from_pretrained(self.checkpoint))
        return model.to(self.device).eval(), processor


class Captioner:
    """One sentence about each picture, by a BLIP captioner of transformers with a beam search.

    Text-text similarities of Attend-and-Excite are those of captions of BLIP base (COCO) as LAVIS makes them by default
    (its weights here: ``Salesforce/blip-image-captioning-base``). The values below are LAVIS's, UNCONFIRMED.

    Args:
        checkpoint: folder or hub id of model and processor.
        device: where it runs.
        prompt: how every caption starts; it is no part of the result.
        beams: of the search; shortest, longest: in tokens, with the prompt.
    """

    def __init__(
        self,
        checkpoint: str,
        device: Any = "cpu",
        prompt: str = "a picture of",
        beams: int = 3,
        shortest: int = 10,
        longest: int = 30,
    ):
        self.checkpoint, self.device, self.prompt = str(checkpoint), str(device), prompt
        self.search = {"num_beams": beams, "min_length": shortest, "max_length": longest}

    @property
    def described(self) -> dict[str, Any]:
        model, processor = self._loaded
        found = {"checkpoint": self.checkpoint, "weights": weights_of(model), "dtype": "float32", "prompt": self.prompt}
        return {**found, **self.search, "preprocessing": preprocessing(processor.image_processor)}

    @torch.no_grad()
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One for each picture, without the prompt."""
        model, processor = self._loaded
        shown = [p.convert("RGB") for p in pictures]
        inputs = processor(images=shown, text=[self.prompt] * len(shown), return_tensors="pt").to(self.device)
        tokens = model.generate(**inputs, do_sample=False, **self.search)
        said = processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().removeprefix(self.prompt).strip() for text in said]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        model = readable(
            self.checkpoint,
            lambda: BlipForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32),
        )
        processor = readable(self.checkpoint, lambda: BlipProcessor.from_pretrained(self.checkpoint))
        return model.to(self.device).eval(), processor


class Lpips:
    """The learned perceptual distance of two pictures (Zhang et al., 2018, arXiv:1801.03924), of the package ``lpips``.

    Higher is more different; 0 for equal pictures. The package needs torchvision and fetches the weights of its network
    when it is first used. Only what goes in and comes out is tested here, with a stand-in for the package.

    Args:
        net: "alex", what papers report, "vgg" or "squeeze".
        device: where it runs.

    Raises:
        SteeringError: the package, or what it needs, is not installed.
    """

    def __init__(self, net: str = "alex", device: Any = "cpu"):
        try:
            import lpips  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            why = f"LPIPS needs the packages lpips and torchvision: pip install lpips torchvision ({error})."
            raise SteeringError(why) from error
        self.net, self.device = net, str(device)
        self._model = lpips.LPIPS(net=net, verbose=False).to(self.device).eval()

    @property
    def described(self) -> dict[str, Any]:
        found = {"checkpoint": f"lpips {self.net}", "weights": weights_of(self._model), "dtype": "float32"}
        return {**found, "preprocessing": {"do_resize": False, "range": "-1..1"}}

    @torch.no_grad()
    def __call__(self, one: Image.Image, other: Image.Image) -> float:
        """The distance of two pictures of one size."""
        return float(self._model(*(_between(picture).to(self.device) for picture in (one, other))))


def _between(picture: Image.Image) -> Tensor:
    """``(1, 3, height, width)`` in -1..1."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
