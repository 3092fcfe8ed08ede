"""GazeShift: where in the image the attention goes while the question is read. Reads; changes nothing.

Qi et al., "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation", 2025,
arXiv 2510.22067: the saliency map of GIFT (``gift.py``).

From the row before the question to its last row, at the saliency layers,

    D[h,i,j] = max(A[h,i,j] - A[h,i-1,j], 0)          i: content words of the question, j: image tokens
    m[j]     = mean of D over layers, over the half of the heads with the largest sum of D, and i
    s        = m clamped to mean +- 3 std (unbiased), then min-max to [0, 1]

A sink that everything looks at shifts nothing. Memory: some ``B * H * |question| * Nk * 4`` bytes at a layer; no map.
The content words of the paper come from spaCy's tagger, here from a list of English function words; a question without
content words counts whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnsteer.attach import steer
from attnsteer.capture import probabilities
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_choice, check_number
from attnsteer.site import AttentionCall, Site, Spans, Word
from attnsteer.where import Where

TokenSelector = str | Callable[[Sequence[str]], Sequence[bool]]
"""``"content"``, ``"all"``, or a function from the words of a question to which of them count."""


_FUNCTION_WORDS = """
a an the this that these those some any each every either neither no all both such another
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves one's who whom whose which what whatever whoever there
am is are was were be been being do does did done doing have has had having can could may might must shall should
will would ought isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't can't couldn't won't
wouldn't shouldn't it's that's there's what's who's let's
of in on at by to from with without into onto upon over under above below behind beside besides between among
through during before after about against across along around near off out up down inside outside within toward
towards per via like as than
and or but nor so yet if then else because while although though whether unless until since when where why how
not n't please yes ok okay
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that carry grammar rather than content: determiners, pronouns, auxiliaries, prepositions,
conjunctions, particles."""


@dataclass(frozen=True)
class GazeShift(Processor):
    """Read where the attention of the question's tokens shifts to in the image.

    Leaves in ``call.shared`` ``saliency`` ``(B, N)``, the map s over the prompt's tokens (0 outside the image), and
    ``image`` ``(B,)``, rows with an image; in ``call.state`` ``shift`` ``(B,)``, the sum of D over all heads.

    Args:
        where: the saliency layers.
        token_selector: which words of the question count: ``"content"`` leaves out English function words, ``"all"``
            counts every token, a function gets the words and says which count. A repeated word counts where it stands
            last. All but ``"all"`` need the tokenizer (``processor=`` of ``steer``).
        heads: fraction of the heads that count, those with the largest shift; rounded down. Paper: 0.5.
        clamp: standard deviations to which the map is cut. Paper: 3. None cuts nothing.
        marker: the text that asks for the answer in prompts typed by hand (``"ASSISTANT:"``) where the Hugging Face
            processor has no chat template.
    """

    token_selector: TokenSelector = "content"
    heads: float = 0.5
    clamp: float | None = 3.0
    marker: str = ""

    kinds: ClassVar = ("causal",)
    reads_only: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "heads", 0, 1)
        if self.clamp is not None:
            check_number(self, "clamp", 0)
        check_selector(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("question",) if self.token_selector == "all" else ("question", "words")

    def refusals(self, site: Site) -> list[str]:
        return head_refusals(site, self.heads, type(self).__name__)

    def react(self, call: AttentionCall) -> None:
        if call.phase != "prefill" or call.lanes:
            return
        spans = spans_of(call)
        asked = chosen_tokens(spans, self.token_selector) & spans.image.any(-1, keepdim=True)
        rows = asked.any(0).nonzero().flatten().tolist()
        first, last = (max(1, rows[0]), rows[-1]) if rows else (1, 0)
        if last >= call.q.shape[2]:
            raise SteeringError("GazeShift reads a prompt as a whole: leave out prefill_chunk_size.")
        shift = call.q.new_zeros(call.q.shape[0], call.q.shape[1], call.k.shape[2], dtype=torch.float32)
        if rows:
            weights = probabilities(call, slice(first - 1, last + 1), spans.image)
            shift = positive_shift(weights, asked[:, first : last + 1])
        image = spans.image.to(shift.device)
        mean = mean_over_heads(shift, asked.sum(-1).to(shift.device), head_count(call.q.shape[1], self.heads))
        call.state["shift"] = shift.sum((1, 2))
        warn_of_blind_rows(image.any(-1) & (call.state["shift"] == 0))
        maps = [each.to(mean.device) for each in call.shared.get("maps", ())] + [mean]
        call.shared.update(
            maps=maps, image=image.any(-1), saliency=normalised(sum(maps) / len(maps), image, self.clamp)
        )


def saliency_layer(
    model: torch.nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    processor: Any = None,
    token_selector: TokenSelector = "content",
    marker: str = "",
) -> tuple[int, dict[int, float]]:
    """The layer whose attention shifts most while questions are read: ``argmax_l sum of D`` over prompts.

    Args:
        model: a vision-language model to which nothing is attached.
        prompts: inputs of ``model(...)``, with their images; the paper takes about a hundred, of any kind.
        processor: the Hugging Face processor; needed unless ``token_selector="all"``.
        token_selector, marker: see ``GIFT``.

    Returns:
        The layer, and the mean shift of a prompt at every layer.

    Raises:
        SteeringError: no prompts.
    """
    reader = GazeShift(Where(), token_selector, marker=marker)
    totals: dict[int, float] = {}
    count = 0
    with steer(model, reader, processor=processor) as steering, torch.no_grad():
        for inputs in prompts:
            model(**inputs, use_cache=False)
            for site, state in steering.states(reader).items():
                totals[site.layer] = totals.get(site.layer, 0.0) + float(state["shift"].sum())
            count += len(inputs["input_ids"])
    if not count:
        raise SteeringError("saliency_layer needs prompts: give the inputs of at least one.")
    means = {layer: total / count for layer, total in totals.items()}
    return max(means, key=lambda layer: means[layer]), means


# ---- the formulas ----------------------------------------------------------------------------------------------------
def positive_shift(weights: Tensor, asked: Tensor) -> Tensor:
    """``sum_i max(A[i] - A[i-1], 0)`` over the asked rows: ``(B, H, n + 1, N)``, bool ``(B, n)`` -> ``(B, H, N)``.

    The first row of ``weights`` is the one before the first row of ``asked``.
    """
    steps = (weights[:, :, 1:] - weights[:, :, :-1]).clamp_min(0)
    return (steps * asked.to(weights.device)[:, None, :, None]).sum(2)


def mean_over_heads(shift: Tensor, tokens: Tensor, count: int) -> Tensor:
    """``m``: the mean over asked tokens and over the ``count`` heads of a row that shift most, ``(B, H, N) -> (B, N)``.

    ``tokens``: int ``(B,)``, how many tokens were summed in ``shift``.
    """
    kept = top(shift.sum(-1), count)[..., None]
    return torch.where(kept, shift, 0).sum(1) / (count * tokens.clamp_min(1))[:, None]


def normalised(values: Tensor, image: Tensor, clamp: float | None) -> Tensor:
    """``s``: clamped to ``clamp`` standard deviations, min-max to [0, 1] over the image tokens of a row, 0 elsewhere.

    A flat map, and a single token, give 0. ``(B, N)``, bool ``(B, N)`` -> ``(B, N)``.
    """
    if clamp is not None:
        number = image.sum(-1, keepdim=True)
        mean = torch.where(image, values, 0).sum(-1, keepdim=True) / number.clamp_min(1)
        square = torch.where(image, values - mean, 0).square().sum(-1, keepdim=True)
        reach = clamp * (square / (number - 1).clamp_min(1)).sqrt()
        values = torch.minimum(torch.maximum(values, mean - reach), mean + reach)
    low = torch.where(image, values, math.inf).amin(-1, keepdim=True)
    span = torch.where(image, values, -math.inf).amax(-1, keepdim=True) - low
    return torch.where(image & (span > 0), (values - low) / span, 0)


def top(mass: Tensor, count: int) -> Tensor:
    """Bool of the same shape: the ``count`` heads with the largest values, along axis 1."""
    chosen = mass.topk(count, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, chosen, True)


def head_count(heads: int, fraction: float) -> int:
    """``fraction`` of the heads, rounded down (half of them: H // 2)."""
    return int(heads * fraction + 1e-6)


# ---- which tokens and heads ------------------------------------------------------------------------------------------
def spans_of(call: AttentionCall) -> Any:
    """The spans of a call, whose image and question differ per row."""
    spans = call.spans
    if spans is None or spans.question is None or not isinstance(spans.image, Tensor):
        raise SteeringError(f"{call.site.name!r} does not know which tokens are image and question.")
    return spans


def warn_of_blind_rows(blind: Tensor) -> None:
    """Say which rows ``(B,)`` have an image that no token of their question looks at."""
    if rows := blind.nonzero().flatten().tolist():
        warnings.warn(
            f"The map of the image is empty in the rows {rows} of the batch (counting those that ask for it), which "
            "stay as they are: their prompt has no question, or the question stands before the image and cannot see "
            "it. Put the image first; marker= and processor= help to find a question.",
            stacklevel=2,
        )


def check_selector(owner: Any) -> None:
    """Refuse a ``token_selector`` that is neither a function nor a known word."""
    if not callable(owner.token_selector):
        check_choice(owner, "token_selector", ("content", "all"))


def chosen_tokens(spans: Spans, token_selector: TokenSelector) -> Tensor:
    """Bool ``(B, N)``: the tokens of the words that count; all tokens of the question where no word does."""
    assert spans.question is not None
    if token_selector == "all":
        return spans.question
    assert spans.words is not None
    chosen = torch.zeros(spans.question.shape, dtype=torch.bool)
    for row, words in enumerate(spans.words):
        for word in counting_words(words, token_selector):
            chosen[row, word.start : word.stop] = True
    chosen = chosen.to(spans.question.device) & spans.question
    return torch.where(chosen.any(-1, keepdim=True), chosen, spans.question)


def counting_words(words: Sequence[Word], token_selector: TokenSelector) -> list[Word]:
    """The words that a selector takes, each spelling once, where it stands last."""
    texts = [word.text for word in words]
    if isinstance(token_selector, str):
        takes: Sequence[bool] = [text.lower().replace("’", "'") not in FUNCTION_WORDS for text in texts]
    else:
        takes = token_selector(texts)
        if len(takes) != len(texts):
            raise SteeringError(f"token_selector gave {len(takes)} answers for {len(texts)} words: one each.")
    return list({word.text: word for word, take in zip(words, takes, strict=True) if take}.values())


def head_refusals(site: Site, fraction: float, name: str) -> list[str]:
    """A part of the heads needs heads to choose from."""
    if site.heads < 2:
        return [f"{name} chooses among heads, and {site.name!r} has one."]
    if head_count(site.heads, fraction) < 1:
        return [f"{name}: {fraction:g} of the {site.heads} heads of {site.name!r} is less than one head."]
    return []
