"""PAI against loops over the explicit map, and the hand example of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnsteer import AttentionCall, SteeringError
from attnsteer.kernels import reference
from attnsteer.processors.pai import PAI
from attnsteer.site import Site
from attnsteer.spans import spans_of
from tests.calls import call_of, repeated
from tests.processors.prompts import PADS, N, image_and_real, in_chunks, parts_of, prompt_call, run, solo


def by_loops(alpha: float, call: AttentionCall, rows: int = 1) -> Tensor:
    image, _ = image_and_real()
    logits = reference.logits(call.q, call.k, mask=call.mask)
    for b in range(3):
        for h in range(logits.shape[1]):
            for i in range(N - rows, N):
                for j in range(N):
                    if image[b, j] and logits[b, h, i, j] > -math.inf:
                        logits[b, h, i, j] += alpha * abs(float(logits[b, h, i, j]))
    return torch.softmax(logits, -1) @ repeated(call.v, call)


def test_three_keys_by_hand() -> None:
    k = torch.tensor([[[[1.0], [2.0], [-1.0]]]])
    call = call_of(torch.ones(1, 1, 1, 1), k, torch.eye(3)[None, None], scale=1.0, kind="causal")
    image = torch.tensor([[False, True, True, False]])
    call.spans = spans_of(image, torch.ones_like(image), (0, 3), (3, 4))
    expected = torch.tensor([0.1161, 0.8580, 0.0259])  # [1, 3, -0.5]
    torch.testing.assert_close(run(PAI(), call)[0, 0, 0], expected, atol=6e-5, rtol=0)
    assert torch.equal(run(PAI(alpha=0), call), call.output)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_rows_that_predict_equal_the_loops(rows: int) -> None:
    torch.manual_seed(0)
    call = prompt_call()
    call.predicts = rows
    out = run(PAI(alpha=0.25), call)
    torch.testing.assert_close(out, by_loops(0.25, call, rows), atol=1e-12, rtol=0)
    assert torch.equal(out[:, :, : N - rows], call.output[:, :, : N - rows])
    assert not torch.equal(out[:, :, N - rows :], call.output[:, :, N - rows :])


def test_chunks_decode_steps_and_solo_rows() -> None:
    torch.manual_seed(1)
    call = prompt_call()
    whole = run(PAI(), call)
    torch.testing.assert_close(in_chunks(PAI(), call, (0, 8, N - 1, N)), whole, atol=1e-12, rtol=0)
    step = parts_of(call, N - 3, N, "decode", {})
    torch.testing.assert_close(run(PAI(), step), by_loops(0.5, call, 3)[:, :, -3:], atol=1e-12, rtol=0)
    for row, pad in enumerate(PADS):
        torch.testing.assert_close(solo(PAI(), call, row), whole[row, :, pad:], atol=1e-12, rtol=0)


def test_layers_start_at_the_third() -> None:
    sites = [Site(f"{i}", "causal", i, i, 4, 2, 8) for i in range(32)]
    assert PAI().where_for(sites).layers == list(range(2, 32))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_wrong_parameters(alpha: float) -> None:
    with pytest.raises(SteeringError, match="alpha="):
        PAI(alpha=alpha)
