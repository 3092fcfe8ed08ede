"""Sites, spans and the attention call: what the engine knows when a model is about to attend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["self", "cross", "joint", "causal", "unknown"]
Phase = Literal["denoise", "prefill", "decode"]
Kernel = Callable[..., Tensor]
"""``kernel(q, k, v, mask=...) -> (B, H, Nq, D)``: the backend that the user selected. Without ``mask`` the mask of the
original call applies; any query subset needs the matching mask (``AttentionCall.mask_rows``)."""


@dataclass(frozen=True)
class Site:
    """One attention module of a host model.

    Attributes:
        name: dotted path of the module below the model.
        kind: ``self`` (image queries and keys), ``cross`` (text keys), ``joint`` (one sequence of text and image),
            ``causal`` (decoder of a language model) or ``unknown`` (a family without a descriptor).
        layer: transformer block or decoder layer, counted from 0 in execution order; a layer may hold several sites.
        index: position among all sites of the model in execution order.
        heads, kv_heads, head_dim: as the kernel sees them (``kv_heads < heads`` is grouped-query attention).
        order: token order along a joint sequence, e.g. ``("image", "text")``; empty elsewhere.
        rotary: how positions turn queries and keys before the kernel: ``none``, ``pairs`` (pairs of channels, and the
            host can give ``Spans.rotary``), or ``unknown``.
        level: how often the latent was halved where the site works (UNets); None where all sites see one size.
        width: width of the residual stream (language models); 0 where nobody asks.
    """

    name: str
    kind: Kind
    layer: int
    index: int
    heads: int
    kv_heads: int
    head_dim: int
    order: tuple[str, ...] = ()
    rotary: Literal["none", "pairs", "unknown"] = "none"
    level: int | None = None
    width: int = 0


@dataclass(frozen=True, eq=False)
class Reading:
    """Where the queries and keys of a call stand in the whole prompt, however the cache keeps it: keys of a layer with
    a sliding window start late, static caches end in empty slots, a prompt may come in chunks.

    Attributes:
        queries: ``(Nq,)`` and keys: ``(Nk,)`` positions from 0, padding counted.
        before_image: ``(B, Nk)`` bool, text in front of the first image token.
        after_image: ``(B, Nq)`` bool, queries behind the last image token of the prompt.
        image_index: ``(B, Nk)``, how many image tokens of the row come before this key (its own number, if it is one).
    """

    queries: Tensor
    keys: Tensor
    before_image: Tensor
    after_image: Tensor
    image_index: Tensor


class Word(NamedTuple):
    """A word of the prompt and the tokens ``[start, stop)`` that spell it."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Spans:
    """Which tokens of the sequence are what. A slice holds for all rows; a bool tensor ``(B, N)`` differs per row.

    Attributes:
        image, text: the image and the text tokens of the *key* sequence (for joint and self sites also of the queries).
        grid: ``(T, H, W)`` of the image tokens, row-major, where the family has one grid for all rows.
        rotary: cosines and sines ``(N, D)`` each, by which queries and keys were turned (pairs of channels), where the
            family has rotary positions of this form.
        question: bool ``(B, N)``, the tokens of the user's question without template and assistant tokens, where a
            processor needs it (language models).
        words: for every row of the prompt the words of its question, where the tokenizer is known.
        places: int ``(N,)``, where in the prompt (counted with its padding) each key stands; goes with ``question``.
        reading: where queries and keys stand in the prompt (language models).
    """

    image: slice | Tensor
    text: slice | Tensor
    grid: tuple[int, int, int] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    question: Tensor | None = None
    words: tuple[tuple[Word, ...], ...] | None = None
    places: Tensor | None = None
    reading: Reading | None = None


