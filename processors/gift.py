"""GIFT: look again at what the gaze shifted to while the question was read.

Qi et al., "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation", 2025,
arXiv 2510.22067.

A survey, one plain prefill, gives the map s in [0, 1] over the image tokens (``gaze_shift.py``); ``f = exp(alpha s)``.
Then, in the enhancement layers, at prefill and decode, for the predicting row A alone, with V the image tokens and T
the whole question:

    HV, HQ = the halves of the heads with the largest plain mass on V and on T
    r      = (sum_HV sum_V A f) / (sum_HV sum_V A)          one number a row, layer and step; 1 without image mass
    A[h,V] *= f  for h in HV;    A[h,T] *= beta r  for h in HQ;    then every head's row is renormalised

Fused form, exact: the log-bias ``log f`` and ``log(beta r)`` on the keys of one row (``KeyBias(queries="last")``). Head
sets and r need that row's plain probabilities. Cost: one prefill a generation (``attnsteer.prefill`` shares it among
many strengths), and one attention row a layer and step.
Limits: e^5 = 148, so the most salient token rules its row; look at the length of captions beside their scores. The
question is the text of the last turn, images left out; of a prompt typed by hand without a chat template, what stands
behind the last image. A flat map gives f = 1: a row without image or question, and one whose question stands before
its image where rows see only what is behind them; the last two warn. Where a method of the ``image_free`` lane is
attached too, that lane is plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.edits import KeyBias
from attnsteer.errors import SteeringError
from attnsteer.logits import predicting_weights
from attnsteer.processor import Processor, check_number
from attnsteer.site import AttentionCall, Site, Spans, expand_rows
from attnsteer.where import Where

from .gaze_shift import GazeShift, TokenSelector, check_selector, head_count, head_refusals, spans_of, top


@dataclass(frozen=True)
class Setting:
    """What the paper chose for a model: saliency layer, first and last enhancement layer, alpha."""

    saliency: int
    first: int
    last: int
    alpha: float


PAPER = {
    (32, 32, 32): Setting(11, 12, 22, 5.0),  # LLaVA-1.5-7B
    (40, 40, 40): Setting(10, 14, 20, 5.0),  # LLaVA-1.5-13B
    (28, 28, 4): Setting(14, 5, 18, 4.0),  # Qwen2-VL-7B
}
"""By number of layers, heads and key/value heads."""
_ALPHAS = {(heads, kv_heads): setting.alpha for (_, heads, kv_heads), setting in PAPER.items()}


@dataclass(frozen=True)
class GIFT(Processor):
    """Multiply the attention of the predicting row on salient image tokens, and on the question as much.

    The map s of the last prompt is ``steering.plans[i].shared["saliency"]``, ``(B, N)``.

    Args:
        where: the enhancement layers, and ``steps`` (``"prefill"``, ``"decode"``, ``"all"``). None takes the paper's:
            12 to 22 for LLaVA-1.5-7B, 14 to 20 for LLaVA-1.5-13B, 5 to 18 for Qwen2-VL-7B, told apart by their numbers
            of layers and heads; elsewhere from 12/32 to 22/32 of the layers (ours).
        alpha: ``f = exp(alpha s)``, 0 to 10. At 0 (and beta 1) the method is off. None takes the paper's: 4 for the
            shape of Qwen2-VL-7B, 5 elsewhere.
        beta: factor on the question beside r, 0.01 to 100. Paper: 1.
        saliency: the saliency layers, counted from 0. None takes the paper's (11, 10, 14); elsewhere the layer at 11/32
            of the depth (ours). ``saliency_layer`` finds it from prompts.
        token_selector: which words of the question count: ``"content"`` leaves out English function words, ``"all"``
            counts every token, a function gets the words and says which count. A repeated word counts where it stands
            last. All but ``"all"`` need the tokenizer (``processor=`` of ``steer``).
        saliency_heads, enhanced_heads: fraction of the heads that count, above 0, at most 1; rounded down. Paper: 0.5.
        clamp: standard deviations to which the map is cut. Paper: 3. None cuts nothing.
        marker: the text that asks for the answer in prompts typed by hand (``"ASSISTANT:"``) where the Hugging Face
            processor has no chat template.
    """

    where: Where | None = None  # type: ignore[assignment]
    alpha: float | None = None
    beta: float = 1.0
    saliency: int | tuple[int, ...] | None = None
    token_selector: TokenSelector = "content"
    saliency_heads: float = 0.5
    enhanced_heads: float = 0.5
    clamp: float | None = 3.0
    marker: str = ""

    kinds: ClassVar = ("causal",)
    needs: ClassVar = ("question",)
    last_row_only: ClassVar = True
    per_row: ClassVar = ("alpha", "beta")
    samples: ClassVar = (KeyBias(torch.ones(1, 1, 1), queries="last"),)

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number(self, "alpha", 0, 10)
        check_number(self, "beta", 0.01, 100)
        for name in ("saliency_heads", "enhanced_heads"):
            check_number(self, name, 0, 1)
        if self.clamp is not None:
            check_number(self, "clamp", 0)
        check_selector(self)

    @property
    def inert(self) -> bool:
        return self.alpha == 0 and self.beta == 1

    def where_for(self, sites: Sequence[Site]) -> Where:
        if self.where is not None:
            return self.where
        setting, layers = setting_for(sites), decoder_layers(sites)
        chosen = [n for n in layers if setting.first <= n <= setting.last]
        return Where(layers=chosen) if chosen else Where()

    def survey(self, sites: Sequence[Site]) -> GazeShift:
        wanted = setting_for(sites).saliency if self.saliency is None else self.saliency
        layers = Where(layers=[wanted] if isinstance(wanted, int) else list(wanted))
        return GazeShift(layers, self.token_selector, self.saliency_heads, self.clamp, self.marker)

    def refusals(self, site: Site) -> list[str]:
        return head_refusals(site, self.enhanced_heads, "GIFT")

    def react(self, call: AttentionCall) -> KeyBias | None:
        if call.lanes or call.predicts == 0:  # a chunk of the prompt that is not its last
            return None
        if "saliency" not in call.shared:
            raise SteeringError("GIFT has not seen this prompt: call the steered model or its generate().")
        spans, weights = spans_of(call), predicting_weights(call)
        device, batch = weights.device, weights.shape[0]
        steered = expand_rows(call.shared["image"].to(device), batch)[:, None]
        saliency = at_keys(expand_rows(call.shared["saliency"].to(device), batch), spans)
        bias = log_factors(
            weights,
            call.by_row(self._alpha(call.site), saliency) * saliency,
            spans.image.to(device) & steered,
            spans.question.to(device) & steered,
            call.by_row(self.beta, weights[..., 0]),
            head_count(call.q.shape[1], self.enhanced_heads),
        )
        return KeyBias(bias, queries="last")

    def _alpha(self, site: Site) -> float:
        if self.alpha is not None:
            return self.alpha
        return _ALPHAS.get((site.heads, site.kv_heads), 5.0)


# ---- the formulas ----------------------------------------------------------------------------------------------------
def log_factors(
    weights: Tensor, log_f: Tensor, image: Tensor, question: Tensor, beta: float | Tensor, count: int
) -> Tensor:
    """The logarithms of what the weights are multiplied by before they are renormalised.

    Args:
        weights: plain ``A`` of the predicting rows, ``(B, H, n, Nk)``.
        log_f: ``alpha s`` at each key, ``(B, Nk)``.
        image, question: bool ``(B, Nk)``, V and T; a row with neither gets zeros.
        beta: factor on the question beside r; also ``(B, 1, 1)``.
        count: heads in HV and in HQ.

    Returns:
        ``(B, H, n, Nk)``.
    """
    image, question, log_f = (x[:, None, None] for x in (image, question, log_f))
    seen, asked = (torch.where(keys, weights, 0).sum(-1) for keys in (image, question))  # (B, H, n)
    looking, listening = top(seen, count), top(asked, count)
    boosted = torch.where(image, weights * log_f.exp(), 0).sum(-1)
    before, after = (torch.where(looking, mass, 0).sum(1, keepdim=True) for mass in (seen, boosted))
    ratio = torch.where(before > 0, after / before, 1)  # r, (B, 1, n)
    visual = torch.where(looking[..., None] & image, log_f.to(weights.dtype), 0)
    return torch.where(listening[..., None] & question, (beta * ratio).log()[..., None], visual)


# ---- which tokens, heads and layers ----------------------------------------------------------------------------------
def at_keys(saliency: Tensor, spans: Spans) -> Tensor:
    """The map over the prompt ``(B, N)`` at the keys of a call ``(B, Nk)``; what was generated has none."""
    assert spans.places is not None
    places, length = spans.places.to(saliency.device), saliency.shape[1]
    return torch.where(places < length, saliency[:, places.clamp_max(length - 1)], 0)


def decoder_layers(sites: Sequence[Site]) -> list[int]:
    return sorted({site.layer for site in sites if site.kind == "causal"})


def setting_for(sites: Sequence[Site]) -> Setting:
    """The paper's setting for models of its shape; elsewhere the same relative depth as in LLaVA-1.5-7B (ours)."""
    layers = decoder_layers(sites)
    shape = (len(layers), sites[0].heads, sites[0].kv_heads)
    if shape in PAPER or not layers:
        return PAPER.get(shape, PAPER[32, 32, 32])
    base = PAPER[32, 32, 32]
    saliency, first, last = (layers[len(layers) * n // 32] for n in (base.saliency, base.first, base.last))
    return Setting(saliency, first, last, base.alpha)
