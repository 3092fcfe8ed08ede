"""Words in token ids, and the spans of keys under every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import SteeringError
from attnsteer.spans import KeySpans, find_words, token_bytes
from tests.tiny import tokenizers

MAKERS = {"clip": tokenizers.clip, "t5": tokenizers.t5, "qwen2": tokenizers.qwen2}


def _found(tokenizer: Any, text: str, words: str | list[str]) -> str:
    """What the found tokens spell together, without spaces."""
    ids = torch.tensor(tokenizer(text).input_ids)
    pieces = token_bytes(tokenizer, ids.tolist(), tokenizer.all_special_ids)
    hit = find_words(tokenizer, ids, words).tolist()
    return "|".join(b"".join(p for p, h in zip(pieces, hit, strict=True) if h).decode().lower().split())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a photo of a dog and a cat", "dog", "dog"),
        ("a photo of a dog and a cat", ["cat", "dog"], "dog|cat"),
        ("a dog on the grass and a dog", "dog", "dog|dog"),
        ("the zebra and a dog", "zebra", "zebra"),  # several tokens
        ("a Dog, a cat.", "dog", "dog"),
        ("a dog", "DOG", "dog"),
        ("hotdog and dogma", "dog", ""),  # whole words only
        ("a red car and a blue bird", "blue bird", "blue|bird"),
        ("a red car and a blue bird", "red bird", ""),
        ("dog", "dog", "dog"),
        ("a dog", "horse", ""),
    ],
)
def test_words_are_found_in_every_spelling_of_subwords(name: str, text: str, words: Any, expected: str) -> None:
    found = _found(MAKERS[name](), text, words)
    assert found.rstrip(",.") == expected


@pytest.mark.parametrize("name", MAKERS)
def test_neighbours_are_not_part_of_a_word(name: str) -> None:
    tokenizer = MAKERS[name]()
    ids = torch.tensor(tokenizer("a red dog and a car").input_ids)
    hit = find_words(tokenizer, ids, "dog")
    assert int(hit.sum()) == 1
    assert b"dog" in b"".join(token_bytes(tokenizer, ids[hit].tolist()))


def test_rows_of_a_padded_batch_are_looked_up_one_by_one() -> None:
    tokenizer = tokenizers.clip()
    ids = tokenizer(["a dog", "the bird and the dog"], padding=True, return_tensors="pt").input_ids
    hit = find_words(tokenizer, ids, "dog")
    assert hit.shape == ids.shape
    assert hit.dtype == torch.bool
    assert hit.int().argmax(1).tolist() == [2, 5]
    assert hit.sum(1).tolist() == [1, 1]


def test_a_processor_brings_its_tokenizer() -> None:
    class Processor:
        tokenizer = tokenizers.qwen2()

    ids = torch.tensor(Processor.tokenizer("a dog").input_ids)
    assert torch.equal(find_words(Processor(), ids, "dog"), find_words(Processor.tokenizer, ids, "dog"))


class _Spelled:
    """A tokenizer of which only the tokens matter."""

    def __init__(self, *tokens: str):
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]


@pytest.mark.parametrize(
    ("tokens", "word", "expected"),
    [
        (("a", "zeb", "##ra", "dog"), "zebra", [0, 1, 1, 0]),  # WordPiece
        (("▁a", "▁ze", "bra", "s"), "zebra", [0, 0, 0, 0]),
        (("▁na", "<0xC3>", "<0xAF>", "ve", "▁dog"), "naïve", [1, 1, 1, 1, 0]),  # byte fallback
        (("Ġna", "Ã", "¯", "ve"), "naïve", [1, 1, 1, 1]),  # byte-level, one token per byte
        (("▁", "dog", "▁", "cat"), "dog", [0, 1, 0, 0]),  # the space of its own is not the word
        (("▁一", "只", "狗", "和"), "狗", [0, 0, 1, 0]),  # no spaces between words
    ],
)
def test_subwords_by_hand(tokens: tuple[str, ...], word: str, expected: list[int]) -> None:
    assert find_words(_Spelled(*tokens), torch.arange(len(tokens)), word).int().tolist() == expected


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("word", ["red-framed", "red-framed dog", "red - framed"])
def test_words_with_a_hyphen(name: str, word: str) -> None:
    """CLIP's text has spaces around a hyphen, the others' have none."""
    found = _found(MAKERS[name](), "a red-framed dog and a red dog", word)
    assert found.replace("|", "") == word.replace(" ", "")


@pytest.mark.parametrize("nothing", ["", "  ", [], ["dog", ""]])
def test_no_word_is_an_error(nothing: Any) -> None:
    with pytest.raises(SteeringError, match="names no word"):
        find_words(tokenizers.clip(), torch.tensor([1, 2]), nothing)


# ---- key spans -------------------------------------------------------------------------------------------------------
def test_key_spans_by_hand() -> None:
    """Two rows, the second with one token of padding; ids from 100 on are image."""
    spans = KeySpans(lambda ids: ids >= 100)
    ids = torch.tensor([[1, 100, 101, 2], [0, 3, 102, 4]])
    spans.begin(ids, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
    assert spans.follow(ids, 0) == 4
    whole = spans.window(0, 4, 4)
    assert whole.image.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert whole.text.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    static = spans.window(0, 6, 4)  # two empty slots
    assert static.image.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert static.text.int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert spans.follow(torch.tensor([[5], [6]]), 4) == 5
    window = spans.window(2, 3, 5)  # a sliding window of 3
    assert window.image.int().tolist() == [[1, 0, 0], [1, 0, 0]]
    assert window.text.int().tolist() == [[0, 1, 1], [0, 1, 1]]
    assert spans.follow(torch.tensor([[7], [7], [8], [8]]), 5) == 6  # two beams for each prompt
    assert spans.window(0, 6, 6).image.int().tolist() == [[0, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 0, 0, 0]] * 2


def test_tokens_of_a_later_chunk_are_looked_at_too() -> None:
    spans = KeySpans(lambda ids: ids >= 100)
    first, second = torch.tensor([[1, 2]]), torch.tensor([[100, 3]])
    spans.begin(first, None)
    spans.follow(first, 0)
    spans.follow(second, 2)
    assert spans.window(0, 4, 4).image.tolist() == [[False, False, True, False]]


def test_spans_need_ids() -> None:
    with pytest.raises(SteeringError, match="input_ids"):
        KeySpans(lambda ids: ids >= 100).begin(None, None)