@dataclass(eq=False)
class AttentionCall:
    """One kernel call: q, k, v are projected, normalised and rotated; heads are not yet merged.

    Shapes: q ``(B, H, Nq, D)``, k ``(B, Hkv, Nk, D)``, v ``(B, Hkv, Nk, Dv)``; mask bool (True = keep) or additive
    float, broadcastable to ``(B, H, Nq, Nk)``, or None. ``visible`` is the mask, or makes it once somebody asks for it:
    most edits never look, and some hosts must build a dense one or cannot say what it is. ``lanes`` names groups of
    rows, e.g. ``{"main": slice(0, 2)}``.
    ``state`` lives as long as one generation and belongs to one (processor, site); ``shared`` lives as long and belongs
    to all sites of a processor (language models). ``step`` is the position in the
    schedule as a 0-d int tensor (a plain int would make a compiled graph for each step), None where there is none.
    ``classes`` are the class masks that edits have put on the call. ``lent`` is the call of an earlier forward
    where edits that read rows mean the rows of that one (``attnsteer.lending``) and not those of this call.
    ``predicts`` is how many of the last queries predict a new token: 1 for a prompt (its last row), 0 for a chunk that
    does not end it, all of them in decode, where a step may check several guessed tokens at once (and where a user's
    own loop feeds more text to a cache, which cannot be told from that). Guessed tokens change no answer, but for
    prompts that are read in both directions (PaliGemma): there transformers' first pass, steered or not, shows the
    guesses to the rows before them. ``residual`` holds
    the hidden states ``(B, Nq, width)`` that enter the layer, for methods with ``needs = ("residual",)``.
    """

    site: Site
    kernel: Kernel
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | Callable[[], Tensor | None] | None = None
    scale: float | None = None
    is_causal: bool = False
    spans: Spans | None = None
    phase: Phase = "denoise"
    lanes: Mapping[str, slice] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    step: Tensor | None = None
    classes: tuple[Any, ...] = ()
    lent: AttentionCall | None = None
    predicts: int = 1
    residual: Tensor | None = None
    _parts: list[tuple[Tensor, Any]] = field(default_factory=list, init=False, repr=False)
    _output: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def output(self) -> Tensor:
        """What the model would have got: the user's kernel on the unedited tensors, ``(B, H, Nq, Dv)``. Computed once.

        No ``cached_property``: its lock (Python < 3.12) breaks compiled graphs.
        """
        if self._output is None:
            self._output = self.kernel(self.q, self.k, self.v)
        return self._output

    def track_output(self) -> Tensor:
        """The output as a tensor whose gradient can be asked for; where nothing before it has one, a graph begins
        here. Its values stay."""
        plain = self.output  # the model would go on with a sibling of this view: it gets a view of our own
        self._output = plain.view_as(plain) if plain.requires_grad else plain.detach().requires_grad_()
        return self._output

    @property
    def mask(self) -> Tensor | None:
        """Which keys each query sees. Made once, where somebody asks."""
        if not isinstance(self.visible, Tensor) and callable(self.visible):
            self.visible = self.visible()
        return self.visible

    def part(self, keys: Tensor, make: Callable[[AttentionCall, Tensor], Any]) -> Any:
        """``make(self, keys)``, computed once for each tensor that names a set of keys."""
        found = next((made for known, made in self._parts if known is keys), None)
        if found is None:
            found = make(self, keys)
            self._parts.append((keys, found))
        return found

    def by_row(self, number: float | Tensor, like: Tensor) -> float | Tensor:
        """A number of a processor, for arithmetic with ``like`` ``(B, ...)``: itself, or ``(B, 1, ...)`` where rows
        that are asked together have one each, ``(R,)``. Every lane holds all rows."""
        if not isinstance(number, Tensor):
            return number
        batch = like.shape[0]
        lanes = len(self.lanes) if self.lanes and batch == self.q.shape[0] else 1
        rows = torch.cat([expand_rows(number, batch // lanes)] * lanes)
        return rows.to(like.dtype if like.is_floating_point() else torch.float32).view(-1, *[1] * (like.dim() - 1))

    @property
    def lender(self) -> AttentionCall:
        """The call whose rows lend their keys to the rows of this one."""
        return self if self.lent is None else self.lent

    @property
    def softmax_scale(self) -> float:
        """The factor on the logits; ``1/sqrt(D)`` where the model gives none."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def group(self) -> int:
        """Query heads per key/value head (1 without grouped-query attention)."""
        return self.q.shape[1] // self.k.shape[1]

    def mask_rows(self, rows: slice) -> Tensor | None:
        """The mask for a subset of the query rows; masks that hold for all queries are returned as they are."""
        if self.mask is None or self.mask.dim() < 2 or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask[..., rows, :]


def expand_rows(weight: Tensor, batch: int) -> Tensor:
    """Per-row values for the batch that the kernel sees. Shape ``(R, ...)`` -> ``(1 or batch, ...)``.

    Some families fold frames into the batch (row ``b * F + f``) and beams repeat each prompt: contiguous repetition.
    """
    rows = weight.shape[0]
    if rows == 1 or rows == batch:
        return weight
    torch._check(batch % rows == 0)
    return weight.repeat_interleave(batch // rows, dim=0)
