"""``Where``: every way to choose layers, heads and steps, and what is said about a choice that selects nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnsteer import Site, Where, WhereError


def site(name: str, kind: Any, layer: int, index: int, heads: int = 3) -> Site:
    return Site(name, kind, layer, index, heads, heads, 8)


UNET = [
    site(f"{block}.{attn}", kind, layer, 2 * layer + number, heads)
    for layer, (block, heads) in enumerate([("down.0", 2), ("down.1", 3), ("mid", 5), ("up.0", 3)])
    for number, (attn, kind) in enumerate([("attn1", "self"), ("attn2", "cross")])
]
"""Four layers with a self and a cross site each, and 2, 3, 5 and 3 heads."""
JOINT = [site(f"blocks.{i}.attn", "joint", i, i) for i in range(5)]


def names(where: Where, sites: list[Site] = UNET, kinds: Any = ("self",)) -> list[str]:
    return [s.name for s in where.select(sites, kinds)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", ["down.0.attn1", "down.1.attn1", "mid.attn1", "up.0.attn1"]),
        (0, ["down.0.attn1"]),
        (-1, ["up.0.attn1"]),
        ([2, 0, 2], ["down.0.attn1", "mid.attn1"]),
        (slice(1, None), ["down.1.attn1", "mid.attn1", "up.0.attn1"]),
        (slice(None, None, 2), ["down.0.attn1", "mid.attn1"]),
        (range(2), ["down.0.attn1", "down.1.attn1"]),
        ("mid.attn1", ["mid.attn1"]),
        ("down*", ["down.0.attn1", "down.1.attn1"]),
        (["mid*", -1], ["mid.attn1", "up.0.attn1"]),
    ],
)
def test_layers(layers: Any, expected: list[str]) -> None:
    assert names(Where(layers=layers)) == expected


def test_a_number_selects_the_kind_that_the_method_prefers_and_a_name_selects_itself() -> None:
    assert names(Where(layers=1), kinds=("cross", "self")) == ["down.1.attn2"]
    assert names(Where(layers="down.1*"), kinds=("cross", "self")) == ["down.1.attn1", "down.1.attn2"]
    assert names(Where(), UNET + [site("late", "joint", 4, 9)], ("joint", "self"))[-1] == "late"


def test_heads() -> None:
    def chosen(heads: Any, layers: Any = "all") -> dict[str, tuple[int, ...]]:
        return {s.name: h for s, h in Where(layers=layers, heads=heads).select(UNET, ("self",)).items()}

    assert chosen("all", "mid*") == {"mid.attn1": (0, 1, 2, 3, 4)}
    assert chosen(1, [0, 1]) == {"down.0.attn1": (1,), "down.1.attn1": (1,)}
    assert chosen([1, 0, 1], 0) == {"down.0.attn1": (0, 1)}
    assert chosen({2: [4, 0], -1: "all"}) == {"mid.attn1": (0, 4), "up.0.attn1": (0, 1, 2)}
    assert chosen({"mid*": 3, 0: 1}) == {"down.0.attn1": (1,), "mid.attn1": (3,)}
    assert chosen({2: 4, 3: 0}, layers=[0, 2]) == {"mid.attn1": (4,)}


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (Where(layers=4), "Layer 4 does not exist: layers are 0 to 3. There are: 0: down.0.attn1 (self, 2 heads)"),
        (Where(layers=-5), "Layer -5 does not exist"),
        (Where(layers="up.1*"), "'up.1*' cannot be selected: no site has that name. There are: 0: down.0.attn1"),
        (Where(layers="mid.attn2"), "it is cross attention; wanted is self"),
        (Where(layers=slice(9, None)), "selects no self attention"),
        (Where(heads=2), "Head 2 does not exist in 'down.0.attn1': its heads are 0 to 1."),
        (Where(layers=0, heads={1: 0}), "selects no head"),
    ],
)
def test_what_selects_nothing_says_what_there_is(where: Where, sentence: str) -> None:
    with pytest.raises(WhereError, match=re.escape(sentence)):
        where.select(UNET, ("self",))


def test_a_kind_that_the_model_lacks() -> None:
    with pytest.raises(WhereError, match=r"no causal attention; its sites: 0: blocks.0.attn \(joint, 3 heads\)"):
        Where().select(JOINT, ("causal",))


@pytest.mark.parametrize(
    ("steps", "active"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((0.0, 0.8), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((0.25, 0.5), [3, 4]),
        ((0, 1.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (3, [3]),
        ([0, -1], [0, 9]),
        ((0, 1), [0, 1]),
        (slice(2, 8, 3), [2, 5]),
        (slice(-2, None), [8, 9]),
        ({"sigma": (0.3, 0.6)}, [3, 4, 5]),
        ("prefill", []),
    ],
)
def test_steps(steps: Any, active: list[int]) -> None:
    where = Where(steps=steps)
    assert [i for i in range(10) if where.active(i, 10, sigma=i / 10)] == active


def test_phases_of_language_models() -> None:
    for phase in ("prefill", "decode"):
        assert Where(steps=phase).active(0, 1, phase=phase)
        assert Where(steps="all").active(0, 1, phase=phase)
    assert not Where(steps="prefill").active(0, 1, phase="decode")
    assert not Where(steps={"sigma": (0, 1)}).active(0, 1)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 60))
def test_adjoining_windows_share_no_step_and_lose_none(a: float, b: float, total: int) -> None:
    first, second = sorted((a, b))
    if first == second or first == 0 or second == 1:
        return
    windows = [Where(steps=(0.0, first)), Where(steps=(first, second)), Where(steps=(second, 1.0))]
    for step in range(total):
        assert sum(w.active(step, total) for w in windows) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": []},
        {"layers": 1.5},
        {"layers": None},
        {"layers": [True]},
        {"heads": []},
        {"heads": -1},
        {"heads": "some"},
        {"heads": {}},
        {"heads": {0: [-1]}},
        {"heads": 0.5},
        {"steps": "never"},
        {"steps": (0.8, 0.2)},
        {"steps": (0.5, 0.5)},
        {"steps": (-0.1, 0.5)},
        {"steps": (0.0, 1.5)},
        {"steps": (0.0, float("nan"))},
        {"steps": []},
        {"steps": 0.5},
        {"steps": [0.1, 0.2, 0.3]},
        {"steps": {"sigma": (2, 1)}},
        {"steps": {"sigma": (0, float("inf"))}},
        {"steps": {"noise": (0, 1)}},
        {"steps": {}},
        {"steps": None},
    ],
)
def test_values_that_are_no_selection_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(WhereError) as caught:
        Where(**wrong)
    assert str(caught.value).endswith(".")
    assert str(caught.value).startswith(f"{next(iter(wrong))}=")
