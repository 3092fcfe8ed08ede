"""Which world a target belongs to: a pipeline or denoiser of diffusers, or a model of transformers.

Told by the names of its classes, so that neither library is imported to ask.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SteeringError

DENOISERS = ("unet", "transformer", "transformer_2")
"""Where pipelines keep their denoisers."""
LANGUAGE_MODELS = frozenset({("transformers", "PreTrainedModel"), ("peft", "PeftModel")})


def _lineage(obj: Any) -> set[tuple[str, str]]:
    """Library and name of every class of an object, so that no library is imported to ask."""
    return {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(obj).__mro__}


def is_pipeline(target: Any) -> bool:
    """Whether this is a pipeline of diffusers."""
    return ("diffusers", "DiffusionPipeline") in _lineage(target)


def models_of(target: Any) -> list[torch.nn.Module]:
    """The denoisers of a pipeline, or the model itself.

    Raises:
        SteeringError: for anything else.
    """
    if is_pipeline(target):
        parts = [getattr(target, name, None) for name in DENOISERS]
        models = [part for part in parts if isinstance(part, torch.nn.Module)]
        if not models:
            raise SteeringError(f"{type(target).__name__} has neither a unet nor a transformer to steer.")
        return models
    lineage = _lineage(getattr(target, "_orig_mod", target))
    if isinstance(target, torch.nn.Module) and lineage & {("diffusers", "ModelMixin"), *LANGUAGE_MODELS}:
        return [target]
    raise SteeringError(
        f"{type(target).__name__} cannot be steered: give a Diffusers pipeline, its denoiser or a Hugging Face model."
    )


def is_language_model(model: Any) -> bool:
    """Whether this is a model of transformers, adapted or compiled or plain."""
    return not LANGUAGE_MODELS.isdisjoint(_lineage(getattr(model, "_orig_mod", model)))
