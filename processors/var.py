"""VAR: attention that is parked on sinks goes to the rest of the image.

Kang, Kim, Kim, Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
2503.03321.

Some tokens draw attention without meaning anything; they show by massive values in a few channels D of the residual
stream x that enters a layer. For each sample and layer, once, from the prompt:

    phi(x) = max_{d in D} |x[d]| / RMS(x);   token j is a sink  <=>  phi(x_j) > tau        (S_v in the image, S_t text)

For every head and every query behind the image, with A its attention, V the image tokens, N = V without S_v:

    a_V = sum_{j in V} A_j,   r = sum_{j in N} A_j / a_V
    if a_V >= floor and r >= rho and S_v is not empty:
        A_j <- (1 - t) A_j                                for sinks j (text and image)
        A_j <- A_j + t a_S A_j / sum_{k in N} A_k         for j in N

Paper: tau 20, floor 0.2, t = 0.6, rho 0.8 for general tasks, 0.5 for hallucination tasks, 0.9 for vision-centric ones.
In the released code the fraction moved is 0.4 (its p = 0.6 is what stays). Layers 2 to L - 2: the first two have no
massive channels yet, and the paper leaves out the last.

Fused form: ``o + t a_S (o_N - o_S)``, exact (``attnsteer/redistribute.py``); masses per query head.
Cost: in a prompt four fused calls beside the plain one, in decode one explicit row, for each chosen layer.
Limits: the channels D are known for the base models in ``hosts/massive.py`` and measured elsewhere (ours,
unconfirmed); |x[d]| / RMS is at most sqrt(width), so tau = 20 means little in narrow models. Other groups find CHAIR
unchanged or slightly worse. Several pictures count as one image (ours).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnsteer.edits import Edit, Redistribute
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_number
from attnsteer.redistribute import key_mass
from attnsteer.site import AttentionCall, Site
from attnsteer.where import Where

from .pai import image_keys, layers_from


@dataclass(frozen=True)
class VAR(Processor):
    """Move ``fraction`` of the attention on sinks to the other image tokens, in heads that look at the image.

    Args:
        where: layers (decoder layers from 0) and heads, and ``steps`` (``"prefill"``, ``"decode"``, ``"all"``). None
            takes layers 2 to L - 2.
        fraction: share t of the sinks' attention that moves, 0 to 1. Paper: 0.6; release: 0.4. At 0 the method is off.
        tau: threshold of phi, from 0 up. Paper: 20. Above 0.6 sqrt(width) there is a warning; at ``math.inf`` the
            method is off.
        rho: least share of image attention that is not on sinks, from 0 up; above 1 nothing is selected. Paper: 0.8
            (general), 0.5 (hallucination), 0.9 (vision-centric).
        floor: least attention on the image, 0 to 1. Paper: 0.2.
        channels: the massive channels D. None: those known for the base model, or measured.
    """

    where: Where | None = None  # type: ignore[assignment]
    fraction: float = 0.6
    tau: float = 20.0
    rho: float = 0.5
    floor: float = 0.2
    channels: tuple[int, ...] | None = None

    kinds: ClassVar = ("causal",)
    needs: ClassVar = ("residual",)
    samples: ClassVar = (Redistribute(torch.zeros(1, 1).bool(), torch.zeros(1, 1).bool(), torch.ones(1, 1, 1)),)

    def __post_init__(self) -> None:
        check_number(self, "fraction", 0, 1)
        if self.tau != math.inf:
            check_number(self, "tau", 0)
        check_number(self, "rho", 0)
        check_number(self, "floor", 0, 1)
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
            if not self.channels or any(type(c) is not int or c < 0 for c in self.channels):
                raise SteeringError(f"VAR(channels={self.channels!r}): give positions in the residual stream, from 0.")

    @property
    def inert(self) -> bool:
        return self.fraction == 0 or math.isinf(self.tau)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"massive_channels": self.tau} if self.channels is None and not self.inert else {}

    def where_for(self, sites: Sequence[Site]) -> Where:
        self._check_width(sites)
        return Where(layers=layers_from(sites, 2, omit_last=1)) if self.where is None else self.where

    def _check_width(self, sites: Sequence[Site]) -> None:
        width = max((site.width for site in sites), default=0)
        if width and not self.inert and self.tau > 0.6 * width**0.5:
            warnings.warn(
                f"VAR(tau={self.tau:g}): a token reaches at most sqrt({width}) = {width**0.5:.3g}, so hardly one can "
                f"count as a sink: choose tau below {0.6 * width**0.5:.3g}.",
                stacklevel=2,
            )

    def refusals(self, site: Site) -> list[str]:
        if self.channels is None or max(self.channels) < site.width:
            return []
        return [f"VAR(channels={self.channels}) names a channel that a residual stream of width {site.width} has not."]

    def react(self, call: AttentionCall) -> Edit | None:
        positions, marked, prompt_image = self._sinks(call)
        assert call.spans is not None
        assert call.spans.reading is not None
        image, sinks = image_keys(call), on_keys(positions, marked, call.spans.reading.keys.to(call.q.device))
        visual = image & sinks
        others = image ^ visual
        others_mass, visual_mass = key_mass(call, others), key_mass(call, visual)
        chosen = selected(others_mass, visual_mass, self.rho, self.floor)
        behind = call.spans.reading.after_image.to(call.q.device)
        any_visual = (marked & prompt_image).any(-1)  # in the prompt, also where a window has lost it since
        chosen = chosen & any_visual[:, None, None] & behind[:, None]
        return Redistribute(sinks, others, torch.where(chosen, self.fraction, 0.0))

    def _sinks(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Positions ``(P,)`` of the prompt so far and bool ``(B, P)``, which are sinks and which image; kept from the
        prompt on."""
        if call.phase == "decode":
            if "sinks" not in call.state:
                raise SteeringError("VAR has not seen this prompt: call the steered model or its generate().")
            return call.state["positions"], call.state["sinks"], call.state["image"]
        assert call.residual is not None
        assert call.spans is not None
        assert call.spans.reading is not None
        reading, prompt = call.spans.reading, call.q.shape[2] - max(0, call.predicts - 1)  # guessed tokens are none
        positions = reading.queries[:prompt].to(call.q.device)
        channels = call.state["massive_channels"] if self.channels is None else self.channels
        column = positions - reading.keys[0].to(call.q.device)
        image, text = (keys.index_select(1, column) for keys in (image_keys(call), text_keys(call)))
        sinks = (phi(call.residual[:, :prompt], channels) > self.tau) & (image | text)
        if call.lanes:  # a pass beside the generation, of the whole prompt: nothing to keep
            return positions, sinks, image
        if "sinks" in call.state and call.state["open"]:
            positions = torch.cat([call.state["positions"], positions])
            sinks, image = (torch.cat([call.state[n], x], 1) for n, x in (("sinks", sinks), ("image", image)))
        call.state.update(positions=positions, sinks=sinks, image=image, open=call.predicts == 0)
        return positions, sinks, image


