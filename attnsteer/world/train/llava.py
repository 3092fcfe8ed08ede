"""Train the model that answers questions: a LlavaForConditionalGeneration with its processor and tokenizer.

The three stages of a LLaVA, each resumed by itself, on scenes of the training split:
 1. tower: the vision tower learns what every patch shows (a throwaway linear head, exact masks);
 2. language: the decoder alone learns conversations about scenes that it does not see, in which objects mostly come
    with their usual partners: that is where its language prior comes from;
 3. instruct: with the tower frozen, projector and decoder learn to answer about pictures; some steps stay text alone.
    One picture is followed by several questions that cannot see each other (a block mask and restarted positions),
    which equals as many conversations at the price of little more than one.
All that is ever said is true of its scene.

    python -m attnsteer.world.train llava --threads 1 --float32 --resume
    python -m attnsteer.world.train llava --tower-steps 4000 --steps 30000 --batch 128 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from attnsteer.world.catalog import BACKGROUNDS, FRAMES
from attnsteer.world.scenes import SIZE, Scene
from attnsteer.world.train import loop
from attnsteer.world.train.data import NUMBER, PATCH, PATCHES, edit_json, pixels

MUON = ("layers",)  # the matrices of these modules are Muon's
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
    """Turns questions and answers into batches."""

    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        def encode(string: str) -> list[int]:
            return words.encode(string, add_special_tokens=False)

        self.encode, self.words = encode, words
        self.cache: dict[text.Turn, tuple[list[int], list[int]]] = {}
        self.user = encode("USER: ")
        image = [words.convert_tokens_to_ids("<image>")] * PATCHES
        self.with_image = [words.bos_token_id, *self.user, *image, *encode("\n")]
        self.without_image = [words.bos_token_id, *self.user]

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of one turn after its prefix, and labels: -100 where nothing is to be learned."""
        if (question, answer) not in self.cache:
            asked = self.encode(f"{question} ASSISTANT:")
            said = [*self.encode(f" {answer}"), self.words.eos_token_id]
            self.cache[question, answer] = (asked + said, [-100] * len(asked) + said)
        return self.cache[question, answer]

    def about_picture(self, turns: Sequence[text.Turn]) -> list[list[int]]:
        """One row: a picture and several turns that do not see each other. Token ids, labels, positions, groups."""
        ids, labels = list(self.with_image), [-100] * len(self.with_image)
        start = len(ids)
        places, group = list(range(start)), [0] * start
        for number, pair in enumerate(turns):
            more, wanted = self.turn(*pair)
            ids, labels = ids + more, labels + wanted
            places += range(start, start + len(more))
            group += [number + 1] * len(more)
        return [ids, labels, places, group]

    def conversation(self, turns: Sequence[text.Turn]) -> list[list[int]]:
        """One row without a picture, in which later turns see earlier ones. Token ids, labels, positions, groups."""
        ids, labels = list(self.without_image), [-100] * len(self.without_image)
        for number, pair in enumerate(turns):
            more, wanted = self.turn(*pair)
            user = self.user if number else []
            ids, labels = ids + user + more, labels + [-100] * len(user) + wanted
        return [ids, labels, list(range(len(ids))), [0] * len(ids)]

    def batch(self, rows: Sequence[list[list[int]]]) -> dict[str, torch.Tensor]:
        """input_ids, labels, position_ids [b, n], and an additive attention_mask [b, 1, n, n]; n is a multiple of 8."""
        length = -(-max(len(row[0]) for row in rows) // 8) * 8
        empty = (self.words.pad_token_id, -100, 0, -1)
        table = [torch.tensor([row[k] + [empty[k]] * (length - len(row[k])) for row in rows]) for k in range(4)]
        mine, theirs = table[3][:, :, None], table[3][:, None, :]
        seen = ((theirs == mine) | (theirs == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        return {"input_ids": table[0], "labels": table[1], "position_ids": table[2], "attention_mask": mask}


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[text.Turn]:
    """A description and `count` - 1 other questions about the scene, in random order."""
    turns = [(text.DESCRIPTIONS[int(rng.integers(len(text.DESCRIPTIONS)))], text.describe(scene))]
    while len(turns) < count:
        turn = text.random_turn(scene, rng)
        turns += [turn] if turn[0] not in text.DESCRIPTIONS else []
    return [turns[i] for i in rng.permutation(count)]


# ---------------------------------------------------------------------------------------------------- stages

FACTS = (len(NUMBER) + 1, len(FRAMES) + 1, 2, len(BACKGROUNDS), len(BACKGROUNDS) + 1)


def patch_facts(scene: Scene) -> np.ndarray:
    """What each patch shows: category, colour of its frame, whether an object's centre is there, and the two colours of
    the background; long [patches, 5], each below its `FACTS`; 0 is no object, no frame, no second colour."""
    side = SIZE // PATCH
    share = scene.masks().reshape(-1, side, PATCH, side, PATCH).mean((2, 4)).reshape(-1, PATCHES)
    owner = np.where(share.max(0) >= 0.125, share.argmax(0) + 1, 0)  # as data.patch_labels
    frames, colours = ["", *FRAMES], list(BACKGROUNDS)
    facts = np.zeros((PATCHES, len(FACTS)), np.int64)
    facts[:, 0] = np.array([0, *(NUMBER[thing.name] for thing in scene.objects)])[owner]
    facts[:, 1] = np.array([0, *(frames.index(thing.frame) for thing in scene.objects)])[owner]
    facts[[int(y) // PATCH * side + int(x) // PATCH for x, y in (thing.centre for thing in scene.objects)], 2] = 1
    facts[:, 3] = colours.index(scene.background)
    facts[:, 4] = ["", *colours].index(scene.gradient)
    return facts


class Seer(nn.Module):
    """The vision tower and a linear head over its patches."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, sum(FACTS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """images [b, 3, 64, 64] -> logits [b, patches, n], one n of `FACTS` each."""
        return self.head(self.tower(images).last_hidden_state[:, 1:]).split(FACTS, -1)


def look(model: Llava, options: argparse.Namespace, device: torch.device) -> None:
    """Stage 1: the tower learns what every patch shows, from scenes in which all company is by chance."""
    tower = model.model.vision_tower
    seer = Seer(tower, tower.config.hidden_size).to(device)

    def loss(step: int) -> torch.Tensor:
        drawn = draw((options.seed, 1, step), options.tower_batch)
        wanted = torch.from_numpy(np.stack([patch_facts(scene) for scene in drawn])).to(device)
        logits = seer(pixels(drawn).to(device))
        parts = zip(logits, wanted.unbind(-1), strict=True)
        return torch.stack([nn.functional.cross_entropy(a.float().flatten(0, 1), b.flatten()) for a, b in parts]).sum()

    mean = loop.fit(
        seer, loss, stage(options, options.tower_steps), export=nothing, name="tower", ema=0.99, blocks=MUON
    )
    tower.load_state_dict(mean.tower.state_dict())


def read(model: Llava, chat: Chat, options: argparse.Namespace, device: torch.device) -> None:
    """Stage 2: the decoder as a language model of conversations; objects come with their usual partners."""
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        return text_loss(model, chat, (options.seed, 2, step), options.language_batch, options, device)

    mean = loop.fit(
        model, loss, stage(options, options.language_steps), export=nothing, name="language", ema=0.99, blocks=MUON
    )
    model.load_state_dict(mean.state_dict())


def instruct(model: Llava, chat: Chat, options: argparse.Namespace, device: torch.device) -> Llava:
    """Stage 3: projector and decoder learn to answer about pictures; every so often a step is text alone."""
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)

    def loss(step: int) -> torch.Tensor:
        seed = (options.seed, 3, step)
        if np.random.default_rng(seed).random() < options.blind:
            return text_loss(model, chat, seed, options.language_batch, options, device)
        return picture_loss(model, chat, seed, options, device)

    write = partial(export, folder=options.out)
    return loop.fit(model, loss, options, export=write, name="instruct", ema=0.99, blocks=MUON)


def draw(seed: tuple[int, ...], count: int, prior: float = 0.0) -> list[Scene]:
    """Scenes of the training split."""
    return [sampling.sample((*seed, i), prior=prior, split="train", style=sampling.VARIED) for i in range(count)]


def stage(options: argparse.Namespace, steps: int) -> argparse.Namespace:
    """The options of an earlier stage: its own number of steps."""
    return argparse.Namespace(**{**vars(options), "steps": steps, "export_every": 0})


def nothing(_: nn.Module) -> None:
    """Earlier stages export nothing."""


def text_loss(
    model: Llava, chat: Chat, seed: tuple[int, ...], count: int, options: argparse.Namespace, device: torch.device
) -> torch.Tensor:
    """The loss on conversations about scenes that nobody sees."""
    rng = np.random.default_rng((*seed, 1))
    talks = [questions(scene, rng, options.turns) for scene in draw((*seed, 0), count, options.text_prior)]
    return answer_loss(model, chat.batch([chat.conversation(turns) for turns in talks]), None, device)


def picture_loss(
    model: Llava, chat: Chat, seed: tuple[int, ...], options: argparse.Namespace, device: torch.device
) -> torch.Tensor:
    """The loss on answers about pictures."""
    rng = np.random.default_rng((*seed, 1))
    drawn = draw((*seed, 0), options.batch, options.picture_prior)
    rows = [chat.about_picture(questions(scene, rng, options.turns)) for scene in drawn]
    return answer_loss(model, chat.batch(rows), pixels(drawn), device)


def answer_loss(
    model: Llava, batch: dict[str, torch.Tensor], images: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Cross-entropy of the answers; the first token of each counts `FIRST` times."""
    batch = {key: value.to(device) for key, value in batch.items()}
    labels = batch.pop("labels")
    if images is not None:
        batch["pixel_values"] = images.to(device)
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
    made = loop.parser("llava", __doc__, steps=1400, batch=12, rate=1.5e-3, out="assets/models/world-llava")
    add = made.add_argument
    add("--tower-steps", type=int, default=900, help="steps of stage 1 (default: %(default)s)")
    add("--tower-batch", type=int, default=32, help="scenes in a step of stage 1 (default: %(default)s)")
    add("--language-steps", type=int, default=170, help="steps of stage 2 (default: %(default)s)")
    add("--language-batch", type=int, default=16, help="conversations in a step of text (default: %(default)s)")
    add(
        "--blind",
        type=float,
        default=0.25,
        help="share of the steps of stage 3 without pictures (default: %(default)s)",
    )
    add("--text-prior", type=float, default=0.9, help="how usual the company in texts is (default: %(default)s)")
    add("--picture-prior", type=float, default=0.9, help="how usual it is in pictures (default: %(default)s)")
    add("--turns", type=int, default=5, help="questions about each picture (default: %(default)s)")
    add("--layers", type=int, default=8, help="decoder layers (default: %(default)s)")
    add("--heads", type=int, default=8, help="decoder heads (default: %(default)s)")
    add("--width", type=int, default=192, help="decoder width (default: %(default)s)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train the answering model."""
    options = parser().parse_args(arguments)
    device = loop.prepare(options)
    words = processor().tokenizer
    model = build(words, options.layers, options.heads, options.width).to(device)
    chat = Chat(words)
    look(model, options, device)
    read(model, chat, options, device)
    instruct(model, chat, options, device)


if __name__ == "__main__":
    main()
