"""report.html: one file that needs nothing else, the right words marked; opened in a browser where there is one."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnsteer.compare import looks, results
from attnsteer.compare import tasks as kinds
from attnsteer.compare.examples import EXAMPLES, HEAT_SIDE, chosen, highlighted
from attnsteer.compare.report import write

from .common import Parrot, comparison, tasks

VOID = {"meta", "img", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OFFLINE = (
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)


def look(_: Any, __: Any, entry: Any, place: tuple[int, int]) -> looks.Look:
    """A map of two hot corners, whatever is said."""
    return looks.Look(entry["output"][slice(*place)], ((255, 0), (0, 255)), (0, 0, 64, 64), 0.25)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    made = comparison(folder, by=Parrot(), tasks=tasks(15), batch_size=5)
    made.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looks, "_made", look)
        write(made, results(made, "<b>model & co", draws=200), folder, looks.Looks(folder, made.answerer))
    made.answers.close()
    return folder / "report.html"


class Checked(HTMLParser):
    """Collects elements and complains about those that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    parsed = Checked()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert parsed.open == []
    assert "<b>model & co" in parsed.text, "names are escaped"
    pictures = [attributes for tag, attributes in parsed.found if tag == "img"]
    assert len(pictures) > 20
    for attributes in pictures:
        head, content = (attributes["src"] or "").split(",", 1)
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
        assert attributes["alt"]
    assert not [tag for tag, _ in parsed.found if tag in ("script", "link", "iframe")]
    assert not re.search(r"""(src|href)=["']?(http|//|file)""", page.read_text(encoding="utf-8"))
    tables = sum(tag == "table" for tag, _ in parsed.found)
    assert tables == 4
    assert "the interval of the paired difference" in parsed.text
    classes = [attributes.get("class") for tag, attributes in parsed.found if tag == "mark"]
    assert {None, "made-up"} == set(classes)


def test_objects_are_marked_where_they_are_named() -> None:
    (sample, *_), task = tasks(1)[0].samples, tasks(1)[0]
    assert isinstance(task, kinds.Describe)
    name = sample.truth[0]
    text = f"A {name} & two zebras <here>."
    counts = task.count(sample, text, False)
    assert highlighted({"output": text, "counts": counts}) == (
        f'A <mark>{name}</mark> &amp; two <mark class="made-up">zebras</mark> &lt;here&gt;.'
    )
    assert highlighted({"output": "", "counts": task.count(sample, "", False)}) == "<em>(nothing)</em>"


def test_wrong_answers_to_questions_are_marked() -> None:
    task = tasks(1)[1]
    sample = next(sample for sample in task.samples if sample.truth == ("no",))
    shown = {text: highlighted({"output": text, "counts": task.count(sample, text, False)}) for text in ("Yes.", "No.")}
    assert shown == {"Yes.": '<mark class="made-up">Yes.</mark>', "No.": "No."}


def test_examples_are_those_on_which_methods_differ() -> None:
    def entry(text: str, made_up: list[str]) -> dict[str, Any]:
        return {"output": text, "counts": {"made_up": made_up, "right": 1}}

    answers = {
        "same": [entry("a", []), entry("a", [])],
        "words": [entry("a", []), entry("b", [])],
        "counts": [entry("a", []), entry("b", ["cat"])],
    }
    assert chosen(answers) == ["counts", "words", "same"]


def browser(page: Path, folder: Path, *options: str) -> bytes:
    """What Chromium prints about the page."""
    there = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if there is None:
        pytest.skip("no Chromium here (Debian package chromium)")
    always = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        *OFFLINE,
    ]
    always.append(f"--user-data-dir={folder / 'profile'}")
    return subprocess.run(
        [there, *always, *options, page.as_uri()], check=True, capture_output=True, timeout=120
    ).stdout


def pixels(page: Path, folder: Path, height: int) -> Any:
    shot = folder / "shot.png"
    browser(page, folder, f"--window-size=1280,{height}", f"--screenshot={shot}")
    seen = np.asarray(Image.open(shot).convert("RGB"))
    assert seen.shape == (height, 1280, 3)
    return seen


def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    seen = pixels(page, tmp_path, 2400)
    colours = {tuple(int(c) for c in colour) for colour in seen.reshape(-1, 3)[::7]}
    assert (255, 255, 255) in colours
    assert len(colours) > 200, "pictures and plots are there"
    assert (seen.min(axis=(1, 2)) < 128).mean() > 0.2, "text all the way down"


def test_a_browser_finds_a_heat_map_beside_every_picture(page: Path, tmp_path: Path) -> None:
    dom = browser(page, tmp_path, "--dump-dom").decode()
    shown = dom.split('<div class="example">')[1:]
    assert len(shown) == 2 * EXAMPLES and "Heat: where baseline looks" in dom
    for example in shown:
        picture, heat = re.findall("<figure>(.*?)</figure>", example)
        assert "figcaption" not in picture
        said = re.fullmatch(
            r'<img alt="heat map of (.+)" src="data:.+"><figcaption>“(.+)”, 25.0 % of .+</figcaption>', heat
        )
        assert said and said[1] == said[2]


def test_a_browser_paints_the_heat_maps(page: Path, tmp_path: Path) -> None:
    (first, *_) = re.findall(r'<img alt="heat map of [^"]+" src="[^,]+,([^"]+)"', page.read_text(encoding="utf-8"))
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))).convert("RGB"))
    assert max(heat.shape) == HEAT_SIDE
    wanted = set(map(tuple, heat.reshape(-1, 3).tolist()))
    seen = set(map(tuple, pixels(page, tmp_path, 6000).reshape(-1, 3).tolist()))
    assert len(wanted) > 200 and wanted <= seen
