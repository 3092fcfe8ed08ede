"""Processors that react to data, held to the rows and heads that they were given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .edits import Edit, Reaction, restrict, sources
from .errors import SteeringError
from .processor import Processor
from .scheduler import Plan, together
from .site import AttentionCall, Site


class Reacts(Protocol):
    """Whatever answers an attention call with an edit."""

    def react(self, call: AttentionCall) -> Reaction: ...


class Within:
    """A reaction limited to its rows and heads; elsewhere the edit is neutral. ``mask``: bool ``(R, H)``; ``mine``: its
    rows, known to the host without asking the device."""

    def __init__(self, inner: Reacts, mask: Tensor, mine: Sequence[bool]):
        self.inner, self.mask, self.mine = inner, mask, mine

    def react(self, call: AttentionCall) -> Reaction:
        edit = self.inner.react(call)
        if edit is None:
            return None
        lanes, edits = max(1, len(call.lanes)), edit if isinstance(edit, tuple) else (edit,)
        for one in edits:
            self._check_sources(one, call.q.shape[0] // lanes)
        held = None if torch.compiler.is_compiling() else tuple(self.mine)  # in a graph it would be a constant
        return tuple(replace(restrict(one, self.mask, lanes), held=held) for one in edits)

    def _check_sources(self, edit: Edit, rows: int) -> None:
        """Rows that share something must belong to one processor: whose rows they are is all that a lane knows."""
        read = sources(edit)
        if read is None or len(self.mine) == 1:
            return
        mine = [self.mine[row % rows * len(self.mine) // rows] for row in range(len(read))]
        strange = [(b, j) for b, entry in enumerate(read) for j in entry if j >= 0 and mine[b] and not mine[j]]
        if strange:
            raise SteeringError(
                f"Row {strange[0][0]} reads row {strange[0][1]}, which is not steered by the same processor object: "
                "the rows of one story are one block of variants with one and the same processor."
            )


class Silent:
    """A reaction that may look but whose edit is dropped (outside its steps)."""

    def __init__(self, inner: Reacts):
        self.inner = inner

    def react(self, call: AttentionCall) -> None:
        self.inner.react(call)


class Sharing:
    """A reaction whose sites have one dict in common, ``call.shared``."""

    def __init__(self, inner: Reacts, shared: dict[str, Any]):
        self.inner, self.shared = inner, shared

    def react(self, call: AttentionCall) -> Reaction:
        call.shared = self.shared
        return self.inner.react(call)


def limited(plans: Sequence[Plan], site: Site, rows: Sequence[Sequence[Plan]], device: torch.device) -> Reacts:
    """The processor of plans that are asked together, held to the rows that have one and to its heads at a site."""
    members = {id(plan) for plan in plans}
    acting = [next((plan for plan in row if id(plan) in members), None) for row in rows]
    heads = [() if plan is None else plan.selection[site] for plan in acting]
    mask = torch.tensor([[head in chosen for head in range(site.heads)] for chosen in heads])
    processor = _joined([(plan or plans[0]).processor for plan in acting], device)
    return processor if bool(mask.all()) else Within(processor, mask.to(device), [plan is not None for plan in acting])


def _joined(rows: Sequence[Processor], device: torch.device) -> Processor:
    """One processor for the processors of all rows: numbers in which they differ are tensors ``(R,)``."""
    numbers = {name: [getattr(processor, name, None) for processor in rows] for name in rows[0].per_row}
    differing = {name: values for name, values in numbers.items() if any(value != values[0] for value in values)}
    if not differing:
        return rows[0]
    joined = copy.copy(rows[0])
    wide = torch.float32 if device.type == "mps" else torch.float64  # as precise as a Python float
    for name, values in differing.items():
        object.__setattr__(joined, name, torch.tensor(values, dtype=wide, device=device))
    return joined


def reacting(rows: Sequence[Sequence[Plan]], site: Site) -> list[tuple[Plan, ...]]:
    """The plans that look at the data of a site, those that are asked together in one tuple."""
    return together([[plan for plan in row if plan.reacts and site in plan.selection] for row in rows])
