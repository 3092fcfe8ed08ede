"""Maps of words against explicit maps of the whole attention, made by torch's own function replaced."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.processors import PAG
from tests.engine.common import denoiser_of, explicit_attention, replaced_attention, to_double
from tests.tiny import pipelines

WORDS = [["dog", "red car"], ["cat"]]
PLACES = {
    "sd15": [[(2,), (5, 6)], [(2,)]],
    "sdxl": [[(2,), (5, 6)], [(2,)]],
    "sd3": [[(2, 17), (5, 6, 20, 21)], [(2, 17)]],
    "sd35": [[(2, 17), (5, 6, 20, 21)], [(2, 17)]],
    "flux": [[(1,), (4, 5)], [(1,)]],
}
"""By hand: the text keys of "a dog and a red car" and "a cat"; CLIP starts with a special token, SD3's T5 at key 16."""
GRID = (3, 5)


def call(name: str, batch: int = 2, **options: Any) -> dict[str, Any]:
    kwargs = pipelines.call_kwargs(name, batch, **{"steps": 2, **options})
    kwargs.pop("output_type")
    return kwargs


def explicit_maps(pipe: Any, name: str, cfg: bool, **options: Any) -> dict[tuple[int, int], Tensor]:
    """``{(step, layer): (pictures, H, image, text)}`` of the conditional rows."""
    kept = defaultdict(list)

    def explicit(site: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        weights, values = explicit_attention(query, key, value, attn_mask, rest.get("scale"))
        kept[site].append(weights)
        return weights @ values

    sites = [s for s in attnsteer.sites(pipe) if s.kind in ("cross", "joint")]
    with replaced_attention(denoiser_of(pipe), [s.name for s in sites], explicit):
        pipe(**call(name, cfg=cfg, **options))
    found = {}
    for site in sites:
        calls = kept[site.name][:: 2 if name == "flux" and cfg else 1]  # FLUX runs the branches one after the other
        for step, weights in enumerate(calls):
            image = weights.shape[-2] if site.kind == "cross" else GRID[0] * GRID[1]
            if site.order == ("text", "image"):
                weights = weights[..., -image:, :-image]
            elif site.order:
                weights = weights[..., :image, image:]
            found[step, site.layer] = weights[-2:]  # [uncond, cond]
    return found


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_maps_are_the_words_columns_of_the_explicit_maps(name: str, cfg: bool) -> None:
    pipe = to_double(pipelines.build(name))
    options = call(name, cfg=cfg)
    prompts = options.pop("prompt")
    found = attnsteer.heat_maps(pipe, prompts, WORDS, per=("step", "layer", "head"), **options)
    expected = explicit_maps(pipe, name, cfg)
    steps, layers = (sorted({key[i] for key in expected}) for i in (0, 1))
    assert isinstance(found, list)
    size = found[0].maps.shape[-2:]
    for picture, heat in enumerate(found):
        assert heat.axes == ("word", "step", "layer", "head", "row", "column")
        assert heat.numbers["step"] == tuple(steps) and heat.numbers["layer"] == tuple(layers)
        assert heat.words == tuple(WORDS[picture])
        for word, keys in enumerate(PLACES[name][picture]):
            for s in steps:
                for number, layer in enumerate(layers):
                    one = expected[s, layer][picture]  # (H, image, text)
                    wanted = sum(one[:, :, key] for key in keys) / len(keys)
                    height = round((wanted.shape[-1] * GRID[0] / GRID[1]) ** 0.5)
                    wanted = wanted.unflatten(-1, (height, -1))
                    if wanted.shape[-2:] != size:
                        wanted = F.interpolate(wanted[None], size, mode="bilinear", align_corners=False)[0]
                    shown = heat.maps[word, s, number]
                    torch.testing.assert_close(shown[: len(one)], wanted, atol=1e-10, rtol=0)
                    assert shown[len(one) :].isnan().all()  # SDXL: layers with fewer heads


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_averages_are_the_means_of_what_they_average(name: str) -> None:
    pipe = to_double(pipelines.build(name))

    def maps(per: Any, where: Where | None = None) -> Tensor:
        options = call(name, 1)
        (heat,) = attnsteer.heat_maps(pipe, options.pop("prompt"), ["dog", "car"], per=per, where=where, **options)
        return heat.maps

    average = maps("average")
    assert average.dim() == 3
    torch.testing.assert_close(maps("step").mean(1), average, atol=1e-12, rtol=0)
    torch.testing.assert_close(maps("layer").mean(1), average, atol=1e-12, rtol=0)
    heads = maps("head")
    torch.testing.assert_close(heads.nanmean(2).mean(1), average, atol=1e-12, rtol=0)
    if name == "sd3":  # every layer has the same size
        some = maps("average", Where(layers=[1, 3], heads=[0, 2], steps=[1]))
        apart = maps(("step", "layer", "head"))[:, 1][:, [1, 3]][:, :, [0, 2]]
        torch.testing.assert_close(some, apart.mean((1, 2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_the_picture_is_the_one_of_a_plain_run(name: str) -> None:
    pipe = pipelines.build(name)
    plain = pipe(**call(name)).images
    before, schedule = set(vars(pipe)), set(vars(pipe.scheduler))
    options = call(name)
    found = attnsteer.heat_maps(pipe, options.pop("prompt"), WORDS, per="layer", **options)
    for one, heat in zip(plain, found, strict=True):
        assert np.array_equal(np.array(one), np.array(heat.picture))
    again = pipe(**call(name)).images
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(plain, again, strict=True))
    assert set(vars(pipe)) == before and set(vars(pipe.scheduler)) == schedule


def test_a_picture_alone_has_the_maps_that_it_has_in_a_batch() -> None:
    pipe, options = pipelines.build("sd3"), call("sd3")
    prompts, generators = options.pop("prompt"), options.pop("generator")
    del generators
    options["negative_prompt"] = options["negative_prompt"][0]
    fresh = [torch.Generator().manual_seed(i) for i in range(2)]
    negative = [options.pop("negative_prompt")] * 2
    both = attnsteer.heat_maps(pipe, prompts, WORDS, generator=fresh, negative_prompt=negative, **options)
    alone = attnsteer.heat_maps(
        pipe, prompts[1], ["cat"], generator=torch.Generator().manual_seed(1), negative_prompt=negative[0], **options
    )
    torch.testing.assert_close(alone.maps, both[1].maps, atol=1e-5, rtol=0)


def test_several_pictures_of_a_prompt_have_maps_of_their_own() -> None:
    pipe, options = pipelines.build("sd15"), call("sd15", 1, cfg=False)
    options["generator"] = torch.Generator().manual_seed(3)
    found = attnsteer.heat_maps(pipe, options.pop("prompt")[0], num_images_per_prompt=2, **options)
    assert len(found) == 2 and not torch.equal(found[0].maps, found[1].maps)
    assert found[0].words == ("a", "dog", "and", "red", "car")  # without words: all of them, each once


def test_a_steered_run_can_be_looked_at() -> None:
    pipe, options = pipelines.build("sd3"), call("sd3", 1)
    guide = PAG(Where(layers=[1]), scale=3.0)
    with attnsteer.steer(pipe, guide):
        steered = pipe(**call("sd3", 1)).images[0]
    heat = attnsteer.heat_maps(pipe, options.pop("prompt"), ["dog"], processors=[guide], **options)[0]
    assert np.array_equal(np.array(steered), np.array(heat.picture))


def test_what_cannot_be_read_is_refused() -> None:
    pipe, options = pipelines.build("sd3"), call("sd3", 1)
    (prompt,) = options.pop("prompt")
    with pytest.raises(SteeringError, match=r"'bird' is not in the prompt; its tokens are .* 2 'dog</w>'"):
        attnsteer.heat_maps(pipe, prompt, ["bird"], **options)
    assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()
    with pytest.raises(SteeringError, match="allowed are 'average', 'step'"):
        attnsteer.heat_maps(pipe, prompt, ["dog"], per="token", **options)
    with pytest.raises(SteeringError, match="list of words"):
        attnsteer.heat_maps(pipe, prompt, "dog", **options)
    with pytest.raises(SteeringError, match="each of the 1 prompts"):
        attnsteer.heat_maps(pipe, prompt, [["dog"], ["car"]], **options)
    with pytest.raises(SteeringError, match="no output_type="):
        attnsteer.heat_maps(pipe, prompt, ["dog"], output_type="np", **options)
    with pytest.raises(SteeringError, match="Layer 9 does not exist"):
        attnsteer.heat_maps(pipe, prompt, ["dog"], where=Where(layers=9), **options)
    for target in (pipe.transformer, pipelines.build("wan")):
        with pytest.raises(SteeringError, match="needs a Diffusers pipeline of"):
            attnsteer.heat_maps(target, prompt, ["dog"])
