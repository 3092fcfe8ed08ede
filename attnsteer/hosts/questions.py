"""Where the user's question is in a prompt, found from its token ids.

    USER: <image><image>...\\nWhat is the dog doing? ASSISTANT:
    |___|                    |____________________| |________|
    header                   question               marker

``header`` and ``marker`` come from the chat template, rendered with a placeholder as the text of a user, so no family
has constants here. The question is the text of the last turn, from the header of that turn up to the last marker,
wherever the images stand in it; these with their wrappers, and blank and special tokens at its ends, are not part of
it. A header begins a turn where it is the first one, or a marker stands between it and the one before; elsewhere it is
a part of what the user wrote. Without a template (prompts typed by hand) the header is missing, the marker is a
parameter, and the question is what stands behind the last image.

Everything is compared by the bytes that tokens add to the text, never by token ids: " ASSISTANT:" has other ids inside
a prompt than alone, and subword vocabularies put spaces where the template has none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..site import Word
from ..spans import token_bytes
from .vlm_families import VisionTokens

_FIRST, _ANSWER, _SECOND = "attnsteer-first", "attnsteer-answer", "attnsteer-second"
_WORD = re.compile("x+(?:['\u2019-]x+)*")
"""A word where every letter, digit and accent is written as x; an apostrophe or hyphen may stand inside."""


@dataclass(frozen=True)
class Marks:
    """What stands around the text of a user: ``header`` right before it, ``markers`` behind it, the best one first."""

    header: str = ""
    markers: tuple[str, ...] = ()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a Hugging Face processor, or the tokenizer itself; None where there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if hasattr(tokenizer, "convert_ids_to_tokens") else None


def chat_marks(processor: Any, marker: str = "") -> Marks:
    """Header and markers of a processor's or tokenizer's chat template; ``marker``, where given, comes before them."""
    given = (marker,) if marker.strip() else ()
    for owner in (processor, getattr(processor, "tokenizer", None)):
        asks = _render(owner, [("user", _FIRST)], answer=True)
        if asks is None or asks.count(_FIRST) != 1:
            continue
        before, behind = asks.split(_FIRST)
        ends = _render(owner, [("user", _FIRST)], answer=False) or ""
        markers = [behind, *ends.split(_FIRST)[1:]]
        return Marks(_header(owner, before), (*given, *(m for m in markers if m.strip())))
    return Marks(markers=given)


def _header(owner: Any, before: str) -> str:
    """What the template puts before every text of a user, and not only before the first."""
    turns = [("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)]
    dialogue = _render(owner, turns, answer=True) or ""
    found = re.search(f"{_ANSWER}(.*){_SECOND}", dialogue, re.DOTALL)
    between, common = found[1] if found else "", 0
    while common < min(len(before), len(between)) and before[-1 - common] == between[-1 - common]:
        common += 1
    return before[len(before) - common :]


def _render(owner: Any, turns: Sequence[tuple[str, str]], answer: bool) -> str | None:
    """The template filled with a conversation; None where there is no template, or it does not take one."""
    if not getattr(owner, "chat_template", None):
        return None
    as_parts: list[dict[str, Any]] = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
    as_text: list[dict[str, Any]] = [{"role": r, "content": t} for r, t in turns]
    for conversation in (as_parts, as_text):
        try:
            rendered = owner.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer)
        except Exception:  # templates are programs of their authors and raise whatever they like
            continue
        if isinstance(rendered, str) and all(rendered.count(text) == 1 for _, text in turns):
            return rendered
    return None


# ---- one prompt ------------------------------------------------------------------------------------------------------
def find_question(
    pieces: Sequence[bytes], image: Sequence[bool], idle: Sequence[bool], marks: Marks
) -> tuple[int, int]:
    """The tokens ``[start, stop)`` of the question of one prompt, with any image inside; empty (start = stop) where
    there is none.

    Args:
        pieces: the bytes of every token; special tokens as they are written.
        image: tokens that belong to an image, wrappers included.
        idle: padding and special tokens, which cannot begin or end a question.
        marks: what stands around it.
    """
    text, ends, last = b"".join(pieces), _ends(pieces), len(pieces)
    begins = _turn_start(text, marks)
    if begins is None:
        start = 1 + max((i for i, is_image in enumerate(image) if is_image), default=-1)
    else:
        start = next((i for i, end in enumerate(ends) if end > begins), last)
    first_byte = ends[start - 1] if start else 0
    stop = last
    for marker in marks.markers:
        if places := [m.start() for m in _loosely(marker).finditer(text, first_byte)]:
            stop = next(i for i, end in enumerate(ends) if end > places[-1])
            break
    blank = [off or shown or not piece.strip() for off, shown, piece in zip(idle, image, pieces, strict=True)]
    while start < stop and blank[start]:
        start += 1
    while start < stop and blank[stop - 1]:
        stop -= 1
    return (start, stop) if start < stop else (0, 0)


def _turn_start(text: bytes, marks: Marks) -> int | None:
    """Where the last header ends that begins a turn; None where there is none."""
    if not marks.header.strip():
        return None
    markers, end = [_loosely(marker) for marker in marks.markers], None
    for header in _loosely(marks.header).finditer(text):
        if end is None or not markers or any(marker.search(text, end, header.end()) for marker in markers):
            end = header.end()
    return end


def words_of(pieces: Sequence[bytes], start: int, stop: int) -> tuple[Word, ...]:
    """The words that the tokens ``[start, stop)`` spell. A token that two words share belongs to both."""
    text = b"".join(pieces[start:stop]).decode("utf-8", "surrogateescape")  # half characters stay as many bytes
    ends, bytes_before = _ends(pieces[start:stop]), [0]
    for character in text:
        bytes_before.append(bytes_before[-1] + len(character.encode("utf-8", "surrogateescape")))
    found = []
    for match in _WORD.finditer("".join("x" if unicodedata.category(c)[0] in "LMN" else c for c in text)):
        begins, stops = bytes_before[match.start()], bytes_before[match.end()]
        first = next(i for i, end in enumerate(ends) if end > begins)
        last = next(i for i, end in enumerate(ends) if end >= stops)
        found.append(Word(text[match.start() : match.end()], start + first, start + last + 1))
    return tuple(found)


def _ends(pieces: Sequence[bytes]) -> list[int]:
    """For every token the number of bytes up to its end."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return ends[1:]


