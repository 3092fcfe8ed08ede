"""``Where``: which steps, layers and heads. The one selection language, shared by every processor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from .errors import WhereError
from .site import Kind, Phase, Site

Layer: TypeAlias = int | str | slice
Layers: TypeAlias = Layer | Sequence[Layer]
Heads: TypeAlias = Literal["all"] | int | Sequence[int] | Mapping[int | str, "Literal['all'] | int | Sequence[int]"]
Steps: TypeAlias = (
    Literal["all", "prefill", "decode"]
    | int
    | slice
    | tuple[float, float]
    | Sequence[int]
    | Mapping[str, Sequence[float]]
)
Selection: TypeAlias = dict[Site, tuple[int, ...]]
"""The selected heads of every selected site, in execution order."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset, range)) else [value]


@dataclass(frozen=True)
class Where:
    """A selection of layers, heads and steps.

    Args:
        layers: ``"all"``, an int (transformer block or decoder layer in execution order; negative counts from the end),
            a slice or range of ints, a site name or glob (``"mid_block*attn1"``), or a list of these. Ints select the
            sites of the kind that the processor acts on; names select exactly the sites that they match.
        heads: ``"all"``, an int, a list of ints, or a mapping from layer (int, name or glob) to heads; with a mapping
            and ``layers="all"`` its keys are the layers.
        steps: ``"all"``; a ``(start, stop)`` pair of floats, fractions of the schedule with ``start <= i / n < stop``;
            an int, slice or list of ints (positions in ``scheduler.timesteps``); ``{"sigma": (low, high)}`` for noise
            levels ``low <= sigma < high``; for language models ``"prefill"`` or ``"decode"``.

    Raises:
        WhereError: where a value is none of these, or (from ``select``) where nothing matches.
    """

    layers: Layers = "all"
    heads: Heads = "all"
    steps: Steps = "all"

    def __post_init__(self) -> None:
        for layer in _listed(self.layers):
            if not (_is_int(layer) or isinstance(layer, (str, slice))):
                raise WhereError(f"layers={layer!r} is not a layer: give ints, slices, site names, globs or 'all'.")
        if self.layers != "all" and not isinstance(self.layers, (int, str, slice)) and not _listed(self.layers):
            raise WhereError("layers=[] selects no layer: give at least one layer or 'all'.")
        for heads in self.heads.values() if isinstance(self.heads, Mapping) else [self.heads]:
            _check_heads(heads)
        if isinstance(self.heads, Mapping) and not self.heads:
            raise WhereError("heads={} selects no head: give at least one layer with its heads, or 'all'.")
        _check_steps(self.steps)

    # ---- layers and heads ------------------------------------------------------------------------------------------
    def select(self, sites: Sequence[Site], kinds: Sequence[Kind]) -> Selection:
        """The chosen heads of every chosen site.

        Args:
            sites: all sites of the model.
            kinds: what the processor acts on, in order of preference: in a layer with sites of several of these kinds,
                ints and ``"all"`` choose the first kind.

        Raises:
            WhereError: an unknown layer or head, or nothing selected; says what exists.
        """
        usable = [s for s in sites if s.kind in kinds]
        if not usable:
            raise WhereError(f"The model has no {_either(kinds)} attention; its sites: {describe(sites)}.")
        layers: list[Any] = _listed(self.layers)
        if isinstance(self.heads, Mapping) and self.layers == "all":
            layers = list(self.heads)
        chosen = {site for layer in layers for site in _match(layer, sites, usable, kinds)}
        selection = {site: self._heads_at(site, sites) for site in sorted(chosen, key=lambda s: s.index)}
        selection = {site: heads for site, heads in selection.items() if heads}
        if not selection:
            raise WhereError(f"{self} selects no head. There are: {describe(usable)}.")
        return selection

    def _heads_at(self, site: Site, sites: Sequence[Site]) -> tuple[int, ...]:
        heads: Any = self.heads
        if isinstance(heads, Mapping):
            total = 1 + max(s.layer for s in sites)
            found = [h for key, h in heads.items() if _names(key, site, total)]
            if not found:
                return ()
            heads = "all" if "all" in found else [h for part in found for h in _listed(part)]
        if heads == "all":
            return tuple(range(site.heads))
        wrong = [h for h in _listed(heads) if not 0 <= h < site.heads]
        if wrong:
            raise WhereError(f"Head {wrong[0]} does not exist in {site.name!r}: its heads are 0 to {site.heads - 1}.")
        return tuple(sorted(set(_listed(heads))))

    # ---- steps -----------------------------------------------------------------------------------------------------
    def active(self, step: int, total: int, sigma: float | None = None, phase: Phase = "denoise") -> bool:
        """Whether the selection holds at position ``step`` of a schedule of ``total`` positions (or in a phase)."""
        steps = self.steps
        if steps == "all":
            return True
        if isinstance(steps, str):
            return steps == phase
        if isinstance(steps, Mapping):
            low, high = steps["sigma"]
            return sigma is not None and low <= sigma < high
        if isinstance(steps, slice):
            return step in range(*steps.indices(total))
        values = _listed(steps)
        if _is_fraction(values):
            return values[0] * total - 1e-9 <= step < values[1] * total - 1e-9
        return step in [v + total if v < 0 else v for v in values]


