"""Train the picture encoder and decoder of the diffusion models: an AutoencoderTiny, 4x smaller, 8 channels.

Loss: mean squared error, twice as heavy on objects as on the background, plus the error of horizontal and vertical
differences (edges). A small Gaussian disturbance of the latents keeps the latent space smooth. At the end the latents
of 2,048 scenes are measured and `shift_factor` and `scaling_factor` set: the diffusion model sees unit variance.

    python -m attnsteer.world.train vae --steps 3500 --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from attnsteer.world import sampling
from attnsteer.world.catalog import CATEGORIES, CORE
from attnsteer.world.train import loop
from attnsteer.world.train.data import edit_json

CHANNELS = 8
NOISE = 0.05  # standard deviation of the disturbance of the latents
STYLE = sampling.Style(rotate=0.15, occlude=0.15, frame=0.3, gradient=0.15)
ALL = tuple(category.name for category in CATEGORIES)


def build(width: int = 32) -> AutoencoderTiny:
    """A new autoencoder: 64 x 64 pixels to 16 x 16 x 8 and back."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=CHANNELS,
    )


def pictures(
    seeds: Sequence[tuple[int, ...]], device: torch.device, categories: Sequence[str] = CORE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes as float pictures [n, 3, 64, 64] in -1..1, and where objects are [n, 1, 64, 64] as 0 or 1."""
    drawn = [sampling.sample(seed, categories=categories, split="train", style=STYLE) for seed in seeds]
    images = torch.from_numpy(np.stack([scene.array() for scene in drawn])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([scene.masks().any(0) for scene in drawn]))[:, None]
    return images.to(device, torch.float32) / 127.5 - 1, masks.to(device, torch.float32)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weighted squared error plus squared error of the first differences, both means over pixels."""
    error = output.float() - target
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    return (error.square() * (1 + mask)).mean() + 0.5 * (across.square().mean() + down.square().mean())


@torch.no_grad()
def measure(model: AutoencoderTiny, count: int = 2048, device: str = "cpu") -> tuple[float, float, float]:
    """Mean and standard deviation of the latents, and the mean squared error in 0..1 pixel units, on unseen scenes."""
    latents, errors = [], []
    for first in range(0, count, 128):
        target, _ = pictures([(99, first + i) for i in range(128)], torch.device(device))
        latent = model.encode(target).latents
        latents.append(latent)
        errors.append((model.decode(latent).sample - target).square().mean() / 4)
    everything = torch.cat(latents)
    return float(everything.mean()), float(everything.std()), float(torch.stack(errors).mean())


def export(model: AutoencoderTiny, options: argparse.Namespace) -> None:
    """Set the latent statistics and write the folder, in float16."""
    mean, deviation, error = measure(model.eval(), device=options.device)
    model.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    print(f"latents: mean {mean:.4f}, deviation {deviation:.4f}; mean squared error {error:.5f} (pixels in 0..1)")
    half = build(options.width)
    half.load_state_dict(model.state_dict())
    half.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    half.half().save_pretrained(options.out)
    edit_json(options.out / "config.json", block_out_channels=None)  # the class derives it


def main(arguments: list[str] | None = None) -> None:
    """Train the autoencoder."""
    parser = loop.parser("vae", __doc__, steps=3500, batch=16, rate=1e-3, out="assets/models/world-sd/vae")
    parser.add_argument("--width", type=int, default=32, help="channels of all blocks (default: %(default)s)")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder")
    options = parser.parse_args(arguments)
    device = loop.prepare(options)
    model = build(options.width)
    if options.init:
        model.load_state_dict(AutoencoderTiny.from_pretrained(options.init, torch_dtype=torch.float32).state_dict())
    model.to(device, memory_format=torch.channels_last)

    def loss(step: int) -> torch.Tensor:
        seeds = [(options.seed, step, i) for i in range(options.batch)]
        target, mask = pictures(seeds, device, categories=ALL if step % 2 else CORE)
        target = target.contiguous(memory_format=torch.channels_last)
        latent = model.encode(target).latents
        noise = torch.randn(latent.shape, generator=loop.generator(options.seed, step, device), device=device)
        scale = latent.detach().float().std()
        output = model.decode(latent + NOISE * scale * noise).sample
        return reconstruction_loss(output, target, mask) + 1e-4 * latent.float().square().mean()

    loop.fit(model, loss, options, export=partial(export, options=options), ema=0.995)


if __name__ == "__main__":
    main()
