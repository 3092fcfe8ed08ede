"""What there is to steer in a language or vision-language model: the self-attention of every text decoder layer.

Vision towers are not listed: their tokens have no causal order and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..scheduler import Plan, Rows, plans_of
from ..site import Site
from . import contrast
from .base import unwrap
from .facts import refusals as fact_refusals
from .questions import tokenizer_of
from .vlm_families import why_no_image_free_lane


def core(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside ``torch.compile(model)`` or a PEFT model; the same weights and modules."""
    inner: Any = unwrap(model)
    return unwrap(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner


def sites(model: torch.nn.Module) -> list[Site]:
    """The attention of every text decoder layer, in execution order; empty where there is no text decoder."""
    found: list[Site] = []
    for name, module in _attentions(core(model)):
        heads, kv_heads, head_dim = _shape(module)
        width = int(module.config.hidden_size)
        found.append(Site(name, "causal", int(module.layer_idx), len(found), heads, kv_heads, head_dim, width=width))
    return found


def refusals(model: torch.nn.Module, rows: Rows, processor: Any = None) -> list[str]:
    """Why these plans cannot act on this model; empty where they can. ``processor``: that of Hugging Face, if any."""
    model = core(model)
    name, reasons = type(model).__name__, []
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        reasons.append(f"{name} is an encoder-decoder: attnsteer steers decoder-only language models.")
    elif not sites(model):
        reasons.append(f"{name} has no text decoder whose attention goes through transformers' AttentionInterface.")
    if getattr(model, "_tp_size", None) not in (None, 1):
        reasons.append(
            f"{name} is split over devices by heads (tensor parallel), so head numbers mean nothing: load it without "
            "tp_plan."
        )
    if str(getattr(config, "_attn_implementation", "")).startswith("paged|"):
        reasons.append(
            "A paged attention implementation is selected: call model.set_attn_implementation('sdpa') first."
        )
    plans = plans_of(rows)
    reasons += fact_refusals(model, plans)
    reasons += [reason for plan in plans for reason in _plan_refusals(plan)] + _lane_refusals(config, plans)
    return reasons + _question_refusals(plans, processor) + contrast.refusals(config, rows, processor)


def _plan_refusals(plan: Plan) -> list[str]:
    """What one processor asks for that language models do not have."""
    name, steps, reasons = type(plan.processor).__name__, plan.where.steps, []
    if plan.guides:
        reasons.append(f"{name} guides by a perturbed prediction, which needs a diffusion model.")
    if not isinstance(steps, str):
        reasons.append(f"{name} has steps={steps!r}: in a language model give 'all', 'prefill' or 'decode'.")
    return reasons


def layer_of(site: Site) -> str:
    """The name of the decoder layer that holds a site."""
    return site.name.rpartition(".")[0]


def _lane_refusals(config: Any, plans: Sequence[Plan]) -> list[str]:
    """Why no one pass without the image serves all plans that want one."""
    asking = [plan.processor for plan in plans if "image_free" in plan.processor.lanes and not plan.processor.inert]
    removals = sorted({processor.removal for processor in asking})
    reasons = why_no_image_free_lane(config) if asking else []
    if len(removals) > 1:
        reasons.append(
            f"removal={removals[0]!r} and {removals[1]!r} cannot share one image-free pass: attach one kind."
        )
    return reasons


def _question_refusals(plans: Sequence[Plan], processor: Any) -> list[str]:
    """Why the user's question cannot be read as all plans want it."""
    asking = [plan.processor for plan in plans if not plan.processor.inert]
    asking += [plan.survey.processor for plan in plans if plan.survey is not None and not plan.processor.inert]
    reasons = []
    if tokenizer_of(processor) is None:
        names = dict.fromkeys(type(p).__name__ for p in asking if "words" in p.needs)
        reasons += [
            f"{name} reads the words of the question, which takes the tokenizer: give processor=, the Hugging Face "
            "processor of the model, or use all tokens of the question."
            for name in names
        ]
    markers = sorted({p.marker for p in asking if p.marker})
    if len(markers) > 1:
        reasons.append(f"marker={markers[0]!r} and {markers[1]!r} cannot both end the question: give one marker.")
    return reasons


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules below the text decoder that look like attention of the library: they know their layer and whether they
    are causal (linear attention and remote code do not say the latter)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, torch.nn.Module) else set()
    for name, module in model.named_modules():
        is_layer = isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
        if id(module) in inside and is_layer and hasattr(module, "config"):
            yield name, module


def _shape(module: Any) -> tuple[int, int, int]:
    """Heads, key/value heads and width of a head, from the module itself: layers of one model may differ."""
    config = module.config
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    projected = getattr(getattr(module, "q_proj", None), "out_features", None)
    heads = projected // head_dim if projected else getattr(module, "num_heads", None) or config.num_attention_heads
    groups = getattr(module, "num_key_value_groups", None) or 1
    return int(heads), int(heads // groups), int(head_dim)
