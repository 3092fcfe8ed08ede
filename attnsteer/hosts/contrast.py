"""The second prediction of every token that contrastive methods ask for, inside the user's own calls.

``Contrasts`` stands behind a session. After each forward pass of the user's model it runs the counterpart of the same
rows (``counterparts``) on the same new tokens and replaces the logits of the positions that predict an answer token.
These are two passes and not one of twice the rows: the prompts differ in length, and the user's cache stays, whatever
its kind, as plain generation leaves it. A counterpart has a cache of its own and goes through the model's own
preparation for ``generate``, so it is what plain generation from that prompt would compute. It follows the user's
cache: forced tokens, beams that change places, candidates that assisted decoding takes back. Attention is edited in the
user's rows alone.

Cost: for each distinct counterpart one more forward of the rows that ask for it, and a second cache (all rows where
pictures cannot be told apart by row, see ``counterparts.of_rows``). Counterparts are forgotten with the generation, or
with the user's cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..binding import ATTRIBUTE
from ..contrast import Counterpart, Instructed, wide
from ..errors import SteeringError
from ..processor import Processor
from ..scheduler import Plan, Rows, plans_of
from ..where import Where
from .branch import Branch
from .counterparts import counterpart_inputs, instruction_ids, of_rows
from .vlm_families import NOT_FOR_PREFILL, VisionTokens, padding_id, vision_tokens, why_no_image_free_lane
from .vlm_inputs import cache_length, on_device, undisturbed

Asked = list[tuple[Processor, tuple[bool, ...]]]
"""Who combines with a counterpart, and in which variants."""


def refusals(config: Any, rows: Sequence[Sequence[Plan]], processor: Any = None) -> list[str]:
    """Why the contrasts of these plans cannot be made on a model; empty where they can."""
    rows = [[plan for plan in row if _contrasts(plan) and not plan.processor.inert] for row in rows]
    plans = plans_of(rows)
    if not plans:
        return []
    reasons = why_no_image_free_lane(config)
    if not vision_tokens(config).image:
        reasons.append("This model's configuration names no image token, so there is no picture to contrast.")
    for plan in plans:
        name, what = type(plan.processor).__name__, plan.processor.contrast()
        if plan.where != Where():
            reasons.append(f"{name} compares predictions and reads no layer, head or step: leave where= out.")
        if isinstance(what, Instructed) and not callable(_tokenizer(processor)):
            reasons.append(f"{name} writes into the prompt: give steer(..., processor=) the model's processor.")
    for row in rows:
        names = [type(plan.processor).__name__ for plan in row]
        if len(names) > 1:
            reasons.append(f"{names[0]} and {names[1]} both choose the logits of a row: attach one of them.")
    return list(dict.fromkeys(reasons))


def _contrasts(plan: Plan) -> bool:
    return plan.processor.contrast() is not None


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def edited(rows: Rows) -> Rows:
    """The rows without their contrasts: those that edit attention."""
    return tuple(tuple(plan for plan in row if not _contrasts(plan)) for row in rows)


@dataclass(eq=False)
class _Prompt:
    """A whole prompt as the user gave it, and which rows hold an image."""

    inputs: dict[str, Any]
    has_image: Tensor

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


@dataclass(eq=False)
class _State:
    """What runs beside one cache of the user's: the counterparts, who combines with each in which of its rows, and how
    many answer tokens they have seen."""

    prompt: _Prompt
    branches: list[tuple[Branch, list[tuple[Processor, Tensor]]]] = field(default_factory=list)
    fed: int = 0

    def crop(self, tokens: int) -> None:
        """Take back the newest answer tokens."""
        for branch, _ in self.branches:
            branch.crop(tokens)
        self.fed -= tokens


class Contrasts:
    """The counterparts of one session.

    Args:
        model: the language model.
        rows: the plans of every row that act.
        tokens: which tokens are the image.
        processor: the Hugging Face processor or tokenizer, for instructions.
        modules: the attention modules that carry bindings.
    """

    def __init__(self, model: Any, rows: Rows, tokens: VisionTokens, processor: Any, modules: Sequence[nn.Module]):
        self._model, self._tokens, self._modules = model, tokens, modules
        self._tokenizer, self._variants = _tokenizer(processor), len(rows)
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._asked: dict[Counterpart, Asked] = {}
        for plan in plans_of(rows):
            what = plan.processor.contrast()
            if what is not None:
                mine = tuple(any(other is plan for other in row) for row in rows)
                self._asked.setdefault(what, []).append((plan.processor, mine))
        for what in self._asked:
            if isinstance(what, Instructed):
                instruction_ids(self._tokenizer, what)
        self._prompt: _Prompt | None = None
        self._states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()
        self._paused = self._reorders = False

    def __bool__(self) -> bool:
        return bool(self._asked)

    # ---- life of a generation ----------------------------------------------------------------------------------------
    def begin(self, given: Mapping[str, Any]) -> None:
        """A new prompt. Nothing is computed before its last token is predicted.

        Raises:
            SteeringError: a prompt or a way to generate that has no counterpart.
        """
        self._prompt = None
        if not self._asked:
            return
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        reasons = _prompt_refusals(given, ids, mask, self._model.generation_config)
        if reasons:
            raise SteeringError(reasons)
        assert isinstance(ids, Tensor)
        device = self._model.device
        inputs = {name: on_device(given[name], device) for name in self._names if given.get(name) is not None}
        inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_PREFILL}
        inputs["input_ids"] = ids.to(device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]) if mask is None else mask.to(device)
        self._prompt = _Prompt(inputs, self._tokens.image_mask(inputs["input_ids"]).any(1))

    def forget(self) -> None:
        """The end of a generation, or of the session."""
        self._prompt = None
        self._states.clear()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """A generation, after which the counterparts are forgotten."""
        with self._following_beams():
            try:
                yield
            finally:
                self.forget()

    @contextlib.contextmanager
    def _following_beams(self) -> Iterator[None]:
        """Inside, the caches of the counterparts change places with the beams."""
        if not self._asked or self._reorders:
            yield
            return
        namespace, plain = self._model.__dict__, getattr(self._model, "_reorder_cache", None)
        before = namespace.get("_reorder_cache")

        def reorder(cache: Any, beams: Tensor) -> Any:
            if cache in self._states:
                for branch, _ in self._states[cache].branches:
                    branch.reorder(beams)
            if plain is not None:
                return plain(cache, beams)
            cache.reorder_cache(beams)
            return cache

        namespace["_reorder_cache"], self._reorders = reorder, True
        try:
            yield
        finally:
            self._reorders = False
            if namespace.get("_reorder_cache") is reorder:
                del namespace["_reorder_cache"]
                if before is not None:
                    namespace["_reorder_cache"] = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model proposes candidates to itself: they are checked afterwards, so they need no contrast."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # ---- every forward pass ------------------------------------------------------------------------------------------
    def applied(self, out: Any, given: Mapping[str, Any], seen: int, generating: bool) -> Any:
        """The output of a forward pass with the combined logits where it predicts an answer token.

        Args:
            out: what the model returned; left as it is.
            given: what it was called with.
            seen: tokens that its cache held before.
            generating: whether ``generate`` made this call.
        """
        if not self._asked or self._paused:
            return out
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            raise SteeringError("A contrast follows the tokens: call the model with input_ids, not inputs_embeds.")
        with self._plain(), torch.no_grad():
            state, others = self._follow(ids.to(self._model.device), _cache_of(out, given), seen, generating)
        return out if state is None else _replaced(out, given, self._combined(out, given, state, others))

    def _follow(self, ids: Tensor, cache: Any, seen: int, generating: bool) -> tuple[_State | None, list[Tensor]]:
        """Run the counterparts on the tokens of this pass; the predictions ``(r, T, V)`` of the rows of each, or None
        in the middle of a prompt."""
        state = None if cache is None else self._states.get(cache)
        if seen == 0 or (generating and (state is None or state.prompt is not self._prompt)):
            prompt = self._prompt
            if prompt is None or seen + ids.shape[1] < prompt.length:
                return None, []
            state = _State(prompt)
            answer = ids[:, max(0, prompt.length - seen) :]
            others = self._begin(state, ids.shape[0])
            if cache is not None:
                self._states[cache] = state
            if answer.shape[1]:
                more = self._feed(state, answer, recording=True)
                others = [torch.cat(pair, 1) for pair in zip(others, more, strict=True)]
            return state, others
        surplus = 0 if state is None else state.fed - (seen - state.prompt.length)
        if state is None or surplus < 0:
            raise SteeringError(
                "This cache holds tokens that the contrast has not seen: start from the whole prompt while steered."
            )
        if not generating and bool(self._tokens.image_mask(ids).any()):
            raise SteeringError("A contrast takes no further picture behind the prompt: start from the whole prompt.")
        if surplus > 0:
            state.crop(surplus)
        return state, self._feed(state, ids, recording=ids.shape[1] > 1)

    def _begin(self, state: _State, rows: int) -> list[Tensor]:
        """Build and start the counterparts of a prompt, whose rows beams may have repeated."""
        prompt, others = state.prompt, []
        times = rows // len(prompt.has_image)
        pad = padding_id(self._model.config, self._tokens)
        for what, asked in self._asked.items():
            on = torch.stack([prompt.has_image & _dealt(mine, prompt.has_image) for _, mine in asked])
            asking = on.any(0).nonzero()[:, 0]
            if not len(asking):
                continue
            chosen, inputs = of_rows(prompt.inputs, asking, prompt.has_image, what)
            made = counterpart_inputs(inputs, what, self._tokens, pad, self._tokenizer)
            with undisturbed(self._model):
                branch = Branch(self._model, made, self._names, chosen)
                others.append(branch.begin(times))
            on = on[:, chosen].repeat_interleave(times, dim=1)
            state.branches.append((branch, [(who, mine) for (who, _), mine in zip(asked, on, strict=True)]))
        return others

    def _feed(self, state: _State, tokens: Tensor, recording: bool) -> list[Tensor]:
        state.fed += tokens.shape[1]
        if recording:
            for branch, _ in state.branches:
                branch.record()
        with undisturbed(self._model) if self._model.training else contextlib.nullcontext():
            return [branch.feed(tokens) for branch, _ in state.branches]

    def _combined(self, out: Any, given: Mapping[str, Any], state: _State, others: Sequence[Tensor]) -> Tensor:
        """The logits of the pass with those of its newest positions combined, row by row."""
        logits: Tensor = out[_place(given)] if isinstance(out, tuple) else out.logits
        for (branch, asked), other in zip(state.branches, others, strict=True):
            count, rows = min(logits.shape[1], other.shape[1]), branch.rows.to(logits.device)
            before, newest = logits.split([logits.shape[1] - count, count], dim=1)
            step = torch.arange(state.fed + 1 - count, state.fed + 1, device=logits.device)
            mine = combined = newest[rows]
            for who, on in asked:
                found = who.combine(wide(mine), wide(other[:, -count:]).to(mine.device), step)
                combined = torch.where(on[:, None, None].to(mine.device), found.to(mine.dtype), combined)
            logits = torch.cat([before, newest.index_copy(0, rows, combined)], 1)
        return logits

    def mute(self, modules: Iterable[torch.nn.Module]) -> None:
        """More modules that are left alone while a counterpart runs."""
        self._modules = [*self._modules, *modules]

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """Inside, no attention is edited."""
        bound = [(module, module.__dict__.pop(ATTRIBUTE)) for module in self._modules if ATTRIBUTE in module.__dict__]
        try:
            yield
        finally:
            for module, binding in bound:
                module.__dict__[ATTRIBUTE] = binding


def _dealt(mine: Sequence[bool], rows: Tensor) -> Tensor:
    """Which of the rows ``(B,)`` belong to the variants marked in ``mine``."""
    return torch.tensor(mine, device=rows.device).repeat_interleave(len(rows) // len(mine))


def _prompt_refusals(given: Mapping[str, Any], ids: Any, mask: Any, config: Any) -> list[str]:
    if not isinstance(ids, Tensor):
        return ["A contrast follows the tokens: call the model with input_ids, not inputs_embeds."]
    reasons = []
    if mask is not None and mask.shape != ids.shape:
        reasons.append(
            f"A contrast needs the whole prompt and its attention mask {tuple(ids.shape)}, not {tuple(mask.shape)}."
        )
    elif mask is not None and not bool(mask[:, -1].all()):
        reasons.append("A contrast predicts at the last position: pad on the left (padding_side='left').")
    if cache_length(given) >= ids.shape[1]:
        reasons.append("The cache holds the whole prompt already: give the ids of the cached tokens and the new ones.")
    scale = given.get("guidance_scale", getattr(given.get("generation_config") or config, "guidance_scale", None))
    if scale not in (None, 1, 1.0):
        reasons.append(f"guidance_scale={scale!r} contrasts two prompts as well: leave it out, or detach.")
    return reasons


def _cache_of(out: Any, given: Mapping[str, Any]) -> Any:
    """The user's cache; None where there is none."""
    parts = out if isinstance(out, tuple) else (getattr(out, "past_key_values", None),)
    found = [part for part in (given.get("past_key_values"), *parts) if hasattr(part, "get_seq_length")]
    return found[0] if found else None


def _place(given: Mapping[str, Any]) -> int:
    """Where the logits are in an output that is a tuple."""
    return 0 if given.get("labels") is None else 1


def _replaced(out: Any, given: Mapping[str, Any], logits: Tensor) -> Any:
    if isinstance(out, tuple):
        place = _place(given)
        return (*out[:place], logits, *out[place + 1 :])
    return type(out)(**{**out, "logits": logits})
