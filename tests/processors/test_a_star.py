"""A-STAR: the two losses by hand and in loops, the masks, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from attnsteer.config import processor_from_dict
from attnsteer.errors import SteeringError
from attnsteer.processors import AStar
from attnsteer.processors.a_star import peak_mask, retention, segregation
from tests.nursed import NOW, prepared, random_maps, view
from tests.test_maps import connected, otsu_mask

A = torch.tensor([[0.6, 0.2], [0.2, 0.0]])
OTHER = torch.tensor([[0.0, 0.2], [0.2, 0.6]])
GROUPS = (((1,),), ((3, 4),))


def test_segregation_of_the_example_and_its_gradient() -> None:
    a = A.clone().requires_grad_(True)
    loss = segregation([a, OTHER])
    assert float(loss) == pytest.approx(0.2)
    gradient = torch.autograd.grad(loss, a)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-0.10, 0.15], [0.15, 0.40]]))


def test_retention_of_the_example_and_its_gradient() -> None:
    a = A.clone().requires_grad_(True)
    mask = peak_mask(a, "relative")
    assert mask.tolist() == [[True, False], [False, False]]
    loss = retention([a], [mask])
    assert float(loss) == pytest.approx(0.7)
    gradient = torch.autograd.grad(loss, a)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-0.35, 0.15], [0.15, -0.10]]))


def test_ends_of_both_losses() -> None:
    mask = torch.tensor([[True, False]])
    assert float(segregation([A, A])) == pytest.approx(0.5)
    assert float(segregation([mask.float(), 1 - mask.float()])) == 0
    assert float(segregation([A])) == 0
    assert float(retention([mask.float()], [mask])) == pytest.approx(0.5)
    assert float(retention([torch.zeros(1, 2)], [mask])) == 1
    assert float(retention([torch.zeros(1, 2)], [~mask & mask])) == 1


def test_segregation_knows_no_scale_and_retention_does() -> None:
    assert float(segregation([3 * A, 3 * OTHER])) == pytest.approx(float(segregation([A, OTHER])))
    mask = [A > 0.5]
    assert abs(float(retention([0.5 * A], mask)) - float(retention([A], mask))) > 0.01


@pytest.mark.parametrize("value", [0.2, 0.0])
@pytest.mark.parametrize("rule", ["otsu", "relative"])
def test_a_flat_map_has_an_empty_mask_whose_term_is_one_without_gradient(rule: str, value: float) -> None:
    flat = torch.full((3, 3), value, requires_grad=True)
    assert not peak_mask(flat, rule).any()
    loss = retention([flat], [peak_mask(flat, rule)])
    assert float(loss) == 1
    assert torch.autograd.grad(loss, flat)[0].abs().max() == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_whole_loss_in_loops(weights: tuple[float, float]) -> None:
    before, now = random_maps(seed=2), random_maps(seed=3)
    method = AStar(tokens=((1,), (3, 4)), seg_weight=weights[0], ret_weight=weights[1])
    memory = method.loss([view(before, GROUPS)], None, NOW).memory
    found = float(method.loss([view(now, GROUPS)], memory, NOW).loss)

    def subjects(maps):
        n = prepared(maps)
        return [n[1], (n[3] + n[4]) / 2]

    old, new, expected = subjects(before), subjects(now), 0.0
    masks = [connected(otsu_mask(x), int(x.argmax())) for x in old]
    h, w = new[0].shape
    pixels = [(i, j) for i in range(h) for j in range(w)]
    low = sum(min(float(new[0][p]), float(new[1][p])) for p in pixels)
    expected += weights[0] * low / sum(float(new[0][p] + new[1][p]) for p in pixels)
    for x, mask in zip(new, masks, strict=True):
        low = sum(min(float(x[p]), float(mask[p])) for p in pixels)
        expected += weights[1] * (1 - low / sum(float(x[p]) + float(mask[p]) for p in pixels))
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_first_step_has_nothing_to_retain() -> None:
    slope = AStar(tokens=((1,), (3, 4)), seg_weight=0.0).loss([view(random_maps(), GROUPS)], None, NOW)
    assert float(slope.loss) == 0
    assert [mask.dtype for mask in slope.memory] == [torch.bool, torch.bool]


def test_a_layout_takes_the_place_of_the_step_before_in_every_step() -> None:
    layout = torch.zeros(2, 8, 10)
    layout[0, :4], layout[1, 4:] = 1, 1
    maps = random_maps()
    method = AStar(tokens=((1,), (3, 4)), layout=layout, seg_weight=0.0)
    top = torch.zeros(4, 5, dtype=torch.bool)
    top[:2] = True
    n = prepared(maps)
    expected = retention([n[1], (n[3] + n[4]) / 2], [top, ~top])
    slope = method.loss([view(maps, GROUPS)], None, NOW)
    assert float(slope.loss) == pytest.approx(float(expected), abs=1e-9)
    assert slope.memory is None, "nothing that is never read is made"


def test_raw_maps_take_the_relative_mask_by_default() -> None:
    maps = random_maps()
    slope = AStar(tokens=((1,), (3, 4)), softmax=False, smoothing=False).loss([view(maps, GROUPS)], None, NOW)
    assert torch.equal(slope.memory[0], maps[1] >= 0.5 * maps[1].max())


def test_maps_of_two_text_encoders_are_averaged() -> None:
    first, second = random_maps(seed=4), random_maps(n=5, seed=5)
    method = AStar(tokens=((1,), (3, 4)), ret_weight=0.0)
    views = [view(first, GROUPS), view(second, (((0,),), ((2,),)))]
    a, b = prepared(first), prepared(second)
    expected = segregation([(a[1] + b[0]) / 2, ((a[3] + a[4]) / 2 + b[2]) / 2])
    assert float(method.loss(views, None, NOW).loss) == pytest.approx(float(expected), abs=1e-9)


def test_strength_zero_is_inert() -> None:
    assert AStar(subjects=("dog",), scale_factor=0.0).inert
    assert AStar(subjects=("dog",), seg_weight=0.0, ret_weight=0.0).inert
    assert not AStar(subjects=("dog", "car")).inert


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "needs the words"),
        ({"subjects": ("dog",), "tokens": ((1,),)}, "one of both"),
        ({"subjects": "dog"}, "is one string"),
        ({"subjects": ("dog", " ")}, "at least one word"),
        ({"tokens": (1, 2)}, "a tuple of positions"),
        ({"tokens": ((-1,),)}, "a tuple of positions"),
        ({"subjects": (("red", "car"), "dog")}, r"\('red', 'car'\) are 2 words: name the noun, .*'red car'"),
        ({"subjects": ("dog",), "scale_factor": -1.0}, "scale_factor=-1.0"),
        ({"subjects": ("dog",), "scale_range": (1.0, -3.0)}, "scale_range="),
        ({"subjects": ("dog",), "level": 0.5}, "level=0.5"),
        ({"subjects": ("dog",), "mask": "half"}, "mask='half'"),
        ({"subjects": ("dog",), "layout": torch.ones(2, 4, 4)}, "a mask for each of the 1 subjects"),
    ],
)
def test_wrong_parameters_are_refused(wrong, message) -> None:
    with pytest.raises(SteeringError, match=message):
        AStar(**wrong)


def test_it_goes_through_json() -> None:
    method = AStar(subjects=("dog", "red car"), mask="relative", scale_range=(1.0, 0.2))
    assert processor_from_dict(method.to_dict()) == method
