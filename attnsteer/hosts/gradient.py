"""The gradient pass: what the attention maps of words say about some pictures, and how that changes with the latent.

The conditional rows run once more with gradient on the latent alone: weights frozen, compiled parts eager, stopped at
the last site that is read. The edits in force act as in the ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..binding import Binding
from ..capture import token_columns
from ..errors import NotReachedError, SteeringError
from ..nursing import LevelMaps, Moment, Slope, TokenMaps
from ..scheduler import Plan
from ..site import AttentionCall, Site
from . import denoisers
from .base import Call, copy_nest, unwrap
from .carry import steering
from .denoisers import Family
from .prompts import PromptWatch, Reading, readings

BindingsOf: TypeAlias = Callable[[torch.nn.Module, dict[str, Any], int, Sequence[int]], dict[Site, Binding]]
"""``(model, inputs, samples, pictures) -> {site: binding}`` of the edits in force on their conditional rows."""


class _Enough(Exception):  # noqa: N818 - no error: everything that was wanted has been read
    """The last site was read: nothing behind it is needed."""


class Reader:
    """Collects the columns of tokens at every site that it is asked at, and ends the forward at the last one.

    Args:
        columns: ``(R, m)`` positions among the text keys.
        weights: ``(R, H)`` for each site, 1 for the heads that count.
        last: where enough is read.
    """

    def __init__(self, columns: Tensor, weights: Mapping[Site, Tensor], last: Site):
        self.columns, self.weights, self.last = columns, weights, last

    def react(self, call: AttentionCall) -> None:
        found = token_columns(call, self.columns)  # (R, H, n, m)
        weight = self.weights[call.site].to(found.dtype)
        total = torch.einsum("rhnm,rh->rmn", found, weight)
        assert call.spans is not None
        if call.spans.grid is None or call.spans.grid[0] * call.spans.grid[1] * call.spans.grid[2] != total.shape[2]:
            raise SteeringError(f"The picture of {call.site.name!r} has no known grid: latent updates need one.")
        total = total.unflatten(2, call.spans.grid[1:])  # (R, m, h, w)
        so_far, number = call.state.get("maps", {}).get(call.site.level, (0.0, 0.0))
        more = {call.site.level: (so_far + total, number + weight.sum(dim=1))}
        call.state["maps"] = {**call.state.get("maps", {}), **more}
        call.state["sites"] = call.state.get("sites", 0) + 1
        if call.site == self.last:
            raise _Enough


@dataclass(frozen=True, eq=False)
class Forward:
    """A denoiser's call: its model, the way to run it, its inputs, and where the conditional rows are."""

    model: torch.nn.Module
    family: Family
    call: Call
    inputs: dict[str, Any]
    samples: int
    first: int

    @property
    def sample(self) -> Tensor:
        return denoisers.sample_of(self.family, self.inputs)


