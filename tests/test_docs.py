"""Every Python snippet of the README runs, every command line is understood, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsteer.cli import parser
from attnsteer.processors import available

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_snippets_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    monkeypatch.setitem(sys.modules, "readme", type(sys)("readme"))
    assert len(blocks("python")) >= 8
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["image"].size == (64, 64)
    assert namespace["answer"]
    assert namespace["processor_again"].strength == 0.25


def test_lines_outside_tables_are_not_too_long() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_command_lines_are_understood() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("attnsteer ")]
    assert len(commands) >= 5
    for line in commands:
        parser().parse_args(shlex.split(line)[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert f"\n{target}: " in makefile


def test_links_inside_the_repository_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_processor_is_in_the_table() -> None:
    for name in available():
        assert f"| `{name}` |" in README
