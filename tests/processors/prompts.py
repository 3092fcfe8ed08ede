"""Attention calls of a decoder over a prompt with an image, for the methods that edit language models."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from attnsteer import Processor
from attnsteer.attend import attend
from attnsteer.site import AttentionCall
from attnsteer.spans import spans_of
from tests.calls import call_of

BEFORE, IMAGE, AFTER = 3, 7, 5
N = BEFORE + IMAGE + AFTER
PADS = (0, 2, 4)
"""Left padding of the three rows; the image follows 3 tokens behind it."""
WIDTH = 16


def image_and_real() -> tuple[Tensor, Tensor]:
    """``(3, N)``: rows with more padding have a shorter question."""
    place, pad = torch.arange(N), torch.tensor(PADS)[:, None]
    image = (place >= pad + BEFORE) & (place < pad + BEFORE + IMAGE)
    return image, place >= pad


def causal_mask(real: Tensor) -> Tensor:
    """Bool ``(B, 1, N, N)``; padding sees itself alone."""
    order = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    own = torch.eye(real.shape[1], dtype=torch.bool)
    return torch.where(real[:, :, None], order & real[:, None], own)[:, None]


def prompt_call(dtype: torch.dtype = torch.float64, prefix: bool = False) -> AttentionCall:
    """A left-padded prompt of three rows with grouped heads; ``prefix``: all tokens see each other."""
    image, real = image_and_real()
    q, k, v = (torch.randn(3, heads, N, 8, dtype=dtype) for heads in (4, 2, 2))
    mask = causal_mask(real)
    mask = mask | real[:, None, None, :] if prefix else mask
    call = call_of(q, k, v, mask, False, "causal", spans_of(image, real))
    call.phase = "prefill"
    call.residual = torch.randn(3, N, WIDTH)
    return call


def parts_of(call: AttentionCall, start: int, stop: int, phase: Any, state: dict[str, Any]) -> AttentionCall:
    """The queries from ``start`` to ``stop`` as a forward pass of their own, the keys before them in a cache."""
    image, real = image_and_real()
    spans = spans_of(image, real, (0, stop), (start, stop))
    rows, keys = slice(start, stop), slice(0, stop)
    k, v = call.k[:, :, keys], call.v[:, :, keys]
    assert call.mask is not None
    assert call.residual is not None
    part = call_of(call.q[:, :, rows], k, v, call.mask[..., rows, keys], False, "causal", spans)
    part.phase, part.state, part.residual = phase, state, call.residual[:, rows]
    part.predicts = stop - start if phase == "decode" else int(stop == N)
    return part


def run(processor: Processor, call: AttentionCall) -> Tensor:
    edit = processor.react(call)
    return attend(call, [] if edit is None else [edit])


def in_chunks(processor: Processor, call: AttentionCall, bounds: tuple[int, ...]) -> Tensor:
    """The same prompt in several forward passes, one behind the other."""
    state = dict(call.state)
    return torch.cat(
        [run(processor, parts_of(call, a, b, "prefill", state)) for a, b in itertools.pairwise(bounds)],
        dim=2,
    )


def solo(processor: Processor, call: AttentionCall, row: int, state: dict[str, Any] | None = None) -> Tensor:
    """One row without its padding, as a batch of its own, ``(H, tokens, D)``."""
    image, real = image_and_real()
    pad, one = PADS[row], slice(row, row + 1)
    spans = spans_of(image[one, pad:], real[one, pad:])
    q, k, v = (x[one, :, pad:] for x in (call.q, call.k, call.v))
    assert call.mask is not None
    assert call.residual is not None
    alone = call_of(q, k, v, call.mask[one, :, pad:, pad:], False, "causal", spans)
    alone.phase, alone.residual = "prefill", call.residual[one, pad:]
    alone.state.update(state or {})
    return run(processor, alone)[0]
