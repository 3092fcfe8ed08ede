"""The gradient pass of latent updates, and the updated latent on its way through a pipeline.

Before the first forward of a step the conditional rows run once more with gradient on the latent alone: weights frozen,
compiled parts eager, stopped at the last site that is read. The new latent then replaces the input of every forward of
the step, in all its lanes, and the sample that ``scheduler.step`` gets. Schedulers may scale the model's input,
``x_in = c x``; the step is made in ``x_in``, which is ``s / c^2`` times the gradient in ``x``, and carried back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NotReachedError, SteeringError
from ..lanes import cfg_lanes
from ..logits import compute_dtype
from ..nursing import Moment, Nursing, descend, redirected
from ..scheduler import Plan, Rows, row_of
from . import denoisers
from .base import Call, copy_nest, named_inputs, unwrap
from .gradient import BindingsOf, Forward, GradientPass
from .prompts import LAYOUTS, PromptWatch

WARM_UPS = 2
"""Calls of the denoiser on other latents that may come before a run (a probe, a warm-up) without a step between."""
LOSES_UPDATES = {
    "UniPCMultistepScheduler": "its corrector starts from the sample that it made itself",
    "SASolverScheduler": "its corrector starts from the sample that it made itself",
    "HeunDiscreteScheduler": "its second evaluations start from the sample of the first",
    "FlowMatchHeunDiscreteScheduler": "its second evaluations start from the sample of the first",
    "KDPM2DiscreteScheduler": "its second evaluations start from the sample of the first",
    "KDPM2AncestralDiscreteScheduler": "its second evaluations start from the sample of the first",
    "DPMSolverSDEScheduler": "its second evaluations start from the sample of the first",
    "DPMSolverSinglestepScheduler": "its second evaluations start from the sample of the first",
}
"""Schedulers that drop the sample they are given in many steps, and why. PNDM does so in its second step alone."""


@dataclass(eq=False)
class _Update:
    """The step in progress: the model's input of every picture before and after, and what goes to the prediction."""

    index: int
    before: Tensor
    after: Tensor
    push: Tensor | None

    @property
    def moved(self) -> Tensor:
        """Which rows moved, bool ``(R, 1, ...)``."""
        changed = (self.before != self.after).flatten(1).any(dim=1)
        return changed.view(-1, *[1] * (self.before.dim() - 1))


