"""Where each image token of a prompt looks in its picture: grids of token positions, and the part of the picture that
they cover.

===================== ==================================================================================================
family                grid of a picture
===================== ==================================================================================================
llava, paligemma      pixels / patch, row by row
gemma3                ``sqrt(mm_tokens_per_image)`` each way; every pan-and-scan crop counts as a picture of its own
qwen2_vl .. qwen3_vl  ``image_grid_thw / merge``
llava_next            tiles without their padding, a newline token behind each row; before them an overview
internvl              tiles row by row, the overview last; how many are in a row is decided by the picture's size
idefics3, smolvlm     tiles, each behind a ``<row_i_col_j>`` of the prompt, the overview last
===================== ==================================================================================================

Sizes come from the model's configuration and the call, never from a table of token counts. Where they do not suffice
the answer is a refusal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SteeringError
from .decoders import core
from .vlm_families import vision_tokens

View = Literal["finest", "overview"]
Area = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture; beyond its borders where it was padded."""
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


@dataclass(eq=False)
class _Prompt:
    """What is known about a call; ``taken`` pictures have been read from rows before."""

    model: Any
    config: Any
    inputs: Mapping[str, Any]
    processor: Any
    pictures: Sequence[Any] | None
    view: View
    taken: int = field(default=0)

    def picture(self) -> Any:
        """The next picture of the user, if any were given."""
        if self.pictures is None:
            return None
        if self.taken >= len(self.pictures):
            raise SteeringError(f"The prompts hold more pictures than the {len(self.pictures)} given in pictures=.")
        return self.pictures[self.taken]


def image_grids(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    hf_processor: Any = None,
    pictures: Sequence[Any] | None = None,
    view: View = "finest",
) -> list[list[Tensor]]:
    """For each row of a batch and each picture in it, the positions of its image tokens in the prompt.

    Args:
        model: a vision-language model.
        inputs: what it is called with: ``input_ids`` ``(B, N)``, and pixels or what else says how large pictures are.
        hf_processor: the model's Hugging Face processor, for families whose prompt alone does not tell (idefics3,
            smolvlm: its tokenizer; internvl: its rule for tiles).
        pictures: the PIL pictures of all rows in order, where the arrangement depends on their size (internvl).
        view: ``"finest"`` is the picture put together from its tiles, ``"overview"`` the picture seen as a whole beside
            them. The same where a picture is not cut into tiles.

    Returns:
        ``grids[row][picture]``: int64 ``(rows, columns)``, indices into the row of ``input_ids`` with its padding.

    Raises:
        SteeringError: an unknown family, a video, or a prompt whose arrangement cannot be known; says what would help.
    """
    if view not in ("finest", "overview"):
        raise SteeringError(f"view={view!r} is not known: allowed are 'finest' and 'overview'.")
    inner: Any = core(model)
    read = _READERS.get(inner.config.model_type)
    if read is None:
        known = ", ".join(sorted(_READERS))
        raise SteeringError(
            f"How {type(inner).__name__} arranges its image tokens is not known to attnsteer; known are: {known}."
        )
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise SteeringError("Image tokens are found by their ids: give input_ids, not inputs_embeds.")
    video = getattr(inner.config, "video_token_id", None)
    if isinstance(video, int) and bool((ids == video).any()):
        raise SteeringError("The prompt holds a video: grids are known for pictures only.")
    prompt = _Prompt(inner, inner.config, inputs, hf_processor, pictures, view)
    image = vision_tokens(inner.config).image_mask(ids).cpu()
    grids = [read(prompt, row.cpu(), mask.nonzero()[:, 0]) for row, mask in zip(ids, image, strict=True)]
    if pictures is not None and prompt.taken != len(pictures):
        raise SteeringError(f"The prompts hold {prompt.taken} pictures, not the {len(pictures)} given in pictures=.")
    return grids


def covered_area(hf_processor: Any, size: tuple[int, int]) -> Area:
    """The part of a picture of ``size`` (width, height) that its tokens see.

    All of it in most families. CLIP's preprocessing (LLaVA-1.5 on the hub) crops the centre, and the original LLaVA's
    pads to a square: the grid is then larger than the picture. LLaVA-NeXT crops nothing but its own tiles.
    """
    width, height = size
    processor = getattr(hf_processor, "image_processor", hf_processor)
    if type(processor).__name__.startswith("LlavaImageProcessor") and getattr(processor, "do_pad", False):
        side = max(size)  # the longer side; whole pixels on either side of the shorter
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        return left, top, left + side, top + side
    crop = getattr(processor, "crop_size", None)
    tiled = getattr(processor, "image_grid_pinpoints", None)
    if not getattr(processor, "do_center_crop", False) or crop is None or tiled:
        return 0.0, 0.0, float(width), float(height)
    shrunk_width, shrunk_height = _resized(processor, size)
    seen_width, seen_height = crop["width"] * width / shrunk_width, crop["height"] * height / shrunk_height
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return left, top, left + seen_width, top + seen_height


