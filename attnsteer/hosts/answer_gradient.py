"""How the first word of an answer depends on attention and on pixels: gradients of ``log p`` of the likeliest token.

**The last row.** Attention of the last prompt token reaches the logits through that token alone. So the prompt before
it is read into a cache without a graph, and only the one token runs with gradient: exact, and neither an N x N map nor
a graph of the sequence exists. With ``O = A V`` before the output projection, ``dv/dA[h, j] = dv/dO[h] . V[g(h), j]``.

**Pixels.** The whole prompt runs with gradient through the vision tower, on fused kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attach import steer
from ..capture import probabilities
from ..errors import SteeringError
from ..logits import compute_dtype, per_query_head
from ..processor import Processor
from ..site import AttentionCall
from ..where import Where
from .decoders import core
from .vlm_families import PER_TOKEN, WHOLE_PROMPT_IN_BOTH_DIRECTIONS
from .vlm_grids import QWEN
from .vlm_inputs import undisturbed


@dataclass(frozen=True)
class _LastRow(Processor):
    """Keeps the last query's probabilities, its output and the values, in the pass of that one token."""

    kinds: ClassVar = ("causal",)
    reads_only: ClassVar = True
    token_agnostic: ClassVar = True

    def react(self, call: AttentionCall) -> None:
        if call.phase == "decode":
            output = call.track_output()
            with torch.no_grad():
                row = probabilities(call, slice(-1, None), slice(0, None))[:, :, 0]
            call.state.update(row=row, output=output, values=call.v.detach(), group=call.group)


def last_row_gradients(model: Any, inputs: Mapping[str, Any], where: Where) -> list[tuple[Tensor, Tensor]]:
    """For each selected layer the last row of attention and ``dv/dA`` of it, ``(B, H, keys)`` float32 or wider each.

    ``v = log p(y)``, y the likeliest next token. Keys that a sliding window has lost are zeros.

    Args:
        inputs: prompts without padding: ``input_ids``, pixels, ...

    Raises:
        SteeringError: padding; families whose prompt is read in both directions (PaliGemma: other rows see the last
            token, so the short way is not exact).
    """
    inner: Any = core(model)
    _check(inner, inputs)
    reader, ids = _LastRow(where), inputs["input_ids"]
    total = ids.shape[1]
    before = {n: v[:, :-1] if n in (*PER_TOKEN, "input_ids") else v for n, v in inputs.items() if n != "attention_mask"}
    with undisturbed(inner), steer(model, reader) as steering:
        with torch.no_grad():
            cache = model(**before, use_cache=True).past_key_values
        with torch.enable_grad():
            logits = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
            states = list(steering.states(reader).values())
            answer = logits.log_softmax(-1).amax(-1).sum()
            slopes = torch.autograd.grad(answer, [state["output"] for state in states])
    found = []
    for state, slope in zip(states, slopes, strict=True):
        dtype = compute_dtype(state["values"])
        values = per_query_head(state["values"].to(dtype), state["group"])
        gradient = torch.einsum("bhd,bhkd->bhk", slope[:, :, -1].to(dtype), values)
        lost = total - gradient.shape[-1]
        row, gradient = (torch.nn.functional.pad(x, (max(0, lost), 0)) for x in (state["row"], gradient))
        found.append((row, gradient))
    return found


def _check(inner: Any, inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise SteeringError("The gradient of the last row needs prompts without padding: give them one by one.")
    if inner.config.model_type in WHOLE_PROMPT_IN_BOTH_DIRECTIONS:
        raise SteeringError(
            f"{type(inner).__name__} reads its prompt in both directions, so the last token acts through all others "
            "too: map='grad-att' is not defined by its row alone. Use map='rel-att'."
        )


def pixel_gradients(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """``|| dv/dx ||_2`` over the colours of every pixel that the model saw, ``(H, W)``.

    Args:
        inputs: one prompt with one picture that is not cut into tiles.

    Raises:
        SteeringError: tiles, whose pixels overlap or have no place in one picture.
    """
    inner: Any = core(model)
    pixels: Tensor = inputs["pixel_values"].detach().clone().requires_grad_()
    size: Tensor | None = inputs.get("image_grid_thw")
    single = pixels.dim() == 4 and len(pixels) == 1
    if not single and (size is None or inner.config.model_type not in QWEN or len(size) != 1):
        raise SteeringError(
            f"The pixels of {type(inner).__name__} come as {tuple(pixels.shape)}: map='pure-grad' needs one picture "
            "that is not cut into tiles."
        )
    with undisturbed(inner), torch.enable_grad():
        logits = model(**{**inputs, "pixel_values": pixels}).logits[:, -1]
        (slope,) = torch.autograd.grad(logits.log_softmax(-1).amax(-1).sum(), pixels)
    if single or size is None:
        return slope[0].norm(dim=0)
    vision = inner.config.vision_config
    _, rows, columns = size[0].tolist()
    m, p = vision.spatial_merge_size, vision.patch_size
    # patches come in blocks of m x m, each with its colours and the same frame several times
    blocks = slope.reshape(rows // m, columns // m, m, m, 3, vision.temporal_patch_size, p, p).sum(dim=5)
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * p, columns * p).norm(dim=0)
