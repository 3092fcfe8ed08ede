"""Processors and oracles that the tests of the language model host share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnsteer import AttentionCall, Processor
from attnsteer.edits import Edit, KeyBias, Scale
from tests.tiny import vlms

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@dataclass(frozen=True)
class Look(Processor):
    see: Callable[[AttentionCall], Any] = print
    kinds = ("causal",)
    token_agnostic = False  # so that spans are provided

    def react(self, call: AttentionCall) -> Edit | None:
        self.see(call)
        return None


@dataclass(frozen=True)
class ScaleAll(Processor):
    factor: float = 2.0
    kinds = ("causal",)
    token_agnostic = True

    def plan(self, site: Any, heads: tuple[int, ...]) -> Edit | None:
        weight = torch.ones(1, site.heads)
        weight[:, list(heads)] = self.factor
        return Scale(weight)


@dataclass(frozen=True)
class BoostImage(Processor):
    """The logits of image keys plus ``bias``: needs the spans of every call."""

    bias: float = 1.0
    kinds = ("causal",)

    def react(self, call: AttentionCall) -> Edit | None:
        return KeyBias(self.bias * call.spans.image[:, None].float())


@contextmanager
def scaled(model: Any, factors: dict[str, Tensor]) -> Iterator[None]:
    """Manual oracle: each head's slice multiplied in front of the output projection; factors ``(B, H)``."""
    handles = []
    for name, factor in factors.items():

        def hook(module: Any, args: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
            x = args[0]
            per_row = factor.repeat_interleave(x.shape[0] // factor.shape[0], 0)
            return (x * per_row.repeat_interleave(x.shape[-1] // factor.shape[1], 1)[:, None],)

        handles.append(model.get_submodule(name).o_proj.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def factors_of(steering: Any, number: int = 0) -> dict[str, Tensor]:
    states = steering.states(steering.processors[number])
    return {site.name: state["factor"] for site, state in states.items()}


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything on a model that steering touches."""
    marks = [name for name, m in model.named_modules() if {"_steer", "_compiled_call_impl"} & set(m.__dict__)]
    hooks = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    methods = [model.__dict__.get(name) for name in ("generate", "get_compiled_call")]
    return marks, hooks, methods, model.training


def without_a_picture(inputs: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Two prompts of which the second has lost its picture; ``one`` holds the pixels of the first alone."""
    inputs["input_ids"][1].masked_fill_(inputs["input_ids"][1] == vlms.IMAGE, 11)
    for key in inputs:
        if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            inputs[key] = one[key]
        elif key.endswith("type_ids"):
            inputs[key][1] = 0
    return inputs
