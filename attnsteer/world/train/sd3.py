"""Train the picture model: a StableDiffusion3Pipeline, MMDiT of 6 blocks, with its own two small CLIP text encoders.

Rectified flow (Esser et al., 2024, arXiv:2403.03206): x_s = (1 - s) x + s e with Gaussian e, s from the logistic-normal
distribution; the transformer learns e - x at timestep 1000 s, jointly with the text encoders.

The pipeline's loader insists on a T5 encoder. Ours is a placeholder of one tiny layer whose final norm has weight 0, so
it gives what the pipeline puts there without one: `max_sequence_length` (default 256) all-zero text tokens. n equal
tokens are worth one token with log n added to its attention logits, in every layer: training uses one, with n drawn
from 1..256, and the model works with any number.

    python -m attnsteer.world.train vae --steps 3500 --threads 2
    python -m attnsteer.world.train sd3 --vae assets/models/world-sd/vae --threads 1 --float32 --resume
    python -m attnsteer.world.train sd3 --steps 60000 --batch 256 --device cuda
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from attnsteer.world import text
from attnsteer.world.train import loop, pictures
from attnsteer.world.train.data import NUMBER
from attnsteer.world.train.pictures import Bank
from attnsteer.world.train.vae import CHANNELS

TEXT_WIDTHS = (128, 64)  # of the two encoders
ZERO_TOKENS = (1, 4, 16, 64, 256, 256)  # how many all-zero tokens the pipeline may append


def placeholder() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is zero for every token, and its tokenizer."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=512, d_model=sum(TEXT_WIDTHS), d_kv=8, d_ff=16, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, T5Tokenizer(vocab=text.t5_vocabulary(400), extra_ids=0, model_max_length=256)


class Painter(nn.Module):
    """All that is trained: the transformer and both text encoders."""

    def __init__(self, vocabulary: int, blocks: int = 6, heads: int = 6, head_dim: int = 24) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            CLIPTextModelWithProjection(pictures.clip_config(vocabulary, width)) for width in TEXT_WIDTHS
        )
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=blocks,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=sum(TEXT_WIDTHS),
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=sum(TEXT_WIDTHS),
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        self.middle: torch.Tensor | None = None
        self.head = nn.Linear(heads * head_dim, len(NUMBER) + 1)  # of the middle block, for training only
        self.transformer.transformer_blocks[blocks // 2].register_forward_hook(self.keep)
        self.start()

    def keep(self, module: nn.Module, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Remember the image tokens of the middle block."""
        self.middle = outputs[1]

    def start(self) -> None:
        """Zero the modulations and the last layer: every block starts as the identity."""
        for name, parameter in self.transformer.named_parameters():
            if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
                nn.init.zeros_(parameter)
        pictures.spread_embeddings(self.encoders)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor, zeros: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latents [b, 8, 16, 16], timestep [b], tokens [b, text], zeros [b] -> velocity, logits [b, 64, c]."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        sequence = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        sequence = nn.functional.pad(sequence, (0, 0, 0, 1))  # the one zero token, worth `zeros` of them
        keys = latents.shape[-1] * latents.shape[-2] // 4 + sequence.shape[1]
        bias = nn.functional.pad(zeros.log()[:, None], (keys - 1, 0))[:, None, None]  # [b, 1, 1, keys]
        velocity = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            joint_attention_kwargs={"bias": bias},
            return_dict=False,
        )[0]
        logits, self.middle = self.head(self.middle), None
        return velocity, logits


class BiasedAttention:
    """SD3's joint attention, written out (faster than the fused backward on CPU), with a bias on the keys."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        bias: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens [b, n, c] and text tokens [b, m, c] attend to each other; bias [b, 1, 1, n + m]."""
        length, words = hidden_states.shape[1], encoder_hidden_states

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [b, n, h d] -> [b, h, n, d]

        queries = [attn.norm_q(split(attn.to_q(hidden_states))), attn.norm_added_q(split(attn.add_q_proj(words)))]
        keys = [attn.norm_k(split(attn.to_k(hidden_states))), attn.norm_added_k(split(attn.add_k_proj(words)))]
        values = [split(attn.to_v(hidden_states)), split(attn.add_v_proj(words))]
        query, key, value = torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = (logits.float() + bias).softmax(-1).to(value.dtype)
        mixed = (weights @ value).transpose(1, 2).flatten(2)  # [b, n, h d]
        image, words = mixed[:, :length], mixed[:, length:]
        words = words if attn.context_pre_only else attn.to_add_out(words)
        return attn.to_out[0](image), words


def export(model: Painter, vae: AutoencoderTiny, words: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline's folder: float16 weights that load as float32."""
    fresh = Painter(len(words), *(model.transformer.config[key] for key in SHAPE))
    fresh.load_state_dict(model.state_dict())
    fresh.half()
    third, third_words = placeholder()
    pipe = StableDiffusion3Pipeline(
        transformer=fresh.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.cpu().half(),
        text_encoder=fresh.encoders[0],
        tokenizer=words,
        text_encoder_2=fresh.encoders[1],
        tokenizer_2=words,
        text_encoder_3=third.half(),
        tokenizer_3=third_words,
    )
    pipe.save_pretrained(folder)
    pictures.finish(folder, ["tokenizer", "tokenizer_2"])


SHAPE = ("num_layers", "num_attention_heads", "attention_head_dim")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = loop.parser("sd3", __doc__, steps=3000, batch=48, rate=1.5e-3, out="assets/models/world-sd3")
    pictures.add_options(made)
    made.set_defaults(crowd=0.15)
    made.add_argument("--blocks", type=int, default=6, help="transformer blocks (default: %(default)s)")
    made.add_argument("--heads", type=int, default=6, help="attention heads (default: %(default)s)")
    made.add_argument("--head-dim", type=int, default=24, help="width of a head (default: %(default)s)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train the picture model."""
    options = parser().parse_args(arguments)
    device = loop.prepare(options)
    words = pictures.tokenizer()
    model = Painter(len(words), options.blocks, options.heads, options.head_dim).to(device)
    model.transformer.set_attn_processor(BiasedAttention())
    bank = Bank(options)
    if options.compile:
        model.compile()

    def loss(step: int) -> torch.Tensor:
        batch = bank.batch(step, options.batch)
        padded = words(batch.captions, padding="max_length", truncation=True, return_tensors="pt")
        mixed, wanted, sigma = pictures.mix(batch.latents, batch.source)
        zeros = torch.from_numpy(batch.rng.choice(ZERO_TOKENS, size=options.batch)).to(device, torch.float32)
        velocity, logits = model(mixed, 1000 * sigma, padded.input_ids.to(device), zeros)
        return pictures.loss(velocity, wanted, logits, batch.labels)

    loop.fit(
        model,
        loss,
        options,
        export=lambda mean: export(mean, copy.deepcopy(bank.vae), words, options.out),
        blocks=("transformer_blocks",),
    )


if __name__ == "__main__":
    main()
