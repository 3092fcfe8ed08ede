"""Facts about vision-language families as data: which tokens are the image, which only wrap it, which inputs follow
tokens.

===================== ============================================ =================================================
family                image tokens                                 wrappers known to the config
===================== ============================================ =================================================
llava, llava_next     ``image_token_index``; NeXT's row newlines   none
                      are image tokens themselves
qwen2_vl .. qwen3_vl  ``image_token_id``, ``video_token_id``       ``vision_start_token_id``, ``vision_end_token_id``
internvl              ``image_token_id``                           none; its processor knows ``<img>``, ``</img>``
smolvlm, idefics3     ``image_token_id``                           none; its processor knows ``<row_1_col_1>``, ...
gemma3                ``image_token_index``                        ``boi_token_index``, ``eoi_token_index``
paligemma             ``image_token_index`` (a prefix)             none
===================== ============================================ =================================================

The names are tried on every config and, for wrappers, on the Hugging Face processor where the user gave one. So a new
family that uses them needs no entry here; one that does not is added to the tuples. Missing names mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SteeringError

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
WRAPPERS = (
    *(
        "vision_start_token_id",
        "vision_end_token_id",
        "boi_token_id",
        "boi_token_index",
        "eoi_token_id",
        "eoi_token_index",
    ),
    *("image_start_token_id", "image_end_token_id", "vision_bos_token_id", "vision_eos_token_id"),
)
PROCESSOR_WRAPPERS = (
    *("start_image_token", "end_image_token", "boi_token", "eoi_token", "vision_start_token", "vision_end_token"),
    *("fake_image_token", "global_image_token", "global_image_tag", "image_break_token", "image_end_token"),
)
TILE_MARKER = re.compile(r"<row_\d+_col_\d+>")
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs ``(B, N)`` that go with the tokens; the pad value is 0. Everything else that is no mask belongs to the
images."""
ANSWER_TYPES = {"paligemma": {"token_type_ids": 1}}
"""By ``model_type``: the value of a per-token input at generated tokens, where it is not 0 (PaliGemma: causal from
here)."""
WHOLE_PROMPT_IN_BOTH_DIRECTIONS = ("paligemma",)
"""By ``model_type``: every token of the prompt sees every other one."""
PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_patches", "mm_encoder_outputs")
PACKED = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Where pixels come as one list of patches ``(P, D)`` of all pictures: the input that says how many each has."""
NOT_FOR_PREFILL = (
    *("past_key_values", "cache", "use_cache", "cache_position", "position_ids", "inputs_embeds", "labels"),
    *("logits_to_keep", "num_logits_to_keep", "return_dict", "output_attentions", "output_hidden_states"),
)
"""Inputs of a call that a throw-away prefill of its own must not share: the user's cache, outputs that nobody reads."""
SCRATCH = ("rope_deltas",)
"""Attributes in which a family keeps something of the last prefill for the decode steps (Qwen-VL and its kin)."""


@dataclass(frozen=True)
class VisionTokens:
    """Ids of the tokens that stand for pixels, and of those that only wrap an image. Both empty: a text-only model."""

    image: tuple[int, ...]
    wrappers: tuple[int, ...]

    def image_mask(self, ids: Tensor) -> Tensor:
        """Bool, shape of ``ids``: the image and video tokens."""
        return torch.isin(ids, torch.tensor(self.image, dtype=ids.dtype, device=ids.device))

    def wrapper_mask(self, ids: Tensor) -> Tensor:
        """Bool, shape of ``ids``: the markers around images."""
        return torch.isin(ids, torch.tensor(self.wrappers, dtype=ids.dtype, device=ids.device))


def vision_tokens(config: Any, processor: Any = None) -> VisionTokens:
    """The family's token facts, from its configuration and, where given, its Hugging Face processor."""

    def ids(names: tuple[str, ...]) -> set[int]:
        found = [getattr(config, name, None) for name in names]
        return {i for i in found if isinstance(i, int) and not isinstance(i, bool)}

    image, wrappers = ids(IMAGE_TOKENS), ids(WRAPPERS)
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "get_vocab"):
        marks = {getattr(owner, name, None) for owner in (processor, tokenizer) for name in PROCESSOR_WRAPPERS}
        vocabulary = tokenizer.get_vocab()
        wrappers |= {i for token, i in vocabulary.items() if token in marks or TILE_MARKER.fullmatch(token)}
    return VisionTokens(tuple(sorted(image)), tuple(sorted(wrappers - image)))


