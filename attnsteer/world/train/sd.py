"""Train the UNet picture model: a StableDiffusionPipeline with cross-attention at 16 x 16 and 8 x 8.

Velocity prediction (Salimans and Ho, 2022, arXiv:2202.00512): with x_t = a x + s e, a^2 + s^2 = 1, the net learns
v = a e - s x, for t uniform over 1,000 steps whose last one is pure noise (Lin et al., 2023, arXiv:2305.08891), jointly
with the text encoder.

    python -m attnsteer.world.train sd --threads 1 --float32 --resume
    python -m attnsteer.world.train sd --steps 60000 --batch 256 --device cuda
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from attnsteer.world.train import loop, pictures
from attnsteer.world.train.data import NUMBER
from attnsteer.world.train.pictures import Bank
from attnsteer.world.train.vae import CHANNELS

TEXT_WIDTH = 128


def scheduler() -> DDIMScheduler:
    """Noise levels for training and sampling."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what the pipeline expects; this spacing does not use it
    )


class Painter(nn.Module):
    """All that is trained: the UNet and the text encoder."""

    def __init__(self, vocabulary: int, channels: tuple[int, int], heads: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = CLIPTextModel(pictures.clip_config(vocabulary, TEXT_WIDTH))
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=heads,  # diffusers' old name: these are numbers of heads
            norm_num_groups=8,
        )
        self.middle: torch.Tensor | None = None
        self.head = nn.Linear(channels[-1], len(NUMBER) + 1)  # of the middle block, for training only
        self.unet.mid_block.register_forward_hook(self.keep)
        pictures.spread_embeddings(self.encoder)
        for name, parameter in self.unet.named_parameters():
            if "conv2" in name or "proj_out" in name or name.startswith("conv_out"):
                nn.init.zeros_(parameter)  # every block starts as the identity

    def keep(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        """Remember the features of the middle block."""
        self.middle = output

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latents [b, 8, 16, 16], timestep [b], tokens [b, text] -> velocity, logits [b, 64, c]."""
        velocity = self.unet(latents, timestep, self.encoder(tokens).last_hidden_state).sample
        assert self.middle is not None
        logits, self.middle = self.head(self.middle.flatten(2).mT), None
        return velocity, logits


def export(model: Painter, vae: AutoencoderTiny, words: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline's folder: float16 weights that load as float32."""
    config = model.unet.config
    fresh = Painter(len(words), config["block_out_channels"], config["attention_head_dim"])
    fresh.load_state_dict(model.state_dict())
    fresh.half()
    pipe = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=fresh.encoder,
        tokenizer=words,
        unet=fresh.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    pictures.finish(folder, ["tokenizer"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = loop.parser("sd", __doc__, steps=4000, batch=32, rate=1.5e-3, out="assets/models/world-sd")
    pictures.add_options(made)
    made.add_argument("--channels", type=int, nargs=2, default=(48, 112), help="at 16 x 16 and 8 x 8")
    made.add_argument("--heads", type=int, nargs=2, default=(2, 4), help="attention heads at 16 x 16 and 8 x 8")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train the picture model."""
    options = parser().parse_args(arguments)
    device = loop.prepare(options)
    words = pictures.tokenizer()
    model = Painter(len(words), tuple(options.channels), tuple(options.heads)).to(device)
    bank = Bank(options)
    offset = bank.vae.config.shift_factor * bank.vae.config.scaling_factor  # this pipeline knows no shift
    levels = scheduler()
    if options.compile:
        model.compile()

    def loss(step: int) -> torch.Tensor:
        batch = bank.batch(step, options.batch)
        tokens = words(batch.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = batch.latents + offset
        noise = torch.randn(clean.shape, generator=batch.source).to(device)
        timestep = torch.randint(1000, (options.batch,), generator=batch.source).to(device)
        with sdpa_kernel(SDPBackend.MATH):  # the fused backward is slow on CPU
            velocity, logits = model(levels.add_noise(clean, noise, timestep), timestep, tokens.to(device))
        wanted = levels.get_velocity(clean, noise, timestep)
        return pictures.loss(velocity, wanted, logits, batch.labels)

    loop.fit(
        model,
        loss,
        options,
        export=lambda mean: export(mean, copy.deepcopy(bank.vae), words, options.out),
        blocks=("down_blocks", "mid_block", "up_blocks", "layers"),
    )


if __name__ == "__main__":
    main()
