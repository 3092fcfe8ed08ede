"""Heat maps of an answer: where in the picture a vision-language model looks while it says each word.

    heat = attnsteer.answer_maps(model, hf_processor, picture, "What is in the image?")
    heat.of("dog").save("dog.png")

The map of an answer token is the row of the attention map that predicts it (the last token of the prompt for the first
one), its image columns alone, averaged over the heads of a layer and over the layers, or apart by either. Rows come
from q, k and the log-sum-exp beside the fused kernel while ``generate`` runs as it would (``capture.probabilities``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..attach import attach, sites
from ..capture import chosen_heads, probabilities
from ..chat import question_inputs
from ..errors import SteeringError
from ..hosts.vlm_families import vision_tokens
from ..hosts.vlm_grids import View, covered_area, image_grids
from ..hosts.worlds import is_language_model
from ..processor import Processor
from ..site import AttentionCall, Kind, Site
from ..spans import find_each, token_bytes
from ..where import Selection, Where
from .means import Axis, Means, Per, kept_axes
from .result import HeatMaps

if TYPE_CHECKING:
    from PIL.Image import Image

Sinks = Literal["keep", "mark", "drop"]
ALLOWED: tuple[Axis, ...] = ("layer", "head")


@dataclass(frozen=True, eq=False)
class AnswerMaps(HeatMaps):
    """Heat maps over the picture of a question, one for each token of the answer.

    Attributes:
        question, answer: what was asked and said.
        tokens: the text of each token of the answer.
        ids: ``(tokens,)``.
        against: the general prompt that maps are divided by; values are then ratios.
    """

    question: str = ""
    answer: str = ""
    tokens: tuple[str, ...] = ()
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    against: str | None = None
    tokenizer: Any = None

    def of(self, *words: str) -> AnswerMaps:
        """The maps of words or phrases of the answer: the mean over the tokens that spell one, wherever it occurs.

        Raises:
            SteeringError: a word that the answer does not have; says which tokens it has.
        """
        if self.words != self.tokens:
            raise SteeringError("These are maps of words: ask the maps of the whole answer for others.")
        if self.tokenizer is None:
            raise SteeringError("Words are found by the tokenizer: give the model's Hugging Face processor.")
        rows = []
        for word in words:
            places = sorted({i for one in find_each(self.tokenizer, self.ids.tolist(), word) for i in one})
            if not places:
                said = ", ".join(f"{i} {token!r}" for i, token in enumerate(self.tokens))
                raise SteeringError(f"The answer does not have the word {word!r}; its tokens are {said}.")
            rows.append(self.maps[places].mean(0))
        return replace(self, maps=torch.stack(rows), words=tuple(words))

    def note(self, heat: Tensor) -> str:
        """What share of its attention the token gives to the picture; of ratios the highest."""
        return f"max {heat.max().item():.3g} x" if self.against else f"{100 * heat.sum().item():.1f} % on picture"


@dataclass(frozen=True)
class _AnswerReader(Processor):
    """Hands every attention call to the reading in progress and changes nothing."""

    reading: Any = None

    kinds: ClassVar[tuple[Kind, ...]] = ("causal",)
    reads_only: ClassVar = True

    def react(self, call: AttentionCall) -> None:
        self.reading.read(call)


class _Reading:
    """What is read while one answer is generated.

    Args:
        ranks: ``(h, w)``, which of the prompt's image tokens, in their order, is at a place of the picture.
        after: how many tokens of the prompt come after the last image token.
        factor: see ``answer_maps``.
    """

    def __init__(
        self, ranks: Tensor, images: int, after: int, selection: Selection, axes: Sequence[Axis], factor: float
    ):
        self.ranks, self.images, self.after = ranks, images, after
        self.selection, self.factor = selection, factor
        self.means = Means(("step", *axes))
        self.passes: dict[Site, int] = {}
        self._prompt: dict[Site, Tensor] = {}
        self._outliers: Tensor | None = None
        self._rows: Tensor | None = None

    def read(self, call: AttentionCall) -> None:
        """The rows after the image in prefill, the one new row in decode; nothing of a pass that compares with the
        prompt without its image."""
        if "image_free" in call.lanes:
            return
        mask = call.spans.image if call.spans else None
        new = call.q.shape[2]
        if not isinstance(mask, Tensor) or call.q.shape[0] != 1 or (call.phase == "decode" and new != 1):
            raise SteeringError("answer_maps follows one answer, one token at a time: no beams, no assistant model.")
        rows = slice(new - min(self.after, new), new) if call.phase == "prefill" else slice(0, 1)
        with torch.no_grad():
            found = probabilities(chosen_heads(call, self.selection[call.site]), rows, mask)[0]  # (H, rows, keys)
            maps = self._placed(found, mask[0])  # (H, rows, h, w)
        if call.phase == "prefill":
            self._prompt[call.site] = maps  # a prompt may come in chunks: its last one counts
            self.passes[call.site] = 0
            return
        self._flush(call.site)
        self._add(call.site, maps)

    def _flush(self, site: Site) -> None:
        if site in self._prompt:
            self._add(site, self._prompt.pop(site))

    def _add(self, site: Site, maps: Tensor) -> None:
        self.means.add(maps[:, -1], self.passes[site], site.layer)
        self.passes[site] += 1
        rows = maps.mean(0)  # (rows, h, w)
        level = rows.mean((-1, -2), keepdim=True)
        outliers, seen = ((rows > self.factor * level).sum(0), (level > 0).sum())
        self._outliers = outliers if self._outliers is None else self._outliers + outliers.to(self._outliers.device)
        self._rows = seen if self._rows is None else self._rows + seen.to(self._rows.device)

    def _placed(self, found: Tensor, image: Tensor) -> Tensor:
        """Keys to places of the picture. A sliding window holds the last of the image tokens only: those before it get
        nothing."""
        after = image.flip(0).cumsum(0).flip(0)
        rank = torch.where(image, self.images - after, self.images)  # (keys,), all that is no image into one more slot
        slots = found.new_zeros(*found.shape[:-1], self.images + 1)
        slots = slots.index_add(-1, rank.to(found.device), found)
        return slots[..., self.ranks.to(found.device)]

    def finish(self) -> None:
        for site in list(self._prompt):
            self._flush(site)

    def sinks(self) -> Tensor:
        """Bool ``(h, w)``: the places that are outliers in most rows."""
        assert self._outliers is not None and self._rows is not None
        return (2 * self._outliers > self._rows).cpu()


def answer_maps(
    model: torch.nn.Module,
    hf_processor: Any,
    image: Image | None = None,
    question: str | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    per: Per = "average",
    where: Where | None = None,
    sinks: Sinks = "keep",
    sink_factor: float = 10.0,
    against: str | None = None,
    view: View = "finest",
    processors: Sequence[Processor] = (),
    max_new_tokens: int = 64,
    **generate: Any,
) -> AnswerMaps:
    """Ask about a picture, unchanged, and see where each token of the answer looks.

    Args:
        model, hf_processor: a vision-language model and its Hugging Face processor (None with ``inputs``, where words
            are not asked for).
        image, question: put into the model's chat template.
        inputs: instead of ``question``: what ``generate`` takes, one prompt with one picture; ``image`` is then drawn.
        per: what is kept apart: ``"average"`` nothing, ``"layer"``, or ``"head"`` (each head of each layer).
        where: layers and heads that are read (default: the second half of the layers; methods that read such maps,
            like CARVE and ViCrop, choose theirs there or near its start).
        sinks: image tokens that most rows look at, whatever they say: ``"keep"`` them, ``"mark"`` them with crosses, or
            ``"drop"`` them (their maps are 0). A token is a sink where its mass, averaged over the heads of a layer, is
            more than ``sink_factor`` times the mean over the picture in more than half of all rows: those of the prompt
            after the image and those of the answer, in every layer that is read.
        against: a general prompt, e.g. "Write a general description of the image.": maps are divided by those of the
            row that would answer it (relative attention of ViCrop, arXiv:2502.17422), which takes what every question
            looks at out of them. 1 is as much as there.
        view: of a picture that is cut into tiles, ``"finest"`` reads the tiles and ``"overview"`` the whole beside
            them.
        processors: methods that steer the answer that is looked at. Maps are read before the edits of their own call.
        max_new_tokens, **generate: for ``model.generate``; greedy unless they say otherwise.

    Returns:
        The answer and its maps ``(tokens, [layers], [heads], h, w)``: what share of its attention the row that predicts
        a token gives to each place. ``picture`` is the part of the picture that the tokens see.

    Raises:
        SteeringError: no such model or layer, several pictures, beams; or arguments that contradict each other.

    Memory: rows after the image x keys x heads of one layer while it is read; then tokens x places for each combination
    of the kept axes. What was compiled runs eagerly while it is read.
    """
    axes = kept_axes(per, ALLOWED)
    _check(model, image, question, inputs, sinks, against)
    if inputs is None:
        given = question_inputs(hf_processor, [image], [question or ""]).to(model.device, model.dtype)
    else:
        given = inputs
    depth = 1 + max(site.layer for site in sites(model))
    chosen = where or Where(layers=slice(depth // 2, None))
    run = _Run(model, hf_processor, image, axes, chosen, view, tuple(processors), sink_factor)
    reading, ids = run(given, {"max_new_tokens": max_new_tokens, "do_sample": False, **generate})
    maps, numbers = reading.means.result(run.heads)
    maps = maps[: len(ids)]  # (tokens, layers, heads, h, w)
    if against is not None:
        other = question_inputs(hf_processor, [image], [against]).to(model.device, model.dtype)
        plain, _ = run(other, {"max_new_tokens": 1, "do_sample": False})
        general = plain.means.result(run.heads)[0][:1]
        maps = maps / general.clamp_min(torch.finfo(maps.dtype).tiny)
    found = None if sinks == "keep" else reading.sinks()
    if found is not None and sinks == "drop":
        maps = torch.where(found, 0.0, maps)
    return _result(run, maps, ids, numbers, found, question or "", against)


def _result(
    run: _Run, maps: Tensor, ids: Tensor, numbers: Any, sinks: Tensor | None, question: str, against: str | None
) -> AnswerMaps:
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    tokens = _spelled(tokenizer, ids.tolist())
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip() if tokenizer is not None else "".join(tokens)
    kept = {name: places for name, places in numbers.items() if name != "step"}
    gone = [i for i, name in enumerate(ALLOWED, start=1) if name not in kept]
    return AnswerMaps(
        maps.squeeze(gone),
        tokens,
        kept,
        run.seen,
        f"{question} {answer}".strip(),
        sinks,
        question=question,
        answer=answer,
        tokens=tokens,
        ids=ids,
        against=against,
        tokenizer=tokenizer,
    )


@dataclass(eq=False)
class _Run:
    """Prompts about one picture, each generated from with a reader attached."""

    model: Any
    processor: Any
    picture: Image | None
    axes: Sequence[Axis]
    where: Where
    view: View
    steering: Sequence[Processor]
    factor: float

    def __post_init__(self) -> None:
        self.selection = self.where.select(sites(self.model), ("causal",))
        self.heads = {site.layer: heads for site, heads in self.selection.items()}

    @property
    def seen(self) -> Image | None:
        """The part of the picture that the tokens see; black where it was padded."""
        if self.picture is None:
            return None
        left, top, right, bottom = (round(end) for end in covered_area(self.processor, self.picture.size))
        return self.picture.convert("RGB").crop((left, top, right, bottom))

    def __call__(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[_Reading, Tensor]:
        """The reading and the ids of the answer without the token that ends it."""
        prompt: Tensor = given["input_ids"]
        pictures = [self.picture] if self.picture is not None else None
        (grids,) = image_grids(self.model, given, self.processor, pictures, self.view)
        if len(grids) != 1:
            raise SteeringError(f"answer_maps is for prompts with one picture; this one holds {len(grids)}.")
        image = vision_tokens(self.model.config).image_mask(prompt)[0].cpu()
        ranks = (image.cumsum(0) - 1)[grids[0]]
        after = len(image) - 1 - int(image.nonzero()[-1])
        reading = _Reading(ranks, int(image.sum()), max(after, 1), self.selection, self.axes, self.factor)
        reader = _AnswerReader(self.where, reading)
        steering = attach(self.model, *self.steering, reader, processor=self.processor)
        with steering, torch.compiler.set_stance("force_eager"):
            out = self.model.generate(**given, **options)
        out = out if isinstance(out, Tensor) else out.sequences
        reading.finish()
        ids = out[0, prompt.shape[1] :].cpu()
        end = self.model.generation_config.eos_token_id
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        while len(ids) > 1 and int(ids[-1]) in ends:
            ids = ids[:-1]
        return reading, ids


def _spelled(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    if tokenizer is None:
        return tuple(f"<{i}>" for i in ids)
    return tuple(piece.decode(errors="replace") for piece in token_bytes(tokenizer, ids))


def _check(model: Any, image: Any, question: Any, inputs: Any, sinks: str, against: Any) -> None:
    reasons = []
    if not is_language_model(model):
        reasons.append(f"answer_maps needs a vision-language model of transformers, not a {type(model).__name__}.")
    if sinks not in ("keep", "mark", "drop"):
        reasons.append(f"sinks={sinks!r} is not known: allowed are 'keep', 'mark', 'drop'.")
    if (inputs is None) == (question is None):
        reasons.append("Give a question about an image, or inputs= as generate takes them.")
    elif inputs is None and image is None:
        reasons.append("A question needs the image that it is about.")
    if inputs is not None and against is not None:
        reasons.append("against= asks another question about the image: give image and question instead of inputs=.")
    if inputs is not None and inputs["input_ids"].shape[0] != 1:
        reasons.append(f"inputs= holds {inputs['input_ids'].shape[0]} prompts: give one at a time.")
    if reasons:
        raise SteeringError(reasons)
