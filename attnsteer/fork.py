"""The fork: perturbed rows share everything before their first perturbed site with the conditional rows.

The normal forward runs with a ``Tape`` that notes the outputs of the top-level stages before that site. A second,
shorter forward of the perturbed rows gets these outputs (its rows of them) instead of computing them. Rows whose first
perturbed sites lie far apart fork in several places, each group in a forward of its own (``forks_of``). Model code
between the stages runs again, so nothing needs to know it. Where a recording cannot be trusted, ``Tape.refusal`` says
why and the second forward computes everything: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .hosts.base import Call, intercept, take_rows
from .scheduler import Plan, Rows

Stage = tuple[str, torch.nn.Module]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class Tape:
    """Outputs of the stages before the forks, noted in one forward and replayed in the next.

    Args:
        stages: the stages of the model in execution order.
        chain: a stage needs the previous one only, so that the last output before each fork is enough.
        forks: for each fork how many stages come before it.
    """

    def __init__(self, stages: Sequence[Stage], chain: bool, forks: Collection[int]):
        self.stages = list(stages[: max(forks)])
        self.chain = chain
        self.forks = frozenset(forks)
        self._outputs: list[Any] = []
        self._versions: list[list[int]] = []
        self._called: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the output of every stage that runs inside the block."""

        def note(name: str) -> Callable[..., Any]:
            def around(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = call(*args, **kwargs)
                if self.chain and self._called and len(self._called) not in self.forks:
                    self._outputs[-1], self._versions[-1] = None, []
                kept = _kept(output)
                self._outputs.append(kept)
                self._versions.append([t._version for t in _tensors(kept) if not t.is_inference()])
                self._called.append(name)
                return output

            return around

        with self._intercepting(self.stages, note):
            yield

    @contextmanager
    def replaying(self, rows: torch.Tensor, batch: int, fork: int) -> Iterator[None]:
        """Give the first ``fork`` stages inside the block their noted outputs, of the chosen rows."""
        kept = self._outputs[fork - 1 : fork] if self.chain else self._outputs[:fork]
        chosen = [take_rows(output, rows, batch) for output in kept]
        by_name = dict(zip(self._called[:fork], chosen * fork if self.chain else chosen, strict=True))

        def give(name: str) -> Callable[..., Any]:
            return lambda call, args, kwargs: by_name[name]

        with self._intercepting(self.stages[:fork], give):
            yield

    @contextmanager
    def _intercepting(self, stages: Sequence[Stage], around: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        restores = []
        try:
            for name, module in stages:
                restores.append(intercept(module, around(name)))
            yield
        finally:
            for restore in reversed(restores):
                restore()

    def covers(self, site: str, fork: int) -> bool:
        """Whether a site lies in one of the first ``fork`` stages, which are replayed rather than run."""
        return any(site.startswith(f"{name}.") for name, _ in self.stages[:fork])

    @property
    def refusal(self) -> str | None:
        """Why the recording must not be replayed; None where it may."""
        if self._called != [name for name, _ in self.stages]:
            return "its stages did not run once each in the known order"
        for output, versions in zip(self._outputs, self._versions, strict=True):
            if [t._version for t in _tensors(output) if not t.is_inference()] != versions:
                return "the model changed the output of a stage in place"
        return None


def _kept(output: Any) -> Any:
    """Outputs made in inference mode carry no version counter: keep a copy that nobody can write to."""
    if isinstance(output, torch.Tensor):
        return output.clone() if output.is_inference() else output
    if isinstance(output, (tuple, list)):
        return type(output)(_kept(item) for item in output)
    return output


def stages_before(stages: Sequence[Stage], site_names: Sequence[str]) -> list[Stage]:
    """The stages that run before the first of these sites."""
    before: list[Stage] = []
    for name, module in stages:
        if any(site == name or site.startswith(name + ".") for site in site_names):
            return before
        before.append((name, module))
    return []


def forks_of(rows: Rows, stages: Sequence[Stage]) -> dict[Plan, int]:
    """Where the perturbed rows of each guiding plan fork, as the number of stages that they do not compute again.

    One more forward of some rows takes about as long as its rows and one more would: stages cost time beside that of
    their rows. So rows leave for a forward of their own, which enters later, where that saves more than it costs:
    ``rows x stages between the two forks > stages behind the later one``. Others fork with their earlier neighbours.
    Each guiding plan of a variant counts as one row, however many rows of the batch it stands for: of large batches
    fewer groups are made than would pay. What is computed is the same.

    Args:
        rows: the guiding plans of every row.
        stages: the stages of the model in execution order.
    """
    lanes = [plan for row in rows for plan in row]
    shared = [len(stages_before(stages, [site.name for site in plan.selection])) for plan in lanes]
    places = [min(shared)]
    for place in sorted(set(shared)):
        spared = sum(own >= place for own in shared) * (place - places[-1])
        if spared > len(stages) - place:
            places.append(place)
    return {plan: max(p for p in places if p <= own) for plan, own in zip(lanes, shared, strict=True)}


def why_no_fork(stages: Sequence[Stage], inputs: dict[str, Any], no_fork: Sequence[str], compiled: bool) -> str | None:
    """Why a forward cannot be forked whatever it does; None where it can."""
    if compiled:
        return "the denoiser is compiled as a whole"
    given = [name for name in no_fork if inputs.get(name) is not None]
    if given:
        return f"{given[0]} acts between the stages"
    if any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for _, top in stages for m in top.modules()):
        return "offloading or caching hooks sit on the stages"
    return None
