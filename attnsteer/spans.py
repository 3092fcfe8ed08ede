"""Where things are in a token sequence: the image, the text, the words that the user names.

``KeySpans`` follows the key sequence of a language model through prefill, decode and every kind of cache.
``find_words`` finds words in token ids from the tokens' own bytes, for any tokenizer, without the original text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import SteeringError
from .site import Reading, Spans, Word

Questions = Callable[[Tensor, Tensor], "tuple[Tensor, tuple[tuple[Word, ...], ...] | None]"]
"""``(ids, real tokens) -> question tokens (B, N), words of each row's question``."""


class KeySpans:
    """The image, text and question tokens among the keys of each attention call of a language model.

    Keys do not simply grow: a static cache has empty slots at the end, and a layer with a sliding window loses its
    oldest keys in decode. The cache knows (``get_mask_sizes``), so it is asked before each forward pass.

    Args:
        image_mask: ``ids -> bool`` of the same shape, True at image tokens.
        questions: ``(ids, real) -> bool (B, N), words``: the user's question in each prompt, where somebody needs it.
    """

    def __init__(self, image_mask: Callable[[Tensor], Tensor], questions: Questions | None = None):
        self._image_mask, self._questions = image_mask, questions
        self._question: Tensor | None = None  # (B, tokens of the prompt)
        self._words: tuple[tuple[Word, ...], ...] | None = None
        self._image: Tensor | None = None  # (B, tokens so far)
        self._real: Tensor | None = None  # the same without padding
        self._fresh = 0  # tokens of the forward pass in progress
        self._made: dict[tuple[int, int, int], Spans] = {}

    def begin(self, ids: Tensor | None, mask: Tensor | None) -> None:
        """A new prompt ``(B, N)`` with its padding mask.

        Raises:
            SteeringError: where there are no ids to look at.
        """
        if ids is None:
            raise SteeringError(
                "Image tokens are found by their ids: call the model with input_ids, not inputs_embeds."
            )
        self._image = self._image_mask(ids)
        self._real = torch.ones_like(self._image)
        if mask is not None and mask.shape == ids.shape:
            self._real = mask.bool()
        if self._questions is not None:
            self._question, self._words = self._questions(ids, self._real)

    def of(self, ids: Tensor, mask: Tensor | None) -> KeySpans:
        """The spans of another prompt."""
        other = KeySpans(self._image_mask, self._questions)
        other.begin(ids, mask)
        return other

    @property
    def has_image(self) -> Tensor:
        """Bool ``(B,)``."""
        assert self._image is not None
        return self._image.any(1)

    def follow(self, ids: Tensor, seen: int) -> int:
        """Take the tokens of the next forward pass along, of which the cache holds ``seen`` before; gives the total."""
        assert self._image is not None and self._real is not None
        total = seen + ids.shape[1]
        if ids.shape[0] != self._image.shape[0]:  # beams repeat each prompt
            times = ids.shape[0] // self._image.shape[0]
            self._image = self._image.repeat_interleave(times, dim=0)
            self._real = self._real.repeat_interleave(times, dim=0)
            self._question = None if self._question is None else self._question.repeat_interleave(times, dim=0)
        fresh = total - self._image.shape[1]
        if fresh > 0:
            self._image = torch.cat([self._image, self._image_mask(ids[:, -fresh:])], dim=1)
            self._real = torch.cat([self._real, torch.ones_like(ids[:, -fresh:], dtype=torch.bool)], dim=1)
        self._made, self._fresh = {}, ids.shape[1]
        return total

    def window(self, offset: int, length: int, total: int) -> Spans:
        """The spans of ``length`` keys from position ``offset`` on, where ``total`` tokens exist after this pass."""
        assert self._image is not None and self._real is not None
        key = (offset, length, total)
        if key not in self._made:
            spans = spans_of(self._image, self._real, (offset, length), (total - self._fresh, total))
            self._made[key] = replace(spans, **self._asked(offset, length, min(offset + length, total)))
        return self._made[key]

    def _asked(self, offset: int, length: int, stop: int) -> dict[str, Any]:
        """The question among ``length`` keys from ``offset`` on; what is generated belongs to no question."""
        if self._question is None:
            return {}
        question = self._question[:, offset:stop]
        question = torch.nn.functional.pad(question, (0, length - question.shape[1]))
        places = torch.arange(offset, offset + length, device=question.device)
        return {"question": question, "words": self._words, "places": places}


