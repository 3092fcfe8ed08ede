"""The file of scores: nothing lost, nothing mixed up, torn lines cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnsteer.errors import SteeringError
from attnsteer.search import Head
from attnsteer.search.store import Key, Store

SETTINGS = {"steps": 20, "weights": "abc"}
SET = (Head(0, 1), Head("blocks.3.attn2", 0))


def filled(folder: Path, rank: int = 0) -> Key:
    store = Store(folder, rank)
    key = Key(store.begin(SETTINGS), SET, 'a dog\n"and" a café', 7)
    store.add([(key, {"clip": 0.1 + 0.2})])
    store.close()
    return key


def test_scores_come_back_exactly(tmp_path: Path) -> None:
    key = filled(tmp_path)
    store = Store(tmp_path)
    assert key in store
    assert store[key] == {"clip": 0.1 + 0.2}
    assert key._replace(seed=8) not in store
    assert key._replace(heads=SET[:1]) not in store


def test_other_settings_never_meet_old_scores(tmp_path: Path) -> None:
    key = filled(tmp_path)
    store = Store(tmp_path)
    other = store.begin(SETTINGS | {"steps": 21})
    assert other != key.run
    assert key._replace(run=other) not in store
    assert store.begin(dict(reversed(SETTINGS.items()))) == key.run


@pytest.mark.parametrize(
    "torn", [b'{"run": "', b'{"run": "x", "set": [], "prompt": "a", "seed": 0, "scores": {}}', b"\0\0"]
)
def test_a_torn_last_line_is_cut_off_and_new_lines_start_afresh(tmp_path: Path, torn: bytes) -> None:
    key, file = filled(tmp_path), tmp_path / "scores-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    store = Store(tmp_path)
    assert file.read_bytes() == whole
    later = key._replace(seed=9)
    store.add([(later, {"clip": 1.0})])
    store.close()
    assert later in Store(tmp_path)
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_another_process_may_be_writing_its_last_line(tmp_path: Path) -> None:
    key, file = filled(tmp_path, rank=1), tmp_path / "scores-1.jsonl"
    torn = file.read_bytes() + b'{"run": "torn'
    file.write_bytes(torn)
    store = Store(tmp_path, rank=0)
    assert key in store
    assert file.read_bytes() == torn, "a file belongs to its process"


def test_a_score_is_written_once(tmp_path: Path) -> None:
    key, store = filled(tmp_path), Store(tmp_path)
    store.add([(key, {"clip": 5.0})])
    assert store[key] == {"clip": 0.1 + 0.2}
    assert len((tmp_path / "scores-0.jsonl").read_text().splitlines()) == 2


def test_two_searches_do_not_write_to_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    store = Store(tmp_path)
    with pytest.raises(SteeringError, match="Another search is writing to"):
        Store(tmp_path)
    Store(tmp_path, rank=1).close()
    store.close()
    Store(tmp_path).close()


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"run": "x"}', '{"run": "x", "set": [[1]], "prompt": "", "seed": 0, "scores": {}}']
)
def test_a_line_that_is_no_score_is_named(tmp_path: Path, line: str) -> None:
    filled(tmp_path)
    with open(tmp_path / "scores-0.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SteeringError, match=r"scores-0.jsonl, line 3: .* is no score: remove this line"):
        Store(tmp_path)


def test_without_a_folder_scores_live_in_memory() -> None:
    store = Store(None)
    key = Key(store.begin(SETTINGS), (), "a dog", 0)
    store.add([(key, {"judge": 1.0})])
    store.reload()
    assert store[key] == {"judge": 1.0}
    assert key not in Store(None)
