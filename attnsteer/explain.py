"""``explain``: what steering will do, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .attach import _occupied, refusals, rows_given, sites, why_taken
from .errors import SteeringError
from .fork import stages_before, why_no_fork
from .hosts.worlds import models_of
from .nursing import Moment
from .processor import Processor, parameters
from .scheduler import Plan, make_plan, plans_of, wanted_sites
from .where import Where

if TYPE_CHECKING:
    from .attach import Steering
    from .variants import Variant


@dataclass(frozen=True)
class Part:
    """What one processor selected."""

    processor: str
    parameters: dict[str, Any]
    heads: dict[str, tuple[int, ...]]
    steps: str
    inert: bool


@dataclass(frozen=True)
class Explanation:
    """The dry run of a steering. ``str()`` gives a table, ``to_dict()`` plain values.

    Attributes:
        target: class of the pipeline or model.
        rows: for each row (or for all) the positions in ``parts`` of its processors.
        parts: what each processor selected.
        extra: the forward passes beyond those of the plain model, in words.
        extra_rows: rows of the additional forward in a step where everything is active, for each picture or prompt.
        fork: where the additional forward enters the model, in words; empty where there is none.
        shared: fraction of the stages that the additional forward does not compute again.
        bytes: what is kept: ``edits`` (weights at the sites), and with guidance ``tape`` (stage outputs for the fork)
            and ``loans`` (keys and values that perturbed rows read, see ``attnsteer.lending``); where the size of the
            latter two cannot be told they are missing.
        refused: reasons why this cannot run; empty where it can.
    """

    target: str
    rows: list[list[int]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    extra: str = "none"
    extra_rows: int = 0
    fork: str = ""
    shared: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"Steering {self.target}"]
        for part in self.parts:
            given = ", ".join(f"{k}={v!r}" for k, v in part.parameters.items())
            lines.append(
                f"  {part.processor}({given})" + ("  no effect: the model is left alone" if part.inert else "")
            )
            lines.append(f"    steps  {part.steps}")
            lines += [f"    site   {name}  heads {_ranges(heads)}" for name, heads in part.heads.items()]
        if len(self.rows) > 1:
            lines.append(f"  rows     {self.rows} (positions in the list above)")
        lines.append(f"  extra    {self.extra}")
        lines += [f"  fork     {self.fork}"] if self.fork else []
        lines += [f"  memory   {name}: {size:,} bytes" for name, size in self.bytes.items()]
        lines += [f"  refused  {reason}" for reason in self.refused]
        return "\n".join(lines)


def explain(
    target: Any,
    *processors: Processor,
    variants: Sequence[Variant | Sequence[Processor]] | None = None,
    scheduler: Any = None,
    cfg: tuple[str, ...] | None = None,
    processor: Any = None,
    **shape: int,
) -> Explanation:
    """The dry run of ``attach`` with the same arguments: refusals are collected, not raised.

    Args:
        **shape: for the memory of fork and loans: ``height`` and ``width`` in pixels, ``batch`` (pictures; one for each
            variant if not given) and ``text`` (tokens of the prompt; an upper bound if not given).
    """
    _check(shape)
    name = type(target).__name__
    refused: list[str] = []
    plans: dict[int, Plan] = {}
    try:
        given = rows_given(processors, variants)
        there, models = sites(target), models_of(target)
    except SteeringError as error:
        return Explanation(name, refused=error.reasons)
    for one in (p for row in given for p in row):
        try:
            plans[id(one)] = make_plan(one, there)
        except SteeringError as error:
            refused += error.reasons
    rows = tuple(tuple(plans[id(p)] for p in row if id(p) in plans) for row in given)
    refused += why_taken(_occupied(target, models, scheduler))
    refused += refusals(target, models, rows, scheduler, cfg, processor)
    return _explanation(target, rows, refused, shape)


def _check(shape: Mapping[str, int]) -> None:
    unknown = sorted(set(shape) - {"height", "width", "batch", "text"})
    if unknown:
        raise TypeError(f"explain takes the sizes height, width, batch and text, not {unknown[0]}.")


def explain_attached(steering: Steering, **shape: int) -> Explanation:
    """The explanation of what is attached."""
    _check(shape)
    return _explanation(steering.target, steering.session.rows, [], shape)


def _explanation(target: Any, rows: Any, refused: list[str], shape: Mapping[str, int]) -> Explanation:
    plans = plans_of(rows)
    numbers = {id(plan): i for i, plan in enumerate(plans)}
    facts: dict[str, Any] = {
        "rows": [[numbers[id(plan)] for plan in row] for row in rows],
        "parts": [_part(plan) for plan in plans],
        "bytes": {"edits": sum(4 * site.heads for row in rows for plan in row for site in plan.edits)},
        "refused": refused,
    }
    live = tuple(tuple(plan for plan in row if not plan.processor.inert) for row in rows)
    extra = _further_passes(live)
    if any(plan.guides for row in live for plan in row):
        guided = _guidance_facts(target, live, {"batch": len(rows), **shape})
        extra.append((guided.pop("extra"), guided.pop("extra_rows")))
        facts |= guided | {"bytes": facts["bytes"] | guided["bytes"]}
    if extra:
        facts |= {"extra": "; ".join(what for what, _ in extra), "extra_rows": sum(count for _, count in extra)}
    return Explanation(type(target).__name__, **facts)


def _further_passes(live: Any) -> list[tuple[str, int]]:
    """What runs beside the plain model, but for guidance: in words, and how many rows for each picture or prompt."""
    plans, extra = plans_of(live), []
    if any("image_free" in plan.processor.lanes for plan in plans):
        extra.append(("one pass of the prompt with and without its image before each generation (2 rows a prompt)", 2))
    if any(plan.survey is not None for plan in plans):
        extra.append(("one plain pass of the prompt before each generation (1 row a prompt)", 1))
    second = {plan.processor.contrast() for plan in plans} - {None}
    if second:
        often = f", {len(second)} times" if len(second) > 1 else ""
        what = f"for every token a second forward{often}, of the rows that contrast, with a cache of its own"
        extra.append((what, len(second)))
    fiftieths = [i for i in range(50) if any(plan.processor.plain_first(Moment(i, 50)) for plan in plans)]
    if fiftieths:
        often = f"in about {2 * len(fiftieths)} % of the steps"
        extra.append((f"{often} one more, plain forward of all rows (both branches of guidance)", 2))
    nursing = [plan for plan in plans if plan.nursing is not None]
    if nursing:
        last = wanted_sites([nursing])[-1].name
        what = f"one more forward of the conditional rows with gradient, up to {last}, and its backward"
        extra.append((f"in each step of an update {what}; more where the update is repeated", 1))
    return extra


def _part(plan: Plan) -> Part:
    given = {k: _shown(v) for k, v in parameters(plan.processor).items() if k != "where"}
    heads = {site.name: chosen for site, chosen in plan.selection.items()}
    return Part(type(plan.processor).__name__, given, heads, _steps(plan.where), plan.processor.inert)


def _shown(value: Any) -> Any:
    """A parameter as it is, a tensor by its shape."""
    return f"tensor of shape {tuple(value.shape)}" if hasattr(value, "shape") else value


def _steps(where: Where) -> str:
    steps = where.steps
    if isinstance(steps, tuple) and len(steps) == 2 and any(isinstance(s, float) for s in steps):
        return f"from {100 * steps[0]:g} % to {100 * steps[1]:g} % of the schedule"
    if isinstance(steps, Mapping):
        return f"noise levels from {steps['sigma'][0]:g} to {steps['sigma'][1]:g}"
    return str(steps)


def _guidance_facts(target: Any, live: Any, shape: Mapping[str, int]) -> dict[str, Any]:
    """The perturbed lane: how many rows, from which stage on, and what fork and loans keep in memory."""
    from .hosts import denoisers, estimate
    from .hosts.base import is_compiled, unwrap

    model, scale = models_of(target)[0], getattr(target, "vae_scale_factor", None)
    family = denoisers.family_of(model)
    guiding = tuple(tuple(plan for plan in row if plan.guides) for row in live)
    lanes = max(len(row) for row in guiding)
    first = wanted_sites(guiding)[0]
    facts: dict[str, Any] = {
        "extra": f"in each guided step one more forward of the conditional rows ({lanes} for each picture)",
        "extra_rows": lanes,
        "bytes": {},
    }
    if family is None:
        return facts | {"fork": "nothing is shared: the family has no descriptor"}
    stages = denoisers.stages(model, family)
    lent = {site for plan in plans_of(live) if plan.processor.reads_rows for site in plan.selection}
    size = estimate.loan_bytes(unwrap(model), family, sorted(lent, key=lambda s: s.index), scale, shape)
    if lent and size is not None:
        facts["bytes"]["loans"] = size
    why = why_no_fork(stages, {}, (), is_compiled(model))
    before = [] if why else stages_before(stages, [site.name for site in wanted_sites(guiding)])
    if before:
        facts["fork"] = f"enters before {stages[len(before)][0]}: {len(before)} of {len(stages)} stages are shared"
        facts["shared"] = len(before) / len(stages)
        size = estimate.tape_bytes(unwrap(model), family, before, first, scale, shape)
        if size is not None:
            facts["bytes"]["tape"] = size
    else:
        facts["fork"] = f"nothing is shared: {why or 'the first stage is perturbed'}"
    return facts


def _ranges(heads: Sequence[int]) -> str:
    """``0-3, 7``."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][-1] == head - 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
