"""Answers share one prefill where methods allow it, and are those of a batch in which nothing is shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attnsteer.compare import Answer, Answerer, Method, answering, with_controls
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
