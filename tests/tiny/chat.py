"""Stand-ins for the Hugging Face processors of the tiny vision-language models: ``Chat(name, model)``.

Words become one token each; pictures go through the library's own image processors, so that tiles, newlines and grids
are the real ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import vlms

SIDES = {"llava": 10, "gemma3": 12, "paligemma": 12}
FIRST_MARKER = 20
"""Token ``FIRST_MARKER + 10 row + column`` is ``<row_i_col_j>``."""


def image_processor(name: str) -> Any:
    """The library's image processor, for pictures as small as the tiny models'; None where pixels are just resized."""
    from transformers import LlavaNextImageProcessor, Qwen2VLImageProcessor, SmolVLMImageProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    if name.startswith("qwen"):
        return Qwen2VLImageProcessor(patch_size=2, merge_size=2, min_pixels=16, max_pixels=6 * 10 * 2 * 2 * 4)
    if name == "llava_next":
        pinpoints = [[8, 16], [16, 8], [16, 16]]
        return LlavaNextImageProcessor(size={"shortest_edge": 8}, crop_size=8, image_grid_pinpoints=pinpoints)
    if name == "internvl":
        size = {"height": 12, "width": 12}
        return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    if name == "smolvlm":
        return SmolVLMImageProcessor(size={"longest_edge": 36}, max_image_size={"longest_edge": 12})
    return None


def pixels(name: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What the image processor makes of the pictures of one prompt."""
    if name in SIDES:
        side = SIDES[name]
        small = [p.convert("RGB").resize((side, side), Image.Resampling.BILINEAR).tobytes() for p in pictures]
        array = torch.frombuffer(bytearray(b"".join(small)), dtype=torch.uint8).reshape(-1, side, side, 3)
        return {"pixel_values": array.permute(0, 3, 1, 2) / 127.5 - 1}
    if name == "smolvlm":
        return dict(image_processor(name)([list(pictures)], return_tensors="pt", return_row_col_info=True))
    return dict(image_processor(name)(list(pictures), return_tensors="pt"))


def features(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """Image features of each picture (of tiles, where the family does not join them), in the order of tokens."""
    inner = {k: v for k, v in given.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
    with torch.no_grad():
        found = model.get_image_features(**inner, return_dict=True).pooler_output
    return [part.reshape(-1, part.shape[-1]) for part in found]


class Chat:
    """Calls like a processor: text with ``<image>`` and the pictures, to ids, masks and pixels."""

    image_token = "<image>"
    chat_template = None

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.image_processor = image_processor(name)

    @property
    def tokenizer(self) -> Chat:
        return self

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        marks = [divmod(i - FIRST_MARKER, 10) if 30 < i < 60 else None for i in ids]
        return " ".join(f"<row_{m[0]}_col_{m[1]}>" if m else f"w{i}" for i, m in zip(ids, marks, strict=True))

    def __call__(self, text: list[str], images: list[list[Image.Image]], return_tensors: str) -> dict[str, Any]:
        (prompt,), (pictures,) = text, images
        given = pixels(self.name, pictures)
        lengths = [len(part) for part in features(self.model, given)]
        ids = [vlms.BOS]
        for number, part in enumerate(prompt.split(self.image_token)):
            ids += self._picture(number - 1, given, lengths, pictures) if number else []
            ids += [7 + zlib.crc32(word.encode()) % 13 for word in part.split()]
        row = torch.tensor([ids])
        marked = (row == vlms.IMAGE).long()
        types = {"gemma3": {"token_type_ids": marked}, "paligemma": {"token_type_ids": 0 * marked}}
        qwen = {"mm_token_type_ids": marked} if self.name.startswith("qwen") else {}
        given = {
            k: v for k, v in given.items() if isinstance(v, Tensor) and k not in ("num_patches", "pixel_attention_mask")
        }
        return {"input_ids": row, "attention_mask": torch.ones_like(row), **types.get(self.name, qwen), **given}

    def _picture(self, number: int, given: dict[str, Any], lengths: list[int], pictures: Sequence[Any]) -> list[int]:
        """The tokens of a picture, markers of tiles included."""
        if self.name == "smolvlm":
            rows, columns = int(given["rows"][0][number]), int(given["cols"][0][number])
            tiles = [(r + 1, c + 1) for r in range(rows) for c in range(columns)]
            body = [[FIRST_MARKER + 10 * r + c] + [vlms.IMAGE] * 9 for r, c in tiles]
            return [token for tile in body for token in tile] + [8] + [vlms.IMAGE] * 9
        if self.name == "internvl":
            tiles = given["num_patches"][number]
            return [8, *[vlms.IMAGE] * (9 * int(tiles)), 9]
        body = [vlms.IMAGE] * lengths[number]
        return [vlms.VISION_START, *body, vlms.VISION_END] if self.name.startswith("qwen") else body
