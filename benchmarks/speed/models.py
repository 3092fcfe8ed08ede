"""Pipelines to measure with: the embedded ones, and the layouts of published ones with random weights.

    pipe = models.build("sdxl", device="cuda", dtype="bfloat16")       # 2.6 G random weights, made on the device
    pipe = models.build("sdxl", scale=0.2)                             # the same layers with a fifth of the heads

Speed and memory do not depend on what the weights say, so nothing is downloaded. Denoisers have the layers, channels
and heads of the published configurations. Text encoders are as wide as the published ones but shallow, with the
tokenizers of the embedded models, and the autoencoder is tiny: neither is part of what is measured, and most scripts
ask for latents. ``--scale`` takes fewer heads (and with them fewer channels) in every layer, for lack of a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import attnsteer
from attnsteer.world import assets

EMBEDDED = ("world-sd", "world-sd3", "world-flux")
PUBLISHED = ("sd15", "sdxl", "sd3", "flux")
NAMES = EMBEDDED + PUBLISHED
PIXELS = {**dict.fromkeys(EMBEDDED, 64), "sd15": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}
"""Height and width that the models are made for."""


def options(parser: argparse.ArgumentParser, models: str, steps: int, scale: float = 1.0, size: int = 512) -> None:
    """The options of scripts that run pipelines.

    Args:
        models: names that are run by default, with spaces between.
        scale, size: what published layouts are shrunk to on a CPU, where nothing else is asked for.
    """
    parser.add_argument("--model", nargs="+", choices=NAMES, default=models.split(), help=f"default: {models}")
    smaller = f"fraction of the heads of published layouts (default: 1 on a GPU, {scale:g} on a CPU)"
    parser.add_argument("--scale", type=float, help=smaller)
    pixels = f"height and width (default: the model's own; of published layouts on a CPU {size})"
    parser.add_argument("--size", type=int, help=pixels)
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps (default: %(default)s)")
    parser.set_defaults(small=(scale, size))


def from_options(name: str, given: argparse.Namespace) -> tuple[Any, int, dict[str, Any]]:
    """The pipeline, its height and width, and what the log says about it."""
    smaller = given.device == "cpu" and name in PUBLISHED
    scale, size = given.small if smaller else (1.0, PIXELS[name])
    scale, size = given.scale or scale, given.size or size
    says = {"model": name, "steps": given.steps, "pixels": size, **({"scale": scale} if name in PUBLISHED else {})}
    return build(name, given.device, given.dtype, scale), size, says


# ---- pipelines -------------------------------------------------------------------------------------------------------
def build(name: str, device: str = "cpu", dtype: str = "float32", scale: float = 1.0) -> Any:
    """A new pipeline without progress bar; the same weights every time."""
    quiet()
    kind = getattr(torch, dtype)
    if name in EMBEDDED:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(assets.path(f"models/{name}"), dtype=kind).to(device)
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


def quiet() -> None:
    """No progress bars and no advice among the tables."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


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


# ---- denoisers, as the published config.json has them where ``heads`` is its own -------------------------------------
def sd15_unet(heads: int = 8) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(40 * heads, 80 * heads, 160 * heads, 160 * heads),
        attention_head_dim=heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=width(768, heads / 8),
        norm_num_groups=math.gcd(32, 40 * heads),
    )


def sdxl_unet(heads: int = 5) -> Any:
    from diffusers import UNet2DConditionModel

    small, large = width(768, heads / 5), width(1280, heads / 5)
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(64 * heads, 128 * heads, 256 * heads),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(heads, 2 * heads, 4 * heads),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        cross_attention_dim=small + large,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + large,
    )


def sd3_transformer(heads: int = 24) -> Any:
    from diffusers import SD3Transformer2DModel

    small, large, wide = (width(channels, heads / 24) for channels in (768, 1280, 4096))
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=64 * heads,
        joint_attention_dim=wide,
        pooled_projection_dim=small + large,
        pos_embed_max_size=192,
    )


