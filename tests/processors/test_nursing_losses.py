"""Attend-and-Excite, Divide & Bind, CONFORM, SynGen and FOCUS: each loss in loops, by hand, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnsteer.config import processor_from_dict
from attnsteer.errors import SteeringError
from attnsteer.nursing import Moment
from attnsteer.processors import AttendAndExcite, Conform, DivideAndBind, Focus, SynGen
from attnsteer.processors.attend_and_excite import excitation
from attnsteer.processors.divide_and_bind import binding_divergence
from tests.nursed import NOW, prepared, random_maps, view
from tests.test_maps import smoothed

ALL = (AttendAndExcite, DivideAndBind, Conform, SynGen, Focus)
ENTRIES = (((1,),), ((3, 4),))  # two subjects, the second of two pieces
PHRASES = (((2,), (1,)), ((0,), (3, 4)))  # attribute, then noun


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def flat(x: Tensor) -> list[float]:
    return [float(v) for v in x.flatten()]


# ---- Attend-and-Excite -----------------------------------------------------------------------------------------------
def test_excitation_in_loops_with_pieces_as_entries() -> None:
    maps = random_maps()
    slope = AttendAndExcite(tokens=((1,), (3, 4))).loss([view(maps, ENTRIES)], None, NOW)
    peaks = [max(flat(prepared(maps)[t])) for t in (1, 3, 4)]
    assert float(slope.loss) == pytest.approx(max(max(0.0, 1 - peak) for peak in peaks), abs=1e-9)
    assert float(slope.presence) == pytest.approx(min(peaks), abs=1e-9)


def test_excitation_of_columns_of_one_is_zero_and_of_a_constant_is_its_distance_from_one() -> None:
    assert float(excitation([torch.ones(3, 3), torch.ones(3, 3)])[0]) == 0
    assert float(excitation([torch.full((3, 3), 0.3), torch.ones(3, 3)])[0]) == pytest.approx(0.7)


def test_the_gradient_reaches_one_neighbourhood_of_the_weakest_subject() -> None:
    maps = random_maps(h=7, w=7).requires_grad_(True)
    weakest = int(torch.stack([prepared(maps.detach())[t].max() for t in (1, 4)]).argmin())
    slope = AttendAndExcite(tokens=((1,), (4,))).loss([view(maps, (((1,),), ((4,),)))], None, NOW)
    touched = torch.autograd.grad(slope.loss, maps)[0].abs().sum(0) > 0
    peak = prepared(maps.detach())[(1, 4)[weakest]].argmax()
    rows, columns = touched.nonzero().T
    assert int(touched.sum()) <= 9
    assert (rows - peak // 7).abs().max() <= 1
    assert (columns - peak % 7).abs().max() <= 1


def test_the_step_falls_from_20_to_14() -> None:
    size = AttendAndExcite(subjects=("dog",)).nursing().step_size
    assert size(Moment(0, 50)) == 20
    assert size(Moment(25, 50)) == pytest.approx(17.26, abs=0.01)
    assert size(Moment(49, 50)) == pytest.approx(14.14, abs=0.01)
    assert size(Moment(0, 1)) == 20


# ---- Divide & Bind ---------------------------------------------------------------------------------------------------
def variation(x: Tensor) -> float:
    h, w = x.shape
    across = [abs(float(x[i, j + 1] - x[i, j])) for i in range(h) for j in range(w - 1)]
    down = [abs(float(x[i + 1, j] - x[i, j])) for i in range(h - 1) for j in range(w)]
    return sum(across) / len(across) + sum(down) / len(down)


def bound(s: Tensor, a: Tensor) -> float:
    """The divergence of subject and attribute in loops."""
    q = 0.3 if variation(s) < 0.1 else 0.2
    scaled = [v * max(flat(s)) / max(flat(a)) for v in flat(a)]
    softmaxed = []
    for values in (flat(s), scaled):
        total = sum(math.exp(v) for v in values)
        softmaxed.append([math.exp(v) / total for v in values])
    floor = q * max(softmaxed[0])
    p, r = ([max(v - floor, 0.0) + 1e-5 for v in values] for values in softmaxed)
    middle = [(x + y) / 2 for x, y in zip(p, r, strict=True)]
    return 0.5 * kl(p, middle) + 0.5 * kl(r, middle)


@pytest.mark.parametrize(("index", "weight"), [(0, 1.0), (9, 1.0), (10, 5.0), (20, 10.0), (30, 10.0)])
def test_binding_in_loops_with_attributes_from_finer_levels(index: int, weight: float) -> None:
    maps, finer, finest = random_maps(), random_maps(h=8, w=10, seed=5), random_maps(h=16, w=20, seed=6)
    method = DivideAndBind(tokens=((2, 1), (0, 3)))
    phrases = (((2,), (1,)), ((0,), (3, 4)))
    slope = method.loss([view(maps, phrases, l1=finer, l0=finest)], None, Moment(index, 50))
    coarse = prepared(maps)
    fine = prepared((finer[:, ::2, ::2] + finest[:, ::4, ::4]) / 2)
    subjects = [coarse[1], (coarse[3] + coarse[4]) / 2]
    values = [variation(s) - weight * bound(s, a) for s, a in zip(subjects, (fine[2], fine[0]), strict=True)]
    assert float(slope.loss) == pytest.approx(max(-v for v in values), abs=1e-9)
    assert float(slope.presence) == pytest.approx(min(variation(s) for s in subjects), abs=1e-9)


def test_without_attributes_only_the_contrast_counts() -> None:
    maps = random_maps()
    slope = DivideAndBind(tokens=((1,), (4,))).loss([view(maps, (((1,),), ((4,),)))], None, NOW)
    assert float(slope.loss) == pytest.approx(-min(variation(prepared(maps)[t]) for t in (1, 4)), abs=1e-9)


def test_the_code_compares_rows_with_the_last_one() -> None:
    maps = random_maps()
    slope = DivideAndBind(tokens=((1,),), compat="code").loss([view(maps, (((1,),),))], None, NOW)
    x = prepared(maps)[1]
    across = [abs(float(x[i, j + 1] - x[i, j])) for i in range(4) for j in range(4)]
    down = [abs(float(x[3, j] - x[i, j])) for i in range(1, 4) for j in range(5)]
    assert float(slope.loss) == pytest.approx(-sum(across) / 16 - sum(down) / 15, abs=1e-9)


def test_equal_maps_are_bound_without_divergence() -> None:
    x = random_maps()[0]
    assert float(binding_divergence(x, 3 * x, torch.tensor(0.5))) == pytest.approx(0, abs=1e-12)


# ---- CONFORM ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("softmax", [False, True])
def test_contrast_in_loops_with_the_step_before(softmax: bool) -> None:
    before, now = random_maps(seed=2), random_maps(seed=3)
    method = Conform(tokens=((2, 1), (0, 3)), softmax=softmax)
    first = method.loss([view(before, PHRASES)], None, NOW)
    second = method.loss([view(now, PHRASES)], first.memory, NOW)

    def vectors(maps: Tensor) -> list[Tensor]:
        n = prepared(maps) if softmax else [smoothed(m) for m in maps]
        return [n[t].flatten() for t in (2, 1, 0, 3, 4)]

    def loss(x: list[Tensor], labels: list[int]) -> float:
        terms = []
        for a in range(len(x)):
            s = [float(torch.cosine_similarity(x[a], y, dim=0)) / 0.5 for y in x]
            others = sum(math.exp(s[n]) for n in range(len(x)) if labels[n] != labels[a])
            for p in range(len(x)):
                if p != a and labels[p] == labels[a]:
                    terms.append(-math.log(math.exp(s[p]) / (math.exp(s[p]) + others)))
        return sum(terms) / len(terms)

    labels = [0, 0, 1, 1, 1]
    assert float(first.loss) == pytest.approx(loss(vectors(before), labels), abs=1e-9)
    assert float(second.loss) == pytest.approx(loss(vectors(now) + vectors(before), labels * 2), abs=1e-9)
    assert not second.memory.requires_grad


def test_single_tokens_have_no_pair_in_the_first_step() -> None:
    maps = random_maps()
    method = Conform(tokens=((1,), (4,)))
    slope = method.loss([view(maps, (((1,),), ((4,),)))], None, NOW)
    assert float(slope.loss) == 0
    again = method.loss([view(maps, (((1,),), ((4,),)))], slope.memory, NOW)
    assert float(again.loss) > 0


# ---- SynGen ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entities", [False, True])
def test_binding_of_syntax_in_loops(entities: bool) -> None:
    maps = random_maps(n=7) + 1e-3
    groups = (((2,), (1,)), ((3, 4),))  # an attribute with its noun, and a noun of two pieces without one
    method = SynGen(tokens=((2, 1), (3,)), include_entities=entities)
    slope = method.loss([view(maps, groups, rest=(0, 6))], None, NOW)
    p = [flat(m / m.sum()) for m in maps]

    def distance(a: list[int], b: list[int]) -> float:
        return max(0.5 * (kl(p[i], p[j]) + kl(p[j], p[i])) for i in a for j in b)

    others = [0, 3, 4, 6]
    negative = [sum(distance([word], [u]) for u in others) / 4 for word in (1, 2)]
    expected = distance([1], [2]) - 0.5 * sum(negative)
    if entities:
        expected -= sum(distance([3, 4], [u]) for u in (0, 1, 2, 6)) / 4
    assert float(slope.loss) == pytest.approx(expected, abs=1e-9)


def test_equal_maps_cost_nothing() -> None:
    maps = random_maps(n=1).expand(4, -1, -1)
    slope = SynGen(tokens=((0, 1),)).loss([view(maps, (((0,), (1,)),), rest=(2, 3))], None, NOW)
    assert float(slope.loss) == pytest.approx(0, abs=1e-12)


def test_a_prompt_of_nothing_else_has_no_negative_part() -> None:
    maps = random_maps(n=2) + 1e-3
    slope = SynGen(tokens=((0, 1),)).loss([view(maps, (((0,), (1,)),))], None, NOW)
    p, q = (flat(m / m.sum()) for m in maps)
    assert float(slope.loss) == pytest.approx(0.5 * (kl(p, q) + kl(q, p)), abs=1e-9)


# ---- FOCUS -----------------------------------------------------------------------------------------------------------
def test_disentangling_in_loops_over_two_text_encoders() -> None:
    first, second = random_maps(seed=2), random_maps(n=4, seed=3)
    groups = ((((2,), (1,)), ((5,),)), (((0,), (1,)), ((3,),)))
    method = Focus(tokens=((2, 1), (5,)))
    slope = method.loss([view(m, g) for m, g in zip((first, second), groups, strict=True)], None, NOW)
    a, b = [smoothed(m, 1.0) for m in first], [smoothed(m, 1.0) for m in second]

    def jsd(maps: list[Tensor]) -> float:
        rows = [flat(m**3 / (m**3).sum()) for m in maps]
        middle = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        return sum(kl(row, middle) for row in rows) / len(rows) / math.log(len(rows))

    subjects = [[a[2], a[1], b[0], b[1]], [a[5], b[3]]]
    means = [sum(maps) / len(maps) for maps in subjects]
    expected = 0.5 * (sum(jsd(maps) for maps in subjects) / 2 + 1 - jsd(means))
    assert float(slope.loss) == pytest.approx(expected, abs=1e-9)


def test_the_control_of_the_velocity_is_strong_at_the_start_and_one_in_the_middle() -> None:
    gain = Focus(subjects=("dog", "car")).nursing().velocity
    assert gain(Moment(0, 28, 1000.0)) == pytest.approx(2002, abs=1)
    assert gain(Moment(14, 28, 500.0)) == pytest.approx(1.0, abs=0.01)
    assert gain(Moment(27, 28, 0.0)) == 0


# ---- parameters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ALL)
def test_words_are_needed(method) -> None:
    with pytest.raises(SteeringError, match="needs the words"):
        method()
    with pytest.raises(SteeringError, match="one of both"):
        method(subjects=("red dog", "red car"), tokens=((1, 2), (3, 4)))


@pytest.mark.parametrize("method", ALL)
def test_strength_zero_is_inert(method) -> None:
    words = ("red dog", "blue car")
    name = "scale" if method is Focus else "scale_factor"
    assert method(subjects=words, **{name: 0.0}).inert
    assert not method(subjects=words).inert


def test_no_updates_and_no_refinement_is_inert() -> None:
    assert AttendAndExcite(subjects=("dog",), max_iter_to_alter=0, thresholds={}).inert
    assert DivideAndBind(subjects=("dog",), max_iter_to_alter=0, thresholds={}).inert
    assert Conform(subjects=("dog",), max_iter_to_alter=0, refine_steps=()).inert
    assert SynGen(subjects=("red dog",), max_iter_to_alter=0).inert


@pytest.mark.parametrize("method", ALL)
def test_they_go_through_json(method) -> None:
    given = method(subjects=("red dog", "blue car"))
    assert processor_from_dict(given.to_dict()) == given
    given = method(tokens=((1, 2), (4, 5)))
    assert processor_from_dict(given.to_dict()) == given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SynGen(subjects=("dog", "car")), "no modifier to bind"),
        (lambda: Focus(subjects=("dog",)), "at least two"),
        (lambda: Focus(subjects=("dog", "car"), control="both"), "control='both'"),
        (lambda: Conform(subjects=("dog",), temperature=0.0), "temperature=0.0"),
        (lambda: DivideAndBind(subjects=("dog",), compat="new"), "compat='new'"),
        (lambda: AttendAndExcite(subjects=("dog",), max_refinement_steps=-1), "max_refinement_steps=-1"),
        (lambda: AttendAndExcite(subjects=("dog",), scale_range=(1,)), r"scale_range=\(1,\).*2 numbers from 0 up"),
        (lambda: AttendAndExcite(subjects=("dog",), scale_range=(1, -3)), r"scale_range=\(1, -3\)"),
        (
            lambda: AttendAndExcite(subjects=("dog",), thresholds=[5]),
            r"thresholds=\[5\].*a number for each step",
        ),
        (lambda: AttendAndExcite(subjects=("dog",), thresholds={0.5: 1}), "thresholds="),
        (lambda: AttendAndExcite(subjects=("dog",), max_iter_to_alter=2.5), "max_iter_to_alter=2.5"),
        (lambda: DivideAndBind(subjects=("dog",), scale_range=(1, math.nan)), "scale_range="),
        (lambda: DivideAndBind(subjects=("dog",), max_refinement_steps=5), "max_refinement_steps=5.*2 ints from 0 up"),
        (lambda: DivideAndBind(subjects=("dog",), bind_weights=(1.0,)), r"bind_weights=\(1.0,\).*3 finite numbers"),
        (lambda: DivideAndBind(subjects=("dog",), thresholds={-1: 0.1}), "thresholds="),
        (lambda: Conform(subjects=("dog",), refine_steps=0), "refine_steps=0.*tuple of ints from 0 up"),
        (lambda: Conform(subjects=("dog",), scale_range="ab"), "scale_range='ab'"),
        (lambda: SynGen(subjects=("red dog",), level=0.5), "level=0.5"),
    ],
)
def test_wrong_parameters_are_refused(make, message) -> None:
    with pytest.raises(SteeringError, match=message):
        make()
