"""VAF against loops over the explicit map, and the hand example of its paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnsteer import AttentionCall, SteeringError
from attnsteer.kernels import reference
from attnsteer.processors.vaf import VAF, looking_heads, middle_layers
from attnsteer.site import Site
from attnsteer.spans import spans_of
from tests.calls import call_of, explicit_map, repeated
from tests.processors.prompts import PADS, N, image_and_real, in_chunks, prompt_call, run, solo

STRONG = VAF(alpha=0.75, beta=0.5)  # exact in float32


def by_loops(vaf: VAF, call: AttentionCall) -> Tensor:
    image, real = image_and_real()
    plain, logits = explicit_map(call), reference.logits(call.q, call.k)
    seen = reference.logits(call.q, call.k, mask=call.mask)
    out, heads = plain.clone(), plain.shape[1]
    for b in range(3):
        places = [j for j in range(N) if image[b, j]]
        for i in range(max(places) + 1, N):
            mass = [sum(float(plain[b, h, i, j]) for j in places) for h in range(heads)]
            chosen = sorted(range(heads), key=lambda h: -mass[h])[: math.ceil(vaf.head_fraction * heads)]
            for h in chosen:
                z = seen[b, h, i].clone()
                for j in range(N):
                    if image[b, j]:
                        z[j] += vaf.alpha * logits[b, h, i, j]
                    elif real[b, j] and j < min(places):
                        z[j] -= vaf.beta * logits[b, h, i, j]
                out[b, h, i] = torch.softmax(z, -1)
    return out @ repeated(call.v, call)


def test_three_keys_by_hand() -> None:
    """z = [1, 2, -1]: one system token, two image tokens, and the query behind them."""
    k = torch.tensor([[[[1.0], [2.0], [-1.0]]]])
    call = call_of(torch.ones(1, 1, 1, 1), k, torch.eye(3)[None, None], scale=1.0, kind="causal")
    image = torch.tensor([[False, True, True, False]])
    call.spans, call.phase = spans_of(image, torch.ones_like(image), (0, 3), (3, 4)), "decode"
    expected = torch.tensor([0.2008, 0.7746, 0.0246])  # [0.95, 2.3, -1.15]: the third falls
    torch.testing.assert_close(run(VAF(), call)[0, 0, 0], expected, atol=5e-5, rtol=0)
    assert torch.equal(run(VAF(alpha=0, beta=0), call), call.output)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3])
def test_a_prompt_equals_the_loops(fraction: float) -> None:
    torch.manual_seed(0)
    call, vaf = prompt_call(), replace(STRONG, head_fraction=fraction)
    out = run(vaf, call)
    torch.testing.assert_close(out, by_loops(vaf, call), atol=1e-12, rtol=0)
    reading = call.spans.reading  # type: ignore[union-attr]
    before = ~reading.after_image[:, None].expand(3, 4, N)  # type: ignore[union-attr]
    assert torch.equal(out[before], call.output[before])
    assert not torch.equal(out, call.output)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_chunks_and_solo_rows_are_the_same_prompt(fraction: float) -> None:
    torch.manual_seed(1)
    call, vaf = prompt_call(), replace(STRONG, head_fraction=fraction)
    whole = run(vaf, call)
    torch.testing.assert_close(in_chunks(vaf, call, (0, 8, 12, N)), whole, atol=1e-12, rtol=0)
    for row, pad in enumerate(PADS):
        torch.testing.assert_close(solo(vaf, call, row), whole[row, :, pad:], atol=1e-12, rtol=0)


def test_a_prompt_without_image_stays_as_it_is() -> None:
    torch.manual_seed(2)
    call = prompt_call(torch.float32)
    _, real = image_and_real()
    call.spans = spans_of(torch.zeros_like(real), real)
    assert torch.equal(run(STRONG, call), call.output)


def test_the_heads_that_look_most() -> None:
    mass = torch.tensor([0.1, 0.5, 0.3, 0.2])[None, :, None]
    assert looking_heads(mass, 0.5)[0, :, 0].tolist() == [False, True, True, False]
    assert looking_heads(mass, 0.1)[0, :, 0].tolist() == [False, True, False, False]


def test_layers() -> None:
    sites = [Site(f"{i}", "causal", i, i, 4, 2, 8) for i in range(40)]
    assert middle_layers(sites[:32]) == [9, 10, 11, 12, 13, 14]
    assert middle_layers(sites) == list(range(11, 19))
    assert middle_layers(sites[:4]) == [1]


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"beta": 1.5}, {"head_fraction": 0.0}])
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(SteeringError, match=f"{next(iter(wrong))}="):
        VAF(**wrong)
