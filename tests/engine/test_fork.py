"""The fork: replaying what comes before the first perturbed site changes nothing but the work."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import Site, Where
from attnsteer.fork import forks_of
from attnsteer.hosts import denoisers as host
from attnsteer.processors import ConsistentSelfAttention, SoftPAG
from tests.tiny import denoisers, pipelines

from .common import DESCRIBED, EXACT, Loop, denoiser_of, double, latents, predict, to_double


class Scheduler:
    """The smallest scheduler there can be: one step, whose result is the model output."""

    def __init__(self) -> None:
        self.timesteps = torch.tensor([500.0])

    def set_timesteps(self, n: int) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Any = None, sample: Any = None) -> Tensor:
        return model_output


def forkable(model: nn.Module) -> list[Site]:
    return [s for s in attnsteer.sites(model) if s.kind in ("self", "joint")]


def guided(model: nn.Module, given: dict[str, Any], layers: Any, fork: bool = True) -> tuple[Tensor, Any]:
    """The guided prediction of one step, with or without the fork."""
    scheduler = Scheduler()
    with torch.no_grad(), attnsteer.steer(model, SoftPAG(Where(layers=layers)), scheduler=scheduler) as steering:
        if not fork:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("attnsteer.fork.stages_before", lambda *_: [])
                prediction = predict(model, given)
        else:
            prediction = predict(model, given)
        # rows of one lane here: no classifier-free guidance
        return scheduler.step(prediction, given["timestep"], None), steering.session


def stage_calls(model: nn.Module) -> dict[str, int]:
    """Counts that grow with every run of a top-level stage's forward."""
    counts: dict[str, int] = {}
    for name, module in host.stages(model, host.family_of(model)):
        counts[name] = 0
        module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


CASES = [(name, site.name) for name in DESCRIBED for site in forkable(denoisers.build(name)[0])]


@pytest.mark.parametrize(("name", "site"), CASES)
def test_forked_equals_unforked_at_every_site_and_runs_fewer_stages(name: str, site: str) -> None:
    model, inputs = denoisers.build(name)
    model = model.double()
    given = double(inputs(3))
    expected, session = guided(model, given, site, fork=False)
    assert session.unforked == {}
    counts = stage_calls(model)
    found, session = guided(model, given, site)
    assert session.unforked == {}
    # Wan keeps parts in float32
    tolerance = {"rtol": 0.0, "atol": 1e-6} if name == "wan" else EXACT
    torch.testing.assert_close(found, expected, **tolerance)
    stages = list(counts)
    first = next(i for i, stage in enumerate(stages) if site.startswith(stage + "."))
    assert [counts[stage] for stage in stages] == [1] * first + [2] * (len(stages) - first)
    assert not torch.equal(found, predict(model, given))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd35", "flux", "pixart", "qwen"])
def test_forked_equals_unforked_in_whole_pipelines(name: str, monkeypatch: Any) -> None:
    pipe = to_double(pipelines.build(name))
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1))) as steering:
        forked = latents(pipe, name, batch=2)
        assert steering.session.unforked == {}
        monkeypatch.setattr("attnsteer.fork.stages_before", lambda *_: [])
        whole = latents(pipe, name, batch=2)
    torch.testing.assert_close(forked, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["unet_sd15", "sd3", "flux"])
def test_forked_equals_unforked_in_inference_mode(name: str) -> None:
    """Tensors made there have no version counter; the tape keeps copies."""
    model, inputs = denoisers.build(name)
    given = inputs(2)
    expected, _ = guided(model, given, -1, fork=False)
    with torch.inference_mode():
        found, session = guided(model, given, -1)
    assert session.unforked == {}
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


# ---- rows that are perturbed in different places ---------------------------------------------------------------------
def in_rows(model: nn.Module, given: dict[str, Any], variants: list[Any], fork: bool = True) -> tuple[Tensor, Any]:
    """The guided prediction of one step with a variant in each row, with or without forks."""
    scheduler = Scheduler()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not fork:
            patch.setattr("attnsteer.fork.stages_before", lambda *_: [])
        with attnsteer.attach(model, variants=variants, scheduler=scheduler) as steering:
            return scheduler.step(predict(model, given), given["timestep"], None), steering.session


