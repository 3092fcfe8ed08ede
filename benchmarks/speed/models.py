"""Pipelines to measure with: the embedded ones, and the layouts of published ones with random weights.

    pipe = models.build("sdxl", device="cuda", dtype="bfloat16")       # 2.6 G random weights, made on the device
    pipe = models.build("sdxl", scale=0.2)                             # the same layers with a fifth of the heads

Speed and memory do not depend on what the weights say, so nothing is downloaded. Denoisers have the layers, channels
and heads of the published configurations. Text encoders are as wide as the published ones but shallow, with the
tokenizers of the embedded models, and the autoencoder is tiny: neither is part of what is measured, and the scripts ask
for latents. ``--scale`` takes fewer heads (and with them fewer channels) in every layer, for machines without a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnsteer.world import assets

EMBEDDED = ("world-sd", "world-sd3", "world-flux")
PUBLISHED = ("sd15", "sdxl", "sd3", "flux")
NAMES = EMBEDDED + PUBLISHED
PIXELS = {"sd15": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}
"""Height and width that the published models are made for; embedded ones know theirs."""
GUIDED_BY = {"FluxPipeline": "true_cfg_scale"}
"""The argument for classifier-free guidance where it is not ``guidance_scale``."""


def options(parser: argparse.ArgumentParser, models: str, scale: float, size: int | None, steps: int) -> None:
    """The options of scripts that run pipelines.

    Args:
        models: names that are run by default, with spaces between.
        scale, size: what published layouts are shrunk to on a CPU, where nothing else is asked for.
    """
    parser.add_argument("--model", nargs="+", choices=NAMES, default=models.split(), help=f"default: {models}")
    smaller = f"fraction of the heads of published layouts (default: 1 on a GPU, {scale:g} on a CPU)"
    parser.add_argument("--scale", type=float, help=smaller)
    pixels = f"height and width (default: the model's own on a GPU, {size or 'that too'} on a CPU)"
    parser.add_argument("--size", type=int, help=pixels)
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps (default: %(default)s)")
    parser.set_defaults(small=(scale, size))


def from_options(name: str, given: argparse.Namespace) -> tuple[Any, int | None, dict[str, Any]]:
    """The pipeline, its height and width (None: its own), and what the log says about it."""
    small, pixels = given.small if given.device == "cpu" else (1.0, None)
    scale = small if given.scale is None else given.scale
    size = given.size or (None if name in EMBEDDED else pixels or PIXELS[name])
    pipe = build(name, given.device, given.dtype, scale)
    says = {"model": name, "steps": given.steps, "pixels": size or int(pipe.default_sample_size * pipe.vae_scale_factor)}
    return pipe, size, says if name in EMBEDDED or scale == 1 else {**says, "scale": scale}


# ---- pipelines -------------------------------------------------------------------------------------------------------
def build(name: str, device: str = "cpu", dtype: str = "float32", scale: float = 1.0) -> Any:
    """A new pipeline without progress bar; the same weights every time."""
    kind = getattr(torch, dtype)
    if name in EMBEDDED:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(assets.path(f"models/{name}"), dtype=kind).to(device)
        size = assets.CALLS[type(pipe).__name__].get("height")
        pipe.default_sample_size = size // pipe.vae_scale_factor if size else pipe.default_sample_size
    else:
        torch.manual_seed(0)
        with made_as(device, kind):
            pipe = PIPELINES[name](scale)
        pipe = pipe.to(device, kind)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def made_as(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside are born on the device and in the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def denoiser(pipe: Any) -> Any:
    """The UNet or transformer."""
    return getattr(pipe, "unet", None) or pipe.transformer


def scaled(heads: int, scale: float) -> int:
    return max(1, round(heads * scale))


def sd15(scale: float) -> Any:
    """Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    heads = scaled(8, scale)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(40 * heads, 80 * heads, 160 * heads, 160 * heads),
        attention_head_dim=heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=768,
        norm_num_groups=math.gcd(32, 40 * heads),
    )
    return StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=clip(768, 12),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scale: float) -> Any:
    """Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    heads = scaled(5, scale)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(64 * heads, 128 * heads, 256 * heads),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(heads, 2 * heads, 4 * heads),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip(768, 12),
        text_encoder_2=clip(1280, 20, 1280),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3(scale: float) -> Any:
    """Stable Diffusion 3 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    heads = scaled(24, scale)
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=64 * heads,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16),
        text_encoder=clip(768, 12, 768),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(1280, 20, 1280),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(4096),
        tokenizer_3=t5_tokenizer(256),
    )


def flux(scale: float) -> Any:
    """FLUX.1-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=scaled(24, scale),
        attention_head_dim=128,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16),
        text_encoder=clip(768, 12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(4096),
        tokenizer_2=t5_tokenizer(512),
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[float], Any]] = {made.__name__: made for made in (sd15, sdxl, sd3, flux)}


# ---- what stands around the denoiser ---------------------------------------------------------------------------------
def autoencoder(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.1,
        force_upcast=False,
    )


def clip(width: int, heads: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    vocabulary = len(t5_tokenizer(1))
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=1)
    )


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(assets.path("models/world-sd3/tokenizer"), model_max_length=77)


def t5_tokenizer(length: int) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.path("models/world-flux/tokenizer_2"), model_max_length=length)


# ---- calls -----------------------------------------------------------------------------------------------------------
def texts(pipe: Any, rows: int, guided: bool) -> dict[str, torch.Tensor]:
    """Random text embeddings in place of prompts, as arguments of the pipeline's call."""
    model = denoiser(pipe)
    kind, config = type(pipe).__name__, model.config
    if kind == "FluxPipeline":
        length, width = 512 if config.guidance_embeds else 32, config.joint_attention_dim
    elif kind == "StableDiffusion3Pipeline":
        placeholder = config.joint_attention_dim < 4096  # world-sd3, called with one token of T5
        length, width = pipe.tokenizer_max_length + (1 if placeholder else 256), config.joint_attention_dim
    else:
        length, width = pipe.tokenizer.model_max_length, config.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (rows, length, width)}
    if kind != "StableDiffusionPipeline":
        projection = config.get("pooled_projection_dim") or 1280
        shapes["pooled_prompt_embeds"] = (rows, projection)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    found = {name: random(*shape) for name, shape in shapes.items()}
    return {**found, **{f"negative_{name}": random(*shape) for name, shape in shapes.items()}} if guided else found


def painter(
    pipe: Any, size: int | None, steps: int, guidance: float = 1.0, rows: int = 1, **more: Any
) -> Callable[[], torch.Tensor]:
    """A run of the pipeline from the same noise every time: ``paint() -> latents``.

    Args:
        guidance: of classifier-free guidance; 1 is none.
        more: further arguments of the call; with ``prompt`` the text encoders run, else random embeddings are used.
    """
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", **more}
    call[GUIDED_BY.get(type(pipe).__name__, "guidance_scale")] = guidance
    side = size or (pipe.default_sample_size * pipe.vae_scale_factor)
    call |= {"height": side, "width": side}
    if "prompt" not in call:
        call |= texts(pipe, rows, guidance > 1)

    def paint() -> torch.Tensor:
        return pipe(generator=[torch.Generator().manual_seed(row) for row in range(rows)], **call).images

    return paint
