"""Latent updates: the loop by itself, and through the pipelines of every family that it knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import Where
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, descend
from attnsteer.processors import AStar, AttendAndExcite, Conform, DivideAndBind, Focus, SoftPAG, SynGen
from tests.engine.common import Loop, denoiser_of, difference, state_of, to_double
from tests.nursed import LEVEL, PROMPTS, WORDS, astar, generate
from tests.tiny import pipelines

SMALL = {"sd15": 1e-7, "sdxl": 1e-7, "sd3": 1e-7, "sd35": 1e-7, "flux": 3e-4}
"""Steps small enough for the first order. FLUX turns queries and keys in float32 also in a float64 model, so that its
losses are rounded to about 1e-8 and a step must be larger to be seen."""


def methods(name: str, **given: Any) -> list[Any]:
    """Every method that acts on a family, by default with small steps."""
    size = {"scale_factor": SMALL[name], "level": LEVEL[name], "subjects": WORDS, **given}
    found: list[Any] = [AStar(**size), AttendAndExcite(**size, thresholds={}), SynGen(**size)]
    found += [DivideAndBind(**size, thresholds={}), Conform(**size, refine_steps=())]
    if name in ("sd3", "sd35", "flux"):
        found.append(Focus(subjects=WORDS, scale=size["scale_factor"], control="latent"))
    return found


# ---- the loop by itself ----------------------------------------------------------------------------------------------
def bowl(job: Nursing, rows: int = 1) -> tuple[list[list[float]], Any]:
    """An ``evaluate`` with the loss ``z^2 / 2`` of each row; presence is 10 - |z|."""
    seen: list[list[float]] = [[] for _ in range(rows)]

    def evaluate(z: Tensor, which: Sequence[int]) -> tuple[list[Slope], Tensor]:
        for row, value in zip(which, z.flatten().tolist(), strict=True):
            seen[row].append(value)
        return [Slope(0.5 * v**2, 10 - v.abs()) for v in z.flatten()], z.clone()

    return seen, evaluate


def job(**given: Any) -> Nursing:
    return Nursing(groups=(("x",),), loss=lambda *_: Slope(torch.zeros(())), step_size=lambda at: 0.5, **given)


def test_one_update_without_refinement() -> None:
    seen, evaluate = bowl(job())
    latent, _ = descend(torch.tensor([[8.0]]), [job()], evaluate, Moment(0, 50))
    assert latent.item() == 4
    assert seen == [[8.0]]


def test_refinement_looks_before_it_moves_and_so_makes_one_update_more() -> None:
    seen, evaluate = bowl(job())
    patient = job(refine={0: 7.0})  # |z| at most 3
    latent, slopes = descend(torch.tensor([[8.0]]), [patient], evaluate, Moment(0, 50))
    assert seen == [[8.0, 4.0, 2.0, 1.0]]  # 2 was enough, 1 is the extra one
    assert latent.item() == 0.5  # and the update of the step
    assert float(slopes[0].presence) == 9


def test_refinement_has_an_end_and_goes_on_without_presence() -> None:
    seen, evaluate = bowl(job())
    latent, _ = descend(torch.tensor([[8.0]]), [job(refine={0: 99.0}, rounds=lambda i: 3)], evaluate, Moment(0, 50))
    assert seen == [[8.0, 4.0, 2.0, 1.0]]

    def blind(z: Tensor, which: Sequence[int]) -> tuple[list[Slope], Tensor]:
        slopes, gradient = evaluate(z, which)
        return [slope._replace(presence=None) for slope in slopes], gradient

    latent, _ = descend(torch.tensor([[8.0]]), [job(refine={0: 0.0}, rounds=lambda i: 2)], blind, Moment(0, 50))
    assert latent.item() == 1


def test_nothing_happens_at_other_steps_and_after_the_end() -> None:
    _, evaluate = bowl(job())
    over = job(refine={0: 99.0}, stop=5)
    assert not over.acts(Moment(5, 50))
    assert over.acts(Moment(4, 50))
    latent, _ = descend(torch.tensor([[8.0]]), [over], evaluate, Moment(4, 50))
    assert latent.item() == 4


def test_a_loss_of_zero_leaves_the_latent_and_ends_the_refinement() -> None:
    seen, evaluate = bowl(job())
    start = torch.tensor([[-0.0]])
    latent, _ = descend(start, [job(refine={0: 99.0})], evaluate, Moment(0, 50))
    assert math.copysign(1, latent.item()) == -1
    assert seen == [[-0.0]]


def test_rows_refine_as_long_as_each_needs_and_end_as_alone() -> None:
    starts, jobs = [8.0, 1.0, 64.0], [job(refine={0: 7.0}), job(refine={0: 7.0}), job(refine={0: 7.0}, stop=0)]
    seen, evaluate = bowl(jobs[0], 3)
    latent, slopes = descend(torch.tensor(starts)[:, None], jobs, evaluate, Moment(0, 50))
    for row, (start, one) in enumerate(zip(starts, jobs, strict=True)):
        alone, each = bowl(one)
        solo, own = descend(torch.tensor([[start]]), [one], each, Moment(0, 50))
        assert latent[row].item() == solo.item()
        assert seen[row] == alone[0]
        assert slopes[row].presence == own[0].presence


# ---- gradients through pipelines -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probe(AStar):
    """Runs another method's loss, twice in the first step: before and after one small update."""

    inner: Any = None
    seen: Any = None

    def nursing(self) -> Nursing:
        given = self.inner.nursing()

        def loss(views: Sequence[TokenMaps], memory: Any, at: Moment) -> Slope:
            slope = given.loss(views, memory, at)
            self.seen.append(float(slope.loss.detach()))
            return slope._replace(presence=None)

        return replace(given, loss=loss, refine={0: 1.0}, rounds=lambda i: 1, stop=-1)

    def where_for(self, sites: Any) -> Where:
        return self.inner.where_for(sites)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd35", "flux"])
