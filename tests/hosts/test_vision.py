"""Pictures that stand in a batch several times are seen once, and everything behind the tower is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer.hosts.vision import seen_once
from tests.tiny import vlms

FAMILIES = ("llava", "llava_next", "qwen2", "qwen25", "qwen3", "internvl", "smolvlm", "gemma3", "paligemma")


def twice(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([value] * 2) for name, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_sees_each_picture_once(family: str) -> None:
    model, inputs = vlms.build(family)
    model.eval()
    given = twice(inputs(2))
    tower, rows = model.get_encoder(modality="image"), []
    handle = tower.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(next(v for v in (*args, *kwargs.values()) if v is not None).shape[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        plain = model(**given).logits
        with seen_once(model, 2):
            once = model(**given).logits
        again = model(**given).logits
    handle.remove()
    assert rows[1] * 2 == rows[0] == rows[2]
    torch.testing.assert_close(once, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(again, plain)


def test_other_pictures_pass_as_they_are() -> None:
    model, inputs = vlms.build("llava")
    model.eval()
    given = inputs(4)
    with torch.no_grad():
        plain = model(**given).logits
        with seen_once(model, 2):
            assert torch.equal(model(**given).logits, plain)
        with seen_once(model, 3):
            assert torch.equal(model(**given).logits, plain)


def test_the_tower_is_as_it_was_after_an_error() -> None:
    model, _ = vlms.build("llava")
    tower = model.get_encoder(modality="image")
    before = dict(tower.__dict__)
    inside = {}

    def fail() -> None:
        with seen_once(model, 2):
            inside.update(tower.__dict__)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert inside != before
    assert tower.__dict__ == before