def picture_side(model: torch.nn.Module) -> int:
    """Side in pixels of the pictures that a model was trained with; 224 for Qwen-VL, which takes any."""
    config: Any = core(model).config
    return 224 if config.model_type in QWEN else _pair(config.vision_config.image_size)[0]


def patch_side(model: torch.nn.Module) -> int:
    """Side in pixels of a patch of the vision tower."""
    config: Any = core(model).config
    return _pair(config.vision_config.patch_size)[0]


def _resized(processor: Any, size: tuple[int, int]) -> tuple[float, float]:
    """Width and height before the centre is cropped."""
    wanted = getattr(processor, "size", None) or {}
    if not getattr(processor, "do_resize", False):
        return float(size[0]), float(size[1])
    if wanted.get("shortest_edge"):
        factor = wanted["shortest_edge"] / min(size)
        return size[0] * factor, size[1] * factor
    return float(wanted["width"]), float(wanted["height"])


# ---- families --------------------------------------------------------------------------------------------------------
def _pieces(prompt: _Prompt, places: Tensor, rows: int, columns: int) -> list[Tensor]:
    """The image tokens of a prompt in grids of the same size."""
    if len(places) % (rows * columns):
        raise SteeringError(
            f"{len(places)} image tokens are not a multiple of {rows} x {columns}, which "
            f"{type(prompt.model).__name__} makes of a picture or tile: give the prompt as its processor wrote it."
        )
    return list(places.reshape(-1, rows, columns))


def _pair(value: Any) -> tuple[int, int]:
    """Height and width of a setting that may be one number."""
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _patches(prompt: _Prompt) -> tuple[int, int]:
    """Patches per picture or tile, down and across."""
    vision, pixels = prompt.config.vision_config, prompt.inputs.get("pixel_values")
    height, width = pixels.shape[-2:] if isinstance(pixels, Tensor) else _pair(vision.image_size)
    down, across = _pair(vision.patch_size)
    return height // down, width // across


