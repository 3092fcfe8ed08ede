"""References on FLUX: keys gathered before their rotation by hand, and given pictures as packed latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import SteeringError
from attnsteer.processors import IRDiffusion, SharedSelfAttention
from attnsteer.references import noised_references
from tests.engine.common import denoiser_of, double, latents, predict, to_double
from tests.tiny import denoisers, pipelines

TEXT, H, W = denoisers.TEXT, denoisers.HEIGHT, denoisers.WIDTH
IMAGE = TEXT + torch.arange(H * W)
REFERENCES = torch.tensor(
    [[[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]]
).bool()
SCENE = torch.tensor(
    [[[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]]
).bool()


def pasted(reference: Tensor, target: Tensor) -> list[tuple[int, int]]:
    """Which reference token comes to which place, token by token: box to box, nearest, foreground alone."""

    def box(mask: Tensor) -> tuple[int, int, int, int]:
        at = mask.nonzero()
        return int(at[:, 0].min()), int(at[:, 0].max()) + 1, int(at[:, 1].min()), int(at[:, 1].max()) + 1

    top, bottom, left, right = box(reference)
    a_top, a_bottom, a_left, a_right = box(target)
    found = []
    for y in range(a_top, a_bottom):
        for x in range(a_left, a_right):
            row = top + int(np.float32(y - a_top) * np.float32((bottom - top) / (a_bottom - a_top)))
            column = left + int(np.float32(x - a_left) * np.float32((right - left) / (a_right - a_left)))
            if reference[row, column]:
                found.append((row * W + column, y * W + x))
    return found


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One vector ``(D,)`` rotated in pairs of neighbouring channels."""
    out = torch.empty_like(x)
    for i in range(0, len(x), 2):
        out[i] = x[i] * cos[i] - x[i + 1] * sin[i]
        out[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1]
    return out


@contextmanager
def by_hand(monkeypatch: Any) -> Iterator[list[int]]:
    """Inside, the last of three rows looks at the references: their keys are moved *before* FLUX rotates them."""
    from diffusers.models.transformers import transformer_flux

    rotate = transformer_flux.apply_rotary_emb
    raw: list[tuple[Tensor, Any]] = []
    lengths: list[int] = []

    def noting(x: Tensor, rope: Any, *args: Any, **kwargs: Any) -> Tensor:
        raw.append((x, rope))
        return rotate(x, rope, *args, **kwargs)

    def explicit(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (_, _), (plain, (cos, sin)) = raw[-2:]  # queries first, then keys, (B, N, H, D)
        cos, sin, scale = cos.to(query), sin.to(query), query.shape[-1] ** -0.5
        lengths.append(query.shape[2])
        out = torch.softmax(query @ key.mT * scale, -1) @ value
        owner = torch.zeros(query.shape[2], dtype=torch.long)
        for i in range(2):
            owner[IMAGE] += (i + 1) * SCENE[i].flatten()
        laid = [pasted(r, t) for r, t in zip(REFERENCES, SCENE, strict=True)]
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                a = int(owner[t])
                own = (owner == 0) | (owner == a) | torch.tensor(a == 0)
                keys, values = [*key[2, h, own]], [*value[2, h, own]]
                for source, place in laid[a - 1] if a else ():
                    at = TEXT + place
                    keys.append(turn(plain[a - 1, TEXT + source, h], cos[at], sin[at]))
                    values.append(value[a - 1, h, TEXT + source])
                weights = torch.softmax(torch.stack(keys) @ query[2, h, t] * scale, 0)
                out[2, h, t] = weights @ torch.stack(values)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "apply_rotary_emb", noting)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", explicit)
        yield lengths


def test_double_and_single_blocks_equal_keys_moved_before_their_rotation(monkeypatch):
    model, inputs = denoisers.build("flux")
    model, given = model.double(), double(inputs(3))
    plain = predict(model, given)
    how = IRDiffusion(references=REFERENCES, scene=SCENE, start_layer=0, dropout=0.0, mutual=0.0)
    with attnsteer.steer(model, how):
        found = predict(model, given)
    with by_hand(monkeypatch) as lengths:
        expected = predict(model, given)
    assert lengths == [TEXT + H * W] * 5  # two double and three single blocks
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # FLUX makes its angles in float32
    assert (found[2] - plain[2]).abs().max() > 1e-2
    assert torch.equal(found[:2], plain[:2])


