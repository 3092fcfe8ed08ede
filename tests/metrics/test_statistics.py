"""Paired bootstraps of scores and of ratios, and Holm's correction, against loops, exact cases and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnsteer.metrics import statistics
from attnsteer.metrics.ratios import Ratio, mean_of
from attnsteer.metrics.statistics import (
    holm,
    paired_bootstrap,
    ratio_differences,
    ratio_intervals,
    resolvable,
)


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


# ---------------------------------------------------------------------------------------------------- ratios


COUNTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


def ratio(pairs: list[tuple[int, int]]) -> Ratio:
    return Ratio([over for over, _ in pairs], [under for _, under in pairs])


@given(COUNTS)
def test_a_ratio_is_the_ratio_of_the_sums(pairs):
    over, under = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    assert ratio(pairs).value == (over / under if under else 0)


@given(COUNTS, st.data())
def test_grouping_changes_samples_and_not_the_value(pairs, data):
    keys = data.draw(st.lists(st.sampled_from("abc"), min_size=len(pairs), max_size=len(pairs)))
    grouped = ratio(pairs).grouped(keys)
    assert len(grouped.numerators) == len(set(keys)) and grouped.value == ratio(pairs).value
    first = [sum(over for (over, _), key in zip(pairs, keys, strict=True) if key == keys[0])]
    assert grouped.numerators[0] == first[0]


@given(COUNTS)
def test_intervals_of_ratios_equal_a_loop_over_draws(pairs):
    found = ratio_intervals({"r": ratio(pairs)}, draws=20, level=0.8, seed=7)["r"]
    source, values = np.random.default_rng(7), []
    for images in source.integers(len(pairs), size=(20, len(pairs))):
        over, under = sum(pairs[i][0] for i in images), sum(pairs[i][1] for i in images)
        values.append(over / under if under else 0)
    assert found.value == ratio(pairs).value
    assert (found.low, found.high) == pytest.approx(np.quantile(values, [0.1, 0.9]))
    assert found.spread == pytest.approx(np.std(values))
    assert (found.samples, found.draws, found.level, found.seed) == (len(pairs), 20, 0.8, 7)


def test_differences_of_ratios_equal_a_loop_over_draws():
    rng = np.random.default_rng(3)
    made = rng.integers(0, 5, (2, 30)), rng.integers(5, 9, (2, 30))
    ours, theirs = (Ratio(made[0][arm], made[1][arm]) for arm in (0, 1))
    found = ratio_differences({"r": ours}, {"r": theirs, "else": theirs}, draws=50, level=0.8, seed=7)
    source, deltas = np.random.default_rng(7), []
    for images in source.integers(30, size=(50, 30)):
        rates = [sum(made[0][arm][i] for i in images) / sum(made[1][arm][i] for i in images) for arm in (0, 1)]
        deltas.append(rates[0] - rates[1])
    assert list(found) == ["r"]
    effect = found["r"]
    assert effect.delta == pytest.approx(ours.value - theirs.value)
    assert (effect.low, effect.high) == pytest.approx(np.quantile(deltas, [0.1, 0.9]))
    assert effect.positive == np.mean(np.array(deltas) > 0)
    assert effect.resolvable == pytest.approx(resolvable(np.std(deltas), 0.8))


def test_chunks_do_not_change_what_is_drawn(monkeypatch):
    rng = np.random.default_rng(0)
    table = {"a": Ratio(rng.integers(0, 5, 17), np.full(17, 5)), "b": mean_of(rng.random(17))}
    whole = ratio_intervals(table, draws=100)
    monkeypatch.setattr(statistics, "CELLS", 17 * 7)
    assert ratio_intervals(table, draws=100) == whole
    assert ratio_intervals({"b": table["b"]}, draws=100)["b"] == whole["b"]  # every ratio sees the same draws


def test_equal_arms_do_not_differ():
    table = {"r": Ratio([1, 0, 3], [2, 4, 3])}
    effect = ratio_differences(table, table, draws=100)["r"]
    assert (effect.delta, effect.low, effect.high, effect.p, effect.spread, effect.resolvable) == (0, 0, 0, 1, 0, 0)


def test_pairing_sees_what_two_intervals_would_not():
    """Images differ a lot, arms by one made-up object in every second image: only the paired interval excludes 0."""
    rng = np.random.default_rng(2)
    named = rng.integers(2, 30, 200)
    bad = rng.binomial(named - 1, rng.random(200))
    plain, worse = Ratio(bad, named), Ratio(bad + (np.arange(200) % 2), named)
    effect = ratio_differences({"r": worse}, {"r": plain}, draws=500)["r"]
    alone = ratio_intervals({"worse": worse, "plain": plain}, draws=500)
    assert effect.low > 0 and effect.resolvable < effect.delta
    assert alone["worse"].low < plain.value


def test_intervals_of_ratios_cover_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(11), 0
    for trial in range(200):
        named = rng.integers(1, 12, 80)
        found = ratio_intervals({"r": Ratio(rng.binomial(named, 0.15), named)}, draws=300, seed=trial)["r"]
        inside += found.low <= 0.15 <= found.high
    assert 175 <= inside <= 198  # 190 expected, standard deviation 3


def test_a_resolvable_difference_is_found_four_times_in_five():
    assert resolvable(1.0) == pytest.approx(2.8016, abs=1e-4)
    assert resolvable(0.5, 0.9, 0.5) == pytest.approx(0.5 * 1.6449, abs=1e-4)
    rng = np.random.default_rng(4)
    measured = rng.normal(resolvable(1.0), 1.0, 20_000)
    assert np.mean(measured > 1.96) == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ValueError, match="power"):
        resolvable(1.0, power=1.0)


@pytest.mark.parametrize(
    ("columns", "why"),
    [(([1], [1, 2]), "one length"), (([], []), "one length"), (([1], [-1]), "0 or more"), (([np.nan], [1]), "finite")],
)
def test_what_is_no_ratio(columns, why):
    with pytest.raises(ValueError, match=why):
        Ratio(*columns)


def test_ratios_that_cannot_be_compared():
    two, three = {"r": Ratio([1, 1], [2, 2])}, {"r": Ratio([1, 1, 1], [2, 2, 2])}
    with pytest.raises(ValueError, match="not of the same images"):
        ratio_differences(two, three)
    with pytest.raises(ValueError, match="No ratio in common"):
        ratio_differences(two, {"s": two["r"]})
    with pytest.raises(ValueError, match="3 keys for 2 samples"):
        two["r"].grouped("abc")
    with pytest.raises(ValueError, match="draws"):
        ratio_intervals(two, draws=0)
