"""Tiny random-weight denoisers, one per model family: ``build(name) -> (model, inputs)``.

Sizes are odd on purpose: a grid of 3 x 5 image tokens, 7 text tokens, 3 heads. ``inputs(batch, seed)`` gives the
keyword arguments of the model's forward; text rows after the first are shorter where the family takes a text mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[..., dict[str, Any]]
HEADS, HEIGHT, WIDTH, TEXT = 3, 3, 5, 7
"""Heads, rows and columns of the token grid, text tokens."""


class Noise:
    """Reproducible random tensors."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _text_mask(batch: int) -> Tensor:
    """``(B, TEXT)`` ones; every row but the first lacks its last two tokens."""
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[1:, -2:] = 0
    return mask


def _grid_ids(axes: int) -> Tensor:
    """Position ids of the image tokens, ``(HEIGHT * WIDTH, axes)``: axis 1 is the row, axis 2 the column."""
    ids = torch.zeros(HEIGHT, WIDTH, axes)
    ids[..., 1] = torch.arange(HEIGHT)[:, None]
    ids[..., 2] = torch.arange(WIDTH)
    return ids.flatten(0, 1)


def unet_sd15() -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=2 * HEIGHT,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=HEADS,  # diffusers' historical name for the number of heads
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "sample": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor(5),
            "encoder_hidden_states": noise(batch, TEXT, 20),
        }

    return model, inputs


def unet_sdxl() -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=2 * HEIGHT,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=(2, HEADS),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "sample": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor(5),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "added_cond_kwargs": {"text_embeds": noise(batch, 20), "time_ids": noise(batch, 6)},
        }

    return model, inputs


def _sd3(**extra: Any) -> tuple[nn.Module, Inputs]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=2 * max(HEIGHT, WIDTH),
        pos_embed_max_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        caption_projection_dim=8 * HEADS,
        joint_attention_dim=20,
        pooled_projection_dim=16,
        **extra,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "pooled_projections": noise(batch, 16),
            "timestep": torch.full((batch,), 500.0),
        }

    return model, inputs


def sd3() -> tuple[nn.Module, Inputs]:
    return _sd3()


def sd35() -> tuple[nn.Module, Inputs]:
    """SD3.5: normalised queries and keys, and a second, image-only attention in the first blocks."""
    return _sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def flux() -> tuple[nn.Module, Inputs]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        joint_attention_dim=20,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "pooled_projections": noise(batch, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": _grid_ids(3),
            "txt_ids": torch.zeros(TEXT, 3),
        }

    return model, inputs


def qwen() -> tuple[nn.Module, Inputs]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "encoder_hidden_states_mask": _text_mask(batch),
            "timestep": torch.full((batch,), 0.5),
            "img_shapes": [[(1, HEIGHT, WIDTH)]] * batch,
        }

    return model, inputs


def pixart() -> tuple[nn.Module, Inputs]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # learned variance: twice the channels
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        cross_attention_dim=8 * HEADS,
        caption_channels=20,
        use_additional_conditions=False,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "encoder_attention_mask": _text_mask(batch),
            "timestep": torch.full((batch,), 5),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return model, inputs


def wan() -> tuple[nn.Module, Inputs]:
    """A video model: 2 frames of 3 x 5 tokens."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, 4, 2, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "timestep": torch.full((batch,), 500),
        }

    return model, inputs


def cogview4() -> tuple[nn.Module, Inputs]:
    """A family without a descriptor of its own: one projection for text and image."""
    from diffusers import CogView4Transformer2DModel

    model = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        text_embed_dim=20,
        time_embed_dim=8,
        condition_dim=4,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        size = torch.tensor([[8 * HEIGHT, 8 * WIDTH]]).expand(batch, -1)
        return {
            "hidden_states": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "timestep": torch.full((batch,), 5),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }

    return model, inputs


def lumina2() -> tuple[nn.Module, Inputs]:
    """A family without a descriptor of its own: grouped-query attention, refiners beside the main blocks."""
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=8 * HEADS,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=20,
    )

    def inputs(batch: int = 2, seed: int = 0) -> dict[str, Any]:
        noise = Noise(seed)
        return {
            "hidden_states": noise(batch, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": noise(batch, TEXT, 20),
            "encoder_attention_mask": _text_mask(batch).bool(),
            "timestep": torch.full((batch,), 0.5),
        }

    return model, inputs


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    build.__name__: build for build in (unet_sd15, unet_sdxl, sd3, sd35, flux, qwen, pixart, wan, cogview4, lumina2)
}
NAMES = tuple(FAMILIES)


def sharpen(model: nn.Module, factor: float = 3.0) -> None:
    """Scale the projections of queries and keys (or their norms): with the usual initialisation every softmax is nearly
    uniform, and a test could not tell one method from another."""
    projection = re.compile(r"\.(to_q|to_k|add_[qk]_proj|[qk]_proj|qkv)\.weight$")
    norm = re.compile(r"\.(norm_q|norm_k|norm_added_q|norm_added_k|q_norm|k_norm)\.weight$")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if projection.search(name) or norm.search(name):
                parameter.mul_(factor)


def build(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A new model of the family ``name``, in eval mode, the same weights for the same seed, and its inputs."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model, inputs = FAMILIES[name]()
    finally:
        torch.set_rng_state(state)
    sharpen(model)
    return model.eval().requires_grad_(False), inputs
