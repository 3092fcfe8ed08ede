"""What the three picture models share: scenes encoded once, captions, text encoders, a head for the middle of the net.

Because the world knows what is where, the features in the middle of each net also learn, through a throwaway linear
head, which category each patch of the clean picture shows; text and shapes meet early (the idea of REPA,
arXiv:2410.06940). A tenth of the captions is empty, for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from attnsteer.world import sampling, text
from attnsteer.world.scenes import Scene
from attnsteer.world.train import data, loop

TEXT_LENGTH = 32  # tokens of a caption with its start and end
COUNT_WEIGHTS = (0.5, 0.36, 0.09, 0.05)  # scenes with 1, 2, 3, 4 objects
STYLE = sampling.Style(frame=0.12, gradient=0.06, flip=0.0)
DROP = 0.1  # captions left out
PATCH_WEIGHT = 0.1  # of the loss of the middle of the net
BANK_SEED = 1_000_003


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the picture models share."""
    parser.add_argument("--vae", type=Path, help="folder of the trained autoencoder (default: vae/ of --out)")
    parser.add_argument("--bank", type=int, default=40000, help="number of scenes encoded once (default: %(default)s)")
    parser.add_argument(
        "--crowd",
        type=float,
        default=0.5,
        help="share of scenes with two to four objects, 0 to 1; pictures of the web have few (default: %(default)s)",
    )


def bank_count(seed: int, index: int) -> int:
    """How many objects scene number `index` of the training set has."""
    return 1 + int(np.random.default_rng((seed, BANK_SEED, index)).choice(4, p=COUNT_WEIGHTS))


def bank_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the training set: mostly one or two objects, none mirrored or turned."""
    count = bank_count(seed, index)
    return sampling.sample((seed, BANK_SEED, index, 1), count=count, repeat=0.08, split="train", style=STYLE)


@dataclass(frozen=True)
class Batch:
    """latents: clean and normalised [b, 8, 16, 16]; captions: b strings; labels: categories of patches [b, 64];
    rng, source: what else is random in this step."""

    latents: torch.Tensor
    captions: list[str]
    labels: torch.Tensor
    rng: np.random.Generator
    source: torch.Generator


class Bank:
    """`options.bank` scenes, encoded once and kept in the run's folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        folder = options.vae or options.out / "vae"
        self.vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).to(options.device).eval()
        file = options.run / f"bank-{options.bank}-{options.seed}.pt"
        if not file.exists():
            loop.save(file, **self.encode())
        known = torch.load(file, weights_only=True)
        self.latents, self.labels = known["latents"], known["labels"]
        if not 0 <= options.crowd <= 1:
            raise SystemExit(f"--crowd {options.crowd} is out of range: allowed is 0 to 1.")
        numbers = range(len(self.latents))
        self.single = [number for number in numbers if bank_count(options.seed, number) == 1]
        self.crowded = [number for number in numbers if bank_count(options.seed, number) > 1]
        if not self.single or not self.crowded:
            raise SystemExit(f"--bank {options.bank} scenes are all of one object or all of several: take more.")

    @torch.no_grad()
    def encode(self) -> dict[str, torch.Tensor]:
        """latents, normalised, float16 [n, 8, 16, 16], and labels of the patches, uint8 [n, 64]."""
        parts, labels = [], []
        for first in range(0, self.options.bank, 64):
            numbers = range(first, min(first + 64, self.options.bank))
            drawn = [bank_scene(self.options.seed, number) for number in numbers]
            labels.append(data.patch_labels(drawn).to(torch.uint8))
            images = data.pixels(drawn).to(self.options.device, memory_format=torch.channels_last)
            latents = self.vae.encode(images).latents
            parts.append(((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor).half().cpu())
        return {"latents": torch.cat(parts), "labels": torch.cat(labels)}

    def batch(self, step: int, size: int) -> Batch:
        """The scenes of one training step."""
        seed, device = self.options.seed, self.options.device
        rng = np.random.default_rng((seed, step))
        crowd = self.options.crowd
        wanted = [self.crowded if rng.random() < crowd else self.single for _ in range(size)]
        chosen = [numbers[rng.integers(len(numbers))] for numbers in wanted]
        captions = ["" if rng.random() < DROP else text.caption(bank_scene(seed, i), rng) for i in chosen]
        picked = torch.tensor(chosen)
        latents = self.latents[picked].to(device, torch.float32)
        labels = self.labels[picked].to(device, torch.long)
        return Batch(latents, captions, labels, rng, loop.generator(seed, step))


def mix(clean: torch.Tensor, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectified flow: x_s = (1 - s) x + s e with Gaussian e, its velocity e - x, and s [b], logistic-normal."""
    noise = torch.randn(clean.shape, generator=source).to(clean.device)
    sigma = torch.randn(len(clean), generator=source).sigmoid().to(clean.device)
    at = sigma.view(-1, *[1] * (clean.dim() - 1))
    return (1 - at) * clean + at * noise, noise - clean, sigma


def loss(velocity: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error of the velocity, and cross-entropy of the middle's patches: logits [b, 64, c], labels [b, 64]."""
    wrong = (velocity.float() - wanted).square().mean()
    return wrong + PATCH_WEIGHT * nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with the words of the world."""
    vocabulary, merges = text.clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def clip_config(vocabulary: int, width: int) -> CLIPTextConfig:
    """A CLIP text encoder of three layers; the last two tokens of the vocabulary start and end a text."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def spread_embeddings(encoder: nn.Module) -> None:
    """Start the embeddings of a text encoder large enough to be told apart."""
    for name, parameter in encoder.named_parameters():
        if "embedding.weight" in name:
            nn.init.normal_(parameter, std=0.1 if "token_embedding" in name else 0.05)


def finish(folder: Path, clip_tokenizers: Sequence[str]) -> None:
    """Mark a saved pipeline so that its float16 weights load as float32, and give CLIP tokenizers their old files."""
    # the class derives the channels; where the autoencoder was loaded from is a path of one machine
    data.edit_json(folder / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    for encoder in folder.glob("text_encoder*"):
        data.edit_json(encoder / "config.json", dtype="float32")
    vocabulary, merges = text.clip_vocabulary()
    for name in clip_tokenizers:
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
