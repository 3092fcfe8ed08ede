"""Configurations: what is written is read back, and whatever else is in a file is refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnsteer import Processor, SteeringError, Where
from attnsteer import processors as registry
from attnsteer.config import (
    CONFIG_NAME,
    TENSORS_NAME,
    load_processors,
    processor_from_dict,
    processor_to_dict,
    save_processors,
)
from attnsteer.processors import PAI, PAINT, SEG, VAF, VAR, VHR, SoftPAG


@dataclass(frozen=True, eq=False)
class Everything(Processor):
    """A field of every type that parameters have."""

    count: int = 1
    flag: bool = False
    level: float | None = None
    names: tuple[str, ...] = ()
    pair: tuple[float, int] = (0.5, 2)
    values: Sequence[float] = ()
    table: Mapping[int, float] | None = None
    mode: Literal["a", "b"] = "a"
    span: slice | None = None
    direction: Tensor | None = None

    token_agnostic: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda name: Everything if name == "Everything" else get(name))


def round_trip(processor: Processor, folder: Path) -> Any:
    save_processors([processor], folder)
    return load_processors(folder)[0]


@pytest.mark.parametrize(
    "processor",
    [
        SoftPAG(),
        SoftPAG(Where(layers=[7, 8, 9], heads=[0, 2], steps=(0.0, 0.8)), strength=0.25, scale=1),
        SEG(sigma=math.inf),
        SEG(sigma=2.5),
        VHR(),
        VHR(Where(layers=[1, 2], steps="decode"), alpha=1.5),
        VAR(tau=math.inf, channels=(7, 11)),
        VAF(head_fraction=0.5),
        PAI(Where(layers=[2]), alpha=0.2),
        PAINT(beta=0.3),
        Everything(count=-3, flag=True, level=-math.inf, names=("x", "inf"), pair=(1.0, -1), values=(0.0, math.inf)),
        Everything(table={-1: 0.5, 3: 2.0}, mode="b", span=slice(1, None, 2)),
    ],
)
def test_a_processor_comes_back_as_it_was(processor: Processor, tmp_path: Path) -> None:
    back = round_trip(processor, tmp_path)
    assert type(back) is type(processor)
    assert vars(back) == vars(processor)
    json.loads((tmp_path / CONFIG_NAME).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("where", "written"),
    [
        (Where(), {}),
        (Where(layers=slice(2, -1)), {"layers": {"slice": [2, -1, None]}}),
        (Where(layers=["mid*", 3, slice(0, 4, 2)]), {"layers": ["mid*", 3, {"slice": [0, 4, 2]}]}),
        (Where(heads={7: [0, 1], "mid*": "all", -1: 2}), {"heads": {"7": [0, 1], "mid*": "all", "-1": 2}}),
        (Where(steps=(0.0, 0.8)), {"steps": [0.0, 0.8]}),
        (Where(steps=[0, 1, -1]), {"steps": [0, 1, -1]}),
        (Where(steps=slice(None, 10)), {"steps": {"slice": [None, 10, None]}}),
        (Where(steps={"sigma": (0.5, 14)}), {"steps": {"sigma": [0.5, 14]}}),
    ],
)
def test_every_kind_of_selection(where: Where, written: dict[str, Any]) -> None:
    data = processor_to_dict(SoftPAG(where))
    assert data["parameters"]["where"] == written
    again = processor_from_dict(json.loads(json.dumps(data)))
    assert processor_to_dict(again) == data
    assert again.where.active(0, 20, 1.0) == where.active(0, 20, 1.0)
    if not isinstance(where.steps, dict):
        assert again.where == where


def test_ranges_and_tuples_become_lists() -> None:
    written = processor_to_dict(SoftPAG(Where(layers=range(2, 5), heads=(0, 1))))["parameters"]["where"]
    assert written == {"layers": [2, 3, 4], "heads": [0, 1]}


def test_tensors_lie_beside_in_safetensors(tmp_path: Path) -> None:
    direction = torch.randn(3, 5)
    back = round_trip(Everything(direction=direction), tmp_path)
    assert torch.equal(back.direction, direction)
    (tmp_path / TENSORS_NAME).write_bytes(b"\x80\x04pickle")
    with pytest.raises(SteeringError, match="no safetensors file"):
        load_processors(tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    with pytest.raises(SteeringError, match=f"no {TENSORS_NAME}"):
        load_processors(tmp_path)
    with pytest.raises(SteeringError, match="Tensor, which a configuration cannot hold"):
        processor_to_dict(Everything(direction=direction))


def test_methods_of_the_processor(tmp_path: Path) -> None:
    SoftPAG(strength=0.25).save_pretrained(tmp_path / "new" / "folder")
    assert SoftPAG.from_pretrained(tmp_path / "new" / "folder") == SoftPAG(strength=0.25)
    with pytest.raises(SteeringError, match="0 processors of class VHR"):
        VHR.from_pretrained(tmp_path / "new" / "folder")


def softpag(**parameters: Any) -> dict[str, Any]:
    return {"processor": "SoftPAG", "parameters": parameters}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "no processor: wanted"),
        ([], "no processor: wanted"),
        ({"processor": "SoftPAG", "class": "os.system"}, "no processor: wanted"),
        ({"processor": 3}, "is no name"),
        ({"processor": "os.system"}, "There is no processor 'os.system'; there are: .*SoftPAG"),
        ({"processor": "__import__"}, "There is no processor '__import__'"),
        ({"processor": "SoftPAG", "parameters": []}, "no mapping"),
        (softpag(strenght=1), "no parameter 'strenght'; it has: where, strength"),
        (softpag(kinds=["self"]), "no parameter 'kinds'"),
        (softpag(strength="0.5"), "'0.5' is not allowed; wanted is float"),
        (softpag(strength=True), "True is not allowed; wanted is float"),
        (softpag(strength=None), "None is not allowed; wanted is float"),
        (softpag(strength=7), "strength=7"),
        (softpag(strength="inf"), "strength=inf"),
        (softpag(target="nothing"), "'nothing' is not allowed"),
        (softpag(where=3), "3 is no selection"),
        (softpag(where={"layer": 3}), "no part 'layer'; it has: layers, heads, steps"),
        (softpag(where={"layers": []}), "selects no layer"),
        (softpag(where={"layers": True}), "True is no part"),
        (softpag(where={"layers": {"a": 1}}), "is not a layer"),
        (softpag(where={"layers": {"slice": [1]}}), "is no slice"),
        (softpag(where={"layers": {"slice": [1, 2, 0]}}), "step of a slice is not 0"),
        (softpag(where={"layers": {"slice": [1, "2", None]}}), "is no slice"),
        (softpag(where={"heads": -1}), "is not a head"),
        (softpag(where={"steps": [0.8, 0.2]}), "is no window"),
        (softpag(where={"steps": "always"}), "is not known"),
        ({"processor": "Everything", "parameters": {"pair": [0.5]}}, "1 entries; wanted are 2"),
        ({"processor": "Everything", "parameters": {"count": 1.0}}, "1.0 is not allowed; wanted is int"),
        ({"processor": "Everything", "parameters": {"level": "much"}}, "wanted is float or null"),
        ({"processor": "Everything", "parameters": {"mode": "c"}}, "wanted is 'a' or 'b'"),
        ({"processor": "Everything", "parameters": {"names": "x"}}, "'x' is not allowed"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_sentence(data: Any, sentence: str) -> None:
    with pytest.raises(SteeringError, match=sentence) as caught:
        processor_from_dict(data)
    assert len(caught.value.reasons) == 1


ENTRY = '{"processor": "SoftPAG", "parameters": {"scale": %s}}'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not JSON"),
        ("[1]", "keys must be"),
        ('{"format": 1}', "keys must be"),
        ('{"format": 2, "processors": []}', "reads format 1"),
        ('{"format": true, "processors": []}', "reads format 1"),
        ('{"format": 1, "processors": {}}', "is no list"),
        ('{"format": 1, "processors": [%s]}' % (ENTRY % "NaN"), "NaN is not a number"),
        ('{"format": 1, "processors": [%s]}' % (ENTRY % "Infinity"), "Infinity is not a number"),
        ('{"format": 1, "processors": [%s]}' % (ENTRY % "1e999"), "1e999 is not a number"),
        ('{"format": 1, "processors": [%s]}' % (ENTRY % '1, "scale": 2'), "'scale' occurs twice"),
        ('{"format": 1, "processors": %s}' % ("[" * 100_000 + "]" * 100_000), "nested too deeply"),
        ('{"format": 1, "processors": [%s]}' % (ENTRY % ("[" * 800 + "]" * 800)), "not allowed"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(SteeringError, match=sentence) as caught:
        load_processors(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=f"holds no {CONFIG_NAME}"):
        load_processors(tmp_path)
    with pytest.raises(SteeringError, match="neither a folder, nor a file, nor a hub id"):
        load_processors(tmp_path / "missing")
    with pytest.raises(SteeringError, match="No folder 'nobody/nothing'"):
        load_processors("nobody/nothing")
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SteeringError):
        load_processors(tmp_path)


def test_a_configuration_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    direction = torch.randn(2)
    save_processors([SoftPAG(strength=0.25), Everything(direction=direction)], tmp_path)

    def download(repository: str, name: str) -> str:
        assert repository == "someone/steering"
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    first, second = load_processors("someone/steering")
    assert first == SoftPAG(strength=0.25)
    assert isinstance(second, Everything)
    assert second.direction is not None
    assert torch.equal(second.direction, direction)
    save_processors([SoftPAG(strength=0.25)], tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    assert load_processors("someone/steering") == [SoftPAG(strength=0.25)]
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(SteeringError, match="No folder 'someone/steering', and no attnsteer_config.json from the hub"):
        load_processors("someone/steering")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Stranger(Processor):
        anything: Any = None

    with pytest.raises(SteeringError, match="no processor 'Stranger'"):
        save_processors([Stranger()], tmp_path)
    for value in (math.nan, object(), {0.5: 1}):
        with pytest.raises(SteeringError, match=r"Stranger\(anything=\.\.\.\)"):
            processor_to_dict(Stranger(anything=value))
    assert not list(tmp_path.iterdir())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["all", "slice", "sigma", "0"]), inner),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.sampled_from(["where", "strength", "path", "processor", "names", "table", "span"]), JSON)
def test_any_other_value_is_read_or_refused_but_never_breaks(key: str, value: Any) -> None:
    name = "Everything" if key in ("names", "table", "span") else "SoftPAG"
    for parameters in ({key: value}, {"where": {key: value}}, {"where": {"heads": value}}, {"where": {"steps": value}}):
        with suppress(SteeringError):
            assert isinstance(processor_from_dict({"processor": name, "parameters": parameters}), Processor)
