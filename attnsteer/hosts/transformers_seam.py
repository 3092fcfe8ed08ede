"""The transformers seam: every attention call of every model goes through one table, whose entries we wrap in place.

At that point q and k are projected, normalised and rotated, the cache is updated, k and v are un-repeated
(grouped-query attention), and what returns is the per-head output before the output projection. Wrapping in place,
instead of registering an implementation of our own, keeps the user's choice of kernel, its masks and its code paths.

The wrappers stay inert (the library's own function, same arguments) unless the attention module carries a ``Binding``.
"eager" is not in the table: each model file brings its own function and hands it to
``AttentionInterface.get_interface`` as the default, so that method is wrapped too. Entries for paged caches are left
alone and refused at the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..binding import ATTRIBUTE, Binding, intervene
from ..errors import SteeringError

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_wrapped: dict[str, tuple[AttentionFunction, AttentionFunction]] = {}  # name -> (wrapper, what was there before)
_plain_get_interface: list[Any] = []
_UNMASKED = ("softcap", "s_aux", "position_bias")
"""Arguments by which an attention function changes the logits behind the back of ``AttentionCall``. Whoever computes
logits asks for the mask, so that is where they are refused."""


def arm() -> None:
    """Wrap the attention functions of transformers. Idempotent; entries that were registered later are wrapped too."""
    from transformers.modeling_utils import AttentionInterface

    table = AttentionInterface._global_mapping
    for name, inner in list(table.items()):
        if not name.startswith("paged|") and not hasattr(inner, "_attnsteer"):
            table[name] = _wrapper(inner)
            _wrapped[name] = (table[name], inner)
    if not _plain_get_interface:
        _plain_get_interface.append(AttentionInterface.get_interface)
        AttentionInterface.get_interface = _wrapped_get_interface(AttentionInterface.get_interface)


def disarm() -> None:
    """Put the functions of transformers back. Entries that somebody else has replaced since then stay theirs."""
    if not _wrapped and not _plain_get_interface:
        return
    from transformers.modeling_utils import AttentionInterface

    table = AttentionInterface._global_mapping
    for name, (wrapper, inner) in _wrapped.items():
        if table.get(name) is wrapper:
            table[name] = inner
    _wrapped.clear()
    if _plain_get_interface:
        AttentionInterface.get_interface = _plain_get_interface.pop()


@functools.cache
def _wrapped_get_interface(plain: Any) -> Any:
    @functools.wraps(plain)
    def get_interface(self: Any, attn_implementation: str, default: AttentionFunction) -> AttentionFunction:
        found = plain(self, attn_implementation, default)
        return functools.partial(_steered, default) if found is default else found

    return get_interface


@functools.cache
def _wrapper(inner: AttentionFunction) -> AttentionFunction:
    """One wrapper per function, for good: compiled code recognises functions by identity."""

    @functools.wraps(inner)
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return _steered(inner, module, *args, **kwargs)

    attention._attnsteer = True  # type: ignore[attr-defined]
    return attention


def _steered(inner: AttentionFunction, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """One attention call of transformers: q ``(B, H, Nq, D)``, k and v ``(B, Hkv, Nk, D)`` -> ``(B, Nq, H, D)``,
    weights."""
    binding: Binding | None = getattr(module, ATTRIBUTE, None)
    if binding is None:
        return inner(module, *args, **kwargs)
    q, k, v, mask = _arguments(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value", "attention_mask")}
    if kwargs.get("cache") is not None:
        raise SteeringError(
            "Continuous batching (a paged cache) updates keys and values inside the attention function, where they "
            "cannot be steered: use generate() with an ordinary cache, or detach first."
        )
    causal = _is_causal(module, q, mask, kwargs)
    # sdpa with a static cache that is empty before this call: the slots behind the prompt hold nothing yet, and the
    # causal order counts from the first key. Say so as a mask; the library's own function is still called with none.
    empty_slots = causal and k.shape[2] > q.shape[2] and mask is None
    hidden = [name for name in _UNMASKED if kwargs.get(name) is not None]

    def visible() -> Tensor | None:
        if hidden:
            raise SteeringError(
                f"{binding.site.name} changes its logits by {', '.join(hidden)}, so its attention map can neither be "
                "read nor edited exactly: head outputs can (VHR, Scale)."
            )
        return _first_keys(q, k) if empty_slots else _visible(mask, q, k)

    plain: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask) -> Tensor:
        out, weights = inner(module, q, k, v, _lowered(module, mask, q), **kwargs)
        plain.append((out.transpose(1, 2), out, weights))
        return plain[-1][0]

    out = intervene(binding, kernel, q, k, v, visible, kwargs.get("scaling"), causal and not empty_slots)
    if plain and out is plain[-1][0]:
        return plain[-1][1], plain[-1][2]  # nothing was edited: the very tensors of the library
    return out.transpose(1, 2), None  # weights of a plain call would no longer be those of the output


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *rest: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Any]:
    if rest:
        raise SteeringError(
            "An attention function got positional arguments behind the mask, which attnsteer does not know."
        )
    return query, key, value, attention_mask


def _first_keys(q: Tensor, k: Tensor) -> Tensor:
    """Bool ``(1, 1, Nq, Nk)``: query i sees the keys 0 to i."""
    queries, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    return (keys <= queries[:, None])[None, None]


def _is_causal(module: nn.Module, q: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the function itself hides later keys, beyond what ``mask`` says.

    eager and flex: never, the mask says it all; flash: by flag, next to its padding mask; sdpa, and implementations of
    the user's own: by flag where no mask is given. A single query sees every key of the cache.
    """
    name = getattr(module.config, "_attn_implementation", None) or "eager"
    by_flag = "flash" in name or (mask is None and name not in ("eager", "flex_attention"))
    flag = kwargs.get("is_causal")
    return by_flag and q.shape[2] > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def _visible(mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as processors see it: bool or additive, broadcastable to ``(B, H, Nq, Nk)``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):  # a BlockMask of flex attention: sdpa would hold the same dense mask
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device=str(q.device))
    if mask.dim() == 2:  # the padding mask of flash attention, (B, N) with N >= Nk where the cache is cut to a window
        return mask[:, None, None, -k.shape[2] :].bool()
    return mask[..., : k.shape[2]] if mask.shape[-1] > k.shape[2] else mask


def _lowered(module: nn.Module, mask: Any, q: Tensor) -> Any:
    """A mask in the form that the user's kernel takes; the mask of the original call passes as it is."""
    name = getattr(module.config, "_attn_implementation", None) or "eager"
    if not isinstance(mask, Tensor) or mask.dim() == 2:
        return mask
    if "flash" in name:
        raise SteeringError(
            "Flash attention takes no attention mask: call model.set_attn_implementation('sdpa') for this edit."
        )
    if name == "flex_attention" and mask.shape[1] > 1:
        raise SteeringError(
            "flex_attention takes no mask per head: call model.set_attn_implementation('sdpa') for this edit."
        )
    if mask.dtype != torch.bool:
        return mask if mask.dtype == q.dtype else mask.to(q.dtype)
    if name == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
