"""What maps are saved as, and how they are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from attnsteer import HeatMaps, SteeringError
from attnsteer.heat.means import Means
from attnsteer.heat.pictures import lightness, mark, overlay, palette


def some(**changed: object) -> HeatMaps:
    picture = Image.new("RGB", (40, 24), (200, 40, 40))
    maps = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    return HeatMaps(
        **{"maps": maps, "words": ("dog", "car"), "numbers": {"layer": (1, 4, 7)}, "picture": picture, **changed}
    )


def test_arrays_are_read_back(tmp_path: Path) -> None:
    heat = some(text="a dog", sinks=torch.eye(3, 5).bool())
    file = heat.save(tmp_path / "new" / "maps.safetensors")
    with safe_open(file, "pt") as stored:
        assert torch.equal(stored.get_tensor("maps"), heat.maps)
        assert torch.equal(stored.get_tensor("sinks"), heat.sinks)
        assert stored.get_tensor("picture").shape == (24, 40, 3)
        facts = {name: json.loads(value) for name, value in stored.metadata().items()}
    assert facts["words"] == ["dog", "car"] and facts["axes"] == ["word", "layer", "row", "column"]
    assert facts["numbers"] == {"layer": [1, 4, 7]} and facts["text"] == "a dog"
    with pytest.raises(SteeringError, match=r"end in .png, .* or .safetensors"):
        heat.save(tmp_path / "maps.txt")


def test_a_sheet_has_a_row_for_each_word_and_breaks_evenly(tmp_path: Path) -> None:
    heat = some()
    sheet = heat.overlay(side=50)
    assert heat.save(tmp_path / "maps.png").exists()
    assert Image.open(tmp_path / "maps.png").size == heat.overlay().size
    assert sheet.width == max(320, 8 + 4 * 58)
    broken = heat.overlay(columns=2, side=50)  # the picture and three layers in two rows of two
    assert broken.height - sheet.height == 2 * (30 + 2 * 16 + 8)
    alone = some(maps=torch.ones(2, 3, 5), numbers={})
    assert alone.overlay(side=50).height < sheet.height
    assert some(picture=None).overlay(side=50).height == sheet.height


def test_words_peaks_and_averages() -> None:
    maps = torch.zeros(2, 2, 3, 5)
    maps[0, :, 1, 4], maps[1, 0, 2, 0] = 1.0, 2.0
    heat = some(maps=maps, numbers={"layer": (0, 1)})
    assert heat.peaks == [(0.9, 0.5), (0.1, pytest.approx(5 / 6))]
    assert torch.equal(heat["CAR"], maps[1])
    assert torch.equal(heat.average().maps, maps.mean(1)) and heat.average().axes == ("word", "row", "column")
    with pytest.raises(SteeringError, match="no map of 'cat'; there are: 'dog', 'car'"):
        heat["cat"]


def test_lightness_of_the_colours_rises_evenly() -> None:
    light = lightness(palette().astype(float))
    assert light[0] < 10 and light[-1] > 95
    assert np.abs(np.diff(light) - (light[-1] - light[0]) / 255).max() < 0.6


def test_heat_colours_the_picture_where_it_is() -> None:
    heat = np.zeros((3, 5), np.float32)
    heat[0, 4] = 0.2
    shown = np.asarray(overlay(heat, Image.new("RGB", (10, 6), "grey"), (50, 30)), int)
    assert shown[3, 46, 0] - shown[3, 46, 2] > 50  # warm
    assert abs(shown[25, 5, 0] - shown[25, 5, 2]) < 30
    empty = np.asarray(overlay(np.full((3, 5), np.nan), None, (50, 30)))
    assert (empty == palette()[0]).all()
    crossed = np.asarray(mark(Image.new("RGB", (50, 30)), heat > 0))
    assert crossed[:10, 40:].any() and not crossed[11:].any() and not crossed[:, :39].any()


def test_means_weigh_heads_then_layers_alike() -> None:
    means = Means(())
    means.add(torch.full((1, 4, 2, 2), 1.0), 0, 0)  # four heads
    means.add(torch.full((1, 1, 4, 4), 3.0), 0, 1)  # one head, finer
    found, numbers = means.result({0: range(4), 1: [0]})
    assert torch.equal(found, torch.full((1, 1, 1, 1, 4, 4), 2.0)) and numbers == {}
    with pytest.raises(SteeringError, match="Nothing was read"):
        Means(()).result({})
