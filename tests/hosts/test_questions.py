"""The user's question in a prompt: from the chat template, from prompts typed by hand, from ids alone."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer.hosts.questions import Marks, QuestionFinder, chat_marks, find_question, words_of
from attnsteer.hosts.vlm_families import VisionTokens
from attnsteer.world import assets, sampling
from tests.tiny import tokenizers

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_ONLY = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'].strip() }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(template: str) -> Any:
    """A byte-level tokenizer with a chat template and an image token."""
    tokenizer = tokenizers.qwen2()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = template
    return tokenizer


@cache
def world() -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(assets.path("models/world-llava"))
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")


def finder(tokenizer: Any, marker: str = "") -> QuestionFinder:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return QuestionFinder(VisionTokens((image,), ()), tokenizer, marker)


def asked(tokenizer: Any, prompt: str, marker: str = "") -> str:
    """The text of the question that is found in a prompt."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    found, _ = finder(tokenizer, marker)(ids, torch.ones_like(ids, dtype=torch.bool))
    return tokenizer.decode(ids[0][found[0]])


# ---- templates -------------------------------------------------------------------------------------------------------
def test_marks_come_from_the_template() -> None:
    marks = chat_marks(chat(CHATML))
    assert marks.header == "<|im_end|>\n<|im_start|>user\n"
    assert marks.markers == ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
    assert chat_marks(SimpleNamespace(tokenizer=chat(CHATML))) == marks
    assert chat_marks(chat(TEXT_ONLY)) == Marks("[user] ", (" [assistant]",))
    assert chat_marks(world()) == Marks("USER: ", (" ASSISTANT:",))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% for", "nothing of the conversation"])
def test_templates_that_say_nothing_leave_the_given_marker(template: str | None) -> None:
    assert chat_marks(chat(template), "ASSISTANT:") == Marks("", ("ASSISTANT:",))  # type: ignore[arg-type]
    assert chat_marks(None) == Marks()


# ---- prompts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("turns", "question"),
    [
        ([("user", ["<image>", "a red dog"])], "a red dog"),
        ([("user", ["<image>", "the cat", "<image>", "and the car?"])], "the catand the car?"),
        ([("user", ["<image>", "a dog"]), ("assistant", ["red"]), ("user", ["the blue car"])], "the blue car"),
        ([("user", ["the bird on grass"])], "the bird on grass"),
        ([("user", ["the bird", "<image>"])], "the bird"),
        ([("user", ["the bird", "<image>"]), ("assistant", ["red"]), ("user", ["a dog", "<image>"])], "a dog"),
        ([("user", ["<image>"])], ""),
    ],
)
def test_prompts_of_a_template(turns: list[tuple[str, list[str]]], question: str) -> None:
    tokenizer = chat(CHATML)
    messages = [
        {"role": role, "content": [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in parts]}
        for role, parts in turns
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked(tokenizer, prompt) == question
    unasked = tokenizer.apply_chat_template(messages, tokenize=False)
    assert asked(tokenizer, unasked) == question
    assert asked(tokenizer, prompt + "a dog on the") == question  # an answer that was begun


@pytest.mark.parametrize("space", ["", " ", "\n", " \n"])
def test_typed_prompts_lose_space_and_marker(space: str) -> None:
    tokenizer = chat(None)  # type: ignore[arg-type]
    prompt = f"USER: <image><image>{space}the red dog? ASSISTANT:"
    assert asked(tokenizer, prompt, "ASSISTANT:").strip() == "the red dog?"
    assert asked(tokenizer, prompt).strip() == "the red dog? ASSISTANT:"  # nobody said what the marker is


def test_bounds_by_hand() -> None:
    """Pieces that cross a border belong to the question; blank and special ones at its ends do not."""
    pieces = [b"<s>", b" USER", b":", b"<image>", b"\n", b" What", b" is", b" it", b"?", b" AS", b"SIST", b"ANT:"]
    image = [piece == b"<image>" for piece in pieces]
    idle = [piece == b"<s>" for piece in pieces]
    marks = Marks("USER: ", (" ASSISTANT:",))
    assert find_question(pieces, image, idle, marks) == (5, 9)
    assert find_question(pieces, image, idle, Marks()) == (5, 12)
    assert find_question(pieces[:4] + pieces[9:], image[:4] + image[9:], idle[:4] + idle[9:], marks) == (0, 0)
    pieces = [b"<s>", b"<image>", b"<s>", b"a", b"<s>"]
    idle = [piece == b"<s>" for piece in pieces]
    assert find_question(pieces, [piece == b"<image>" for piece in pieces], idle, Marks()) == (3, 4)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("USER: <image>\nWhat does the sign USER: mean? ASSISTANT:", "What does the sign USER: mean?"),
        ("USER: USER: is on the sign. <image> Why? ASSISTANT:", "USER: is on the sign. <image> Why?"),
        ("USER: <image> a dog? ASSISTANT: no USER: and USER: what? ASSISTANT:", "and USER: what?"),
        ("USER: <image> a dog? ASSISTANT: no USER: a cat?", "a cat?"),
        ("A USER asks. USER: What is this? <image> ASSISTANT:", "What is this?"),
        ("USER: What is in this <image> picture? ASSISTANT:", "What is in this <image> picture?"),
    ],
)
def test_a_turn_begins_at_its_header_alone(prompt: str, question: str) -> None:
    pieces = [piece.encode() for piece in re.findall(r"<image>|\s*\w+|\s*[^\w\s<]|\s", prompt)]
    image = [piece == b"<image>" for piece in pieces]
    start, stop = find_question(pieces, image, [False] * len(pieces), Marks("USER: ", (" ASSISTANT:",)))
    assert b"".join(pieces[start:stop]).decode().strip() == question


