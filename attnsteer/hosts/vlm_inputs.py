"""Small questions about a language model and what it is called with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .vlm_families import ANSWER_TYPES, PER_TOKEN, SCRATCH

TOKEN_BY_TOKEN: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
TOKEN_BY_TOKEN |= {"prefill_chunk_size": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
"""Options of ``generate`` for one pass of the whole prompt, then one for each greedy token, whatever the model's
generation config says."""
ASSISTED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "use_mtp")
"""Options of ``generate`` that have candidates written, to be checked several at once."""


def length(given: Mapping[str, Any]) -> int:
    """Number of tokens in a call."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor):
            return int(given[name].shape[1])
    return 0


def cache_length(given: Mapping[str, Any]) -> int:
    """Number of tokens that the cache of a call holds already. Reading it waits for the device with a static cache."""
    cache: Any = given.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def effective(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What ``generate`` makes of an option: of the call, else of its generation config, else of the model's."""
    if name in options:
        return options[name]
    value = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def assisted(model: Any, options: Mapping[str, Any]) -> list[str]:
    """The options by which ``generate`` would check several candidates at once."""
    found = {name: effective(model, options, name) for name in ASSISTED}
    return [name for name, value in found.items() if value is not None and value is not False]


def starts_with(given: Mapping[str, Any], prompt: Mapping[str, Any]) -> bool:
    """Whether a pass is one of the prompt, whose rows beams may have repeated, or of the first tokens of it."""
    ids, wanted = given.get("input_ids"), prompt.get("input_ids")
    if not isinstance(ids, Tensor) or not isinstance(wanted, Tensor):
        return ids is wanted
    count, (times, rest) = min(ids.shape[1], wanted.shape[1]), divmod(len(ids), len(wanted))
    wanted = wanted[:, :count].to(ids.device).repeat_interleave(times, 0)
    return not rest and torch.equal(ids[:, :count], wanted)


def with_answer(inputs: Mapping[str, Any], answer: Tensor, config: Any) -> dict[str, Any]:
    """The inputs of a prompt ``(B, N)`` followed by the tokens of an answer ``(B, T)``."""
    ids: Tensor = inputs["input_ids"]
    answer = answer.to(ids)
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    types = ANSWER_TYPES.get(config.model_type, {})
    longer = {
        "input_ids": torch.cat([ids, answer], 1),
        "attention_mask": torch.cat([mask, mask.new_ones(answer.shape)], 1),
    }
    for name in PER_TOKEN:
        if isinstance(inputs.get(name), Tensor):
            longer[name] = torch.cat([inputs[name], inputs[name].new_full(answer.shape, types.get(name, 0))], 1)
    return {**inputs, **longer}


def execution_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes; accelerate keeps offloaded weights elsewhere and names the place in its hook."""
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if hooked is not None:
        return torch.device(hooked)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def on_device(value: Any, device: torch.device) -> Any:
    """Tensors on the device, as ``generate`` moves them; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value


def kept_positions(model: torch.nn.Module, both: Mapping[str, Any]) -> dict[str, Tensor]:
    """Positions for two lanes of the same length that keep their places although the second lane lost its image.

    Most families count positions along the sequence, so nothing is to be said. Qwen-VL and its kin derive them from the
    image: there the second lane gets those of the first.
    """
    rope = getattr(getattr(model, "model", None), "get_rope_index", None)
    if rope is None:
        return {}
    batch = both["input_ids"].shape[0] // 2
    accepted = inspect.signature(rope).parameters
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    given = {n: v[:batch] if n in rows else v for n, v in both.items() if n in accepted}
    if "mm_token_type_ids" in accepted and "mm_token_type_ids" not in given:
        return {}
    positions = rope(**given)[0]  # (3, B, N)
    return {"position_ids": torch.cat([positions, positions], dim=1)}


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """A forward pass inside leaves no trace: evaluation mode (no random numbers), and what families cache is put
    back."""
    training = [module for module in model.modules() if module.training]
    kept = [(m, name, m.__dict__[name]) for m in model.modules() for name in SCRATCH if name in m.__dict__]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, name, value in kept:
            module.__dict__[name] = value
