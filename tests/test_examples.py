"""Every script of examples/ runs on the small world, changes the picture, and is in the table of its README."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsteer import processors

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("common", "asking"))
NAMES = [file.stem for file in FILES]

QUICK = ["--num-steps", "2"]
ONE = [*QUICK, "--num-seeds", "1"]
ANSWERS = ("gift", "icd", "m3id", "paint", "pai", "vaf", "var", "vcd", "vhr")
"""Scripts that print answers instead of painting."""
ARGUMENTS: dict[str, list[str]] = {
    "a_star": ONE,
    "attend_and_excite": [*ONE, "--max-refinement-steps", "1"],
    "carve": ["--num-scenes", "2"],
    "conform": [*ONE, "--max-refinement-steps", "1"],
    "consistent_self_attention": ["--num-steps", "3"],
    "divide_and_bind": [*ONE, "--max-refinement-steps", "1", "0"],
    "focus": [*ONE, "--scales", "5"],
    "headhunter": [*ONE, "--layers", "2", "--rounds", "1", "--per-round", "1"],
    "ir_diffusion": QUICK,
    "pag": [*ONE, "--scales", "3"],
    "seg": ONE,
    "shared_self_attention": QUICK,
    "softpag": [*ONE, "--strengths", "0.5"],
    "syngen": ONE,
    "variants_grid": [*QUICK, "--layers", "1", "2", "--strengths", "0", "1"],
    **{stem: ["--num-scenes", "1", "--max-new-tokens", "8"] for stem in ANSWERS},
    "write_a_processor": QUICK,
}
"""A script that is not here fails: add it."""
ABOUT = (FOLDER / "README.md").read_text(encoding="utf-8")
EVERY = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(autouse=True)
def _as_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a script is where it imports from; outputs/ is where it is started."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)


def load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


@EVERY
def test_it_explains_itself(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(file)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in text
    assert "--seed" in text


@EVERY
def test_its_command_lines_are_understood_and_name_a_real_checkpoint(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        """Raised where the work would begin."""

    def stop(given: Any, *_: Any) -> None:
        raise ReachedError(getattr(given, "model", given))

    module, loaded = load(file), []
    loads = importlib.import_module("asking") if file.stem in ANSWERS else module
    monkeypatch.setattr(loads, "load", stop)
    commands = re.findall(r"^python examples/(.*)$", module.__doc__.replace("\\\n", " "), re.MULTILINE)
    for command in commands:
        script, *arguments = shlex.split(command)
        assert script == file.name
        with pytest.raises(ReachedError) as reached:
            module.main(arguments)
        loaded.append(str(reached.value))
    row = next(line for line in ABOUT.splitlines() if line.startswith(f"| [`{file.name}`]({file.name}) |"))
    assert loaded[0].startswith("world-")
    assert [name for name in loaded if "/" in name]
    for name in loaded:
        assert name in row


def test_there_is_a_script_for_every_method() -> None:
    used = " ".join(file.read_text(encoding="utf-8") for file in FILES)
    for name in processors.available():
        assert re.search(rf"\b{name}\(", used) or name in ("Capture", "GazeShift", "VHD"), name


@EVERY
def test_it_runs_and_changes_the_picture(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import common

    rows: dict[str, list[bytes]] = {}

    def watched(pictures: Any, *arguments: Any) -> Any:
        for picture, caption in pictures:
            rows.setdefault(caption.rpartition(", ")[0], []).append(picture.tobytes())
        return drawn(pictures, *arguments)

    drawn = common.captioned_sheet
    monkeypatch.setattr(common, "captioned_sheet", watched)
    load(file).main(ARGUMENTS[file.stem])
    printed = capsys.readouterr().out
    if file.stem in ANSWERS:
        assert re.search(r"^plain +CHAIR_I", printed, re.M) and re.search(
            rf"^{file.stem.upper()} +CHAIR_I", printed, re.M
        )
        return
    assert (tmp_path / "outputs" / f"{file.stem}.png").is_file()
    plain, *steered = rows.values()
    assert steered
    assert all(row != plain for row in steered)
    if file.stem == "ir_diffusion":
        assert steered[0][:2] == plain[:2]  # references stay as they are


def test_what_is_tried_here_exists() -> None:
    assert set(ARGUMENTS) == set(NAMES)
