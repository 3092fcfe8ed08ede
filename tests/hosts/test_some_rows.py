"""Passes beside the generation read the rows that ask, and every row gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer.hosts.some_rows import rows_of, some_rows, variants_with
from attnsteer.processors import GIFT, PAI, PAINT, VAR, VHR
from attnsteer.scheduler import make_plan
from tests.tiny import vlms

from .common import GREEDY

SHARED = PAI(alpha=0.5)
BATCHES: dict[str, list[list[attnsteer.Processor]]] = {
    "one asks for the image-free pass": [[], [VHR()], [SHARED]],
    "one asks for a survey": [[GIFT(token_selector="all")], [], []],
    "each another": [[VHR()], [GIFT(token_selector="all", alpha=3.0)], []],
    "equal surveys": [[], [GIFT(token_selector="all", alpha=3.0)], [GIFT(token_selector="all", alpha=1.0)]],
    "a plan of two variants": [[], [SHARED], [SHARED, VHR()]],
    "strengths that are asked together": [[PAI(alpha=0.2)], [PAI(alpha=0.9), VHR()], []],
    "a tower that is read": [[PAINT()], [], [VHR()]],
}


def generated(model: Any, given: dict[str, Any], batch: list[list[attnsteer.Processor]]) -> torch.Tensor:
    """The logits of every new token, ``(B, T, V)``."""
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with attnsteer.attach(model, variants=batch):
        return torch.stack(model.generate(**given, **options).logits, 1)


def repeated(given: dict[str, Any], times: int) -> dict[str, Any]:
    return {name: torch.cat([value] * times) for name, value in given.items()}


@pytest.mark.parametrize("name", ["llava", "qwen25", "llava_next", "gemma3"])
@pytest.mark.parametrize("case", [case for case in BATCHES if "tower" not in case])
def test_every_variant_is_what_it_is_alone(case: str, name: str) -> None:
    model, make = vlms.build(name)
    given = make(2, left_padding=True)
    together = generated(model, repeated(given, 3), BATCHES[case]).unflatten(0, (3, 2))
    for found, variant in zip(together, BATCHES[case], strict=True):
        torch.testing.assert_close(found, generated(model, given, [variant]), rtol=1e-4, atol=1e-4)


def test_a_variant_beside_one_that_reads_the_tower_is_what_it_is_alone() -> None:
    model, make = vlms.build("llava")
    given, batch = make(2), BATCHES["a tower that is read"]
    together = generated(model, repeated(given, 3), batch).unflatten(0, (3, 2))
    for found, variant in zip(together, batch, strict=True):
        torch.testing.assert_close(found, generated(model, given, [variant]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        ("one asks for the image-free pass", [4, 6]),
        ("one asks for a survey", [2, 6]),
        ("each another", [2, 4, 6]),
        ("equal surveys", [4, 6]),
        ("a plan of two variants", [8, 6]),
        ("strengths that are asked together", [8, 6]),
        ("a tower that is read", [12, 6]),
    ],
)
def test_a_pass_has_the_rows_that_ask(case: str, passes: list[int]) -> None:
    model, make = vlms.build("llava")
    rows: list[int] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: rows.append((args[0] if args else kwargs["hidden_states"]).shape[0]),
            with_kwargs=True,
        )
    )
    generated(model, repeated(make(2), 3), BATCHES[case])
    handle.remove()
    assert rows == passes + [6] * (GREEDY["max_new_tokens"] - 1)


def test_what_is_left_of_rows_that_did_not_ask_is_zero() -> None:
    model, make = vlms.build("llava")
    given, reader, method = repeated(make(2), 2), GIFT(token_selector="all"), VHR()
    with attnsteer.attach(model, variants=[[reader], [method]]) as steering:
        model.generate(**given, **GREEDY)
        saliency = next(plan.shared["saliency"] for plan in steering.plans if plan.processor is reader)
        divergences = [state["vhd"] for state in steering.states(method).values()]
    with attnsteer.attach(model, method) as steering:
        model.generate(**make(2), **GREEDY)
        alone = [state["vhd"] for state in steering.states(method).values()]
    assert saliency[:2].any(1).all()
    assert not saliency[2:].any()
    for found, wanted in zip(divergences, alone, strict=True):
        assert not found[:2].any()
        torch.testing.assert_close(found[2:], wanted, rtol=1e-4, atol=1e-5)


def test_variants_that_share_a_plan_with_one_that_asks_ask_too() -> None:
    model, _ = vlms.build("llava")
    one, two, three, four = (make_plan(p, attnsteer.sites(model)) for p in (VHR(), SHARED, PAI(), VAR(channels=(0,))))
    assert variants_with(((), (one,), (four,)), [one]) == (False, True, False)
    assert variants_with(((two,), (one, two), (four,)), [one]) == (True, True, False)
    assert variants_with(((three,), (one, two), (four,)), [one]) == (True, True, False)  # PAIs are asked together
    assert variants_with(((four,), (two, four), (one, two)), [one]) == (True, True, True)


def test_rows_come_back_to_their_places() -> None:
    ids = torch.arange(12).view(6, 2)
    inputs = {"input_ids": ids, "pixel_values": torch.arange(6.0)[:, None], "none": None}
    some = some_rows(inputs, [False, True, True], torch.ones(6, dtype=torch.bool))
    assert some is not None
    assert torch.equal(some.inputs["input_ids"], ids[2:])
    assert torch.equal(some.inputs["pixel_values"], torch.arange(2.0, 6.0)[:, None])
    found = some.whole({"a": torch.arange(4), "b": [torch.eye(4)], "c": 7})
    assert found["a"].tolist() == [0, 0, 0, 1, 2, 3]
    assert torch.equal(found["b"][0], torch.cat([torch.zeros(2, 4), torch.eye(4)]))
    assert found["c"] == 7
    assert some_rows(inputs, [True, True, True], torch.ones(6, dtype=torch.bool)) is None
    assert some_rows({**inputs, "pixel_values": torch.zeros(5, 1)}, [True, False], torch.ones(6).bool()) is None


def test_rows_without_a_picture_bring_none() -> None:
    inputs = {"input_ids": torch.zeros(3, 4), "pixel_values": torch.arange(2.0)[:, None]}
    has_image = torch.tensor([True, False, True])
    taken = rows_of(inputs, torch.tensor([1, 2]), has_image)
    assert taken is not None
    assert taken["pixel_values"].tolist() == [[1.0]]
    alone = rows_of(inputs, torch.tensor([1]), has_image)
    assert alone is not None
    assert alone["pixel_values"] is None