def why_no_image_free_lane(config: Any) -> list[str]:
    """Reasons why a prompt cannot be run without its image next to the same prompt with it; empty where it can."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "cross_attention_layers", None):
        return [
            "The image enters this model by cross-attention, not as tokens of the prompt, so it cannot be taken out."
        ]
    return []


def left_padded(inputs: Mapping[str, Any], mask: Tensor, keep: Tensor, pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Per-token inputs with only the kept tokens, moved to the right end; shape ``(B, N)`` as before.

    Args:
        inputs: ``input_ids`` and other inputs; only those of ``PER_TOKEN`` are taken along.
        mask: ``(B, N)`` attention mask, keep: ``(B, N)`` bool; tokens outside either become padding.
        pad: id of the padding.

    Returns:
        The inputs with their ``attention_mask``, and the bool ``(B, N)`` of the real tokens.
    """
    keep = keep & mask.bool()
    order = torch.sort(keep.to(torch.int8), dim=1, stable=True).indices  # dropped tokens first, kept ones in order
    real = keep.gather(1, order)
    moved = {"input_ids": inputs["input_ids"].gather(1, order).masked_fill(~real, pad)}
    for name in PER_TOKEN:
        if isinstance(inputs.get(name), Tensor):
            moved[name] = inputs[name].gather(1, order).masked_fill(~real, 0)
    moved["attention_mask"] = real.to(mask.dtype)
    return moved, real


def padding_id(config: Any, tokens: VisionTokens) -> int:
    """An id for padding that no image is found at."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "pad_token_id", None)
    taken = {*tokens.image, *tokens.wrappers}
    if isinstance(wanted, int) and 0 <= wanted < text.vocab_size and wanted not in taken:
        return wanted
    return next(i for i in range(len(taken) + 1) if i not in taken)


def lockstep_inputs(
    inputs: Mapping[str, Any], tokens: VisionTokens, pad: int, removal: str
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs of ``2 B`` rows: the prompts as they are, then the same prompts without their images.

    Both lanes are padded on the left, so that both end at the same last position; rotary positions make the offset
    irrelevant. Pixels are given once: the rows of the second lane hold no image token to put them at.

    Args:
        inputs: what the model was called with; needs ``input_ids``.
        tokens, pad: what the image is made of, and an id for padding.
        removal: ``delete`` takes the image tokens and their wrappers out of the second lane; ``mask`` keeps its length
            and hides them as keys.

    Returns:
        The inputs, and bool ``(2 B, N)``: the image tokens, and the real tokens that are not image.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise SteeringError(
            f"The image-free pass needs an attention mask of the shape of input_ids {tuple(ids.shape)}, not "
            f"{tuple(mask.shape)}."
        )
    if tokens.image_mask(ids).any() and not any(inputs.get(name) is not None for name in PIXELS):
        raise SteeringError(
            "The prompt holds image tokens, but no pixels were given: the image-free pass needs the whole prompt with "
            "its pixels, also where a cache holds a part of it."
        )
    main, real = left_padded(inputs, mask, torch.ones_like(ids, dtype=torch.bool), pad)
    image = tokens.image_mask(main["input_ids"]) & real
    drop = image | tokens.wrapper_mask(main["input_ids"]) & image.any(dim=1, keepdim=True)
    other, other_real = _without(main, real, drop, tokens, pad, removal)
    both = {name: torch.cat([main[name], other[name]]) for name in main}
    rest = {n: v for n, v in inputs.items() if n not in both and n not in NOT_FOR_PREFILL and v is not None}
    none = torch.zeros_like(image)
    return {**rest, **both}, torch.cat([image, none]), torch.cat([real & ~image, other_real])


def _without(
    main: dict[str, Tensor], real: Tensor, drop: Tensor, tokens: VisionTokens, pad: int, removal: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the second lane, without the tokens ``drop``, and which of its tokens are real."""
    if removal == "delete":
        # a prompt that is nothing but image keeps its last token: something has to predict the next one
        alone = (drop | ~real).all(dim=1, keepdim=True)
        keep = ~drop | alone & (torch.arange(drop.shape[1], device=drop.device) == drop.shape[1] - 1)
        other, other_real = left_padded(main, main["attention_mask"], keep, pad)
        lost = tokens.image_mask(other["input_ids"])
        other["input_ids"] = other["input_ids"].masked_fill(lost, pad)
        return other, other_real
    other = {name: value.masked_fill(drop, 0) for name, value in main.items()}
    other["input_ids"] = main["input_ids"].masked_fill(drop, pad)
    return other, real & ~drop
