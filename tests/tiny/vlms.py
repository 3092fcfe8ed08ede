"""Tiny random-weight vision-language models, one per family: ``build(name) -> (model, inputs)``.

All decoders have 4 layers of 6 heads over 2 key/value heads. ``inputs(batch, seed, left_padding)`` gives the keyword
arguments of forward and generate: a start token, 2 tokens of text, the image, a question of 5 tokens. With left padding
every row but the first has a question of 2 tokens and starts with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[..., dict[str, Any]]
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 2, 8
HIDDEN, VOCABULARY = HEADS * HEAD_DIM, 61
PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO = range(7)
QUESTION, SHORTER = 5, 3
"""Tokens of the question, and how many of them left-padded rows lack."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 37,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TOWER: dict[str, Any] = {
    "hidden_size": 18,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 2,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _pictures(batch: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    """``(B, *shape)``; a row is the same in batches of any size."""
    generators = [torch.Generator().manual_seed(97 * seed + r) for r in range(batch)]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def prompt(tokens: int, batch: int, seed: int, left_padding: bool) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` with an image of ``tokens`` tokens in every row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(batch):
        missing = SHORTER if left_padding and row > 0 else 0
        words = torch.randint(VIDEO + 1, VOCABULARY, (2 + QUESTION - missing,), generator=generator).tolist()
        rows.append([PAD] * missing + [BOS, *words[:2]] + [IMAGE] * tokens + words[2:])
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _with_pixels(tokens: int, shape: tuple[int, ...], **extra: Tensor) -> Inputs:
    """Inputs of families with ``pixel_values`` of ``(B, *shape)``; ``extra`` holds one row of further tensors."""

    def inputs(batch: int = 2, seed: int = 0, left_padding: bool = False) -> dict[str, Any]:
        rows = {key: value.repeat(batch, *[1] * (value.dim() - 1)) for key, value in extra.items()}
        return {**prompt(tokens, batch, seed, left_padding), "pixel_values": _pictures(batch, seed, shape), **rows}

    return inputs


def llava() -> tuple[nn.Module, Inputs]:
    """A picture of 5 x 5 patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=10, projection_dim=18),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config), _with_pixels(25, (3, 10, 10))


def llava_next() -> tuple[nn.Module, Inputs]:
    """A base picture of 4 x 4 patches, then 2 x 2 tiles cropped to 6 rows of 8 patches and a newline token."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=8, projection_dim=18),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    tokens = 4 * 4 + 6 * (8 + 1)
    return LlavaNextForConditionalGeneration(config), _with_pixels(
        tokens, (5, 3, 8, 8), image_sizes=torch.tensor([[12, 16]])
    )


def _qwen_inputs(batch: int = 2, seed: int = 0, left_padding: bool = False) -> dict[str, Any]:
    """6 x 10 patches, merged by 2 x 2 into 3 x 5 tokens."""
    text = prompt(3 * 5, batch, seed, left_padding)
    return {
        **text,
        "pixel_values": _pictures(batch, seed, (6 * 10, 3 * 2 * 2 * 2)).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 6, 10]] * batch),
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
    }


def _rotary(**extra: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, **extra}}


def qwen2() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**TEXT, **_rotary()},
        vision_config={**QWEN_TOWER, "embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 2},
        **QWEN_TOKENS,
    )
    return Qwen2VLForConditionalGeneration(config), _qwen_inputs


def qwen25() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": HIDDEN, "window_size": 8}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **_rotary()},
        vision_config={**QWEN_TOWER, **tower, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    )
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs


def qwen3() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tower = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": HIDDEN, "num_position_embeddings": 64}
    config = Qwen3VLConfig(
        text_config={**TEXT, **_rotary(mrope_interleaved=True), "head_dim": HEAD_DIM},
        vision_config={**QWEN_TOWER, **tower, "deepstack_visual_indexes": [0, 1]},
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config), _qwen_inputs


def internvl() -> tuple[nn.Module, Inputs]:
    """6 x 6 patches, shuffled into 3 x 3 tokens."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    config = InternVLConfig(
        vision_config={**TOWER, "image_size": [12, 12], "patch_size": [2, 2]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )
    return InternVLForConditionalGeneration(config), _with_pixels(9, (3, 12, 12))


def smolvlm() -> tuple[nn.Module, Inputs]:
    """Two tiles of 6 x 6 patches, each shuffled into 3 x 3 tokens."""
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config={**TOWER, "image_size": 12},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return SmolVLMForConditionalGeneration(config), _with_pixels(2 * 9, (2, 3, 12, 12))


def _siglip(**extra: Any) -> dict[str, Any]:
    return {**TOWER, "image_size": 12, "model_type": "siglip_vision_model", "vision_use_head": False, **extra}


def gemma3() -> tuple[nn.Module, Inputs]:
    """6 x 6 patches, pooled to 3 x 3 tokens that see each other; every other layer sees 8 tokens back only."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    layer_types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=Gemma3TextConfig(**TEXT, head_dim=HEAD_DIM, sliding_window=8, layer_types=layer_types),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    plain = _with_pixels(9, (3, 12, 12))

    def inputs(batch: int = 2, seed: int = 0, left_padding: bool = False) -> dict[str, Any]:
        given = plain(batch, seed, left_padding)
        return {**given, "token_type_ids": (given["input_ids"] == IMAGE).long()}

    return Gemma3ForConditionalGeneration(config), inputs


def paligemma() -> tuple[nn.Module, Inputs]:
    """6 x 6 patches, and a prompt that is read in both directions."""
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_siglip(projection_dim=HIDDEN),
        text_config=GemmaConfig(**TEXT, head_dim=HEAD_DIM),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
    )
    plain = _with_pixels(36, (3, 12, 12))

    def inputs(batch: int = 2, seed: int = 0, left_padding: bool = False) -> dict[str, Any]:
        given = plain(batch, seed, left_padding)
        return {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}

    return PaliGemmaForConditionalGeneration(config), inputs


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    make.__name__: make for make in (llava, llava_next, qwen2, qwen25, qwen3, internvl, smolvlm, gemma3, paligemma)
}
NAMES = tuple(FAMILIES)


def row(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One row of a batch of inputs as a batch of its own, without padding."""
    kept = inputs["attention_mask"][index].bool()
    batch = len(inputs["input_ids"])
    alone = {}
    for key, value in inputs.items():
        part = value.unflatten(0, (batch, -1))[index]  # packed patches have several entries per row
        alone[key] = part[:, kept] if value.shape == inputs["input_ids"].shape else part
    return alone


def spread(model: nn.Module, std: float = 0.2) -> None:
    """Give every matrix the same spread: the libraries' initialisations (0.02) make all attention nearly uniform and
    all logits nearly equal, and a test could not tell one method from another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                if not parameter.any():  # Gemma 3 starts with a projector of zeros
                    nn.init.normal_(parameter)
                parameter.mul_(std / parameter.std())


def build(name: str, seed: int = 0) -> tuple[Any, Inputs]:
    """A new model of the family ``name``, in eval mode, the same weights for the same seed, and its inputs."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model, inputs = FAMILIES[name]()
        spread(model)
    finally:
        torch.set_rng_state(state)
    return model.eval().requires_grad_(False), inputs
