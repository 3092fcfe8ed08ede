"""A counterpart in generation: a second prompt that gets the same new tokens, beside the user's own cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .vlm_families import PER_TOKEN

PER_ROW = ("attention_mask", "position_ids", *PER_TOKEN)
KEPT = (*PER_ROW, "past_key_values", "use_cache")
"""What decode steps need of the inputs."""


class Branch:
    """One counterpart in generation: its inputs as ``generate`` keeps them, and its cache.

    Args:
        model: the language model.
        inputs: the whole prompt of the counterpart, ``r`` rows.
        names: the inputs that the model's forward takes.
        rows: int ``(r,)``, in order: which rows of the user's prompt these are.

    Attributes:
        rows: int, the rows of the user's forward pass that the counterpart follows; beams keep to them.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], names: Sequence[str], rows: Tensor):
        self._model, self.rows = model, rows
        self._ids: Tensor = inputs["input_ids"]
        self._kwargs = {name: value for name, value in inputs.items() if name != "input_ids"}
        self._kwargs["use_cache"] = True
        if "position_ids" in names:
            self._kwargs["position_ids"] = model._prepare_position_ids_for_generation(self._ids, self._kwargs)
        if bool(self._kwargs["attention_mask"].all()):
            self._kwargs["attention_mask"] = None  # as generate does: kernels are faster without
        self._first = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._records = False

    def begin(self, times: int) -> Tensor:
        """The prediction behind the prompt, ``(r times, 1, V)``; beams repeat each row, here after the prefill."""
        logits = self._run(self._ids, is_first_iteration=True, **self._first)[:, -1:]
        self._kwargs = {name: value for name, value in self._kwargs.items() if name in KEPT}  # the picture is in
        if times > 1:
            self.rows = (times * self.rows[:, None] + torch.arange(times, device=self.rows.device)).flatten()
            self._kwargs["past_key_values"].batch_repeat_interleave(times)
            for name in PER_ROW:
                if isinstance(self._kwargs.get(name), Tensor):  # (r, N), or (3, r, N) of positions in a picture
                    self._kwargs[name] = self._kwargs[name].repeat_interleave(times, dim=-2)
        return logits.repeat_interleave(times, dim=0)

    def feed(self, tokens: Tensor) -> Tensor:
        """The predictions behind each of ``T`` more tokens: all rows' ``(B, T)`` -> ``(r, T, V)``."""
        if self._records:
            self._kwargs["past_key_values"].crop(0)  # a window that records its past waits for this
        count = tokens.shape[1]
        self._kwargs = self._model._update_model_kwargs_for_generation({}, self._kwargs, num_new_tokens=count)
        return self._run(tokens[self.rows])

    def record(self) -> None:
        """Windows shall keep what ``crop`` may want back."""
        self._records = True
        self._kwargs["past_key_values"].activate_past_recording()

    def crop(self, tokens: int) -> None:
        self._kwargs["past_key_values"].crop(-tokens)
        for name in PER_ROW:
            if isinstance(self._kwargs.get(name), Tensor):
                self._kwargs[name] = self._kwargs[name][..., :-tokens]

    def reorder(self, beams: Tensor) -> None:
        """Beams change places; those of one prompt stay among themselves, so the rows stay the same."""
        self._kwargs["past_key_values"].reorder_cache(torch.searchsorted(self.rows, beams.to(self.rows)[self.rows]))

    def _run(self, ids: Tensor, **more: Any) -> Tensor:
        prepared = self._model.prepare_inputs_for_generation(ids, **self._kwargs, **more)
        # past our own interception, and past a graph of the whole model, which serves the user's shapes
        out = nn.Module._call_impl(self._model, **prepared, return_dict=True)
        self._kwargs["past_key_values"] = out.past_key_values
        return out.logits
