"""Real tokenizer classes with vocabularies made on the spot: known words are one token, all others are spelled out."""

from __future__ import annotations

import string
from typing import Any

WORDS = ("a", "and", "the", "of", "dog", "cat", "car", "bird", "red", "blue", "photo", "user", "on", "grass")


def _byte_pairs(end: str, prefix: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of single characters and the merges that build each word left to right.

    Args:
        end: marks the end of a word (CLIP), "" otherwise.
        prefix: a further form of each word, with this marker in front (Qwen: a leading space).
    """
    alphabet = [*string.printable.strip(), "Ġ", "Ċ"]
    vocabulary = dict.fromkeys([*alphabet, *(c + end for c in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = [*word[:-1], word[-1] + end]
        while len(letters) > 1:
            merges[letters[0], letters[1]] = None
            letters[:2] = [letters[0] + letters[1]]
            vocabulary[letters[0]] = None
        if prefix:
            merges[prefix, word] = None
            vocabulary[prefix + word] = None
    return {token: number for number, token in enumerate(vocabulary)}, list(merges)


def clip(max_length: int = 16) -> Any:
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs(end="</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def t5(max_length: int = 16) -> Any:
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS] + [(c, -4.0) for c in string.printable.strip()]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


def qwen2(max_length: int = 64) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _byte_pairs(end="", prefix="Ġ")
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
