"""Facts about the denoisers of diffusers, one descriptor per family. Everything else in the library is generic.

A descriptor says where the blocks are and in which order they run, what the attention modules of a block are, how text
and image tokens lie in the sequence, which inputs of ``forward`` have a batch axis, and whether the outputs of its
top-level stages may be replayed for the perturbed rows (``attnsteer.fork``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..errors import SteeringError
from ..scheduler import Rows, plans_of
from ..site import Kind, Site, Spans
from .base import take_rows, unwrap
from .diffusers_seam import attention_modules

Inputs = Mapping[str, Any]
Grid = tuple[int, int, int]
NONE = slice(0, 0)
ALL = slice(0, None)


@dataclass(frozen=True)
class Family:
    """One family of denoisers.

    Attributes:
        name: how the family is called in tables and messages.
        classes: names of its model classes.
        stages: top-level children that hold the blocks, in execution order; a ``ModuleList`` stands for its elements.
        parts: last name of an attention module -> kind of attention.
        rows: inputs of ``forward`` whose tensors have the batch as first axis; the first one is the noisy sample.
        grid: ``(model, inputs, site) -> (T, H, W)`` of the image tokens at a site, or None.
        order: token order of joint sites.
        chain: True where a stage needs the output of the previous one only (no skip connections).
        no_fork: inputs that act between or inside stages, so that nothing may be replayed.
        lists: inputs that are Python lists with one entry per row.
        cfg: order of the parts where one batch holds both branches of classifier-free guidance.
        turned: parts whose queries and keys are turned by their positions (rotary embedding).
        rotary: ``(model, inputs) -> (cos, sin)`` of the whole sequence, where it is known.
    """

    name: str
    classes: tuple[str, ...]
    stages: tuple[str, ...]
    parts: Mapping[str, Kind]
    rows: tuple[str, ...]
    grid: Callable[[Any, Inputs, Site], Grid | None]
    order: tuple[str, ...] = ()
    chain: bool = True
    no_fork: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    cfg: tuple[str, str] = ("uncond", "cond")
    main_call: Mapping[str, Callable[[torch.nn.Module], int]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    rotary: Callable[[Any, Inputs], tuple[torch.Tensor, torch.Tensor]] | None = None


# ---- grids of the image tokens ---------------------------------------------------------------------------------------
def unet_level(model: Any, name: str) -> int:
    """How often the picture was halved where a UNet stage (or a site in it) works; follows from its place."""
    last = len(model.down_blocks) - 1
    stage, number, *_ = (*name.split("."), "")
    if stage == "mid_block":
        return last
    return int(number) if stage == "down_blocks" else last - int(number)


def _unet_grid(model: Any, inputs: Inputs, site: Site) -> Grid | None:
    """Every down block but the last halves, rounding up."""
    height, width = (-(-size // 2 ** unet_level(model, site.name)) for size in inputs["sample"].shape[-2:])
    return (1, height, width)


def _patch_grid(model: Any, inputs: Inputs, site: Site) -> Grid | None:
    patch = model.config.patch_size
    height, width = inputs["hidden_states"].shape[-2:]
    return (1, height // patch, width // patch)


def _video_grid(model: Any, inputs: Inputs, site: Site) -> Grid | None:
    frames, height, width = (
        n // p for n, p in zip(inputs["hidden_states"].shape[-3:], model.config.patch_size, strict=True)
    )
    return (frames, height, width)


def _flux_grid(model: Any, inputs: Inputs, site: Site) -> Grid | None:
    """Image ids are (0, row, column); reading them waits for the device: asked only where a method needs a grid."""
    rows, columns = (int(n) + 1 for n in inputs["img_ids"][..., 1:].amax(dim=tuple(range(inputs["img_ids"].dim() - 1))))
    return (1, rows, columns) if rows * columns == inputs["hidden_states"].shape[1] else None


def _qwen_grid(model: Any, inputs: Inputs, site: Site) -> Grid | None:
    shapes = inputs["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    return tuple(shapes[0]) if len(shapes) == 1 else None  # several pictures (editing) have no common grid


def _flux_rotary(model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image ids give the angles of the joint sequence."""
    ids = [x[0] if x.dim() == 3 else x for x in (inputs["txt_ids"], inputs["img_ids"])]
    return model.pos_embed(torch.cat(ids))


UNET = Family(
    name="UNet (SD 1.x, SD 2.x, SDXL)",
    classes=("UNet2DConditionModel",),
    stages=("down_blocks", "mid_block", "up_blocks"),
    parts={"attn1": "self", "attn2": "cross"},
    rows=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "encoder_attention_mask",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ),
    grid=_unet_grid,
    chain=False,
    no_fork=(
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ),
)