class Nurse:
    """Latent updates of one attachment.

    Args:
        rows: the plans of every row.
        pipe: the pipeline, where there is one: its prompts are watched.
        bindings: the edits in force on conditional rows.
        parts: ``model -> `` order of the lanes in a guided batch.
    """

    def __init__(
        self,
        rows: Rows,
        pipe: Any,
        bindings: BindingsOf,
        parts: Callable[[torch.nn.Module], tuple[str, ...]],
    ):
        self._rows, self._pipe, self._bindings, self._parts = rows, pipe, bindings, parts
        self.watch: PromptWatch | None = None
        self._update: _Update | None = None
        self._unused = 0
        self._memory: dict[tuple[int, int], Any] = {}
        self.passes = 0  # gradient passes so far

    # ---- lifecycle ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        if self._pipe is not None and any(plan.nursing for row in self._rows for plan in row):
            self.watch = PromptWatch(self._pipe)

    def begin(self) -> None:
        """A run begins."""
        self._update = None
        self._memory.clear()

    def denoising(self) -> None:
        """The denoiser is called."""
        if self.watch:
            self.watch.denoising()

    def stop(self) -> None:
        self.begin()
        if self.watch:
            self.watch.detach()
            self.watch = None

    # ---- the step ----------------------------------------------------------------------------------------------------
    def before(
        self, model: torch.nn.Module, call: Call, args: Any, kwargs: Any, active: Rows, moment: Moment
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a denoiser call with the updated latent in them; computed at the first call of a step."""
        family = denoisers.family_of(model)
        assert family is not None
        inputs = named_inputs(model, args, kwargs)
        given = denoisers.sample_of(family, inputs)
        update = self._update
        if update is None or update.index != moment.index or not _same(given, update.before):
            self._count(update)
            samples = self._samples(model, given)
            first = cfg_lanes(given.shape[0], samples, self._parts(model))["cond"].rows.start
            forward = Forward(model, family, call, copy_nest(inputs), samples, first)
            update = self._update = self._nurse(forward, active, moment)
        if update is None:
            return args, kwargs
        times = given.shape[0] // update.before.shape[0]
        spread = (times, *[1] * (given.dim() - 1))
        latent = torch.where(update.moved.repeat(spread), update.after.repeat(spread), given)
        return (), {**inputs, family.rows[0]: latent}

    def _count(self, pending: _Update | None) -> None:
        """Updates that no step of the scheduler followed.

        Raises:
            NotReachedError: where somebody else's scheduler steps, so that they would be lost without a word.
        """
        self._unused = 0 if pending is None else self._unused + 1
        if self._unused > WARM_UPS:
            raise NotReachedError(
                f"The latent was updated {self._unused + 1} times while the attached scheduler made no step: attach to "
                "the pipeline (or pass the scheduler) that runs."
            )

    def at_step(self, model_output: Tensor, sample: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the scheduler gets: the prediction with the velocity control, and the sample that was predicted from."""
        update, self._update = self._update, None
        if update is None:
            return model_output, sample
        if sample is None or sample.shape != update.before.shape:
            raise SteeringError(
                f"The scheduler steps latents of shape {None if sample is None else tuple(sample.shape)}, the denoiser "
                f"got {tuple(update.before.shape)}: latent updates are not available for a pipeline that adds to the "
                "denoiser's input or reshapes in between."
            )
        if update.push is not None:
            pushed = (model_output.to(update.push.dtype) + update.push).to(model_output.dtype)
            touched = (update.push != 0).flatten(1).any(dim=1).view(-1, *[1] * (sample.dim() - 1))
            model_output = torch.where(touched, pushed, model_output)
        return model_output, self._carried(update, sample)

    def _carried(self, update: _Update, sample: Tensor) -> Tensor:
        """The update in the scheduler's space: ``x + (x_in' - x_in) / c``."""
        if torch.equal(update.before, sample):
            return torch.where(update.moved, update.after, sample)
        wide = compute_dtype(sample)
        x_in, x = update.before.to(wide), sample.to(wide)
        factor = (x_in * x).sum() / (x * x).sum()
        if float((x_in - factor * x).norm()) > 0.02 * float(x_in.norm()):
            raise SteeringError(
                "The denoiser's input is no multiple of the scheduler's sample: latent updates are not available for "
                "a pipeline that changes the latents in between."
            )
        shifted = (x + (update.after.to(wide) - x_in) / factor).to(sample.dtype)
        return torch.where(update.moved, shifted, sample)

    def _samples(self, model: torch.nn.Module, given: Tensor) -> int:
        """How many pictures a call is about. Both branches of a guided batch hold the same latents."""
        known = self.watch.samples if self.watch else None
        if known is not None:
            return known
        if len(self._rows) > 1:
            return len(self._rows)
        count, parts = given.shape[0], len(self._parts(model))
        chunks = given.chunk(parts)
        return count // parts if count % parts == 0 and all(torch.equal(chunks[0], c) for c in chunks[1:]) else count

    def _nurse(self, forward: Forward, active: Rows, moment: Moment) -> _Update | None:
        """Refine and update every picture whose plan acts now."""
        plans = {r: plan for r in range(forward.samples) if (plan := _acting(active, r, forward.samples, moment))}
        if not plans:
            return None
        gradient = GradientPass(forward, self._bindings, self.watch, moment, plans, self._memory)
        before = forward.sample[forward.first : forward.first + forward.samples].clone()
        inside = torch.tensor(list(plans), device=before.device)
        with gradient.ready():
            jobs = [plan.nursing for plan in plans.values() if plan.nursing]
            latent, slopes = descend(before.detach().index_select(0, inside).clone(), jobs, gradient, moment)
        for (row, plan), slope in zip(plans.items(), slopes, strict=True):
            self._memory[id(plan), row] = slope.memory
        self.passes += gradient.count
        push = _push(jobs, gradient.last, before, inside, moment)
        return _Update(moment.index, before, before.index_copy(0, inside, latent.to(before.dtype)), push)


def _acting(active: Rows, row: int, samples: int, moment: Moment) -> Plan | None:
    found = [p for p in row_of(active, row, samples) if p.nursing is not None and p.nursing.acts(moment)]
    return found[0] if found else None


def _push(jobs: Sequence[Nursing], gradient: Tensor, before: Tensor, inside: Tensor, at: Moment) -> Tensor | None:
    """What is added to the predicted velocities of all pictures."""
    factors = [job.velocity(at) if job.velocity else 0.0 for job in jobs]
    if not any(factors):
        return None
    wide = compute_dtype(before)
    weight = torch.tensor(factors, dtype=wide, device=before.device).view(-1, *[1] * (before.dim() - 1))
    still = torch.zeros_like(before, dtype=wide)
    return still.index_copy(0, inside, redirected(still[inside], weight * gradient.to(wide), jobs, at))


def _same(given: Tensor, before: Tensor) -> bool:
    """Whether a call is on the latents of the step in progress."""
    rows = before.shape[0]
    return given.shape[0] % rows == 0 and given.shape[1:] == before.shape[1:] and torch.equal(given[:rows], before)


def refusals(models: Sequence[torch.nn.Module], rows: Rows, scheduler: Any, pipe: Any) -> list[str]:
    """Why the latent updates of these plans cannot run; empty where they can."""
    nursing = [[plan for plan in row if plan.nursing is not None] for row in rows]
    plans = [plan for row in nursing for plan in row]
    if not plans:
        return []
    name = type(plans[0].processor).__name__
    reasons = []
    if any(len(row) > 1 for row in nursing):
        several = next(row for row in nursing if len(row) > 1)
        names = " and ".join(type(plan.processor).__name__ for plan in several)
        reasons.append(f"{names} both update the latent: give one of them for each picture.")
    if scheduler is None:
        reasons.append(f"{name} updates the latent that a scheduler steps: attach to the pipeline, or pass scheduler=.")
    elif type(scheduler).__name__ in LOSES_UPDATES:
        reasons.append(
            f"{type(scheduler).__name__} would lose the updates of {name}: {LOSES_UPDATES[type(scheduler).__name__]}. "
            "Choose DDIM, Euler, DPM-Solver++ (multistep) or another single-evaluation scheduler."
        )
    if any(plan.nursing.velocity for plan in plans if plan.nursing) and "FlowMatch" not in type(scheduler).__name__:
        reasons.append(f"{name} with control='velocity' needs a flow-matching scheduler: choose control='latent'.")
    words = any(isinstance(w, str) for p in plans if p.nursing for g in p.nursing.groups for w in g)
    if words and not hasattr(pipe, "encode_prompt"):
        reasons.append(f"{name} cannot find words without a pipeline's prompt: give tokens= (positions) instead.")
    for model in map(unwrap, models):
        reasons += _model_refusals(model, name)
    return reasons


def _model_refusals(model: torch.nn.Module, name: str) -> list[str]:
    reasons, family = [], denoisers.family_of(model)
    if family is None or family.name not in LAYOUTS:
        reasons.append(f"{name}: where words are in {type(model).__name__} is not known; known: {', '.join(LAYOUTS)}.")
    config: Any = getattr(model, "config", None)
    taken, made = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if made is not None and taken != made:
        reasons.append(
            f"{type(model).__name__} takes {taken} channels and predicts {made}: its input is not the latent alone, so "
            f"{name} cannot update it."
        )
    if any(
        any("group_offloading" in hook for hook in getattr(registry, "hooks", {}))
        for registry in (getattr(m, "_diffusers_hook", None) for m in model.modules())
        if registry is not None
    ):
        reasons.append(
            f"Group offloading moves weights away before the backward pass of {name} needs them: use "
            "enable_model_cpu_offload() or enable_sequential_cpu_offload()."
        )
    return reasons
