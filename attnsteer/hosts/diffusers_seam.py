"""The kernel seam of diffusers: every attention call of a module that carries a binding passes through ``intervene``.

Three wrappers, installed for the processor classes that a model uses and inert for modules without a binding:

* ``__call__`` of the processor class says which module is running (a processor object may serve several modules);
* ``F.scaled_dot_product_attention`` in the module that defines the processor (classic ``Attention`` processors);
* the entries of the attention dispatcher's backend table (newer models; its layout is ``(B, N, H, D)``).

The library's processors stay in place, and so do LoRA, IP-Adapter, fused projections, offloading and the backend.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..binding import ATTRIBUTE, Binding, intervene

_SAME: Any = object()  # "the mask of the original call"


class _Frame:
    """One run of an attention processor; some call the kernel several times (IP-Adapter, image keys of Wan)."""

    __slots__ = ("binding", "calls")

    def __init__(self, binding: Binding):
        self.binding = binding
        self.calls = 0


class _Now:
    """The processor that is running. One per process: two steered models must not run in two threads at once."""

    def __init__(self) -> None:
        # an attribute of the instance from the start: one that appears later would invalidate every compiled graph
        self.frame: _Frame | None = None


_now = _Now()
_restores: dict[Any, Callable[[], None]] = {}
_wrappers: dict[Any, Any] = {}  # kept over disarm and arm, so that compiled graphs are found again


def attention_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """All attention modules of a model by name, whatever their class: each has a processor with a ``__call__``."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    classes = (Attention, MochiAttention, AttentionModuleMixin)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, classes)]


def _run(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
) -> Tensor:
    frame = _now.frame
    if frame is None:
        return kernel(q, k, v)
    turn = frame.calls
    frame.calls = turn + 1
    if turn != frame.binding.main_call:
        return kernel(q, k, v)
    return intervene(frame.binding, kernel, q, k, v, mask, scale, causal)


def _wrap_processor(inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        binding = getattr(attn, ATTRIBUTE, None)
        if binding is None:
            return inner(self, attn, *args, **kwargs)
        outer = _now.frame
        _now.frame = _Frame(binding)
        try:
            return inner(self, attn, *args, **kwargs)
        finally:
            _now.frame = outer

    # diffusers decides by this signature which keyword arguments a processor gets
    return functools.update_wrapper(call, inner)


def _wrap_functional(functional: types.ModuleType) -> types.ModuleType:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = _SAME) -> Tensor:
            chosen = attn_mask if mask is _SAME else mask
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=chosen, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return _run(kernel, query, key, value, attn_mask, scale, is_causal)

    proxy = types.ModuleType(functional.__name__)
    proxy.__dict__.update(functional.__dict__)
    proxy.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
    return proxy


def _wrap_backend(inner: Callable[..., Any]) -> Callable[..., Any]:
    takes_mask = "attn_mask" in inspect.signature(inner).parameters

    def backend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        if _now.frame is None:
            return inner(query=query, key=key, value=value, **kwargs)

        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = _SAME) -> Tensor:
            given = kwargs
            if mask is not _SAME and (mask is not None or takes_mask):
                given = {**kwargs, "attn_mask": mask}
            return inner(query=q.transpose(1, 2), key=k.transpose(1, 2), value=v.transpose(1, 2), **given).transpose(
                1, 2
            )

        mask, scale, causal = kwargs.get("attn_mask"), kwargs.get("scale"), bool(kwargs.get("is_causal"))
        if mask is not None and mask.dim() == 2:  # here (B, Nk), unlike in torch
            mask = mask[:, None, None]
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _run(kernel, q, k, v, mask, scale, causal).transpose(1, 2)

    return functools.update_wrapper(backend, inner)


def _install(key: Any, owner: dict[Any, Any] | type | types.ModuleType, name: Any, wrap: Callable[[Any], Any]) -> None:
    """Put the wrapper of ``owner[name]`` (or ``owner.name``) in place and note how to undo it."""
    if key in _restores:
        return
    if isinstance(owner, dict):
        original = owner[name]
        inherited = False
    else:
        original = getattr(owner, name)
        inherited = name not in vars(owner)
    cached = _wrappers.get(key)
    if cached is None or cached[0] is not original:
        cached = _wrappers[key] = (original, wrap(original))
    wrapper = cached[1]
    if isinstance(owner, dict):
        owner[name] = wrapper
    else:
        setattr(owner, name, wrapper)

    def restore() -> None:
        if isinstance(owner, dict):
            if owner.get(name) is wrapper:
                owner[name] = original
        elif vars(owner).get(name) is wrapper:
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    _restores[key] = restore


def arm(modules: list[torch.nn.Module]) -> None:
    """Install the wrappers for the processors that these attention modules have now. Idempotent."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    for name in list(Registry._backends):
        _install(("backend", name), Registry._backends, name, _wrap_backend)
    for cls in {type(module.processor) for module in modules}:
        definition = sys.modules[cls.__module__]
        if isinstance(getattr(definition, "F", None), types.ModuleType):
            _install(("functional", definition.__name__), definition, "F", _wrap_functional)
        _install(("processor", cls), cls, "__call__", _wrap_processor)


@contextmanager
def armed(modules: list[torch.nn.Module]) -> Iterator[None]:
    """The wrappers for the length of a block, also after the last steering was detached."""
    stray = not _restores
    arm(modules)
    try:
        yield
    finally:
        if stray:
            disarm()


def disarm() -> None:
    """Take every wrapper away; the library is as it was."""
    while _restores:
        _restores.popitem()[1]()
