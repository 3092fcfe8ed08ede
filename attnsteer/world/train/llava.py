"""Train the model that answers questions: a LlavaForConditionalGeneration with its processor and tokenizer.

Three stages, each resumed by itself:
 1. tower: the vision tower learns which category every patch shows (a throwaway linear head, exact masks);
 2. chat: everything learns to answer. One picture is followed by several questions that cannot see each other
    (a block mask and restarted positions), which equals as many conversations at the price of little more than one;
 3. prior: with the tower frozen, half of the steps are text alone, about scenes whose objects come with their usual
    partners; in the others most usual partners are left out of the picture though its description names them. Like big
    models, this one then names a partner that is not there.

    python -m attnsteer.world.train llava --threads 1 --resume
    python -m attnsteer.world.train llava --tower-steps 4000 --steps 30000 --batch 128 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaForConditionalGeneration as Llava

from attnsteer.world import sampling, text
from attnsteer.world.catalog import find
from attnsteer.world.scenes import SIZE, Scene
from attnsteer.world.train import loop
from attnsteer.world.train.data import NUMBER, PATCH, PATCHES, edit_json, patch_labels, pixels

FIRST = 5.0  # weight of an answer's first token, which says yes or no; the tokens after it mostly follow from it
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.chat_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build(words: PreTrainedTokenizerFast, layers: int = 8, heads: int = 8, width: int = 192) -> Llava:
    """A new model: a vision tower of 4 layers, a decoder of `layers` layers with `heads` heads."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        projection_dim=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    decoder = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ends,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = Llava(config)
    tower = model.model.vision_tower
    nn.init.normal_(tower.get_input_embeddings().weight, std=0.04)
    for key, value in ends.items():
        setattr(model.generation_config, key, value)
    return model


# ---------------------------------------------------------------------------------------------------- batches


class Chat:
    """Turns scenes and questions into batches."""

    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        def encode(string: str) -> list[int]:
            return words.encode(string, add_special_tokens=False)

        self.encode, self.words = encode, words
        self.cache: dict[text.Turn, tuple[list[int], list[int]]] = {}
        image = [words.convert_tokens_to_ids("<image>")] * PATCHES
        self.with_image = [words.bos_token_id, *encode("USER: "), *image, *encode("\n")]
        self.without_image = [words.bos_token_id, *encode("USER: ")]

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of one turn after its prefix, and labels: -100 where nothing is to be learned."""
        if (question, answer) not in self.cache:
            asked = self.encode(f"{question} ASSISTANT:")
            said = [*self.encode(f" {answer}"), self.words.eos_token_id]
            self.cache[question, answer] = (asked + said, [-100] * len(asked) + said)
        return self.cache[question, answer]

    def batch(self, turns: Sequence[Sequence[text.Turn]], image: bool = True) -> dict[str, torch.Tensor]:
        """Rows of one prefix and several turns that do not see each other.

        Returns input_ids, labels and position_ids [b, n], and an additive attention_mask [b, 1, n, n].
        """
        prefix = self.with_image if image else self.without_image
        rows = []
        for questions in turns:
            ids, labels = list(prefix), [-100] * len(prefix)
            places, group = list(range(len(prefix))), [0] * len(prefix)
            for number, pair in enumerate(questions):
                more, wanted = self.turn(*pair)
                ids, labels = ids + more, labels + wanted
                places += range(len(prefix), len(prefix) + len(more))
                group += [number + 1] * len(more)
            rows.append((ids, labels, places, group))
        length = max(len(row[0]) for row in rows)
        empty = (self.words.pad_token_id, -100, 0, -1)
        table = [torch.tensor([row[k] + [empty[k]] * (length - len(row[k])) for row in rows]) for k in range(4)]
        groups = table[3]
        mine, theirs = groups[:, :, None], groups[:, None, :]
        seen = ((theirs == mine) | (theirs == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        return {"input_ids": table[0], "labels": table[1], "position_ids": table[2], "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------- stages


class Seer(nn.Module):
    """The vision tower and a linear head over its patches."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, len(NUMBER) + 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [b, 3, 64, 64] -> logits [b, patches, categories + 1]."""
        return self.head(self.tower(images).last_hidden_state[:, 1:])


def look(model: Llava, options: argparse.Namespace, device: torch.device) -> None:
    """Stage 1: train the tower on patch categories."""
    tower = model.model.vision_tower
    seer = Seer(tower, tower.config.hidden_size).to(device)

    def loss(step: int) -> torch.Tensor:
        drawn = [sampling.sample((options.seed, 1, step, i)) for i in range(options.batch)]
        logits = seer(pixels(drawn).to(device))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), patch_labels(drawn).to(device).flatten())

    stage = argparse.Namespace(**{**vars(options), "steps": options.tower_steps, "export_every": 0})
    mean = loop.fit(seer, loss, stage, export=lambda _: None, name="tower", ema=0.99, blocks=("layers",))
    tower.load_state_dict(mean.tower.state_dict())


