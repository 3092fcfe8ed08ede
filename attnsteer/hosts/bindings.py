"""The bindings of a denoiser's forward: what every row wants at every site, merged and placed on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..binding import Binding
from ..reacting import Reacts, limited, reacting
from ..scheduler import Plan, merge_edits, needs_grid, wanted_sites
from ..site import Site
from . import denoisers
from .base import unwrap


class Bindings:
    """Bindings by arrangement of rows, made once for each."""

    def __init__(self) -> None:
        self._made: dict[Any, dict[Site, Binding]] = {}

    def clear(self) -> None:
        self._made.clear()

    def of(
        self, model: torch.nn.Module, inputs: dict[str, Any], rows: Sequence[tuple[Plan, ...]]
    ) -> dict[Site, Binding]:
        """A binding for every site at which a row wants something."""
        family = denoisers.family_of(model)
        device = denoisers.sample_of(family, inputs).device
        shape = denoisers.layout_key(family, inputs)
        key = (id(model), device, shape, tuple(tuple(map(id, row)) for row in rows))
        if key not in self._made:
            made, turned = {}, None
            for site in wanted_sites(rows):
                edits = merge_edits(rows, site, device)
                reactors = reacting(rows, site)
                if edits or reactors:
                    needs = {need for plans in reactors for need in plans[0].processor.needs}
                    grid = "grid" in needs or needs_grid(edits)
                    layout = denoisers.spans(model, family, inputs, site, grid)
                    if layout and family and family.rotary and "rotary" in needs and site.rotary == "pairs":
                        turned = turned or family.rotary(unwrap(model), inputs)  # one for all sites
                        layout = replace(layout, rotary=turned)
                    turn = denoisers.main_call(family, site, unwrap(model).get_submodule(site.name))
                    made[site] = Binding(site, edits, spans=layout, main_call=turn)
            self._made[key] = made
        return self._made[key]

    def again(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        rows: Sequence[tuple[Plan, ...]],
        borrow: Callable[[Sequence[Plan], Site], Reacts] | None = None,
    ) -> dict[Site, Binding]:
        """The bindings of one more forward of some rows, in which nobody looks and nothing is kept.

        ``borrow`` gives the reactions of methods that read other rows, which may not run in this forward."""
        bindings = {site: binding.scratch() for site, binding in self.of(model, inputs, rows).items()}
        device = denoisers.sample_of(denoisers.family_of(model), inputs).device
        for site, binding in bindings.items():
            binding.reactors = tuple(
                (
                    borrow(plans, site) if borrow and one.processor.reads_rows else limited(plans, site, rows, device),
                    dict(one.states[site]),
                )
                for plans in reacting(rows, site)
                if not (one := plans[0]).processor.reads_only
            )
        return bindings