def test_images_inside_a_question_are_neither_tokens_nor_words_of_it() -> None:
    processor = world()
    prompt = "USER: Is the dog<image>in the car? ASSISTANT:"
    inputs = processor(text=[prompt], images=[sampling.sample(7).image()], return_tensors="pt")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    find = QuestionFinder(VisionTokens((image,), ()), processor)
    found, (words,) = find(inputs.input_ids, inputs.attention_mask.bool())
    assert not (found & (inputs.input_ids == image)).any()
    assert processor.tokenizer.decode(inputs.input_ids[found]).replace(" ", "") == "Isthedoginthecar?"
    assert [word.text for word in words] == ["Is", "the", "dog", "in", "the", "car"]


def test_words_know_their_tokens() -> None:
    pieces = [b"x", b" Is", b" Tim", b"'s dog-", b"house b", b"ig", b"?", " größer".encode(), b"!"]
    found = words_of(pieces, 1, 9)
    assert [tuple(word) for word in found] == [
        ("Is", 1, 2),
        ("Tim's", 2, 4),
        ("dog-house", 3, 5),
        ("big", 4, 6),
        ("größer", 7, 8),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Is “the” dog—or the cat—here?", ["Is", "the", "dog", "or", "the", "cat", "here"]),
        ("«Où» est l’été… là–bas", ["Où", "est", "l’été", "là", "bas"]),
        ("क्या यह हिन्दी है？", ["क्या", "यह", "हिन्दी", "है"]),
        ("几只狗？ 3°", ["几只狗", "3"]),
    ],
)
def test_quotes_and_dashes_of_any_script_part_words(text: str, words: list[str]) -> None:
    """Tokens of single bytes: most are halves of a character."""
    pieces = [bytes([byte]) for byte in b"x " + text.encode() + b"\xe2\x80"]
    found = words_of(pieces, 2, len(pieces))
    assert [word.text for word in found] == words
    assert [b"".join(pieces[word.start : word.stop]).decode() for word in found] == words


# ---- batches ---------------------------------------------------------------------------------------------------------
def _batch() -> tuple[Any, Tensor, list[str]]:
    """Left-padded prompts of world-llava: of its template, typed, and without a picture."""
    processor = world()
    questions = ["Is there a dog in the image?", "Please describe this image in detail.", "How many dogs?"]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0]}]}]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True)]
    prompts += [f"USER: <image>\n{questions[1]} ASSISTANT:", f"USER: {questions[2]} ASSISTANT:"]
    pictures = [sampling.sample(7).image()] * 2
    return processor, processor(images=pictures, text=prompts, padding=True, return_tensors="pt"), questions


def test_rows_of_a_batch_have_their_own_questions() -> None:
    processor, inputs, questions = _batch()
    ids, real = inputs.input_ids, inputs.attention_mask.bool()
    assert not real.all()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    find = QuestionFinder(VisionTokens((image,), ()), processor)
    found, words = find(ids, real)
    assert [
        processor.tokenizer.decode(row[chosen]).strip() for row, chosen in zip(ids, found, strict=True)
    ] == questions
    assert words is not None
    assert [[word.text for word in row] for row in words] == [q.rstrip("?.").split() for q in questions]
    for row in range(3):
        alone = ids[row][real[row]][None]
        single, _ = find(alone, torch.ones_like(alone, dtype=torch.bool))
        assert torch.equal(single[0], found[row][real[row]])


def test_without_a_tokenizer_the_question_is_what_stands_behind_the_image() -> None:
    ids = torch.tensor([[0, 1, 9, 9, 5, 6], [1, 9, 9, 5, 0, 0], [0, 0, 1, 2, 3, 4]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    found, words = QuestionFinder(VisionTokens((9,), (5,)))(ids, real)
    assert words is None
    assert found.int().tolist() == [[0, 0, 0, 0, 0, 1], [0] * 6, [0, 0, 1, 1, 1, 1]]