def spans_of(
    image: Tensor, real: Tensor, keys: tuple[int, int] | None = None, queries: tuple[int, int] | None = None
) -> Spans:
    """The spans of one forward pass of a language model.

    Args:
        image, real: ``(B, N)`` bool: the image tokens of the whole prompt, and the tokens that are no padding.
        keys: position of the first key and the number of keys, empty slots included; None: all N tokens.
        queries: positions of the first query and behind the last one; None: all N tokens.
    """
    offset, length = (0, image.shape[1]) if keys is None else keys
    first, total = (0, image.shape[1]) if queries is None else queries
    stop = min(offset + length, total)

    def window(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, offset:stop], (0, offset + length - stop))

    place = torch.arange(max(image.shape[1], total, offset + length), device=image.device)
    count = image.long().cumsum(1)  # image tokens up to and with each one
    last = torch.where(image, place[: image.shape[1]], -1).amax(1, keepdim=True)  # (B, 1), -1 without image
    reading = Reading(
        queries=place[first:total],
        keys=place[offset : offset + length],
        before_image=window(real & (count == 0) & (last >= 0)),
        after_image=(place[first:total] > last) & (last >= 0),
        image_index=window(count - image.long()),
    )
    there = window(image)
    return Spans(there, window(real) & ~there, reading=reading)


# ---- words -----------------------------------------------------------------------------------------------------------
def find_words(tokenizer: Any, ids: Tensor, words: str | Sequence[str]) -> Tensor:
    """The tokens that spell one of the words (or phrases) anywhere in the sequence.

    Args:
        tokenizer: anything with ``convert_ids_to_tokens``: CLIP, T5, Llama, Qwen, Gemma, ...; a processor with a
            ``tokenizer`` inside will do.
        ids: ``(N,)`` or ``(B, N)``.
        words: matched as whole words, upper or lower case; a word may be split into several tokens.

    Returns:
        Bool of the shape of ``ids``. All False where no word occurs: the caller knows whether that is an error.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    wanted = [words] if isinstance(words, str) else list(words)
    if not wanted or not all(word.strip() for word in wanted):
        raise SteeringError(f"words={words!r} names no word: give a word, a phrase or a list of them.")
    rows = ids.reshape(-1, ids.shape[-1]) if ids.dim() else ids.reshape(1, 1)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = [_spelled(token_bytes(tokenizer, row, special), wanted) for row in rows.tolist()]
    return torch.tensor(found, dtype=torch.bool, device=ids.device).reshape(ids.shape)


def find_each(tokenizer: Any, ids: Sequence[int], word: str) -> list[tuple[int, ...]]:
    """The tokens of every occurrence of a word or phrase in a sequence, one tuple of positions for each.

    Matched as ``find_words`` does.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return _occurrences(token_bytes(tokenizer, ids, set(getattr(tokenizer, "all_special_ids", ()))), word)


def _spelled(pieces: Sequence[bytes], words: Iterable[str]) -> list[bool]:
    found = {i for word in words for occurrence in _occurrences(pieces, word) for i in occurrence}
    return [i in found for i in range(len(pieces))]


def _occurrences(pieces: Sequence[bytes], word: str) -> list[tuple[int, ...]]:
    text = b"".join(pieces)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    parts = re.findall(r"\w+|[^\w\s]+", word)  # CLIP puts spaces around the hyphen of "red-framed"
    body = rb"\s*".join(re.escape(part.encode()) for part in parts)
    before, after = (rb"(?<![0-9A-Za-z])", rb"(?![0-9A-Za-z])")  # a CJK neighbour does not continue a word
    found = []
    for match in re.finditer(before + body + after, text, re.IGNORECASE):
        inside = [i for i in range(len(pieces)) if starts[i] < match.end() and starts[i + 1] > match.start()]
        spelled = [i for i in inside if text[max(starts[i], match.start()) : min(starts[i + 1], match.end())].strip()]
        if spelled:
            found.append(tuple(spelled))
    return found


def token_bytes(tokenizer: Any, ids: Sequence[int], special: Iterable[int] = ()) -> list[bytes]:
    """The UTF-8 bytes that each token adds to the text; a space stands where a special token is.

    Four spellings of subwords are in use: byte-level (``Ġdog``, each character stands for one byte), SentencePiece
    (``▁dog``, ``<0x0A>``), CLIP (``dog</w>``) and WordPiece (``##s``).
    """
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    skip = set(special)
    vocabulary = _spelling(tokenizer)
    return [b" " if i in skip or t is None else _bytes(t, vocabulary) for i, t in zip(ids, tokens, strict=True)]


def _spelling(tokenizer: Any) -> str:
    """The spelling whose mark is on most tokens: large vocabularies hold each other's marks as ordinary characters."""
    vocab: Mapping[str, int] = tokenizer.get_vocab()
    marked = {
        "sentencepiece": sum(token.startswith("▁") for token in vocab),
        "clip": sum(token.endswith("</w>") for token in vocab),
        "byte-level": sum(token.startswith("Ġ") for token in vocab),
        "wordpiece": sum(token.startswith("##") for token in vocab),
    }
    return max(marked, key=lambda name: marked[name])


def _bytes(token: str, spelling: str) -> bytes:
    if spelling == "wordpiece":
        return token[2:].encode() if token.startswith("##") else b" " + token.encode()
    if spelling == "sentencepiece":
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()
    end = b" " if spelling == "clip" and token.endswith("</w>") else b""
    body = token.removesuffix("</w>") if end else token
    table = _byte_of()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in body) + end


@functools.cache
def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes for 256, 257, ... in
    order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(hidden)}}