def _plain(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    if prompt.config.vision_config.model_type == "pixtral":
        raise SteeringError("Pictures of any size in LLaVA (Pixtral's tower) are not known to image_grids yet.")
    rows, columns = _patches(prompt)
    per_picture = rows * columns
    if getattr(prompt.config, "vision_feature_select_strategy", "default") == "full" and len(places) % per_picture:
        per_picture += 1  # the class token stays in front
        places = places[torch.arange(len(places)) % per_picture != 0]
    found = _pieces(prompt, places, rows, columns)
    prompt.taken += len(found)
    return found


def _gemma3(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    side = int(prompt.config.mm_tokens_per_image**0.5)
    found = _pieces(prompt, places, side, side)
    prompt.taken += len(found)
    return found


def _qwen(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    sizes = prompt.inputs.get("image_grid_thw")
    if not isinstance(sizes, Tensor):
        raise SteeringError("The grid of a Qwen-VL prompt is in image_grid_thw, which is missing from the inputs.")
    merge, found = prompt.config.vision_config.spatial_merge_size, []
    while len(places):
        frames, height, width = sizes[prompt.taken].tolist() if prompt.taken < len(sizes) else (1, 0, 0)
        rows, columns = height // merge, width // merge
        if frames != 1 or not 0 < rows * columns <= len(places):
            raise SteeringError(f"image_grid_thw={sizes.tolist()} does not fit the image tokens of the prompts.")
        found.append(places[: rows * columns].reshape(rows, columns))
        places, prompt.taken = places[rows * columns :], prompt.taken + 1
    return found


def _llava_next(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    """The model's own packing, applied to numbers in place of features: the newline is -1."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes, found = prompt.config, prompt.inputs.get("image_sizes"), []
    if not isinstance(sizes, Tensor):
        raise SteeringError("The grid of a LLaVA-NeXT prompt follows from image_sizes, which is missing.")
    side = config.vision_config.image_size // config.vision_config.patch_size
    while len(places):
        if prompt.taken >= len(sizes):
            raise SteeringError(f"image_sizes names {len(sizes)} pictures; the prompts hold more.")
        size = sizes[prompt.taken].cpu()
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        numbers = torch.arange(tiles * side * side, dtype=torch.float64).reshape(tiles, side * side, 1)
        packed = prompt.model.model.pack_image_features([numbers], [size], "default", torch.tensor([-1.0]))[0][0]
        if len(packed) > len(places):
            raise SteeringError(f"image_sizes={sizes.tolist()} does not fit the image tokens of the prompts.")
        own, newline = places[: len(packed)], packed[side * side :, 0] == -1
        fine = own[side * side :][~newline]
        whole = prompt.view == "overview" or not len(fine)
        grid = own[: side * side].reshape(side, side) if whole else fine.reshape(int(newline.sum()), -1)
        found.append(grid)
        places, prompt.taken = places[len(packed) :], prompt.taken + 1
    return found


def _internvl(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    down, across = _patches(prompt)
    ratio, found = prompt.config.downsample_ratio, []
    breaks = ((places[1:] - places[:-1]) > 1).nonzero()[:, 0] + 1  # markers stand between pictures
    for run in places.tensor_split(breaks.tolist()) if len(places) else ():
        tiles = _pieces(prompt, run, int(down * ratio), int(across * ratio))
        picture = prompt.picture()
        prompt.taken += 1
        if len(tiles) == 1 or prompt.view == "overview":
            found.append(tiles[-1])
            continue
        columns, rows = _internvl_tiles(prompt.processor, picture, len(tiles))
        found.append(_assembled({(r, c): tiles[r * columns + c] for r in range(rows) for c in range(columns)}))
    return found


def _internvl_tiles(hf_processor: Any, picture: Any, count: int) -> tuple[int, int]:
    """How many tiles are side by side and how many below another, by the image processor's rule."""
    processor = getattr(hf_processor, "image_processor", hf_processor)
    if processor is None or picture is None:
        raise SteeringError(
            f"A picture of {count} InternVL tiles can be arranged in several ways: give hf_processor= and pictures=, "
            "or view='overview'."
        )
    canvas = sys.modules[type(processor).__module__].get_optimal_tiled_canvas  # the very rule that it cuts by
    tile = (processor.size["height"], processor.size["width"])
    size = (picture.height, picture.width)
    columns, rows = canvas(size, tile, processor.min_patches, processor.max_patches)
    if columns * rows + 1 != count:
        raise SteeringError(
            f"The prompt holds {count} tiles; for a picture of {picture.size} the processor makes {columns} x {rows} "
            "and an overview. Give the processor and the pictures that the prompt was made with."
        )
    return columns, rows


def _tiled(prompt: _Prompt, ids: Tensor, places: Tensor) -> list[Tensor]:
    """Idefics 3 and SmolVLM: markers in the text say which tile follows."""
    down, across = _patches(prompt)
    factor, found = prompt.config.scale_factor, []
    pieces = _pieces(prompt, places, down // factor, across // factor)
    tokenizer = getattr(prompt.processor, "tokenizer", prompt.processor)
    tiles: dict[tuple[int, int], Tensor] = {}
    end = 0
    for number, piece in enumerate(pieces):
        between, end = ids[end : int(piece[0, 0])].tolist(), int(piece[-1, -1]) + 1
        if number and not between:
            raise SteeringError("Tiles follow each other without markers: give the prompt as its processor wrote it.")
        if len(pieces) > 1 and tokenizer is None:
            raise SteeringError("Which tile is where stands in the text of the prompt: give hf_processor=.")
        marks = _TILE.findall(tokenizer.decode(between)) if tokenizer is not None else []
        if marks:
            tiles[int(marks[-1][0]) - 1, int(marks[-1][1]) - 1] = piece
            continue
        found.append(piece if prompt.view == "overview" or not tiles else _assembled(tiles))
        prompt.taken, tiles = prompt.taken + 1, {}
    if tiles:
        raise SteeringError("The last picture's overview is missing: give the prompt as its processor wrote it.")
    return found


def _assembled(tiles: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """One grid from tiles by (row, column)."""
    rows, columns = (1 + max(place[axis] for place in tiles) for axis in (0, 1))
    if len(tiles) != rows * columns:
        raise SteeringError(f"{len(tiles)} tiles do not fill {rows} rows and {columns} columns.")
    return torch.cat([torch.cat([tiles[r, c] for c in range(columns)], dim=1) for r in range(rows)])


_READERS: dict[str, Callable[[_Prompt, Tensor, Tensor], list[Tensor]]] = {
    **dict.fromkeys(("llava", "paligemma"), _plain),
    **dict.fromkeys(QWEN, _qwen),
    **dict.fromkeys(("idefics3", "smolvlm"), _tiled),
    "gemma3": _gemma3,
    "llava_next": _llava_next,
    "internvl": _internvl,
}
