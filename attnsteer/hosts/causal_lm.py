"""A steered language model between attach and detach: which phase it is in, where its tokens are, what runs before it.

The user's call stays the user's: ``generate`` and ``model(...)`` run with the arguments they were given. Around them
the session (1) runs the image-free reference pass where a processor needs it, (2) says at every site whether this is
prefill or decode, and (3) keeps the token spans in step with the cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..binding import ATTRIBUTE, Binding
from ..edits import Edit, tile_rows
from ..errors import NotReachedError, SteeringError
from ..reacting import Reacts, Sharing, Silent, limited, reacting
from ..scheduler import Rows, merge_edits, plans_of, wanted_sites
from ..site import Phase, Site, Spans
from ..spans import KeySpans, spans_of
from . import transformers_seam
from .base import Method, intercept
from .contrast import Contrasts, edited
from .decoders import core, layer_of, refusals, sites
from .facts import ClassAttention, watch_residual
from .massive import massive_channels
from .questions import QuestionFinder
from .some_rows import some_rows, variants_with
from .survey import Surveyor
from .vlm_families import NOT_FOR_PREFILL, lockstep_inputs, padding_id, vision_tokens
from .vlm_inputs import (
    cache_length,
    effective,
    execution_device,
    kept_positions,
    length,
    on_device,
    starts_with,
    undisturbed,
    with_answer,
)

__all__ = ["LanguageSession", "refusals", "sites"]

Table = dict[Site, tuple[tuple[Edit, ...], tuple[tuple[Reacts, dict[str, Any]], ...]]]
"""For every site the static edits, and the reacting processors with their states."""
PHASES: tuple[Phase, Phase] = ("prefill", "decode")


class LanguageSession:
    """One attachment to a language model.

    Args:
        target: the model, or ``torch.compile(model)``.
        rows: the plans of every row; one entry stands for all rows.
        processor: the Hugging Face processor or tokenizer; it knows tokens that only wrap an image.

    Raises:
        SteeringError: every reason why these plans cannot act on this model.
    """

    def __init__(self, target: torch.nn.Module, rows: Rows, processor: Any = None):
        reasons = refusals(target, rows, processor)
        if reasons:
            raise SteeringError(reasons)
        self.target, self.processor = target, processor
        self.model: Any = core(target)
        self._names = tuple(inspect.signature(self.model.forward).parameters)
        self.rows = rows
        self.owner: Any = None
        self._active = tuple(tuple(plan for plan in row if not plan.processor.inert) for row in rows)
        self._plans = plans_of(self._active)
        self._image_free = [plan for plan in self._plans if "image_free" in plan.processor.lanes]
        self._removal = next((plan.processor.removal for plan in self._image_free), "delete")  # refusals: one for all
        surveys = [plan.survey for plan in self._plans if plan.survey is not None]
        reached = wanted_sites((*edited(self._active), surveys))
        self._modules = {site: self.model.get_submodule(site.name) for site in reached}
        self._bindings = {site: Binding(site, phase="prefill") for site in self._modules}
        self.surveyor = Surveyor(self.model, self._names, self._active, self._bindings) if surveys else None
        on = {phase: {id(p): p.where.active(0, 1, phase=phase) for p in self._plans} for phase in PHASES}
        self._phased = on["prefill"] != on["decode"]
        self._tables = {phase: self._table(phase, on[phase], self._active) for phase in PHASES}
        self._asking = variants_with(self._active, self._image_free)  # variants for which the reference pass is made
        self._asked = self._table("prefill", on["prefill"], tuple(compress(self._active, self._asking)))
        looking = [plan.processor for plan in (*self._plans, *surveys) if plan.reacts]
        self._tokens = vision_tokens(self.model.config, processor)
        marker = next((p.marker for p in looking if p.marker), "")  # refusals: one for all
        asked = {"question", "words"} & {need for p in looking for need in p.needs}
        questions = QuestionFinder(self._tokens, processor, marker) if asked else None
        needs_spans = surveys or asked or not all(p.token_agnostic for p in looking)
        self._contrasts = Contrasts(self.model, self._active, self._tokens, processor, [*self._modules.values()])
        self._spans = KeySpans(self._tokens.image_mask, questions) if needs_spans else None
        self._restore: list[Callable[[], None]] = []
        self._reached = False
        self._generating = False
        self._recipe: dict[str, Any] | None = None  # what generate() gave to code of a repository that is running
        self._inside = False
        self._facts: dict[int, dict[str, Any]] = {}  # what plans asked for, by their id
        self.towers: list[ClassAttention] = []
        self._left = 0  # tokens of the running generation's prompt that no forward pass has taken yet

    # ---- life --------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Arm, bind and intercept."""
        transformers_seam.arm()
        self._find_out()
        self._set_phase("prefill")
        for site, module in self._modules.items():
            module.__dict__[ATTRIBUTE] = self._bindings[site]
        if self._bindings or self._contrasts:
            for module in dict.fromkeys((self.model, self.target)):
                self._restore.append(intercept(module, self._around))
            for name, handler in (("generate", self._generate), ("get_compiled_call", self._get_compiled_call)):
                if hasattr(self.model, name):
                    self._restore.append(Method(self.model, name, handler).restore)
            if self._image_free or self._spans is not None or self._phased:
                self._restore.append(intercept(self.model.get_decoder(), self._guard))

    def stop(self) -> None:
        """Put everything back; harmless where nothing was started, and in the middle of a generation."""
        for module in self._modules.values():
            module.__dict__.pop(ATTRIBUTE, None)
        while self._restore:
            self._restore.pop()()
        self._contrasts.forget()

    def _find_out(self) -> None:
        """What processors ask of the host: facts of the model, now; what depends on the prompt, when it runs."""
        for plan in self._plans:
            wanted = plan.processor.facts
            if "massive_channels" in wanted:
                found = massive_channels(self.model, self._tokens, wanted["massive_channels"])
                self._facts[id(plan)] = {"massive_channels": found}
            if "cls_attention" in wanted:
                tower = ClassAttention(self.model, self._tokens, wanted["cls_attention"], plan.states.values())
                self.towers.append(tower)
                self._restore.append(tower.start())
                self._contrasts.mute(tower.modules.values())
        for site in wanted_sites([[plan for plan in self._plans if "residual" in plan.processor.needs]]):
            layer = self.model.get_submodule(layer_of(site))
            self._restore.append(watch_residual(layer, self._bindings[site]))

    # ---- what to do at each site -------------------------------------------------------------------------------------
    def _table(self, phase: Phase, on: Mapping[int, bool], active: Rows) -> Table:
        """Static edits and reacting processors of every site in a phase; ``on`` says which plans act, by their id."""
        table: Table = {}
        for site, module in self._modules.items():
            device = execution_device(module)
            rows = [[plan for plan in row if on[id(plan)]] for row in active]
            reactors: list[tuple[Reacts, dict[str, Any]]] = []
            for plans in reacting(active, site):
                plan = plans[0]
                for other in plans:  # asked together, they have one memory
                    other.states[site] = plan.states[site]
                reacts = limited(plans, site, active, device)
                if on[id(plan)]:
                    reactors.append((Sharing(reacts, plan.shared), plan.states[site]))
                elif phase == "prefill" and (plan in self._image_free or "residual" in plan.processor.needs):
                    reactors.append((Sharing(Silent(reacts), plan.shared), plan.states[site]))
            table[site] = (merge_edits(rows, site, device), tuple(reactors))
        return table

    def _set_predicts(self, new: int, left: int) -> None:
        """Of ``new`` tokens, ``left`` of the prompt were missing before: the last of these predicts, and all behind it
        (tokens that were guessed, or generated before where there is no cache)."""
        for binding in self._bindings.values():
            binding.predicts = min(new, max(0, new - max(left, 1) + 1))

    def _set_phase(self, phase: Phase) -> None:
        for site, binding in self._bindings.items():
            binding.edits, binding.reactors = self._tables[phase][site]
            binding.phase = phase
        self._phase = phase

    # ---- the user's calls --------------------------------------------------------------------------------------------
    def _generate(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(inspect.signature(plain).parameters, args, strict=False)), **kwargs}
        if given.get("input_ids") is None:
            given["input_ids"] = given.get("inputs")
        if self._generating and self._recipe is None:  # an assisted generation asks the model itself for candidates
            with self._contrasts.paused(), self._drafting(given):
                return plain(*args, **kwargs)
        if self._phased and not given.get("use_cache", effective(self.model, given, "use_cache") is not False):
            raise SteeringError("Without a cache every pass is a prefill, so steps= means nothing: set use_cache=True.")
        if given.get("attention_mask") is None:
            given["attention_mask"] = self._padding_of(given)
        self._begin(given)
        outer, self._recipe = self._recipe, given if isinstance(given.get("custom_generate"), str) else None
        self._left = length(given) - cache_length(given)
        self._generating = True
        try:
            with self._contrasts.generating():
                return plain(*args, **kwargs)
        finally:
            self._generating, self._recipe = False, outer
            self._set_phase("prefill")

    def _sort_out(self, given: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        """A pass with an empty cache in code of a repository: either ``generate`` of the class makes it, past ours, of
        the prompt that the code was given; or the code itself, whose prompts begin as those of a loop anywhere."""
        cached = given.get("past_key_values") is not None
        generates = (cached or given.get("use_cache") is False) and starts_with(given, recipe)
        if generates and not (self._generating and self._left > 0):
            self._begin(recipe)
            self._left = length(recipe)
        self._generating = generates

    @contextlib.contextmanager
    def _drafting(self, given: Mapping[str, Any]) -> Iterator[None]:
        """The model writes candidates with a cache of their own, in the middle of a generation."""
        left, phase = self._left, self._phase
        self._left = length(given) - cache_length(given)
        self._set_phase("decode" if cache_length(given) else "prefill")
        try:
            yield
        finally:
            self._left = left
            self._set_phase(phase)

    def _get_compiled_call(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``generate`` compiles decode steps by itself where the cache is static; phase and spans are set outside."""
        compiled = plain(*args, **kwargs)
        return lambda *a, **k: self._around(compiled, a, k)

    def _around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or self._inside:
            return call(*args, **kwargs)  # phase and spans were set from outside
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if given.get("cache") is not None:
            raise SteeringError(
                "Continuous batching cannot be steered: use generate() with an ordinary cache, or detach."
            )
        if self._recipe is not None and cache_length(given) == 0:
            self._sort_out(given, self._recipe)
        if not self._generating:
            fresh = cache_length(given) == 0
            self._left = length(given) if fresh else 0
            self._set_phase("prefill" if fresh else "decode")
            if fresh:
                self._begin(given)
        self._set_predicts(length(given), self._left)
        if self._spans is not None:
            self._follow(given, self._spans)
        seen = cache_length(given) if self._contrasts else 0
        self._inside = True
        try:
            out = call(*args, **kwargs)
            out = self._contrasts.applied(out, given, seen, self._generating)
        finally:
            self._inside = False
        self._check_reached()
        if self._generating and given.get("past_key_values") is not None:
            self._left -= length(given)
            if self._left <= 0:
                self._set_phase("decode")
        return out

    def _guard(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder must not run without us knowing which prompt this is: heads of the last prompt would be used."""
        if not (torch.compiler.is_compiling() or self._inside or self._generating):
            raise SteeringError(
                "The text decoder was called past the steered model (its base model, or code compiled around it), so "
                "heads of another prompt would be used: call model(...) or model.generate(...)."
            )
        return call(*args, **kwargs)

    def _begin(self, given: Mapping[str, Any]) -> None:
        """A new prompt: forget the last one, and run the reference pass where a processor asks for it."""
        batch = next((given[n].shape[0] for n in ("input_ids", "inputs_embeds") if isinstance(given.get(n), Tensor)), 1)
        if batch % len(self.rows):
            raise SteeringError(
                f"{len(self.rows)} variants cannot be dealt to {batch} prompts: give one prompt per variant."
            )
        if cache_length(given) and any("residual" in plan.processor.needs for plan in self._plans):
            raise SteeringError(
                "The cache holds tokens of a prompt that was not steered, and a processor needs to see the whole one: "
                "call generate() without past_key_values."
            )
        for plan in self._plans:
            for state in (*plan.states.values(), plan.shared):
                state.clear()
                state.update(self._facts.get(id(plan), {}))
        for tower in self.towers:
            tower.begin(given)
        self._set_phase("prefill")
        self._contrasts.begin(given)
        if self._spans is not None:
            self._spans.begin(given.get("input_ids"), given.get("attention_mask"))
        if self.surveyor is not None and self._spans is not None:
            self._set_predicts(1, 1)  # of a whole prompt its last row
            inside, self._inside = self._inside, True
            try:
                self.surveyor.run(given, self._spans, whole=bool(self.towers))
            finally:
                self._inside = inside
        if self._image_free:
            self._reference_pass_of_some(given)

    def _follow(self, given: Mapping[str, Any], spans: KeySpans) -> None:
        cache, seen, new = given.get("past_key_values"), cache_length(given), length(given)
        if given.get("input_ids") is None:
            raise SteeringError(
                "Image tokens are found by their ids: call the model with input_ids, not inputs_embeds."
            )
        total = spans.follow(given["input_ids"], seen)
        for site, binding in self._bindings.items():
            keys, offset = (new, 0) if cache is None else cache.get_mask_sizes(new, self._modules[site].layer_idx)
            binding.spans = spans.window(int(offset), int(keys), total)

    def _padding_of(self, given: Mapping[str, Any]) -> Tensor | None:
        """As ``generate`` does: pad tokens are padding, unless the model uses the same id to end a text."""
        config, ids = given.get("generation_config") or self.model.generation_config, given.get("input_ids")
        pad = given.get("pad_token_id", config.pad_token_id)
        eos = given.get("eos_token_id", config.eos_token_id)
        if ids is None or pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
            return None
        return (ids != pad).to(ids.dtype) if bool((ids == pad).any()) else None

    def _check_reached(self) -> None:
        """A selected site that no kernel call came from would silently lack its edit."""
        missed = [] if self._reached else [site.name for site, b in self._bindings.items() if not b.hit]
        if missed:
            raise NotReachedError(
                f"{len(missed)} of {len(self._bindings)} selected sites were not reached, the first is {missed[0]!r}: "
                "this model computes its attention outside transformers' AttentionInterface. Leave these layers out of "
                "where=."
            )
        self._reached = True

    # ---- the image-free lane -----------------------------------------------------------------------------------------
    def _reference_pass_of_some(self, given: Mapping[str, Any]) -> None:
        """The reference pass of those variants alone that ask for it, where they can be told apart."""
        ids = given.get("input_ids")
        some = None
        apart = not self.towers and not any(plan.processor.reads_rows for plan in self._plans)
        if isinstance(ids, Tensor) and apart:  # a tower's attention is dealt to all rows
            inputs = {name: given[name] for name in given if name in self._names and name not in NOT_FOR_PREFILL}
            some = some_rows(inputs, self._asking, self._tokens.image_mask(ids).any(1))
        if some is None:
            self.reference_pass(given)
            return
        states = {id(s): s for plan in self._plans for s in (*plan.states.values(), plan.shared)}.values()
        before = [dict(state) for state in states]
        self._tables["prefill"], whole = self._asked, self._tables["prefill"]
        self._set_phase("prefill")
        try:
            self.reference_pass(some.inputs)
        finally:
            self._tables["prefill"] = whole
            self._set_phase("prefill")
        for state, known in zip(states, before, strict=True):
            state.update({n: some.whole(value) for n, value in state.items() if value is not known.get(n)})

    def reference_pass(self, given: Mapping[str, Any], answer: Tensor | None = None) -> None:
        """One prefill of ``2 B`` rows, with and without the image, and without a cache.

        Both lanes end at the same position, the last of the prompt or of the ``answer`` behind it. Processors choose
        layer by layer, each layer seeing the edits of the layers before it, and keep what they chose in ``call.state``
        for the generation that follows. The user's cache, random numbers and inputs are not touched.
        """
        model = self.model
        if not isinstance(given.get("input_ids"), Tensor):
            raise SteeringError("The image-free pass finds the image by its ids: give input_ids, not inputs_embeds.")
        if answer is not None:
            given = with_answer(given, answer, model.config)
        inputs = {name: on_device(given[name], model.device) for name in given if name in self._names}
        pad = padding_id(model.config, self._tokens)
        both, image, text = lockstep_inputs(inputs, self._tokens, pad, self._removal)
        if self._removal == "mask":
            both.update(kept_positions(model, both))
        if "logits_to_keep" in self._names:
            both["logits_to_keep"] = 1
        batch = image.shape[0] // 2
        lanes = {"main": slice(0, batch), "image_free": slice(batch, 2 * batch)}
        self._set_predicts(image.shape[1], image.shape[1] - (0 if answer is None else answer.shape[1]))
        with self._in_lanes(lanes, spans_of(image, image | text)), undisturbed(model), torch.no_grad():
            # past our own interception, and past a graph of the whole model, which serves the user's shapes
            torch.nn.Module._call_impl(model, **both, use_cache=False)
        self._check_reached()

    @contextlib.contextmanager
    def _in_lanes(self, lanes: dict[str, slice], spans: Spans) -> Iterator[None]:
        batch = lanes["main"].stop
        for binding in self._bindings.values():
            binding.edits = tuple(tile_rows(edit, batch, len(lanes)) for edit in binding.edits)
            binding.lanes, binding.spans = lanes, spans
        inside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inside
            for binding in self._bindings.values():
                binding.lanes, binding.spans = {}, None
            self._set_phase("prefill")
