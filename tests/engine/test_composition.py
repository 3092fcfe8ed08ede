"""What else people put on their pipelines: it works with steering, whichever comes first, and gives the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import Where
from attnsteer.processors import SoftPAG
from tests.tiny import denoisers, pipelines

from .common import (
    Loop,
    Nudge,
    Reference,
    Watch,
    choice,
    denoiser_of,
    difference,
    double,
    explicit_identity,
    latents,
    predict,
    state_of,
    to_double,
)

ORDERS = pytest.mark.parametrize("first", ["attach", "adapt"])
"""What happens first: attaching, or adapting the model."""


def steered_either_way(
    pipe: Any, name: str, adapt: Callable[[], None], first: str, method: SoftPAG, **options: Any
) -> Tensor:
    """The result of a steered run, the model being adapted before or after attaching."""
    if first == "adapt":
        adapt()
    with attnsteer.steer(pipe, method):
        if first == "attach":
            latents(pipe, name, **{k: v for k, v in options.items() if k != "ip_adapter_image_embeds"})
            adapt()
        return latents(pipe, name, **options)


def by_hand(pipe: Any, name: str, strength: dict[str, dict[int, float]], **options: Any) -> Tensor:
    reference = Reference(pipe, strength, w=2.0)
    try:
        return latents(pipe, name, **options)
    finally:
        reference.remove()


# ---- adapters --------------------------------------------------------------------------------------------------------
def add_lora(model: Any, seed: int = 0) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False), "style")
    model.to(torch.float64)


@ORDERS
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_lora(name: str, first: str) -> None:
    pipe = to_double(pipelines.build(name))
    model = denoiser_of(pipe)
    where, strength = choice(pipe)
    plain = latents(pipe, name, steps=2)
    found = steered_either_way(
        pipe, name, lambda: add_lora(model), first, SoftPAG(where, strength=0.75, scale=2.0), steps=2
    )
    torch.testing.assert_close(found, by_hand(pipe, name, strength, steps=2), rtol=1e-9, atol=1e-9)
    adapted = latents(pipe, name, steps=2)
    assert (adapted - plain).abs().max() > 1e-3
    assert (found - adapted).abs().max() > 1e-3
    model.disable_adapters()
    assert torch.equal(latents(pipe, name, steps=2), plain)


def ip_adapter(unet: Any, width: int = 12, tokens: int = 4) -> dict[str, Any]:
    """A random IP-Adapter in the layout of the published checkpoints."""
    noise = denoisers.Noise(0)
    text = unet.config.cross_attention_dim
    projection = {
        "proj.weight": noise(tokens * text, width),
        "proj.bias": noise(tokens * text),
        "norm.weight": 1 + noise(text),
        "norm.bias": noise(text),
    }
    weights = {}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(cross):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{part}.weight"] = 0.3 * noise(hidden, text)
    return {"image_proj": projection, "ip_adapter": weights}


@ORDERS
def test_ip_adapter(first: str) -> None:
    pipe = to_double(pipelines.build("sd15"))
    where, strength = choice(pipe)
    plain = latents(pipe, "sd15", steps=2)
    embeds = [denoisers.Noise(1)(2, 1, 12).double()]  # unconditional and conditional

    def adapt() -> None:
        pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
        pipe.unet.double()

    options = {"steps": 2, "ip_adapter_image_embeds": embeds}
    found = steered_either_way(pipe, "sd15", adapt, first, SoftPAG(where, strength=0.75, scale=2.0), **options)
    torch.testing.assert_close(found, by_hand(pipe, "sd15", strength, **options), rtol=1e-9, atol=1e-9)
    adapted = latents(pipe, "sd15", **options)
    assert (adapted - plain).abs().max() > 1e-3
    assert (found - adapted).abs().max() > 1e-3
    pipe.unload_ip_adapter()
    assert torch.equal(latents(pipe, "sd15", steps=2), plain)


@ORDERS
def test_ip_adapter_calls_the_kernel_twice_and_the_text_call_is_ours(first: str) -> None:
    pipe = pipelines.build("sd15")
    watch = Watch(Where(layers="*attn2"), keep=lambda call: call.k.shape[2])

    def adapt() -> None:
        pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)

    if first == "adapt":
        adapt()
    with attnsteer.steer(pipe, watch) as steering:
        if first == "attach":
            adapt()
        latents(pipe, "sd15", steps=2, ip_adapter_image_embeds=[denoisers.Noise(1)(2, 1, 12)])
        states = list(steering.states(watch).values())
    assert [(state["calls"], state["kept"]) for state in states] == [(2, pipelines.MAX_TEXT)] * 4


# ---- projections, backends, precision --------------------------------------------------------------------------------
@ORDERS
@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_fused_projections(name: str, first: str) -> None:
    pipe = to_double(pipelines.build(name))
    where, strength = choice(pipe)
    model = denoiser_of(pipe)
    before = {name: type(p) for name, p in model.attn_processors.items()}
    method = SoftPAG(where, strength=0.75, scale=2.0)
    with attnsteer.steer(pipe, method):
        expected = latents(pipe, name, steps=2)
    found = steered_either_way(pipe, name, model.fuse_qkv_projections, first, method, steps=2)
    tolerance = 1e-4 if name == "wan" else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    fused = by_hand(pipe, name, strength, steps=2)
    torch.testing.assert_close(found, fused, rtol=tolerance, atol=tolerance)
    if name != "wan":
        model.unfuse_qkv_projections()
    assert {name: type(p) for name, p in model.attn_processors.items()} == before


@ORDERS
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in ("flux", "qwen", "wan") for backend in ("native", "_native_math")]
    + [("flux", "flex"), ("wan", "flex")],  # qwen's 2-D key mask is taken for a query mask by diffusers there
)
def test_attention_backends(name: str, backend: str, first: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    pipe = pipelines.build(name)
    method = SoftPAG(choice(pipe)[0], strength=0.75, scale=2.0)
    with attnsteer.steer(pipe, method):
        expected = latents(pipe, name, steps=1)
    default = Registry.get_active_backend()
    try:
        set_backend = lambda: pipe.transformer.set_attention_backend(backend)  # noqa: E731
        found = steered_either_way(pipe, name, set_backend, first, method, steps=1)
        assert Registry.get_active_backend()[0] == AttentionBackendName(backend)  # the user's choice stays
    finally:
        Registry.set_active_backend(default[0])
    # Measured 2e-6: other kernels add in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert Registry.get_active_backend() == default


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen"])
def test_bfloat16(name: str) -> None:
    pipe = pipelines.build(name)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16)
    where, strength = choice(pipe)
    plain = latents(pipe, name, steps=1)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.0)):
        assert torch.equal(latents(pipe, name, steps=1), plain)
    loop = Loop(pipe)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        latents(pipe, name, steps=1)
    loop.remove()
    reference = Reference(pipe, strength, w=2.0)
    latents(pipe, name, steps=1)
    found, expected = loop.outputs[0], reference.outputs[0]
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits: measured up to 3 units in the last place of the largest value.
    assert (found - expected).abs().max() <= 2**-5 * expected.abs().max()
    assert torch.isfinite(found).all()


# ---- offloading ------------------------------------------------------------------------------------------------------
def accelerate_offload(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def group_offload(kind: str) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        from diffusers.hooks import apply_group_offloading

        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **more)

    return apply


OFFLOADS = {
    "accelerate": accelerate_offload,
    "leaf_level": group_offload("leaf_level"),
    "block_level": group_offload("block_level"),
}


@ORDERS
@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_offloading(name: str, kind: str, first: str) -> None:
    pipe = to_double(pipelines.build(name))
    model = denoiser_of(pipe)
    where, _ = choice(pipe)
    method = SoftPAG(where, strength=0.75, scale=2.0)
    with attnsteer.steer(pipe, method):
        expected = latents(pipe, name, steps=2)
    plain = latents(pipe, name, steps=2)
    found = steered_either_way(pipe, name, lambda: OFFLOADS[kind](model), first, method, steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # leaving does not take the offloading away
    hooked = [m for m in model.modules() if hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook")]
    assert hooked
    assert torch.equal(latents(pipe, name, steps=2), plain)


# ---- gradients -------------------------------------------------------------------------------------------------------
def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["unet_sd15", "sd3", "flux", "qwen", "wan", "pixart"])
def test_gradients_of_a_plain_edit_with_and_without_checkpointing_equal_the_explicit_map(
    name: str, inside: bool
) -> None:
    """Checkpointing computes the blocks again in the backward pass, which may come after detaching."""
    model, inputs = denoisers.build(name)
    model = model.double().requires_grad_().train()
    given = double(inputs(2))
    where, strength = choice(model)
    method = Nudge(where, strength=0.75)

    def explicit() -> Tensor:
        with explicit_identity(model, strength):
            return predict(model, given).square().sum()

    def steered() -> Tensor:
        with attnsteer.steer(model, method):
            return predict(model, given).square().sum()

    def steered_throughout() -> dict[str, Tensor]:
        with attnsteer.steer(model, method):
            return gradients(model, lambda: predict(model, given).square().sum())

    expected = gradients(model, explicit)
    plain = gradients(model, lambda: predict(model, given).square().sum())
    model.enable_gradient_checkpointing()
    before = state_of(model)
    found = steered_throughout() if inside else gradients(model, steered)
    assert found.keys() == expected.keys()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "wan" else {"rtol": 1e-8, "atol": 1e-8}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance)
    assert any((plain[key] - expected[key]).abs().max() > 1e-4 for key in expected)
    assert difference(before, state_of(model)) == []


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ["unet_sd15", "sd3", "flux"])
def test_gradients_through_guidance_equal_two_whole_forwards(name: str, checkpointing: bool) -> None:
    from .test_fork import Scheduler

    model, inputs = denoisers.build(name)
    model = model.double().requires_grad_().train()
    given = double(inputs(2))
    site = [s for s in attnsteer.sites(model) if s.kind in ("self", "joint")][-1]

    def explicit() -> Tensor:
        cond = predict(model, given)
        with explicit_identity(model, {site.name: {0: 0.5, 1: 0.5, 2: 0.5}}):
            perturbed = predict(model, given)
        return (cond + 2.0 * (cond - perturbed)).square().sum()

    expected = gradients(model, explicit)
    if checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = Scheduler()

    def steered() -> Tensor:
        method = SoftPAG(Where(layers=site.name), strength=0.5, scale=2.0)
        with attnsteer.steer(model, method, scheduler=scheduler) as steering:
            guided = scheduler.step(predict(model, given))
            assert steering.session.unforked == {}
            return guided.square().sum()

    found = gradients(model, steered)
    assert found.keys() == expected.keys()
    # FLUX rotates in float32 whatever it is cast to, so gradients add up in another order there.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if name == "flux" else {"rtol": 1e-8, "atol": 1e-10}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance)
