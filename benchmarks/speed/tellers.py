"""Vision-language models to measure: the embedded one, and published layouts with random weights.

    teller = tellers.build("qwen2.5-vl-7b", "cuda", "bfloat16", prompt=2048)
    teller.model.generate(**teller.inputs, max_new_tokens=256)

Layouts come from their configurations alone, built on the device in the wanted precision; nothing is downloaded.
``scale`` divides numbers of layers and heads, and all widths with them; head width, the ratio of query to key heads and
the layout of the prompt stay, so that a CPU can try the same run. Prompts are ids and pixels made here: text, as many
image tokens as fit, and a short question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMES = ("world-llava", "llava-7b", "qwen2.5-vl-7b")
QUESTION = 64
"""Tokens behind the last picture, at least."""


@dataclass
class Teller:
    """A model and a prompt for it.

    Attributes:
        inputs: keyword arguments of ``generate``.
        processor: the Hugging Face processor; None with random weights, which have no words.
        settings: what a log should say about it.
    """

    name: str
    model: Any
    inputs: dict[str, Any]
    processor: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def image_tokens(self) -> int:
        return int((self.inputs["input_ids"] == self.model.config.image_token_id).sum())


def build(name: str, device: str, dtype: str, scale: int = 1, prompt: int = 2048) -> Teller:
    """A model by name with one prompt.

    Args:
        scale: what layers, heads and widths are divided by; random weights alone.
        prompt: its tokens, image and text; the embedded model has a prompt of its own.
    """
    quiet()
    if name == "world-llava":
        made = _world(device, getattr(torch, dtype))
    else:
        made = {"llava-7b": _llava, "qwen2.5-vl-7b": _qwen}[name](device, getattr(torch, dtype), scale, prompt)
    parameters = sum(p.numel() for p in made.model.parameters())
    text = made.model.config.get_text_config(decoder=True)
    made.settings |= {
        "model": name if scale == 1 else f"{name} / {scale}",
        "layers": text.num_hidden_layers,
        "heads": f"{text.num_attention_heads} over {text.num_key_value_heads}",
        "width": text.hidden_size,
        "parameters": f"{parameters / 1e6:.0f} M",
        "prompt": made.inputs["input_ids"].shape[1],
        "image tokens": made.image_tokens,
    }
    return made


def speaking(name: str, device: str, dtype: str, scale: int = 1) -> Teller:
    """A model that can be asked about pictures in words: the embedded one, or LLaVA's layout with random weights and
    the embedded one's tokenizer, which sees pictures in 576 tokens and answers with random words of it."""
    quiet()
    world = _world(device, getattr(torch, dtype))
    if name == "world-llava":
        return world
    made = _llava(device, getattr(torch, dtype), scale, 2048, world.model.config.image_token_id, _vocabulary(world))
    pixels = world.processor.image_processor
    pixels.size, pixels.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    world.processor.patch_size = 14
    made.processor = world.processor
    return made


def _vocabulary(world: Teller) -> int:
    return int(world.model.config.get_text_config().vocab_size)


def _world(device: str, dtype: torch.dtype) -> Teller:
    """The embedded model, asked for a description."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from attnsteer.chat import question_inputs
    from attnsteer.world import assets, sampling

    folder = assets.path("models/world-llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = question_inputs(processor, [sampling.sample(0).image()], ["Please describe this image in detail."])
    return Teller("world-llava", model, dict(inputs.to(model.device, dtype)), processor)


def quiet() -> None:
    """No word about generation flags and processor arguments: they come with every answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ---- random weights --------------------------------------------------------------------------------------------------
def _random(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """A model on the device, with the same weights every time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = make()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # answers of random weights end nowhere
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def _words(count: int, device: str) -> Tensor:
    """Ordinary token ids, ``(count,)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(100, 1000, (count,), generator=generator).to(device)


def _pixels(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def _prompt(prompt: int, picture: list[int], device: str) -> tuple[Tensor, int]:
    """``(1, prompt)`` ids: text, as many pictures of these ids as fit, text; and how many pictures those are."""
    count = max(1, (prompt - QUESTION - 1) // len(picture))
    before = max(1, (prompt - QUESTION - count * len(picture)) // 2)
    words = _words(max(prompt - count * len(picture), before + 1), device)
    pictures = torch.tensor(picture * count, device=device)
    return torch.cat([words[:before], pictures, words[before:]])[None], count


def _llava(
    device: str, dtype: torch.dtype, scale: int, prompt: int, image: int = 32000, vocabulary: int = 32064
) -> Teller:
    """LLaVA-1.5-7B: Vicuna 7B with a CLIP tower of 24 x 24 patches; several pictures fill the prompt."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    side, tower = 336 // 14, max(scale // 2, 1)
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096 // scale,
        intermediate_size=11008 // scale,
        num_hidden_layers=max(32 // scale, 4),
        num_attention_heads=32 // scale,
        num_key_value_heads=32 // scale,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024 // tower,
        intermediate_size=4096 // tower,
        num_hidden_layers=max(24 // tower, 2),
        num_attention_heads=16 // tower,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-2)
    model = _random(lambda: LlavaForConditionalGeneration(config), device, dtype)
    ids, count = _prompt(prompt, [image] * side**2, device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = _pixels((count, 3, 336, 336), device, dtype)
    return Teller("llava-7b", model, inputs, settings={"pictures": count})


def _qwen(device: str, dtype: torch.dtype, scale: int, prompt: int) -> Teller:
    """Qwen2.5-VL-7B: grouped-query decoder (7 query heads to a key head); one picture fills the prompt."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    image, begin, end, heads = 151655, 151652, 151653, 28 // min(scale, 4)
    text = {
        "vocab_size": 152064,
        "hidden_size": 128 * heads,
        "intermediate_size": 18944 // scale,
        "num_hidden_layers": max(28 // scale, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 7,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": 151645,
        "pad_token_id": 0,
    }
    tower = max(scale // 2, 1)
    vision = {
        "depth": max(32 // tower, 4),
        "hidden_size": 1280 // tower,
        "intermediate_size": 3420 // tower,
        "num_heads": 16 // tower,
        "out_hidden_size": 128 * heads,
        "fullatt_block_indexes": [i for i in (7, 15, 23, 31) if i < 32 // tower] or [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=151656,
        vision_start_token_id=begin,
        vision_end_token_id=end,
    )
    model = _random(lambda: Qwen2_5_VLForConditionalGeneration(config), device, dtype)
    side = int((prompt - QUESTION - 4) ** 0.5)  # merged patches of a square picture
    ids, _ = _prompt(prompt, [begin, *[image] * side**2, end], device)
    return Teller("qwen2.5-vl-7b", model, _qwen_inputs(ids, image, side, device, dtype), settings={"pictures": 1})


def _qwen_inputs(ids: Tensor, image: int, side: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Patches of 14 x 14 pixels and two frames, merged by 2 x 2."""
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels((4 * side**2, 3 * 2 * 14 * 14), device, dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]], device=device),
        "mm_token_type_ids": (ids == image).int(),
    }
