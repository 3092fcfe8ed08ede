"""Lending: the rows of a second forward read rows of the first one.

Guidance compares a conditional prediction with one that differs from it in the perturbed heads *alone*. So a perturbed
row of a method that shares attention looks at the keys that its conditional row looks at: those of the *conditional*
rows of its story, from the same site and step, beside its own (perturbed) ones::

    perturbed row i:  softmax over [ own keys, perturbed | keys of conditional row j, for every j that row i reads ]

Were its sources the perturbed rows of the story, each row's guidance would also push away from what the perturbation
did to the other pictures, and a row could not be guided alone. What is asked for (masks, draws, weights) is what the
conditional row was asked for: the processor answers to the shape of the conditional call once more.

Cost: keys and values of the sharing sites live until the scheduler steps, ``2 B Hkv Nk D`` numbers each; ``explain``
tells how many bytes that is.
Limit: not tested under ``torch.compile``; perturbed and conditional batches differ in size, and graphs for any size
break where sources are read, so the number of graphs is not bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from .binding import Binding
from .edits import ClassMask, Edit, Mix, Reaction, Replace, RowKeys, Segments, Sources, map_tensors
from .reacting import Reacts
from .scheduler import Plan, plans_of
from .site import AttentionCall, Site, expand_rows


class Loan:
    """Keys and values of one kernel call of the first forward; filled when that call is made."""

    def __init__(self, binding: Binding):
        self.spans, self.lanes, self.step = binding.spans, binding.lanes, binding.step
        self.tensors: dict[str, Tensor] = {}

    def note(self, call: AttentionCall) -> None:
        """Keep what the rows of a call lend."""
        self.tensors.update(k=call.k, v=call.v)
        if call.mask is not None:
            self.tensors["mask"] = call.mask

    def call(self, mine: AttentionCall) -> AttentionCall:
        """The call of the first forward, as far as other rows can see it: its queries are those of nobody."""
        k, v = self.tensors["k"], self.tensors["v"]
        return replace(
            mine,
            q=mine.q[:1].expand(k.shape[0], -1, -1, -1),
            k=k,
            v=v,
            visible=self.tensors.get("mask"),
            spans=self.spans,
            lanes=self.lanes,
            step=self.step,
            lent=None,
        )


@contextmanager
def lending(bindings: Mapping[Site, Binding], plain: Sequence[Sequence[Plan]]) -> Iterator[dict[Site, Loan]]:
    """Inside, every site at which rows read other rows keeps what it lends."""
    plans = [plan for plan in plans_of(plain) if plan.processor.reads_rows]
    lenders = {site: binding for site, binding in bindings.items() if any(site in p.selection for p in plans)}
    loans = {site: Loan(binding) for site, binding in lenders.items()}
    for site, binding in lenders.items():
        binding.loan = loans[site]
    try:
        yield loans
    finally:
        for binding in lenders.values():
            binding.loan = None


class Borrower:
    """The reaction of a method that reads rows, for rows of a second forward.

    Args:
        inner: who was asked in the first forward.
        loan: what that forward noted at this site.
        rows: for each row of the second forward its row of the first one; ``index``: the same on the device.
    """

    def __init__(self, inner: Reacts, loan: Loan, rows: Sequence[int], index: Tensor):
        self.inner, self.loan, self.rows, self.index = inner, loan, tuple(rows), index

    def react(self, call: AttentionCall) -> Reaction:
        lender = self.loan.call(call)
        edit = self.inner.react(lender)
        if edit is None:
            return None
        call.lent = lender
        edits, batch = edit if isinstance(edit, tuple) else (edit,), lender.k.shape[0]
        return tuple(of_rows(one, self.rows, self.index, batch) for one in edits)


def of_rows(edit: Edit, rows: tuple[int, ...], index: Tensor, batch: int) -> Edit:
    """The part of an edit of ``batch`` rows that concerns some of them; sources keep naming rows of that batch."""

    def pick(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else expand_rows(x, batch).index_select(0, index.to(x.device))

    def maybe(x: Tensor | None) -> Tensor | None:
        return None if x is None else pick(x)

    def read(source: Sources) -> Sources:
        return tuple(source[row] for row in rows)

    edit = replace(map_tensors(edit, pick), held=None)  # these are other rows
    if isinstance(edit, Segments):
        bias, keys, queries, positions = map(maybe, (edit.bias, edit.keys, edit.queries, edit.positions))
        return Segments(read(edit.source), edit.weight, bias, keys, queries, positions)
    if isinstance(edit, Replace):
        return replace(edit, query=pick(edit.query))
    if isinstance(edit, ClassMask):
        return replace(edit, classes=edit.classes.of_rows(rows, batch))
    if isinstance(edit, Mix) and isinstance(edit.target, RowKeys):
        return replace(edit, target=RowKeys(read(edit.target.source), pick(edit.target.share)))
    return edit
