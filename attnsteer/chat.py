"""Questions about pictures as the inputs of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import SteeringError

PLAIN_TEMPLATE = "USER: {image}\n{question} ASSISTANT:"
"""For processors without a chat template: LLaVA-1.5's format."""


def question_inputs(
    processor: Any, pictures: Sequence[Any], questions: Sequence[str], template: str | None = None
) -> Any:
    """The prompts of one question each, pictures first, as tensors. Several are padded at their beginning.

    Args:
        processor: the Hugging Face processor of the model, with a chat template where the model has one.
        pictures: for each question a PIL picture, or a list or tuple of them.
        questions: as many.
        template: a prompt typed by hand with ``{question}`` and the processor's image token (or ``{image}``) in it,
            which is repeated for each picture; None uses the processor's chat template.

    Raises:
        SteeringError: a template without these two.
    """
    shown = [list(each) if isinstance(each, (list, tuple)) else [each] for each in pictures]
    asked = list(zip(shown, questions, strict=True))
    with _padded_left(processor, len(asked)) as padding:
        if template is None and getattr(processor, "chat_template", None):
            return processor.apply_chat_template(
                [_chat(*one) for one in asked],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **padding,
            )
        texts = [_typed(processor, len(each), question, template) for each, question in asked]
        return processor(text=texts, images=shown, return_tensors="pt", **padding)


def _chat(pictures: Sequence[Any], question: str) -> list[dict[str, Any]]:
    """One turn of a user, as chat templates take it."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _typed(processor: Any, count: int, question: str, template: str | None) -> str:
    """A template typed by hand, filled in, with the image token as often as there are pictures."""
    token = str(getattr(processor, "image_token", "<image>"))
    text = (PLAIN_TEMPLATE if template is None else template).replace("{image}", token)
    if text.count(token) != 1 or "{question}" not in text:
        raise SteeringError(
            f"template={template!r} needs {{question}} and, once, the image token {token!r} of this processor."
        )
    return text.replace(token, token * count).replace("{question}", question)


@contextmanager
def _padded_left(processor: Any, rows: int) -> Iterator[dict[str, Any]]:
    """What a processor must be told to pad rows, and on which side inside: answers follow their prompts, and padding
    between them would be part of the prompt. One row needs none, which tokenizers without a pad token cannot give."""
    if rows == 1:
        yield {}
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    before = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield {"padding": True}
    finally:
        tokenizer.padding_side = before
