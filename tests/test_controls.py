"""Controls: as strong as the method, without its idea."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch

import attnsteer
from attnsteer import Where
from attnsteer.controls import HEADS, Astray, Elsewhere, all_heads, random_heads, shuffled, spread
from attnsteer.errors import SteeringError
from attnsteer.processors import VHR, AStar, AttendAndExcite, Focus, SoftPAG
from tests.nursed import LEVEL, PROMPTS, WORDS, generate
from tests.tiny import pipelines, vlms


def test_shuffled_keeps_values_and_norm_and_loses_the_direction():
    gradient = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = shuffled(gradient, 0, 3)
    assert torch.equal(found.flatten().sort().values, gradient.flatten().sort().values)
    assert abs(float(torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0))) < 0.1
    assert torch.equal(found, shuffled(gradient, 0, 3))
    assert not torch.equal(found, shuffled(gradient, 0, 4))
    assert not torch.equal(found, shuffled(gradient, 1, 3))


def test_astray_acts_on_the_kinds_of_its_method():
    assert Astray(method=AttendAndExcite(subjects=WORDS)).kinds == AttendAndExcite.kinds
    assert Astray(method=Focus(subjects=WORDS)).kinds == Focus.kinds != AttendAndExcite.kinds


@pytest.fixture(scope="module", params=["sd15", "flux"])
def nursed(request):
    return request.param, pipelines.build(request.param)


def moved(name, pipe, method, **options):
    """The latents after one step with the method, minus those without."""
    plain = generate(pipe, name, steps=1, cfg=False, **options)
    with attnsteer.steer(pipe, method):
        return generate(pipe, name, steps=1, cfg=False, **options) - plain


@pytest.mark.parametrize("thresholds", [{}, {0: 2.0}], ids=["update", "refinement"])
def test_astray_moves_as_far_as_the_method(nursed, thresholds):
    """Its first move is the method's own in another order, so the latent itself moves exactly as far."""
    name, pipe = nursed
    method = AttendAndExcite(
        subjects=WORDS, level=LEVEL[name], thresholds=thresholds, scale_factor=1.0, max_refinement_steps=3
    )
    seen = {}
    for arm in (method, Astray(method=method, seed=2)):
        latents = []
        hook = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        handle = hook.register_forward_pre_hook(
            lambda _, args, kwargs, latents=latents: latents.append(
                (kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))).detach().clone()
            ),
            with_kwargs=True,
        )
        with attnsteer.steer(pipe, arm):
            generate(pipe, name, steps=1, cfg=False)
        handle.remove()
        seen[type(arm)] = latents
    start = {kind: found[0] for kind, found in seen.items()}
    assert torch.equal(start[AttendAndExcite], start[Astray])
    steps = {kind: found[-1] - found[0] for kind, found in seen.items()}
    norms = {kind: step.flatten(1).norm(dim=1) for kind, step in steps.items()}
    assert bool((norms[Astray] > 0).all())
    torch.testing.assert_close(norms[Astray], norms[AttendAndExcite], rtol=3e-3, atol=0)
    cosine = torch.cosine_similarity(steps[Astray].flatten(1), steps[AttendAndExcite].flatten(1))
    assert float(cosine.abs().max()) < 0.3


def test_astray_of_rows_alone_and_together(nursed):
    name, pipe = nursed
    method = Astray(method=AStar(subjects=WORDS, level=LEVEL[name], scale_factor=0.1))
    together = moved(name, pipe, method)
    alone = moved(name, pipe, method, prompts=PROMPTS[1:2], seeds=[1])
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-3)


def test_astray_of_an_inert_method_changes_nothing(nursed):
    name, pipe = nursed
    method = Astray(method=AttendAndExcite(subjects=WORDS, level=LEVEL[name], scale_factor=0))
    assert not moved(name, pipe, method).any()


@pytest.mark.parametrize("method", [None, SoftPAG()])
def test_astray_needs_a_latent_update(method):
    with pytest.raises(SteeringError, match="latent"):
        Astray(method=method)


def test_astray_acts_where_its_method_does():
    with pytest.raises(SteeringError, match="give the method a where"):
        Astray(Where(layers=[0]), method=AttendAndExcite(subjects=WORDS))


def test_random_and_all_heads():
    pipe = pipelines.build("sd3")
    sites = attnsteer.sites(pipe)
    where = Where(heads={0: [1], 1: [0]}, steps=(0.0, 0.5))
    own = {(site.name, h) for site, heads in where.select(sites, ("joint", "self")).items() for h in heads}
    draws = []
    for seed in range(8):
        drawn = random_heads(where, sites, seed)
        found = {(site.name, h) for site, heads in drawn.select(sites, ("joint", "self")).items() for h in heads}
        assert len(found) == len(own) == 2
        assert not found & own
        assert drawn.steps == where.steps
        draws.append(frozenset(found))
    assert len(set(draws)) > 1
    everything = all_heads(where, sites).select(sites, ("joint", "self"))
    assert {site.layer for site in everything} == {0, 1}
    assert all(heads == tuple(range(site.heads)) for site, heads in everything.items())


