"""``prefill``: one prefill of a prompt, shared by many generations that change its last row alone.

What a method does to the last row of a prompt changes no key and no value of the rows before it (causal order). So the
prompt is run once, plainly; each generation takes a copy of that cache without the last token and runs this one token
again, steered. Exact, also where the steered layers lie before the layers that a survey read. With ``variants=`` the
rows of that cache are repeated, and many strengths are rows of one generation.

A prompt whose rows see the last one (PaliGemma reads its prompt in both directions) has no such prefill, and neither
has a method that changes other rows, or that contrasts with a prompt of its own: they are refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..attach import attach, rows_given, sites
from ..errors import SteeringError
from ..logits import per_query
from ..processor import Processor
from ..scheduler import make_plan
from ..site import AttentionCall, Kind
from .base import take_rows
from .decoders import core
from .survey import Known
from .vlm_families import PER_TOKEN, SCRATCH
from .vlm_inputs import TOKEN_BY_TOKEN, assisted, effective, undisturbed
from .worlds import is_language_model

if TYPE_CHECKING:
    from ..variants import Variant

Variants: TypeAlias = "Sequence[Variant | Sequence[Processor] | Processor | None]"
_ALONE: dict[str, Any] = {**TOKEN_BY_TOKEN, "cache_implementation": None}
"""Options of ``generate`` where the cache is handed to it."""


@dataclass(frozen=True)
class _LastKey(Processor):
    """Finds layers where a row before the last sees the last token."""

    kinds: ClassVar[tuple[Kind, ...]] = ("causal",)
    reads_only: ClassVar[bool] = True

    @property
    def token_agnostic(self) -> bool:
        return True

    def react(self, call: AttentionCall) -> None:
        if call.is_causal or call.q.shape[2] == 1:
            return
        mask = call.mask
        if mask is None or not per_query(mask):
            raise SteeringError(f"{call.site.name!r} has no causal order: its prompt has no prefill to share.")
        column = mask[..., :-1, call.q.shape[2] - 1]  # the cache is empty before: the last token is the key of Nq - 1
        open_ = column if mask.dtype == torch.bool else column > torch.finfo(mask.dtype).min / 2
        if bool(open_.any()):
            raise SteeringError(
                f"Rows of this prompt see its last token ({call.site.name!r} reads it in both directions), so what is "
                "done to the last row changes their keys: there is no prefill to share. Call generate instead."
            )


@dataclass(frozen=True)
class _ClassRows(Processor):
    """Keeps what the class token of the vision tower looks at, which a generation without pixels cannot read."""

    layers: tuple[int, ...] = ()

    kinds: ClassVar[tuple[Kind, ...]] = ("causal",)
    reads_only: ClassVar[bool] = True

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"cls_attention": self.layers}

    @property
    def token_agnostic(self) -> bool:
        return True

    def react(self, call: AttentionCall) -> None:
        if "cls_attention" in call.state:
            call.shared["cls_attention"] = call.state["cls_attention"]


class Prefill:
    """A prompt that was prefilled; made by ``prefill``.

    It keeps the cache and the inputs, and every generation copies the cache. It holds for the weights and the attention
    implementation that it was made with.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], cache: Any, known: Known, processor: Any):
        self._model, self._inputs, self._cache, self._known, self._processor = model, inputs, cache, known, processor
        self._scratch = _scratch(core(model))
        self._batch = int(inputs["input_ids"].shape[0])

    def generate(self, *processors: Processor, variants: Variants | None = None, **options: Any) -> Any:
        """``model.generate(**inputs, **options)`` under these processors, from the last prompt token on.

        Args:
            processors: as for ``attach``; none for the plain model.
            variants: instead of ``processors``, as for ``attach``: ``V`` of them over ``B`` prompts are ``V B`` rows of
                one generation. First come all prompts under the first variant, then all under the second. None and an
                empty list are the plain model.
            **options: of ``generate``: lengths, sampling, beams; no inputs, and nothing that assists decoding.

        Raises:
            SteeringError: processors and variants; a processor that changes more than the last row; an option that
                is an input; or assisted decoding, by the options or by a generation config.
        """
        given = rows_given(processors, variants) if processors or variants is not None else [[]]
        reasons = [reason for processor in _each(given) for reason in refusals(processor)]
        reasons += [f"{name}= was given to prefill already." for name in options if name in self._inputs]
        reasons += [
            f"Assisted decoding ({name}) counts on a cache of the whole prompt, but a Prefill keeps all but the last "
            f"token: give {name}=None, or attach and call generate."
            for name in assisted(core(self._model), options)
        ]
        if reasons:
            raise SteeringError(reasons)
        rows = torch.arange(self._batch).repeat(len(given))
        inputs = {n: v for n, v in self._inputs.items() if n in ("input_ids", "attention_mask", *PER_TOKEN)}
        options = {"cache_implementation": None, **options}  # the model's generation config may name another
        cache = copy.deepcopy(self._cache)
        beams = _sequences(core(self._model), options)
        if len(given) * beams > 1:
            cache.batch_select_indices(rows.repeat_interleave(beams))
        with self._as_prefilled(rows), self._steered(given, rows):
            return self._model.generate(**take_rows(inputs, rows, self._batch), past_key_values=cache, **options)

    def logits(self, *processors: Processor, variants: Variants | None = None) -> Tensor:
        """The logits of the next token under these processors, ``(B, vocabulary)`` float32; of ``V`` variants
        ``(V B, vocabulary)``, in the order of ``generate``."""
        once: dict[str, Any] = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return self.generate(*processors, variants=variants, **_ALONE, **once).logits[0]

    @contextlib.contextmanager
    def _steered(self, given: Sequence[Sequence[Processor]], rows: Tensor) -> Iterator[None]:
        if not any(given):
            yield
            return
        self._learn(list(_each(given)))
        with attach(self._model, variants=given, processor=self._processor) as steering:
            known = [(reader, take_rows(left, rows, self._batch)) for reader, left in self._known]
            surveyor = getattr(steering.session, "surveyor", None)
            if surveyor is not None:  # the prompt without its pixels cannot be read again
                surveyor.known = known
            for tower in getattr(steering.session, "towers", ()):
                left = next(left for reader, left in known if reader == _ClassRows(layers=tower.layers))
                tower.known = left.get("cls_attention")
            yield

    def _learn(self, processors: Sequence[Processor]) -> None:
        """Read the prompt once more for surveys that are new."""
        known = [reader for reader, _ in self._known]
        missing = [reader for reader in _surveys(self._model, processors) if reader not in known]
        if missing:
            with undisturbed(core(self._model)):
                self._known += _read(self._model, missing, self._inputs, self._processor)

    @contextlib.contextmanager
    def _as_prefilled(self, rows: Tensor) -> Iterator[None]:
        """Inside, what a family keeps of its last prefill is what it kept of this one."""
        kept = _scratch(core(self._model))
        _restore([(module, name, take_rows(value, rows, self._batch)) for module, name, value in self._scratch])
        try:
            yield
        finally:
            _restore(kept)


