"""Tiny random checkpoints in the folder format of transformers: CLIP, DINO, DINOv2 and BLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tokenizers

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def louder(model: Any) -> Any:
    """With larger weights, so that different pictures and texts get different answers."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.eval()


def clip(place: Path) -> Path:
    """CLIP with tokenizer and picture preprocessing; texts have up to 16 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tokenizers.clip()
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**SMALL, **words, "bos_token_id": tokenizer.bos_token_id},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(1)
    model = louder(CLIPModel(config))
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(place)
    return place


def dino(place: Path) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(2)
    louder(ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8))).save_pretrained(place)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
    return place


def dinov2(place: Path) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    shape = {**SMALL, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}
    louder(Dinov2Model(Dinov2Config(**shape))).save_pretrained(place)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**sizes).save_pretrained(place)
    return place


def blip(place: Path) -> Path:
    """A BLIP captioner whose tokenizer knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of"]
    words += ["dog", "cat", "car", "red", "blue", "and", "on", "with", "grass", "bus"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    ends = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = BertTokenizerFast(tokenizer_object=backend, model_max_length=64, **ends)
    config = BlipConfig(
        text_config={
            **SMALL,
            "encoder_hidden_size": 16,
            "vocab_size": len(words) + 2,
            "bos_token_id": len(words),  # as published: the tokenizer does not know it
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
        },
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(4)
    louder(BlipForConditionalGeneration(config)).save_pretrained(place)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    return place