# ---- what was found --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerSinks:
    """The sinks of one layer in the last prompt: for each row of the batch the positions, padding counted."""

    layer: int
    image: tuple[tuple[int, ...], ...]
    text: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """For each row the number of sinks in the image and in the text."""
        return tuple((len(image), len(text)) for image, text in zip(self.image, self.text, strict=True))


def sink_report(states: Mapping[Site, Mapping[str, Any]]) -> tuple[LayerSinks, ...]:
    """Where the sinks of the last prompt are, layer by layer: ``sink_report(steering.states(var))``.

    Empty before the first prompt. Hundreds of sinks in a layer mean that tau is too low for it: norms grow with depth.
    """
    found = []
    for site, state in states.items():
        if "sinks" in state:
            rows = [(state["sinks"] & state["image"]), (state["sinks"] & ~state["image"])]
            places = [tuple(tuple(state["positions"][row].tolist()) for row in marks) for marks in rows]
            found.append(LayerSinks(site.layer, *places))
    return tuple(found)


# ---- the formulas ----------------------------------------------------------------------------------------------------
def phi(x: Tensor, channels: Sequence[int]) -> Tensor:
    """``max_{d in D} |x[d]| / RMS(x)`` in float32, ``(..., width)`` -> ``(...)``; 0 without channels."""
    x = x.float()
    if not channels:
        return torch.zeros_like(x[..., 0])
    rms = (x.square().mean(-1) + 1e-6).sqrt()
    return torch.stack([x[..., channel].abs() for channel in channels]).amax(0) / rms


def selected(others: Tensor, visual: Tensor, rho: float, floor: float) -> Tensor:
    """Bool: ``a_V >= floor`` and ``r >= rho``, from the masses on image tokens that are no sinks, and that are."""
    total = others + visual
    return (total >= floor) & (others >= rho * total) & (others > 0)


def on_keys(positions: Tensor, marked: Tensor, keys: Tensor) -> Tensor:
    """Marks ``(B, P)`` at positions ``(P,)`` of the prompt, which follow each other, for the keys ``(Nk,)`` of a call:
    bool ``(B, Nk)``. Keys behind the prompt have none, and marks of keys that a window lost go with them."""
    column, last = keys - positions[0], positions.shape[0] - 1
    return marked.index_select(1, column.clamp(0, last)) & (column >= 0) & (column <= last)


def text_keys(call: AttentionCall) -> Tensor:
    """Bool ``(B, Nk)``: the text tokens among the keys, without padding."""
    assert call.spans is not None
    assert isinstance(call.spans.text, Tensor)
    return call.spans.text.to(call.q.device)