def _loosely(text: str) -> re.Pattern[bytes]:
    """The text with any space, or none, between its words and signs."""
    parts = re.findall(r"\w+|[^\w\s]+", text)
    return re.compile(rb"\s*".join(re.escape(part.encode()) for part in parts))


# ---- a batch ---------------------------------------------------------------------------------------------------------
class QuestionFinder:
    """``(ids, real) -> question tokens, words`` for prompts of one model; see ``KeySpans``.

    Args:
        tokens: which ids are image and wrappers.
        processor: the Hugging Face processor or tokenizer, or None: the question is then all that stands behind the
            last image, and its words are unknown.
        marker: the text that asks for the answer in prompts typed by hand.
    """

    def __init__(self, tokens: VisionTokens, processor: Any = None, marker: str = ""):
        self._tokens, self._tokenizer = tokens, tokenizer_of(processor)
        self._marks = Marks() if self._tokenizer is None else chat_marks(processor, marker)
        self._special = set(getattr(self._tokenizer, "all_special_ids", ()))

    def __call__(self, ids: Tensor, real: Tensor) -> tuple[Tensor, tuple[tuple[Word, ...], ...] | None]:
        """Bool ``(B, N)`` and the words of every row. Waits for the device: once a prompt."""
        image = self._tokens.image_mask(ids)
        image = image | self._tokens.wrapper_mask(ids) & image.any(dim=1, keepdim=True)
        rows = zip(ids.tolist(), self._pieces(ids), image.tolist(), real.tolist(), strict=True)
        found = [self._find(*row) for row in rows]
        places = torch.arange(ids.shape[1], device=ids.device)
        bounds = torch.tensor([bound for bound, _ in found], device=ids.device).reshape(-1, 2, 1)
        question = (places >= bounds[:, 0]) & (places < bounds[:, 1]) & real & ~image
        return question, None if self._tokenizer is None else tuple(words for _, words in found)

    def _pieces(self, ids: Tensor) -> list[list[bytes]]:
        if self._tokenizer is None:
            return [[b"?"] * ids.shape[1]] * ids.shape[0]
        pieces = token_bytes(self._tokenizer, ids.flatten().tolist())
        return [pieces[i : i + ids.shape[1]] for i in range(0, len(pieces), ids.shape[1])]

    def _find(
        self, ids: list[int], pieces: list[bytes], image: list[bool], real: list[bool]
    ) -> tuple[tuple[int, int], tuple[Word, ...]]:
        idle = [not seen or i in self._special for i, seen in zip(ids, real, strict=True)]
        bounds = find_question(pieces, image, idle, self._marks)
        spelled = [b" " if shown else piece for shown, piece in zip(image, pieces, strict=True)]
        return bounds, words_of(spelled, *bounds)