def rows_run(model: nn.Module) -> dict[str, list[int]]:
    """Grows with the rows of every run of a top-level stage."""
    rows: dict[str, list[int]] = {}
    for name, module in host.stages(model, host.family_of(model)):

        def note(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            rows[name].append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).shape[0])

        rows[name] = []
        module.register_forward_pre_hook(note, with_kwargs=True)
    return rows


@pytest.mark.parametrize("name", DESCRIBED)
def test_rows_perturbed_in_different_places_equal_whole_forwards_in_one_batch(name: str) -> None:
    model, inputs = denoisers.build(name)
    model = model.double()
    given, sites = double(inputs(5)), forkable(model)
    first, middle, last = (SoftPAG(Where(layers=sites[i].name)) for i in (0, len(sites) // 2, -1))
    variants = [last, first, None, middle, last]
    expected, _ = in_rows(model, given, variants, fork=False)
    rows = rows_run(model)
    found, session = in_rows(model, given, variants)
    assert session.unforked == {}
    assert session.extra_rows == 4
    tolerance = {"rtol": 0.0, "atol": 1e-6} if name == "wan" else EXACT
    torch.testing.assert_close(found, expected, **tolerance)
    assert torch.equal(found[2], predict(model, given)[2])
    *before, end = [sum(rows[stage][:-1]) for stage in rows]  # without the plain forward just made
    assert end == 5 + 4
    assert before[0] < 5 + 4


def test_rows_of_each_fork_run_in_one_forward_from_their_own_fork_on() -> None:
    model, inputs = denoisers.build("sd3")  # 4 stages
    given = inputs(6)
    rows = rows_run(model)
    found, session = in_rows(model, given, [SoftPAG(Where(layers=n)) if n >= 0 else None for n in (3, 1, -1, 0, 1, 3)])
    # 4 rows spared 1 stage against 3 stages, and 2 rows spared 2 stages against 1
    assert list(rows.values()) == [[6, 1], [6, 1, 2], [6, 1, 2], [6, 1, 2, 2]]
    assert session.extra_rows == 5
    for row, layer in ((0, 3), (1, 1), (3, 0)):
        alone, _ = guided(model, {k: v[row : row + 1] for k, v in given.items()}, layer)
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=2e-6)


def test_rows_whose_own_forward_would_cost_more_than_it_saves_fork_with_earlier_ones() -> None:
    model, inputs = denoisers.build("sd3")
    rows = rows_run(model)
    in_rows(model, inputs(3), [SoftPAG(Where(layers=n)) for n in (1, 2, 2)])  # 2 rows spared 1 stage against 2 stages
    assert list(rows.values()) == [[3], [3, 3], [3, 3], [3, 3]]


class Selecting:
    """A plan as far as the fork knows it."""

    def __init__(self, name: str):
        self.selection = [SimpleNamespace(name=name)]


@pytest.mark.parametrize("total", [2, 5, 24])
def test_forks_cost_no_more_than_one_and_share_no_perturbed_stage(total: int) -> None:
    """A forward costs its rows and one more in every stage that it runs."""
    stages = [(f"block.{n}", nn.Identity()) for n in range(total)]
    draw, several = random.Random(total), 0
    for _ in range(200):
        own = [draw.randrange(total) for _ in range(draw.randint(1, 9))]
        plans: list[Any] = [Selecting(f"block.{n}.attn") for n in own]
        found = [forks_of([[plan] for plan in plans], stages)[plan] for plan in plans]
        assert all(fork <= n for fork, n in zip(found, own, strict=True))
        assert min(found) == min(own)
        cost = sum((found.count(fork) + 1) * (total - fork) for fork in set(found))
        assert cost <= (len(own) + 1) * (total - min(own))
        several += len(set(found)) > 1
    assert several > 20


def test_rows_that_read_other_rows_fork_in_their_own_places() -> None:
    model, inputs = denoisers.build("sd3")
    model = model.double()
    given = double(inputs(3))
    story = ConsistentSelfAttention(Where(layers=[0, 1, 3]), frames=3)
    variants = [[story, SoftPAG(Where(layers=n))] for n in (3, 0, 2)]
    expected, _ = in_rows(model, given, variants, fork=False)
    rows = rows_run(model)
    found, session = in_rows(model, given, variants)
    torch.testing.assert_close(found, expected, **EXACT)
    assert session.unforked == {}
    assert list(rows.values()) == [[3, 1], [3, 1], [3, 1, 2], [3, 1, 2]]


# ---- what may not be replayed is computed whole ----------------------------------------------------------------------
def test_controlnet_residuals_of_a_unet_are_computed_whole() -> None:
    model, inputs = denoisers.build("unet_sd15")
    model = model.double()
    given = double(inputs(2))
    shapes = [(24, 6, 10), (24, 6, 10), (24, 3, 5), (48, 3, 5)]
    given["down_block_additional_residuals"] = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    given["mid_block_additional_residual"] = torch.randn(2, 48, 3, 5, dtype=torch.float64)
    expected, _ = guided(model, given, -1, fork=False)
    counts = stage_calls(model)
    found, session = guided(model, given, -1)
    torch.testing.assert_close(found, expected, **EXACT)
    assert session.unforked == {"down_block_additional_residuals acts between the stages": 1}
    assert set(counts.values()) == {2}


def test_controlnet_residuals_of_sd3_are_computed_whole() -> None:
    model, inputs = denoisers.build("sd3")
    model = model.double()
    given = double(inputs(2))
    given["block_controlnet_hidden_states"] = [torch.randn(2, 15, 24, dtype=torch.float64) for _ in range(2)]
    expected, _ = guided(model, given, -1, fork=False)
    found, session = guided(model, given, -1)
    torch.testing.assert_close(found, expected, **EXACT)
    assert session.unforked == {"block_controlnet_hidden_states acts between the stages": 1}
    rows = rows_run(model)
    _, session = in_rows(model, given, [SoftPAG(Where(layers=0)), SoftPAG(Where(layers=3))])
    assert session.unforked == {"block_controlnet_hidden_states acts between the stages": 1}
    assert list(rows.values()) == [[2, 2]] * 4


def test_a_controlnet_pipeline_is_guided_and_computed_whole(monkeypatch: Any) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = to_double(pipelines.build("sd15"))
    net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=False)
    for parameter in net.parameters():  # they start at zero
        nn.init.normal_(parameter, std=0.05)
    control = StableDiffusionControlNetPipeline(
        **{k: v for k, v in pipe.components.items() if k != "image_encoder"},
        controlnet=net.double().eval(),
        requires_safety_checker=False,
    )
    control.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, pipelines.HEIGHT, pipelines.WIDTH, dtype=torch.float64)
    plain = latents(control, "sd15", image=image)
    with attnsteer.steer(control, SoftPAG(Where(layers=-1))) as steering:
        found = latents(control, "sd15", image=image)
        assert steering.session.unforked == {"down_block_additional_residuals acts between the stages": 3}
    assert not torch.equal(found, plain)
    assert torch.equal(latents(control, "sd15", image=image), plain)


