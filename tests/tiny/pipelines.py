"""Tiny offline pipelines: the real classes around the tiny denoisers, with real tokenizers and text encoders.

``build(name)`` gives the pipeline, ``call_kwargs(name, ...)`` what to call it with: small pictures, seeded generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import denoisers, tokenizers

PROMPTS = ("a dog and a red car", "a cat", "the blue bird on the grass")
HEIGHT, WIDTH = 16 * denoisers.HEIGHT, 16 * denoisers.WIDTH
"""Pixels: 16 per image token (8 by the autoencoder, 2 by the patch or the first downsampling)."""
MAX_TEXT = 16


def _clip(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TEXT,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(tokenizer: Any, width: int = 20, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config_class, model_class = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return model_class(
        config_class(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def _autoencoder(**extra: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        **extra,
    )


def sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = tokenizers.clip()
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=_clip(tokenizer, 20),
        tokenizer=tokenizer,
        unet=denoisers.build("unet_sd15")[0],
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = tokenizers.clip()
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=_clip(tokenizer, 8),
        text_encoder_2=_clip(tokenizer, 12, projection=20),
        tokenizer=tokenizer,
        tokenizer_2=tokenizers.clip(),
        unet=denoisers.build("unet_sdxl")[0],
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _sd3(family: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    clip, t5 = tokenizers.clip(), tokenizers.t5()
    return StableDiffusion3Pipeline(
        transformer=denoisers.build(family)[0],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(shift_factor=0.1),
        text_encoder=_clip(clip, 8, projection=8),
        tokenizer=clip,
        text_encoder_2=_clip(clip, 8, projection=8),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
    )


def sd3() -> Any:
    return _sd3("sd3")


def sd35() -> Any:
    return _sd3("sd35")


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    clip, t5 = tokenizers.clip(), tokenizers.t5()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_autoencoder(shift_factor=0.1),
        text_encoder=_clip(clip, 16),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=denoisers.build("flux")[0],
    )
    pipe.default_sample_size = 2 * denoisers.HEIGHT
    return pipe


def pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    tokenizer = tokenizers.t5()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_autoencoder(),
        transformer=denoisers.build("pixart")[0],
        scheduler=DPMSolverMultistepScheduler(),
    )


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    tokenizer = tokenizers.t5()
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, multilingual=True),
        vae=autoencoder,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=denoisers.build("wan")[0],
    )


def qwen() -> Any:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tokenizers.qwen2()
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 2}
    vision |= {"window_size": 8, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=denoisers.build("qwen")[0],
    )
    # The real template and its length are in tokens of the real vocabulary.
    pipe.prompt_template_encode = "user\n{}\n"
    pipe.prompt_template_encode_start_idx = len(tokenizer("user\n").input_ids)
    pipe.default_sample_size = 2 * denoisers.HEIGHT
    return pipe


FAMILIES: dict[str, Callable[[], Any]] = {
    make.__name__: make for make in (sd15, sdxl, sd3, sd35, flux, pixart, wan, qwen)
}
NAMES = tuple(FAMILIES)
_TRUE_CFG = ("flux", "qwen")
"""Families whose classifier-free guidance is called ``true_cfg_scale``."""


def build(name: str, seed: int = 0) -> Any:
    """A new pipeline of the family ``name`` with the same weights for the same seed."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        pipe = FAMILIES[name]()
    finally:
        torch.set_rng_state(state)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(name: str, batch: int = 1, cfg: bool = True, steps: int = 3, seed: int = 0) -> dict[str, Any]:
    """What to call the pipeline with: ``batch`` prompts, a seeded generator each, numpy pictures of 48 x 80 pixels."""
    kwargs: dict[str, Any] = {
        "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)],
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(batch)],
        "output_type": "np",
    }
    kwargs["true_cfg_scale" if name in _TRUE_CFG else "guidance_scale"] = 4.0 if cfg else 1.0
    if cfg:
        kwargs["negative_prompt"] = ["the blue photo"] * batch
    if name not in ("sd15", "sdxl"):
        kwargs["max_sequence_length"] = MAX_TEXT
    if name == "pixart":
        kwargs |= {"use_resolution_binning": False, "clean_caption": False}
    if name == "wan":
        kwargs["num_frames"] = 3
    return kwargs
