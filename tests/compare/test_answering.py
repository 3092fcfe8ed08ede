"""Answers share one prefill where methods allow it, and are those of a batch in which nothing is shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer.compare import Answer, Answerer, Method, answering, with_controls
from attnsteer.errors import SteeringError
from attnsteer.processors import GIFT, PAI, PAINT, VAF, VCD, VHR

from .common import TOKENS, answerer, tasks

SHARING = [Method("PAI", (PAI(alpha=0.9),)), Method("GIFT", (GIFT(),)), Method("PAINT", (PAINT(alpha=0.5),))]
OWN = [
    Method("VHR", (VHR(alpha=4.0),)),
    Method("VAF", (VAF(),)),
    Method("VCD", (VCD(),)),
    Method("both", (PAINT(beta=1.0), VHR())),
]
METHODS = with_controls([*SHARING, *OWN], ["all-heads"])


def ask(count: int = 3) -> list[list[Answer]]:
    return answerer()(tasks()[0].samples[:count], METHODS, TOKENS)


@contextmanager
def shapes(module: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the first input in every call of a module."""
    found: list[tuple[int, ...]] = []

    def note(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(tuple(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def test_answers_are_those_of_an_unshared_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ask()
    monkeypatch.setattr(Answerer, "_from_one_prefill", lambda *given: {})
    assert shared == ask()
    assert len({tuple(answers) for answers in shared}) > 2  # the methods do say different things


def test_a_cache_that_the_models_generation_config_names_is_left_out_where_a_prefill_is_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = ask()
    monkeypatch.setattr(answerer().model.generation_config, "cache_implementation", "static")
    assert ask() == plain


def test_long_answers_share_no_prefill_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SHORT", TOKENS - 1)
    shared = []
    plain = answering.prefill
    monkeypatch.setattr(answering, "prefill", lambda *given, **inputs: shared.append(1) or plain(*given, **inputs))
    ask()
    assert shared == [1]  # on a CPU they do
    monkeypatch.setattr(type(answerer().model), "device", SimpleNamespace(type="cuda"))
    assert answerer()._from_one_prefill(METHODS, {}, TOKENS) == {}


def test_a_prompt_that_has_no_prefill_to_share_is_run_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ask()

    def refuse(*given: Any, **inputs: Any) -> None:
        raise SteeringError("Rows of this prompt see its last token.")

    monkeypatch.setattr(answering, "prefill", refuse)
    assert ask() == plain


def test_a_prompt_is_run_once_for_all_that_share_it() -> None:
    sharing = [method for method in METHODS if not any(map(answering.refusals, method.processors))]
    assert len(sharing) == 1 + 2 * len(SHARING)  # the plain model, the methods and their controls
    others = 3 * (len(METHODS) - len(sharing))
    with shapes(answerer().model.get_decoder().layers[0]) as rows:
        ask()
    prompts = [batch for batch, length, *_ in rows if length > 1]
    assert prompts == [3, 2 * others, others, 3]  # shared; VHR's reference pass; the others; what VCD compares with


def test_the_tower_sees_a_picture_again_only_where_its_attention_is_read() -> None:
    samples = tasks()[0].samples[:3]
    with shapes(answerer().model.get_encoder(modality="image")) as pictures:
        answerer()(samples, [METHODS[0], *SHARING, *OWN[:2]], TOKENS)
        assert [shape[0] for shape in pictures] == [3]
        answerer()(samples, [METHODS[0], *SHARING, OWN[-1]], TOKENS)
    assert [shape[0] for shape in pictures[1:]] == [3, 3, 3]  # shared; VHR's reference pass; the prompt itself