def test_too_few_heads_to_draw_from():
    sites = attnsteer.sites(pipelines.build("sd3"))
    with pytest.raises(SteeringError, match="left"):
        random_heads(Where(), sites)


# ---- other heads -----------------------------------------------------------------------------------------------------
def _strengths(method):
    """What a method gives to the heads of a tiny model: [(layer, is it the reference pass, strengths (R, H))]."""
    model, inputs = vlms.build("llava")
    model.eval()
    seen = []

    @dataclass(frozen=True)
    class Watch(type(method)):
        def react(self, call):
            edit = super().react(call)
            for each in edit if isinstance(edit, tuple) else (edit,):
                seen.append((call.site.layer, "image_free" in call.lanes, each.weight.clone()))
            return edit

    watched = Watch(**{field.name: getattr(method, field.name) for field in fields(method)})
    with attnsteer.steer(model, watched), torch.no_grad():
        model.generate(**inputs(2), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return seen


def test_elsewhere_is_as_strong_as_its_method_on_other_heads():
    """In the first steered layer the inputs are those of the method itself, so its choice is known."""
    own = _strengths(VHR(alpha=3.0, outliers=False))
    moved = {heads: _strengths(Elsewhere(method=VHR(alpha=3.0, outliers=False), heads=heads)) for heads in HEADS}
    first = own[0][0]
    for kind, found in moved.items():
        assert [place[:2] for place in found] == [place[:2] for place in own], kind
        for (layer, reference, theirs), (_, _, ours) in zip(own, found, strict=True):
            if layer == first and reference:
                chosen = theirs == 3
                assert bool(chosen.any()) and not bool(chosen.all())
                if kind == "random":
                    assert torch.equal(ours.sort(1).values, theirs.sort(1).values)
                    assert not torch.equal(ours, theirs)
                elif kind == "all":
                    assert torch.equal(ours, torch.full_like(ours, 3.0))
                else:
                    assert torch.equal(ours, torch.where(chosen, 1.0, 3.0))
            elif kind == "random":
                assert torch.equal((ours == 3).sum(1), torch.full((len(ours),), 3)), "half of the six heads"
    again = _strengths(Elsewhere(method=VHR(alpha=3.0, outliers=False), heads="random"))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(again, moved["random"], strict=True))
    other = _strengths(Elsewhere(method=VHR(alpha=3.0, outliers=False), heads="random", seed=1))
    assert not all(torch.equal(a[2], b[2]) for a, b in zip(other, moved["random"], strict=True))


def test_elsewhere_in_every_step_means_the_same_heads():
    found = _strengths(Elsewhere(method=VHR(), heads="random"))
    decode = [(layer, weight) for layer, reference, weight in found if not reference]
    by_layer = {layer: [w for other, w in decode if other == layer] for layer, _ in decode}
    for weights in by_layer.values():
        assert len(weights) == 3
        assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_spread_by_hand():
    strength = torch.tensor([[1.0, 3.0, 1.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    assert spread(strength, 1.0, rest=False).tolist() == [[4.0] * 4, [1.0] * 4]
    assert spread(strength, 1.0, rest=True).tolist() == [[4.0, 1.0, 4.0, 1.0], [1.0] * 4]
    bias = torch.tensor([[[0.0, 2.0], [0.0, 0.0], [0.0, 4.0]]])
    assert spread(bias, 0.0, rest=False).tolist() == [[[0.0, 3.0]] * 3]
    assert spread(bias, 0.0, rest=True).tolist() == [[[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]]
    chosen = torch.tensor([[True, False, False]])
    assert spread(chosen, 0.0, rest=True).tolist() == [[False, True, True]]


def test_elsewhere_moves_planned_edits_of_guidance_too():
    pipe = pipelines.build("sd3")
    site = attnsteer.sites(pipe)[1]
    method = SoftPAG(Where(heads={1: [0]}), strength=0.25)
    own = method.plan(site, (0,)).weight
    moved = {heads: Elsewhere(method=method, heads=heads).plan(site, (0,)).weight for heads in HEADS}
    assert (own != 0).sum() == (moved["random"] != 0).sum() == 1
    assert bool((moved["all"] == 0.25).all())
    assert torch.equal(moved["rest"] == 0, own != 0)


def test_elsewhere_of_an_inert_method_is_inert():
    assert Elsewhere(method=VHR(alpha=1.0)).inert


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Elsewhere(), "needs a method that edits heads"),
        (lambda: Elsewhere(method=AttendAndExcite(subjects=WORDS)), "needs a method that edits heads"),
        (lambda: Elsewhere(method=VHR(), heads="none"), "is not known"),
        (lambda: Elsewhere(Where(layers=[0]), method=VHR()), "give the method a where"),
        (
            lambda: Elsewhere(method=VHR(Where(heads=[0]))).where_for(attnsteer.sites(vlms.build("llava")[0])),
            "give it all heads, or draw its where",
        ),
    ],
)
def test_elsewhere_refuses(make, message):
    with pytest.raises(SteeringError, match=message):
        make()
