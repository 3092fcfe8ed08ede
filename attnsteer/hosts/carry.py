"""Putting bindings on the attention modules of a denoiser for one forward, and checking that each was reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..binding import ATTRIBUTE, Binding
from ..errors import NotReachedError
from ..site import Site
from .base import Call, checkpoints, room_for_graphs, unwrap
from .diffusers_seam import armed


@contextmanager
def steering(model: torch.nn.Module, bindings: Mapping[Site, Binding]) -> Iterator[None]:
    """The modules carry their bindings for one forward; afterwards each must have been reached.

    Raises:
        NotReachedError: a binding that no kernel call came to.
    """
    bound = [(unwrap(model).get_submodule(site.name), binding) for site, binding in bindings.items()]
    for binding in bindings.values():
        binding.hit = False
    with _carrying(bound), checkpoints(model, lambda block: _carrier(block, bound)), room_for_graphs():
        yield
    missed = [site.name for site, binding in bindings.items() if not binding.hit]
    if missed:
        raise NotReachedError(
            f"{len(missed)} selected sites were never reached ({', '.join(missed[:4])}): the model skipped them or "
            "attends through code that diffusers' attention backends do not see."
        )


@contextmanager
def _carrying(bound: Sequence[tuple[torch.nn.Module, Binding]]) -> Iterator[None]:
    """Inside, the modules carry their bindings."""
    before = [vars(module).get(ATTRIBUTE) for module, _ in bound]
    for module, binding in bound:
        vars(module)[ATTRIBUTE] = binding
    try:
        yield
    finally:
        for (module, _), outer in zip(bound, before, strict=True):
            if outer is None:
                vars(module).pop(ATTRIBUTE, None)
            else:
                vars(module)[ATTRIBUTE] = outer


def _carrier(block: Call, bound: Sequence[tuple[torch.nn.Module, Binding]]) -> Call:
    """The block with the bindings of this forward, whenever it runs: the backward pass may come after detaching.

    What the backward pass computes again finds the states as they are now and leaves nothing in them.
    """
    again = [(module, binding.scratch()) for module, binding in bound]
    turns = iter([bound])

    def run(*args: Any, **kwargs: Any) -> Any:
        with _carrying(next(turns, again)), armed([module for module, _ in bound]):
            return block(*args, **kwargs)

    return run
