"""Hashes of content: equal for equal things, other ones for whatever makes a difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import attnsteer
from attnsteer.digests import picture_digest, tensor_digest, weights_of
from attnsteer.hosts.asking import _encoded
from attnsteer.processors.var import VAR
from tests.tiny import vlms


def test_digests_of_tensors_stay_what_stored_answers_have() -> None:
    assert tensor_digest(torch.arange(6.0).reshape(2, 3)) == "84c5528b38cba35b"
    assert tensor_digest(torch.tensor(3)) == "663640990f8e4e28"
    different = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), -torch.zeros(4)]
    assert len({tensor_digest(tensor) for tensor in different}) == 4
    assert tensor_digest(torch.arange(6.0).reshape(3, 2).T) == tensor_digest(torch.tensor([[0.0, 2, 4], [1, 3, 5]]))


def test_a_tower_is_shown_numbers_too() -> None:
    seen: list[dict[str, Any]] = []
    inner = SimpleNamespace(get_image_features=lambda **shown: seen.append(shown) or len(seen))
    kept: dict[Any, Any] = {}
    assert [_encoded(inner, {"size": torch.tensor(value)}, kept) for value in (3, 3, 4)] == [1, 1, 2]


def test_pictures_of_one_content_differ_by_their_palette() -> None:
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    other = picture.copy()
    other.putpalette([0, 0, 0, 0, 255, 0])
    assert picture_digest(picture) == picture_digest(picture.copy()) != picture_digest(other)
    grey = Image.new("L", (2, 2), 1)
    assert len({picture_digest(each) for each in (picture, grey, grey.resize((1, 4)), Image.new("L", (2, 2)))}) == 4


def test_writes_tell_of_values_beside_the_samples() -> None:
    model = torch.nn.Linear(50, 50)
    before = weights_of(model), weights_of(model, writes=True)
    with torch.no_grad():
        model.weight[0, 1] += 1
    assert weights_of(model) == before[0] and weights_of(model, writes=True) != before[1]


# ---- adapters --------------------------------------------------------------------------------------------------------
def adapted(kind: str = "lora") -> tuple[Any, Any]:
    """A tiny model whose embeddings are massive in channel 7, with an adapter."""
    peft = pytest.importorskip("peft")
    model, make = vlms.build("llava")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] = 30.0
    configs = {
        "lora": peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False),
        "ia3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    }
    model.add_adapter(configs[kind])
    return model.eval(), make


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_weights_know_whether_adapters_are_off(kind: str) -> None:
    model, _ = adapted(kind)
    before = weights_of(model)
    model.disable_adapters()
    off = weights_of(model)
    model.enable_adapters()
    assert weights_of(model) == before != off


def scaled(model: Any, scale: float) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = dict.fromkeys(module.scaling, scale)


@pytest.mark.parametrize("way", ["off", "scale"])
def test_massive_channels_are_measured_again_where_adapters_act_otherwise(way: str) -> None:
    model, make = adapted()
    var = VAR(tau=4.0, floor=0.0, rho=0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight[20] = 1000.0

    def channels() -> set[tuple[int, ...]]:
        with attnsteer.steer(model, var) as steering:
            model(**make(1))
            return {state["massive_channels"] for state in steering.states(var).values()}

    assert channels() == {(20,)}
    if way == "off":
        model.disable_adapters()
    else:
        scaled(model, 0.0)
    assert channels() == {(7,)}