SD3 = Family(
    name="SD3, SD3.5",
    classes=("SD3Transformer2DModel",),
    stages=("transformer_blocks",),
    parts={"attn": "joint", "attn2": "self"},
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
    ),
    grid=_patch_grid,
    order=("image", "text"),
    no_fork=("block_controlnet_hidden_states", "skip_layers"),
)

FLUX = Family(
    name="FLUX",
    classes=("FluxTransformer2DModel",),
    stages=("transformer_blocks", "single_transformer_blocks"),
    parts={"attn": "joint"},
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    ),
    grid=_flux_grid,
    order=("text", "image"),
    no_fork=("controlnet_block_samples", "controlnet_single_block_samples"),
    turned=("attn",),
    rotary=_flux_rotary,
)

PIXART = Family(
    name="PixArt",
    classes=("PixArtTransformer2DModel",),
    stages=("transformer_blocks",),
    parts={"attn1": "self", "attn2": "cross"},
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    ),
    grid=_patch_grid,
)

WAN = Family(
    name="Wan",
    classes=("WanTransformer3DModel",),
    stages=("blocks",),
    parts={"attn1": "self", "attn2": "cross"},
    rows=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "attention_kwargs"),
    grid=_video_grid,
    turned=("attn1",),
    # image-to-video: the module attends to the image keys first and to the text keys second
    main_call={"attn2": lambda module: int(getattr(module, "add_k_proj", None) is not None)},
)

QWEN_IMAGE = Family(
    name="QwenImage",
    classes=("QwenImageTransformer2DModel",),
    stages=("transformer_blocks",),
    parts={"attn": "joint"},
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
        "attention_kwargs",
        "controlnet_block_samples",
        "additional_t_cond",
    ),
    grid=_qwen_grid,
    order=("text", "image"),
    no_fork=("controlnet_block_samples",),
    lists=("img_shapes",),
    turned=("attn",),
)

FAMILIES: tuple[Family, ...] = (UNET, SD3, FLUX, PIXART, WAN, QWEN_IMAGE)

NEGATED = frozenset(
    (
        "HiDreamImageTransformer2DModel",
        "LuminaNextDiT2DModel",
        "Lumina2Transformer2DModel",
        "NucleusMoEImageTransformer2DModel",
    )
)
"""Models whose pipelines hand the scheduler the negative of the prediction."""


NO_GUIDANCE = {
    "CosmosTransformer3DModel": "its pipelines mix the prediction with the sample before the scheduler sees it",
}
"""Models whose predictions are not in the scheduler's space, and why."""


def guidance_refusal(model: torch.nn.Module, cfg: tuple[str, ...] | None) -> str | None:
    """Why predictions of this model cannot be guided where the scheduler steps; None where they can."""
    name = type(unwrap(model)).__name__
    if name in NO_GUIDANCE:
        return f"{name} cannot be guided: {NO_GUIDANCE[name]}."
    if family_of(model) is None and cfg is None:
        return (
            f"{name} has no descriptor, so the order of a guided batch is unknown: pass cfg=('uncond', 'cond') or "
            "('cond', 'uncond') as your pipeline has it."
        )
    return None


def prediction_sign(model: torch.nn.Module) -> float:
    """The factor between a denoiser's prediction and what its pipelines give to the scheduler."""
    return -1.0 if type(unwrap(model)).__name__ in NEGATED else 1.0


