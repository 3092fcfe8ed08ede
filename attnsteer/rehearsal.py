"""Masks of words from a rehearsal: a plain run of the pipeline whose cross-attention says where each word is.

    masks = rehearse(pipe, prompts, words=[["dog"], ["cat"], ["dog", "cat"]], generator=generators(), height=512)
    method = IRDiffusion(references=torch.cat(masks[:2]), scene=masks[2])

Maps are summed over heads, over the layers of one resolution and over steps; Otsu's threshold makes masks of them. The
rehearsal must use the noise, the steps and the prompts of the run to come, or its masks are of another picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attach import attach
from .errors import SteeringError
from .hosts.prompts import place
from .hosts.worlds import is_pipeline
from .maps import otsu
from .processor import Processor
from .site import AttentionCall, Kind, Site
from .steps import StepEnd
from .subjects import look, map_sites
from .where import Where


@dataclass(frozen=True)
class _TextMaps(Processor):
    """Sums the cross-attention maps of the conditional rows, ``(pictures, n, text keys)``, and changes nothing."""

    kinds: ClassVar[tuple[Kind, ...]] = ("cross",)
    reads_only: ClassVar = True
    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def react(self, call: AttentionCall) -> None:
        look(call)

    def after_step(self, states: Mapping[Site, dict[str, Any]], end: StepEnd) -> None:
        for state in states.values():
            if "map" in state:
                found = state.pop("map")
                found = found[end.conditional(found.shape[0])]
                state["sum"] = found if "sum" not in state else state["sum"] + found


def rehearse(
    pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[str]], where: Where | None = None, **call: Any
) -> list[Tensor]:
    """Run a pipeline once, plainly, and find where the words of each prompt are.

    Args:
        pipe: a Diffusers pipeline with cross-attention to one tokenizer's text (SD 1.x, SD 2.x, SDXL, PixArt).
        prompts: one for each picture.
        words: for each prompt the words or phrases to find, each with all its occurrences; one that is given as often
            as it occurs means the first, the second, and so on.
        where: layers, heads and steps to look at. Of UNet layers those count whose resolution is next to a quarter of
            the latent's sides (ConsiStory's 32 x 32 for SDXL).
        **call: further arguments of the pipeline call, as in the run to come; one picture for each prompt.

    Returns:
        For each prompt bool masks ``(words, height, width)`` on the token grid, no two of a prompt sharing a token:
        of several words that are bright there, the one whose map is brightest relative to its own maximum has it.

    Raises:
        SteeringError: no pipeline with cross-attention, several pictures of a prompt, or a word that its prompt does
            not have.
    """
    if not is_pipeline(pipe) or not hasattr(pipe, "tokenizer"):
        raise SteeringError(f"rehearse needs a Diffusers pipeline with a tokenizer, not {type(pipe).__name__}.")
    if len(words) != len(prompts) or not prompts or isinstance(prompts, str) or not all(words):
        raise SteeringError(f"Give a list of prompts and words for each; got {len(prompts)} and {len(words)}.")
    if (call.get("num_images_per_prompt") or 1) != 1:
        raise SteeringError("A rehearsal makes one picture for each prompt: repeat the prompts for more.")
    columns = [_columns(pipe.tokenizer, prompt, each) for prompt, each in zip(prompts, words, strict=True)]
    reader = _TextMaps(where or Where())
    with attach(pipe, reader) as steering:
        pipe(prompt=list(prompts), **{"output_type": "latent", **call})
        states = {site: state for site, state in steering.states(reader).items() if "sum" in state}
    if not states:
        raise SteeringError(f"{reader.where} saw no step of this run.")
    chosen = [states[site] for site in map_sites(list(states))]
    total = torch.stack([state["sum"] for state in chosen]).sum(0)  # (B, n, text keys)
    return [_masks(total[row], each, chosen[0]["plane"]) for row, each in enumerate(columns)]


def _columns(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """The text keys that spell each of the words."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    found = place(tokenizer, ids, tuple((word,) for word in words))
    return [[i for i in word if isinstance(i, int)] for (word,) in found]


def _masks(total: Tensor, columns: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """Masks of the words of one prompt from its summed maps ``(n, text keys)``."""
    maps = torch.stack([total[:, list(each)].mean(1) for each in columns]).cpu()
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    maps = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    bright = torch.stack([otsu(each) for each in maps])
    return (bright & (maps == maps.amax(0, keepdim=True))).unflatten(1, size)
