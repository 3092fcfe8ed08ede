"""The prompt of a question about a picture, as the model's own processor writes it."""

from __future__ import annotations

from typing import Any


def question_inputs(processor: Any, pictures: list[Any], question: str) -> Any:
    """The chat prompts of one question about each picture, as tensors."""
    if getattr(processor, "chat_template", None):
        text = {"type": "text", "text": question}
        chats = [[{"role": "user", "content": [{"type": "image", "image": p}, text]}] for p in pictures]
        return processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
    prompt = f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"
    return processor(text=[prompt] * len(pictures), images=pictures, return_tensors="pt", padding=True)
