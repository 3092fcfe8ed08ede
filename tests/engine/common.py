"""What the engine's tests share: small processors, an explicit attention map as oracle, and a picture of all state."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import AttentionCall, KeyBias, Mix, Processor, Site, Where
from attnsteer.edits import Edit, OwnValue
from tests.tiny import denoisers, pipelines

DESCRIBED = tuple(n for n in denoisers.NAMES if n not in ("cogview4", "lumina2"))
"""Families with a descriptor."""
EXACT = {"rtol": 0.0, "atol": 1e-10}
"""For comparisons in float64."""


# ---- processors -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Nudge(Processor):
    """Moves head outputs toward the own value, in the model's own rows."""

    strength: float = 0.5
    kinds = ("self", "joint")

    @property
    def token_agnostic(self) -> bool:
        return True

    @property
    def inert(self) -> bool:
        return self.strength == 0

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        return Mix(OwnValue(), head_weight(site, heads, self.strength))


@dataclass(frozen=True)
class ImageNudge(Nudge):
    """The same for image tokens only: needs to know the token layout."""

    @property
    def token_agnostic(self) -> bool:
        return False

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        return Mix(OwnValue(), head_weight(site, heads, self.strength), tokens="image")


@dataclass(frozen=True)
class Bias(Processor):
    """A constant bias on the first two keys."""

    strength: float = 1.0
    kinds = ("cross", "joint")

    def react(self, call: AttentionCall) -> Edit:
        bias = torch.zeros(1, 1, call.k.shape[2])
        bias[..., :2] = self.strength
        return KeyBias(bias)


@dataclass(frozen=True)
class Watch(Processor):
    """Changes nothing; counts its calls at every site and keeps what ``keep`` makes of the last one."""

    keep: Callable[[AttentionCall], Any] | None = None
    kinds = ("self", "joint", "cross")

    @property
    def token_agnostic(self) -> bool:
        return True

    def react(self, call: AttentionCall) -> None:
        call.state["calls"] = call.state.get("calls", 0) + 1
        if self.keep:
            call.state["kept"] = self.keep(call)


def head_weight(site: Site, heads: tuple[int, ...], strength: float) -> Tensor:
    weight = torch.zeros(1, site.heads)
    weight[0, list(heads)] = strength
    return weight


