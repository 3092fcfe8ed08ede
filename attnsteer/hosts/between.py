"""What methods ask for around the forward of a step: a plain one before it, and a word when the step is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import SteeringError
from ..lanes import cfg_lanes
from ..nursing import Groups, Moment
from ..processor import Processor
from ..scheduler import Plan, Rows, plans_of, row_of
from ..site import AttentionCall
from ..steps import StepEnd
from . import denoisers
from .base import Call, copy_nest, unwrap
from .bindings import Bindings
from .carry import steering
from .prompts import LAYOUTS, PromptWatch, pictures_each, prompts_in, readings


class _Noting:
    """Looks at the calls of the plain forward for one processor; its limits to rows and heads come with its edits."""

    def __init__(self, processor: Processor, moment: Moment):
        self.processor, self.moment = processor, moment

    def react(self, call: AttentionCall) -> None:
        self.processor.note(call, self.moment)


def _asks(processor: Processor) -> bool:
    """Whether a method wants anything here at all."""
    mine = type(processor)
    return mine.plain_first is not Processor.plain_first or mine.after_step is not Processor.after_step


def _stories_apart(name: str, given: Mapping[str, Any]) -> None:
    """Refuse prompts whose pictures do not come in the order of stories.

    Raises:
        SteeringError: several pictures of each of several prompts, which pipelines order by prompt.
    """
    pictures = pictures_each(given)
    if pictures > 1 and prompts_in(given) != 1:
        raise SteeringError(
            f"num_images_per_prompt={pictures} puts the pictures of one prompt side by side, but the stories of {name} "
            "are blocks of different prompts: repeat the prompts, [p1, p2, p1, p2], with num_images_per_prompt=1."
        )


class Between:
    """Plain forwards before steps and messages after them, for one attachment.

    Args:
        rows: the plans of every row.
        pipe: the pipeline, where there is one: its prompts are watched for methods that look for words or read rows.
    """

    def __init__(self, rows: Rows, pipe: Any):
        self._plans = [p for p in plans_of(rows) if _asks(p.processor)]
        self._sharing = [type(p.processor).__name__ for p in plans_of(rows) if p.processor.reads_rows]
        self._pipe = pipe
        self._watch: PromptWatch | None = None
        self.plain_forwards = 0  # so far

    @property
    def wanted(self) -> bool:
        return bool(self._plans)

    def start(self) -> None:
        words = any(plan.processor.finds_words for plan in self._plans)
        if self._pipe is not None and (words or self._sharing):
            check = partial(_stories_apart, self._sharing[0]) if self._sharing else None
            self._watch = PromptWatch(self._pipe, check)

    def stop(self) -> None:
        if self._watch:
            self._watch.detach()
            self._watch = None

    def denoising(self) -> None:
        """The denoiser is called."""
        if self._watch:
            self._watch.denoising()

    def before(
        self,
        model: torch.nn.Module,
        call: Call,
        inputs: dict[str, Any],
        bindings: Bindings,
        active: Sequence[tuple[Plan, ...]],
        moment: Moment,
    ) -> None:
        """Run the model plainly where a method wants to look first."""
        acting = {id(plan) for row in active for plan in row}
        asking = tuple(p for p in self._plans if id(p) in acting and p.processor.plain_first(moment))
        if not asking:
            return
        noting = {site: binding.scratch() for site, binding in bindings.of(model, inputs, [asking]).items()}
        for site, binding in noting.items():
            binding.edits = ()
            binding.reactors = tuple(
                (_Noting(plan.processor, moment), plan.states[site]) for plan in asking if site in plan.selection
            )
        with steering(model, noting):
            call(**copy_nest(inputs))
        self.plain_forwards += 1

    def after(self, model: torch.nn.Module, active: Rows, samples: int, parts: tuple[str, ...], moment: Moment) -> None:
        """Tell every method that acted."""
        acting = {id(plan) for row in active for plan in row}
        for plan in self._plans:
            if id(plan) in acting:
                mine = [any(other is plan for other in row_of(active, i, samples)) for i in range(samples)]
                end = StepEnd(
                    moment,
                    mine,
                    lambda batch: cfg_lanes(batch, samples, parts)["cond"].rows,
                    lambda words, picture, keys: self._columns(model, words, (picture, samples), keys),
                )
                plan.processor.after_step(plan.states, end)

    def _columns(
        self, model: torch.nn.Module, words: Groups, picture: tuple[int, int], keys: int
    ) -> list[tuple[int, ...]]:
        family = denoisers.family_of(model)
        if family is None or family.name not in LAYOUTS:
            raise SteeringError(
                f"Where words are among the text keys of {type(unwrap(model)).__name__} is not known; known is it for "
                f"{', '.join(LAYOUTS)}."
            )
        found = readings(self._watch, family.name, picture, words, keys, False)[0]
        return [tuple(found.columns[i] for word in group for i in word) for group in found.groups]
