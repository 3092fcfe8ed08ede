"""From processors and variants to rows: who wants what, at which site, in which row of which forward pass.

A *row* is one prompt of the batch. Each row has its own list of processors (its variant); a single list serves all
rows. What all rows want at a site is merged into one set of edits with per-row weights, so that any mixture of
strengths, heads and layers takes one kernel call (``edits.stack_rows``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .attend import conflicts
from .edits import BlurredQuery, Edit, Mix, Segments, map_tensors, stack_rows
from .errors import SteeringError, WhereError
from .nursing import Nursing
from .processor import Processor, parameters
from .site import Site
from .where import Selection, Where

Rows = tuple[tuple["Plan", ...], ...]
"""For each row the plans that act on it; one entry stands for all rows."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One processor on one model: what it selected and what it wants there.

    ``edits`` holds the data-independent edits; ``states`` one dict per site for processors that react to data;
    ``nursing`` the loss that the latent follows. ``survey`` reads the prompt before a generation and leaves what it
    finds in ``shared``, one dict for all sites.
    """

    processor: Processor
    where: Where
    selection: Selection
    edits: Mapping[Site, Edit]
    states: dict[Site, dict[str, Any]] = field(default_factory=dict)
    nursing: Nursing | None = None
    survey: Plan | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def guides(self) -> bool:
        """True where the processor needs a second prediction of the conditional rows."""
        return "perturbed" in self.processor.lanes

    @property
    def reacts(self) -> bool:
        return type(self.processor).react is not Processor.react

    def active(self, step: int, total: int, sigma: float | None) -> bool:
        return not self.processor.inert and self.where.active(step, total, sigma)


def make_plan(processor: Processor, sites: Sequence[Site]) -> Plan:
    """Select, ask and check one processor.

    Raises:
        SteeringError: all reasons why the processor cannot act on the selected sites.
    """
    if not processor.token_agnostic and any(site.kind == "unknown" for site in sites):
        raise SteeringError(
            f"This model family has no descriptor, so attnsteer does not know which token is what; "
            f"{type(processor).__name__} with these parameters needs to. Edits that need no token positions work."
        )
    kinds = (*processor.kinds, "unknown") if processor.token_agnostic else processor.kinds
    where = processor.where_for(sites)
    selection = where.select(sites, kinds)
    reasons = list(dict.fromkeys(reason for site in selection for reason in processor.refusals(site)))
    if reasons:
        raise SteeringError(reasons)
    wanted = {site: processor.plan(site, heads) for site, heads in selection.items()}
    edits = {site: edit for site, edit in wanted.items() if edit is not None}
    reader = processor.survey(sites)
    survey = None if reader is None else make_plan(reader, sites)
    return Plan(processor, where, selection, edits, {site: {} for site in selection}, processor.nursing(), survey)


_SHARED = Segments((), torch.ones(1, 1))
"""Stands for what methods that read other rows will ask for."""


def plans_of(rows: Sequence[Sequence[Plan]]) -> list[Plan]:
    """Every plan once, in the order of rows."""
    return list({id(plan): plan for row in rows for plan in row}.values())


def together(rows: Sequence[Sequence[Plan]]) -> list[tuple[Plan, ...]]:
    """The plans of all rows in the order of rows, those for which one ``react`` can answer in one tuple: they differ in
    their layers and heads, and in numbers that their method takes row by row. Plans that meet in a row stay apart."""
    seats: dict[int, set[int]] = {}
    for r, row in enumerate(rows):
        for plan in row:
            seats.setdefault(id(plan), set()).add(r)
    groups: list[tuple[list[Plan], set[int]]] = []
    for plan in plans_of(rows):
        mine = seats[id(plan)]
        fitting = (group for group in groups if alike(group[0][0], plan) and mine.isdisjoint(group[1]))
        members, taken = next(fitting, ([], set()))
        if not members:
            groups.append((members, taken))
        members.append(plan)
        taken |= mine
    return [tuple(members) for members, _ in groups]


def alike(one: Plan, two: Plan) -> bool:
    """Whether one ``react`` can answer for both, where they do not meet in a row."""
    free = one.processor.per_row
    if not free or type(one.processor) is not type(two.processor) or one.where.steps != two.where.steps:
        return False
    mine, other = parameters(one.processor), parameters(two.processor)
    numbers = all((mine[name] is None) == (other[name] is None) for name in free if name in mine)
    return numbers and all(_same(mine[name], other[name]) for name in mine if name not in (*free, "where"))


def _same(one: Any, two: Any) -> bool:
    """Values whose comparison is no bool, as that of tensors, count as different unless they are one object."""
    found = one is two or one == two
    return found if isinstance(found, bool) else False


def row_conflicts(rows: Rows) -> list[str]:
    """Pairs of edits of one row that do not compose at a site where they meet."""
    found = []
    for row in rows:
        for site in wanted_sites((row,)):
            shares = site.kind != "cross" and any(p.processor.reads_rows and site in p.selection for p in row)
            kinds = [edit for p in row if site in p.selection and not p.processor.inert for edit in p.processor.samples]
            edits = [plan.edits[site] for plan in row if site in plan.edits]
            found += conflicts(edits + kinds + [_SHARED] * shares)
    return list(dict.fromkeys(found))


def check_steps(rows: Rows, total: int) -> None:
    """Refuse steps that a schedule does not have: they would make a processor a silent no-op.

    Raises:
        WhereError: a processor that would act in none of the ``total`` steps.
    """
    for plan in plans_of(rows):
        steps = plan.where.steps
        if not isinstance(steps, Mapping) and not any(plan.where.active(i, total) for i in range(total)):
            raise WhereError(
                f"steps={steps!r} of {type(plan.processor).__name__} selects none of the steps of this "
                f"schedule: its positions are 0 to {total - 1}."
            )


def row_of(rows: Rows, index: int, total: int) -> tuple[Plan, ...]:
    """The plans of row ``index`` of ``total``; several pictures of one prompt are contiguous.

    Raises:
        SteeringError: where the rows cannot be dealt to the variants.
    """
    if total % len(rows):
        raise SteeringError(
            f"{len(rows)} variants cannot be dealt to a batch of {total} rows: give one prompt per variant."
        )
    return rows[index // (total // len(rows))]


def merge_edits(rows: Sequence[Sequence[Plan]], site: Site, device: torch.device) -> tuple[Edit, ...]:
    """The edits of all rows at a site, with tensors ``(R, ...)`` on the device that computes."""
    asked = [[plan.edits[site] for plan in row if site in plan.edits] for row in rows]
    return tuple(map_tensors(edit, lambda tensor: tensor.to(device)) for edit in stack_rows(asked))


def wanted_sites(rows: Sequence[Sequence[Plan]]) -> list[Site]:
    """Every site at which some row wants something, in execution order."""
    return sorted({site for row in rows for plan in row for site in plan.selection}, key=lambda s: s.index)


def needs_grid(edits: Sequence[Edit]) -> bool:
    """Whether an edit must know how the image tokens lie in the plane."""
    return any(isinstance(edit, Mix) and isinstance(edit.target, BlurredQuery) for edit in edits)