# ---- models ---------------------------------------------------------------------------------------------------------
def denoiser_of(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def to_double(pipe: Any) -> Any:
    """All parts of a pipeline in float64."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float64)
    return pipe


def double(inputs: Any) -> Any:
    """A nest of inputs with its floats in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {k: double(v) for k, v in inputs.items()}
    return inputs


def latents(pipe: Any, name: str, **options: Any) -> Tensor:
    """The latents that a pipeline call ends with."""
    pipe_options = {k: options.pop(k) for k in list(options) if k not in ("batch", "cfg", "steps", "seed")}
    return pipe(
        **{**pipelines.call_kwargs(name, **options), "output_type": "latent", **pipe_options}, return_dict=False
    )[0]


def predict(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def each_story(model: nn.Module, inputs: dict[str, Any], pictures: int, stories: int = 2) -> Tensor:
    """The predictions for the rows of each story alone, in the order of the batch."""

    def part(x: Any, rows: slice) -> Any:
        if isinstance(x, Mapping):
            return {k: part(v, rows) for k, v in x.items()}
        return x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == stories * pictures else x

    return torch.cat([predict(model, part(inputs, slice(s * pictures, (s + 1) * pictures))) for s in range(stories)])


def last_site(model: Any, kinds: tuple[str, ...] = ("self", "joint")) -> Site:
    return [site for site in attnsteer.sites(model) if site.kind in kinds][-1]


# ---- the oracle: explicit maps, found by module hooks, under torch's own function -----------------------------------
def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The map and the (repeated) values, ``(B, H, Nq, Nk)`` and ``(B, H, Nk, D)``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1), v


@contextmanager
def replaced_attention(model: nn.Module, names: Iterable[str], explicit: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, torch's fused attention is ``explicit(name, query, key, value, ...)`` while a named module runs.

    Independent of the engine on purpose: module hooks say where we are, and torch's function itself is replaced.
    """
    running: list[str] = []
    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return explicit(running[-1], *args, **kwargs) if running else original(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()


def explicit_identity(model: nn.Module, strength: Mapping[str, Mapping[int, float]]) -> AbstractContextManager[None]:
    """Inside, ``A`` becomes ``(1 - u) A + u I`` at the named modules' heads: ``{module: {head: u}}``."""

    def explicit(
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert not is_causal
        weights, values = explicit_attention(query, key, value, attn_mask, scale)
        weights = weights.clone()
        for head, u in strength[name].items():
            weights[:, head] = (1 - u) * weights[:, head] + u * torch.eye(weights.shape[-1], dtype=weights.dtype)
        return weights @ values

    return replaced_attention(model, strength, explicit)


def choice(model: Any) -> tuple[Where, dict[str, dict[int, float]]]:
    """Two heads in an early and one in a late self- or joint-attention layer, as a selection and for the oracle."""
    first, *_, last = [
        s for s in attnsteer.sites(model) if s.kind in ("self", "joint") and not s.name.endswith("attn2")
    ]
    heads = {first.layer: [0, 1], last.layer: [1]}
    return Where(heads=heads), {first.name: {0: 0.75, 1: 0.75}, last.name: {1: 0.75}}


class Reference:
    """Guidance by hand around any pipeline: a second, whole forward of each step's first call, with explicit maps."""

    def __init__(self, pipe: Any, strength: dict[str, dict[int, float]], w: float):
        self.pipe, self.strength, self.w = pipe, strength, w
        self.outputs: list[Tensor] = []
        self.first: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
        self.busy = False
        self.handle = denoiser_of(pipe).register_forward_hook(self._keep, with_kwargs=True)
        self.step = pipe.scheduler.step
        # pipelines ask the signature whether it takes a generator
        pipe.scheduler.step = functools.wraps(self.step)(lambda *args, **kwargs: self._step(*args, **kwargs))

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.first is None and not self.busy:
            self.first = (args, kwargs, output[0])

    def _step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.first is not None
        given_args, given_kwargs, cond = self.first
        self.busy = True
        with explicit_identity(denoiser_of(self.pipe), self.strength):
            perturbed = denoiser_of(self.pipe)(*given_args, **given_kwargs)[0]
        self.busy, self.first = False, None
        samples, channels = model_output.shape[:2]  # the conditional rows are the last ones in all these families
        d = (cond - perturbed)[-samples:, :channels]
        self.outputs.append(model_output + self.w * d)
        return self.step(self.outputs[-1], *args, **kwargs)

    def remove(self) -> None:
        self.handle.remove()
        del self.pipe.scheduler.step


class Loop:
    """What the scheduler of a pipeline was given, step by step."""

    def __init__(self, pipe: Any):
        self.outputs: list[Tensor] = []
        self.timesteps: list[float] = []
        inner = pipe.scheduler.step
        self._scheduler = pipe.scheduler

        @functools.wraps(inner)  # pipelines ask the signature whether it takes a generator
        def step(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            self.outputs.append(model_output.clone())
            self.timesteps.append(float(timestep))
            return inner(model_output, timestep, *args, **kwargs)

        pipe.scheduler.step = step

    def remove(self) -> None:
        del self._scheduler.step


# ---- state ----------------------------------------------------------------------------------------------------------
def _hooks(module: nn.Module) -> tuple[int, ...]:
    return (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))


def state_of(*models: nn.Module, scheduler: Any = None) -> dict[str, Any]:
    """Everything that steering could leave behind, in comparable form."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    state: dict[str, Any] = {
        "backends": dict(Registry._backends),
        "default backend": Registry.get_active_backend(),
        "rng": torch.get_rng_state().tolist(),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
        "grad": torch.is_grad_enabled(),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.models") and "F" in getattr(module, "__dict__", {}):
            state[f"F of {name}"] = module.__dict__["F"]
    for i, model in enumerate(models):
        for name, module in model.named_modules():
            state[f"{i} {name}"] = (type(module), frozenset(module.__dict__), _hooks(module))
            state[f"{i} {name} forward"] = module.__dict__.get("forward")
            state[f"{i} {name} compiled"] = module.__dict__.get("_compiled_call_impl")
            processor = module.__dict__.get("processor")
            if processor is not None:
                state[f"{i} {name} processor"] = (processor, frozenset(vars(processor)), type(processor).__call__)
                for cls in type(processor).__mro__:
                    state[f"{cls}.__call__"] = vars(cls).get("__call__")
    if scheduler is not None:
        state["scheduler"] = frozenset(vars(scheduler))
        state["scheduler step"] = (scheduler.step, scheduler.set_timesteps)
    return state


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what changed."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
