"""The package itself: what is in it, what importing it costs, and how others add processors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import attnsteer
from attnsteer import Processor, SteeringError, processors

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [p.parent.relative_to(ROOT) for p in ROOT.glob("attnsteer/**/__init__.py")]
    assert sorted(listed) == sorted([".".join(p.parts) for p in there] + ["attnsteer.processors"])


def test_every_public_name_is_there() -> None:
    for name in attnsteer.__all__:
        assert getattr(attnsteer, name) is not None
    assert set(attnsteer.__all__) <= set(dir(attnsteer))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = attnsteer.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_library() -> None:
    code = """import sys, time
start = time.perf_counter()
import attnsteer
seconds = time.perf_counter() - start
assert seconds < 0.3, seconds
assert not {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
for name in attnsteer.__all__:
    getattr(attnsteer, name)
from attnsteer.processors import PAG, SEG, VHR, SoftPAG
assert not {"diffusers", "transformers"} & set(sys.modules)"""
    python(code)


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    python(
        "import attnsteer.attach, attnsteer.attend; assert callable(attnsteer.attach) and callable(attnsteer.attend);"
        "from attnsteer import attach; import attnsteer.attach; assert attach is attnsteer.attach"
    )


def test_every_shipped_processor_is_listed_and_found_by_name() -> None:
    files = {p.stem for p in (ROOT / "processors").glob("[a-z]*.py")}
    assert {processors.get(name).__module__.rpartition(".")[2] for name in processors.available()} == files
    for name in processors.available():
        assert getattr(processors, name) is processors.get(name)
        assert processors.get(name).__name__ == name
    with pytest.raises(ImportError):
        from attnsteer.processors import Nonsense  # type: ignore[attr-defined]  # noqa: F401


class Mine(Processor):
    """A processor of somebody else."""


def test_other_packages_add_processors_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, value: str) -> EntryPoint:
        return EntryPoint(name, f"{__name__}:{value}", processors.GROUP)

    sys.modules.setdefault(__name__, sys.modules[Mine.__module__])
    there = [entry("Mine", "Mine"), entry("Wrong", "ROOT"), entry("SoftPAG", "Mine")]
    monkeypatch.setattr(processors, "entry_points", lambda group: there if group == processors.GROUP else [])
    assert processors.available() == (*sorted(processors._SHIPPED), "Mine", "Wrong")
    assert processors.Mine is Mine
    assert processors.SoftPAG is not Mine, "a package must not replace a shipped processor"
    with pytest.raises(SteeringError, match="no subclass of attnsteer.Processor"):
        processors.get("Wrong")
    with pytest.raises(SteeringError, match="there are: .*PAG, .*SEG, .*VHR"):
        processors.get("Nonsense")