def test_a_small_step_lowers_every_loss_as_much_as_its_gradient_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second loss is that of a new forward at ``x - s g``; to first order it is lower by ``s |g|^2``."""
    from diffusers.models.normalization import RMSNorm

    def normalise(self: Any, x: Tensor) -> Tensor:  # diffusers rounds to float32 in between, also in float64 models
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", normalise)
    pipe = to_double(pipelines.build(name))
    for method in methods(name):
        seen: list[float] = []
        inputs: list[Tensor] = []
        probe = Probe(subjects=WORDS, inner=method, seen=seen)
        with attnsteer.attach(pipe, probe) as steering:
            nurse = steering.session._nurse
            carried = nurse._carried

            def note(update: Any, sample: Tensor, carried: Any = carried, inputs: Any = inputs) -> Tensor:
                inputs.append(update.after - update.before)
                return carried(update, sample)

            nurse._carried = note
            generate(pipe, name, PROMPTS[0], steps=1)
        size = method.nursing().step_size(Moment(0, 1))
        expected = float((inputs[0] ** 2).sum()) / size
        assert seen[1] < seen[0], type(method).__name__
        assert seen[0] - seen[1] == pytest.approx(expected, rel=3e-2 if name == "flux" else 1e-3), type(method).__name__


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_every_method_changes_the_picture_and_leaves_nothing_behind(name: str) -> None:
    pipe = pipelines.build(name)
    for weight in list(denoiser_of(pipe).parameters())[::2]:
        weight.requires_grad_(True)
    wanted = [p.requires_grad for p in denoiser_of(pipe).parameters()]
    plain = generate(pipe, name)
    before, attributes = state_of(denoiser_of(pipe), scheduler=pipe.scheduler), set(vars(pipe))
    for method in methods(name, scale_factor=5.0):
        with attnsteer.attach(pipe, method):
            steered = generate(pipe, name)
        assert torch.isfinite(steered).all()
        assert (steered - plain).abs().max() > 1e-4, type(method).__name__
        after = state_of(denoiser_of(pipe), scheduler=pipe.scheduler)
        assert difference(before, after) == []
        assert set(vars(pipe)) == attributes
        assert [p.requires_grad for p in denoiser_of(pipe).parameters()] == wanted
        assert all(p.grad is None for p in denoiser_of(pipe).parameters())
    assert torch.equal(generate(pipe, name), plain)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_strength_zero_and_no_steps_are_the_plain_model_bit_for_bit_with_its_random_state(name: str) -> None:
    pipe = pipelines.build(name)
    torch.manual_seed(5)
    plain, state = generate(pipe, name), torch.get_rng_state()
    late = AttendAndExcite(subjects=("dog",), level=LEVEL[name], max_iter_to_alter=0, thresholds={40: 0.5})
    for method in (astar(name, scale_factor=0.0), astar(name, seg_weight=0.0, ret_weight=0.0), late):
        torch.manual_seed(5)
        with attnsteer.attach(pipe, method):
            assert torch.equal(generate(pipe, name), plain)
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    with attnsteer.attach(pipe, astar(name)):
        assert not torch.equal(generate(pipe, name), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_retention_alone_does_nothing_in_the_first_step() -> None:
    pipe = pipelines.build("sd15")
    plain = generate(pipe, "sd15", steps=1), generate(pipe, "sd15", steps=2)
    with attnsteer.attach(pipe, astar("sd15", seg_weight=0.0, where=Where(steps=[0]))):
        assert torch.equal(generate(pipe, "sd15", steps=1), plain[0])
    with attnsteer.attach(pipe, astar("sd15", seg_weight=0.0)):
        assert not torch.equal(generate(pipe, "sd15", steps=2), plain[1])


def test_a_layout_acts_from_the_first_step_on() -> None:
    pipe = pipelines.build("sd15")
    plain = generate(pipe, "sd15", steps=1)
    layout = torch.stack([torch.ones(4, 6), torch.ones(4, 6)])
    layout[0, :, 3:] = layout[1, :, :3] = 0
    with attnsteer.attach(pipe, astar("sd15", seg_weight=0.0, layout=layout)):
        assert not torch.equal(generate(pipe, "sd15", steps=1), plain)


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_rows_are_as_alone_and_permute(name: str) -> None:
    pipe = to_double(pipelines.build(name))
    refining = AttendAndExcite(subjects=("dog",), level=LEVEL[name], scale_factor=1.0, max_refinement_steps=3)
    for method in (refining, Conform(subjects=WORDS, level=LEVEL[name], scale_factor=1.0, max_refinement_steps=1)):
        with attnsteer.attach(pipe, method):
            both = generate(pipe, name, PROMPTS[:2])
            swapped = generate(pipe, name, PROMPTS[:2][::-1], seeds=(1, 0))
            alone = [generate(pipe, name, PROMPTS[r], seeds=(r,)) for r in (0, 1)]
        torch.testing.assert_close(both.flip(0), swapped, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cfg", [True, False])
def test_variants_differ_by_row_and_plain_rows_keep_their_bits(cfg: bool) -> None:
    pipe = pipelines.build("sd15")
    prompts, seeds = [PROMPTS[0]] * 4, (3, 3, 3, 3)  # equal latents: nothing but the variants tells rows from lanes
    plain = generate(pipe, "sd15", prompts, seeds=seeds, cfg=cfg)
    variants = [[], [astar("sd15")], [astar("sd15", scale_factor=0.0)], [SynGen(subjects=WORDS, level=0)]]
    with attnsteer.attach(pipe, variants=variants):
        mixed = generate(pipe, "sd15", prompts, seeds=seeds, cfg=cfg)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    for row in (1, 3):
        assert not torch.equal(mixed[row], plain[row])
        with attnsteer.attach(pipe, *variants[row]):
            alone = generate(pipe, "sd15", prompts[:1], seeds=seeds[:1], cfg=cfg)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_several_pictures_of_a_prompt() -> None:
    pipe = to_double(pipelines.build("sd15"))
    with attnsteer.attach(pipe, astar("sd15")):
        two = generate(pipe, "sd15", PROMPTS[:2], seeds=(0, 1, 2, 3), num_images_per_prompt=2)
        four = generate(pipe, "sd15", [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2)
    torch.testing.assert_close(two, four, rtol=1e-9, atol=1e-9)


# ---- what the pipeline sees ------------------------------------------------------------------------------------------
def inputs_of(pipe: Any, name: str, method: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The latents of the denoiser's ordinary calls, and the samples that the scheduler steps."""
    calls: list[Tensor] = []
    model = denoiser_of(pipe)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        latent = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        if not torch.is_grad_enabled():
            calls.append(latent.clone())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    samples: list[Tensor] = []
    step = pipe.scheduler.step

    def keep(model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
        samples.append(sample.clone())
        return step(model_output, timestep, sample, **rest)

    pipe.scheduler.step = keep
    try:
        with attnsteer.attach(pipe, method):
            generate(pipe, name, PROMPTS[0], steps=2)
    finally:
        handle.remove()
        del pipe.scheduler.step
    return calls, samples


def test_all_lanes_and_the_scheduler_get_the_new_latent() -> None:
    for name, calls_per_step in (("sd15", 1), ("sd3", 1), ("flux", 2)):
        calls, samples = inputs_of(pipelines.build(name), name, astar(name))
        assert len(calls) == 2 * calls_per_step
        for index, sample in enumerate(samples):
            for latent in calls[index * calls_per_step : (index + 1) * calls_per_step]:
                for row in latent:
                    assert torch.equal(row, sample[0])


def test_scaled_inputs_move_by_the_factor_that_the_scheduler_divides_by() -> None:
    pipe = to_double(pipelines.build("sdxl"))
    calls, samples = inputs_of(pipe, "sdxl", astar("sdxl", scale_factor=0.5))
    for index, sample in enumerate(samples):
        scale = 1 / (float(pipe.scheduler.sigmas[index]) ** 2 + 1) ** 0.5
        torch.testing.assert_close(calls[index][1:], (sample * scale).double(), rtol=1e-6, atol=1e-6)


def test_the_gradient_pass_stops_at_the_last_site_that_is_read() -> None:
    pipe = pipelines.build("sd3")
    ran: list[tuple[int, bool]] = []
    for i, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append((i, torch.is_grad_enabled())))
    with attnsteer.attach(pipe, astar("sd3", where=Where(layers=[1]))) as steering:
        generate(pipe, "sd3", steps=1)
        assert steering.session._nurse.passes == 1
    assert ran == [(0, True), (0, False), (1, False), (2, False), (3, False)]


