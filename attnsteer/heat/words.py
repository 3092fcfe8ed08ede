"""Heat maps of the words of a prompt, while a diffusion pipeline paints it.

    heat = attnsteer.heat_maps(pipe, "a dog and a car", ["dog", "car"])
    heat.save("maps.png")

For a word with tokens T the map is ``mean over j in T of A[i, j]``, i an image token of the conditional rows, averaged
over the heads of a layer, the layers and the steps, or apart by any of them. Only the columns of words are computed:
cross-attention directly, joint attention by the fused kernel with indicators as values (``capture.token_columns``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attach import attach, sites
from ..capture import chosen_heads, token_columns
from ..errors import SteeringError
from ..hosts import denoisers
from ..hosts.prompts import LAYOUTS, PromptWatch, readings
from ..hosts.worlds import is_pipeline, models_of
from ..lanes import cfg_lanes
from ..processor import Processor
from ..site import AttentionCall, Kind
from ..where import Selection, Where
from .means import Axis, Means, Per, kept_axes
from .result import HeatMaps

KINDS: tuple[Kind, ...] = ("cross", "joint")
OWNED = {"output_type": "the picture is needed as it is", "return_dict": "the picture is needed"}


@dataclass(frozen=True)
class _WordReader(Processor):
    """Hands every attention call to the reading in progress and changes nothing."""

    reading: Any = None

    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    reads_only: ClassVar = True
    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def react(self, call: AttentionCall) -> None:
        self.reading.read(call)


class _Reading:
    """What is read in one run of a pipeline.

    Args:
        words: for each prompt the words.
        selection: layers and heads.
        axes: what is kept apart.
    """

    def __init__(
        self, pipe: Any, watch: PromptWatch, words: Sequence[Sequence[str]], selection: Selection, axes: Sequence[Axis]
    ):
        family = denoisers.family_of(models_of(pipe)[0])
        assert family is not None
        self.family, self.watch, self.words, self.selection = family, watch, words, selection
        self.means = Means(axes)
        self._seen: set[tuple[int, int]] = set()
        self._columns: tuple[Tensor, Tensor] | None = None

    def read(self, call: AttentionCall) -> None:
        """Add the maps of one attention call, ``(pictures, words, heads, h, w)``; a sequential second pass of a step is
        the unconditional one."""
        assert call.step is not None and call.spans is not None
        step = int(call.step)
        if (call.site.index, step) in self._seen:
            return
        self._seen.add((call.site.index, step))
        samples = self.watch.samples
        if samples is None:
            raise SteeringError("The pipeline got embeddings instead of a prompt: words cannot be found in it.")
        call = _rows(call, cfg_lanes(call.q.shape[0], samples, self.family.cfg)["cond"].rows)
        if self._columns is None:
            self._columns = self._find(call, samples)
        columns, weights = (x.to(call.q.device) for x in self._columns)
        with torch.no_grad():
            found = token_columns(chosen_heads(call, self.selection[call.site]), columns)
            maps = torch.einsum("shnm,swm->swhn", found, weights.to(found.dtype))
        grid = call.spans.grid if call.spans else None
        if grid is None or grid[0] != 1 or grid[1] * grid[2] != maps.shape[-1]:
            raise SteeringError(f"{call.site.name!r} has no image grid of one frame: heat maps are for pictures.")
        self.means.add(maps.unflatten(-1, grid[1:]), step, call.site.layer)

    def _find(self, call: AttentionCall, samples: int) -> tuple[Tensor, Tensor]:
        """Text keys ``(pictures, m)`` of all words, and which of them are averaged for which word, ``(pictures, words,
        m)``."""
        assert call.spans is not None and isinstance(call.spans.text, slice)
        keys = len(range(*call.spans.text.indices(call.k.shape[2])))
        spelled: list[list[list[int]]] = []
        for row in range(samples):
            words = self.words[row * len(self.words) // samples]
            groups = tuple((word,) for word in words)
            parts = readings(self.watch, self.family.name, (row, samples), groups, keys, False)
            spelled.append([[p.columns[i] for p in parts for i in p.groups[n][0]] for n in range(len(words))])
        width = max(sum(map(len, row)) for row in spelled)
        columns = torch.zeros(samples, width, dtype=torch.long)
        weights = torch.zeros(samples, max(map(len, spelled)), width)
        for s, each in enumerate(spelled):
            start = 0
            for w, tokens in enumerate(each):
                columns[s, start : start + len(tokens)] = torch.tensor(tokens)
                weights[s, w, start : start + len(tokens)] = 1 / len(tokens)
                start += len(tokens)
        return columns, weights


def heat_maps(
    pipe: Any,
    prompt: str | Sequence[str],
    words: Sequence[str] | Sequence[Sequence[str]] | None = None,
    *,
    per: Per = "average",
    where: Where | None = None,
    processors: Sequence[Processor] = (),
    **call: Any,
) -> HeatMaps | list[HeatMaps]:
    """Run a pipeline, unchanged, and see where in the picture each word is looked at from.

    Args:
        pipe: a Diffusers pipeline whose text layout is known (SD 1.x, SD 2.x, SDXL, SD3, FLUX).
        prompt: one prompt, or a list for a batch.
        words: words or phrases, one list for all prompts or one for each; a word means all its occurrences. Default:
            every word of the prompt.
        per: what is kept apart: ``"average"`` nothing, else ``"step"``, ``"layer"``, ``"head"`` (each head of each
            layer) or a tuple of these.
        where: layers, heads and steps that are read (default: all that look at text).
        processors: methods that steer the run that is looked at. Maps are read before the edits of their own call.
        **call: further arguments of the pipeline: ``num_inference_steps``, ``generator``, ``height``, ...

    Returns:
        The maps and the picture, float32 (float64 for float64 models) on the CPU; a list of them where there are
        several pictures. Values are probabilities: what share of its attention an image token gives to the word.

    Raises:
        SteeringError: no such pipeline, layer or step; or a word that the prompt does not have, with its tokens.

    Memory: image tokens x words for each combination of the kept axes, and image tokens x text tokens x heads of one
    layer while it is read. What was compiled runs eagerly while it is read.
    """
    axes = kept_axes(per)
    family = denoisers.family_of(models_of(pipe)[0]) if is_pipeline(pipe) else None
    if family is None or family.name not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise SteeringError(f"heat_maps needs a Diffusers pipeline of {known}; {type(pipe).__name__} is none.")
    for name, why in OWNED.items():
        if name in call:
            raise SteeringError(f"heat_maps takes no {name}=: {why}.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    wanted = _words(prompts, words)
    chosen = where or Where()
    selection = chosen.select(sites(pipe), KINDS)
    watch = PromptWatch(pipe)
    try:
        reading = _Reading(pipe, watch, wanted, selection, axes)
        with attach(pipe, *processors, _WordReader(chosen, reading)), torch.compiler.set_stance("force_eager"):
            pictures = pipe(prompt=prompt if isinstance(prompt, str) else prompts, **call).images
    finally:
        watch.detach()
    found, numbers = reading.means.result({site.layer: heads for site, heads in selection.items()})
    results = []
    for n, picture in enumerate(pictures):
        place = n * len(prompts) // len(pictures)
        maps = found[n, : len(wanted[place])]
        results.append(HeatMaps.of_axes(maps, wanted[place], numbers, picture=picture, text=prompts[place]))
    return results[0] if len(results) == 1 and isinstance(prompt, str) else results


def _words(prompts: Sequence[str], words: Sequence[str] | Sequence[Sequence[str]] | None) -> list[list[str]]:
    """The words of every prompt."""
    if words is None:
        return [list(dict.fromkeys(re.findall(r"\w+", prompt.lower()))) for prompt in prompts]
    if isinstance(words, str):
        raise SteeringError(f"words={words!r}: give a list of words, e.g. [{words!r}].")
    each = [words] * len(prompts) if all(isinstance(word, str) for word in words) else list(words)
    found = [[str(word) for word in row] for row in each]
    if len(found) != len(prompts) or not all(found) or not all(word.strip() for row in found for word in row):
        raise SteeringError(f"Give words for each of the {len(prompts)} prompts; got {words!r}.")
    return found


def _rows(call: AttentionCall, rows: slice) -> AttentionCall:
    """The call of some rows of the batch."""
    mask = call.mask
    if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    return replace(call, q=call.q[rows], k=call.k[rows], v=call.v[rows], visible=mask)
