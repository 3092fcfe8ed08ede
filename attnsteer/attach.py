"""``attach``: put processors on a pipeline or a model, and take them off without a trace."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .errors import SteeringError
from .hosts.worlds import is_language_model, is_pipeline, models_of
from .processor import Processor
from .scheduler import Plan, Rows, make_plan, plans_of, row_conflicts
from .site import Site

if TYPE_CHECKING:
    from .explain import Explanation
    from .variants import Variant


class Session(Protocol):
    """What a host does between attach and detach."""

    rows: Rows
    owner: Any

    def start(self) -> None: ...

    def stop(self) -> None: ...


_attached: weakref.WeakValueDictionary[int, Steering] = weakref.WeakValueDictionary()
"""By id of everything that a steering changes: pipelines, models and schedulers."""


class Steering:
    """A handle on what is attached; also a context manager that detaches at its end.

    Attributes:
        target: the pipeline or model.
        processors: everything attached, in order; variants after another.
        selections: for every processor the sites and heads that it acts on.
    """

    def __init__(self, target: Any, session: Session, occupied: Sequence[Any]):
        self.target = target
        self.session = session
        # the interceptions hold the session: a steering lives as long as its target, or until detached
        session.owner = self
        self._keys = [id(obj) for obj in occupied]
        weakref.finalize(self, _disarm)

    @property
    def plans(self) -> list[Plan]:
        """Every plan once, in the order of rows."""
        return plans_of(self.session.rows)

    @property
    def processors(self) -> list[Processor]:
        return [plan.processor for plan in self.plans]

    @property
    def selections(self) -> list[Mapping[Site, tuple[int, ...]]]:
        return [plan.selection for plan in self.plans]

    def states(self, processor: Processor) -> Mapping[Site, dict[str, Any]]:
        """What a processor that reads or reacts left behind at each of its sites in the last generation; zeros for rows
        of variants without it."""
        for plan in self.plans:
            if plan.processor is processor:
                return plan.states
        raise SteeringError(f"{type(processor).__name__} is not attached here; attached: {_names(self.processors)}.")

    def measure(self, inputs: Mapping[str, Any], answer: torch.Tensor | None = None) -> None:
        """One pass of a prompt with and without its image, which generates nothing; ``states`` then hold what was seen.

        Args:
            inputs: what ``generate`` takes: ``input_ids``, masks, pixels.
            answer: ``(B, T)`` generated ids to be read behind the prompt.

        Raises:
            SteeringError: where the target is no language model, or the inputs hold no ids.
        """
        run = getattr(self.session, "reference_pass", None)
        if run is None:
            raise SteeringError(f"{type(self.target).__name__} has no prompt with an image: give a language model.")
        run(inputs, answer)

    def explain(self, **shape: int) -> Explanation:
        """What will happen, before anything runs: sites, heads, steps, extra rows, fork and bytes."""
        from .explain import explain_attached

        return explain_attached(self, **shape)

    @property
    def attached(self) -> bool:
        return _attached.get(self._keys[0]) is self

    def _start(self) -> None:
        """Steer the target, for the first time or again after ``detach``."""
        for key in self._keys:
            _attached[key] = self
        try:
            self.session.start()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the target. A second call is an error, like detaching what was never attached."""
        if not self.attached:
            raise SteeringError("This steering is not attached any more: detach it once.")
        try:
            self.session.stop()
        finally:
            for key in self._keys:
                _attached.pop(key, None)
            _disarm()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *_: object) -> None:
        if self.attached:
            self.detach()


def attach(
    target: Any,
    *processors: Processor,
    variants: Sequence[Variant | Sequence[Processor]] | None = None,
    scheduler: Any = None,
    cfg: tuple[str, ...] | None = None,
    processor: Any = None,
) -> Steering:
    """Steer a pipeline or a model with processors, until the handle is detached.

    Args:
        target: a Diffusers pipeline, its denoiser, or a Hugging Face (vision-)language model.
        processors: what to attach. Several compose at a site in the order of the edit vocabulary.
        variants: instead of ``processors``: one entry for each row of the batches to come (see ``run_variants``).
        scheduler: for a bare denoiser, the scheduler of your own loop; guidance methods need it.
        cfg: order of the two halves of a guided batch where a custom pipeline differs, e.g. ``("cond", "uncond")``.
        processor: the Hugging Face processor or tokenizer of a language model, for methods that look words up.

    Raises:
        SteeringError: every reason why this cannot be done; the target is then untouched.
    """
    given = rows_given(processors, variants)
    models = models_of(target)
    occupied = _occupied(target, models, scheduler)
    reasons = why_taken(occupied)
    if reasons:
        raise SteeringError(reasons)
    session = _session(target, models, given, scheduler, cfg, processor)
    steering = Steering(target, session, occupied)
    steering._start()
    return steering


def detach(target: Any) -> None:
    """Restore a steered target.

    Raises:
        SteeringError: where nothing is attached to it.
    """
    steering = attached_to(target)
    if steering is None:
        raise SteeringError(f"Nothing is attached to this {type(target).__name__}.")
    steering.detach()


def attached_to(target: Any) -> Steering | None:
    """The steering of a pipeline or model, if any; a pipeline that shares a steered denoiser is steered too."""
    return next((found for obj in (target, *models_of(target)) if (found := _attached.get(id(obj)))), None)


@contextmanager
def steer(target: Any, *processors: Processor, **options: Any) -> Iterator[Steering]:
    """``attach`` for the length of a ``with`` block; see there for the arguments."""
    with attach(target, *processors, **options) as steering:
        yield steering