def test_guidance_starts_from_the_new_latent() -> None:
    """With heads perturbed at strength 0 in effect nothing but the update is left; both together differ from either."""
    pipe = pipelines.build("sd15")
    guide = SoftPAG(Where(layers=[0]), strength=0.7, scale=2.0)
    with attnsteer.attach(pipe, astar("sd15")):
        updated = generate(pipe, "sd15")
    with attnsteer.attach(pipe, astar("sd15"), replace(guide, scale=1e-9)):
        nearly = generate(pipe, "sd15")
    with attnsteer.attach(pipe, astar("sd15"), guide):
        both = generate(pipe, "sd15")
    torch.testing.assert_close(updated, nearly, rtol=1e-4, atol=1e-4)
    assert (both - updated).abs().max() > 1e-3


def test_the_velocity_is_pushed_down_the_slope() -> None:
    """FOCUS adds ``lambda c dL/dx`` to the prediction; the step of the scheduler has a negative factor."""
    pipe = to_double(pipelines.build("sd3"))
    plain, seen = generate(pipe, "sd3", PROMPTS[0], steps=1), []
    loop = Loop(pipe)
    generate(pipe, "sd3", PROMPTS[0], steps=1)
    method = Focus(subjects=WORDS, scale=1e-6)
    with attnsteer.attach(pipe, method) as steering:
        pushed = generate(pipe, "sd3", PROMPTS[0], steps=1)
        assert steering.session._nurse.passes == 1
    loop.remove()
    added = loop.outputs[1] - loop.outputs[0]
    sigma = float(pipe.scheduler.sigmas[0])
    torch.testing.assert_close(pushed - plain, -sigma * added, rtol=1e-5, atol=1e-12)
    probe = Probe(subjects=WORDS, inner=Focus(subjects=WORDS, scale=1e-4, control="latent"), seen=seen)
    moves: list[Tensor] = []
    with attnsteer.attach(pipe, probe) as steering:
        carried = steering.session._nurse._carried
        steering.session._nurse._carried = lambda u, x: (moves.append(u.after - u.before), carried(u, x))[1]
        generate(pipe, "sd3", PROMPTS[0], steps=1)
    gain = method.nursing().velocity(Moment(0, 1, loop.timesteps[0]))
    torch.testing.assert_close(added, -moves[0] / 1e-4 * gain, rtol=1e-6, atol=1e-12)