def prefill(model: Any, *processors: Processor, processor: Any = None, **inputs: Any) -> Prefill:
    """Run a prompt once, for many generations or logits that differ in what they do to its last row.

        ready = attnsteer.prefill(model, GIFT(), processor=hf_processor, **inputs)
        answers = ready.generate(variants=[GIFT(alpha=alpha) for alpha in (1, 3, 5)], max_new_tokens=32)

    Args:
        model: a Hugging Face language or vision-language model to which nothing is attached.
        processors: methods whose surveys are read in this very pass. Those of others cost one more pass each, once.
        processor: the Hugging Face processor or tokenizer, as for ``attach``.
        **inputs: of the model: ``input_ids``, ``attention_mask``, pixels.

    Raises:
        SteeringError: no language model; no ``input_ids``; a prompt whose earlier rows see its last token.
    """
    if not (is_language_model(model) and hasattr(model, "generate")):
        raise SteeringError(f"prefill needs a language model that generates, not {type(model).__name__}.")
    if not isinstance(inputs.get("input_ids"), Tensor) or inputs.get("past_key_values") is not None:
        raise SteeringError("prefill needs input_ids, and makes the cache itself: leave past_key_values out.")
    from transformers import DynamicCache

    inner: Any = core(model)
    cache = DynamicCache(config=inner.config.get_text_config(decoder=True))
    cache.activate_past_recording()  # sliding layers keep what the crop needs
    known = _read(model, [_LastKey(), *_surveys(model, processors)], inputs, processor, cache)
    cache.crop(-1)
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            layer.record_past = False  # or the copies would keep every token that they generate
    return Prefill(model, inputs, cache, known, processor)


# ---- reading the prompt ----------------------------------------------------------------------------------------------
def _surveys(model: Any, processors: Sequence[Processor]) -> list[Processor]:
    """What these processors want to be read of a prompt, each once."""
    there = sites(model)
    plans = [make_plan(processor, there) for processor in processors if not processor.inert]
    wanted = [plan.survey.processor for plan in plans if plan.survey is not None]
    towers = [plan.processor.facts.get("cls_attention") for plan in plans]
    wanted += [_ClassRows(layers=layers) for layers in towers if layers is not None]
    return [reader for n, reader in enumerate(wanted) if reader not in wanted[:n]]


def _read(
    model: Any, readers: Sequence[Processor], inputs: Mapping[str, Any], processor: Any, cache: Any = None
) -> Known:
    """One plain pass of the whole prompt, and what each reader left."""
    with attach(model, *readers, processor=processor) as steering:
        model.generate(**inputs, **_ALONE, past_key_values=cache, max_new_tokens=1)
        return [(plan.processor, dict(plan.shared)) for plan in steering.plans]


# ---- what is asked for -----------------------------------------------------------------------------------------------
def _each(given: Sequence[Sequence[Processor]]) -> Iterator[Processor]:
    return (processor for row in given for processor in row)


def refusals(processor: Processor) -> list[str]:
    """Why a processor cannot share a prefill with others; empty where it can."""
    if processor.last_row_only or processor.inert:
        return []
    name = type(processor).__name__
    if processor.contrast() is not None:
        return [
            f"{name} predicts every token once more from a prompt of its own, whose cache a Prefill does not keep: "
            "attach it and call generate."
        ]
    return [
        f"{name} changes more than the last row of a prompt (it is not last_row_only), so it needs its own prefill: "
        "attach it and call generate."
    ]


def _sequences(model: Any, options: Mapping[str, Any]) -> int:
    """Into how many rows ``generate`` turns each row that it is given."""
    return max(effective(model, options, name) or 1 for name in ("num_beams", "num_return_sequences"))


# ---- what families keep ----------------------------------------------------------------------------------------------
def _scratch(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    return [(m, name, m.__dict__[name]) for m in model.modules() for name in SCRATCH if name in m.__dict__]


def _restore(kept: list[tuple[torch.nn.Module, str, Any]]) -> None:
    for module, name, value in kept:
        module.__dict__[name] = value