def sites(target: Any) -> list[Site]:
    """Everything there is to steer in a pipeline or model, in execution order."""
    found = [site for model in models_of(target)[:1] for site in _sites(model)]
    if not found:
        raise SteeringError(f"{type(target).__name__} has no attention that attnsteer can reach.")
    return found


# ---- hosts -----------------------------------------------------------------------------------------------------------
def _sites(model: torch.nn.Module) -> list[Site]:
    if is_language_model(model):
        from .hosts import causal_lm

        return causal_lm.sites(model)
    from .hosts import denoisers

    return denoisers.sites(model)


def _session(
    target: Any,
    models: Sequence[torch.nn.Module],
    given: Sequence[Sequence[Processor]],
    scheduler: Any,
    cfg: tuple[str, ...] | None,
    processor: Any,
) -> Session:
    """Plan every processor once and hand the rows to the host of the target's world."""
    there = sites(target)
    plans = {id(p): make_plan(p, there) for row in given for p in row}
    rows = tuple(tuple(plans[id(p)] for p in row) for row in given)
    reasons = refusals(target, models, rows, scheduler, cfg, processor)
    if reasons:
        raise SteeringError(reasons)
    if is_language_model(models[0]):
        from .hosts.causal_lm import LanguageSession

        return LanguageSession(models[0], rows, processor)
    from .hosts.diffusion import DiffusionSession

    find_scheduler = (lambda: target.scheduler) if is_pipeline(target) else (lambda: scheduler)
    pipe = target if is_pipeline(target) else None
    return DiffusionSession(lambda: models_of(target), find_scheduler, rows, cfg, pipe)


def refusals(
    target: Any,
    models: Sequence[torch.nn.Module],
    rows: Rows,
    scheduler: Any,
    cfg: tuple[str, ...] | None,
    processor: Any,
) -> list[str]:
    """Why these plans cannot act on this target; empty where they can."""
    language, pipeline = is_language_model(models[0]), is_pipeline(target)
    reasons = row_conflicts(rows)
    reasons += [
        f"{name}= is for diffusion models." for name, v in (("scheduler", scheduler), ("cfg", cfg)) if v and language
    ]
    reasons += ["scheduler= is for bare denoisers; a pipeline brings its own."] if scheduler and pipeline else []
    reasons += ["processor= is for language models."] if processor and not language else []
    surveys = dict.fromkeys(type(plan.processor).__name__ for plan in plans_of(rows) if plan.survey is not None)
    reasons += [f"{name} surveys the prompt, which is for language models." for name in surveys if not language]
    if language:
        from .hosts import causal_lm

        return reasons + causal_lm.refusals(models[0], rows, processor)
    from .hosts import denoisers, nurse

    steps = getattr(target, "scheduler", None) if pipeline else scheduler
    return [
        *reasons,
        *denoisers.refusals(models, rows, steps is not None, cfg),
        *nurse.refusals(models, rows, steps, target if pipeline else None),
    ]


def rows_given(
    processors: Sequence[Processor], variants: Sequence[Variant | Sequence[Processor] | Processor | None] | None
) -> list[list[Processor]]:
    """The processors of every row; one row stands for all."""
    given = [list(processors)] if variants is None else [_processors_of(v) for v in variants]
    if variants is not None and processors:
        raise SteeringError("Give processors or variants, not both.")
    if not given or (variants is None and not processors):
        raise SteeringError("Nothing to attach: give at least one processor.")
    for item in (p for row in given for p in row):
        if not isinstance(item, Processor):
            raise SteeringError(f"{item!r} is not an attnsteer processor; stock processors go to set_attn_processor.")
        if item.call:
            raise SteeringError(
                f"{type(item).__name__} cannot be attached: it asks a model several times and changes the picture in "
                f"between, not the attention. Call {item.call}."
            )
    for row in given:
        twice = [type(p).__name__ for i, p in enumerate(row) if any(p is other for other in row[:i])]
        if twice:
            raise SteeringError(f"The same {twice[0]} object is given twice: give it once, or make a second one.")
    return given


def why_taken(occupied: Sequence[Any]) -> list[str]:
    """Why nothing more can be attached to these; empty where it can."""
    taken = [f"This {type(obj).__name__} is steered already" for obj in occupied if id(obj) in _attached]
    return [f"{taken[0]}: detach it first, or attach all processors at once."] if taken else []


def _processors_of(variant: Variant | Sequence[Processor] | Processor | None) -> list[Processor]:
    if variant is None:
        return []
    if isinstance(variant, Processor):
        return [variant]
    return list(variant) if isinstance(variant, Sequence) else list(variant.processors)


def _occupied(target: Any, models: Sequence[torch.nn.Module], scheduler: Any) -> list[Any]:
    """Everything that a steering changes; a compiled model is the model that it was made from."""
    schedulers = [found for found in (scheduler, getattr(target, "scheduler", None)) if found is not None]
    return [target, *models, *(getattr(model, "_orig_mod", model) for model in models), *schedulers]


def _names(processors: Sequence[Processor]) -> str:
    return ", ".join(type(p).__name__ for p in processors) or "none"


def _disarm() -> None:
    """Take the library wrappers away once nothing is steered; only worlds that were used are loaded."""
    if _attached:
        return
    for name in ("diffusers_seam", "transformers_seam"):
        module = sys.modules.get(f"{__package__}.hosts.{name}")
        if module is not None:
            module.disarm()
