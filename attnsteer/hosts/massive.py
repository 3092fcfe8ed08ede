"""Massive channels: the few places of the residual stream where the first token, and whatever else a model uses as an
attention sink, is tens of times larger than the rest (Sun et al. 2024, arXiv 2402.17762).

They are facts of a base model. Published ones are in the table; for others they are measured: causal order makes the
stream of a first token depend on that token alone, so a batch of one-token prompts shows what any prompt would.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from ..digests import weights_of
from .decoders import layer_of, sites
from .vlm_families import VisionTokens
from .vlm_inputs import execution_device, undisturbed

CHANNELS: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("llama", 4096, 11008, 32): (1415, 2533),  # LLaMA-2-7B, Vicuna-1.5-7B
    ("llama", 5120, 13824, 40): (2100, 4743),  # LLaMA-2-13B, Vicuna-1.5-13B
    ("qwen2_vl_text", 3584, 18944, 28): (458, 2570),  # Qwen2-VL-7B
    ("internlm2", 4096, 14336, 32): (3584,),  # InternVL2-8B
    ("llama", 4096, 14336, 32): (788, 1384, 4062),  # LLaMA-3-8B; read off plots, unconfirmed for VAR
    ("mistral", 4096, 14336, 32): (2070, 3398),  # Mistral-7B; likewise
}
"""By type of the text model, width, width of the feed-forward part, number of layers. Fine-tuned models keep them."""
TOKENS = 8
"""First tokens that a measurement tries."""

_measured: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, Tensor]] = weakref.WeakKeyDictionary()
"""A hash of the weights that were measured, and what was found."""


def massive_channels(model: Any, tokens: VisionTokens, ratio: float) -> tuple[int, ...]:
    """Channels of the residual stream with ``|x[d]| / RMS(x) > ratio`` at the first token.

    From the table, or measured: those above the ratio in more than half of the layers 2 to L - 2 and first tokens.
    Measured with 8 one-token prompts, once for a loaded model and again where its weights or adapters have changed
    since. Empty, with a warning, where there are none.
    """
    text = model.config.get_text_config(decoder=True)
    key = (text.model_type, text.hidden_size, getattr(text, "intermediate_size", 0), text.num_hidden_layers)
    if key in CHANNELS:
        return CHANNELS[key]
    decoder = model.get_decoder()
    before, weights = _measured.get(decoder), weights_of(decoder, writes=True)
    if before is None or before[0] != weights:
        before = _measured[decoder] = weights, _first_token_ratios(model, decoder, tokens)
    share = (before[1] > ratio).float().mean(0)
    found = tuple(int(channel) for channel in torch.nonzero(share > 0.5).flatten())
    if not found:
        warnings.warn(
            f"No channel of this model's residual stream reaches {ratio:g} times the RMS at the first token, so no "
            "token counts as an attention sink and the method does nothing: lower its threshold.",
            stacklevel=2,
        )
    return found


def _first_token_ratios(model: Any, decoder: torch.nn.Module, tokens: VisionTokens) -> Tensor:
    """``|x[d]| / RMS(x)`` of several first tokens entering each middle layer, ``(layers * tokens, width)`` float32."""
    found: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["hidden_states"])[:, 0].float()
        found.append((x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).cpu())

    names = list(dict.fromkeys(layer_of(site) for site in sites(model)))
    middle = names[2:-1] or names[-1:]
    handles = [model.get_submodule(n).register_forward_pre_hook(look, with_kwargs=True) for n in middle]
    ids = torch.tensor(_first_tokens(model, tokens), device=execution_device(model.get_input_embeddings()))
    try:
        with torch.no_grad(), undisturbed(model):
            torch.nn.Module._call_impl(decoder, input_ids=ids[:, None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def _first_tokens(model: Any, tokens: VisionTokens) -> list[int]:
    """The start token, if the model has one, and ordinary tokens from all over the vocabulary."""
    text = model.config.get_text_config(decoder=True)
    special = {*tokens.image, *tokens.wrappers, getattr(text, "pad_token_id", None)}
    spread = [text.vocab_size * (2 * i + 1) // (2 * TOKENS) for i in range(TOKENS)]
    start = getattr(text, "bos_token_id", None)
    wanted = [*([start] if isinstance(start, int) else []), *spread]
    return [token for token in dict.fromkeys(wanted) if token not in special][:TOKENS]