@pytest.mark.parametrize(
    ("inference", "reasons"), [(False, {"the model changed the output of a stage in place": 3}), (True, {})]
)
def test_freeu_changes_stage_outputs_in_place_and_is_computed_whole(inference: bool, reasons: dict[str, int]) -> None:
    """In inference mode the tape holds copies, which nobody can change."""
    pipe = to_double(pipelines.build("sd15"))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    method = SoftPAG(Where(layers="up_blocks.1*attn1"))
    with attnsteer.steer(pipe, method) as steering, torch.inference_mode(inference):
        found = latents(pipe, "sd15")
        assert steering.session.unforked == reasons
    with attnsteer.steer(pipe, method), pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnsteer.fork.stages_before", lambda *_: [])
        expected = latents(pipe, "sd15")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_offloading_hooks_on_the_stages_are_computed_whole() -> None:
    from accelerate import cpu_offload

    model, inputs = denoisers.build("sd3")
    given = inputs(2)
    expected, _ = guided(model, given, -1, fork=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found, session = guided(model, given, -1)
    assert torch.equal(found, expected)
    assert session.unforked == {"offloading or caching hooks sit on the stages": 1}


def test_the_first_layer_has_nothing_before_it_and_that_is_no_failure() -> None:
    model, inputs = denoisers.build("flux")
    _, session = guided(model, inputs(1), 0)
    assert session.unforked == {}
    assert session.extra_rows == 1


def test_an_earlier_step_leaves_no_tape_behind() -> None:
    pipe = pipelines.build("sd3")
    loop = Loop(pipe)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1))) as steering:
        latents(pipe, "sd3", cfg=False)
        assert steering.session._forward is None
    assert len(loop.outputs) == 3
    assert denoiser_of(pipe) is pipe.transformer
