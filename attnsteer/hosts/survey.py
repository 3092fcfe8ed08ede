"""The survey: one plain prefill of the prompt before a generation, for methods that must know the whole prompt first.

A reader of a late layer may feed an edit of an early one, so the reading cannot happen in the pass that is edited. The
pass has no edits and no cache; the user's own cache, random numbers and inputs are not touched. Whatever else is
attached does not act in it. Cost: one prefill a generation; many generations on one prompt share it by
``attnsteer.prefill``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..binding import Binding
from ..errors import SteeringError
from ..processor import Processor
from ..reacting import Sharing, Silent
from ..scheduler import Plan, Rows, plans_of
from ..site import Site, Spans
from ..spans import KeySpans
from .some_rows import some_rows
from .vlm_families import NOT_FOR_PREFILL, PIXELS
from .vlm_inputs import cache_length, on_device, undisturbed

Known = list[tuple[Processor, dict[str, Any]]]
"""Surveys of one prompt and what each left in ``call.shared``."""


class Surveyor:
    """Reads a prompt for all plans that have a survey.

    Args:
        model, names: the model, and the inputs that its forward takes.
        rows: the plans of every row; those without a survey are left alone.
        bindings: what the modules carry while they are steered.

    Attributes:
        known: surveys of the prompt to come that were read before (``attnsteer.prefill``), or None where every prompt
            is new.
    """

    def __init__(self, model: Any, names: Sequence[str], rows: Rows, bindings: Mapping[Site, Binding]):
        self._model, self._names, self._rows, self._bindings = model, names, rows, bindings
        self._asking = [(plan, plan.survey) for plan in plans_of(rows) if plan.survey is not None]
        self.known: Known | None = None

    def run(self, given: Mapping[str, Any], spans: KeySpans, whole: bool) -> None:
        """Read the prompt once for all surveys that are not known, and hand to every plan what its own left.

        Args:
            given: the user's call; spans: of its prompt.
            whole: all rows are to be read, not those alone that ask.

        Raises:
            SteeringError: a prompt whose pixels are in a cache that attnsteer did not make.
        """
        known: Known = [] if self.known is None else self.known
        missing: list[Plan] = []
        for _, survey in self._asking:
            there = [reader for reader, _ in known] + [other.processor for other in missing]
            if survey.processor not in there:
                missing.append(survey)
        if missing:
            self._read(missing, given, spans, whole)
        known += [(survey.processor, dict(survey.shared)) for survey in missing]
        for plan, survey in self._asking:
            plan.shared.update(next(left for reader, left in known if reader == survey.processor))

    def _read(self, surveys: Sequence[Plan], given: Mapping[str, Any], spans: KeySpans, whole: bool) -> None:
        """One pass of the rows that ask, where they can be told apart; what it leaves is about all rows."""
        inputs = {n: on_device(given[n], self._model.device) for n in given if n in self._names}
        inputs = {n: v for n, v in inputs.items() if n not in NOT_FOR_PREFILL and v is not None}
        readers = [survey.processor for survey in surveys]
        wanted = [any(plan.survey and plan.survey.processor in readers for plan in row) for row in self._rows]
        some = None if whole else some_rows(inputs, wanted, spans.has_image.to(self._model.device))
        if some is not None:
            inputs, spans = some.inputs, spans.of(some.inputs["input_ids"], some.inputs.get("attention_mask"))
        total = spans.follow(inputs["input_ids"], 0)  # KeySpans has refused prompts without ids
        there = spans.window(0, total, total)
        if bool(torch.as_tensor(there.image).any()) and not any(given.get(name) is not None for name in PIXELS):
            cached = " (its cache holds them already: use attnsteer.prefill)" if cache_length(given) else ""
            raise SteeringError(f"The prompt holds image tokens, but no pixels were given{cached}.")
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = 1
        for survey in surveys:
            for state in (*survey.states.values(), survey.shared):
                state.clear()
        # past our own interception, and past the user's graphs: they serve other shapes, and readers may look at values
        eager = torch.compiler.set_stance("force_eager")
        with self._reading(surveys, there), undisturbed(self._model), torch.no_grad(), eager:
            torch.nn.Module._call_impl(self._model, **inputs, use_cache=False)
        if some is not None:
            for survey in surveys:
                survey.shared.update(some.whole(dict(survey.shared)))

    @contextmanager
    def _reading(self, surveys: Sequence[Plan], there: Spans) -> Iterator[None]:
        """Inside, the surveys alone are asked, and nothing is edited."""
        kept = [(b, b.edits, b.reactors, b.spans) for b in self._bindings.values()]
        for site, binding in self._bindings.items():
            binding.edits, binding.spans = (), there
            binding.reactors = tuple(
                (Sharing(Silent(survey.processor), survey.shared), survey.states[site])
                for survey in surveys
                if site in survey.selection
            )
        try:
            yield
        finally:
            for binding, edits, reactors, before in kept:
                binding.edits, binding.reactors, binding.spans = edits, reactors, before
