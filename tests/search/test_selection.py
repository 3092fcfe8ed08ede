"""Selection files: written, read, refused, and taken by SoftPAG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.processors import SoftPAG
from attnsteer.search import Head, Selection
from tests.tiny import pipelines

FOUND = Selection(
    ((Head(3, 2), Head(0, 1)), (Head(3, 0), Head("blocks.1.attn2", 4))),
    ((0.75, 0.5), (0.875, 0.25)),
    {"steps": 20, "pairs": [["a dog", 0]]},
)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "new" / "heads.json")
    assert Selection.load(tmp_path / "new" / "heads.json") == FOUND
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["heads.json"]
    empty = Selection(())
    empty.save(tmp_path / "empty.json")
    assert Selection.load(tmp_path / "empty.json") == empty


def test_where_takes_the_first_heads_by_layer() -> None:
    assert FOUND.where(3) == Where(heads={3: (0, 2), 0: (1,)})
    assert FOUND.where(steps=(0.0, 0.5)).heads == {3: (0, 2), 0: (1,), "blocks.1.attn2": (4,)}
    assert FOUND.where(steps=(0.0, 0.5)).steps == (0.0, 0.5)
    assert FOUND.prefix(1).heads == (Head(3, 2), Head(0, 1))
    assert FOUND.prefix(1).scores == ((0.75, 0.5),)
    for top in (0, 5, -1, True, 1.0):
        with pytest.raises(SteeringError, match="the selection has 4 heads"):
            FOUND.where(top)  # type: ignore[arg-type]
    with pytest.raises(SteeringError, match="no heads"):
        Selection(((),)).where()
    with pytest.raises(SteeringError, match="this search had 2"):
        FOUND.prefix(3)


def test_softpag_takes_a_selection(tmp_path: Path) -> None:
    chosen = Selection(((Head(2, 1), Head(0, 2)), (Head(2, 0),)))
    chosen.save(tmp_path / "heads.json")
    method = SoftPAG.from_search(tmp_path / "heads.json", top=2, strength=0.25, scale=2.0, steps=(0.0, 0.5))
    assert method == SoftPAG(Where(heads={2: (1,), 0: (2,)}, steps=(0.0, 0.5)), strength=0.25, scale=2.0)
    every = SoftPAG.from_search(tmp_path / "heads.json")
    assert (every.strength, every.scale) == (0.5, 3.0)
    with attnsteer.attach(pipelines.build("sd3"), every) as steering:
        assert {site.layer: heads for site, heads in steering.selections[0].items()} == {0: (2,), 2: (0, 1)}
    every.save_pretrained(str(tmp_path / "steering"))
    assert SoftPAG.from_pretrained(str(tmp_path / "steering")).where.heads == {2: [0, 1], 0: [2]}


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "another file": ({"format": 1, "processors": []}, "keys must be"),
    "another format": ({"format": 2, "rounds": [], "settings": {}}, "format=2 is not known"),
    "rounds are no list": ({"format": 1, "rounds": {}, "settings": {}}, "'rounds' a list"),
    "a round without heads": ({"format": 1, "rounds": [{"scores": []}], "settings": {}}, "is no round"),
    "heads are no list": ({"format": 1, "rounds": [{"heads": 3}], "settings": {}}, "is no round"),
    "no head": ({"format": 1, "rounds": [{"heads": [[1]]}], "settings": {}}, "is no head"),
    "a negative head": ({"format": 1, "rounds": [{"heads": [[1, -1]]}], "settings": {}}, "is no head"),
    "a head twice": ({"format": 1, "rounds": [{"heads": [[1, 1], [1, 1]]}], "settings": {}}, "L1 H1 is selected twice"),
    "a score too few": ({"format": 1, "rounds": [{"heads": [[1, 1]], "scores": []}], "settings": {}}, "one score for"),
    "no score": ({"format": 1, "rounds": [{"heads": [[1, 1]], "scores": ["1"]}], "settings": {}}, "is no score"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_selections_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, message = WRONG[case]
    (tmp_path / "heads.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SteeringError, match=message) as caught:
        SoftPAG.from_search(tmp_path / "heads.json")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SteeringError, match=r"no selection file 'nowhere.json'"):
        SoftPAG.from_search("nowhere.json")
