"""The greedy algorithm on objectives whose best heads are known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from attnsteer.errors import SteeringError
from attnsteer.search import Head, Selection, generations, hunt

POOL = [Head(layer, head) for layer in range(5) for head in range(3)]
Sets = Sequence[tuple[Head, ...]]


def additive(seed: int) -> tuple[dict[Head, float], list[int]]:
    """Hidden values of the heads, and a list that counts how many sets were scored in each round."""
    values = random.Random(seed)
    return {head: values.random() for head in POOL}, []


@pytest.mark.parametrize(("k", "rounds"), [(1, 1), (3, 4), (4, 2), (15, 1), (1, 15)])
def test_with_additive_scores_the_best_heads_come_in_descending_order_chunked_by_rounds(k: int, rounds: int) -> None:
    values, asked = additive(k)

    def measure(sets: Sets) -> list[float]:
        asked.append(len(sets))
        return [sum(values[head] for head in heads) for heads in sets]

    found = list(hunt(POOL, measure, k, rounds))
    best = sorted(POOL, key=lambda head: -values[head])[: k * rounds]
    assert [head for each in found for head in each.chosen] == best
    assert [len(each.chosen) for each in found] == [k] * rounds
    assert [each.number for each in found] == list(range(1, rounds + 1))
    assert asked == [15 - k * done for done in range(rounds)]
    assert 7 * sum(asked) == generations(15, 7, k, rounds)


def test_a_pair_with_synergy_is_found_only_once_its_partner_was_selected_in_an_earlier_round() -> None:
    """a is useless alone and worth 10 with b; b is the best single head."""
    a, b = Head(3, 1), Head(0, 2)
    values = {head: 1.0 / (2 + place) for place, head in enumerate(POOL)} | {a: 0.0, b: 5.0}

    def measure(sets: Sets) -> list[float]:
        return [sum(values[head] for head in heads) + 10 * ({a, b} <= set(heads)) for heads in sets]

    rounds = [each.chosen for each in hunt(POOL, measure, 1, 2)]
    assert rounds == [(b,), (a,)]
    once = next(hunt(POOL, measure, 2, 1)).chosen
    assert b in once
    assert a not in once
    values[b] = -1.0  # never selected early: the pair stays hidden
    assert a not in [head for each in hunt(POOL, measure, 2, 3) for head in each.chosen]


def test_ties_go_to_the_earlier_layer_then_to_the_earlier_head() -> None:
    found = [each.chosen for each in hunt(POOL, lambda sets: [0.25] * len(sets), 2, 3)]
    assert [head for chosen in found for head in chosen] == POOL[:6]
    tied = {Head(2, 0), Head(4, 1), Head(1, 2)}
    best = next(hunt(POOL, lambda sets: [float(heads[-1] in tied) for heads in sets], 3, 1)).chosen
    assert best == (Head(1, 2), Head(2, 0), Head(4, 1))


def test_heads_are_added_even_where_the_score_falls_and_none_comes_twice() -> None:
    found = list(hunt(POOL, lambda sets: [-float(len(heads)) for heads in sets], 5, 3))
    heads = [head for each in found for head in each.chosen]
    assert sorted(heads) == POOL
    assert found[0].scores[POOL[0]] == -1
    assert found[1].scores[POOL[-1]] == -6


def test_fewer_than_k_are_added_where_fewer_pass_and_a_round_without_any_ends_the_search() -> None:
    passing = {Head(1, 1): 1.0, Head(4, 2): 2.0}
    found = list(hunt(POOL, lambda sets: [passing.get(heads[-1]) for heads in sets], 3, 4))
    assert [each.chosen for each in found] == [(Head(4, 2), Head(1, 1)), ()]
    assert found[0].scores[Head(0, 0)] is None


def test_negative_and_zero_scores_are_scores() -> None:
    values = {Head(0, 1): 0.0, Head(2, 2): -0.5}
    found = next(hunt(POOL, lambda sets: [values.get(heads[-1], -1.0) for heads in sets], 2, 1))
    assert found.chosen == (Head(0, 1), Head(2, 2))


def test_generation_counts_of_the_paper() -> None:
    assert generations(576, 5, 3, 5) == 14_250
    assert generations(576, 20, 24, 1) == 11_520


@pytest.mark.parametrize(
    ("k", "rounds", "message"),
    [(0, 1, "k=0 is out of range"), (1, True, "rounds=True"), (2, 1.0, "rounds=1.0"), (4, 4, "only 15")],
)
def test_impossible_numbers_are_refused(k: int, rounds: int, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        list(hunt(POOL, lambda sets: [0.0] * len(sets), k, rounds))


def test_prefixes_are_nested() -> None:
    values, _ = additive(3)
    found = list(hunt(POOL, lambda sets: [sum(map(values.__getitem__, heads)) for heads in sets], 3, 4))
    selection = Selection(tuple(each.chosen for each in found))
    for number in range(1, 5):
        prefix = selection.prefix(number)
        assert len(prefix.heads) == 3 * number
        assert prefix.heads == selection.heads[: 3 * number]
        shorter = [
            each.chosen for each in hunt(POOL, lambda s: [sum(map(values.__getitem__, h)) for h in s], 3, number)
        ]
        assert prefix.rounds == tuple(shorter)
