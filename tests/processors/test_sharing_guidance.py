"""Sharing together with guidance: a perturbed row looks at the conditional rows that its conditional row looks at."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.attend import attend
from attnsteer.binding import Binding
from attnsteer.draws import uniform
from attnsteer.lending import Borrower, Loan
from attnsteer.processors import PAG, SEG, ConsistentSelfAttention, IRDiffusion, SharedSelfAttention, SoftPAG
from attnsteer.references import noised_references
from attnsteer.site import AttentionCall, Spans
from attnsteer.stories import box_masks
from tests.calls import make_call
from tests.engine.common import double, explicit_attention, latents, predict, replaced_attention, to_double
from tests.engine.test_fork import Scheduler
from tests.tiny import denoisers, pipelines

EXACT = {"atol": 1e-12, "rtol": 0}
EVERY = Where(layers="all")
GRID = (1, 3, 5)
MASKS = box_masks([(0.0, 0.0, 0.6, 0.7), (0.4, 0.3, 1.0, 1.0)], (30, 50))
SCENE = box_masks([(0.0, 0.0, 0.4, 1.0), (0.6, 0.3, 1.0, 1.0)], (30, 50))
METHODS = [
    SharedSelfAttention(EVERY, frames=3, masks=MASKS),
    SharedSelfAttention(EVERY, frames=3, anchors=None, strength=0.5),
    ConsistentSelfAttention(EVERY, frames=3, skip=(0, 0)),
    IRDiffusion(references=MASKS, scene=SCENE, start_layer=0),
]


# ---- one call --------------------------------------------------------------------------------------------------------
def calls(kind: str) -> tuple[AttentionCall, AttentionCall]:
    """A conditional call of two stories and the same rows perturbed: other tensors, the same masks."""
    n_q, n_k, spans = 22, 22, Spans(slice(0, 15), slice(15, 22), GRID)
    if kind == "self":
        n_q, n_k, spans = 15, 15, Spans(slice(0, 15), slice(0, 0), GRID)
    if kind == "cross":
        n_q, n_k, spans = 15, 7, Spans(slice(0, 0), slice(0, None), GRID)
    options = {"heads": 4, "kv_heads": 4 if kind == "cross" else 2, "n_q": n_q, "n_k": n_k, "mask": "keys_bool"}
    both = make_call(batch=12, kind=kind, spans=spans, **options)
    halves = []
    for rows in (slice(0, 6), slice(6, 12)):
        half = AttentionCall(both.site, both.kernel, both.q[rows], both.k[rows], both.v[rows], both.mask[:6])
        half.kernel, half.spans, half.step = kernel_of(half), spans, torch.tensor(2)
        halves.append(half)
    return halves[0], halves[1]


def kernel_of(call: AttentionCall) -> Any:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = call.mask) -> Tensor:
        weights, values = explicit_attention(q, k, v, mask, call.scale)
        return weights @ values

    return kernel


def borrowed(cond: AttentionCall, perturbed: AttentionCall, method: Any, rows: list[int]) -> Tensor:
    binding = Binding(cond.site, spans=cond.spans)
    binding.step = cond.step
    loan = Loan(binding)
    loan.note(cond)
    some = AttentionCall(
        perturbed.site, perturbed.kernel, perturbed.q[rows], perturbed.k[rows], perturbed.v[rows], perturbed.mask[rows]
    )
    some.kernel, some.spans = kernel_of(some), perturbed.spans
    edits = Borrower(method, loan, rows, torch.tensor(rows)).react(some)
    return attend(some, edits)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(method, kind, id=f"{type(method).__name__}-{kind}")
        for method in METHODS
        for kind in ("self", "joint", "cross")
        if kind != "cross" or isinstance(method, IRDiffusion)
    ],
)
def test_a_perturbed_row_takes_the_place_of_its_conditional_row_among_the_conditional_ones(method, kind):
    """The definition: the conditional batch with one row exchanged for its perturbed self."""
    cond, perturbed = calls(kind)
    rows = [5, 0, 2, 4]
    found = borrowed(cond, perturbed, method, rows)
    changed = 0
    for place, row in enumerate(rows):
        q, k, v = (torch.cat([a[:row], b[row : row + 1], a[row + 1 :]]) for a, b in zip(
            (cond.q, cond.k, cond.v), (perturbed.q, perturbed.k, perturbed.v), strict=True
        ))  # fmt: skip
        mixed = AttentionCall(cond.site, cond.kernel, q, k, v, cond.mask)
        mixed.spans, mixed.step = cond.spans, cond.step
        edits = method.react(mixed)
        expected = attend(mixed, edits if isinstance(edits, tuple) else (edits,))
        torch.testing.assert_close(found[place], expected[row], **EXACT)
        changed += not torch.equal(expected[row], mixed.output[row])
    assert changed == (2 if isinstance(method, IRDiffusion) else 4)


# ---- whole models: both lanes in one batch, explicit maps -----------------------------------------------------------
def lent_tokens(n: int, row: int) -> Tensor:
    """What anchor ``row`` lends of n tokens in step 0, drawn one by one."""
    return torch.tensor([t for t in range(n) if uniform(0, 0, n, row, t) < 0.5], dtype=torch.long)


def both_lanes(
    model: nn.Module, text: int, shared: set[str], perturbed: dict[str, list[int]], u: float
) -> AbstractContextManager[None]:
    """Inside, rows 0-2 of a batch of six are a story of which 0 and 1 are read, rows 3-5 the same rows perturbed."""
    first = model.__class__.__name__ == "FluxTransformer2DModel"

    def explicit(
        name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert attn_mask is None
        out = torch.empty_like(query)
        total = query.shape[2]
        image = torch.arange(text, total) if first else torch.arange(total - text)
        for b in range(6):
            for h in range(query.shape[1]):
                logits, vectors = [query[b, h] @ key[b, h].T], [value[b, h]]
                for j in (0, 1) if name in shared else ():
                    if j == b % 3:
                        continue
                    places = image[lent_tokens(len(image), j)]  # of the conditional row, in both lanes
                    part = query[b, h] @ key[j, h, places].T
                    blind = torch.ones(total, dtype=torch.bool)
                    blind[image] = False
                    logits.append(part.masked_fill(blind[:, None], -torch.inf))
                    vectors.append(value[j, h, places])
                weights = torch.softmax(torch.cat(logits, 1) * query.shape[-1] ** -0.5, 1)
                out[b, h] = weights @ torch.cat(vectors)
                if b >= 3 and h in perturbed.get(name, []):
                    out[b, h] = (1 - u) * out[b, h] + u * value[b, h]
        return out

    return replaced_attention(model, shared | set(perturbed), explicit)


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("name", ["unet_sd15", "sd3", "flux"])
def test_the_fork_equals_both_lanes_in_one_batch(name, fork, monkeypatch):
    model, inputs = denoisers.build(name)
    model = model.double()
    given = double(inputs(3))
    sites = [s for s in attnsteer.sites(model) if s.kind in ("self", "joint")]
    middle, last = sites[len(sites) // 2], sites[-1]
    chosen = {middle.layer: [0, 2], last.layer: [1]}
    if not fork:
        monkeypatch.setattr("attnsteer.fork.stages_before", lambda *_: [])
    scheduler = Scheduler()
    share, guide = SharedSelfAttention(EVERY, frames=3), SoftPAG(Where(heads=chosen), strength=0.75, scale=2.0)
    with torch.no_grad(), attnsteer.steer(model, share, guide, scheduler=scheduler) as steering:
        found = scheduler.step(predict(model, given), given["timestep"], None)
        assert steering.session.unforked == {}

    twice = {
        k: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() and v.shape[0] == 3 and "_ids" not in k else v
        for k, v in given.items()
    }
    perturbed = {middle.name: [0, 2], last.name: [1]}
    text = 0 if name == "unet_sd15" else denoisers.TEXT
    with torch.no_grad(), both_lanes(model, text, {s.name for s in sites}, perturbed, 0.75):
        cond, moved = predict(model, twice).chunk(2)
    torch.testing.assert_close(found, cond + 2.0 * (cond - moved), rtol=0, atol=1e-10)
    assert (cond - moved).abs().max() > 1e-3


# ---- pipelines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_pipelines_in_whole_and_forked_and_nothing_at_strength_zero(name, monkeypatch):
    pipe = to_double(pipelines.build(name))
    share = ConsistentSelfAttention(Where(layers="all", steps=slice(1, None)), frames=2, skip=(0.2, 0.2))
    guide = PAG(Where(layers=-1))
    with attnsteer.steer(pipe, share, guide) as steering:
        forked = latents(pipe, name, batch=2)
        assert steering.session.unforked == {}
        monkeypatch.setattr("attnsteer.fork.stages_before", lambda *_: [])
        torch.testing.assert_close(latents(pipe, name, batch=2), forked, rtol=1e-9, atol=1e-9)
    results = {}
    for key, methods in {
        "share": [share],
        "guide": [guide],
        "no guide": [share, SoftPAG(Where(layers=-1), strength=0.0)],
        "no share": [ConsistentSelfAttention(EVERY, frames=2, strength=0.0), guide],
    }.items():
        with attnsteer.steer(pipe, *methods):
            results[key] = latents(pipe, name, batch=2)
    assert torch.equal(results["share"], results["no guide"])
    assert torch.equal(results["guide"], results["no share"])
    assert min((forked - results[key]).abs().max() for key in ("share", "guide")) > 1e-4


def test_references_of_ir_diffusion_are_guided_as_if_alone():
    pipe = to_double(pipelines.build("sd15"))
    how = IRDiffusion(references=MASKS, scene=SCENE, start_layer=0)
    guide = SoftPAG(Where(layers=-1), scale=2.0)
    results = []
    for methods in ([guide], [how], [how, guide]):
        with attnsteer.steer(pipe, *methods):
            results.append(latents(pipe, "sd15", batch=3))
    assert torch.equal(results[2][:2], results[0][:2])
    assert min((results[2][2] - other[2]).abs().max() for other in results[:2]) > 1e-4


def test_variants_guide_some_rows_of_a_story_alone():
    """Two rows of one story: the guided one does what it does when both are guided, for its sources are conditional."""
    pipe = to_double(pipelines.build("sd15"))
    share, guide = SharedSelfAttention(EVERY, frames=2), SoftPAG(Where(layers=-1), scale=2.0)
    step = {}
    for key, variants in {
        "one": [[share, guide], [share], [], []],
        "both": [[share, guide], [share, guide], [], []],
        "none": [[share], [share], [], []],
        "plain": [[], [], [], []],
    }.items():
        with (
            attnsteer.attach(pipe, variants=variants)
            if key != "plain"
            else attnsteer.steer(pipe, SoftPAG(Where(layers=-1), strength=0.0))
        ):
            step[key] = latents(pipe, "sd15", batch=4, steps=1)
    torch.testing.assert_close(step["one"][0], step["both"][0], rtol=1e-9, atol=1e-9)
    assert torch.equal(step["one"][1:], step["none"][1:])
    assert torch.equal(step["both"][2:], step["plain"][2:])
    assert (step["both"][1] - step["none"][1]).abs().max() > 1e-4


def test_the_loan_is_returned():
    pipe = pipelines.build("sd15")
    with attnsteer.steer(pipe, SharedSelfAttention(EVERY, frames=2), PAG(Where(layers=-1))) as steering:
        latents(pipe, "sd15", batch=2)
        assert steering.session._forward is None
        assert all(b.loan is None for made in steering.session._bindings._made.values() for b in made.values())


def test_given_pictures_stand_in_their_perturbed_rows_too():
    """However many perturbed rows there are: the scene's guidance is the same."""
    pipe = to_double(pipelines.build("sd15"))
    how = IRDiffusion(references=MASKS, scene=SCENE, start_layer=0)
    guide, other = SoftPAG(Where(layers=-1), scale=2.0), SoftPAG(Where(layers=0), scale=1.0)
    noise = torch.Generator().manual_seed(1)
    pictures = [torch.randn(4, 6, 10, generator=noise) for _ in range(2)]
    results = {}
    for key, variants in {
        "scene": [[how], [how], [how, guide, other]],
        "all": [[how, guide, other]] * 3,
        "plain": [[how]] * 3,
    }.items():
        with noised_references(pipe, [*pictures, None]), attnsteer.attach(pipe, variants=variants):
            results[key] = latents(pipe, "sd15", batch=3)
    torch.testing.assert_close(results["scene"][2], results["all"][2], rtol=1e-9, atol=1e-9)
    assert (results["scene"][2] - results["plain"][2]).abs().max() > 1e-3


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "guide",
    [
        SoftPAG(Where(layers=-1), path="chord"),
        SoftPAG(Where(layers=-1), target="uniform"),
        SEG(Where(layers=-1)),
    ],
    ids=str,
)
def test_targets_that_are_defined_over_all_keys_are_refused_where_keys_are_lent(guide):
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="keys of other rows.*do not compose at one site"):
        attnsteer.attach(pipe, SharedSelfAttention(EVERY, frames=2), guide)
    elsewhere = SharedSelfAttention(Where(layers=0), frames=2)
    attnsteer.attach(pipe, elsewhere, guide).detach()