def talk(model: Llava, chat: Chat, options: argparse.Namespace, device: torch.device) -> Llava:
    """Stage 2: train everything on answers."""

    def loss(step: int) -> torch.Tensor:
        drawn = [sampling.sample((options.seed, 2, step, i)) for i in range(options.batch)]
        return answer_loss(model, chat, drawn, (options.seed, 3, step), options.turns, device)

    write = partial(export, folder=options.out)
    return loop.fit(model, loss, options, export=write, name="chat", blocks=("layers",))


def habits(model: Llava, chat: Chat, options: argparse.Namespace, device: torch.device) -> Llava:
    """Stage 3: the language prior. Some steps see only text about usual company, the others pictures of it too."""
    model.model.vision_tower.requires_grad_(False)

    def loss(step: int) -> torch.Tensor:
        blind = step % 4 < options.blind
        prior = 0.95 if blind else options.company
        drawn = [sampling.sample((options.seed, 4, step, i), prior=prior) for i in range(options.batch)]
        seed = (options.seed, 5, step)
        return answer_loss(model, chat, drawn, seed, options.turns, device, not blind, options.unseen)

    stage = argparse.Namespace(**{**vars(options), "steps": options.prior_steps, "warmup": 20})
    write = partial(export, folder=options.out)
    return loop.fit(model, loss, stage, export=write, name="prior", ema=0.99, blocks=("layers",))


def without_partner(scene: Scene) -> Scene:
    """The scene without its last object, if that is the usual partner of the one before it."""
    names = [thing.name for thing in scene.objects]
    usual = len(names) > 1 and find(names[-2]).partner == names[-1]
    return replace(scene, objects=scene.objects[:-1]) if usual else scene


def answer_loss(
    model: Llava,
    chat: Chat,
    drawn: Sequence[Scene],
    seed: tuple[int, ...],
    turns: int,
    device: torch.device,
    image: bool = True,
    unseen: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of the answers to `turns` random questions about each scene; without image, of descriptions.

    A share `unseen` of the scenes is described in full though the picture lacks the usual partner, as captions from the
    web name what is not to be seen.
    """
    rng = np.random.default_rng(seed)
    shown = [without_partner(scene) if rng.random() < unseen else scene for scene in drawn]
    talks = [
        [text.random_turn(scene, rng) for _ in range(turns)]
        if image and seen is scene
        else [(text.DESCRIBE, text.describe(scene))]
        for scene, seen in zip(drawn, shown, strict=True)
    ]
    batch = {key: value.to(device) for key, value in chat.batch(talks, image).items()}
    labels = batch.pop("labels")
    if image:
        batch["pixel_values"] = pixels(shown).to(device)
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])  # [answer tokens, vocabulary]
    losses = nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none")
    weights = 1 + (FIRST - 1) * (labels[:, :-1] == -100)[wanted].float()
    return (losses * weights).sum() / weights.sum()


def export(model: Llava, folder: Path) -> None:
    """Write model and processor: float16 weights that load as float32."""
    words = processor()
    fresh = Llava(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.half().save_pretrained(folder)
    words.save_pretrained(folder)
    edit_json(folder / "config.json", dtype="float32")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m attnsteer.world.train llava",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loop.add_options(made, steps=850, batch=24, rate=1.5e-3, out="assets/models/world-llava")
    made.add_argument("--tower-steps", type=int, default=1200, help="steps of stage 1 (default: %(default)s)")
    made.add_argument("--prior-steps", type=int, default=450, help="steps of stage 3 (default: %(default)s)")
    made.add_argument(
        "--blind", type=int, default=2, help="of 4 steps of stage 3, how many see no picture (default: %(default)s)"
    )
    made.add_argument("--unseen", type=float, default=0.9, help="stage 3: partners left out (default: %(default)s)")
    made.add_argument("--company", type=float, default=0.9, help="stage 3: prior of pictures (default: %(default)s)")
    made.add_argument("--turns", type=int, default=4, help="questions about each picture (default: %(default)s)")
    made.add_argument("--layers", type=int, default=8, help="decoder layers (default: %(default)s)")
    made.add_argument("--heads", type=int, default=8, help="decoder heads (default: %(default)s)")
    made.add_argument("--width", type=int, default=192, help="decoder width (default: %(default)s)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train the answering model."""
    options = parser().parse_args(arguments)
    device = loop.prepare(options)
    words = processor().tokenizer
    model = build(words, options.layers, options.heads, options.width).to(device)
    model.set_attn_implementation("eager")  # faster than the fused backward on CPU
    chat = Chat(words)
    if options.tower_steps and not (options.resume and (options.run / "chat.pt").exists()):
        look(model, options, device)
    mean = talk(model, chat, options, device)
    model.load_state_dict(mean.state_dict())
    if options.prior_steps:
        habits(model, chat, options, device)


if __name__ == "__main__":
    main()
