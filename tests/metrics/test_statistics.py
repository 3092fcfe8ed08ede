"""The paired cluster bootstrap and Holm's correction, against loops, exact cases and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from attnsteer.metrics.statistics import holm, paired_bootstrap


def test_a_constant_difference_has_no_spread():
    plain = np.random.default_rng(0).random((12, 4))
    effect = paired_bootstrap(plain + 0.25, plain, draws=200)
    assert (effect.prompts, effect.seeds) == (12, 4)
    assert effect.positive == 1
    np.testing.assert_allclose([effect.delta, effect.low, effect.high], 0.25, atol=1e-12)
    np.testing.assert_allclose(effect.mean - effect.baseline, effect.delta, atol=1e-12)
    assert effect.p == 2 / 201


def test_no_difference_is_no_evidence():
    plain = np.random.default_rng(0).random((12, 4))
    effect = paired_bootstrap(plain, plain, draws=200)
    assert (effect.delta, effect.low, effect.high, effect.positive, effect.p) == (0, 0, 0, 0.5, 1)


def test_quantiles_equal_those_of_a_loop_over_draws():
    rng = np.random.default_rng(3)
    ours, theirs = rng.random((5, 3)), rng.random((5, 3))
    effect = paired_bootstrap(ours, theirs, draws=50, level=0.8, seed=7)
    source, means = np.random.default_rng(7), []
    for prompts in source.choice(np.arange(5), (50, 5)):
        total = 0.0
        for prompt in prompts:
            for seed in range(3):
                total += (ours[prompt, seed] - theirs[prompt, seed]) / 15
        means.append(total)
    assert effect.low == pytest.approx(np.quantile(means, 0.1))
    assert effect.high == pytest.approx(np.quantile(means, 0.9))
    assert effect.positive == np.mean(np.array(means) > 0)


def test_prompts_are_drawn_whole():
    """Seeds of one prompt that agree are one observation: the interval is as wide as with one seed each."""
    one = np.random.default_rng(1).normal(size=(40, 1))
    many = np.repeat(one, 16, axis=1)
    narrow, wide = (paired_bootstrap(x, np.zeros_like(x), draws=500) for x in (many, one))
    assert (narrow.low, narrow.high) == pytest.approx((wide.low, wide.high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(5), 0
    for trial in range(200):
        ours = 0.3 + rng.normal(size=(40, 1)) + 0.5 * rng.normal(size=(40, 2))
        effect = paired_bootstrap(ours, np.zeros((40, 2)), draws=300, seed=trial)
        inside += effect.low <= 0.3 <= effect.high
    assert 175 <= inside <= 198  # 190 expected, standard deviation 3


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01, then 2 x .03, then max(.06, .04)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("ours", "theirs"), [([[1.0]], [[1.0], [2.0]]), ([], []), ([[np.nan]], [[0.0]])])
def test_what_cannot_be_compared(ours, theirs):
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap(ours, theirs)


def test_wrong_options():
    with pytest.raises(ValueError, match="level"):
        paired_bootstrap([1.0], [0.0], level=1.0)
