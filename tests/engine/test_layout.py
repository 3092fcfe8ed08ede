"""Where text and image tokens lie, and how the image tokens lie in the plane."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import AttentionCall, Where
from tests.tiny import denoisers

from .common import DESCRIBED, Watch


def keys(call: AttentionCall) -> tuple[torch.Tensor, Any]:
    return call.k.clone(), call.spans


def watch(model: Any, inputs: dict[str, Any], layers: Any = "*") -> dict[Any, Any]:
    method = Watch(Where(layers=layers), keep=keys)
    with torch.no_grad(), attnsteer.steer(model, method) as steering:
        model(**inputs)
    return {site: state["kept"] for site, state in steering.states(method).items()}


@pytest.mark.parametrize("name", DESCRIBED)
def test_another_text_token_changes_its_own_key_column_in_the_text_span_and_no_other(name: str) -> None:
    """At the first site that reads text, before text and image have met."""
    model, inputs = denoisers.build(name)
    given = inputs(2)
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][:, 3] += 1.0
    site = next(s for s in attnsteer.sites(model) if s.kind in ("joint", "cross"))
    before, spans = watch(model, given, site.name)[site]
    after, _ = watch(model, other, site.name)[site]
    changed = ((before - after).abs().amax(dim=(1, 3)) > 1e-6)[0].nonzero().flatten().tolist()
    text = torch.arange(before.shape[2])[spans.text].tolist()
    image = torch.arange(before.shape[2])[spans.image].tolist()
    assert changed == [text[3]]
    assert len(text) == denoisers.TEXT
    assert sorted(text + image) == list(range(before.shape[2]))


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "qwen"])
def test_another_image_token_changes_only_image_key_columns(name: str) -> None:
    model, inputs = denoisers.build(name)
    given = inputs(1)
    other = {**given, "hidden_states": given["hidden_states"].clone()}
    if other["hidden_states"].dim() == 3:  # packed: one token a row
        other["hidden_states"][:, 7] += 1.0
    else:  # the patch in row 1, column 2 of a 3 x 5 grid
        other["hidden_states"][:, :, 2:4, 4:6] += 1.0
    site = next(s for s in attnsteer.sites(model) if s.kind == "joint")
    before, spans = watch(model, given, site.name)[site]
    after, _ = watch(model, other, site.name)[site]
    changed = ((before - after).abs().amax(dim=(0, 1, 3)) > 1e-6).nonzero().flatten().tolist()
    assert changed == [torch.arange(before.shape[2])[spans.image].tolist()[7]]


@pytest.mark.parametrize("name", DESCRIBED)
def test_sites_of_self_attention_are_all_image_and_those_of_cross_attention_all_text(name: str) -> None:
    model, inputs = denoisers.build(name)
    for site, (k, spans) in watch(model, inputs(2)).items():
        positions = torch.arange(k.shape[2])
        if site.kind == "self":
            assert len(positions[spans.image]) == k.shape[2]
            assert len(positions[spans.text]) == 0
        if site.kind == "cross":
            assert len(positions[spans.text]) == k.shape[2]
            assert len(positions[spans.image]) == 0


def grids(model: Any, inputs: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """Grid and number of image tokens (from the module's own input) at every site."""
    from attnsteer.hosts.denoisers import family_of, spans

    family = family_of(model)
    queries: dict[str, int] = {}
    found = {}
    for site, (k, span) in watch(model, inputs).items():
        grid = spans(model, family, inputs, site, want_grid=True)
        assert grid is not None
        queries[site.name] = len(torch.arange(k.shape[2])[span.image])
        found[site.name] = (grid.grid, queries[site.name])
    return {name: pair for name, pair in found.items() if pair[1]}


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_grid_has_as_many_places_as_there_are_image_tokens(name: str) -> None:
    model, inputs = denoisers.build(name)
    for site, (grid, tokens) in grids(model, inputs(2)).items():
        assert grid is not None, site
        assert grid[0] * grid[1] * grid[2] == tokens, site


@pytest.mark.parametrize("name", ["unet_sd15", "unet_sdxl"])
@pytest.mark.parametrize("size", [(6, 10), (7, 11), (5, 9), (8, 4)])
def test_the_grid_of_a_unet_site_is_right_at_odd_sizes(name: str, size: tuple[int, int]) -> None:
    """Every halving rounds up: 7 x 11 latents have 4 x 6 places one level down."""
    model, inputs = denoisers.build(name)
    given = inputs(1)
    given["sample"] = torch.randn(1, 4, *size)
    there = grids(model, given)
    height, width = size
    below = (1, -(-height // 2), -(-width // 2))
    for site, (grid, tokens) in there.items():
        full = site.startswith(("down_blocks.0", "up_blocks.1"))
        assert grid == ((1, height, width) if full else below), site
        assert grid[1] * grid[2] == tokens


def test_the_grids_of_flux_qwen_and_wan_are_rows_by_columns_by_frames() -> None:
    expected = {"flux": (1, 3, 5), "qwen": (1, 3, 5), "sd3": (1, 3, 5), "pixart": (1, 3, 5), "wan": (2, 3, 5)}
    for name, grid in expected.items():
        model, inputs = denoisers.build(name)
        assert {found for found, _ in grids(model, inputs(2)).values()} == {grid}, name


def test_a_blur_along_rows_tells_rows_from_columns_after_the_picture_is_turned() -> None:
    """One attachment, two runs: 3 x 5 and then 5 x 3 tokens, the same number. The grid of the first must not stay."""
    from attnsteer.processors import SEG
    from tests.tiny import pipelines

    pipe = pipelines.build("flux")
    sizes = ({"height": 48, "width": 80}, {"height": 80, "width": 48})

    def run(size: dict[str, int]) -> torch.Tensor:
        kwargs = pipelines.call_kwargs("flux", cfg=False, steps=1) | size | {"output_type": "latent"}
        return pipe(**kwargs, return_dict=False)[0]

    alone = []
    for size in sizes:
        with attnsteer.steer(pipe, SEG(Where(layers=-1), sigma=1.0)):
            alone.append(run(size))
    with attnsteer.steer(pipe, SEG(Where(layers=-1), sigma=1.0)):
        together = [run(size) for size in sizes]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
