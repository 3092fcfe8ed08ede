"""What a processor asks the host to find out (``Processor.facts``, ``needs = ("residual",)``): the residual stream
entering each layer, the massive channels of the model, and what the class token of the vision tower looks at.

Everything here is hooked only where somebody asks, and gone after detach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..binding import ATTRIBUTE, Binding, Reactor
from ..errors import SteeringError
from ..logits import additive, plain_logits, softmax
from ..scheduler import Plan
from ..site import AttentionCall, Site
from .vision import BLOCKS
from .vlm_families import PIXELS, VisionTokens

KNOWN = ("massive_channels", "cls_attention")
TOWERS = ("vision_tower", "visual", "vision_model")
NO_PATCH_TOKENS = {
    "llava_next": "it cuts a picture into tiles and adds newline tokens",
    "llava_next_video": "it cuts a picture into tiles and adds newline tokens",
    "llava_onevision": "it cuts a picture into tiles and adds newline tokens",
    "internvl": "it merges four patches into each token",
}
"""By ``model_type``: why an image token is not one patch of the vision tower."""


def refusals(model: Any, plans: Sequence[Plan]) -> list[str]:
    """Why the host cannot find out what these plans ask for; empty where it can."""
    reasons = []
    for plan in plans:
        name, wanted = type(plan.processor).__name__, plan.processor.facts
        reasons += [f"{name} asks for {fact!r}, which no language model gives." for fact in wanted if fact not in KNOWN]
        if "cls_attention" in wanted:
            reasons += [f"{name} {reason}" for reason in _tower_refusals(model, wanted["cls_attention"])]
    return list(dict.fromkeys(reasons))


def _tower(model: Any) -> torch.nn.Module | None:
    """The vision tower, where the model has one with layers."""
    inner = getattr(model, "model", model)
    found = (getattr(inner, name, None) for name in TOWERS)
    return next((tower for tower in found if isinstance(tower, torch.nn.Module)), None)


def _tower_attentions(tower: torch.nn.Module) -> list[torch.nn.Module]:
    """The attention modules of a tower, in execution order."""
    return [m for n, m in tower.named_modules() if n.endswith(("self_attn", "attention")) and hasattr(m, "is_causal")]


def _tower_refusals(model: Any, layers: tuple[int, ...]) -> list[str]:
    tower, kind = _tower(model), model.config.model_type
    if tower is None:
        return ["reads the class token of a vision tower, and this model has no vision tower."]
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    if not names & {"class_embedding", "cls_token"}:
        return [f"reads the class token of the vision tower, and that of {kind!r} has none."]
    if kind in NO_PATCH_TOKENS:
        return [f"needs one image token for each patch of the vision tower; {kind!r} has not: {NO_PATCH_TOKENS[kind]}."]
    total = len(_tower_attentions(tower))
    if any(not -total <= layer < total for layer in layers):
        return [f"reads the layers {layers} of the vision tower, which has {total}."]
    return []


# ---- the residual stream ---------------------------------------------------------------------------------------------
def watch_residual(layer: torch.nn.Module, binding: Binding) -> Callable[[], None]:
    """Hand the hidden states that enter a decoder layer to the next attention call inside it, until the returned
    function is called."""

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        binding.residual = args[0] if args else kwargs["hidden_states"]

    return layer.register_forward_pre_hook(look, with_kwargs=True).remove


# ---- the class token of the vision tower -----------------------------------------------------------------------------
class _ClassRow:
    """Reads ``softmax(q_CLS k)`` over the patches in one layer of the tower: one row, beside the user's kernel."""

    def __init__(self, keep: Callable[[Tensor], None]):
        self.keep = keep

    def react(self, call: AttentionCall) -> None:
        logits = plain_logits(call.q[:, :, :1], call.k, call.softmax_scale)
        mask = call.mask_rows(slice(0, 1))
        weights = softmax(logits if mask is None else logits + additive(mask, logits.dtype))
        self.keep(weights[:, :, 0, 1:].sum(1))  # over heads, (images, patches)