# ---- given pictures --------------------------------------------------------------------------------------------------
def packed(latent: Tensor) -> Tensor:
    """``(C, h, w)`` as FLUX's tokens, one by one: the four latents of a square, channel by channel."""
    c, h, w = latent.shape
    rows = [
        torch.stack([latent[k, 2 * y + dy, 2 * x + dx] for k in range(c) for dy in (0, 1) for dx in (0, 1)])
        for y in range(h // 2)
        for x in range(w // 2)
    ]
    return torch.stack(rows)


def seen_by(pipe: Any, **options: Any) -> list[Tensor]:
    calls: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(kwargs["hidden_states"].clone())

    hook = denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    latents(pipe, "flux", batch=3, **options)
    hook.remove()
    return calls


@pytest.mark.parametrize("cfg", [True, False])
def test_rows_are_the_packed_pictures_at_the_noise_of_each_step(cfg):
    pipe = pipelines.build("flux")
    noise = torch.Generator().manual_seed(5)
    rows = [torch.randn(4, 2 * H, 2 * W, generator=noise) for _ in range(2)]
    plain = seen_by(pipe, cfg=cfg)
    with noised_references(pipe, [rows[0], None, packed(rows[1])], seed=7):
        calls = seen_by(pipe, cfg=cfg)
    assert len(calls) == len(plain) == (6 if cfg else 3)
    for call, sample in enumerate(calls):
        sigma = pipe.scheduler.sigmas[call // 2 if cfg else call]
        for row, x in ((0, rows[0]), (2, rows[1])):
            n = torch.randn(1, H * W, 16, generator=torch.Generator().manual_seed(7 * 3 + row))[0]
            torch.testing.assert_close(sample[row], (1 - sigma) * packed(x) + sigma * n, atol=1e-5, rtol=1e-5)
        assert torch.equal(sample[1], plain[call][1])


def test_pictures_are_encoded_and_packed_as_the_pipeline_does():
    pipe = pipelines.build("flux")
    picture = np.random.default_rng(0).random((pipelines.HEIGHT, pipelines.WIDTH, 3)).astype("float32")
    pixels = pipe.image_processor.preprocess(picture, pipelines.HEIGHT, pipelines.WIDTH)
    config = pipe.vae.config
    encoded = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    ours = pipe._pack_latents(encoded, 1, 4, 2 * H, 2 * W)
    torch.testing.assert_close(ours[0], packed(encoded[0]))
    found = []
    for given in (picture, encoded[0]):
        with noised_references(pipe, [given, None, None]):
            found.append(seen_by(pipe)[1][0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["reposition", "share"])
def test_the_scene_takes_from_the_pictures_and_nothing_stays_behind(kind):
    pipe = to_double(pipelines.build("flux"))
    before = latents(pipe, "flux", batch=3)
    how: Any = IRDiffusion(references=REFERENCES, scene=SCENE, start_layer=0, mutual=0.0)
    if kind == "share":
        how = SharedSelfAttention(attnsteer.Where(layers="all"), frames=3, masks=REFERENCES)
    noise = torch.Generator().manual_seed(5)
    rows = [torch.randn(4, 2 * H, 2 * W, generator=noise) for _ in range(2)]
    results = []
    for pictures in (rows, rows[::-1]):
        with noised_references(pipe, [*pictures, None]), attnsteer.steer(pipe, how):
            results.append(latents(pipe, "flux", batch=3)[2])
    assert (results[0] - results[1]).abs().max() > 1e-4
    assert torch.equal(latents(pipe, "flux", batch=3), before)
    assert not pipe.transformer._forward_pre_hooks


def test_what_does_not_fit_is_refused():
    pipe = pipelines.build("flux")
    with pytest.raises(SteeringError, match="this run's have"), noised_references(pipe, [torch.ones(4, 3, 3), None]):
        latents(pipe, "flux", batch=2)
    with pytest.raises(SteeringError, match="with 2 entries"), noised_references(pipe, [torch.ones(4, 6, 10), None]):
        latents(pipe, "flux", batch=3)
    call = pipelines.call_kwargs("flux", 2, cfg=False) | {"num_images_per_prompt": 2, "generator": None}
    twice = pytest.raises(SteeringError, match="num_images_per_prompt=1")  # as many rows as with guidance
    with twice, noised_references(pipe, [torch.ones(4, 6, 10), None]):
        pipe(**call)
    qwen = pipelines.build("qwen")
    with pytest.raises(SteeringError, match="not one picture"), noised_references(qwen, [torch.ones(4, 6, 10), None]):
        latents(qwen, "qwen", batch=2)
