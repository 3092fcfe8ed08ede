"""The model of lmms-eval: found by its entry point, answering requests as lmms-eval makes them. lmms-eval itself is not
installed: its registry entry and base class are stand-ins with the same names and arguments."""

from __future__ import annotations

import abc
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from attnsteer.cli import lmms
from attnsteer.compare import world
from attnsteer.errors import SteeringError
from tests.test_looking import world as loaded

from .common import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Base(abc.ABC):
    """The part of ``lmms_eval.api.model.lmms`` that a model sees."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture(autouse=True)
def _lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    lmms._model_class.cache_clear()
    yield
    lmms._model_class.cache_clear()


SCENES = [world.scenes(3)[name] for name in world.scenes(3)]
ASKED = [sample for sample in world.exists(0, 3).samples if sample.id.endswith("yes")]


def requests(**settings: Any) -> list[Instance]:
    """One question about each scene, the second of another limit."""
    limits = (32, 2, 32)
    return [
        Instance((f"<image>\n{asked.prompt}", {"max_new_tokens": limit} | settings, visuals, number, "pope", "test"))
        for number, (asked, limit) in enumerate(zip(ASKED, limits, strict=True))
    ]


def visuals(doc: Any) -> list[Any]:
    return [doc["image"].convert("RGB")]


def model(**arguments: Any) -> Any:
    made = lmms.AttnSteer(pretrained="world-llava", device="cpu", **arguments)
    made.task_dict = {"pope": {"test": [{"image": scene.image()} for scene in SCENES]}}
    return made


def test_lmms_eval_finds_a_manifest_whose_class_is_a_model() -> None:
    group = "lmms_eval.models"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    ((name, value),) = declared.items()
    manifest = EntryPoint(name, value, group).load()()
    assert isinstance(manifest, ModelManifest)
    assert (manifest.model_id, manifest.chat_class_path) == ("attnsteer", None)
    module, name = str(manifest.simple_class_path).rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Base) and found.is_simple
    assert (found.__module__, found.__qualname__) == (module, name)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = lmms.Other


def test_nothing_of_attnsteer_needs_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(lmms)
    with pytest.raises(ImportError):
        lmms.manifest()


@pytest.mark.parametrize("method", ["baseline", "'pai:alpha=0.8,layers=2:6'", "carve"])
def test_requests_are_answered_as_the_method_answers_them(method: str) -> None:
    from attnsteer.cli.compare import parsed
    from attnsteer.cli.generate import answer

    plain, processor = loaded()
    made = model(method=method, batch_size="2")
    said = made.generate_until(requests(until=["\n\n"]))
    wanted = parsed(method.strip("'"))
    for scene, asked, limit, text in zip(SCENES, ASKED, (32, 2, 32), said, strict=True):
        shown = (plain, processor, scene.image(), asked.prompt)
        if wanted.around is None:
            assert text == answer(*shown, list(wanted.processors), limit)
        else:
            assert text == wanted.around.answer(*shown, limit=limit).answer
    assert said[0].endswith(".") and not said[1].endswith(".")


def test_answers_end_where_the_task_says() -> None:
    (whole, _, _), (cut, _, _) = (model().generate_until(requests(until=until)) for until in ([], [",", "."]))
    assert whole.startswith(f"{cut},")
    assert model().generate_until(requests(until="there"))[0] == whole.split("there")[0]


WRONG: dict[str, Any] = {
    "several pictures": lambda made: made.generate_until([_with(2, lambda doc: [doc["image"]] * 2)]),
    "a video": lambda made: made.generate_until([_with(2, lambda doc: ["clip.mp4"])]),
    "no picture": lambda made: made.generate_until([_with(2, lambda doc: None)]),
    "sampling": lambda made: made.generate_until(requests(temperature=0.7)),
    "beams": lambda made: made.generate_until(requests(num_beams=3)),
}


def _with(place: int, value: Any) -> Instance:
    arguments = list(requests()[0].args)
    arguments[place] = value
    return Instance(tuple(arguments))


def test_what_it_cannot_answer_is_refused() -> None:
    made = model()
    for name, ask in WRONG.items():
        reason = "greedily" if name in ("sampling", "beams") else "about one picture"
        with pytest.raises(SteeringError, match=rf"pope-0 .*{reason}"):
            ask(made)
    with pytest.raises(NotImplementedError, match="likelihoods"):
        made.loglikelihood([])
    with pytest.raises(NotImplementedError, match="rounds"):
        made.generate_until_multi_round([])
    with pytest.raises(SteeringError, match="Layer 99 does not exist"):
        model(method="vhr:layers=99")
    for size in ("auto", "auto:4", "0", 0, -1):
        with pytest.raises(SteeringError, match=f"batch_size '?{size}'? is no number of questions"):
            model(batch_size=size)
