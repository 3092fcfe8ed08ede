"""Questions about pictures as the inputs of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_TEMPLATE = "USER: {image}\n{question} ASSISTANT:"
"""For processors without a chat template: LLaVA-1.5's format."""


def question_inputs(processor: Any, pictures: Sequence[Any], questions: Sequence[str]) -> Any:
    """The chat prompts of one question about each picture, as tensors, padded at their beginning.

    Args:
        processor: the Hugging Face processor of the model, with a chat template where the model has one.
        pictures: PIL pictures; questions: as many.
    """
    with _padded_left(processor):
        if getattr(processor, "chat_template", None):
            chats = [
                [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": question}]}]
                for p, question in zip(pictures, questions, strict=True)
            ]
            return processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        mark = getattr(processor, "image_token", "<image>")
        prompts = [PLAIN_TEMPLATE.format(image=mark, question=question) for question in questions]
        return processor(text=prompts, images=list(pictures), return_tensors="pt", padding=True)


@contextmanager
def _padded_left(processor: Any) -> Iterator[None]:
    """Answers follow their prompts: padding between them would be part of the prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    before = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = before