def flux_transformer(heads: int = 24) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=heads,
        attention_head_dim=128,
        joint_attention_dim=width(4096, heads / 24),
        pooled_projection_dim=width(768, heads / 24),
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def width(channels: int, scale: float) -> int:
    """Channels of texts, a multiple of 8."""
    return 8 * scaled(channels // 8, scale)


# ---- pipelines around them -------------------------------------------------------------------------------------------
def sd15(scale: float) -> Any:
    """Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    heads = scaled(8, scale)
    return StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=clip(width(768, heads / 8)),
        tokenizer=clip_tokenizer(),
        unet=sd15_unet(heads),
        scheduler=scheduler(DDIMScheduler, **SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scale: float) -> Any:
    """Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    heads = scaled(5, scale)
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip(width(768, heads / 5)),
        text_encoder_2=clip(width(1280, heads / 5), projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(heads),
        scheduler=scheduler(EulerDiscreteScheduler, **SCALED_LINEAR),
        add_watermarker=False,
    )


def sd3(scale: float) -> Any:
    """Stable Diffusion 3 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    heads = scaled(24, scale)
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(heads),
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=autoencoder(16),
        text_encoder=clip(width(768, heads / 24), projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(width(1280, heads / 24), projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(width(4096, heads / 24)),
        tokenizer_3=t5_tokenizer(256),
    )


def flux(scale: float) -> Any:
    """FLUX.1-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    heads = scaled(24, scale)
    return FluxPipeline(
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16),
        text_encoder=clip(width(768, heads / 24)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(width(4096, heads / 24)),
        tokenizer_2=t5_tokenizer(512),
        transformer=flux_transformer(heads),
    )


PIPELINES: dict[str, Callable[[float], Any]] = {made.__name__: made for made in (sd15, sdxl, sd3, flux)}
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ---- what stands around the denoiser ---------------------------------------------------------------------------------
def scheduler(kind: Any, **config: Any) -> Any:
    """Schedules are made on the CPU and in float32, wherever the model is."""
    with made_as("cpu", torch.float32):
        return kind(**config)


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
        mid_block_add_attention=False,
    )


def clip(channels: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        intermediate_size=channels,
        num_hidden_layers=2,
        num_attention_heads=1 if channels % 64 else channels // 64,
        projection_dim=channels,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(channels: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    words = len(t5_tokenizer(1))
    return T5EncoderModel(T5Config(vocab_size=words, d_model=channels, d_kv=8, d_ff=16, num_layers=1, num_heads=1))


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(assets.path("models/world-sd3/tokenizer"), model_max_length=77)


def t5_tokenizer(length: int) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.path("models/world-flux/tokenizer_2"), model_max_length=length)


# ---- calls -----------------------------------------------------------------------------------------------------------
def t5_length(pipe: Any) -> int | None:
    """How many tokens of T5 the denoiser sees; None where there is no T5."""
    if hasattr(pipe, "tokenizer_3"):
        return assets.CALLS["StableDiffusion3Pipeline"]["max_sequence_length"] if embedded(pipe) else 256
    if hasattr(pipe, "transformer"):
        return assets.CALLS["FluxPipeline"]["max_sequence_length"] if embedded(pipe) else 512
    return None


def embedded(pipe: Any) -> bool:
    return bool(pipe.tokenizer.model_max_length < 77)


def texts(pipe: Any, rows: int, guided: bool) -> dict[str, torch.Tensor]:
    """Random text embeddings in place of prompts, as arguments of the pipeline's call."""
    model, length = denoiser(pipe), pipe.tokenizer.model_max_length
    if hasattr(pipe, "transformer"):  # of FLUX T5 alone, of SD3 behind CLIP
        length = (length if hasattr(pipe, "tokenizer_3") else 0) + (t5_length(pipe) or 0)
    pooled = getattr(model.config, "pooled_projection_dim", None)
    if getattr(model.config, "addition_embed_type", None):
        pooled = pipe.text_encoder_2.config.projection_dim
    channels = model.config.joint_attention_dim if hasattr(pipe, "transformer") else model.config.cross_attention_dim
    shapes = {"prompt_embeds": (rows, length, channels), **({"pooled_prompt_embeds": (rows, pooled)} if pooled else {})}
    generator = torch.Generator().manual_seed(0)

    def random(prefix: str) -> dict[str, torch.Tensor]:
        made = {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {name: value.to(model.device, model.dtype) for name, value in made.items()}

    return {**random(""), **(random("negative_") if guided else {})}


def painter(
    pipe: Any, size: int, steps: int, guidance: float = 1.0, rows: int = 1, **more: Any
) -> Callable[[], torch.Tensor]:
    """A run of the pipeline from the same noise every time: ``paint() -> latents``.

    Args:
        guidance: of classifier-free guidance; 1 is none.
        more: further arguments of the call; with a ``prompt`` the text encoders run, else random embeddings are used.
    """
    call = {**arguments(pipe, size, steps, guidance), "output_type": "latent", **more}
    if call.get("prompt") is None:
        call |= texts(pipe, rows, guidance > 1)

    def paint() -> torch.Tensor:
        return pipe(generator=[torch.Generator().manual_seed(row) for row in range(rows)], **call).images

    return paint


def steered(paint: Callable[[], Any], pipe: Any, *processors: attnsteer.Processor) -> Callable[[], Any]:
    """A run with these processors, attaching and detaching included."""

    def run() -> Any:
        with attnsteer.steer(pipe, *processors):
            return paint()

    return run


def arguments(pipe: Any, size: int, steps: int, guidance: float = 1.0) -> dict[str, Any]:
    """Of the pipeline's call, without what is to be painted."""
    guided_by = (
        "true_cfg_scale" if hasattr(pipe, "transformer") and not hasattr(pipe, "tokenizer_3") else "guidance_scale"
    )
    call = {"num_inference_steps": steps, "height": size, "width": size, guided_by: guidance}
    length = t5_length(pipe)
    return {**call, "max_sequence_length": length} if length else call