def family_of(model: torch.nn.Module) -> Family | None:
    """The descriptor of a model, also for subclasses; None for a family that has none."""
    names = {cls.__name__ for cls in type(unwrap(model)).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def stages(model: torch.nn.Module, family: Family) -> list[tuple[str, torch.nn.Module]]:
    """The top-level stages by name, in execution order."""
    found: list[tuple[str, torch.nn.Module]] = []
    for name in family.stages:
        child = getattr(unwrap(model), name, None)
        if isinstance(child, torch.nn.ModuleList):
            found += [(f"{name}.{i}", module) for i, module in enumerate(child)]
        elif child is not None:
            found.append((name, child))
    return found


def sites(model: torch.nn.Module) -> list[Site]:
    """All attention modules in execution order. A layer is a transformer block: the parent of its attention modules."""
    model = unwrap(model)
    family = family_of(model)
    if family is None:
        named = attention_modules(model)
        kinds: Mapping[str, Kind] = {}
    else:
        named = [(f"{stage}.{n}", m) for stage, module in stages(model, family) for n, m in attention_modules(module)]
        kinds = family.parts
    layers: dict[str, int] = {}
    found = []
    for index, (name, module) in enumerate(named):
        parent, _, part = name.rpartition(".")
        layer = layers.setdefault(parent, len(layers))
        kind = kinds.get(part, "unknown")
        order = family.order if family and kind == "joint" else ()
        level = unet_level(model, name) if family is UNET else None
        found.append(_site(name, module, kind, layer, index, order, level))
    turned = family.turned if family else ()
    known: Literal["pairs", "unknown"] = "pairs" if family and family.rotary else "unknown"
    return [replace(s, rotary=known) if s.name.rpartition(".")[2] in turned else s for s in found]


def _site(
    name: str, module: Any, kind: Kind, layer: int, index: int, order: tuple[str, ...], level: int | None
) -> Site:
    heads = module.heads
    head_dim = module.inner_dim // heads
    kv_dim = getattr(module, "inner_kv_dim", module.inner_dim)
    return Site(name, kind, layer, index, heads, kv_dim // head_dim, head_dim, order, level=level)


def spans(model: Any, family: Family | None, inputs: Inputs, site: Site, want_grid: bool) -> Spans | None:
    """Where text and image tokens lie at a site in this forward pass; None for a family without a descriptor."""
    if family is None or site.kind == "unknown":
        return None
    grid = family.grid(unwrap(model), inputs, site) if want_grid else None
    if site.kind == "cross":
        return Spans(image=NONE, text=ALL, grid=grid)
    if site.kind == "self":
        return Spans(image=ALL, text=NONE, grid=grid)
    text = inputs["encoder_hidden_states"].shape[1]
    if site.order == ("text", "image"):
        return Spans(image=slice(text, None), text=slice(0, text), grid=grid)
    return Spans(image=slice(0, -text), text=slice(-text, None), grid=grid)


def main_call(family: Family | None, site: Site, module: torch.nn.Module) -> int:
    """Which of the kernel calls of a module is its own attention (others serve image prompts)."""
    rule = family.main_call.get(site.name.rpartition(".")[2]) if family else None
    return rule(module) if rule else 0


def sample_of(family: Family | None, inputs: Inputs) -> torch.Tensor:
    """The noisy sample among the inputs; its first axis is the batch."""
    names: Sequence[str] = (family.rows[0],) if family else ("hidden_states", "sample", "x")
    for name in names:
        if isinstance(inputs.get(name), torch.Tensor):
            return inputs[name]
    raise SteeringError(f"The denoiser was called without a noisy sample: expected is {' or '.join(names)}.")


def rows_of(family: Family | None, inputs: Inputs, rows: torch.Tensor, batch: int) -> dict[str, Any]:
    """The inputs of chosen rows of a call; lists with an entry per row wait for the host (``Family.lists``)."""
    names = family.rows if family else tuple(inputs)
    return {k: take_rows(v, rows, batch) if k in names else v for k, v in inputs.items()}


def layout_key(family: Family | None, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What the token layout of a forward depends on."""
    text = inputs.get("encoder_hidden_states")
    sample = sample_of(family, inputs)
    return (tuple(sample.shape[1:]), text.shape[1] if isinstance(text, torch.Tensor) else None)


def refusals(
    models: Sequence[torch.nn.Module], rows: Rows, has_scheduler: bool, cfg: tuple[str, ...] | None = None
) -> list[str]:
    """Why these plans cannot run on these denoisers; empty where they can. Asked at attach and when a run begins."""
    reasons = []
    plans = plans_of(rows)
    guiding = [type(plan.processor).__name__ for plan in plans if plan.guides]
    for model in map(unwrap, models):
        name = type(model).__name__
        if getattr(model, "is_cache_enabled", False):
            reasons.append(f"{name} has a cache that skips attention on some steps: call disable_cache() first.")
        if getattr(model, "_parallel_config", None) is not None:
            reasons.append(f"{name} runs with context parallelism, which splits the token sequence: turn it off first.")
    if cfg is not None and (cfg.count("cond") != 1 or len(set(cfg)) < len(cfg)):
        reasons.append(f"cfg={cfg!r} is no order of a guided batch: name each part once, one of them 'cond'.")
    if guiding and not has_scheduler:
        reasons.append(
            f"{guiding[0]} guides where the scheduler steps, and a bare {type(unwrap(models[0])).__name__} has none: "
            "attach to the pipeline, or pass scheduler=... from your own loop."
        )
    if guiding:
        reasons += [why for why in (guidance_refusal(model, cfg) for model in models) if why]
    reasons += [
        f"steps={plan.where.steps!r} of {type(plan.processor).__name__} is a phase of language models: give fractions, "
        "positions or noise levels."
        for plan in plans
        if plan.where.steps in ("prefill", "decode")
    ]
    sharing = [type(plan.processor).__name__ for plan in plans if plan.processor.reads_rows]
    apart = [type(plan.processor).__name__ for plan in plans if plan.nursing is not None]
    if sharing and apart:
        reasons.append(
            f"{sharing[0]} reads other rows of the batch, and {apart[0]} runs some rows alone: attach one of them."
        )
    if any("image_free" in plan.processor.lanes for plan in plans):
        reasons.append("Methods that compare with an image-free prompt need a vision-language model.")
    return reasons
