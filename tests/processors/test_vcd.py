"""VCD and M3ID: the formulas by hand and by loops, the noise schedule, parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnsteer import SteeringError
from attnsteer.config import processor_from_dict
from attnsteer.contrast import amplified, plausible
from attnsteer.draws import normal
from attnsteer.hosts.counterparts import noised
from attnsteer.processors import M3ID, VCD
from attnsteer.processors.m3id import forgetting
from attnsteer.processors.vcd import diffusion_levels
from tests.hosts.contrasting import vcd

L = torch.tensor([[[2.0, 1.0, 0.0, -3.0]]])
OTHER = torch.tensor([[[2.5, 0.0, 0.0, -3.0]]])
FIRST = torch.zeros(1, dtype=torch.long)


# ---- hand examples ---------------------------------------------------------------------------------------------------
def test_hand_example() -> None:
    found = VCD(alpha=1, beta=0.1).combine(L, OTHER, FIRST)
    assert found.tolist() == [[[1.5, 2.0, 0.0, -math.inf]]]
    expected = torch.tensor([0.3482, 0.5741, 0.0777, 0.0])
    torch.testing.assert_close(found.softmax(-1)[0, 0], expected, rtol=0, atol=5e-5)
    assert math.log(0.1) + 2 == pytest.approx(-0.3026, abs=5e-5)


def test_without_strength_only_the_cut_is_left() -> None:
    assert amplified(L, OTHER, 0.0, 0.1).tolist() == [[[2.0, 1.0, 0.0, -math.inf]]]
    assert amplified(L, OTHER, 0.0, 0.0).tolist() == L.tolist()
    assert VCD(alpha=0).inert and not VCD().inert


def test_a_picture_that_stays_changes_nothing_but_the_cut() -> None:
    assert amplified(L, L, 1.0, 0.0).tolist() == L.tolist()


def test_the_levels_of_the_spec() -> None:
    for step, levels in {500: (0.8630, 0.5052), 999: (0.2850, 0.9585), 0: (0.99999, 0.0047)}.items():
        assert diffusion_levels(step) == pytest.approx(levels, abs=5e-5)


def test_levels_equal_a_loop() -> None:
    for step in (0, 1, 37, 999):
        kept = 1.0
        for k in range(step + 1):
            kept *= 1 - (1e-5 + (0.005 - 1e-5) / (1 + math.exp(-(-6 + 12 * k / 999))))
        assert diffusion_levels(step) == pytest.approx((math.sqrt(kept), math.sqrt(1 - kept)), rel=1e-9)


# ---- loops -----------------------------------------------------------------------------------------------------------
def test_rows_of_different_strength_equal_a_loop() -> None:
    logits, other = torch.randn(2, 3, 4, 11, dtype=torch.float64)
    alpha, beta = torch.tensor([0.5, 1.0, 3.0])[:, None, None], torch.tensor([0.5, 0.1, 0.9])[:, None, None]
    found = amplified(logits, other, alpha.double(), beta.double())
    for row in range(3):
        how = vcd(float(alpha[row]), float(beta.double()[row]))
        for position in range(4):
            expected = how(logits[row, position].tolist(), other[row, position].tolist(), 0)
            torch.testing.assert_close(
                found[row, position], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
            )


def test_the_best_token_survives_every_cut_and_ties_with_it_do_too() -> None:
    logits = torch.tensor([3.0, 3.0, 2.9, -math.inf])
    assert plausible(logits, 1.0).tolist() == [True, True, False, False]
    assert plausible(logits, 0.0).tolist() == [True] * 4
    found = amplified(logits, torch.tensor([1.0, 2.0, 0.0, -math.inf]), 1.0, 0.1)
    assert found[:3].tolist() == pytest.approx([5.0, 4.0, 5.8])
    assert found[3] == -math.inf  # a token that the model has forbidden stays forbidden, and is no nan


def test_half_precision_is_combined_in_float32() -> None:
    found = amplified(L.bfloat16(), OTHER.bfloat16(), 1.0, 0.1)
    assert found.dtype == torch.float32
    assert found.tolist() == [[[1.5, 2.0, 0.0, -math.inf]]]


def test_noise_equals_a_loop_over_places() -> None:
    x = torch.randn(2, 3, 4, 5)
    what = VCD(noise_step=700, seed=11).contrast()
    found = noised({"pixel_values": x}, what)["pixel_values"]
    signal, noise = diffusion_levels(700)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).tolist():
        eps = float(normal(11, *index[1:]))  # pictures share their noise
        assert float(found[tuple(index)]) == pytest.approx(signal * float(x[tuple(index)]) + noise * eps, abs=1e-5)


def test_packed_patches_are_counted_in_their_own_picture() -> None:
    x, grid = torch.zeros(6 + 4, 8), torch.tensor([[1, 2, 3], [1, 2, 2]])
    found = noised({"pixel_values": x, "image_grid_thw": grid}, VCD().contrast())["pixel_values"]
    assert torch.equal(found[6:], found[:4])
    assert len(found[:6].unique()) == 48


# ---- M3ID ------------------------------------------------------------------------------------------------------------
def test_the_weight_of_m3id_grows_with_the_answer() -> None:
    weights = forgetting(0.02, torch.tensor([0, 1, 50, 100, 512])).tolist()
    expected = [(1 - math.exp(-0.02 * t)) / math.exp(-0.02 * t) for t in (0, 1, 50, 100, 512)]
    assert weights == pytest.approx(expected, rel=1e-9)
    assert [round(w, 1) for w in weights[2:4]] == [1.7, 6.4]


def test_m3id_equals_a_loop() -> None:
    logits, other = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    found = M3ID(decay=0.3, beta=0.2).combine(logits, other, torch.arange(2, 7))
    for position in range(5):
        how = vcd(math.exp(0.3 * (position + 3)) - 1, 0.2)  # l + w (l - l') is (1 + w) l - w l'
        for row in range(2):
            expected = torch.tensor(how(logits[row, position].tolist(), other[row, position].tolist(), 0))
            torch.testing.assert_close(found[row, position].float(), expected)


# ---- parameters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1}, {"alpha": math.nan}, {"beta": 1.1}, {"noise_step": 1000}, {"noise_step": 3.0}, {"seed": -1}],
)
def test_a_wrong_parameter_names_itself_and_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        VCD(**wrong)


@pytest.mark.parametrize("wrong", [{"decay": -0.1}, {"decay": 2}, {"beta": -0.1}])
def test_a_wrong_parameter_of_m3id_names_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        M3ID(**wrong)


@pytest.mark.parametrize("processor", [VCD(), VCD(alpha=0.5, beta=0.2, noise_step=900, seed=4), M3ID(decay=0.1)])
def test_parameters_survive_the_way_through_json(processor: Any) -> None:
    assert processor_from_dict(processor.to_dict()) == processor
