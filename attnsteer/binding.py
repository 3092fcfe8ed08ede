"""What an attention module carries while it is steered, and the one function that every kernel call passes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from .attend import attend
from .edits import Edit
from .site import AttentionCall, Kernel, Phase, Site, Spans

if TYPE_CHECKING:
    from .lending import Loan
    from .reacting import Reacts

ATTRIBUTE = "_steer"
"""Name of the attribute on an attention module that holds its ``Binding``; absent or None leaves the module alone."""

Reactor: TypeAlias = "tuple[Reacts, dict[str, Any]]"
"""Who is asked in every kernel call, and the state that it keeps at this site."""


class Binding:
    """What to do at one site in the next forward passes.

    A plain object on purpose: a ``torch.nn.Module`` would enter the state dict. Compiled code reads ``edits``,
    ``reactors``, ``spans``, ``lanes`` and ``phase``; what differs by layer, row or step is a tensor there.
    """

    __slots__ = (
        "__weakref__",
        "edits",
        "hit",
        "lanes",
        "loan",
        "main_call",
        "phase",
        "predicts",
        "reactors",
        "residual",
        "site",
        "spans",
        "step",
    )

    def __init__(
        self,
        site: Site,
        edits: tuple[Edit, ...] = (),
        reactors: tuple[Reactor, ...] = (),
        spans: Spans | None = None,
        lanes: Mapping[str, slice] | None = None,
        phase: Phase = "denoise",
        main_call: int = 0,
    ):
        self.site = site
        self.edits = edits
        self.reactors = reactors
        self.spans = spans
        self.lanes: Mapping[str, slice] = lanes or {}
        self.phase: Phase = phase
        self.main_call = main_call  # which kernel call of the module is the text or joint one
        self.step: Tensor | None = None  # position in the schedule
        self.predicts = 1  # how many of the last queries predict new tokens
        self.residual: Tensor | None = None  # what entered the layer, where a processor asks for it
        self.loan: Loan | None = None  # keeps what rows of this forward lend to another one
        self.hit = False

    def scratch(self) -> Binding:
        """The same binding, whose reactors start from today's states and keep nothing."""
        reactors = tuple((reacts, dict(state)) for reacts, state in self.reactors)
        copy = Binding(self.site, self.edits, reactors, self.spans, self.lanes, self.phase, self.main_call)
        copy.step = self.step
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a steered model is not steered."""


def intervene(
    binding: Binding,
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | Callable[[], Tensor | None] | None,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """One kernel call at a steered site: ask the processors, lower their edits, return ``(B, H, Nq, Dv)``.

    ``kernel(q, k, v, mask=...)`` is the user's own backend; with nothing to do it is called as the library would.
    """
    binding.hit = True
    call = AttentionCall(
        binding.site, kernel, q, k, v, visible, scale, is_causal, binding.spans, binding.phase, binding.lanes
    )
    edits = binding.edits
    call.step, call.predicts = binding.step, binding.predicts
    call.residual, binding.residual = binding.residual, None
    if binding.loan is not None:
        binding.loan.note(call)
    for processor, state in binding.reactors:
        call.state = state
        edit = processor.react(call)
        if edit is not None:
            edits = (*edits, *edit) if isinstance(edit, tuple) else (*edits, edit)
    return attend(call, edits) if edits else call.output
