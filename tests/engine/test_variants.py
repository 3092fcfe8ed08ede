"""Many variants as rows of one batch: each row is what it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Variant, Where
from attnsteer.processors import PAG, SoftPAG
from tests.tiny import denoisers, pipelines

from .common import Nudge, denoiser_of, difference, latents, predict, state_of, to_double


def mixture() -> list[Any]:
    """Strengths, heads, layers, steps and methods all differ; two rows are plain."""
    return [
        None,
        SoftPAG(Where(layers=0), strength=0.5),
        SoftPAG(Where(layers=-1, heads=[1]), strength=1.0, scale=1.0),
        Nudge(Where(layers=0, heads=[0, 2]), strength=0.25),
        [PAG(Where(layers=-1, steps=(0.0, 0.5))), Nudge(Where(layers=-1), strength=0.5)],
        Variant(),
    ]


def one_prompt(name: str, rows: int, **options: Any) -> dict[str, Any]:
    """A call with the same prompt and the same noise in every row."""
    kwargs = pipelines.call_kwargs(name, rows, **options)
    kwargs["prompt"] = [kwargs["prompt"][0]] * rows
    kwargs["generator"] = [torch.Generator().manual_seed(3) for _ in range(rows)]
    return kwargs | {"output_type": "latent", "return_dict": False}


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_rows_of_a_mixture_equal_solo_runs_and_plain_rows_equal_the_plain_model_bit_for_bit(
    name: str, cfg: bool
) -> None:
    pipe = to_double(pipelines.build(name))
    variants = mixture()
    n = len(variants)
    plain = pipe(**one_prompt(name, n, cfg=cfg, steps=2))[0]
    with attnsteer.attach(pipe, variants=variants):
        together = pipe(**one_prompt(name, n, cfg=cfg, steps=2))[0]
    assert torch.equal(together[0], plain[0])
    assert torch.equal(together[5], plain[5])
    # Wan keeps parts in float32 whatever it is cast to
    atol = 1e-4 if name == "wan" else 1e-8
    for row in (1, 2, 3, 4):
        with attnsteer.attach(pipe, variants=[variants[row]]):
            alone = pipe(**one_prompt(name, 1, cfg=cfg, steps=2))[0]
        torch.testing.assert_close(together[row], alone[0], rtol=atol, atol=atol)
        assert (together[row] - plain[row]).abs().max() > 1e-3, row


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_permuted_variants_give_permuted_rows(name: str) -> None:
    pipe = to_double(pipelines.build(name))
    variants = mixture()
    order = [4, 2, 0, 5, 1, 3]
    with attnsteer.attach(pipe, variants=variants):
        rows = pipe(**one_prompt(name, 6, steps=2))[0]
    with attnsteer.attach(pipe, variants=[variants[i] for i in order]):
        permuted = pipe(**one_prompt(name, 6, steps=2))[0]
    torch.testing.assert_close(permuted, rows[order], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen"])
def test_pictures_of_run_variants_equal_solo_pictures(name: str) -> None:
    pipe = pipelines.build(name)
    latents(pipe, name, steps=1)  # a first run leaves attributes of the library's own
    before = state_of(denoiser_of(pipe), scheduler=pipe.scheduler)
    call = pipelines.call_kwargs(name, steps=2)
    for key in ("prompt", "generator"):
        del call[key]
    call["negative_prompt"] = call["negative_prompt"][0]
    together = list(attnsteer.run_variants(pipe, "a dog", variants=mixture(), seeds=[1, 2], batch_size=5, **call))
    alone = list(attnsteer.run_variants(pipe, "a dog", variants=mixture(), seeds=[1, 2], batch_size=1, **call))
    assert [(r.seed, r.variant.name) for r in together] == [(r.seed, r.variant.name) for r in alone]
    assert [r.seed for r in together] == [1] * 6 + [2] * 6
    for a, b in zip(together, alone, strict=True):
        # Measured up to 1e-6 on pictures in [0, 1]: what another batch size changes in the plain model.
        np.testing.assert_allclose(a.image, b.image, rtol=0, atol=1e-5)
    first = [r.image for r in alone[:6]]
    assert np.array_equal(first[0], first[5])
    assert all(not np.allclose(first[0], image, atol=1e-4) for image in first[1:5])
    assert {k for k in difference(before, state_of(denoiser_of(pipe), scheduler=pipe.scheduler)) if k != "rng"} == set()


def test_a_single_entry_serves_all_rows() -> None:
    pipe = pipelines.build("sd15")
    with attnsteer.attach(pipe, variants=[SoftPAG(Where(layers=-1))]):
        one = latents(pipe, "sd15", batch=3)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1))):
        assert torch.equal(latents(pipe, "sd15", batch=3), one)


def test_variants_of_one_method_share_one_forward_of_all_perturbed_rows() -> None:
    pipe = pipelines.build("sd3")
    batches: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kw: batches.append(kw["hidden_states"].shape[0]), with_kwargs=True
    )
    variants = [None, *(SoftPAG(Where(layers=2, heads=h), strength=u) for h in (0, 1) for u in (0.25, 0.75))]
    with attnsteer.attach(pipe, variants=variants) as steering:
        pipe(**one_prompt("sd3", 5, steps=1))
    assert batches == [10, 4]
    assert steering.session.extra_rows == 4


def test_two_pictures_of_each_prompt_belong_to_the_variant_of_their_prompt_where_only_guidance_differs() -> None:
    pipe = to_double(pipelines.build("sd15"))
    variants = [SoftPAG(Where(layers=-1)), None]
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    options: dict[str, Any] = {"batch": 2, "steps": 2, "num_images_per_prompt": 2}
    plain = latents(pipe, "sd15", **options, generator=generators())
    with attnsteer.attach(pipe, variants=variants):
        found = latents(pipe, "sd15", **options, generator=generators())
    changed = [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert changed == [True, True, False, False]


@pytest.mark.parametrize("cfg", [True, False])
def test_plain_edits_of_variants_with_several_pictures_a_prompt_are_refused(cfg: bool) -> None:
    """The rows of the forward could be two branches or two pictures; guessing would mix the variants up."""
    pipe = pipelines.build("sd15")
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    with (
        attnsteer.attach(pipe, variants=[Nudge(Where(layers=-1)), None]),
        pytest.raises(SteeringError, match="2 variants met . rows (in the denoiser|of latents)"),
    ):
        latents(pipe, "sd15", batch=2, cfg=cfg, num_images_per_prompt=2, generator=generators)


def test_a_batch_that_cannot_be_dealt_to_the_variants_is_refused() -> None:
    pipe = pipelines.build("sd15")
    for variant in (Nudge(Where(layers=-1)), SoftPAG(Where(layers=-1))):
        with (
            attnsteer.attach(pipe, variants=[variant, None]),
            pytest.raises(SteeringError, match=r"2 variants (cannot be dealt to|met)"),
        ):
            latents(pipe, "sd15", batch=3, cfg=False)


def test_a_bare_denoiser_takes_variants_too() -> None:
    model, inputs = denoisers.build("wan")
    given = inputs(2)
    with torch.no_grad():
        plain = predict(model, given)
        with attnsteer.attach(model, variants=[None, Nudge(Where(layers=1))]):
            found = predict(model, given)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


def test_run_variants_refuses_before_anything_is_generated() -> None:
    pipe = pipelines.build("sd15")
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    good, bad = SoftPAG(Where(layers=-1)), SoftPAG(Where(layers=99))
    with pytest.raises(SteeringError, match="Layer 99 does not exist"):
        attnsteer.run_variants(pipe, "a dog", variants=[good, bad])
    with pytest.raises(SteeringError, match="Nothing to run"):
        attnsteer.run_variants(pipe, "a dog", variants=[])
    with pytest.raises(SteeringError, match="batch_size=0"):
        attnsteer.run_variants(pipe, "a dog", variants=[good], batch_size=0)
    with pytest.raises(SteeringError, match="num_images_per_prompt"):
        attnsteer.run_variants(pipe, "a dog", variants=[good], num_images_per_prompt=2)
    with pytest.raises(SteeringError, match="needs a Diffusers pipeline"):
        attnsteer.run_variants(pipe.unet, "a dog", variants=[good])
    with attnsteer.steer(pipe, good), pytest.raises(SteeringError, match="attached"):
        attnsteer.run_variants(pipe, "a dog", variants=[good])
    with pytest.raises(SteeringError, match="variants, not both"):
        attnsteer.attach(pipe, good, variants=[good])
    assert calls == []


def test_stopping_early_leaves_the_pipeline_free() -> None:
    pipe = pipelines.build("sd15")
    before = state_of(pipe.unet, scheduler=pipe.scheduler)
    call = pipelines.call_kwargs("sd15", steps=1, cfg=False)
    for key in ("prompt", "generator"):
        del call[key]
    results = attnsteer.run_variants(pipe, "a dog", variants=[None, Nudge()], seeds=[0, 1], **call)
    next(results)
    assert {k for k in difference(before, state_of(pipe.unet, scheduler=pipe.scheduler)) if k != "rng"} == set()
    results.close()
