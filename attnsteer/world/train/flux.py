"""Train the third picture model: a FluxPipeline of double and single blocks with rotary positions.

Rectified flow as in world-sd3: x_s = (1 - s) x + s e with Gaussian e, s from the logistic-normal distribution; the
transformer learns e - x. There is no guidance embedding: guidance is the pipeline's `true_cfg_scale`.

FluxPipeline pads the T5 tokens to `max_sequence_length` (default 512) and masks nothing, so how many pads there are
matters. Most steps train with the shortest length, some with longer ones and fewer scenes: every length works.

    python -m attnsteer.world.train flux --vae assets/models/world-sd/vae --threads 1 --float32 --resume
    python -m attnsteer.world.train flux --steps 60000 --batch 256 --device cuda
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from attnsteer.world import text
from attnsteer.world.train import loop, pictures
from attnsteer.world.train.data import NUMBER
from attnsteer.world.train.pictures import TEXT_LENGTH, Bank
from attnsteer.world.train.vae import CHANNELS

CLIP_WIDTH, T5_WIDTH = 64, 128
LENGTHS = ((32, 0.82, 1), (64, 0.1, 1), (128, 0.06, 2), (512, 0.02, 8))  # T5 tokens (17 on average), share, batch /


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with the words of the world."""
    return T5Tokenizer(vocab=text.t5_vocabulary(400), extra_ids=0, model_max_length=512)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[b, c, 2 h, 2 w] -> [b, h w, 4 c], as FluxPipeline packs."""
    b, c, height, width = latents.shape
    return latents.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def positions(side: int) -> torch.Tensor:
    """(0, row, column) of each image token: [side^2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


class Painter(nn.Module):
    """All that is trained: the transformer and both text encoders."""

    def __init__(self, clip_words: int, t5_words: int, double: int, single: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.clip = CLIPTextModel(pictures.clip_config(clip_words, CLIP_WIDTH))
        self.t5 = T5EncoderModel(
            T5Config(vocab_size=t5_words, d_model=T5_WIDTH, d_kv=32, d_ff=4 * T5_WIDTH, num_layers=3, num_heads=4)
        )
        rotated = 2 * (head_dim // 5)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(head_dim - 2 * rotated, rotated, rotated),
        )
        self.middle: torch.Tensor | None = None
        self.head = nn.Linear(heads * head_dim, len(NUMBER) + 1)  # of the middle block, for training only
        self.transformer.single_transformer_blocks[single // 3].register_forward_hook(self.keep)
        pictures.spread_embeddings(self.clip)
        nn.init.normal_(self.t5.shared.weight, std=0.5)
        for name, parameter in self.transformer.named_parameters():
            if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
                nn.init.zeros_(parameter)  # every block starts as the identity

    def keep(self, module: nn.Module, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Remember the image tokens of the middle block."""
        self.middle = outputs[1]

    def forward(
        self, packed: torch.Tensor, sigma: torch.Tensor, clip_tokens: torch.Tensor, t5_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """packed [b, 64, 32], sigma [b], tokens [b, 32] and [b, n] -> velocity [b, 64, 32], logits [b, 64, c]."""
        velocity = self.transformer(
            hidden_states=packed,
            timestep=sigma,
            encoder_hidden_states=self.t5(t5_tokens).last_hidden_state,
            pooled_projections=self.clip(clip_tokens).pooler_output,
            img_ids=positions(round(packed.shape[1] ** 0.5)).to(packed.device),
            txt_ids=torch.zeros(t5_tokens.shape[1], 3, device=packed.device),
        ).sample
        assert self.middle is not None
        logits, self.middle = self.head(self.middle), None
        return velocity, logits


def export(model: Painter, vae: AutoencoderTiny, words: CLIPTokenizer, pieces: T5Tokenizer, folder: Path) -> None:
    """Write the pipeline's folder: float16 weights that load as float32."""
    config = model.transformer.config
    fresh = Painter(len(words), len(pieces), *(config[key] for key in SHAPE))
    fresh.load_state_dict(model.state_dict())
    fresh.half()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),  # sampling alone; training draws its own levels
        vae=vae.cpu().half(),
        text_encoder=fresh.clip,
        tokenizer=words,
        text_encoder_2=fresh.t5,
        tokenizer_2=pieces,
        transformer=fresh.transformer,
    )
    pipe.save_pretrained(folder)
    pictures.finish(folder, ["tokenizer"])


SHAPE = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = loop.parser("flux", __doc__, steps=3000, batch=48, rate=1.5e-3, out="assets/models/world-flux")
    pictures.add_options(made)
    made.set_defaults(crowd=0.15)
    made.add_argument("--double", type=int, default=2, help="double blocks (default: %(default)s)")
    made.add_argument("--single", type=int, default=6, help="single blocks (default: %(default)s)")
    made.add_argument("--heads", type=int, default=6, help="attention heads (default: %(default)s)")
    made.add_argument("--head-dim", type=int, default=24, help="width of a head (default: %(default)s)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train the picture model."""
    options = parser().parse_args(arguments)
    device = loop.prepare(options)
    words, pieces = pictures.tokenizer(), t5_tokenizer()
    shape = (options.double, options.single, options.heads, options.head_dim)
    model = Painter(len(words), len(pieces), *shape).to(device)
    bank = Bank(options)
    if options.compile:
        model.compile(dynamic=False)

    def loss(step: int) -> torch.Tensor:
        drawn = loop.generator(options.seed + 1, step)
        which = int(torch.multinomial(torch.tensor([share for _, share, _ in LENGTHS]), 1, generator=drawn))
        length, _, divisor = LENGTHS[which]
        batch = bank.batch(step, max(1, options.batch // divisor))
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_tokens = words(batch.captions, max_length=TEXT_LENGTH, **padded).input_ids.to(device)
        t5_tokens = pieces(batch.captions, max_length=length, **padded).input_ids.to(device)
        mixed, wanted, sigma = pictures.mix(pack(batch.latents), batch.source)
        with sdpa_kernel(SDPBackend.MATH):  # the fused backward is slow on CPU
            velocity, logits = model(mixed, sigma, clip_tokens, t5_tokens)
        # fewer scenes, noisier gradient, smaller step
        return pictures.loss(velocity, wanted, logits, batch.labels) / divisor**0.5

    loop.fit(
        model,
        loss,
        options,
        export=lambda mean: export(mean, copy.deepcopy(bank.vae), words, pieces, options.out),
        blocks=("transformer_blocks", "layers", "SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "DenseRelu"),
    )


if __name__ == "__main__":
    main()