class ClassAttention:
    """The attention of the class token, summed over heads, in chosen layers of the vision tower.

    When the tower has run, the state of every site holds ``cls_attention``: for each layer ``(B, pictures, patches)``
    float32, with zeros behind the last picture of prompts that have fewer than others. Pictures belong to prompts in
    the order of their image tokens.

    Attributes:
        layers: of the tower, as they were asked for.
        known: what was read of the prompt to come before (``attnsteer.prefill``), or None where the tower will run.
    """

    def __init__(self, model: Any, tokens: VisionTokens, layers: tuple[int, ...], states: Iterable[dict[str, Any]]):
        self._tokens, self._states, self.layers = tokens, tuple(states), layers
        self.known: tuple[Tensor, ...] | None = None
        self._found: dict[int, Tensor] = {}
        self._counts: list[int] = []  # image tokens of every prompt; empty without pictures
        tower = _tower(model)
        assert tower is not None  # refusals() was asked
        there = _tower_attentions(tower)
        self._order = [layer % len(there) for layer in layers]
        self.modules = {layer: there[layer] for layer in self._order}
        self._listening: list[tuple[torch.nn.Module, Reactor]] = []

    def start(self) -> Callable[[], None]:
        """Listen, beside others that do; the returned function ends it."""
        for layer, module in self.modules.items():
            site = Site(f"vision tower {layer}", "self", layer, layer, 0, 0, 0)
            binding = module.__dict__.setdefault(ATTRIBUTE, Binding(site))
            reactor: Reactor = (_ClassRow(self._keeper(layer)), {})
            binding.reactors = (*binding.reactors, reactor)
            self._listening.append((module, reactor))
        return self._stop

    def _stop(self) -> None:
        for module, reactor in self._listening:
            binding = module.__dict__[ATTRIBUTE]
            binding.reactors = tuple(other for other in binding.reactors if other is not reactor)
            if not binding.reactors:
                del module.__dict__[ATTRIBUTE]
        self._listening = []

    def begin(self, given: Mapping[str, Any]) -> None:
        """A new prompt.

        Raises:
            SteeringError: pictures without their pixels.
        """
        self._found, self._counts = {}, []
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            return
        counts = self._tokens.image_mask(ids).sum(1).tolist()
        if not any(counts):
            return
        if self.known is not None:
            self._tell(self.known)
            return
        if not any(isinstance(given.get(name), Tensor) for name in PIXELS):
            raise SteeringError(
                "The vision tower's class token is read while the tower runs: give pixels, not what it made of them."
            )
        self._counts = counts

    def _keeper(self, layer: int) -> Callable[[Tensor], None]:
        def keep(rows: Tensor) -> None:
            if not self._counts:
                return
            self._found[layer] = _by_prompt(rows.repeat(BLOCKS.get(), 1), self._counts)
            if len(self._found) == len(self.modules):
                self._tell(tuple(self._found[one] for one in self._order))

        return keep

    def _tell(self, found: tuple[Tensor, ...]) -> None:
        for state in self._states:
            state["cls_attention"] = found


def _by_prompt(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """``(pictures, patches)`` of the tower, dealt to prompts of ``counts`` image tokens each: ``(B, K, patches)``.

    Raises:
        SteeringError: where an image token is not a patch.
    """
    total, patches = rows.shape
    if any(count % patches for count in counts) or sum(counts) != total * patches:
        raise SteeringError(
            f"The vision tower has {patches} patches for each of {total} pictures and the prompts {list(counts)} image "
            "tokens: they cannot be matched one to one."
        )
    pictures = torch.tensor([count // patches for count in counts], device=rows.device)
    there = torch.arange(int(max(counts)) // patches, device=rows.device) < pictures[:, None]  # (B, K)
    dealt = rows.new_zeros(*there.shape, patches)
    dealt[there] = rows
    return dealt
