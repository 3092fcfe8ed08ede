"""The interception: it sees every attention call, changes none, and touches nothing that was not selected."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import attnsteer
from attnsteer import NotReachedError, SteeringError, Where
from tests.tiny import denoisers, pipelines

from .common import (
    Bias,
    ImageNudge,
    Nudge,
    Watch,
    denoiser_of,
    double,
    explicit_identity,
    head_weight,
    latents,
    predict,
)


@pytest.mark.parametrize("name", denoisers.NAMES)
def test_watching_every_site_is_bitwise_identical_and_every_site_is_seen_as_often_as_it_runs(name: str) -> None:
    model, inputs = denoisers.build(name)
    given = inputs(3)
    runs: Counter[str] = Counter()
    handles = [
        model.get_submodule(site.name).register_forward_hook(lambda *_, name=site.name: runs.update([name]))
        for site in attnsteer.sites(model)
    ]
    with torch.no_grad():
        plain = predict(model, given)
        for handle in handles:
            handle.remove()
        watch = Watch(Where(layers="*"))
        with attnsteer.steer(model, watch) as steering:
            watched = predict(model, given)
    seen = {site.name: state["calls"] for site, state in steering.states(watch).items()}
    assert torch.equal(plain, watched)
    assert set(seen) == {site.name for site in attnsteer.sites(model)}
    assert seen == dict(runs)
    assert min(runs.values()) >= 1


@pytest.mark.parametrize("name", pipelines.NAMES)
def test_watching_a_pipeline_is_bitwise_identical_and_sees_every_forward(name: str) -> None:
    pipe = pipelines.build(name)
    forwards: list[int] = []
    handle = denoiser_of(pipe).register_forward_hook(lambda *_: forwards.append(1))
    plain = latents(pipe, name, batch=2)
    handle.remove()
    watch = Watch(Where(layers="*"))
    with attnsteer.steer(pipe, watch) as steering:
        watched = latents(pipe, name, batch=2)
    assert torch.equal(plain, watched)
    assert {state["calls"] for state in steering.states(watch).values()} == {len(forwards)}


@pytest.mark.parametrize("name", denoisers.NAMES)
def test_sites_count_blocks_in_execution_order(name: str) -> None:
    model, inputs = denoisers.build(name)
    order: list[str] = []
    there = attnsteer.sites(model)
    for site in there:
        model.get_submodule(site.name).register_forward_pre_hook(lambda *_, name=site.name: order.append(name))
    with torch.no_grad():
        model(**inputs(2))
    assert [site.index for site in there] == list(range(len(there)))
    assert [site.layer for site in there] == sorted(site.layer for site in there)
    if name in ("cogview4", "lumina2"):  # without a descriptor the order is that of the modules' names
        assert sorted(order) == sorted(site.name for site in there)
    elif name == "sd35":  # within a block, attn2 (image only) is declared after and run after attn
        assert [n.rpartition(".")[0] for n in order] == [site.name.rpartition(".")[0] for site in there]
    else:
        assert order == [site.name for site in there]


@pytest.mark.parametrize("name", denoisers.NAMES)
def test_a_data_independent_edit_equals_the_explicit_map(name: str) -> None:
    model, inputs = denoisers.build(name)
    model = model.double()
    given = double(inputs(3))
    wanted = [s for s in attnsteer.sites(model) if s.kind in ("self", "joint")] or [
        s for s in attnsteer.sites(model) if "cross" not in s.name and "attn2" not in s.name
    ]
    chosen = wanted[0], wanted[-1]
    where = Where(layers=[s.name for s in chosen], heads=[1])
    with torch.no_grad():
        with explicit_identity(model, {s.name: {1: 0.75} for s in chosen}):
            expected = predict(model, given)
        plain = predict(model, given)
        with attnsteer.steer(model, Nudge(where, strength=0.75)):
            steered = predict(model, given)
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-10)
    assert (steered - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["unet_sd15", "sd3", "flux"])
def test_only_selected_modules_carry_anything_during_the_forward(name: str) -> None:
    model, inputs = denoisers.build(name)
    chosen = [s for s in attnsteer.sites(model) if s.kind in ("self", "joint")][-1]
    carrying: set[str] = set()
    for module_name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, _, name=module_name: carrying.add(name) if "_steer" in module.__dict__ else None
        )
    with torch.no_grad(), attnsteer.steer(model, Nudge(Where(layers=chosen.name))):
        model(**inputs(1))
    assert carrying == {chosen.name}


@pytest.mark.parametrize("name", ["cogview4", "lumina2"])
def test_a_family_without_descriptor_takes_token_agnostic_edits_and_refuses_others_with_the_reason(name: str) -> None:
    model, inputs = denoisers.build(name)
    given = inputs(2)
    assert {site.kind for site in attnsteer.sites(model)} == {"unknown"}
    with torch.no_grad():
        plain = predict(model, given)
        with attnsteer.steer(model, Nudge(Where(layers=-1))):
            assert not torch.equal(predict(model, given), plain)
        with pytest.raises(SteeringError, match="no descriptor.*ImageNudge"):
            attnsteer.attach(model, ImageNudge(Where(layers=-1)))
        assert torch.equal(predict(model, given), plain)


def test_cross_attention_sees_the_text_keys_and_takes_a_bias_on_them() -> None:
    model, inputs = denoisers.build("unet_sd15")
    given = inputs(2)
    watch = Watch(Where(layers="*attn2"), keep=lambda call: (call.k.shape[2], call.spans.text))
    with torch.no_grad(), attnsteer.steer(model, Bias(Where(layers="*attn2")), watch) as steering:
        steered = predict(model, given)
        kept = [state["kept"] for state in steering.states(watch).values()]
    with torch.no_grad():
        assert not torch.equal(steered, predict(model, given))
    assert kept == [(denoisers.TEXT, slice(0, None))] * len(kept)
    assert len(kept) == 4


def test_a_site_that_the_model_skips_is_an_error_that_names_it() -> None:
    model, inputs = denoisers.build("sd3")
    with (
        attnsteer.steer(model, Nudge(Where(layers=2))),
        torch.no_grad(),
        pytest.raises(NotReachedError, match=r"transformer_blocks\.2\.attn"),
    ):
        model(**inputs(1), skip_layers=[2])
    assert not any("_steer" in m.__dict__ for m in model.modules())


def test_processor_classes_keep_their_signature_while_armed() -> None:
    """diffusers decides by the signature which keyword arguments a processor gets."""
    import inspect

    model, _ = denoisers.build("qwen")
    cls = type(model.transformer_blocks[0].attn.processor)
    before = inspect.signature(cls.__call__)
    with attnsteer.steer(model, Nudge(Where(layers=0))):
        assert inspect.signature(cls.__call__) == before
        assert cls.__call__.__wrapped__ is not None


def test_weights_may_differ_by_row_and_head_in_one_call() -> None:
    model, inputs = denoisers.build("flux")
    given = inputs(2)
    site = attnsteer.sites(model)[3]
    variants = [[Nudge(Where(layers=3, heads=0), 0.25)], [Nudge(Where(layers=3, heads=[1, 2]), 1.0)]]
    with torch.no_grad():
        alone = []
        for row, (processor,) in enumerate(variants):
            with attnsteer.steer(model, processor):
                alone.append(predict(model, given)[row])
        with attnsteer.attach(model, variants=variants):
            together = predict(model, given)
    assert head_weight(site, (1, 2), 1.0).tolist() == [[0.0, 1.0, 1.0]]
    assert torch.equal(together, torch.stack(alone))