class GradientPass:
    """``evaluate`` of the descent: maps and gradients of some pictures at their present latents.

    Args:
        plans: the pictures and who moves them; what ``descend`` counts as rows are these in order.
        memory: what each loss remembered in the step before.
    """

    def __init__(
        self,
        forward: Forward,
        bindings: BindingsOf,
        watch: PromptWatch | None,
        moment: Moment,
        plans: Mapping[int, Plan],
        memory: Mapping[tuple[int, int], Any],
    ):
        self.forward, self._bindings, self._watch = forward, bindings, watch
        self.moment, self.plans, self._memory = moment, plans, memory
        self.pictures = list(plans)
        self.count = 0
        self.last: Tensor = torch.empty(0)
        """Gradients of all pictures, each from its last pass."""
        self.readings = [self._reading(picture) for picture in self.pictures]

    def _reading(self, picture: int) -> list[Reading]:
        plan, forward = self.plans[picture], self.forward
        assert plan.nursing is not None
        keys = forward.inputs["encoder_hidden_states"].shape[1]
        padding = plan.nursing.padding and next(iter(plan.selection)).kind == "cross"
        where = (picture, forward.samples)
        return readings(self._watch, forward.family.name, where, plan.nursing.groups, keys, padding)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, gradients flow to the latent alone, and what the user compiled runs eagerly."""
        weights = [p for p in unwrap(self.forward.model).parameters() if p.requires_grad]
        with torch.inference_mode(False), torch.enable_grad(), _eager():
            for weight in weights:
                weight.requires_grad_(False)
            try:
                yield
            finally:
                for weight in weights:
                    weight.requires_grad_(True)

    def __call__(self, latent: Tensor, rows: Sequence[int]) -> tuple[list[Slope], Tensor]:
        """See ``attnsteer.nursing.Evaluate``; ``rows`` count the nursed pictures."""
        z = latent.detach().requires_grad_(True)
        state = self._read(z, rows)
        slopes = [self._slope(state, place, row) for place, row in enumerate(rows)]
        total = torch.stack([slope.loss for slope in slopes]).sum()
        gradient = torch.autograd.grad(total, z)[0] if total.requires_grad else torch.zeros_like(z)
        self.last = gradient if len(rows) == len(self.pictures) else self._merged(gradient, rows)
        self.count += 1
        return [slope._replace(loss=slope.loss.detach()) for slope in slopes], gradient

    def _merged(self, gradient: Tensor, rows: Sequence[int]) -> Tensor:
        return self.last.index_copy(0, torch.tensor(rows, device=gradient.device), gradient)

    def _slope(self, state: Mapping[str, Any], place: int, row: int) -> Slope:
        """The loss of one picture; ``place`` is its row of the maps."""
        plan, start, views = self.plans[self.pictures[row]], 0, []
        assert plan.nursing is not None
        for reading in self.readings[row]:
            span = slice(start, start + len(reading.columns))
            start = span.stop
            levels = {
                level: LevelMaps(total[place, span] / number[place], int(number[place]))
                for level, (total, number) in state["maps"].items()
                if int(number[place]) > 0
            }
            views.append(TokenMaps(levels, reading.groups, reading.rest))
        return plan.nursing.loss(views, self._memory.get((id(plan), self.pictures[row])), self.moment)

    def _read(self, z: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """One forward of these rows up to the last site that is read: ``maps`` has ``(sum, number)`` by level."""
        model, family = self.forward.model, self.forward.family
        pictures = [self.pictures[row] for row in rows]
        chosen = torch.tensor(pictures, device=z.device) + self.forward.first
        inputs = denoisers.rows_of(family, self.forward.inputs, chosen, self.forward.sample.shape[0])
        inputs = {**_normal(inputs), family.rows[0]: z}
        bindings = self._bindings(model, inputs, self.forward.samples, pictures)
        sites = sorted({s for picture in pictures for s in self.plans[picture].selection}, key=lambda s: s.index)
        reader, state = self._reader(sites, rows, z.device), {}  # type: tuple[Reader, dict[str, Any]]
        for site in sites:
            layout = denoisers.spans(model, family, inputs, site, True)
            turn = denoisers.main_call(family, site, unwrap(model).get_submodule(site.name))
            binding = bindings.setdefault(site, Binding(site, main_call=turn))
            binding.spans = layout
            binding.reactors = (*binding.reactors, (reader, state))
        try:
            with steering(model, bindings):
                self.forward.call(**copy_nest(inputs))
            _never(sites)
        except _Enough:
            if state["sites"] != len(sites):
                _never(sites)
        return state

    def _reader(self, sites: Sequence[Site], rows: Sequence[int], device: torch.device) -> Reader:
        columns = [[key for reading in self.readings[row] for key in reading.columns] for row in rows]
        width = max(map(len, columns))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in columns], device=device)
        weights = {}
        for site in sites:
            heads = [self.plans[self.pictures[row]].selection.get(site, ()) for row in rows]
            weights[site] = torch.tensor([[float(h in own) for h in range(site.heads)] for own in heads], device=device)
        return Reader(padded, weights, sites[-1])


def _never(sites: Sequence[Site]) -> NoReturn:
    raise NotReachedError(
        f"The gradient pass did not come to all of the {len(sites)} sites that are read "
        f"({', '.join(site.name for site in sites[:4])}): the model skipped some."
    )


@contextmanager
def _eager() -> Iterator[None]:
    """Inside, what ``torch.compile`` made runs as plain Python: a graph can be neither left early nor read from."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _normal(value: Any) -> Any:
    """Tensors of inference mode cannot be part of a graph: copies of them."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_normal(v) for v in value)
    if isinstance(value, dict):
        return {k: _normal(v) for k, v in value.items()}
    return value
