"""Steering a diffusion pipeline: the normal forward, the perturbed lane, and guidance where the scheduler steps.

``d = w (cond - perturbed)`` is added to the model output that arrives at ``scheduler.step``. That gives the published
``uncond + s (cond - uncond) + d`` whatever the pipeline does before: one batch in either order, sequential passes, no
classifier-free guidance, rescaled or norm-matched guidance. By then it is also known how many rows the latents have,
hence which rows of the denoiser's batch were conditional; so the perturbed rows are computed there, those that fork at
the same stage in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..binding import Binding
from ..clock import Clock
from ..errors import NotReachedError, SteeringError
from ..fork import Tape, forks_of, why_no_fork
from ..lanes import cfg_lanes
from ..lending import Borrower, Loan, lending
from ..logits import compute_dtype
from ..nursing import Moment
from ..reacting import limited, reacting
from ..scheduler import Plan, Rows, check_steps, row_of, wanted_sites
from ..site import Site
from . import denoisers, nurse
from .base import Call, copy_nest, holding, intercept, intercepted, is_compiled, named_inputs, prediction, unwrap
from .between import Between
from .bindings import Bindings
from .carry import steering
from .diffusers_seam import arm
from .nurse import WARM_UPS, Nurse
from .recorded import Lane, Recorded

PlanRows = tuple[tuple[Plan, ...], ...]


class DiffusionSession:
    """One attachment to a denoiser and, where there is one, its scheduler.

    Args:
        find_models: the denoisers as the pipeline has them now (they may be compiled or replaced after attaching).
        find_scheduler: the scheduler as the pipeline has it now; gives None for a bare denoiser.
        rows: the plans of every row.
        cfg: order of the two parts of a batch that holds both branches of classifier-free guidance.
        pipe: the pipeline, where there is one.
    """

    def __init__(
        self,
        find_models: Callable[[], Sequence[torch.nn.Module]],
        find_scheduler: Callable[[], Any],
        rows: Rows,
        cfg: tuple[str, ...] | None = None,
        pipe: Any = None,
    ):
        self._find_models = find_models
        self._find_scheduler = find_scheduler
        self.rows = rows
        self.owner: Any = None
        self._cfg = cfg
        self._clock: Clock | None = None
        self._intercepted: list[tuple[torch.nn.Module, Callable[[], None]]] = []
        self._forward: Recorded | None = None
        self._unused = 0  # recorded forwards in a row that no step of the scheduler followed
        self._bindings = Bindings()
        self._constants: dict[Any, Tensor] = {}
        self._pipe = pipe
        self._between = Between(rows, pipe)
        self._nurse = Nurse(rows, pipe, self._nursed, self._parts)
        self._names = [site.name for site in wanted_sites(rows)]
        self.extra_rows = 0  # rows computed for perturbed lanes so far
        self.unforked: dict[str, int] = {}  # why steps shared nothing, and how often

    # ---- lifecycle ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        self._arm()
        self._follow_scheduler()
        self._nurse.start()
        self._between.start()

    def stop(self) -> None:
        lost = [type(m).__name__ for m, restore in self._intercepted if not intercepted(m, restore)]
        bare = self._clock is None
        for _, restore in self._intercepted:
            restore()
        self._intercepted.clear()
        if self._clock:
            self._clock.detach()
            self._clock = None
        self._nurse.stop()
        self._between.stop()
        self._forward = None
        self._bindings.clear()
        self._constants.clear()
        if lost and bare:  # with a scheduler the next run would have noticed
            raise NotReachedError(
                f"{lost[0]} was compiled in place after attaching, so nothing was steered since: "
                "compile first, then attach."
            )

    def _arm(self) -> None:
        """See every call of the denoisers and every kernel call of the selected sites, also after the user compiled the
        model, loaded an adapter or swapped processors since attaching."""
        models = list(self._find_models())
        scheduler = self._find_scheduler()
        reasons = denoisers.refusals(models, self.rows, scheduler is not None, self._cfg)
        reasons += nurse.refusals(models, self.rows, scheduler, self._pipe)
        if reasons:
            raise SteeringError(reasons)
        standing = {id(m) for m, restore in self._intercepted if intercepted(m, restore)}
        if [id(m) for m in models] != [id(m) for m, _ in self._intercepted] or len(standing) != len(models):
            for _, restore in self._intercepted:
                restore()
            self._intercepted = [(m, intercept(m, self._around(m, is_compiled(m)))) for m in models]
        for model in models:
            try:
                arm([unwrap(model).get_submodule(name) for name in self._names])
            except AttributeError as missing:
                raise SteeringError(
                    f"The denoiser was replaced after attaching ({missing}): detach and attach again."
                ) from None

    def _follow_scheduler(self) -> None:
        scheduler = self._find_scheduler()
        if scheduler is None or (self._clock and self._clock.scheduler is scheduler):
            return
        fresh = self._clock is None
        if self._clock:
            self._clock.detach()
        self._clock = Clock(scheduler, self._on_start, self._on_step)
        if not fresh:  # the pipeline got another scheduler since attaching, and its run has begun
            self._on_start()

    def _on_start(self) -> None:
        """A run begins: nothing of the last one is kept."""
        self._forward, self._unused = None, 0
        self._bindings.clear()
        self._constants.clear()
        self._nurse.begin()
        self._arm()
        for row in self.rows:
            for plan in row:
                for state in plan.states.values():
                    state.clear()
        if self._clock and self._clock.running:
            check_steps(self.rows, self._clock.total)

    # ---- the normal forward ------------------------------------------------------------------------------------------
    def _around(self, model: torch.nn.Module, compiled: bool) -> Callable[..., Any]:
        def around(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._follow_scheduler()
            self._nurse.denoising()
            self._between.denoising()
            if self._clock is None:  # nothing else says that a run begins
                self._on_start()
            inputs = named_inputs(model, args, kwargs)
            if self._clock:
                self._clock.enter(inputs.get("timestep"))
                nursing = self._active(lambda plan: plan.nursing is not None)
                if any(nursing):
                    args, kwargs = self._nurse.before(model, call, args, kwargs, nursing, self._moment())
                    inputs = named_inputs(model, args, kwargs)
                if self._between.wanted:
                    active = self._active(lambda plan: True)
                    self._between.before(model, call, inputs, self._bindings, active, self._moment())
            family = denoisers.family_of(model)
            plain = self._active(lambda plan: not plan.guides)
            guiding = self._active(lambda plan: plan.guides)
            bindings = self._plain_bindings(model, inputs, plain)
            with steering(model, bindings):
                if not any(guiding) or not self._is_conditional(denoisers.sample_of(family, inputs)):
                    return call(*args, **kwargs)
                with lending(bindings, plain) as loans:
                    return self._record(model, call, args, kwargs, copy_nest(inputs), guiding, compiled, loans)

        return around

    def _is_conditional(self, sample: Tensor) -> bool:
        """The first call of a step is the conditional one; a call on other latents begins another step.

        Raises:
            NotReachedError: where somebody else's scheduler steps, so that guidance would be lost without a word.
        """
        if self._forward is None:
            return True
        if self._forward.shares(sample):
            return False
        self._unused += 1
        if self._unused > WARM_UPS:
            raise NotReachedError(
                f"The denoiser ran on {self._unused + 1} different latents while the attached scheduler made no step: "
                "attach to the pipeline (or pass the scheduler) that runs."
            )
        return True

    def _record(
        self,
        model: torch.nn.Module,
        call: Call,
        args: Any,
        kwargs: Any,
        inputs: Any,
        guiding: PlanRows,
        compiled: bool,
        loans: dict[Site, Loan],
    ) -> Any:
        """Run the conditional forward, noting what the perturbed rows can share."""
        family = denoisers.family_of(model)
        tape: Tape | None = None
        forks: dict[Plan, int] = {}
        why: str | None = "the family has no descriptor"
        if family is not None:
            every = denoisers.stages(model, family)
            why = why_no_fork(every, inputs, family.no_fork, compiled)
            forks = {} if why else forks_of(guiding, every)
            tape = Tape(every, family.chain, forks.values()) if any(forks.values()) else None
        self._forward = None
        with tape.recording() if tape else nullcontext():
            output = call(*args, **kwargs)
        self._forward = Recorded(model, call, inputs, output, tape, forks, why, loans)
        return output

    def _active(self, which: Callable[[Plan], bool]) -> PlanRows:
        """The plans of every row that act in the step in progress."""
        clock = self._clock
        step, total = (clock.index, clock.total) if clock and clock.running else (0, 1)
        sigmas = any(isinstance(plan.where.steps, Mapping) for row in self.rows for plan in row)
        sigma = clock.sigma if clock and clock.running and sigmas else None
        if sigmas and sigma is None:
            whose = type(clock.scheduler).__name__ if clock else "A bare denoiser"
            raise SteeringError(
                f"{whose} has no noise levels for a sigma window: give steps as fractions or positions."
            )
        return tuple(tuple(p for p in row if which(p) and p.active(step, total, sigma)) for row in self.rows)

    def _plain_bindings(self, model: torch.nn.Module, inputs: dict[str, Any], plain: PlanRows) -> dict[Site, Binding]:
        if not any(plain):
            return {}
        family = denoisers.family_of(model)
        batch = denoisers.sample_of(family, inputs).shape[0]
        rows: Sequence[tuple[Plan, ...]] = plain
        if len(plain) > 1:  # each part of a guided batch holds all rows
            if batch not in (len(plain), len(plain) * len(self._parts(model))):
                raise SteeringError(
                    f"{len(plain)} variants met {batch} rows in the denoiser: give one prompt per variant and "
                    "num_images_per_prompt=1."
                )
            rows = plain * (batch // len(plain))
        bindings, device = self._bindings.of(model, inputs, rows), denoisers.sample_of(family, inputs).device
        lanes = self._lanes(model, batch) if len(plain) > 1 else {}
        for site, binding in bindings.items():
            binding.lanes, binding.step = lanes, self._step(device)
            binding.reactors = tuple(
                (limited(plans, site, plain, device), plans[0].states[site]) for plans in reacting(plain, site)
            )
        return bindings

    def _moment(self) -> Moment:
        assert self._clock is not None
        return Moment(self._clock.index, self._clock.total, self._clock.timestep)

    def _step(self, device: torch.device) -> Tensor:
        """The position in the schedule."""
        now = self._clock.index if self._clock and self._clock.running else 0
        return self._constant((now,), torch.long, device)[0]

    def _lanes(self, model: torch.nn.Module, batch: int) -> dict[str, slice]:
        """The lanes of a forward, where variants tell how many rows the latents have."""
        return {name: lane.rows for name, lane in cfg_lanes(batch, len(self.rows), self._parts(model)).items()}

    def _parts(self, model: torch.nn.Module) -> tuple[str, ...]:
        """The order of the lanes in a batch that holds both branches of classifier-free guidance."""
        family = denoisers.family_of(model)
        return self._cfg or (family.cfg if family else ("uncond", "cond"))

    # ---- the perturbed lane ------------------------------------------------------------------------------------------
    def _on_step(self, model_output: Tensor, sample: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the scheduler gets: the prediction with guidance, and the latent that the prediction was made from."""
        found = self._nurse.at_step(self._guided(model_output), sample)
        if self._between.wanted:
            model, active = self._intercepted[0][0], self._active(lambda plan: True)
            self._between.after(model, active, model_output.shape[0], self._parts(model), self._moment())
        return found

    def _guided(self, model_output: Tensor) -> Tensor:
        """Add guidance to the prediction that the scheduler is about to use."""
        plain = any(not plan.guides for row in self.rows for plan in row)
        if len(self.rows) > 1 and plain and model_output.shape[0] != len(self.rows):
            raise SteeringError(  # the forwards had to assume one row for each variant
                f"{len(self.rows)} variants met {model_output.shape[0]} rows of latents: give one prompt per variant "
                "and num_images_per_prompt=1."
            )
        guiding = self._active(lambda plan: plan.guides)
        forward, self._forward, self._unused = self._forward, None, 0
        if not any(guiding):
            return model_output
        if forward is None:
            raise NotReachedError(
                "The scheduler stepped, but the denoiser was not called through attnsteer in this step: call the "
                "pipeline's own denoiser, or attach to the model that runs."
            )
        samples = model_output.shape[0]
        assert self._clock is not None
        lanes = [
            Lane(row, plan, scale)
            for row in range(samples)
            for plan in row_of(guiding, row, samples)
            if (scale := plan.processor.guidance(self._clock.timestep)) != 0
        ]
        if not lanes:
            return model_output
        if why := forward.refusal:
            self.unforked[why] = self.unforked.get(why, 0) + 1
        return self._guide(forward, model_output, lanes)

    def _guide(self, forward: Recorded, model_output: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """``model_output + sum of w (cond - perturbed)`` over the lanes; rows without a lane keep their bits."""
        family = denoisers.family_of(forward.model)
        batch = denoisers.sample_of(family, forward.inputs).shape[0]
        samples = model_output.shape[0]
        # a variance beside the mean is not extrapolated, whether the scheduler gets it or not
        channels = min(model_output.shape[1], denoisers.sample_of(family, forward.inputs).shape[1])
        first = cfg_lanes(batch, samples, self._parts(forward.model))["cond"].rows.start
        device, wide = model_output.device, compute_dtype(model_output)
        groups = forward.groups(lanes)
        lanes = [lane for _, group in groups for lane in group]
        rows = self._constant(tuple(lane.row for lane in lanes), torch.long, device)
        cond_rows = self._constant(tuple(lane.row + first for lane in lanes), torch.long, device)
        perturbed = torch.cat([self._perturbed(forward, *group, first, batch, samples) for group in groups])
        cond = prediction(forward.output).index_select(0, cond_rows)
        delta = cond[:, :channels].to(wide) - perturbed[:, :channels].to(wide)
        if delta.shape[2:] != model_output.shape[2:] or channels > delta.shape[1]:
            raise SteeringError(
                f"The scheduler gets predictions of shape {tuple(model_output.shape[1:])}, the denoiser makes "
                f"{tuple(delta.shape[1:])}: guidance is not available for a pipeline that reshapes in between."
            )
        if channels < model_output.shape[1]:
            rest = delta.new_zeros(len(lanes), model_output.shape[1] - channels, *delta.shape[2:])
            delta = torch.cat([delta, rest], dim=1)
        sign = denoisers.prediction_sign(forward.model)
        weight = self._constant(tuple(sign * lane.scale for lane in lanes), wide, device)
        spread = (-1, *[1] * (delta.dim() - 1))
        guided = model_output.to(wide).index_add(0, rows, weight.view(spread) * delta).to(model_output.dtype)
        touched = torch.zeros(samples, dtype=torch.bool, device=device).index_fill(0, rows, True)
        return torch.where(touched.view(spread), guided, model_output)

    def _perturbed(
        self, forward: Recorded, fork: int, lanes: Sequence[Lane], first: int, batch: int, samples: int
    ) -> Tensor:
        """The predictions of some perturbed rows: one forward of these alone, from their fork on."""
        family = denoisers.family_of(forward.model)
        numbers = tuple(lane.row + first for lane in lanes)
        rows = self._constant(numbers, torch.long, denoisers.sample_of(family, forward.inputs).device)
        inputs = denoisers.rows_of(family, forward.inputs, rows, batch)
        for name in family.lists if family else ():
            if len(inputs[name]) == batch:
                inputs[name] = [inputs[name][first + lane.row] for lane in lanes]
        plain = self._active(lambda plan: not plan.guides)
        wanted = [(*row_of(plain, lane.row, samples), lane.plan) for lane in lanes]

        def borrow(plans: Sequence[Plan], site: Site) -> Borrower:
            return Borrower(limited(plans, site, plain, rows.device), forward.loans[site], numbers, rows)

        bindings = self._bindings.again(forward.model, inputs, wanted, borrow)
        for binding in bindings.values():
            binding.step = self._step(rows.device)
        self.extra_rows += len(lanes)
        if forward.tape is None or not fork:
            with holding(numbers), steering(forward.model, bindings):
                return prediction(forward.call(**inputs))
        # what was edited before the fork is in the recording
        behind = {site: binding for site, binding in bindings.items() if not forward.tape.covers(site.name, fork)}
        with holding(numbers), steering(forward.model, behind), forward.tape.replaying(rows, batch, fork):
            return prediction(forward.call(**inputs))

    def _nursed(
        self, model: torch.nn.Module, inputs: dict[str, Any], samples: int, pictures: Sequence[int]
    ) -> dict[Site, Binding]:
        """The bindings of the edits in force on the conditional rows of these pictures."""
        plain = self._active(lambda plan: not plan.guides)
        return self._bindings.again(model, inputs, [row_of(plain, picture, samples) for picture in pictures])

    def _constant(self, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A small tensor that stays on the device: making it anew in each step would wait for the device."""
        key = (values, dtype, device)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._constants[key]