def _either(kinds: Sequence[Kind]) -> str:
    """Kinds for a message; "unknown" is no kind that anybody asks for."""
    return " or ".join(kind for kind in kinds if kind != "unknown")


def _check_heads(heads: Any) -> None:
    if heads == "all":
        return
    values = _listed(heads)
    if not values:
        raise WhereError("heads=[] selects no head: give at least one head or 'all'.")
    for head in values:
        if not _is_int(head) or head < 0:
            raise WhereError(f"heads={head!r} is not a head: give ints from 0, a mapping of layers to heads, or 'all'.")


def _is_fraction(values: Sequence[Any]) -> bool:
    return len(values) == 2 and any(isinstance(v, float) for v in values)


def _check_steps(steps: Any) -> None:
    allowed = "give 'all', (start, stop) as fractions, ints, a slice, {'sigma': (low, high)}, 'prefill' or 'decode'"
    if isinstance(steps, str):
        if steps not in ("all", "prefill", "decode"):
            raise WhereError(f"steps={steps!r} is not known: {allowed}.")
    elif isinstance(steps, Mapping):
        pair = _listed(steps.get("sigma"))
        if set(steps) != {"sigma"} or len(pair) != 2 or not all(_number(v) for v in pair) or not pair[0] < pair[1]:
            raise WhereError(f"steps={steps!r} is no noise window: give {{'sigma': (low, high)}} with low < high.")
    elif not isinstance(steps, slice):
        values = _listed(steps)
        if _is_fraction(values):
            if not all(_number(v) for v in values) or not 0 <= values[0] < values[1] <= 1:
                raise WhereError(f"steps={steps!r} is no window: give 0 <= start < stop <= 1.")
        elif not values or not all(_is_int(v) for v in values):
            raise WhereError(f"steps={steps!r} is not a choice of steps: {allowed}.")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _names(key: Any, site: Site, total: int) -> bool:
    """Whether a layer key (int or name) means this site."""
    return (
        site.layer == (key + total if key < 0 else key)
        if _is_int(key)
        else key in ("all", site.name) or fnmatchcase(site.name, key)
    )


def _match(layer: Any, sites: Sequence[Site], usable: Sequence[Site], kinds: Sequence[Kind]) -> list[Site]:
    """The sites that one entry of ``layers`` selects."""
    total = 1 + max(s.layer for s in sites)
    if isinstance(layer, str) and layer != "all":
        found = [s for s in usable if s.name == layer or fnmatchcase(s.name, layer)]
        if not found:
            other = [s for s in sites if s.name == layer or fnmatchcase(s.name, layer)]
            why = f"it is {other[0].kind} attention; wanted is {_either(kinds)}" if other else "no site has that name"
            raise WhereError(f"Layer {layer!r} cannot be selected: {why}. There are: {describe(usable)}.")
        return found
    if layer == "all":
        wanted: Iterable[int] = range(total)
    elif isinstance(layer, slice):
        wanted = range(*layer.indices(total))
    else:
        if not -total <= layer < total:
            raise WhereError(
                f"Layer {layer} does not exist: layers are 0 to {total - 1}. There are: {describe(usable)}."
            )
        wanted = [layer % total]
    found = []
    for number in wanted:
        there = [s for s in usable if s.layer == number]
        best = min((kinds.index(s.kind) for s in there), default=None)
        found += [s for s in there if kinds.index(s.kind) == best]
    if not found:
        raise WhereError(f"layers={layer!r} selects no {_either(kinds)} attention. There are: {describe(usable)}.")
    return found


def describe(sites: Sequence[Site], limit: int = 12) -> str:
    """A short list of sites for an error message."""
    shown = [f"{s.layer}: {s.name} ({s.kind}, {s.heads} heads)" for s in sites[:limit]]
    more = f", and {len(sites) - limit} more" if len(sites) > limit else ""
    return ", ".join(shown) + more if shown else "none"
