"""VHD: how much each head, and each generated token, depends on the image. Measures; changes nothing.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv 2412.13949.

    VHD_{l,i}(t) = || A_{l,i}(y_t | y_<t, image, prompt) - A_{l,i}(y_t | y_<t, prompt) ||_2
    T-VHD(t)     = sum over layers of the k largest VHD of the layer            (low values go with hallucinated words)

All tokens of an answer are measured in one teacher-forced pass of the prompt and the answer, with and without the
image: causal attention makes position t see what it saw when y_t was generated. Exact, and one prefill for the whole
answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnsteer.attach import steer
from attnsteer.processor import Processor, check_choice, check_integer
from attnsteer.site import AttentionCall, Site
from attnsteer.where import Where

from .vhr import last_outputs, sees_image, vhd


@dataclass(frozen=True)
class VHD(Processor):
    """Record VHD at the last ``positions`` tokens of every prompt.

    ``steering.states(processor)[site]["vhd"]`` is then ``(B, H, positions)``. Other processors may act at the same
    time; it measures what they leave.
    """

    positions: int = 1
    removal: str = "delete"

    kinds: ClassVar = ("causal",)
    reads_only: ClassVar = True
    lanes: ClassVar = ("image_free",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_integer(self, "positions", 1)
        check_choice(self, "removal", ("delete", "mask"))

    def react(self, call: AttentionCall) -> None:
        if "image_free" in call.lanes:
            with_image, without = last_outputs(call, self.positions)
            distance = vhd(with_image, without)
            call.state["vhd"] = distance * sees_image(call, with_image, distance)[:, None, None]


@dataclass(frozen=True, eq=False)
class VHDReport:
    """What ``measure`` found.

    Attributes:
        sites: the measured layers.
        vhd: ``(B, T, L, H)`` float32: rows, generated tokens, layers, heads.
    """

    sites: tuple[Site, ...]
    vhd: Tensor

    def t_vhd(self, k: int = 8) -> Tensor:
        """``(B, T)``: the sum over layers of the k largest heads. The paper does not state k."""
        return t_vhd(self.vhd, k)


def t_vhd(distance: Tensor, k: int = 8) -> Tensor:
    """Token-level divergence ``(..., L, H) -> (...)``; layers with fewer than k heads give all they have."""
    return distance.topk(min(k, distance.shape[-1]), dim=-1).values.sum((-2, -1))


def measure(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    answer: Tensor,
    where: Where | None = None,
    removal: str = "delete",
) -> VHDReport:
    """VHD of every head for every token of an answer.

    Args:
        model: a vision-language model to which nothing is attached.
        inputs: what ``generate`` was called with (``input_ids``, masks, pixels), left-padded.
        answer: ``(B, T)`` generated ids without the prompt: ``sequences[:, input_ids.shape[1]:]``.
        where: layers to measure; all by default, as T-VHD sums over all layers.

    Raises:
        SteeringError: where the model cannot be steered or the inputs hold no ids.
    """
    where = Where() if where is None else where
    recorder = VHD(where, positions=answer.shape[1], removal=removal)
    with steer(model, recorder) as steering:
        steering.measure(inputs, answer[:, :-1])
        states = steering.states(recorder)
    rows = [states[site]["vhd"].cpu() for site in states]
    return VHDReport(tuple(states), torch.stack(rows, dim=-1).permute(0, 2, 3, 1).contiguous())
